"""The methods, as compositions: look, resolve the target, sweep, weigh, draw the map. No arithmetic here."""

import functools
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from camfn import _compat, layouts, weights
from camfn import maps as _maps
from camfn._errors import CamError, warn
from camfn._types import Inputs, Layer, Layers, Layout, Maps, Size, State, Target, Weights
from camfn.anytime import Limits, Order, checked_limits, rows_within, sweep_some
from camfn.execution import Sweep, checked, counter, usable
from camfn.layers import find_linear
from camfn.layouts import Read
from camfn.masks import Noise, Recipe, Variation, path_scales, recipe_of
from camfn.precision import sweep_narrow
from camfn.runner import runner_of
from camfn.scoring import Scoring, Swept, plan, sweep_all
from camfn.subject import Key, Subject, first_nonfinite, look, slopes_of, without_graph
from camfn.targets import Score, resolve, score_rows

P = ParamSpec("P")


class Outcome(NamedTuple):
    """A method's maps and how they came about."""

    maps: Maps
    layers: tuple[str, ...]
    classes: Tensor | None  # (n, t), where the target is of classes
    scores: Tensor  # (n, t), of the clean input
    weights: tuple[Weights, ...]  # a layer's (n, t, c)
    forwards: int  # inputs that went through the model
    notes: tuple[str, ...]  # what is to be said about the maps
    errors: tuple[Tensor | None, ...] = ()  # for each layer, (n, t): how far a normalised map may be off, where that is not 0


class Method(NamedTuple):
    """A row of `camfn.METHODS`."""

    function: Callable[..., Maps]
    run: Callable[..., Outcome]  # the same, with how the maps came about
    needs: frozenset[str]  # of "activations", "masked inputs", "linear head"
    cost: str  # inputs that go through the model for each image and layer, at the defaults: "35 x channels + 1"


_TABLE: dict[str, Method] = {}
METHODS = MappingProxyType(_TABLE)
"""Every method by name: its function, what it needs and what it costs."""


def _method(*needs: str, cost: str) -> Callable[[Callable[P, Outcome]], Callable[P, Maps]]:
    """Make the public function, which gives the maps alone, and its row in the table."""

    def register(run: Callable[P, Outcome]) -> Callable[P, Maps]:
        @functools.wraps(run)
        def function(*args: P.args, **kwargs: P.kwargs) -> Maps:
            outcome = run(*args, **kwargs)
            for note in outcome.notes:
                warn(note)
            return outcome.maps

        function.__annotations__ = {**run.__annotations__, "return": Maps}
        _TABLE[run.__name__] = Method(function, run, frozenset(needs), cost)
        return function

    return register


class Drawing(NamedTuple):
    """How a map is drawn from weights: the options that every method has."""

    relu: bool
    size: Size
    normalize: bool


