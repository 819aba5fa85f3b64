"""The beginning and the end of every method: the clean forward pass with its score, and the maps with their outcome."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from camfn import _compat, layouts
from camfn._errors import CamError
from camfn._types import Activations, Combine, FlatMaps, Gradients, Inputs, Layers, Layout, Size, State, Target, Weights, wide
from camfn.formulas import maps
from camfn.formulas.diagnostics import Finding, about_lost, about_maps, about_sums
from camfn.formulas.scaling import rescale
from camfn.layouts import Form, Read
from camfn.methods.registry import Outcome
from camfn.model.forward import Forward, Shared, another_batch, first_nonfinite, look, look_with_gradients, lost_layers
from camfn.model.gradients import Pullback, each_target
from camfn.model.inputs import Batch
from camfn.model.layers import Site, clues_of, placed_forms
from camfn.model.prepare import Model, weakly
from camfn.model.task import once
from camfn.sweep.scoring import Swept
from camfn.targets import Scale, Score, resolve, score_rows

# ------------------------------------------------------------------------------------------------------- the beginning


class Drawing(NamedTuple):
    """The options that turn weights and activations into maps."""

    relu: bool
    size: Size
    normalize: bool
    layout: Layout
    axes: str | None = None  # the order of the input's axes; None if it is to be found
    combine: Combine = "sum"  # how to combine weights and activations


class Explained(NamedTuple):
    """The clean forward pass, the score to explain, and the options of its maps."""

    forward: Forward
    score: Score
    clean: Tensor  # (n, t): the scores of the clean inputs
    reads: tuple[Read, ...]  # each layer's activation as (n, c, p), with its grid
    drawing: Drawing


def explained(forward: Forward, target: Target, drawing: Drawing, kind: Scale = "logit") -> Explained:
    """Resolve the target on the clean output, read the activations, and check the options of the maps.

    `kind`: the meaning of an integer target, the class's `"logit"` or its `"probability"`.
    """
    check_combine(drawing.combine)
    another = functools.partial(another_batch, forward)
    score = resolve(target, forward.output, forward.n, forward.image.device, kind, another)
    clean = clean_scores(forward, score)
    reads = tuple(read_layer(forward, *each, drawing.layout) for each in zip(forward.layers, forward.activations))
    for part in reads:
        checked_size(drawing.size, forward.batch, len(part.grid))
    return Explained(forward, score, clean, reads, drawing)


class Graded(NamedTuple):
    """An `Explained` with the gradients of each target's score at each layer, `(n, t, c, p)`."""

    explained: Explained
    gradients: list[Gradients]

    @property
    def pairs(self) -> list[tuple[Gradients, Activations]]:
        """Each layer's gradients and activations."""
        return [(gradients, part.values) for gradients, part in zip(self.gradients, self.explained.reads)]


def explain_layer(
    model: Model,
    layer: Layers,
    x: Inputs,
    target: Target,
    state: State | None,
    drawing: Drawing,
    *,
    site: Site = "block",
) -> Explained:
    """The clean forward pass of a method that reads activations."""
    return explained(look(model, layer, x, state, None, drawing.axes, site=site), target, drawing)


def grade_layer(
    model: Model,
    layer: Layers,
    x: Inputs,
    target: Target,
    state: State | None,
    drawing: Drawing,
    *,
    site: Site = "block",
) -> Graded:
    """The clean forward pass of a method that reads activations and gradients."""
    forward, pullback = look_with_gradients(model, layer, x, state, None, drawing.axes, site=site)
    found = explained(forward, target, drawing)
    return Graded(found, gradients_of(found, pullback))


def read_layer(forward: Forward, name: str, activation: Tensor, layout: Layout) -> Read:
    """A layer's activation, or its gradient, as `(n, c, p)`."""
    task = forward.task
    clues = functools.partial(clues_of, task.private.module, task.batch)

    def placed(forms: list[Form]) -> list[Form]:
        return once(task, ("forms", name, *forms), lambda: placed_forms(task, {name: forms})[name])

    return layouts.read(activation, layout, forward.size, name, forward.n, clues, placed=placed)


def clean_scores(forward: Forward, score: Score) -> Tensor:
    """The scores of the clean input, from the clean forward pass."""
    scores = score_rows(score.of, forward.output, score.rows)
    if not _compat.transformed() and not bool(torch.isfinite(scores).all()):
        raise CamError(f"the score is not finite; {first_nonfinite(forward.task, forward.batch.x)}")
    return scores


