"""Is a map better than its controls? It is compared with a map of another class, of no class, and with random orders."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Inputs, Maps, Target
from camfn.explanation.fields import Check
from camfn.formulas.maps import resize
from camfn.methods import Outcome
from camfn.methods._common import read_layer
from camfn.methods.registry import Made
from camfn.metrics.faithfulness import deletion, deletion_curve
from camfn.metrics.scoring import score_function
from camfn.metrics.similarity import rank_correlation
from camfn.model.forward import Forward, Shared, look
from camfn.targets import as_probabilities, logits_of

ORDERS, STEPS = 5, 6
"""The number of comparisons with random orders, and of steps of each deletion."""


def checked(
    shared: Shared,
    row: Made,
    arguments: tuple[Any, Inputs, Target],
    options: Mapping[str, Any],
    outcome: Outcome,
    layout: Any,
) -> Check:
    """Compare the maps of an outcome with their controls.

    It costs the method once more, for the maps of the other classes, `2 * STEPS` forward passes for each map, and
    `(1 + ORDERS) * STEPS` for each image and layer.
    """
    layer, x, target = arguments
    at = list(outcome.layers) if isinstance(outcome.maps, tuple) else outcome.layers[0] if outcome.layers else layer
    found = [each.detach() for each in parts(outcome.maps)]
    others = _of_other_classes(shared, row, (at, x), options, outcome)
    alike = mean_correlations(outcome.maps, shared.last, layout)
    random = [_beaten(shared, x, target, options, outcome, each) for each in found]
    stack = partial(torch.stack, dim=-1)
    unknown = [torch.full_like(each, torch.nan) for each in random]
    return Check(stack(others or unknown), stack(alike or unknown), stack(random), ORDERS)


def parts(maps: Maps) -> tuple[Tensor, ...]:
    """The maps of each layer."""
    return maps if isinstance(maps, tuple) else (maps,)


def mean_correlations(maps: Maps, forward: Forward | None, layout: Any) -> list[Float[Tensor, "n t"]]:
    """The rank correlation of each map with `mean_cam`'s at its layer; nothing if the maps are not of single layers."""
    each = parts(maps)
    if forward is None or len(each) != len(forward.layers):
        return []
    reads = [read_layer(forward, *pair, layout) for pair in zip(forward.layers, forward.activations)]
    found = []
    for own, part in zip(each, reads):
        axes = len(part.grid)
        sides = own.shape[-axes:]
        mean = part.values.detach().float().mean(1).unflatten(-1, part.grid)
        mean = mean if tuple(sides) == tuple(part.grid) else resize(mean, sides)
        own = own.detach().float().reshape(len(mean), -1, *sides)
        found.append(rank_correlation(own, mean[:, None].expand_as(own), spatial_ndim=axes))
    return found


def _of_other_classes(
    shared: Shared, row: Made, arguments: tuple[Any, Inputs], options: Mapping[str, Any], outcome: Outcome
) -> list[Float[Tensor, "n t"]]:
    """The rank correlation of each map with that of the likeliest other class; nothing if the target is not classes."""
    if outcome.classes is None:
        return []
    own = {name: options[name] for name in ("state", "axes", "masked") if name in options}
    forward = shared.last or look(shared, None, arguments[1], own.pop("state", None), taps=False, **own)
    try:
        logits = logits_of(forward.output)
    except CamError:
        return []
    if logits.ndim != 2 or logits.shape[1] < 2:
        return []
    own = torch.nn.functional.one_hot(outcome.classes, logits.shape[1]).bool()
    best = logits.detach().float()[:, None].masked_fill(own, -torch.inf).argmax(-1)
    other = row.run(shared, *arguments, best[:, 0] if outcome.single else best, **options)
    pairs = zip(parts(outcome.maps), parts(other.maps))
    return [_correlated(one.detach(), two.detach(), outcome) for one, two in pairs]


def _correlated(one: Tensor, other: Tensor, outcome: Outcome) -> Float[Tensor, "n t"]:
    axes = one.ndim - (1 if outcome.single else 2)
    found = rank_correlation(one, other, spatial_ndim=axes)
    return found[:, None] if outcome.single else found


def _beaten(
    shared: Shared, x: Inputs, target: Target, options: Mapping[str, Any], outcome: Outcome, maps: Tensor
) -> Float[Tensor, "n t"]:
    """The share of random orders that set the score less apart than the map does.

    The area under the score is taken while cells are removed. The map's two orders, the least and the most relevant first, are
    as far apart as `deletion(order="difference")` says, and two random orders by chance. One order alone says little: many
    networks lose the score faster by holes anywhere than by one hole in the object.
    """
    own = {name: options[name] for name in ("state", "axes", "masked") if name in options}
    score = score_function(shared.prepared, x, as_probabilities(target), **own)
    finite = torch.isfinite(maps).flatten(1 if outcome.single else 2).all(-1)  # a map that is not has no order
    maps = torch.where(finite.reshape(*finite.shape, *(1,) * (maps.ndim - finite.ndim)), maps, 0)
    by_map = deletion(maps, score.x, score, order="difference", steps=STEPS)
    random = partial(deletion_curve, maps, score.x, score, order="random", steps=STEPS)
    areas = torch.stack([random(seed=seed).area for seed in range(ORDERS + 1)])
    wins = (by_map > areas.diff(dim=0).abs()).logical_and(finite).float().mean(0)
    return wins[:, None] if outcome.single else wins