@_method("activations", "linear head", cost="1")
def cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    fc: Layer | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Class activation maps: the activation weighted by the class's row of the linear layer behind the pooling.

    `L_c = sum_k W_ck A_k`, for models that end in global average pooling and one linear layer (or a 1x1 convolution). One
    forward, no ReLU. On such a head the mean of the map is the logit less its bias.

    **Arguments**, beside those that all methods share (`camfn.score_cam` tells them): `layer`, one layer; `fc`, the linear
    layer by name or as a module, found by its shape if `None`, which a warning says; `target`, classes only.

    **Returns** `(n, *grid)`, or `(n, t, *grid)` for several classes; `(min, max)` scaled to `(0, 1)` unless `normalize=False`.

    **Raises** `CamError` where several layers are given, the target is not of classes, or there is no linear layer of the
    layer's channels and the model's classes, or more than one.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> raw = camfn.cam(model, "0", x, 3, fc="3", normalize=False)
    >>> torch.allclose(raw.mean((1, 2)) + model[3].bias[3], model(x)[:, 3], atol=1e-6)
    True

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150). torchcam's `CAM`.
    """
    if isinstance(layer, (list, tuple)) and len(layer) > 1:
        raise CamError(f"cam explains one layer, the one before the pooling; found {len(layer)}")
    subject = look(model, layer, x, state, None, masks=False)
    score = resolve(target, subject.output, subject.n, subject.image.device)
    if score.classes is None or not score.is_logit:
        raise CamError("cam weighs channels by a class's row of the linear layer: its target must be classes")
    read = _read(subject, subject.layers[0], subject.seen[0], layout)
    count = _clean(subject, score)
    name = find_linear(subject.shell, model, fc, read.values.shape[1], subject.output)
    matrix = subject.state[subject.shell.aliases[f"{name}.weight"]]
    found = (weights.class_rows(matrix.flatten(1), score.classes),)
    return _drawn(subject, score, count, [read], found, Drawing(relu, size, normalize), 0)


@_method("activations", "masked inputs", cost="channels + 1")
def score_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    masked: Key = None,
    recipe: str | Recipe = "torchcam",
    budget: float = 1.0,
    tolerance: float | None = None,
    order: Order = "predicted",
    seed: int | torch.Generator = 0,
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Score-CAM: each channel is weighted by the score of the input seen through that channel.

    `M_k = U(norm(A_k))`, `S_k = s(x * M_k)`, `w = softmax(S)` over channels, `L = relu(sum_k w_k A_k)`; U upsamples linearly to
    the input's size and norm is min-max. One forward for every channel that is not flat, for any number of targets.

    **Arguments**

    - `model`: any `nn.Module`; it is explained in eval mode and left as it is.
    - `layer`: a dotted name, the module itself, a sequence of them (a tuple of maps comes back), or `None`: the last layer
      with spatial axes, which a warning names.
    - `x`: the input with the batch first, `(n, k, *size)` with one to three spatial axes; a tuple for `model(*x)`; a
      mapping for `model(**x)`. `masked` is the key or index of the input to mask, by default the only floating-point one with
      spatial axes.
    - `target`: `None` (the class predicted on the clean input), an int, n ints, a long tensor `(n,)` or `(n, t)`, `"all"`,
      a name of `camfn.targets`, a callable from ONE sample's output to a scalar or `(t,)`, or n callables. An integer means
      the model's raw output for that class.
    - `recipe`: a name of `camfn.RECIPES`, or a `camfn.Recipe`: where papers and libraries differ.
    - `budget`: the share in (0, 1] of the channels that are not flat that is swept; 1.0 is the exact map. What the others
      would score is predicted from the head's gradient and from channels with masks like theirs.
    - `tolerance`: sweep until the error that is estimated for the normalised map, its largest absolute difference from the
      exact one, is below this; with a `budget`, whichever is reached first. `camfn.explain` tells the estimate.
    - `order`: `"predicted"`; or `"std"`, `"max"`, `"gradient"` for a published order of channels, in which those beyond the
      budget are dropped and no error is known.
    - `seed`: of the random draws that a tolerance is judged by: an int or a `torch.Generator`.
    - `sweep`: a `camfn.Sweep`: chunk, memory, compilation, dtype, progress.
    - `state`: run the model on these tensors in place of its own (`camfn.state_of` gives them).
    - `layout`: `"auto"`, `"channels_first"`, `"channels_last"`, or a callable that brings the activation to `(n, c, *grid)`.
    - `size`: `None` (the layer's grid), `"input"`, or a shape.
    - `relu=False` gives the signed map, `normalize=False` the unscaled one.

    **Returns** `(n, *grid)`, or `(n, t, *grid)` where the target asks for several, float32 or wider; in [0, 1] unless
    `normalize=False`. A plain call gives maps without a graph, even if `x.requires_grad`; under `torch.func.grad` and
    `jvp` they are differentiable in `x` and `state`.

    **Raises** `CamError`, whose message says what was found and what to do; **warns** where a map means nothing. `budget`
    and `tolerance` read values, and are refused under a transform.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> camfn.score_cam(model, "1", x).shape, camfn.score_cam(model, "1", x, camfn.targets.top(3), size="input").shape
    (torch.Size([2, 6, 6]), torch.Size([2, 3, 8, 8]))

    Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279). torchcam's `ScoreCAM` by default.
    """
    variation = Variation(recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    subject = look(model, layer, x, state, masked, masks=True, graph=limits.any)
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize))


