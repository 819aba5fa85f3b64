"""Metrics of faithfulness: how the score changes when the important parts of the input are removed."""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn.formulas.resampling import blur, resize, resize_with_ties, with_ties
from camfn.metrics.imputation import linear_imputation
from camfn.metrics.scoring import Scores, by_target, clean_of, is_count, like, numbers, scored

Order: TypeAlias = Literal["morf", "lerf", "difference"]
Baseline: TypeAlias = Literal["zero", "mean", "blur", "linear"] | Tensor

_BY_MASKED_INPUTS = frozenset({"group_cam", "is_cam", "opti_cam", "poly_cam", "rise", "score_cam", "score_cam_pp", "ss_cam"})

CIRCULAR: MappingProxyType[str, frozenset[str]] = MappingProxyType(
    dict.fromkeys(
        ("adcc", "average_drop", "average_gain", "deletion", "increase_in_confidence", "insertion"), _BY_MASKED_INPUTS
    )
)
"""For each metric, the methods that are made by what it measures: the score of inputs that a mask dims. A good value is then no
evidence for the map. Tables mark these pairs."""


# -------------------------------------------------------------------------------------------------------------- cells

_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def on_cells(maps: Float[Tensor, "n t *grid"], size: Sequence[int], grid: Sequence[int] | None) -> Float[Tensor, "n t *grid"]:
    """Maps on the grid whose cells are removed: means where it is coarser than the maps, else interpolated.

    `None` is the maps' own grid, or the input's size where that is coarser.
    """
    sides, own = tuple(size), tuple(maps.shape[2:])
    found = tuple(map(min, own, sides)) if grid is None else numbers("grid", grid, "cells along each axis, as (7, 7)")
    if len(found) != len(sides) or not all(is_count(cells, 1) and cells <= side for cells, side in zip(found, sides)):
        raise CamError(f"grid={grid!r} must give a number of cells for each of {len(sides)} axes, from 1 to {sides}")
    if any(cells > side for cells, side in zip(found, own)):
        return resize_with_ties(maps, found)
    return maps if found == own else with_ties(lambda exact: _POOL[len(found)](exact, found), maps, len(found))


