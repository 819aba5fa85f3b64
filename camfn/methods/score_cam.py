"""Score-CAM and its variants, which weight channels by the scores of masked inputs."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import masks, weights
from camfn.formulas.masks import Noise, Recipe, Variation, recipe_of
from camfn.methods._common import Drawing, check_noise, check_samples, explained, gradients_of, weighed, with_sweep
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import Forward, look, look_with_gradients, without_graph
from camfn.model.gradients import Pullback
from camfn.model.inputs import Key
from camfn.sweep.budget import Limits, Order, checked_limits, rows_within, sweep_some
from camfn.sweep.low_precision import sweep_narrow
from camfn.sweep.options import Sweep, checked, refuse_with_graph, usable
from camfn.sweep.scoring import Scoring, Swept, plan, sweep_all, sweep_layers


@method(weights.score_cam, (Need.ACTIVATIONS, Need.MASKED_INPUTS), Cost(per_channel=1))
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Score-CAM: weight each channel by the score of the input masked with that channel.

    `M_k = U(norm(A_k))`, `S_k = s(x * M_k)`, `w = softmax(S)` over channels, `L = relu(sum_k w_k A_k)`.

    A is the layer's activation and s the score of the target. U upsamples linearly to the input's size, and norm is min-max
    normalization. The cost is one forward pass for each channel that is not constant, for any number of targets.

    **Arguments**

    - `model`: any `nn.Module`. It is explained in eval mode and is not modified.
    - `layer`: a dotted name, the module itself, a sequence of layers (for a tuple of maps), or `None`. For `None`, a layer is
      chosen as in `camfn.candidate_layers`, and a warning names it. `"layer:0"` or `"layer:key"` is one element of a layer's
      output, `"layer@2"` is its second call.
    - `x`: the input with the batch first; a tuple for `model(*x)`; a mapping for `model(**x)`; or, for detectors, a list of
      images `(k, *size)` of one size.
    - `target`: the score to explain. `None` means the class predicted on the clean input. Classes are an int, n ints, a long
      tensor `(n,)` or `(n, t)`, or `"all"`. An integer means the model's raw output for that class. Other targets are those of
      `camfn.targets` and their sums, a callable that maps ONE sample's output to a scalar or `(t,)`, and a list with one target
      per image.
    - `masked`: the key or index of the input to mask. The default is the only floating-point input with spatial axes.
    - `axes`: the order of the axes of the input with the pixels, with one letter for each: `"n"` images first, at most one
      `"c"` channels, and others from `"t"` time, `"d"` depth, `"h"` and `"w"`, as in `"nhwc"`, `"ntchw"` or `"nct"`. Masks
      and sizes cover all but `n` and `c`, flips turn `w`, blurs and `camfn.multi_scale` leave `t`. `None` finds the order at
      the first layers that know their channels. Maps have the order t, d, h, w.
    - `recipe`: a name in `camfn.RECIPES`, or a `camfn.Recipe`. It selects the variant where papers and libraries differ.
    - `budget`: the share of the non-constant channels to score, in (0, 1]. 1.0 gives the exact map. The other scores are
      predicted from the head's gradient and from channels with similar masks.
    - `tolerance`: score channels until the estimated error of the normalized map is below this value. The error is the largest
      absolute difference from the exact map, and `camfn.explain` returns the estimate. With a `budget`, the first limit reached
      ends the sweep.
    - `order`: `"predicted"`, or a published order of the channels: `"std"`, `"max"` or `"gradient"`. A published order drops
      the channels beyond the budget, and has no error estimate.
    - `seed`: an int or a `torch.Generator`, for the random draws that estimate the error for a tolerance.
    - `sweep`: a `camfn.Sweep`, which sets chunk, memory, compilation, dtype and progress.
    - `combine`: `"sum"`, or `"eigen"` for the first component of `w_k A_k` instead of their sum (`camfn.maps.component`).
      `"eigen"` excludes a budget, a tolerance and a sweep in another dtype, because their errors are known for the sum only.
    - `state`: tensors to run the model on instead of its own (see `camfn.state_of`).
    - `layout`: `"auto"`, `"channels_first"`, `"channels_last"`, `camfn.layouts.tokens(grid, prefix)`, or a callable that maps
      the activation to `(n, c, *grid)`.
    - `size`: the size of the map: `None` (the layer's grid), `"input"`, or a shape.
    - `relu`: `False` returns the signed map.
    - `normalize`: `False` returns the map without min-max normalization.

    **Returns** maps `(n, *grid)`, or `(n, t, *grid)` for several targets, in float32 or wider. They lie in [0, 1] unless
    `normalize=False`. Under `torch.func.grad` and `jvp` they are differentiable with respect to `x` and `state`. In a plain
    call they have a graph if grad mode is on and `x`, or a tensor of `state`, requires grad.

    **Raises** `CamError` for invalid arguments, with what was found and what to do. `budget` and `tolerance` depend on values,
    so they raise under a transform, and for maps with a graph. Maps that are flat, not finite, or nowhere positive before their
    ReLU raise a `CamWarning`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> camfn.score_cam(model, "1", x).shape, camfn.score_cam(model, "1", x, camfn.targets.top(3), size="input").shape
    (torch.Size([2, 6, 6]), torch.Size([2, 3, 8, 8]))

    Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279). The defaults are those of torchcam's `ScoreCAM`.
    """
    variation = Variation(recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, axes, combine))
    return _swept(_looked(model, layer, x, state, masked, how), target, how)