@_method("activations", "masked inputs", cost="35 x channels + 1")
def ss_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    num_samples: int = 35,
    std: float = 2.0,
    noise: Noise = "mask",
    seed: int | torch.Generator = 0,
    masked: Key = None,
    recipe: str | Recipe = "torchcam",
    budget: float = 1.0,
    tolerance: float | None = None,
    order: Order = "predicted",
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """SS-CAM: Score-CAM with the scores averaged over noise.

    `S_k = mean_i s(x_ki)` over `num_samples` draws of `e ~ N(0, std^2)`:

    - `noise="mask"` (torchcam): `x_ki = x * (M_k + e)`, e per pixel of the mask, not clipped;
    - `noise="activation"` (the paper's first form): `x_ki = x * norm(U(A_k) + e)`;
    - `noise="input"` (the paper's second): `x_ki = x * M_k + e / (max - min of x * M_k)`, e per value of the input.

    `seed` is an int, or a `torch.Generator`, which is copied and not advanced. The noise of a draw and channel depends on
    nothing else; all images of a batch share it, and every layer starts anew. On the CPU it is the noise that torchcam draws
    for one image after `torch.manual_seed(seed)`, wherever the mask has a multiple of 16 pixels. `num_samples` forwards for
    each channel; a `budget` or `tolerance` takes fewer draws of all channels, and shrinks their means towards each other.
    The other arguments, and what is returned and raised, are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.ss_cam(model, "1", torch.randn(2, 3, 8, 8), num_samples=3, std=0.5).shape
    torch.Size([2, 6, 6])

    Wang et al., SS-CAM: Smoothed Score-CAM, 2020 (arXiv 2006.14255). torchcam's `SSCAM` by default.
    """
    _check_samples("ss_cam", num_samples)
    if not (0 <= std < math.inf):
        raise CamError(f"ss_cam needs a finite std >= 0, found {std!r}")
    if not isinstance(seed, (int, torch.Generator)):
        raise CamError(f"seed must be an int or a torch.Generator, found {seed!r}")
    if noise not in ("mask", "activation", "input"):
        raise CamError(f'noise must be "mask", "activation" or "input", found {noise!r}')
    variation = Variation((1.0,) * num_samples, noise, std, seed, recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    subject = look(model, layer, x, state, masked, masks=True, graph=limits.any)
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize))


@_method("activations", "masked inputs", cost="10 x channels + 1")
def is_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    num_samples: int = 10,
    path: Literal["cumulative", "linear"] = "cumulative",
    masked: Key = None,
    recipe: str | Recipe = "torchcam",
    budget: float = 1.0,
    tolerance: float | None = None,
    order: Order = "predicted",
    seed: int | torch.Generator = 0,
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """IS-CAM: Score-CAM with the scores averaged along a path of masked inputs.

    `S_k = mean_i s(c_i * x * M_k)` for i = 1..N, N being `num_samples`:

    - `path="cumulative"` (torchcam and the authors): `c_i = sum_{j<=i} j/N`, which is 0.1 ... 5.5 for N = 10: an
      extrapolation more than an integral;
    - `path="linear"`: `c_i = i/N`.

    N forwards for each channel, and a `budget` or `tolerance` takes fewer channels. The other arguments, and what is returned
    and raised, are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.is_cam(model, "1", torch.randn(2, 3, 8, 8), path="linear").shape
    torch.Size([2, 6, 6])

    Naidu et al., IS-CAM: Integrated Score-CAM, 2020 (arXiv 2010.03023). torchcam's `ISCAM` by default.
    """
    _check_samples("is_cam", num_samples)
    variation = Variation(path_scales(num_samples, path), recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    subject = look(model, layer, x, state, masked, masks=True, graph=limits.any)
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize))


# ------------------------------------------------------------------------------------------------- what they share


def _check_samples(method: str, num_samples: int) -> None:
    if not isinstance(num_samples, int) or num_samples < 1:
        raise CamError(f"{method} needs a whole num_samples >= 1, found {num_samples!r}")


def _as_int(seed: Any) -> Any:
    return seed.initial_seed() % (1 << 63) if isinstance(seed, torch.Generator) else seed


