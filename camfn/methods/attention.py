"""Methods that follow the attention of transformers. They take no layer, because they use all layers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from camfn import _compat, layouts
from camfn._errors import CamError, RefusedError, first_line
from camfn._types import Inputs, Layers, Layout, Relevances, Size, State, Target
from camfn.formulas import attention
from camfn.methods._common import Drawing, Explained, drawn, explained, without_layer
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.attention import Attention, Blocks, Nudge, attended, blocks_of, self_attention
from camfn.model.capture import Captured, tap_from
from camfn.model.forward import check_differentiable, from_output, run_checked
from camfn.model.gradients import Of, Pullback, each_target, last_gradient, with_pullback
from camfn.model.graph_ends import Reason
from camfn.model.layers import clues_of, placed_tokens
from camfn.model.memory import is_exhausted
from camfn.model.prepare import Model, opened
from camfn.model.task import Task, begin
from camfn.targets import flatten


class Attentive(NamedTuple):
    """The clean forward pass of a transformer, with its attention."""

    explained: Explained
    attention: Attention  # from the layer `start` on
    pullback: Pullback  # from the output, or from each block's own, to the attention of every layer


@method(attention.attention_rollout, (Need.ATTENTION,), Cost(backwards=1))
def attention_rollout(
    model: nn.Module,
    layer: None,
    x: Inputs,
    target: Target = None,
    *,
    start: int = 0,
    query: int | None = None,
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Attention rollout: multiply the attention matrices of all layers to trace the output back to the patches.

    `B_l = normalize_rows(mean_h A_l + I)`, `R = B_L ... B_1`. The map is R's row of the class token, over the patches.

    `A_l` are the attention probabilities of layer l, and h its heads. The map shows how much of each patch would reach the
    output if attention alone moved information between tokens. It is class-agnostic: all targets get the same map.

    Supported are vision transformers of torchvision, timm and transformers, with or without fused attention, in which every
    layer attends from all tokens to all tokens. Tokens that attention masks exclude as keys for every query, such as padding,
    have no relevance: their value in the map is 0.

    **Arguments**

    - `layer`: must be `None`, because the method uses all layers.
    - `start`: the first layer to use. A negative int counts from the end.
    - `query`: the token whose row is the map. `None` means the token that the output depends on, or the mean of several: the
      class token, the class and distillation tokens, or all patches. They are the tokens at which the score has a gradient with
      respect to the last layer's attention. This takes one backward pass, which ends at that layer.
    - `layout`: `"auto"` drops the tokens before the patches (class, distillation, registers), and derives the grid from the
      input's proportions. `camfn.layouts.tokens(grid, prefix)` sets both.
    - `relu`: has no effect, because the map is never negative.

    The other arguments and the returned maps are those of `camfn.score_cam`.

    **Raises** `CamError` for other transformers, such as those with windowed, pooled or cross attention, and as
    `camfn.score_cam`.

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
    drawing = Drawing(relu, size, normalize, layout, axes)
    found = _explain_attention(
        "attention_rollout", layer, begin(model, x, state, None, axes), target, drawing, start=start, gradients=query is None
    )
    n, targets = found.explained.clean.shape
    forward, seen = found.explained.forward, found.attention.seen
    # A given query needs no gradient: the attention has the same number of rows.
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Gradient-weighted attention: roll out the positive part of attention times its gradient (Chefer et al., "GAE").

    From `R = I`, layer by layer, `R += mean_h relu(G_l * A_l) R` with `G_l = d(score)/dA_l`. The map is R's row of the class
    token, over the patches.

    The cost is one forward pass, and one backward pass for each target. If the output depends on the mean of the patches, a
    case that the paper does not cover, the map is the mean of their rows, including the initial I.

    The arguments, the returned maps and the errors are those of `camfn.attention_rollout`.

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
    drawing = Drawing(relu, size, normalize, layout, axes)
    found = _explain_attention("gradient_attention", layer, begin(model, x, state, None, axes), target, drawing, start=start)
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """LeGrad: average the positive gradients of each layer's own score with respect to its attention.

    `s_l = head(norm(mean over tokens of Z_l))`, where `Z_l` is the output of block l. The map is
    `mean_l mean_h mean_q relu(ds_l/dA_l)`, over the patches.

    `s_l` is the target's score of the model's output when the mean of `Z_l` replaces every token of the last block. A head that
    picks a token and a head that averages tokens both get the mean, so norm and head need not be named. The paper's equation
    uses all layers (`start=0`). The authors' code for CLIP starts at the second to last (`start=-2`).

    The cost is two forward passes for each image, and one backward pass for each target. The first forward pass gives the
    output of every block, the second evaluates the heads. In addition, each call runs its first image once more to find the
    blocks. A model that `vmap` cannot map, as it reads values in Python, runs once for each block instead of the second pass.

    The arguments, the returned maps and the errors are those of `camfn.attention_rollout`. There is no `query`, because the map
    is the mean over all rows.

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

    Bousselham et al., LeGrad, ICCV 2025 (arXiv 2404.03214). The same as torchcam's `LeGrad`.
    """
    drawing = Drawing(relu, size, normalize, layout, axes)
    task = begin(model, x, state, None, axes)
    found = _explain_attention("legrad", layer, task, target, drawing, start=start, per_block=True)
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """AG-CAM: weight the sigmoid of each attention logit by the positive gradient through the residual stream.

    `L = sum_l sum_h sum_q relu(G_l) * sigmoid(S_l)`, over the patches.

    `S_l` are the logits whose softmax is `A_l`. `G_l` is `d(score)/dA_l` with the attention of all later layers held constant,
    so that the gradient flows through the residual stream only. The cost is one forward pass, and one backward pass for each
    target.

    The paper uses the class token's row q only. On its models no other row has a gradient, so the sum over all rows is the
    same. The sum also works for models whose head averages the patches.

    The arguments, the returned maps and the errors are those of `camfn.attention_rollout`. There is no `query`, because the map
    is the sum over all rows.

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
    drawing = Drawing(relu, size, normalize, layout, axes)
    found = _explain_attention("ag_cam", layer, begin(model, x, state, None, axes), target, drawing, start=start, held=True)
    first, logits = -len(found.attention.seen), found.attention.logits
    return _of_gradients(found, lambda gradients: attention.ag_cam(logits, gradients[first:]))


