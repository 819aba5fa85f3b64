"""Metrics of robustness: how much a map changes with a small change of the input."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn.formulas.noise import uniform
from camfn.metrics.pixels import rows
from camfn.metrics.scoring import check_inputs, is_count


def maximum_sensitivity(
    explain: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float = 0.02,
    draws: int = 10,
    seed: int = 0,
    spatial_ndim: int = 2,
) -> Float[Tensor, "..."]:
    """The maximum sensitivity: the largest relative change of a map under small noise on the input. Lower is more robust.

        max_d |L(x + d) - L(x)| / |L(x)|,   d uniform in [-r, r]

    A map that ignores the input has the best value, 0.

    **Arguments**

    - `explain`: a function from inputs `(n, ...)` to maps `(n, *grid)` or `(n, t, *grid)`. Fix the target in it: a class that
      changes with the noise would change the map.
    - `x`: the inputs, `(n, c, *size)`.
    - `radius`: the largest change of an entry, as a share of the image's range: `r = radius * (max x - min x)`. The paper's
      radius is absolute.
    - `draws`: the number of noise images. They are the same for all images of the batch.
    - `seed`: the seed of the noise.
    - `spatial_ndim`: the number of spatial axes of a map, which come last.

    **Returns** `(n,)` or `(n, t)`, float32 or wider: one value for each map. A map of zeros that stays zero has 0, and one
    that changes has infinity. The value is NaN if one of the maps is not finite.

    **Raises** `CamError` if the radius is not positive, there are no draws, or the inputs are not floating-point.

    >>> import torch
    >>> maximum_sensitivity(lambda x: x.sum(1), torch.rand(2, 3, 4, 4)).shape
    torch.Size([2])

    Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019 (arXiv 1901.09392), definition 2.2.
    """
    check_inputs(x)
    if not radius > 0 or not is_count(draws, 1):
        raise CamError(f"radius={radius!r} must be positive, and draws={draws!r} an int of at least 1")
    clean = rows(explain(x), spatial_ndim)
    spread = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).reshape(-1, *(1,) * (x.ndim - 1))
    size, worst = clean.norm(dim=-1), torch.zeros(clean.shape[:-1], dtype=clean.dtype, device=clean.device)
    shape = (draws, *x.shape[1:])
    noise = (2 * uniform(seed, math.prod(shape)) - 1).reshape(shape)
    for unit in noise:
        change = (rows(explain(x + radius * spread * unit.to(x)), spatial_ndim) - clean).norm(dim=-1)
        ratio = change / torch.where(size == 0, 1, size)
        worst = torch.maximum(worst, torch.where((size == 0) & (change > 0), torch.inf, ratio))
    return worst