@method(masks.ss_cam, (Need.ACTIVATIONS, Need.MASKED_INPUTS), Cost(per_channel=35))
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """SS-CAM: weight each channel as Score-CAM does, with scores averaged over noise.

    `S_k = mean_i s(x_ki)` over `num_samples` draws of `e ~ N(0, std^2)`, then as in `camfn.score_cam`.

    **Arguments**

    - `num_samples`: the number of draws. Each draw takes one forward pass per channel.
    - `std`: the standard deviation of the noise.
    - `noise`: what the noise is added to.
    - `noise="mask"` (torchcam): `x_ki = x * (M_k + e)`, with e per pixel of the mask, not clipped.
    - `noise="activation"` (the paper's first form): `x_ki = x * norm(U(A_k) + e)`.
    - `noise="input"` (the paper's second form): `x_ki = x * M_k + e / (max - min of x * M_k)`, with e per value of the input.
    - `seed`: an int, or a `torch.Generator`, which is copied and not advanced. The noise of a draw and channel depends on
      nothing else. All images of a batch share it, and it starts again for every layer.
    - `budget`, `tolerance`: take fewer draws of all channels, and shrink their means towards each other.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. On the CPU, the noise is what torchcam
    draws for one image after `torch.manual_seed(seed)`, if the number of pixels of the mask is a multiple of 16.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.ss_cam(model, "1", torch.randn(2, 3, 8, 8), num_samples=3, std=0.5).shape
    torch.Size([2, 6, 6])

    Wang et al., SS-CAM: Smoothed Score-CAM, 2020 (arXiv 2006.14255). The defaults are those of torchcam's `SSCAM`.
    """
    check_noise("ss_cam", num_samples, std, seed)
    if noise not in ("mask", "activation", "input"):
        raise CamError(f'noise must be "mask", "activation" or "input", found {noise!r}')
    variation = Variation((1.0,) * num_samples, noise, std, seed, recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, axes, combine))
    return _swept(_looked(model, layer, x, state, masked, how), target, how)


