"""Ablation-CAM, Recipro-CAM and LIFT-CAM, which run only the part of the model after the layer."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import maps, masks, weights
from camfn.formulas.scaling import rescale
from camfn.layouts import Read
from camfn.methods._common import Drawing, Explained, combined, drawn, explain_layer, weighed, within
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.deeplift import multipliers
from camfn.model.forward import check_differentiable, without_graph
from camfn.sweep.changes import Change, Scored, room_for, sweep_at
from camfn.sweep.options import Sweep, checked, counter


@method(weights.ablation_cam, (Need.ACTIVATIONS, Need.HEAD), Cost(head=1, head_per_channel=1))
def ablation_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    combine: Combine = "sum",
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Ablation-CAM: weight each channel by the relative drop of the score when the channel is set to zero.

    `w_k = (y - y^k) / |y|`, `L = relu(sum_k w_k A_k)`, where `y^k` is the score with channel k of the activation set to zero.

    The paper divides by y, not by its absolute value. For negative y, that gives a map of the evidence against the class. If y
    is 0, the weight is the drop itself.

    Only the head, the part of the model after the layer, runs again: for many channels at once, and not for channels that are
    zero already. Each call records the head. If it cannot be recorded, and under a transform, the whole model runs with the
    activation replaced.

    **Arguments**

    - `combine`: as in `camfn.grad_cam`.
    - `sweep`: a `camfn.Sweep`. Only chunk (changed activations, 64 by default), memory and progress have an effect.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> card = camfn.explain(model, "1", x, 3, method="ablation_cam")
    >>> drop = model[4].weight[3] * model[:2](x).mean((2, 3))  # on a pooled linear head
    >>> torch.allclose(card.weights[0][:, 0], drop / card.scores.abs(), atol=1e-6)
    True

    Desai & Ramaswamy, Ablation-CAM, WACV 2020 (doi 10.1109/WACV45572.2020.9093360). The same as
    pytorch-grad-cam's `AblationCAM`.
    """
    with without_graph(x, state):
        drawing = Drawing(relu, size, normalize, layout, axes, combine)
        found = explain_layer(model, layer, x, target, state, drawing, site="none")
        swept = _swept(found, sweep, _without_channel, _channels)
        each = [_drops(part, numbers, scored) for part, numbers, scored in zip(found.reads, swept.wanted, swept.scored)]
        return _counted(weighed(found, each), swept)