def _swept(
    subject: Subject, target: Target, variation: Variation, limits: Limits, sweep: Sweep, layout: Layout, drawing: Drawing
) -> Outcome:
    """Score-CAM and its kin: the weights come from the scores of masked inputs."""
    recipe = variation.recipe
    weigh = weights.softmax if recipe.weights == "softmax" else weights.score
    with without_graph():
        score = resolve(target, subject.output, subject.n, subject.image.device, recipe.score)
        clean = _clean(subject, score)
        subject, slopes = _slopes(subject, score, layout) if limits.any else (subject, [None] * len(subject.layers))
        reads = [_read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        plans = [plan(read, variation) for read in reads]
        rows = sum(rows_within(todo, variation, limits) for todo in plans)
        sweep = usable(checked(sweep), subject.image.device, subject.image.dtype)
        runner, tick = runner_of(subject, score, sweep, rows), counter(sweep.progress, rows)
        all_ = [Scoring(subject, runner, score, todo, variation, sweep, tick) for todo in plans]
        swept = [_sweep(scoring, slope, limits) for scoring, slope in zip(all_, slopes)]
        tick(None)
        runner.room.tell()
        found, errors = tuple(weigh(part.scores) for part in swept), tuple(part.error for part in swept)
        forwards = sum(part.forwards for part in swept)
        return _drawn(subject, score, clean, reads, found, drawing, forwards)._replace(errors=errors)


def _sweep(scoring: Scoring, slopes: Tensor | None, limits: Limits) -> Swept:
    if slopes is not None:
        return sweep_some(scoring, slopes, limits)
    return sweep_all(scoring) if scoring.options.dtype is None else sweep_narrow(scoring)


def _slopes(subject: Subject, score: Score, layout: Layout) -> tuple[Subject, list[Tensor]]:
    """The scores' gradients at each layer, `(n, t, c, p)`, and the subject without the graph they came from."""
    subject, found = slopes_of(subject, score)
    pairs = zip(subject.layers, found)
    return subject, [torch.stack([_read(subject, name, slope, layout).values for slope in of], 1) for name, of in pairs]


def _read(subject: Subject, name: str, activation: Tensor, layout: Layout) -> Read:
    return layouts.read(activation, layout, subject.size, name, subject.n)


def _clean(subject: Subject, score: Score) -> Tensor:
    """The scores of the clean input, from the forward that was run anyway."""
    scores = score_rows(score.of, subject.output, score.rows)
    if not _compat.transformed() and not bool(torch.isfinite(scores).all()):
        raise CamError(f"the score is not finite; {first_nonfinite(subject.model, subject.state, subject.x)}")
    return scores


def _drawn(
    subject: Subject, score: Score, clean: Tensor, reads: list[Read], found: tuple[Weights, ...], drawing: Drawing, rows: int
) -> Outcome:
    """Combine, ReLU, resize, normalise: in this order."""
    signed = [_maps.combine(w, read.values) for w, read in zip(found, reads)]
    drawn = []
    for flat, read in zip(signed, reads):
        rectified = torch.relu(flat) if drawing.relu else flat
        drawn.append(_on_grid(rectified.unflatten(-1, read.grid), subject, len(read.grid), drawing))
    maps = [m[:, 0] for m in drawn] if score.single else drawn
    notes = () if _compat.transformed() else _diagnose(signed, subject.layers, drawing)
    result = tuple(maps) if subject.several else maps[0]
    return Outcome(result, subject.layers, score.classes, clean, found, subject.forwards + rows, notes)


def _on_grid(maps: Tensor, subject: Subject, axes: int, drawing: Drawing) -> Tensor:
    size = _checked_size(drawing.size, subject, axes)
    maps = maps if size is None else _maps.resize(maps, size)
    return _maps.normalize(maps, tuple(range(-axes, 0))) if drawing.normalize else maps


def _checked_size(size: Size, subject: Subject, axes: int) -> tuple[int, ...] | None:
    if size is None:
        return None
    if isinstance(size, str) and size == "input":
        if subject.size is None:
            raise CamError(f'size="input" needs spatial axes in the input, and x has shape {tuple(subject.image.shape)}')
        size = subject.size
    whole = isinstance(size, Sequence) and all(isinstance(side, int) and side > 0 for side in size)
    if not whole or len(size) != axes:
        raise CamError(f'size={size!r} must be None, "input", or {axes} positive ints: the layer\'s grid has {axes} axes')
    return tuple(int(side) for side in size)


def _diagnose(signed: list[Tensor], layers: tuple[str, ...], drawing: Drawing) -> tuple[str, ...]:
    """Sentences about maps that mean nothing; the values are read once."""
    facts = torch.stack([torch.stack([_maps.is_flat(m.amin(-1), m.amax(-1), m.dtype), m.amax(-1) <= 0]) for m in signed])
    notes = []
    for name, (flat, negative) in zip(layers, facts.cpu()):
        if flat.any():
            notes.append(
                f"{int(flat.sum())} of {flat.numel()} maps at layer {name!r} are flat: every position has the same value, "
                "so there is nothing to see (a layer whose activation does not vary over positions?)"
            )
        if drawing.relu and (negative & ~flat).any():
            notes.append(
                f"{int((negative & ~flat).sum())} of {flat.numel()} maps at layer {name!r} are nowhere positive: the ReLU "
                "leaves zeros; relu=False gives the signed map"
            )
    return tuple(notes)
