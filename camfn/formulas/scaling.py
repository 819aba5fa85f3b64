"""Scaling by powers of two, so that powers and products of values do not overflow or underflow.

Division by a power of two is exact. Results that were finite without the scaling are therefore unchanged.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def size_of(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """The largest power of two that is at most `max |values|` over `dim`.

    The reduced dimensions are kept. The result is 1 if the maximum is 0 or not finite. It has no gradient.

    >>> import torch
    >>> size_of(torch.tensor([[3.0, -5.0], [0.0, 0.0]]), -1).tolist()
    [[4.0], [1.0]]
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    largest = torch.linalg.vector_norm(values.detach(), math.inf, dims, keepdim=True)
    usable = (largest > 0) & (largest < math.inf)
    return torch.exp2(torch.log2(torch.where(usable, largest, 1)).floor())


def unit(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Divide values by their `size_of`, so that the largest magnitude is between 1 and 2."""
    return values / size_of(values, dim)
