"""Methods for transformers that follow attention: they take no layer, since they look at every one."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn import _compat, layouts
from camfn._errors import CamError
from camfn._types import Inputs, Layers, Layout, Relevances, Size, State, Target
from camfn.formulas import attention as attention_formulas
from camfn.methods.table import Drawing, Outcome, clean_scores, drawn, method, read, without_layer
from camfn.model.attention import Attention, Blocks, Nudge, attended, blocks_of, self_attention
from camfn.model.capture import Captured, tap_from
from camfn.model.forward import Subject, check_slopes, introduced, run_checked
from camfn.model.gradients import Pull, last_slope, slopes_of, with_pull
from camfn.model.prepare import Call, Prepared, opened
from camfn.model.torch_errors import ForwardError
from camfn.targets import Score, resolve


class Attentive(NamedTuple):
    """What one forward of a transformer gives."""

    subject: Subject
    score: Score
    clean: Tensor  # (n, t)
    attention: Attention  # of the layers that count
    pull: Pull  # from the output, or from each layer's own, to the attention of every layer


@method("attention", cost="1, 1 backward")
def attention_rollout(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    start: int = 0,
    query: int | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Attention rollout: how much of each patch reaches the output, if attention were all that moves tokens.

    `B_l = rows normalised of (mean_h A_l + I)`, `R = B_L ... B_1`; the map is R's row of the class token, over the patches.
    A_l are a layer's attention probabilities, h its heads. It says nothing about the target: all have one map.

    For vision transformers of torchvision, timm and transformers, with fused attention or without: all in which every layer's
    attention is of all tokens to all tokens. Others (windows, pooled or crossed attention) raise `CamError`.

    **Arguments**, beside those that all methods share (`camfn.score_cam` tells them):

    - `layer`: `None`, since every layer is followed.
    - `start`: the first layer that counts; a negative one counts from the end.
    - `query`: the token whose row is taken. `None`: the one that the output reads, and if these are several, their mean: the
      class token, the class and the distillation token, all patches. They are the ones at which the score has a gradient in the
      last layer's attention, and that is what the backward is for; it ends there.
    - `layout`: `"auto"` drops tokens before the patches (class, distillation, registers) and finds the grid by the input's
      proportions; `camfn.layouts.tokens(grid, prefix)` says it.
    - `relu` changes nothing: nothing is negative.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> class Transformer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = nn.Conv2d(3, 8, 4, 4)
    ...         self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    ...         self.head = nn.Linear(8, 5)
    ...     def forward(self, x):
    ...         return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))
    >>> camfn.attention_rollout(Transformer(), None, torch.randn(2, 3, 16, 24)).shape
    torch.Size([2, 4, 6])

    Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020 (arXiv 2005.00928).
    """
    found = _followed("attention_rollout", model, layer, x, target, state, start, slopes=query is None)
    n, targets = found.clean.shape
    # A query that is named needs no gradient: the attention itself has as many rows.
    last = last_slope(found.pull, found.subject.output, found.score) if query is None else found.attention.seen[-1]
    row = attention_formulas.rollout(found.attention.seen, _row(last, query))
    return _on_patches(found, [row] * targets, layout, Drawing(relu, size, normalize), n if query is None else 0)