def gradients_of(found: Explained, pullback: Pullback) -> list[Gradients]:
    """The gradient of each target's score at each layer, `(n, t, c, p)`. The methods of one call share them."""
    task, score = found.forward.task, found.score
    if not isinstance(task.model, Shared) or _compat.transformed():
        return _gradients_of(found, pullback)
    rows = tuple((leaf.shape, leaf.dtype, leaf.detach().cpu().numpy().tobytes()) for leaf in tree_flatten(score.rows)[0])
    key = "gradients", weakly(score.of), rows, found.drawing.layout
    if key not in task.facts:
        task.facts[key] = _gradients_of(found, pullback)
    return task.facts[key]


def _gradients_of(found: Explained, pullback: Pullback) -> list[Gradients]:
    each = each_target(pullback.gradients, found.forward.output, found.score)
    return stacked(found.forward, each, _views(found, each[0]))


def curvatures_of(found: Explained, pullback: Pullback) -> list[tuple[Gradients, Gradients]]:
    """Each gradient, with the product of the score's Hessian and the activation."""
    each = each_target(pullback.curvatures, found.forward.output, found.score)
    halves = [[{name: pair[half] for name, pair in of.items()} for of in each] for half in (0, 1)]
    return list(zip(*(stacked(found.forward, half, _views(found, half[0])) for half in halves)))


def _views(found: Explained, gradients: Mapping[str, Tensor]) -> list[Callable[[Tensor], Activations]]:
    return [read_layer(found.forward, name, gradients[name], found.drawing.layout).view for name in found.forward.layers]


def stacked(
    forward: Forward, each: Sequence[dict[str, Tensor]], views: Sequence[Callable[[Tensor], Activations]]
) -> list[Gradients]:
    """Stack the targets' gradients at each layer, in float32 or wider."""
    seen = [[view(of[name]) for of in each] for name, view in zip(forward.layers, views)]
    return [torch.stack(values, 1).to(wide(values[0].dtype)) for values in seen]


# -------------------------------------------------------------------------------------------------------------- the end


def within(found: Weights | Gradients, drawing: Drawing) -> Weights | Gradients:
    """Scale weights by a positive factor per map if the map is normalized anyway, so that no product overflows."""
    return rescale(found, tuple(range(2, found.ndim))) if drawing.normalize else found


def combined(found: Explained, weights: Sequence[Weights | Gradients]) -> list[FlatMaps]:
    """`sum_k w_k A_k` at each layer, or the first component of `w_k A_k`, for weights `(n, t, c)` or `(n, t, c, p)`."""
    combine = maps.combine if found.drawing.combine == "sum" else maps.component
    return [combine(within(w, found.drawing), part.values) for w, part in zip(weights, found.reads)]


def weighed(found: Explained, weights: Sequence[Weights | Gradients]) -> Outcome:
    """The outcome of weights `(n, t, c)` or `(n, t, c, p)` for each layer."""
    signed = combined(found, weights)
    findings = cancelled(found, weights, "map" if found.drawing.combine == "sum" else "sign")
    return with_findings(drawn(found, signed), findings)._replace(weights=tuple(weights))


def cancelled(found: Explained, weights: Sequence[Weights | Gradients], what: Literal["map", "sign"]) -> tuple[Finding, ...]:
    """Findings about maps, or signs of components, that are the rest of `sum_k w_k A_k` after its parts cancel."""
    if _compat.transformed():
        return ()
    with torch.no_grad():
        pairs = [(within(w.detach(), found.drawing), part.values.detach()) for w, part in zip(weights, found.reads)]
        shares = [maps.remainder(*pair, maps.combine(*pair)) for pair in pairs]
    return about_sums(shares, found.forward.layers, what)


def with_findings(outcome: Outcome, more: Sequence[Finding]) -> Outcome:
    """The outcome with more findings, about layers of which it is not already known that their maps mean nothing."""
    known = {each.layer for each in outcome.findings}
    return outcome._replace(findings=(*outcome.findings, *(each for each in more if each.layer not in known)))


def weighed_by_gradients(graded: Graded, weights: Sequence[Weights | Gradients]) -> Outcome:
    """The outcome of weights that took one gradient for each target."""
    return weighed(graded.explained, weights)._replace(backwards=graded.explained.clean.numel())


