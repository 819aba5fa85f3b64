"""Controls: maps that know neither class nor network. A method that does not beat the controls provides no evidence.

Each is a function `(x, grid, seed) -> maps (n, *grid)`, and `CONTROLS` has them by name. Two more controls are methods of
camfn: `CONTROL_METHODS`.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.noise import uniform
from camfn.metrics.scoring import sides

Control = Callable[[Tensor, Sequence[int], int], Tensor]

CONTROL_METHODS = ("mean_cam", "random_cam")
"""The methods of camfn that are controls: the mean of the channels, and a random mixture of them. Both know no class."""

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def centered_gaussian(x: Tensor, grid: Sequence[int], seed: int = 0, *, deviation: float = 0.25) -> Float[Tensor, "n ..."]:
    """A Gaussian in the middle of the picture: where photographers put objects. No metric of single objects should miss it.

    **Arguments**

    - `x`: the inputs, `(n, c, *size)`.
    - `grid`: the size of the maps.
    - `seed`: is not used.
    - `deviation`: the standard deviation, as a share of each side.

    **Returns** `(n, *grid)` in [0, 1], the same for all images.

    >>> import torch
    >>> centered_gaussian(torch.zeros(1, 3, 8, 8), (1, 3))
    tensor([[[0.4111, 1.0000, 0.4111]]])
    """
    grid = sides(grid)
    bell = torch.ones((), device=x.device, dtype=wide(x.dtype))
    for side in grid:
        place = (2 * torch.arange(side, device=x.device, dtype=bell.dtype) + 1 - side) / (2 * side)  # symmetric to the bit
        bell = bell[..., None] * torch.exp(-0.5 * (place / deviation).square())
    return bell.expand(len(x), *grid).clone()


def random_pixels(x: Tensor, grid: Sequence[int], seed: int = 0) -> Float[Tensor, "n ..."]:
    """Uniform random numbers at the positions: a random order. The map of an image depends on its number in the batch.

    **Arguments**

    - `x`, `grid`: as in `centered_gaussian`.
    - `seed`: the seed. Give each batch its own, or all first images share a map.

    **Returns** `(n, *grid)` in [0, 1).

    >>> import torch
    >>> three, two = (random_pixels(torch.zeros(n, 3, 8, 8), (4, 4)) for n in (3, 2))
    >>> torch.equal(three[:2], two)
    True
    """
    grid = sides(grid)
    drawn = uniform(seed, len(x) * math.prod(grid)).reshape(len(x), *grid)
    return drawn.to(x.device, wide(x.dtype))


def input_edges(x: Tensor, grid: Sequence[int], seed: int = 0) -> Float[Tensor, "n ..."]:
    """The edges of the input: the magnitude of its gradient by Sobel's filters, averaged over the cells of the grid.

        mean over cells of sqrt(sum over channels and axes of (S_a * x_k)^2)

    **Arguments**

    - `x`: the inputs, `(n, c, *size)`.
    - `grid`: the size of the maps, with as many axes as the input has.
    - `seed`: is not used.

    **Returns** `(n, *grid)`. Borders are continued by their last values.

    **Raises** `CamError` if the grid has other axes than the input.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 4)
    >>> x[..., 2:] = 1  # an edge in the middle
    >>> input_edges(x, (4, 4))[0, 0].tolist()
    [0.0, 4.0, 4.0, 0.0]
    """
    axes, grid = x.ndim - 2, sides(grid)
    if len(grid) != axes or axes not in _POOL:
        raise CamError(f"grid={tuple(grid)!r} has {len(grid)} axes, and the input {tuple(x.shape)} has {axes} spatial ones")
    values = x.to(wide(x.dtype))
    squares = [_sobel(values, axis, axes).square().sum(1) for axis in range(axes)]
    return _POOL[axes](torch.stack(squares).sum(0).sqrt()[:, None], tuple(grid))[:, 0]


def _sobel(values: Tensor, along: int, axes: int) -> Tensor:
    """Return the difference along one axis, smoothed along the others by (1, 2, 1)."""
    for axis in range(axes):
        at = axis + 2
        side = values.shape[at]
        place = torch.arange(side, device=values.device)
        low, high = values.index_select(at, (place - 1).clamp(min=0)), values.index_select(at, (place + 1).clamp(max=side - 1))
        values = high - low if axis == along else low + 2 * values + high
    return values


def all_ones(x: Tensor, grid: Sequence[int], seed: int = 0) -> Float[Tensor, "n ..."]:
    """A map of ones. It hides nothing and carries no information. Average drop must be 0 for it, so it must not be normalized.

    **Arguments** as in `centered_gaussian`.

    **Returns** `(n, *grid)`.

    >>> import torch
    >>> all_ones(torch.zeros(2, 3, 8, 8), (1, 2)).tolist()
    [[[1.0, 1.0]], [[1.0, 1.0]]]
    """
    return torch.ones(len(x), *sides(grid), device=x.device, dtype=wide(x.dtype))


CONTROLS: dict[str, Control] = {
    "centered_gaussian": centered_gaussian,
    "random_pixels": random_pixels,
    "input_edges": input_edges,
    "all_ones": all_ones,
}
"""The controls by name, with one signature: `(x, grid, seed)`."""
