"""Poly-CAM, which combines the maps of several layers, weighted by the scores of masked inputs."""

import itertools
from collections.abc import Sequence

from torch import nn

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import maps, masks, weights
from camfn.formulas.masks import Variation, flat_channels
from camfn.formulas.weights import Variant
from camfn.methods._common import Drawing, combined, drawn, explained, with_sweep
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import look, without_graph
from camfn.model.inputs import Key
from camfn.model.layers import stages
from camfn.model.prepare import Model
from camfn.model.task import begin
from camfn.sweep.options import Sweep
from camfn.sweep.scoring import sweep_in_full
from camfn.targets import as_probabilities


@method(weights.poly_cam, (Need.ACTIVATIONS, Need.MASKED_INPUTS), Cost(per_channel=2))
def poly_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    variant: Variant = "+-",
    percentile: float = 0.1,
    masked: Key = None,
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Poly-CAM: multiply the maps of several layers, from deep to shallow, with channels weighted by masked inputs.

    `S_l = sum_k w_k A_k` at each layer. The map of the deepest layer is `L_l = relu(S_l)`, and that of every other layer is
    `L_l = relu(S_l) / U(D(relu(S_l))) * U(L_{l+1})`.

    D resizes to the grid of layer `l + 1` and U back, both linearly. A deeper cell sets the amount, and the shallower layer
    distributes it within the cell. In the weights below, `M_k` is the upsampled mask of a channel, and s the score. An integer
    target means the probability of that class, as in the authors' code. Use `camfn.targets.logit(c)` for the raw
    output.

    The map equals that of the authors' code, except in three ways. The authors divide a mask by its upper percentile, not by
    the range between the two percentiles, which is the same if the channel starts at 0. They divide by 1e-12 where D gives 0;
    here the factor is 0. They also clip the map at these percentiles.

    **Arguments**

    - `layer`: several layers in the order of execution. Each returned map combines its layer with all later ones, so the first
      map is the finest. A single layer gives the map of that layer. `None` selects the last layer of each size, and returns the
      finest map only.
    - `variant="+"` (PCAM+): `w_k = s(x * M_k)`. The cost is one forward pass for each channel that is not constant.
    - `variant="-"` (PCAM-): `w_k = relu(s(x) - s(x * (1 - M_k)))`, at the same cost.
    - `variant="+-"` (PCAM±): `w_k = relu(s(x * M_k) + s(x) - s(x * (1 - M_k)))`, at twice the cost.
    - `percentile`: a mask is 0 at this percentile of its channel, 1 at 100 minus it, and linear between. 0 is plain min-max
      normalization.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. `sweep` must not set a dtype.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> body = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU()
    >>> model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> [m.shape for m in camfn.poly_cam(model, ("1", "3"), torch.randn(2, 3, 9, 9))]
    [torch.Size([2, 7, 7]), torch.Size([2, 3, 3])]

    Englebert et al., Poly-CAM: High resolution class activation map for convolutional neural networks,
    ICPR 2022 (arXiv 2204.13359).
    """
    _check(variant, percentile)
    names = _staged(model, x, state, masked, axes) if layer is None else layer
    forward = look(model, names, x, state, masked, axes, masks=True)
    if layer is None:  # return the finest map only; choosing the layers took one more forward pass
        forward = forward._replace(several=False, forwards=forward.forwards + forward.n)
    with without_graph(x, state):
        found = explained(forward, as_probabilities(target), Drawing(relu, size, normalize, layout, axes))
        grids = [part.grid for part in found.reads]
        _check_order(forward.layers, grids)
        flat = [flat_channels(part.values) for part in found.reads]
        each = [masks.poly_cam(part.values, dead, variant, percentile) for part, dead in zip(found.reads, flat)]
        rows = [part._replace(values=values) for part, values in zip(found.reads, each)]
        swept = sweep_in_full("poly_cam", forward, found.score, rows, Variation(form="given"), sweep)
        scored = [weights.poly_cam(part.scores, found.clean, dead, variant) for part, dead in zip(swept, flat)]
        outcome = drawn(found, maps.poly_cam(combined(found, scored), grids))
        return with_sweep(outcome, swept)._replace(weights=tuple(scored))


def _check(variant: Variant, percentile: float) -> None:
    """Raise an error unless the variant and the percentile are valid."""
    if variant not in ("+", "-", "+-"):
        raise CamError(f'variant must be "+", "-" or "+-", found {variant!r}')
    if not isinstance(percentile, (int, float)) or not 0 <= percentile < 50:
        raise CamError(f"percentile={percentile!r} must be from 0 to less than 50 (0.1 is the authors')")


def _staged(model: Model, x: Inputs, state: State | None, masked: Key, axes: str | None) -> tuple[str, ...]:
    """Choose the last layer of each size, and name the choice in a warning."""
    task = begin(model, x, state, masked, axes, masks=True)
    names = stages(task)
    if not _compat.transformed():
        warn(f"layer=None: {', '.join(map(repr, names))} were chosen, the last layers of their sizes; name them to be sure")
    return names


def _check_order(names: Sequence[str], grids: Sequence[tuple[int, ...]]) -> None:
    """Raise an error if a layer has a larger grid than the one before."""
    for (name, grid), (other, deeper) in itertools.pairwise(zip(names, grids)):
        if any(after > before for before, after in zip(grid, deeper)):
            raise CamError(
                f"poly_cam takes layers in the order of execution; found {name!r} of {grid} before {other!r} of {deeper}"
            )
