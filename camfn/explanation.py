"""A map with the story of how it came about."""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from camfn._errors import CamError, closest
from camfn._types import Inputs, Layers, Maps, Target, Weights
from camfn.methods import METHODS


class Explanation(NamedTuple):
    """What `explain` returns: the maps, and everything that is needed to believe or doubt them."""

    maps: Maps
    method: str
    layers: tuple[str, ...]
    classes: Tensor | None  # (n, t) class indices, where the target is of classes
    scores: Tensor  # (n, t): the target on the clean input
    weights: tuple[Weights, ...]  # for each layer, (n, t, c)
    forwards: int  # inputs that went through the model
    backwards: int  # gradients of an input's score that were taken
    heads: int  # activations that went through what comes after the layer, and nothing else
    seconds: float
    notes: tuple[str, ...]  # what should be known about the maps
    errors: tuple[Tensor | None, ...]  # for each layer, (n, t): how far its normalised map may be off, where it is not exact


def explain(
    model: nn.Module, layer: Layers, x: Inputs, target: Target = None, *, method: str = "score_cam", **options: Any
) -> Explanation:
    """The maps of a method, by name, with classes, scores, weights, cost, and notes about maps that mean little.

    `options` are the method's own. In place of warnings about the maps, the card has notes.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> card = camfn.explain(model, "1", torch.randn(1, 3, 8, 8))
    >>> card.maps.shape, card.layers, card.forwards
    (torch.Size([1, 6, 6]), ('1',), 5)
    """
    if method not in METHODS:
        raise CamError(f"no method named {method!r}; closest: {closest(method, METHODS)}; all: {', '.join(METHODS)}")
    start = time.perf_counter()
    outcome = METHODS[method].run(model, layer, x, target, **options)
    notes = outcome.notes + _about_weights(outcome.weights, outcome.layers, method)
    seconds = time.perf_counter() - start
    told: dict[str, Any] = {**outcome._asdict(), "notes": notes}
    return Explanation(method=method, seconds=seconds, **told)


def effective_channels(weights: Weights) -> Tensor:
    """`exp(entropy(w))` of weights that are not negative: how many channels carry the map, `(n, t)`."""
    share = weights.clamp(min=0) / weights.clamp(min=0).sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(share).sum(-1))


def _about_weights(weights: tuple[Weights, ...], layers: tuple[str, ...], method: str) -> tuple[str, ...]:
    """Nearly equal weights give the mean activation, whatever the class; one strong weight gives one channel."""
    notes = []
    for name, w in zip(layers, weights):
        if method == "cam" or w.shape[-1] < 2:
            continue
        share, strongest = float(effective_channels(w).max()) / w.shape[-1], float((w / w.sum(-1, keepdim=True)).max())
        if share > 0.99:
            notes.append(
                f"the weights at layer {name!r} are nearly equal ({share:.1%} of the channels count): the map is the mean "
                "activation and says little about the target"
            )
        elif strongest > 0.9:
            notes.append(
                f"one channel at layer {name!r} has {strongest:.0%} of the weight: the map is that channel, more or less"
            )
    return tuple(notes)