@method("attention", "gradients", cost="1, 1 backward")
def gradient_attention(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    start: int = 0,
    query: int | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Gradient-weighted attention: rollout of the attention that speaks for the target (Chefer et al., "GAE").

    From `R = I`, layer by layer, `R += mean_h relu(G_l * A_l) R`, with `G_l = d(score)/dA_l`; the map is R's row of the class
    token, over the patches. One forward, and one backward for each target.

    The arguments, and what is returned and raised, are those of `camfn.attention_rollout`. Where the output reads the mean of
    the patches, of which the paper does not speak, the map is the mean of their rows, the I in them included.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> class Transformer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = nn.Conv2d(3, 8, 4, 4)
    ...         self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    ...         self.head = nn.Linear(8, 5)
    ...     def forward(self, x):
    ...         return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))
    >>> camfn.gradient_attention(Transformer(), None, torch.randn(2, 3, 16, 16), camfn.targets.top(3)).shape
    torch.Size([2, 3, 4, 4])

    Chefer et al., Generic Attention-model Explainability, ICCV 2021 (arXiv 2103.15679).
    """
    found = _followed("gradient_attention", model, layer, x, target, state, start)
    first = -len(found.attention.seen)

    def follow(gradients: list[Tensor]) -> Relevances:
        row = _row(gradients[-1], query)
        return attention_formulas.gradient_attention(found.attention.seen, gradients[first:], row, unit=normalize)

    return _of_gradients(found, follow, layout, Drawing(relu, size, normalize))


@method("attention", "gradients", cost="2, 1 backward")
def legrad(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    start: int = 0,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """LeGrad: how the score that each layer gives by itself depends on its own attention.

    `s_l = head(norm(mean over tokens of Z_l))`, Z_l what block l returns; the map is `mean_l mean_h mean_q relu(ds_l/dA_l)`,
    over the patches. Three forwards, one of which, of the first image, finds the blocks, and one backward for each target.

    `s_l` is the target of the model's own output, with the mean of Z_l in the place of every token that the last block returns:
    whichever token the head takes or averages, it gets the mean. So norm and head need not be named. The paper's equation
    takes all layers (`start=0`); the authors' code for CLIP begins at the last but one (`start=-2`).

    The arguments, and what is returned and raised, are those of `camfn.attention_rollout`, but that no row is chosen: the mean
    is over all of them.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> class Transformer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = nn.Conv2d(3, 8, 4, 4)
    ...         self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    ...         self.head = nn.Linear(8, 5)
    ...     def forward(self, x):
    ...         return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))
    >>> camfn.legrad(Transformer(), None, torch.randn(2, 3, 16, 16), size="input").shape
    torch.Size([2, 16, 16])

    Bousselham et al., LeGrad, ICCV 2025 (arXiv 2404.03214). torchcam's `LeGrad`.
    """
    found = _followed("legrad", model, layer, x, target, state, start, tails=True)
    first = -len(found.attention.seen)
    drawing = Drawing(relu, size, normalize)
    outcome = _of_gradients(found, lambda gradients: attention_formulas.legrad(gradients[first:]), layout, drawing)
    return outcome._replace(forwards=2 * outcome.forwards)


@method("attention", "gradients", cost="1, 1 backward")
def ag_cam(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    start: int = 0,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """AG-CAM: the logits of attention, squashed one by one, weighed by the gradient that does not pass other attention.

    `L = sum_l sum_h sum_q relu(G_l) * sigmoid(S_l)`, over the patches; S_l are the logits whose softmax is A_l, and `G_l` is
    `d(score)/dA_l` with the attention of all later layers held constant, so that it comes by the residual stream alone. One
    forward, and one backward for each target.

    The paper takes the class token's row q. On its models no other row has such a gradient, so that the sum over all is the
    same; it also serves models whose head takes the mean of the patches.

    The arguments, and what is returned and raised, are those of `camfn.attention_rollout`, but that no row is chosen.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> class Transformer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = nn.Conv2d(3, 8, 4, 4)
    ...         self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    ...         self.head = nn.Linear(8, 5)
    ...     def forward(self, x):
    ...         return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))
    >>> camfn.ag_cam(Transformer(), None, torch.randn(2, 3, 16, 16), 3).shape
    torch.Size([2, 4, 4])

    Leem & Seo, Attention Guided CAM, AAAI 2024 (arXiv 2402.04563).
    """
    found = _followed("ag_cam", model, layer, x, target, state, start, held=True)
    first, logits = -len(found.attention.seen), found.attention.logits
    drawing = Drawing(relu, size, normalize)
    return _of_gradients(found, lambda gradients: attention_formulas.ag_cam(logits, gradients[first:]), layout, drawing)


# ------------------------------------------------------------------------------------------------- what they share


@_compat.eager
def _followed(
    name: str,
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target,
    state: State | None,
    start: int,
    *,
    held: bool = False,
    tails: bool = False,
    slopes: bool = True,
) -> Attentive:
    """One forward with attention written out; with `tails` also each layer's own output, beside the model's.

    `slopes`: gradients are needed.
    """
    without_layer(name, layer)
    subject = introduced(model, x, state)
    if slopes:
        check_slopes(subject.shell)
    blocks = _blocks(subject) if tails else Blocks([], 1)
    run = functools.partial(_run, subject, blocks, held)
    captured, back = with_pull(run, subject.state, subject.x, None)
    output, also = captured.output
    subject = subject._replace(output=output, forwards=subject.n)
    score = resolve(target, output, subject.n, subject.image.device)
    count = len(captured.seen)
    if not isinstance(start, int) or not -count <= start < count:
        raise CamError(f"start={start!r} must be one of the model's {count} attention layers, or a negative int from the end")

    def pull(of: Callable[[Any], Tensor], last: bool = False) -> dict[int, Tensor]:
        return back(lambda got: sum(of(tail) for tail in got[1]) if tails else of(got[0]), last)

    seen: Any = captured.seen
    attention = Attention(seen[start:], also[start:] if held else ())
    return Attentive(subject, score, clean_scores(subject, score), attention, pull)


def _blocks(subject: Subject) -> Blocks:
    def find(state: State, x: Inputs, nudge: Any) -> Captured:
        return Captured(blocks_of(subject.model, state, x), ())

    return run_checked(find, subject, subject.state, subject.x).output


def _run(subject: Subject, blocks: Blocks, held: bool, state: State, x: Inputs, nudge: Nudge = None) -> Captured:
    """The attention seen; the model's output, and beside it the outputs that blocks give, or the logits of held attention."""
    tap = tap_from(subject.model.shell(), blocks.names)
    apart = (_apart,) * len(blocks.names)
    (output, given), attention = attended(lambda: run_checked(tap, subject, state, x, apart), nudge, held=held)
    self_attention(attention, subject.n)
    also = _tails(subject.model, blocks, given, state, x) if blocks.names else attention.logits if held else ()
    return Captured((output, also), attention.seen)


