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
from camfn.formulas import attention
from camfn.methods._common import Drawing, Explained, drawn, explained, read_layer, without_layer
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.attention import Attention, Blocks, Nudge, attended, blocks_of, self_attention
from camfn.model.capture import Captured, tap_from
from camfn.model.forward import Forward, Task, begin, check_differentiable, run_checked
from camfn.model.gradients import Of, Pullback, each_target, last_gradient, with_pullback
from camfn.model.inputs import Companions
from camfn.model.prepare import Model, opened
from camfn.model.torch_errors import ForwardError


class Attentive(NamedTuple):
    """The clean forward pass of a transformer, with its attention."""

    explained: Explained
    attention: Attention  # of the layers from `start` on
    pullback: Pullback  # from the output, or from each layer's own, to the attention of every layer


@method(attention.attention_rollout, (Need.ATTENTION,), Cost(backwards=1))
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
    drawing = Drawing(relu, size, normalize, layout)
    found = _followed("attention_rollout", layer, begin(model, x, state), target, drawing, start=start, slopes=query is None)
    n, targets = found.explained.clean.shape
    forward, seen = found.explained.forward, found.attention.seen
    # A query that is named needs no gradient: the attention itself has as many rows.
    last = last_gradient(found.pullback, forward.output, found.explained.score) if query is None else seen[-1]
    row = attention.attention_rollout(seen, _row(last, query))
    return _on_patches(found, [row] * targets, n if query is None else 0)


@method(attention.gradient_attention, (Need.ATTENTION, Need.GRADIENTS), Cost(backwards=1))
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
    drawing = Drawing(relu, size, normalize, layout)
    found = _followed("gradient_attention", layer, begin(model, x, state), target, drawing, start=start)
    first = -len(found.attention.seen)

    def follow(gradients: list[Tensor]) -> Relevances:
        row = _row(gradients[-1], query)
        return attention.gradient_attention(found.attention.seen, gradients[first:], row, unit=normalize)

    return _of_gradients(found, follow)


@method(attention.legrad, (Need.ATTENTION, Need.GRADIENTS), Cost(2, backwards=1))
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
    drawing = Drawing(relu, size, normalize, layout)
    found = _followed("legrad", layer, begin(model, x, state), target, drawing, start=start, tails=True)
    first = -len(found.attention.seen)
    outcome = _of_gradients(found, lambda gradients: attention.legrad(gradients[first:]))
    return outcome._replace(forwards=2 * outcome.forwards)


@method(attention.ag_cam, (Need.ATTENTION, Need.GRADIENTS), Cost(backwards=1))
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
    drawing = Drawing(relu, size, normalize, layout)
    found = _followed("ag_cam", layer, begin(model, x, state), target, drawing, start=start, held=True)
    first, logits = -len(found.attention.seen), found.attention.logits
    return _of_gradients(found, lambda gradients: attention.ag_cam(logits, gradients[first:]))


# ------------------------------------------------------------------------------------------------- what they share


@_compat.eager
def _followed(
    name: str,
    layer: Layers,
    task: Task,
    target: Target,
    drawing: Drawing,
    *,
    start: int,
    held: bool = False,
    tails: bool = False,
    slopes: bool = True,
) -> Attentive:
    """Run the model once with its attention written out. `tails`: each layer's own output, beside the model's.

    `held`: the gradient passes through no later attention. `slopes`: gradients are needed.
    """
    without_layer(name, layer)
    if slopes:
        check_differentiable(task.shell)
    blocks = _blocks(task) if tails else Blocks([], 1)
    captured, back = with_pullback(functools.partial(_run, task, blocks, held), task.state, task.batch.x, None)
    output, also = captured.output
    count = len(captured.seen)
    forward = Forward(task, (), False, output, (), Companions(task.batch.key, task.batch.n), task.batch.n)
    found = explained(forward, target, drawing)
    if not isinstance(start, int) or not -count <= start < count:
        raise CamError(f"start={start!r} must be one of the model's {count} attention layers, or a negative int from the end")
    seen: Any = captured.seen
    return Attentive(found, Attention(seen[start:], also[start:] if held else ()), _of_output(back, tails))


def _of_output(back: Pullback, tails: bool) -> Pullback:
    """The way back from the model's output, or from the sum over the layers' own outputs, where a run returned both."""

    def lifted(way: Callable[[Of], Any]) -> Callable[[Of], Any]:
        def of_tails(of: Of) -> Of:
            return lambda got: torch.stack([of(tail) for tail in got[1]]).sum()

        return lambda of: way(of_tails(of) if tails else lambda got: of(got[0]))

    return back.through(lifted)


def _blocks(task: Task) -> Blocks:
    def find(state: State, x: Inputs, nudge: Any) -> Captured:
        return Captured(blocks_of(task.model, state, x), ())

    return run_checked(find, task, (task.state, task.batch.x)).output


def _run(task: Task, blocks: Blocks, held: bool, state: State, x: Inputs, nudge: Nudge = None) -> Captured:
    """The attention seen, with the model's output, and the outputs of blocks or the logits of held attention."""
    tap = tap_from(task.model.shell(), blocks.names)
    apart = (_apart,) * len(blocks.names)
    (output, given), seen = attended(lambda: run_checked(tap, task, (state, x), apart), nudge, held=held)
    self_attention(seen, task.batch.n)
    also = _tails(task.model, blocks, given, state, x) if blocks.names else seen.logits if held else ()
    return Captured((output, also), seen.seen)


def _apart(value: Tensor) -> Tensor:
    """A nudge of zero that takes away a block's gradient from what comes after it: every layer is judged by itself."""
    return _compat.constant(value) - value


def _tails(model: Model, blocks: Blocks, given: Any, state: State, x: Inputs) -> tuple[Any, ...]:
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
        return attention.readers(gradient)
    count = gradient.shape[2]
    if not isinstance(query, int) or not -count <= query < count:
        raise CamError(f"query={query!r} must be one of the {count} tokens, or None")
    return attention.row_of(gradient, query)


def _of_gradients(found: Attentive, formula: Callable[[list[Tensor]], Relevances]) -> Outcome:
    """The maps of a formula of the gradients at every layer's attention, one gradient for each target."""

    def row(of: Of) -> Relevances:
        return formula([*found.pullback.gradients(of).values()])

    rows = each_target(row, found.explained.forward.output, found.explained.score)
    return _on_patches(found, rows, found.explained.clean.numel())


def _on_patches(found: Attentive, rows: list[Relevances], backwards: int) -> Outcome:
    """Drop the tokens that are not patches, and lay the others on their grid."""
    explained, layout = found.explained, found.explained.drawing.layout
    if isinstance(layout, str) and layout != "auto":
        raise CamError(f'layout={layout!r}: attention is over tokens, say where they lie by "auto" or camfn.layouts.tokens()')
    lie = layouts.tokens() if layout == "auto" else layout
    patches = read_layer(explained.forward, "attention", torch.stack(rows, 2), lie)
    return drawn(explained, [patches.values], [patches.grid])._replace(backwards=backwards)
