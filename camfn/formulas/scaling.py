"""Scaling by powers of two, so that powers and products of values do not overflow or underflow.

Division by a power of two is exact. Results that were finite without the scaling are therefore unchanged.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """The largest power of two that is at most `max |values|` over `dim`.

    The reduced dimensions are kept. The result is 1 if the maximum is 0 or not finite. It has no gradient.

    >>> import torch
    >>> magnitude(torch.tensor([[3.0, -5.0], [0.0, 0.0]]), -1).tolist()
    [[4.0], [1.0]]
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    largest = torch.linalg.vector_norm(values.detach(), math.inf, dims, keepdim=True)
    usable = (largest > 0) & (largest < math.inf)
    return torch.exp2(torch.log2(torch.where(usable, largest, 1)).floor())


def rescale(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Divide values by their `magnitude`, so that the largest one is between 1 and 2 in size."""
    return values / magnitude(values, dim)


def is_flat(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether values between `low` and `high`, computed in `dtype`, are equal up to rounding.

    The bound is relative to the size of the values and to the dtype; an absolute one is 0 in float16, or calls a small
    map flat.
    """
    return high - low <= 4 * torch.finfo(dtype).eps * torch.maximum(high.abs(), low.abs())


def normalize(maps: Tensor, dim: int | Sequence[int] = -1) -> Tensor:
    """`(L - min L) / (max L - min L)` over `dim`: in [0, 1]. A map that is flat up to rounding becomes zeros.

    The division is exact (no epsilon in the denominator), so that a map of small values is not made smaller.

    >>> import torch
    >>> normalize(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).tolist()
    [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    flat = is_flat(low, high, maps.dtype)
    # The inner `where` matters: without it the branch that is not taken still makes NaN gradients.
    return torch.where(flat, 0, (maps - low) / torch.where(flat, 1, high - low))


def percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile over the last axis, which stays: `torch.quantile`, which has no limit of size here, and no loop in `vmap`.

    >>> import torch
    >>> percentile(torch.tensor([4.0, 1.0, 2.0]), 75)
    tensor([3.])
    """
    ordered = values.sort(-1).values
    place = percent / 100 * (values.shape[-1] - 1)
    low, high = (ordered[..., at(place) : at(place) + 1] for at in (math.floor, math.ceil))
    return low + (place - math.floor(place)) * (high - low)


def share(maps: Tensor, axes: int) -> Tensor:
    """`L / max L` over the last `axes`; zeros where nothing is positive."""
    high = maps.amax(tuple(range(-axes, 0)), keepdim=True)
    return torch.where(high > 0, maps / torch.where(high > 0, high, 1), 0)