def _apart(value: Tensor) -> Tensor:
    """A nudge of zero that takes away a block's gradient from what comes after it: every layer is judged by itself."""
    return _compat.constant(value) - value


def _tails(model: nn.Module | Prepared | Call, blocks: Blocks, given: Any, state: State, x: Inputs) -> tuple[Any, ...]:
    """The model's output for the mean token of each block, in the place of all that the last block returns."""
    tap = tap_from(opened(model).shell(), blocks.names[-1:])
    means = torch.stack([tokens.mean(blocks.axis, keepdim=True).expand_as(tokens) for tokens in given])
    leaves: list[Any] = []
    spec: Any = None

    def tail(tokens: Tensor) -> list[Tensor]:
        nonlocal leaves, spec
        leaves, spec = tree_flatten(tap(state, x, None, (tokens,)).output)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    # Mapped over what is swapped in alone, the blocks before it run once. Written out, since fused attention has no rule.
    try:
        tensors, _ = attended(lambda: vmap(tail)(means))
    except ForwardError:  # a custom Function that cannot be mapped
        if _compat.transformed():
            raise
        tensors = [torch.stack(parts) for parts in zip(*(attended(lambda mean=mean: tail(mean))[0] for mean in means))]

    def outputs() -> Iterator[Any]:
        for parts in zip(*tensors):
            rest = iter(parts)
            yield tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return tuple(outputs())


def _row(gradient: Tensor, query: int | None) -> Relevances:
    """The row that is followed back from the last layer, `(n, q)`: weights of the tokens that are read."""
    if query is None:
        return attention_formulas.readers(gradient)
    count = gradient.shape[2]
    if not isinstance(query, int) or not -count <= query < count:
        raise CamError(f"query={query!r} must be one of the {count} tokens, or None")
    one = torch.zeros_like(attention_formulas.readers(gradient))
    return torch.cat([one[:, : query % count], one[:, :1] + 1, one[:, query % count + 1 :]], 1)


def _of_gradients(found: Attentive, formula: Callable[[list[Tensor]], Relevances], layout: Layout, drawing: Drawing) -> Outcome:
    """A backward for each target, and the formula of the gradients at every layer's attention."""
    rows = slopes_of(found.pull, found.subject.output, found.score, lambda slopes: formula([*slopes.values()]))
    return _on_patches(found, rows, layout, drawing, found.clean.numel())


def _on_patches(found: Attentive, rows: list[Relevances], layout: Layout, drawing: Drawing, backwards: int) -> Outcome:
    """Tokens that are no patches are dropped, and the others laid on their grid."""
    subject, score, clean, *_ = found
    if isinstance(layout, str) and layout != "auto":
        raise CamError(f'layout={layout!r}: attention is over tokens, say where they lie by "auto" or camfn.layouts.tokens()')
    patches = read(subject, "attention", torch.stack(rows, 2), layouts.tokens() if layout == "auto" else layout)
    return drawn(subject, score, clean, [patches.values], [patches.grid], drawing)._replace(backwards=backwards)