@method(masks.is_cam, (Need.ACTIVATIONS, Need.MASKED_INPUTS), Cost(per_channel=10))
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """IS-CAM: weight each channel as Score-CAM does, with scores averaged over multiples of the masked input.

    `S_k = mean_i s(c_i * x * M_k)` for i = 1..N with `N = num_samples`, then as in `camfn.score_cam`.

    **Arguments**

    - `num_samples`: N. Each channel takes N forward passes.
    - `path="cumulative"` (torchcam and the authors' code): `c_i = sum_{j<=i} j/N`. For N = 10 this is 0.1 ... 5.5, which is
      extrapolation rather than integration.
    - `path="linear"`: `c_i = i/N`.
    - `budget`, `tolerance`: score fewer channels.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.is_cam(model, "1", torch.randn(2, 3, 8, 8), path="linear").shape
    torch.Size([2, 6, 6])

    Naidu et al., IS-CAM: Integrated Score-CAM, 2020 (arXiv 2010.03023). The defaults are those of torchcam's `ISCAM`.
    """
    check_samples("is_cam", num_samples)
    variation = Variation(masks.is_cam(num_samples, path), recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, axes, combine))
    return _swept(_looked(model, layer, x, state, masked, how), target, how)


# ------------------------------------------------------------------------------------------------ shared functions


def _as_int(seed: Any) -> Any:
    """Return a seed as an int; a generator stands for its initial seed."""
    return seed.initial_seed() % (1 << 63) if isinstance(seed, torch.Generator) else seed


class _How(NamedTuple):
    """The options of Score-CAM and its variants."""

    variation: Variation
    limits: Limits
    sweep: Sweep
    drawing: Drawing


def _checked(sweep: Sweep, limits: Limits, combine: Combine) -> Sweep:
    """Validate the sweep, and allow `combine="eigen"` only where no error is estimated."""
    if combine != "sum" and (limits.any or checked(sweep).dtype is not None):
        raise CamError('budget=, tolerance= and Sweep(dtype=...) estimate the error of a sum: pass combine="sum"')
    return checked(sweep)


def _looked(
    model: nn.Module, layer: Layers, x: Inputs, state: State | None, masked: Key, how: _How
) -> tuple[Forward, Pullback | None]:
    """Run the clean forward pass, with gradients if a budget or a tolerance needs them."""
    if how.limits.any:
        return look_with_gradients(model, layer, x, state, masked, how.drawing.axes, masks=True, needed=False)
    return look(model, layer, x, state, masked, how.drawing.axes, masks=True), None


def _swept(looked: tuple[Forward, Pullback | None], target: Target, how: _How) -> Outcome:
    """Sweep the masked inputs and weight the channels by their scores."""
    (variation, limits, sweep, drawing), (forward, pullback) = how, looked
    with without_graph(forward.batch.x, forward.task.state):
        refuse_with_graph(forward.task.graphed, sweep, limits.any)
        found = explained(forward, target, drawing, variation.recipe.score)
        gradients = [None] * len(found.reads) if pullback is None else gradients_of(found, pullback)
        del looked, pullback  # free the graph before the sweep
        plans = [plan(part, variation) for part in found.reads]
        rows = sum(rows_within(todo, variation, limits) for todo in plans)
        sweep = usable(sweep, forward.image.device, forward.image.dtype)
        ways = [partial(_sweep, gradients=each, limits=limits) for each in gradients]
        swept = sweep_layers(forward, found.score, plans, ways, variation, sweep, rows=rows)
        outcome = weighed(found, [weights.score_cam(part.scores, variation.recipe.weights) for part in swept])
        backwards = found.clean.numel() if limits.any else 0
        return with_sweep(outcome, swept)._replace(errors=tuple(part.error for part in swept), backwards=backwards)


def _sweep(scoring: Scoring, gradients: Tensor | None, limits: Limits) -> Swept:
    """Run one layer's sweep: budgeted, in a lower precision, or in full."""
    if gradients is not None:
        return sweep_some(scoring, gradients, limits)
    return sweep_all(scoring) if scoring.options.dtype is None else sweep_narrow(scoring)
