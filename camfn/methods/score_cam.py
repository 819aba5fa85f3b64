"""Methods that score masked inputs: Score-CAM and its kin."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import masks, weights
from camfn.formulas.masks import Noise, Recipe, Variation, recipe_of
from camfn.methods._common import Drawing, check_noise, check_samples, explained, gradients_of, weighed
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import Forward, look, look_with_gradients, without_graph
from camfn.model.gradients import Pullback
from camfn.model.inputs import Key
from camfn.sweep.budget import Limits, Order, checked_limits, rows_within, sweep_some
from camfn.sweep.low_precision import sweep_narrow
from camfn.sweep.options import Sweep, checked, usable
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
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, combine))
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
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, combine))
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
    variation = Variation(masks.is_cam(num_samples, path), recipe=recipe_of(recipe))
    limits = checked_limits(Limits(budget, tolerance, order, _as_int(seed)), variation.recipe.weights)
    how = _How(variation, limits, _checked(sweep, limits, combine), Drawing(relu, size, normalize, layout, combine))
    return _swept(_looked(model, layer, x, state, masked, how), target, how)


# ------------------------------------------------------------------------------------------------- what they share


def _as_int(seed: Any) -> Any:
    return seed.initial_seed() % (1 << 63) if isinstance(seed, torch.Generator) else seed


class _How(NamedTuple):
    """The options of Score-CAM and its kin."""

    variation: Variation
    limits: Limits
    sweep: Sweep
    drawing: Drawing


def _checked(sweep: Sweep, limits: Limits, combine: Combine) -> Sweep:
    if combine != "sum" and (limits.any or checked(sweep).dtype is not None):
        raise CamError('budget=, tolerance= and Sweep(dtype=...) know the error of a sum: they need combine="sum"')
    return checked(sweep)


def _looked(
    model: nn.Module, layer: Layers, x: Inputs, state: State | None, masked: Key, how: _How
) -> tuple[Forward, Pullback | None]:
    """The clean forward pass, with gradients where a budget takes them."""
    if how.limits.any:
        return look_with_gradients(model, layer, x, state, masked, masks=True)
    return look(model, layer, x, state, masked, masks=True), None


def _swept(looked: tuple[Forward, Pullback | None], target: Target, how: _How) -> Outcome:
    """The maps of weights that come from the scores of masked inputs."""
    (variation, limits, sweep, drawing), (forward, pullback) = how, looked
    with without_graph():
        found = explained(forward, target, drawing, variation.recipe.score)
        gradients = [None] * len(found.reads) if pullback is None else gradients_of(found, pullback)
        del looked, pullback  # and with it the graph
        plans = [plan(part, variation) for part in found.reads]
        rows = sum(rows_within(todo, variation, limits) for todo in plans)
        sweep = usable(sweep, forward.image.device, forward.image.dtype)
        ways = [partial(_sweep, gradients=each, limits=limits) for each in gradients]
        swept = sweep_layers(forward, found.score, plans, ways, variation, sweep, rows=rows)
        outcome = weighed(found, [weights.score_cam(part.scores, variation.recipe.weights) for part in swept])
        forwards = outcome.forwards + sum(part.forwards for part in swept)
        backwards = found.clean.numel() if limits.any else 0
        return outcome._replace(errors=tuple(part.error for part in swept), forwards=forwards, backwards=backwards)


def _sweep(scoring: Scoring, gradients: Tensor | None, limits: Limits) -> Swept:
    if gradients is not None:
        return sweep_some(scoring, gradients, limits)
    return sweep_all(scoring) if scoring.options.dtype is None else sweep_narrow(scoring)
