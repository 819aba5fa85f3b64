"""Methods that score masked inputs: Score-CAM and its kin."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import weights
from camfn.formulas.masks import Noise, Recipe, Variation, check_noise, check_samples, path_scales, recipe_of
from camfn.methods.sweeps import sweep_layers
from camfn.methods.table import Drawing, Outcome, checked_combine, clean_scores, combined, drawn, method, read, slopes_at
from camfn.model.forward import Subject, look, without_graph
from camfn.model.inputs import Key
from camfn.sweep.budget import Limits, Order, checked_limits, rows_within, sweep_some
from camfn.sweep.low_precision import sweep_narrow
from camfn.sweep.options import Sweep, checked, usable
from camfn.sweep.scoring import Scoring, Swept, plan, sweep_all
from camfn.targets import resolve


@method("activations", "masked inputs", cost="channels + 1")
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
    combine: Combine = "sum",
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
    - `layer`: a dotted name, the module itself, a sequence of them (a tuple of maps comes back), or `None`: a layer is
      chosen, as `camfn.candidate_layers` tells, and a warning names it. `"layer:0"` or `"layer:key"` is one part of what a
      layer returns, `"layer@2"` its second call.
    - `x`: the input with the batch first, `(n, k, *size)` with one to three spatial axes; a tuple for `model(*x)`; a
      mapping for `model(**x)`; a list for a detector, of images `(k, *size)` of one size. `masked` is the key or index of
      the input to mask, by default the only floating-point one with spatial axes.
    - `target`: `None` (the class predicted on the clean input), an int, n ints, a long tensor `(n,)` or `(n, t)`, `"all"`,
      a name of `camfn.targets` or a sum of such, a callable from ONE sample's output to a scalar or `(t,)`, or a list with
      one target for each image. An integer means the model's raw output for that class.
    - `recipe`: a name of `camfn.RECIPES`, or a `camfn.Recipe`: where papers and libraries differ.
    - `budget`: the share in (0, 1] of the channels that are not flat that is swept; 1.0 is the exact map. What the others
      would score is predicted from the head's gradient and from channels with masks like theirs.
    - `tolerance`: sweep until the error that is estimated for the normalised map, its largest absolute difference from the
      exact one, is below this; with a `budget`, whichever is reached first. `camfn.explain` tells the estimate.
    - `order`: `"predicted"`; or `"std"`, `"max"`, `"gradient"` for a published order of channels, in which those beyond the
      budget are dropped and no error is known.
    - `seed`: of the random draws that a tolerance is judged by: an int or a `torch.Generator`.
    - `sweep`: a `camfn.Sweep`: chunk, memory, compilation, dtype, progress.
    - `combine`: `"sum"`, or `"eigen"` for the first component of `w_k A_k` in place of their sum (`camfn.maps.component`); not
      with a budget, a tolerance or a sweep in another dtype, whose error is known of the sum alone.
    - `state`: run the model on these tensors in place of its own (`camfn.state_of` gives them).
    - `layout`: `"auto"`, `"channels_first"`, `"channels_last"`, `camfn.layouts.tokens(grid, prefix)`, or a callable that
      brings the activation to `(n, c, *grid)`.
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
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize, checked_combine(combine)))


@method("activations", "masked inputs", cost="35 x channels + 1")
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
    combine: Combine = "sum",
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
    check_noise("ss_cam", num_samples, std, seed)
    if noise not in ("mask", "activation", "input"):
        raise CamError(f'noise must be "mask", "activation" or "input", found {noise!r}')
    variation = Variation((1.0,) * num_samples, noise, std, seed, recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    subject = look(model, layer, x, state, masked, masks=True, graph=limits.any)
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize, checked_combine(combine)))


@method("activations", "masked inputs", cost="10 x channels + 1")
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
    combine: Combine = "sum",
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
    check_samples("is_cam", num_samples)
    variation = Variation(path_scales(num_samples, path), recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    subject = look(model, layer, x, state, masked, masks=True, graph=limits.any)
    return _swept(subject, target, variation, limits, sweep, layout, Drawing(relu, size, normalize, checked_combine(combine)))


# ------------------------------------------------------------------------------------------------- what they share


def _as_int(seed: Any) -> Any:
    return seed.initial_seed() % (1 << 63) if isinstance(seed, torch.Generator) else seed


def _swept(
    subject: Subject, target: Target, variation: Variation, limits: Limits, sweep: Sweep, layout: Layout, drawing: Drawing
) -> Outcome:
    """Score-CAM and its kin: the weights come from the scores of masked inputs."""
    recipe = variation.recipe
    weigh = weights.softmax if recipe.weights == "softmax" else weights.score
    if drawing.combine != "sum" and (limits.any or checked(sweep).dtype is not None):
        raise CamError('budget=, tolerance= and Sweep(dtype=...) know the error of a sum: they need combine="sum"')
    with without_graph():
        score = resolve(target, subject.output, subject.n, subject.image.device, recipe.score)
        clean = clean_scores(subject, score)
        slopes = slopes_at(subject, score, layout) if limits.any else [None] * len(subject.layers)
        subject = subject._replace(pull=None)  # and with it the graph
        reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        plans = [plan(read, variation) for read in reads]
        rows = sum(rows_within(todo, variation, limits) for todo in plans)
        sweep = usable(checked(sweep), subject.image.device, subject.image.dtype)
        ways = [partial(_sweep, slopes=slope, limits=limits) for slope in slopes]
        swept = sweep_layers(subject, score, plans, ways, rows, variation, sweep)
        found, errors = tuple(weigh(part.scores) for part in swept), tuple(part.error for part in swept)
        outcome = drawn(subject, score, clean, combined(found, reads, drawing), [part.grid for part in reads], drawing)
        forwards = outcome.forwards + sum(part.forwards for part in swept)
        backwards = clean.numel() if limits.any else 0
        return outcome._replace(weights=found, errors=errors, forwards=forwards, backwards=backwards)


def _sweep(scoring: Scoring, slopes: Tensor | None, limits: Limits) -> Swept:
    if slopes is not None:
        return sweep_some(scoring, slopes, limits)
    return sweep_all(scoring) if scoring.options.dtype is None else sweep_narrow(scoring)
