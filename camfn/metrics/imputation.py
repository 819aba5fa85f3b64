"""Imputation of removed pixels, and ROAD, which scores what is left.

Noisy linear imputation makes each removed pixel the weighted mean of its eight neighbors, removed or not: a sparse linear
system for each picture. Here all of them are solved at once, without a matrix, by conjugate gradients.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.resampling import resize_with_ties
from camfn.metrics.scoring import Scores, by_target, check_inputs, clean_of, like, numbers, scored

_TOLERANCE = 3e-6  # the largest error in the energy norm, as a share of the largest value
_MOST = 1000  # iterations, of which some 30 are needed
_EACH = 2  # iterations between two tests of the error, which wait for a GPU
_AT_ONCE = {"cpu": 1 << 18}  # pixels of the systems that are solved together: on a CPU, as many as its cache holds
_AT_ONCE_ELSEWHERE = 1 << 26


def linear_imputation(
    x: Float[Tensor, "n c *size"], removed: Bool[Tensor, "n ..."], *, noise: float = 0.0, seed: int = 0
) -> Float[Tensor, "n c *size"]:
    """Noisy linear imputation: each removed pixel is the weighted mean of its neighbors, plus noise.

        x_p = sum_q w_pq x_q / sum_q w_pq

    The eight neighbors q lie in the picture, and may be removed themselves. The weights are 1/6 along an axis and 1/12
    diagonally. The solution is exact to 1e-5 of the range of x. If every pixel is removed, all are the mean of their channel.

    **Arguments**

    - `x`: pictures with one or two spatial axes.
    - `removed`: bools, true where a pixel is removed from all channels.
    - `noise`: the standard deviation of the noise on removed pixels, in units of x. ROAD uses 0.01.
    - `seed`: the seed of the noise. All pictures share it.

    **Returns** the imputed pictures, in the dtype of x, without a graph. What the removed pixels were, NaN included, does not
    matter unless all of them are removed.

    **Raises** `CamError` if the shapes do not fit, or x is not floating-point.

    >>> import torch
    >>> x = torch.tensor([[[0.0, 9.0, 9.0, 9.0, 4.0]]])
    >>> linear_imputation(x, x[:, 0] == 9)
    tensor([[[0., 1., 2., 3., 4.]]])

    Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022 (arXiv 2202.00449).
    """
    check_inputs(x)
    x, axes = x.detach(), x.ndim - 2
    if axes not in (1, 2):
        raise CamError(
            f"x has shape {tuple(x.shape)}: linear imputation needs (n, channels, *size) with one or two spatial axes"
        )
    if removed.dtype != torch.bool or removed.shape != (len(x), *x.shape[2:]):
        raise CamError(
            f"removed is {removed.dtype} of shape {tuple(removed.shape)}: it must be bools of shape "
            f"{(len(x), *x.shape[2:])}, one for each pixel of x"
        )
    if not len(x):
        return x
    pictures, gone = (x[:, :, None], removed[:, None]) if axes == 1 else (x, removed)
    most = _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE)
    parts = max(1, most // pictures[0].numel())
    solved = torch.cat([_solved(*pair) for pair in zip(pictures.split(parts), gone.split(parts))])
    found = (solved[:, :, 0] if axes == 1 else solved).to(x.dtype)
    if noise:
        drawn = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=wide(x.dtype))
        found = found + noise * drawn.to(found)
    return torch.where(removed[:, None], found, x)


def _solved(x: Tensor, removed: Tensor) -> Tensor:
    """Fill the removed pixels. Where all of them are, the mean of the channel stands for what is known."""
    own = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    lost = removed.flatten(1).all(1)[:, None, None]
    known = ~(removed & ~lost)[:, None]
    center = torch.where(known, own, 0).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    # As differences from a mean, which are small, since conjugate gradients begin at 0.
    found = _harmonic(torch.where(known, own - center, 0), ~known) + center
    return torch.where(lost[:, None], own.mean((2, 3), keepdim=True), found)


def _harmonic(given: Tensor, unknown: Tensor) -> Tensor:
    """Solve `A v = b` for the unknown values: `(A v)_p = sum_q w_pq (v_p - v_q)`, and b has the given neighbors.

    All is in units of 1/12, in which the weights are 1 and 2. The pictures get a border of zeros, so that no kernel ends.
    """
    height, width = given.shape[2:]
    border = (1, 1 + -(width + 2) % _FACTOR, 1, 1 + -(height + 2) % _FACTOR)
    given, inside = F.pad(given, border), F.pad(torch.ones_like(given[:, :1]), border)
    levels = _levels(F.pad(unknown.to(given), border), inside)
    b = _added(torch.zeros_like(given), levels[0].unknown, _spread(given), 1.0)
    values = _descended(levels, b, _TOLERANCE * given.abs().amax((2, 3), keepdim=True))
    return (given + values)[..., 1 : height + 1, 1 : width + 1]


class _Level(NamedTuple):
    """A grid of the preconditioner, with a border of zeros."""

    unknown: Tensor  # (n, 1, h, w): 1 where a value is to be found, else 0
    diagonal: Tensor  # (n, 1, h, w): the sum of the weights of a place's neighbors where it is unknown, else 0
    inverse: Tensor  # (n, 1, h, w): 1 / diagonal, or 0


def _descended(levels: Sequence[_Level], b: Tensor, allowed: Tensor) -> Tensor:
    """Conjugate gradients. `r . z` is near the square of the error's energy, and that is about the largest error of a value.

    Each system stops by itself, so that it does not depend on its neighbors.
    """
    unknown, diagonal, _ = levels[0]
    own = diagonal + 4 * unknown  # `_spread` adds 4 times the place itself
    enough = 12 * allowed.square()
    v, r = torch.zeros_like(b), b
    z = _preconditioned(levels, r)
    p, rz = z, _dot(r, z)
    for i in range(_MOST):
        if i % _EACH == 0 and not bool((rz > enough).any()):
            return v
        image = _added(own * p, unknown, _spread(p), -1.0)
        step = torch.where(rz > enough, _ratio(rz, _dot(p, image)), 0)
        v.addcmul_(step, p)
        r.addcmul_(step, image, value=-1)
        z = _preconditioned(levels, r)
        last, rz = rz, _dot(r, z)
        p = z.addcmul_(_ratio(rz, last), p)
    raise CamError(f"linear imputation did not converge in {_MOST} steps: x may have values near the end of its dtype's range")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, or 0 where nothing is left to solve."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _spread(v: Tensor) -> Tensor:
    """Each place's neighbors and 4 times itself, `(n, c, h - 2, w - 2)`: the kernel (1, 2, 1) along both axes.

    It is (1, 1) twice, and so four sums.
    """
    for axis in (2, 3):
        for _ in range(2):
            side = v.shape[axis] - 1
            v = v.narrow(axis, 0, side) + v.narrow(axis, 1, side)
    return v


def _added(to: Tensor, where: Tensor, spread: Tensor, times: float) -> Tensor:
    """Add the result of `_spread` to a tensor, at some places."""
    to[..., 1:-1, 1:-1].addcmul_(where[..., 1:-1, 1:-1], spread, value=times)
    return to


# --------------------------------------------------------------------------------------------------- preconditioning

_LEVELS = 6
_FACTOR = 1 << (_LEVELS - 1)


def _levels(unknown: Tensor, inside: Tensor) -> list[_Level]:
    """Grids of half the resolution each. A coarse place is unknown if all fine ones in the picture are."""
    found: list[_Level] = []
    while len(found) < _LEVELS and (not found or bool(unknown.any())):
        if found:
            unknown, inside = 1 - F.max_pool2d(inside - unknown, 2), F.max_pool2d(inside, 2)
            unknown = unknown * inside
        neighbors = (_spread(F.pad(inside, (1, 1, 1, 1))) - 4 * inside) * unknown
        found.append(_Level(unknown, neighbors, torch.where(unknown > 0, 1 / torch.where(unknown > 0, neighbors, 1), 0)))
    return found


def _preconditioned(levels: Sequence[_Level], r: Tensor) -> Tensor:
    """The sum over all grids of residuals, each divided by the diagonal (Bramble, Pasciak and Xu 1990), at unknown places.

    In two dimensions the operator is the same on every grid. Restriction is the transpose of interpolation, and both are masked
    on every grid, so that the sum is symmetric.
    """
    level, coarser = levels[0], levels[1:]
    found = r * level.inverse
    if coarser:
        found.addcmul_(level.unknown, _interpolated(_preconditioned(coarser, _restricted(r) * coarser[0].unknown)))
    return found


def _restricted(fine: Tensor) -> Tensor:
    for axis in (2, 3):
        even, odd = fine.unflatten(axis, (-1, 2)).unbind(axis + 1)
        side = even.shape[axis]
        fine = 0.75 * (even + odd)
        fine.narrow(axis, 1, side - 1).add_(odd.narrow(axis, 0, side - 1), alpha=0.25)
        fine.narrow(axis, 0, side - 1).add_(even.narrow(axis, 1, side - 1), alpha=0.25)
    return fine


def _interpolated(coarse: Tensor) -> Tensor:
    for axis in (3, 2):  # rows last, which are copied whole
        even, odd, side = 0.75 * coarse, 0.75 * coarse, coarse.shape[axis]
        even.narrow(axis, 1, side - 1).add_(coarse.narrow(axis, 0, side - 1), alpha=0.25)
        odd.narrow(axis, 0, side - 1).add_(coarse.narrow(axis, 1, side - 1), alpha=0.25)
        coarse = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
    return coarse


# ---------------------------------------------------------------------------------------------------------------- ROAD

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def road(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    *,
    order: Literal["combined", "morf", "lerf"] = "combined",
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """ROAD: remove and debias. The scores of pictures whose removed pixels are imputed from their neighbors.

        mean_q (s(x without the q % least relevant) - s(x without the q % most relevant)) / 2

    Higher is better. Removal of the most relevant pixels should lower the score, that of the least relevant should not. Imputed
    pixels show less of the shape of what was removed than constant ones do.

    **Arguments**

    - `maps`: `(n, *grid)`, or `(n, t, *grid)`, resized to x (multilinear). Only the order of the pixels matters. Equal pixels
      are removed together: a flat map loses all of them in both orders, and has 0.
    - `x`: the inputs `(n, channels, *size)`, with one or two spatial axes.
    - `score`: from inputs `(k * n, ...)` to scores `(k * n, t)`, as `score_function` gives. The source takes probabilities.
    - `order`: `"combined"` as above. `"morf"` is the mean change of the score when the most relevant pixels are removed first
      (lower is better), `"lerf"` the same for the least relevant (higher is better).
    - `percentiles`: the pixels at or above the p-th percentile of the map are removed, some 100 - p %.
    - `noise`: the standard deviation of the noise on imputed pixels.
    - `seed`: the seed of the noise. All inputs share it.

    **Returns** `(n,)`, or `(n, t)`.

    **Raises** `CamError` if the shapes do not fit, or if an argument is unknown.

    >>> import torch
    >>> x = torch.tensor([[[0.0, 1.0, 9.0, 1.0, 2.0, 3.0]]])
    >>> road(x[:, 0], x, lambda inputs: inputs[:, :, 2], noise=0.0, percentiles=[80])  # (9 - 1) / 2
    tensor([4.])

    Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022 (arXiv 2202.00449).
    The mean of both orders is that of `ROADCombined` in pytorch-grad-cam.
    """
    if order not in ("combined", "morf", "lerf"):
        raise CamError(f'order={order!r} must be "combined", "morf" or "lerf"')
    percentiles = numbers("percentiles", percentiles, "numbers from 0 to 100")
    if not all(0 <= p <= 100 for p in percentiles):
        raise CamError(f"percentiles={percentiles!r} must be numbers from 0 to 100")
    given = by_target(maps, x)
    values = resize_with_ties(given, x.shape[2:]).flatten(2)

    def mean_score(sign: int) -> Tensor:
        ranked = sign * values
        thresholds = _percentiles(ranked, percentiles)

        def made(numbers: Tensor) -> Tensor:
            removed = (ranked >= thresholds[numbers][..., None]).unflatten(-1, x.shape[2:])
            pictures = x[:, None].expand(*removed.shape[:3], *x.shape[1:])
            filled = linear_imputation(pictures.flatten(0, 2), removed.flatten(0, 2), noise=noise, seed=seed)
            return filled.reshape(pictures.shape)

        return scored(score, len(percentiles), made, x, given.shape[1]).mean(-1)

    if order == "combined":
        return like((mean_score(-1) - mean_score(1)) / 2, maps, x)
    return like(mean_score(1 if order == "morf" else -1) - clean_of(score, x, given.shape[1]), maps, x)


def _percentiles(values: Float[Tensor, "n t p"], percentiles: Sequence[float]) -> Float[Tensor, "k n t"]:
    """NumPy's percentiles along the last axis. `torch.quantile` takes no more than 16 million values."""
    ordered = values.sort(-1).values.movedim(-1, 0)
    at = [percentile / 100 * (len(ordered) - 1) for percentile in percentiles]
    low, high = ([rounded(place) for place in at] for rounded in (math.floor, math.ceil))
    share = torch.tensor([place - below for place, below in zip(at, low)], dtype=values.dtype, device=values.device)
    return torch.lerp(ordered[low], ordered[high], share.reshape(-1, 1, 1))
