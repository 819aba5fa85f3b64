"""A map with the story of how it came about."""

import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError, closest
from camfn._types import Inputs, Layers, Maps, Target, Weights
from camfn.formulas import diagnostics
from camfn.formulas.diagnostics import Finding
from camfn.methods import METHODS, Method, Need, Outcome
from camfn.methods._common import read_layer
from camfn.model.forward import Forward, Shared
from camfn.model.prepare import opened
from camfn.targets import Score, names


class Explanation(NamedTuple):
    """What `explain` returns: the maps, and everything that is needed to believe or doubt them."""

    maps: Maps
    method: str
    settings: Mapping[str, Any]  # every option of the method, given or by default
    layers: tuple[str, ...]
    grids: tuple[tuple[int, ...], ...]  # of the layers
    classes: Tensor | None  # (n, t) class indices, where the target is of classes
    scores: Tensor  # (n, t): the target on the clean input
    targets: tuple[tuple[str, ...], ...]  # for each image, what its scores are: "logit 281"; empty under a transform
    weights: tuple[Weights, ...]  # for each layer, (n, t, c), or (n, t, c, positions); empty where the method has none
    errors: tuple[Tensor | None, ...]  # for each layer, (n, t): how far its normalised map may be off, where it is not exact
    forwards: int  # inputs that went through the model; what methods of one call share is counted for each
    backwards: int  # gradients of an input's score that were taken
    heads: int  # activations that went through what comes after the layer, and nothing else
    seconds: float
    findings: tuple[Finding, ...]  # what should be known about the maps
    versions: Mapping[str, str]  # of Python and the packages that made them

    @property
    def notes(self) -> tuple[str, ...]:
        """The findings' sentences."""
        return tuple(finding.sentence for finding in self.findings)


@overload
def explain(
    model: nn.Module, layer: Layers, x: Inputs, target: Target = None, *, method: str = "score_cam", **options: Any
) -> Explanation: ...
@overload
def explain(
    model: nn.Module, layer: Layers, x: Inputs, target: Target = None, *, method: Sequence[str], **options: Any
) -> tuple[Explanation, ...]: ...
def explain(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    method: str | Sequence[str] = "score_cam",
    **options: Any,
) -> Explanation | tuple[Explanation, ...]:
    """The maps of a method, by name, with classes, scores, weights, settings, cost, and findings about maps that mean little.

    `method` is a name of `camfn.METHODS`, or several: a tuple of cards comes back then, and methods that look at the same layer
    share one clean forward and the gradients there. `options` are the methods' own; one that a method does not have is left out
    for it, and has to be known to one of them at least. In place of warnings about the maps, a card has findings.

    **Raises** `CamError` for a method or an option that is not known, and whatever the methods raise.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> card = camfn.explain(model, "1", torch.randn(1, 3, 8, 8))
    >>> card.maps.shape, card.layers, card.grids, card.targets, card.forwards
    (torch.Size([1, 6, 6]), ('1',), ((6, 6),), (('logit 3',),), 5)
    >>> [card.backwards for card in camfn.explain(model, "1", torch.randn(1, 3, 8, 8), method=["grad_cam", "score_cam"])]
    [1, 0]
    """
    with prepared(model, layer, x, target, [method] if isinstance(method, str) else method, options) as makes:
        cards = tuple(make() for make in makes)
    return cards[0] if isinstance(method, str) else cards


@contextmanager
def prepared(
    model: nn.Module, layer: Layers, x: Inputs, target: Target, method: Sequence[str], options: Mapping[str, Any]
) -> Iterator[list[Callable[[], Explanation]]]:
    """For each method a function that makes its card: who wants to go on where one fails, or show which is at work, can."""
    rows = {name: _row_of(name) for name in method}
    given = {name: {key: value for key, value in options.items() if key in _parameters(row)} for name, row in rows.items()}
    stray = [key for key in options if not any(key in own for own in given.values())]
    if stray:
        raise CamError(f"{', '.join(rows)} {'has' if len(rows) == 1 else 'have'} no option {', '.join(map(repr, stray))}")
    layers = {name: layer if row.of_layer else None for name, row in rows.items()}
    with Shared(opened(model).prepared, x, any(Need.GRADIENTS in row.needs for row in rows.values())) as shared:
        yield [partial(_card, shared, name, rows[name], (layers[name], x, target), given[name]) for name in method]


def _row_of(name: str) -> Method:
    if name not in METHODS:
        raise CamError(f"no method named {name!r}; closest: {closest(name, METHODS)}; all: {', '.join(METHODS)}")
    return METHODS[name]


def _parameters(row: Method) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(row.run).parameters


def _card(shared: Shared, name: str, row: Method, arguments: tuple[Any, ...], options: dict[str, Any]) -> Explanation:
    start, shared.last = time.perf_counter(), None
    outcome = row.run(shared, *arguments, **options)
    seconds = time.perf_counter() - start
    named = [p for p in _parameters(row).values() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    settings = {p.name: options.get(p.name, p.default) for p in named}
    told: dict[str, Any] = outcome._asdict()
    told["targets"] = _named(told.pop("score"), outcome.scores)
    told["findings"] += told.pop("remarks") + _about(outcome, row, settings, shared.last)
    return Explanation(
        method=name, settings=MappingProxyType(settings), seconds=seconds, versions=MappingProxyType(_versions()), **told
    )


def _named(score: Score, scores: Tensor) -> tuple[tuple[str, ...], ...]:
    return () if _compat.transformed() else names(score, scores.shape[1])


def _about(outcome: Outcome, row: Method, settings: Mapping[str, Any], forward: Forward | None) -> tuple[Finding, ...]:
    """What the weights, the activations and the gradients say; nothing under a transform, where no value can be read."""
    if _compat.transformed():
        return ()
    found: list[Finding] = []
    if "recipe" in settings:
        found += diagnostics.about_weights(outcome.weights, outcome.layers)
    if forward is not None and Need.ACTIVATIONS in row.needs:
        reads = [read_layer(forward, *each, settings["layout"]) for each in zip(forward.layers, forward.activations)]
        found += diagnostics.about_activations([part.values for part in reads], forward.layers)
        gradients = next((value for key, value in forward.task.facts.items() if key[0] == "gradients"), None)
        if Need.GRADIENTS in row.needs and gradients is not None:
            found += diagnostics.about_gradients(gradients, forward.layers)
    return tuple(found)


def _versions() -> dict[str, str]:
    from camfn import __version__

    return {"python": platform.python_version(), "torch": torch.__version__, "camfn": __version__}
