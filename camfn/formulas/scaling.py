"""Powers of two near the largest value: a formula of them has no power, and no product, outside the range of the dtype.

Dividing by a power of two is exact, so that a formula gives what it gave, wherever that could be computed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def size_of(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """The power of two at or below the largest size over `dim`, which stays; 1 where that is 0 or not finite. A constant.

    >>> import torch
    >>> size_of(torch.tensor([[3.0, -5.0], [0.0, 0.0]]), -1).tolist()
    [[4.0], [1.0]]
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    largest = torch.linalg.vector_norm(values.detach(), math.inf, dims, keepdim=True)
    usable = (largest > 0) & (largest < math.inf)
    return torch.exp2(torch.log2(torch.where(usable, largest, 1)).floor())


def unit(values: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Values divided by their size: a positive multiple, whose largest value is near 1."""
    return values / size_of(values, dim)
