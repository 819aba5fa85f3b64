"""The table of methods, and what they share: look and resolve at the beginning, draw at the end. No arithmetic here."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from camfn import _compat, layouts
from camfn._errors import CamError, warn
from camfn._types import Activations, Combine, FlatMaps, Gradients, Inputs, Layers, Layout, Maps, Size, Weights, wide
from camfn.formulas import maps as _maps
from camfn.formulas.diagnostics import Finding, about_maps
from camfn.formulas.scaling import unit
from camfn.layouts import Read
from camfn.model.forward import Subject, first_nonfinite
from camfn.model.gradients import slopes_of
from camfn.model.inputs import Key, pick, size_of
from camfn.model.layers import clues_of
from camfn.model.prepare import prepares
from camfn.sweep.runner import weakly
from camfn.targets import Score, score_rows

P = ParamSpec("P")


class Outcome(NamedTuple):
    """A method's maps and how they came about."""

    maps: Maps
    layers: tuple[str, ...]
    grids: tuple[tuple[int, ...], ...]  # of the layers
    classes: Tensor | None  # (n, t), where the target is of classes
    scores: Tensor  # (n, t), of the clean input
    score: Score  # what was scored
    weights: tuple[Weights, ...]  # a layer's (n, t, c), of the methods that have one for each channel
    forwards: int  # inputs that went through the model
    backwards: int  # gradients of an input's score that were taken
    findings: tuple[Finding, ...]  # what is to be said about the maps
    heads: int = 0  # activations that went through what comes after the layer, and nothing else
    errors: tuple[Tensor | None, ...] = ()  # for each layer, (n, t): how far a normalised map may be off, where that is not 0
    remarks: tuple[Finding, ...] = ()  # what is no reason for a warning, and for a card alone

    @property
    def single(self) -> bool:
        """One map per image, without an axis of targets?"""
        return self.score.single


class Method(NamedTuple):
    """A row of `camfn.METHODS`."""

    function: Callable[..., Maps]
    run: Callable[..., Outcome]  # the same, with how the maps came about
    needs: frozenset[str]  # of "activations", "gradients", "masked inputs", "head", "linear head", "attention", "biases",
    # "any size" (inputs of other sizes than x has)
    cost: str  # for each image and layer, at the defaults: inputs that go through the model ("35 x channels + 1"), then, where
    # there are such, gradients ("1 backward"), and activations through what comes after the layer ("channels + 1 head")

    @property
    def of_layer(self) -> bool:
        """Is it of a layer? Other methods take `None` in its place, and refuse one."""
        return vars(self.function)["of_layer"]


_TABLE: dict[str, Method] = {}
METHODS = MappingProxyType(_TABLE)
"""Every method by name: its function, what it needs and what it costs."""


def method(*needs: str, cost: str) -> Callable[[Callable[P, Outcome]], Callable[P, Maps]]:
    """Make the public function, which gives the maps alone, and its row in the table."""

    def register(of: Callable[P, Outcome]) -> Callable[P, Maps]:
        function = published(of, "activations" in needs)
        _TABLE[of.__name__] = Method(function, vars(function)["run"], frozenset(needs), cost)
        return function

    return register


def published(of: Callable[P, Outcome], of_layer: bool) -> Callable[P, Maps]:
    """The public function of a method: it gives the maps alone, and warns of what is to be said about them.

    For compositions it carries `run`, which gives all of the outcome, and whether the method is of a layer.
    """

    @functools.wraps(of)
    def run(*args: P.args, **kwargs: P.kwargs) -> Outcome:
        with _compat.unnarrowed():
            return prepares(of)(*args, **kwargs)

    @functools.wraps(of)
    def function(*args: P.args, **kwargs: P.kwargs) -> Maps:
        outcome = run(*args, **kwargs)
        for finding in outcome.findings:
            warn(finding.sentence)
        return outcome.maps

    function.__annotations__ = {**of.__annotations__, "return": Maps}
    vars(function).update(run=run, of_layer=of_layer)
    return function


class Drawing(NamedTuple):
    """How a map is drawn: the options that every method has."""

    relu: bool
    size: Size
    normalize: bool
    combine: Combine = "sum"  # what is made of weights and activation, where a method has weights


def checked_combine(combine: Combine) -> Combine:
    """What is to be made of weights and activation, or an error."""
    if combine not in ("sum", "eigen"):
        raise CamError(f'combine must be "sum" or "eigen" (the first component of the weighed channels), found {combine!r}')
    return combine


def without_layer(method: str, layer: Layers) -> None:
    """Refuse a layer, for a method that has none."""
    if layer is not None:
        raise CamError(f"{method} is of no layer: pass None in its place, found {layer!r}")


def read(subject: Subject, name: str, activation: Tensor, layout: Layout) -> Read:
    """A layer's activation, or its gradient, as `(n, c, p)`."""
    clues = functools.partial(clues_of, subject.shell.module, subject.size)
    return layouts.read(activation, layout, subject.size, name, subject.n, clues)