@method(masks.recipro_cam, (Need.ACTIVATIONS, Need.HEAD), Cost(head_per_position=1))
def recipro_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    window: Literal["gaussian"] | None = None,
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Recipro-CAM: give each position the score of the activation with all other positions set to zero.

    `L_p = s(head(A * 1_p))`, with all channels at position p and zeros elsewhere.

    There is no ReLU by default. An integer target means the logit, as in all methods. The papers use its softmax probability,
    `camfn.targets.probability`. The cost is one forward pass, and one run of the head for each position. For a layer of tokens,
    the method is ViT-ReciproCAM, where the window matters. Tokens without a position, such as class tokens and registers, keep
    their values.

    **Arguments**

    - `window`: `None`, or `"gaussian"`, which keeps `A * g_p` instead. `g_p` is the product over the axes of the weights
      `(1/4, 1/2, 1/4)` around p, cut off at the border.
    - `sweep`: as in `camfn.ablation_cam`.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> raw = camfn.recipro_cam(model, "1", x, 3, normalize=False)
    >>> cam = camfn.cam(model, "1", x, 3, fc="4", normalize=False)
    >>> torch.allclose(raw, cam / 36 + model[4].bias[3], atol=1e-6)  # on a pooled linear head, with 36 positions
    True

    Byun & Lee, Recipro-CAM, CVPR workshops 2024 (arXiv 2209.14074), and ViT-ReciproCAM, 2023 (arXiv 2310.02588).
    """
    if window not in (None, "gaussian"):
        raise CamError(f'window must be None or "gaussian", found {window!r}')
    steps = (1.0, 0.0) if window is None else (0.5, 0.25, 0.0)
    with without_graph(x, state):
        found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes))
        swept = _swept(found, sweep, lambda part: _around_position(part, steps), _positions)
        return _counted(drawn(found, [maps.recipro_cam(scored.scores) for scored in swept.scored]), swept)


@method(weights.lift_cam, (Need.ACTIVATIONS, Need.GRADIENTS, Need.HEAD), Cost(backwards=1, head=2))
def lift_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """LIFT-CAM: weight each channel by its DeepLIFT contribution to the score.

    `w_k = sum_p m_kp A_kp`, `L = relu(sum_k w_k A_k)`, where m are the multipliers of DeepLIFT's rescale rule between the
    activation A and zeros.

    The weights add up to the change of the score: `sum_k w_k = s(A) - s(0)`. The rule covers operations that are affine in the
    activation, element-wise functions of it (such as ReLU) and max pooling. A score that is not a logit is treated as one
    function of all outputs. Its multipliers are its gradient, averaged between the two outputs. The cost is one forward pass,
    one backward pass for each target, and two runs of the head.

    The other arguments and the returned maps are those of `camfn.score_cam`.

    **Raises** `CamError` if the part of the model after the layer has an operation without a rule, which the message names.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> after = [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), *after), torch.randn(2, 3, 8, 8)
    >>> card = camfn.explain(model, "0", x, 3, method="lift_cam")
    >>> score_of_zeros = model[1:](torch.zeros(2, 4, 6, 6))[:, 3:4]
    >>> torch.allclose(card.weights[0].sum(-1), card.scores - score_of_zeros, atol=1e-6)
    True

    Jung & Oh, Towards Better Explanations of Class Activation Mapping, ICCV 2021 (arXiv 2102.05228); the rule:
    Shrikumar et al., 2017 (arXiv 1704.02685).
    """
    with without_graph(x, state):
        found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
        forward, drawing = found.forward, found.drawing
        check_differentiable(forward.task.private)
        each, shown = [], []
        for name, part, activation in zip(forward.layers, found.reads, forward.activations):
            m = torch.stack([part.view(multiplier) for multiplier in multipliers(forward, name, activation, found.score)], 1)
            each.append(weights.lift_cam(m, part.values))
            shown.append(weights.lift_cam(within(m, drawing), rescale(part.values, (1, 2))) if normalize else each[-1])
        outcome = drawn(found, combined(found, shown))
        heads = 2 * forward.n * len(found.reads)  # the activation and the zeros
        return outcome._replace(weights=tuple(each), backwards=found.clean.numel() * len(found.reads), heads=heads)


# ------------------------------------------------------------------------------------------------ shared functions


class _Swept(NamedTuple):
    """A sweep at each layer."""

    wanted: list[list[Tensor]]  # the numbers of the scored changes, for each layer and image
    scored: list[Scored]


def _swept(
    found: Explained, sweep: Sweep, change_of: Callable[[Read], Change], wanted_of: Callable[[Read], list[Tensor]]
) -> _Swept:
    """Run the sweep at each layer."""
    forward, options = found.forward, checked(sweep)
    wanted = [wanted_of(part) for part in found.reads]
    tick = counter(options.progress, sum(len(numbers) for each in wanted for numbers in each))
    scored = []
    for name, part, each in zip(forward.layers, found.reads, wanted):
        change = change_of(part)
        room = room_for(forward, options, change.ways)
        scored.append(sweep_at(forward, name, part, found.score, change, wanted=each, room=room, tick=tick))
        room.tell()
    tick(None)
    return _Swept(wanted, scored)


def _counted(outcome: Outcome, swept: _Swept) -> Outcome:
    """Add the cost of the sweep to the outcome."""
    forwards = outcome.forwards + sum(scored.forwards for scored in swept.scored)
    return outcome._replace(forwards=forwards, heads=sum(scored.heads for scored in swept.scored))


def _without_channel(part: Read) -> Change:
    """The change that sets channel k to zero. The number c, one more than the last channel, changes nothing."""
    channels = torch.arange(part.values.shape[1], device=part.values.device)

    def make(activation: Tensor, numbers: Tensor) -> Tensor:
        return torch.where((numbers[:, None] == channels)[..., None], 0, activation)

    count = len(channels)
    return Change(make, count + 1, lambda k: f"channel {k} set to zero" if k < count else "nothing changed")


def _channels(part: Read) -> list[Tensor]:
    """For each image, the channels that are not zero already, and the number c, which changes nothing."""
    n, c, _ = part.values.shape
    if _compat.transformed():
        return [torch.arange(c + 1, device=part.values.device)] * n
    alive = torch.nn.functional.pad((part.values != 0).any(-1), (0, 1), value=True).cpu()
    return [row.nonzero()[:, 0] for row in alive]


def _drops(part: Read, wanted: list[Tensor], scored: Scored) -> Tensor:
    """The weights. The clean score comes from the same sweep, so that both scores have the same rounding."""
    c = part.values.shape[1]
    whole = torch.stack([scores[-1] for scores in scored.scores])
    without = []
    for y, numbers, scores in zip(whole, wanted, scored.scores):
        every = scores if len(scores) > c else y.repeat(c + 1, 1).index_copy(0, numbers.to(y.device), scores)
        without.append(every[:c])
    return weights.ablation_cam(torch.stack(without), whole)


def _around_position(part: Read, steps: tuple[float, ...]) -> Change:
    """The change that keeps position p, and its neighbors weighted by `steps` along each axis."""
    falloff = torch.tensor(steps, dtype=part.values.dtype, device=part.values.device)

    def make(activation: Tensor, numbers: Tensor) -> Tensor:
        return masks.recipro_cam(part.grid, numbers, falloff)[:, None] * activation

    return Change(make, math.prod(part.grid), lambda p: f"all but position {p} set to zero")


def _positions(part: Read) -> list[Tensor]:
    """For each image, all positions."""
    n, _, p = part.values.shape
    return [torch.arange(p, device=part.values.device)] * n