def drawn(found: Explained, signed: Sequence[FlatMaps], grids: Sequence[tuple[int, ...]] | None = None) -> Outcome:
    """The outcome of signed maps: ReLU, resize, normalize, in this order. `grids` default to the layers' own."""
    forward, drawing = found.forward, found.drawing
    grids = [part.grid for part in found.reads] if grids is None else grids
    shaped = []
    for flat, grid in zip(signed, grids):
        rectified = torch.relu(flat) if drawing.relu else flat
        shaped.append(_on_grid(rectified.unflatten(-1, grid), forward.batch, len(grid), drawing))
    each = tuple(m[:, 0] for m in shaped) if found.score.single else tuple(shaped)
    names = forward.layers or ("",)  # without a layer, the map is of the input
    findings = () if _compat.transformed() else about_maps(signed, names, drawing.relu, forward.activations)
    lost = about_lost(lost_layers(forward))
    findings = (*lost, *(finding for finding in findings if finding.layer not in [each.layer for each in lost]))
    result = each if forward.several else each[0]
    at = forward.layers, tuple(grids), found.score.classes, found.clean, found.score
    return Outcome(result, *at, (), forward.forwards, 0, findings)


def with_sweep(outcome: Outcome, swept: Sequence[Swept]) -> Outcome:
    """The outcome with the masked inputs of a sweep added to its cost."""
    return outcome._replace(forwards=outcome.forwards + sum(part.forwards for part in swept))


def _on_grid(found: Tensor, batch: Batch, axes: int, drawing: Drawing) -> Tensor:
    size = checked_size(drawing.size, batch, axes)
    found = found if size is None else maps.resize(found, size)
    return maps.normalize(found, tuple(range(-axes, 0))) if drawing.normalize else found


# ----------------------------------------------------------------------------------------------------------- arguments


def check_combine(combine: Combine) -> None:
    """Raise an error unless `combine` is valid."""
    if combine not in ("sum", "eigen"):
        raise CamError(f'combine must be "sum" or "eigen" (the first component of the weighed channels), found {combine!r}')


def without_layer(method: str, layer: Layers) -> None:
    """Raise an error if a layer is given to a method that takes none."""
    if layer is not None:
        raise CamError(f"{method} takes no layer: pass layer=None, found {layer!r}")


def checked_size(size: Size, batch: Batch, axes: int) -> tuple[int, ...] | None:
    """Return the size of the map, or `None` for the layer's grid."""
    if size is None:
        return None
    if isinstance(size, str) and size == "input":
        size = batch.size
        if batch.pixels.axes.unclear:
            raise CamError(f'size="input": {batch.pixels.axes.unclear}')
        if size is None:
            several = isinstance(batch.x, list)
            found = "images of several sizes" if several else f"shape {tuple(batch.image.shape)}"
            raise CamError(f'size="input" needs spatial axes in the input, of one size, and x has {found}')
    whole = isinstance(size, Sequence) and all(isinstance(side, int) and side > 0 for side in size)
    if not whole or len(size) != axes:
        raise CamError(f'size={size!r} must be None, "input", or {axes} positive ints: the layer\'s grid has {axes} axes')
    return tuple(int(side) for side in size)


def check_noise(method: str, num_samples: Any, std: Any, seed: Any, units: Any = "input") -> None:
    """Raise an error unless the options of a method's noise are valid."""
    if units not in ("range", "input"):
        raise CamError(f'units must be "range" (std is a share of max - min of each image) or "input", found {units!r}')
    check_samples(method, num_samples)
    if not (isinstance(std, (int, float)) and 0 <= std < math.inf):
        raise CamError(f"{method} needs a finite std >= 0, found {std!r}")
    if not isinstance(seed, (int, torch.Generator)):
        raise CamError(f"seed must be an int or a torch.Generator, found {seed!r}")


def check_samples(method: str, num_samples: Any) -> None:
    """Raise an error unless the number of samples, or steps, is a positive int."""
    if not isinstance(num_samples, int) or num_samples < 1:
        raise CamError(f"{method} needs a whole num_samples >= 1, found {num_samples!r}")


def checked_blur(blur: tuple[int, float]) -> tuple[int, float]:
    """Return the kernel size and standard deviation of a blur, or raise an error."""
    pair = isinstance(blur, (tuple, list)) and len(blur) == 2 and isinstance(blur[0], int)
    if not pair or blur[0] < 1 or blur[0] % 2 == 0 or not blur[1] > 0:
        raise CamError(f"blur={blur!r} must be an odd number of pixels and a standard deviation, as in (51, 50.0)")
    return blur