# ------------------------------------------------------------------------------------------------ shared functions


def _explain_attention(
    name: str,
    layer: Layers,
    task: Task,
    target: Target,
    drawing: Drawing,
    *,
    start: int,
    held: bool = False,
    per_block: bool = False,
    gradients: bool = True,
) -> Attentive:
    """Run the model once with its attention written out.

    `held`: hold the attention of later layers constant in gradients. `per_block`: also evaluate the head on each block's
    output. `gradients`: gradients are needed.
    """
    without_layer(name, layer)
    if gradients:
        check_differentiable(task.private)
    blocks = _blocks(task) if per_block else Blocks([], 1)

    def lost(layers: Sequence[int], why: Callable[[int, str], Reason]) -> None:
        for layer in layers:
            reason = why(layer, f"attention layer {layer}")
            if reason.sentence and layer >= start % count and (reason.cut or layer == count - 1):
                raise CamError(f"{reason.sentence}; attention layers are counted from 0, and start= leaves out the first ones")

    run = functools.partial(_run, task, blocks, held)
    constants = held or per_block
    captured, back = with_pullback(run, task.state, task.batch.x, None, lost, graphed=task.graphed, constants=constants)
    output, also = captured.output
    count = len(captured.seen)
    found = explained(from_output(task, output), target, drawing)
    if not isinstance(start, int) or not -count <= start < count:
        raise CamError(f"start={start!r} must be one of the model's {count} attention layers, or a negative int from the end")
    seen: Any = captured.seen
    return Attentive(found, Attention(seen[start:], also[start:] if held else ()), _from_outputs(back, per_block))


def _from_outputs(back: Pullback, per_block: bool) -> Pullback:
    """The pullback from the model's output, or from the sum of the scores of all blocks' outputs."""

    def lifted(way: Callable[[Of], Any]) -> Callable[[Of], Any]:
        def of_blocks(of: Of) -> Of:
            return lambda got: torch.stack([of(output) for output in got[1]]).sum()

        return lambda of: way(of_blocks(of) if per_block else lambda got: of(got[0]))

    return back.through(lifted)


def _blocks(task: Task) -> Blocks:
    """Find the transformer's blocks, by one forward pass of the first image."""

    def find(state: State, x: Inputs, nudge: Any) -> Captured:
        return Captured(blocks_of(task.model, state, x, task.batch.n), ())

    return run_checked(find, task, (task.state, task.batch.x)).output


