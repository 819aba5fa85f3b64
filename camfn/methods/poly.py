"""Poly-CAM: maps of several layers in one, each weighted by what masked inputs score."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Activations, FlatMaps, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, weights
from camfn.formulas.masks import Variation, flat_channels
from camfn.formulas.weights import Variant
from camfn.methods.sweeps import sweep_in_full
from camfn.methods.table import Drawing, Outcome, clean_scores, combined, drawn, method, read
from camfn.model.forward import Shared, introduced, look, without_graph
from camfn.model.inputs import Key
from camfn.model.layers import stages
from camfn.sweep.options import Sweep
from camfn.targets import as_probabilities, resolve


@method("activations", "masked inputs", cost="2 x channels + 1")
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
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Poly-CAM: from layer to layer towards the input, the map of the deeper ones times what this layer tells more finely.

    `S_l = sum_k w_k A_k` at each layer. The deepest one's map is `L_l = relu(S_l)`; those of the others are
    `L_l = relu(S_l) / U(D(relu(S_l))) * U(L_{l+1})`, with D to the grid of the layer `l + 1` and U back, both linear: a layer
    says where in a cell of the deeper one, and the deeper one how much. With `M_k` the mask of a channel, upsampled,

    - `variant="+"` (PCAM+): `w_k = s(x * M_k)`, one forward for each channel that is not flat;
    - `variant="-"` (PCAM-): `w_k = relu(s(x) - s(x * (1 - M_k)))`, as many;
    - `variant="+-"` (PCAM±): `w_k = relu(s(x * M_k) + s(x) - s(x * (1 - M_k)))`, twice as many.

    - `layer`: several, in the order of execution; for each of them the map of it and of those after it comes back, so the first
      is the finest. One layer has the map of it alone. Of `None` the last layer of each size is taken, and the finest map
      returned.
    - `percentile`: a mask is 0 at this percentile of its channel and 1 at 100 less it, linear between; 0 is plain min-max.
    - A plain class stands for its probability, as in the authors' code; `camfn.targets.logit(c)` for the raw output.

    The other arguments, and what is returned and raised, are those of `camfn.score_cam`, without a recipe and a budget, and
    without a dtype of the sweep. It is what the authors' code computes, but for three things: that divides a mask by its upper
    percentile, and not by what is between the two (which is the same where a channel begins at 0); it divides by 1e-12 where
    D gives 0, where the factor is 0 here; and it cuts the map, too, at these percentiles.

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
    subject = look(model, _staged(model, x, state, masked) if layer is None else layer, x, state, masked, masks=True)
    if layer is None:  # the finest map of all, and one forward more, to choose
        subject = subject._replace(several=False, forwards=subject.forwards + subject.n)
    with without_graph():
        score = resolve(as_probabilities(target), subject.output, subject.n, subject.image.device)
        clean = clean_scores(subject, score)
        reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        grids = [part.grid for part in reads]
        _check_order(subject.layers, grids)
        flat = [flat_channels(part.values) for part in reads]
        rows = [part._replace(values=_masks(part.values, dead, variant, percentile)) for part, dead in zip(reads, flat)]
        swept = sweep_in_full("poly_cam", subject, score, rows, Variation(form="given"), sweep)
        found = tuple(weights.poly_cam(part.scores, clean, dead, variant) for part, dead in zip(swept, flat))
        drawing = Drawing(relu, size, normalize)
        signed = _refined(combined(found, reads, drawing), grids)
        outcome = drawn(subject, score, clean, signed, grids, drawing)
        return outcome._replace(weights=found, forwards=outcome.forwards + sum(part.forwards for part in swept))


def _check(variant: Variant, percentile: float) -> None:
    if variant not in ("+", "-", "+-"):
        raise CamError(f'variant must be "+", "-" or "+-", found {variant!r}')
    if not isinstance(percentile, (int, float)) or not 0 <= percentile < 50:
        raise CamError(f"percentile={percentile!r} must be from 0 to less than 50 (0.1 is the authors')")


def _staged(model: nn.Module | Shared, x: Inputs, state: State | None, masked: Key) -> tuple[str, ...]:
    subject = introduced(model, x, state, masked, masks=True)
    names = stages(subject.model, subject.state, subject.x, subject.size, subject.n)
    if not _compat.transformed():
        warn(f"layer=None: {', '.join(map(repr, names))} were chosen, the last layers of their sizes; name them to be sure")
    return names


def _check_order(names: Sequence[str], grids: Sequence[tuple[int, ...]]) -> None:
    for (name, grid), (other, deeper) in itertools.pairwise(zip(names, grids)):
        if any(after > before for before, after in zip(grid, deeper)):
            raise CamError(
                f"poly_cam takes layers in the order of execution; found {name!r} of {grid} before {other!r} of {deeper}"
            )


def _masks(values: Activations, flat: Tensor, variant: Variant, percentile: float) -> Activations:
    """Masks at the layer's grid, and what they leave. A flat channel has none, and leaves the input: both are zeros here."""
    values = values.to(wide(values.dtype))
    low, high = maps.percentile(values, percentile), maps.percentile(values, 100 - percentile)
    # The authors divide by `high` alone. Hardly anything of a channel may be above its lowest value: then the mask is that.
    steep = maps.is_flat(low, high, values.dtype)
    levels = torch.where(steep, (values > high).to(values.dtype), (values - low) / torch.where(steep, 1, high - low))
    kept = torch.where(flat[..., None], 0, levels.clamp(0, 1))
    # Upsampling is linear, and its weights sum to one: what is left of 1 can be taken on the grid.
    left = torch.where(flat[..., None], 0, 1 - kept)
    return torch.cat({"+": [kept], "-": [left], "+-": [kept, left]}[variant], 1)


def _refined(signed: Sequence[FlatMaps], grids: Sequence[tuple[int, ...]]) -> list[FlatMaps]:
    """Each layer's sum, but for the deepest, relative to its neighbourhood, times the map of those after it."""
    found = [signed[-1]]
    for own, grid, deeper in zip(reversed(signed[:-1]), reversed(grids[:-1]), reversed(grids[1:])):
        coarse = maps.resize(torch.relu(own).unflatten(-1, grid), deeper)
        around, above = (maps.resize(each, grid).flatten(2) for each in (coarse, torch.relu(found[0]).unflatten(-1, deeper)))
        # The authors' least divisor, 1e-12, would make of what D does not see the largest values of the map.
        found.insert(0, torch.where(around > 0, own / torch.where(around > 0, around, 1) * above, 0))
    return found