def pixels_of(cells: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Values of cells `(..., cells)`, each at the pixels of its cell, `(..., *size)`."""
    found = cells.unflatten(-1, tuple(grid))
    for axis, (count, side) in enumerate(zip(grid, size), cells.ndim - 1):
        at = torch.arange(side, device=cells.device) * count // side
        found = found.index_select(axis, at)
    return found


def _ranks(cells: Float[Tensor, "n t p"], generator: torch.Generator) -> Tensor:
    """The rank of each cell, from 0 for the highest. Ties are broken by one random order, the same for all maps."""
    shuffled = torch.randperm(cells.shape[-1], generator=generator).to(cells.device)
    order = shuffled[torch.argsort(cells[..., shuffled], dim=-1, descending=True, stable=True)]
    return order.argsort(-1)


# ---------------------------------------------------------------------------------------------------------- baselines


def filler(x: Tensor, baseline: Baseline, seed: int) -> Callable[[Tensor], Tensor]:
    """A function from removed pixels `(b, n, t, *size)`, bools, to inputs `(b, n, t, channels, *size)` without them."""
    if isinstance(baseline, str) and baseline == "linear":

        def impute(removed: Tensor) -> Tensor:
            pictures = x[:, None].expand(*removed.shape[:3], *x.shape[1:])
            filled = linear_imputation(pictures.flatten(0, 2), removed.flatten(0, 2), noise=0.01, seed=seed)
            return filled.reshape(pictures.shape)

        return impute
    there = _baseline(x, baseline)[:, None]
    return lambda removed: torch.where(removed.unsqueeze(3), there, x[:, None])


def _baseline(x: Tensor, baseline: Baseline) -> Tensor:
    axes = tuple(range(2, x.ndim))
    if isinstance(baseline, Tensor):
        if baseline.ndim > x.ndim or any(a not in (1, b) for a, b in zip(reversed(baseline.shape), reversed(x.shape))):
            raise CamError(f"baseline has shape {tuple(baseline.shape)}, which does not fit x of shape {tuple(x.shape)}")
        return baseline.to(x).expand(x.shape)
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        return x.mean(axes, keepdim=True).expand(x.shape)
    if baseline == "blur":
        sigma = max(x.shape[2:]) / 10
        return blur(x, 2 * round(3 * sigma) + 1, sigma, len(axes))
    raise CamError(f'baseline={baseline!r} must be "zero", "mean", "blur", "linear", or a tensor that fits x')


# ------------------------------------------------------------------------------------------------ deletion, insertion


class Curve(NamedTuple):
    """Scores over the share of cells that was removed, or inserted."""

    fractions: Float[Tensor, " k"]  # from 0 to 1
    scores: Float[Tensor, "n ... k"]

    @property
    def area(self) -> Float[Tensor, "n ..."]:
        """The area under the curve, by trapezoids: `(n,)` or `(n, t)`."""
        return torch.trapezoid(self.scores, self.fractions.to(self.scores))


def deletion_curve(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    order: Literal["morf", "lerf", "random"] = "morf",
    steps: int = 20,
    baseline: Baseline = "mean",
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Curve:
    """The scores while whole cells are removed, from the input to the baseline. The arguments are those of `deletion`.

    `order="random"` removes cells in a random order, the same for all inputs.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 1.0]]])
    >>> deletion_curve(x[:, 0], x, lambda inputs: inputs.sum(2), baseline="zero")
    Curve(fractions=tensor([0.0000, 0.5000, 1.0000]), scores=tensor([[4., 1., 0.]]))
    """
    return _curve(by_target(maps, x), maps, x, score, _How(order, steps, baseline, grid, seed))


def insertion_curve(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    order: Literal["morf", "lerf", "random"] = "morf",
    steps: int = 20,
    baseline: Baseline = "blur",
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Curve:
    """The scores while whole cells are inserted, from the baseline to the input. The arguments are those of `insertion`.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 1.0]]])
    >>> insertion_curve(x[:, 0], x, lambda inputs: inputs.sum(2), baseline="zero").scores
    tensor([[0., 3., 4.]])
    """
    return _curve(by_target(maps, x), maps, x, score, _How(order, steps, baseline, grid, seed, inserts=True))


def deletion(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    order: Order = "morf",
    minus_random: int = 0,
    steps: int = 20,
    baseline: Baseline = "mean",
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """Deletion: the area under the score while the cells of the map are removed, the most relevant first.

        int_0^1 s(x without the share f of its cells) df

    Lower is better for `"morf"`, the most relevant first; higher is better for `"lerf"`, the least relevant first, and for
    `"difference"`, which is the area of `"lerf"` less that of `"morf"`. Whole cells of the map's grid are removed: with
    single pixels, noise, edges and random orders score well.

    **Arguments**

    - `maps`: `(n, *grid)`, or `(n, t, *grid)`. Only the order of the cells matters. Ties are broken by a random order that all
      maps share: a flat map is a random order.
    - `x`: the inputs `(n, channels, *size)`. With several inputs or another order of axes, the `x` of the score function.
    - `score`: from inputs `(k * n, ...)` to scores `(k * n, t)`, as `score_function` gives.
    - `order`: `"morf"`, `"lerf"` or `"difference"`.
    - `minus_random`: subtract the mean area of this many random orders, which all inputs share: what the number of the removed
      cells does by itself. In the difference it cancels, and must be 0.
    - `steps`: the number of steps, at most one for each cell. The share of the cells grows evenly, up to whole cells.
    - `baseline`: what a removed pixel becomes. `"zero"`; `"mean"`, its channel's mean in this input; `"blur"`, a Gaussian blur
      with a standard deviation of a tenth of the longest side; `"linear"`, imputed from its neighbors with noise, as in
      `road`; or a tensor that fits x. The default is `"mean"` for deletion and `sensitivity_n`, `"blur"` for insertion, and
      `"zero"` for `infidelity`.
    - `grid`: another grid of cells: means of the map where it is coarser. Give it to compare maps on different grids.
    - `seed`: the seed of ties, of random orders, and of noise.

    **Returns** `(n,)`, or `(n, t)`. A score that is NaN makes the value of its map NaN.

    **Raises** `CamError` if the shapes do not fit, if a map is not finite, if x is not floating-point, or if an argument is
    unknown.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 1.0]]])
    >>> total = lambda inputs: inputs.sum(2)
    >>> deletion(x[:, 0], x, total, baseline="zero"), deletion(x[:, 0], x, total, order="difference", baseline="zero")
    (tensor([1.5000]), tensor([1.]))

    Petsiuk et al., RISE, BMVC 2018 (arXiv 1806.07421), removes pixels, with zeros as the baseline. Samek et al., Evaluating the
    Visualization of What a Deep Neural Network has Learned, 2015 (arXiv 1509.06321), has both orders and the random one.
    """
    return _area(maps, x, score, _How(order, steps, baseline, grid, seed), minus_random)


def insertion(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    order: Order = "morf",
    minus_random: int = 0,
    steps: int = 20,
    baseline: Baseline = "blur",
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """Insertion: the area under the score while the cells of the map are put back into the baseline, the most relevant first.

        int_0^1 s(the baseline with the share f of the cells of x) df

    Higher is better for `"morf"`, the most relevant first; lower is better for `"lerf"`; `"difference"` is the area of `"morf"`
    less that of `"lerf"`, and higher is better. With one baseline, insertion in one order is deletion in the other.

    The arguments, the returned values and the errors are those of `deletion`.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 1.0]]])
    >>> insertion(x[:, 0], x, lambda inputs: inputs.sum(2), baseline="zero")
    tensor([2.5000])

    Petsiuk et al., RISE, BMVC 2018 (arXiv 1806.07421), inserts pixels, into a blurred input.
    """
    return _area(maps, x, score, _How(order, steps, baseline, grid, seed, inserts=True), minus_random)


class _How(NamedTuple):
    """The options of a curve."""

    order: str
    steps: int
    baseline: Baseline
    grid: Sequence[int] | None
    seed: int
    inserts: bool = False


def _area(maps: Tensor, x: Tensor, score: Scores, how: _How, minus_random: int) -> Tensor:
    if how.order not in ("morf", "lerf", "difference"):
        raise CamError(f'order={how.order!r} must be "morf", "lerf" or "difference"')
    if not is_count(minus_random, 0):
        raise CamError(f"minus_random={minus_random!r} must be a number of random orders, 0 or more")
    given = by_target(maps, x)
    if how.order == "difference":
        if minus_random:
            raise CamError('order="difference" has no use for minus_random=: a random order cancels in it')
        most, least = (_curve(given, maps, x, score, how._replace(order=order)).area for order in ("morf", "lerf"))
        return most - least if how.inserts else least - most
    found = _curve(given, maps, x, score, how).area
    for number in range(minus_random):
        by_chance = _curve(given, maps, x, score, how._replace(order="random"), number).area
        found = found - by_chance / minus_random
    return found


def _curve(given: Tensor, maps: Tensor, x: Tensor, score: Scores, how: _How, number: int = 0) -> Curve:
    order, steps, baseline, grid, seed, inserts = how
    if order not in ("morf", "lerf", "random"):
        raise CamError(f'order={order!r} must be "morf", "lerf" or "random"')
    if not is_count(steps, 1):
        raise CamError(f"steps={steps!r} must be a positive int")
    generator = torch.Generator().manual_seed(seed)
    cells = on_cells(given, x.shape[2:], grid)
    grid, flat = tuple(cells.shape[2:]), cells.flatten(2)
    count = flat.shape[-1]
    ranks = _ranks(flat, generator)
    if order == "lerf":
        ranks = count - 1 - ranks
    if order == "random":
        ranks = [torch.randperm(count, generator=generator) for _ in range(number + 1)][-1].to(x.device).expand(len(x), 1, -1)
    counts = torch.tensor(sorted({round(count * i / steps) for i in range(steps + 1)}), device=x.device)
    fill = filler(x, baseline, seed)

    def made(numbers: Tensor) -> Tensor:
        chosen = ranks < counts[numbers][:, None, None, None]
        return fill(pixels_of(~chosen if inserts else chosen, grid, x.shape[2:]))

    scores = scored(score, len(counts), made, x, given.shape[1])
    return Curve(counts / count, like(scores, maps, x))


# ------------------------------------------------------------------------------------------- infidelity, sensitivity-n


def infidelity(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    perturbation: Literal["square", "noise"] = "square",
    share: float | None = None,
    baseline: Baseline = "zero",
    samples: int = 100,
    scaled: bool = True,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """Infidelity: how badly the map predicts the change of the score under random perturbations.

        E_I (b sum_p L_p sum_k I_pk - (s(x) - s(x - I)))^2

    Lower is better. It is 0 for a model that is linear with the map as its weights.

    **Arguments**

    - `maps`: `(n, *grid)`, or `(n, t, *grid)`, resized to x (multilinear). Their values matter, not only their order.
    - `x`, `score`: as for `deletion`.
    - `perturbation`: `"square"` replaces a square at a random place by the baseline; `"noise"` subtracts Gaussian noise from
      all pixels.
    - `share`: the side of the square as a share of the shortest side, 0.25 by default; or the standard deviation of the noise
      as a share of the range of the input, 0.1 by default.
    - `baseline`: of squares, as for `deletion`.
    - `samples`: the number of perturbations, which all inputs share.
    - `scaled`: whether b is the best factor for each map. It is by default, since maps have no units. If `False`, b is 1, as in
      Quantus.
    - `seed`: the seed of the perturbations.

    **Returns** `(n,)`, or `(n, t)`. For a map of zeros it is the mean square of the change.

    **Raises** `CamError` if the shapes do not fit, or if an argument is unknown.

    >>> import torch
    >>> x, weights = torch.randn(1, 1, 8), torch.arange(8.0)
    >>> found = infidelity(weights[None], x, lambda inputs: (inputs * weights).sum(2), scaled=False)
    >>> bool(found < 1e-8)
    True

    Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019 (arXiv 1901.09392).
    """
    if perturbation not in ("square", "noise"):
        raise CamError(f'perturbation={perturbation!r} must be "square" or "noise"')
    amount = (0.25 if perturbation == "square" else 0.1) if share is None else share
    _check_samples(samples, "samples")
    if not 0 < amount <= 1:
        raise CamError(f"share={share!r} must be in (0, 1]")
    given = by_target(maps, x)
    pixels = resize(given, x.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    if perturbation == "square":
        make = _squares(x, amount, baseline, samples, generator, seed)
    else:
        make = _noises(x, amount, samples, generator)
    told: list[Tensor] = []

    def made(numbers: Tensor) -> Tensor:
        inputs = make(numbers)
        told.append((pixels * (x[:, None] - inputs).sum(3)).flatten(3).sum(-1).permute(1, 2, 0))
        return inputs

    change = clean_of(score, x, given.shape[1])[..., None] - scored(score, samples, made, x, given.shape[1])
    predicted = torch.cat(told, 2).to(change)
    square = predicted.square().sum(-1, keepdim=True)
    best = (predicted * change).sum(-1, keepdim=True) / torch.where(square > 0, square, 1)
    return like(((best if scaled else 1) * predicted - change).square().mean(-1), maps, x)


def _squares(
    x: Tensor, share: float, baseline: Baseline, samples: int, generator: torch.Generator, seed: int
) -> Callable[[Tensor], Tensor]:
    size = x.shape[2:]
    side = max(1, round(min(size) * share))
    starts = [torch.randint(0, length - side + 1, (samples,), generator=generator).to(x.device) for length in size]
    fill = filler(x, baseline, seed)

    def made(numbers: Tensor) -> Tensor:
        removed = torch.ones((), dtype=torch.bool, device=x.device)
        for start, length in zip(starts, size):
            at = torch.arange(length, device=x.device) - start[numbers][:, None]
            removed = removed[..., None] & ((at >= 0) & (at < side)).reshape(len(numbers), *(1,) * (removed.ndim - 1), length)
        return fill(removed[:, None, None].expand(-1, len(x), 1, *size))

    return made


def _noises(x: Tensor, share: float, samples: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    drawn = torch.randn(samples, *x.shape[1:], generator=generator).to(x)
    width = share * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).reshape(-1, *(1,) * (x.ndim - 1))
    return lambda numbers: (x - width * drawn[numbers][:, None])[:, :, None]


def sensitivity_n(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    cells: int | None = None,
    subsets: int = 100,
    baseline: Baseline = "mean",
    grid: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """Sensitivity-n: the correlation, over random sets of n cells, of the map's sum with the drop of the score without them.

        corr_S(sum_(p in S) L_p, s(x) - s(x without S)),   |S| = n

    From -1 to 1; higher is better. It is 1 for a model that is a sum over cells with the map as its terms.

    **Arguments**

    - `maps`, `x`, `score`, `baseline`, `grid`: as for `deletion`. Here the values of the map matter, not only their order.
    - `cells`: n, the number of cells in a set. `None` is a quarter of them.
    - `subsets`: the number of sets, which all inputs share.
    - `seed`: the seed of the sets, and of noise.

    **Returns** `(n,)`, or `(n, t)`. It is 0 for a flat map, and where the score is the same for all sets. It is NaN where a
    score is not finite.

    **Raises** `CamError` if the shapes do not fit, or if an argument is unknown.

    >>> import torch
    >>> x = torch.tensor([[[4.0, 1.0, 2.0, 3.0]]])
    >>> sensitivity_n(x[:, 0], x, lambda inputs: inputs.sum(2), cells=2, baseline="zero")
    tensor([1.0000])

    Ancona et al., Towards better understanding of gradient-based attribution methods, ICLR 2018 (arXiv 1711.06104).
    """
    _check_samples(subsets, "subsets")
    given = by_target(maps, x)
    values = on_cells(given, x.shape[2:], grid)
    own, flat = tuple(values.shape[2:]), values.flatten(2)
    count = flat.shape[-1]
    chosen = max(1, count // 4) if cells is None else cells
    if not is_count(chosen, 1) or chosen > count:
        raise CamError(f"cells={cells!r} must be a number of cells, from 1 to {count}")
    generator = torch.Generator().manual_seed(seed)
    sets = torch.stack([torch.randperm(count, generator=generator).argsort() < chosen for _ in range(subsets)]).to(x.device)
    fill = filler(x, baseline, seed)

    def made(numbers: Tensor) -> Tensor:
        return fill(pixels_of(sets[numbers][:, None, None].expand(-1, len(x), 1, -1), own, x.shape[2:]))

    drop = clean_of(score, x, given.shape[1])[..., None] - scored(score, subsets, made, x, given.shape[1])
    return like(correlation(flat @ sets.T.to(flat), drop), maps, x)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation along the last axis, 0 where one of them is flat to rounding, NaN where one is not finite."""
    a, b = (part.to(torch.promote_types(a.dtype, b.dtype)) for part in (a, b))
    size = [part.abs().amax(-1, keepdim=True) for part in (a, b)]
    off = [part / torch.where(s > 0, s, 1) for part, s in zip((a, b), size)]
    off = [part - part.mean(-1, keepdim=True) for part in off]
    norms = [part.norm(dim=-1) for part in off]
    flat = 8 * torch.finfo(a.dtype).eps * a.shape[-1] ** 0.5
    varied = (norms[0] > flat) & (norms[1] > flat)
    product = torch.where(varied, norms[0] * norms[1], 1)
    finite = (a.isfinite() & b.isfinite()).all(-1)
    return torch.where(finite, torch.where(varied, (off[0] * off[1]).sum(-1) / product, 0), torch.nan)


def _check_samples(count: int, name: str) -> None:
    if not is_count(count, 1):
        raise CamError(f"{name}={count!r} must be a positive int")