def _run(task: Task, blocks: Blocks, held: bool, state: State, x: Inputs, nudge: Nudge = None) -> Captured:
    """The attention probabilities, with the model's output, and the blocks' outputs or the attention logits."""
    tap = tap_from(task.model.borrow(), blocks.names)
    cuts = (_cut,) * len(blocks.names)
    (output, given), seen = attended(lambda: run_checked(tap, task, (state, x), cuts), nudge, held=held)
    self_attention(seen, task.batch.n)
    also = _block_outputs(task.model, blocks, given, state, x) if blocks.names else seen.logits if held else ()
    return Captured((output, also), seen.seen)


def _cut(value: Tensor) -> Tensor:
    """A zero nudge that cancels the gradient through a block's output, so that each layer is judged by itself."""
    return _compat.constant(value) - value


def _block_outputs(model: Model, blocks: Blocks, given: Any, state: State, x: Inputs) -> tuple[Any, ...]:
    """The model's outputs with the mean token of each block in place of all tokens of the last block."""
    tap = tap_from(opened(model).borrow(), blocks.names[-1:])
    means = torch.stack([attention.mean_token(tokens, blocks.axis) for tokens in given])

    def output_of(tokens: Tensor) -> Any:
        return tap(state, x, None, (tokens,)).output

    # `vmap` maps over the means only, so the blocks before the last run once.
    try:
        return _mapped_outputs(output_of, means)
    except Exception as error:  # what the model does cannot be mapped, such as a branch on a value or a custom Function
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        mapping = error
    try:
        return tuple(attended(functools.partial(output_of, mean))[0] for mean in means)
    except RuntimeError as error:
        if isinstance(error, CamError) or not _compat.transformed():
            raise
        raise CamError(
            f"legrad scores the model once for each block, and under this transform the model runs neither for all of them at "
            f"once ({first_line(mapping)}) nor for one after another ({first_line(error)}): call camfn.legrad without it"
        ) from error


def _mapped_outputs(output_of: Callable[[Tensor], Any], means: Tensor) -> tuple[Any, ...]:
    """The output for each of the means, by `vmap`. Fused attention has no batching rule."""
    leaves: list[Any] = []
    rebuilt: Any = None

    def tensors_of(tokens: Tensor) -> list[Tensor]:
        nonlocal leaves, rebuilt
        leaves, rebuilt = flatten(output_of(tokens))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    tensors, _ = attended(lambda: vmap(tensors_of)(means))

    def outputs() -> Iterator[Any]:
        for parts in zip(*tensors):
            rest = iter(parts)
            yield rebuilt([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    return tuple(outputs())


def _row(gradient: Tensor, query: int | None) -> Relevances:
    """The row to follow back from the last layer, `(n, q)`: the weights of the tokens that the output depends on."""
    if query is None:
        return attention.readers(gradient)
    count = gradient.shape[2]
    if not isinstance(query, int) or not -count <= query < count:
        raise CamError(f"query={query!r} must be one of the {count} tokens, or None")
    return attention.row_of(gradient, query)


def _of_gradients(found: Attentive, formula: Callable[[list[Tensor]], Relevances]) -> Outcome:
    """The maps of a formula of the gradients at every layer's attention, for each target."""

    def row(of: Of) -> Relevances:
        return formula([*found.pullback.gradients(of).values()])

    rows = each_target(row, found.explained.forward.output, found.explained.score)
    return _on_patches(found, rows, found.explained.clean.numel())


def _on_patches(found: Attentive, rows: list[Relevances], backwards: int) -> Outcome:
    """Drop the tokens that are not patches, and arrange the others on their grid."""
    explained, layout = found.explained, found.explained.drawing.layout
    if isinstance(layout, str) and layout != "auto":
        raise CamError(f'layout={layout!r}: attention is over tokens, say where they lie by "auto" or camfn.layouts.tokens()')
    where = layouts.tokens() if layout == "auto" else layout
    padding = ~attention.attended(found.attention.seen)  # tokens that masks exclude have no relevance
    rows = [torch.where(padding, 0, row) for row in rows]
    forward = explained.forward
    clues = functools.partial(clues_of, forward.task.private.module, forward.batch)
    placed = functools.partial(placed_tokens, forward.task)
    patches = layouts.read(torch.stack(rows, 2), where, forward.size, "attention", forward.n, clues, placed=placed)
    return drawn(explained, [patches.values], [patches.grid])._replace(backwards=backwards)