def clean_scores(subject: Subject, score: Score) -> Tensor:
    """The scores of the clean input, from the forward that was run anyway."""
    scores = score_rows(score.of, subject.output, score.rows)
    if not _compat.transformed() and not bool(torch.isfinite(scores).all()):
        raise CamError(f"the score is not finite; {first_nonfinite(subject.model, subject.state, subject.x)}")
    return scores


def slopes_at(subject: Subject, score: Score, layout: Layout) -> list[Gradients]:
    """The gradient of each target's score at each layer, `(n, t, c, p)`, of a subject that was captured with a `pull`."""
    if subject.slopes is None or _compat.transformed():
        return _slopes_at(subject, score, layout)
    rows = tuple((leaf.shape, leaf.dtype, leaf.detach().cpu().numpy().tobytes()) for leaf in tree_flatten(score.rows)[0])
    key = weakly(score.of), rows, layout
    if key not in subject.slopes:
        subject.slopes[key] = _slopes_at(subject, score, layout)
    return subject.slopes[key]


def _slopes_at(subject: Subject, score: Score, layout: Layout) -> list[Gradients]:
    assert subject.pull is not None
    found = slopes_of(subject.pull, subject.output, score)
    return stacked(subject, found, _views(subject, found[0], layout))


def bends_at(subject: Subject, score: Score, layout: Layout) -> list[tuple[Gradients, Gradients]]:
    """Beside each gradient, the product of the score's Hessian and the activation."""
    assert subject.pull is not None
    found = slopes_of(functools.partial(subject.pull, bent=True), subject.output, score)
    halves = [[{name: pair[half] for name, pair in of.items()} for of in found] for half in (0, 1)]
    slopes, bends = (stacked(subject, half, _views(subject, half[0], layout)) for half in halves)
    return list(zip(slopes, bends))


def _views(subject: Subject, slopes: Mapping[str, Tensor], layout: Layout) -> list[Callable[[Tensor], Activations]]:
    return [read(subject, name, slopes[name], layout).view for name in subject.layers]


def stacked(
    subject: Subject, found: Sequence[dict[str, Tensor]], views: Sequence[Callable[[Tensor], Activations]]
) -> list[Gradients]:
    """Of each layer, the targets' gradients side by side, in float32 or wider."""
    seen = [[view(of[name]) for of in found] for name, view in zip(subject.layers, views)]
    return [torch.stack(values, 1).to(wide(values[0].dtype)) for values in seen]


def within(found: Weights | Gradients, drawing: Drawing) -> Weights | Gradients:
    """Weights up to a positive factor for each map, where that is normalised anyway: no product leaves the dtype's range."""
    return unit(found, tuple(range(2, found.ndim))) if drawing.normalize else found


def combined(found: Sequence[Weights | Gradients], reads: Sequence[Read], drawing: Drawing) -> list[FlatMaps]:
    """`sum_k w_k A_k` at each layer, for weights `(n, t, c)` or `(n, t, c, p)`; or the first component of `w_k A_k`."""
    combine = _maps.combine if drawing.combine == "sum" else _maps.component
    return [combine(within(weights, drawing), read.values) for weights, read in zip(found, reads)]


def drawn(
    subject: Subject,
    score: Score,
    clean: Tensor,
    signed: Sequence[FlatMaps],
    grids: Sequence[tuple[int, ...]],
    drawing: Drawing,
) -> Outcome:
    """ReLU, resize, normalise: in this order. What a method knows besides its maps it puts in by `_replace`."""
    shaped = []
    for flat, grid in zip(signed, grids):
        rectified = torch.relu(flat) if drawing.relu else flat
        shaped.append(_on_grid(rectified.unflatten(-1, grid), subject, len(grid), drawing))
    maps = tuple(m[:, 0] for m in shaped) if score.single else tuple(shaped)
    names = subject.layers or ("",)  # of no layer: the map is of the input
    findings = () if _compat.transformed() else about_maps(signed, names, drawing.relu, subject.seen)
    result = maps if subject.several else maps[0]
    at = subject.layers, tuple(grids), score.classes, clean, score
    return Outcome(result, *at, (), subject.forwards, 0, findings)


def _on_grid(maps: Tensor, subject: Subject, axes: int, drawing: Drawing) -> Tensor:
    size = checked_size(drawing.size, subject.x, subject.key, axes)
    maps = maps if size is None else _maps.resize(maps, size)
    return _maps.normalize(maps, tuple(range(-axes, 0))) if drawing.normalize else maps


def checked_size(size: Size, x: Inputs, key: Key, axes: int) -> tuple[int, ...] | None:
    """The size that a map is wanted at, or `None`: the one that it has."""
    if size is None:
        return None
    if isinstance(size, str) and size == "input":
        size = size_of(x, key)
        if size is None:
            found = "images of several sizes" if isinstance(x, list) else f"shape {tuple(pick(x, key).shape)}"
            raise CamError(f'size="input" needs spatial axes in the input, of one size, and x has {found}')
    whole = isinstance(size, Sequence) and all(isinstance(side, int) and side > 0 for side in size)
    if not whole or len(size) != axes:
        raise CamError(f'size={size!r} must be None, "input", or {axes} positive ints: the layer\'s grid has {axes} axes')
    return tuple(int(side) for side in size)
