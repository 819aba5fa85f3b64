"""Metrics of complexity: on how few positions a map lies. Functions of tensors.

They do not tell whether a map is right: a single random pixel is the least complex map of all.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from camfn.metrics.pixels import known_of, rectified, rows


def entropy(maps: Float[Tensor, "..."], *, spatial_ndim: int = 2) -> Float[Tensor, "..."]:
    """The entropy of a map's energy, in nats: 0 for one position, `log p` for p equal ones. Lower is simpler.

        -sum_p q_p log q_p,   q = ReLU(L) / sum ReLU(L)

    It grows with the number of positions: compare maps of one size.

    **Arguments**

    - `maps`: `(..., *grid)`. Negative values count as 0. The scale of a map does not matter, but an offset does.
    - `spatial_ndim`: the number of spatial axes, which come last.

    **Returns** `(...)`, float32 or wider. A map that is nowhere positive counts as constant: `log p`. A map that is
    not finite has NaN.

    **Raises** `CamError` if the maps are not floating-point, or have fewer axes.

    >>> import torch
    >>> entropy(torch.tensor([[[0.0, 5.0]], [[1.0, 1.0]]]))
    tensor([0.0000, 0.6931])

    Bhatt et al., Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020 (arXiv 2005.00631), section 3.
    """
    energy = rectified(rows(maps, spatial_ndim))
    total = energy.sum(-1, keepdim=True)
    found = torch.special.entr(energy / torch.where(total > 0, total, 1)).sum(-1)
    return known_of(torch.where(total[..., 0] > 0, found, math.log(energy.shape[-1])), energy)


def gini(maps: Float[Tensor, "..."], *, spatial_ndim: int = 2) -> Float[Tensor, "..."]:
    """The Gini index of a map's energy: 0 if all positions are equal, `1 - 1/p` if one of p has it all. Higher is sparser.

        sum_i (2 i - p - 1) v_i / (p sum_i v_i),   v = ReLU(L) in ascending order, i = 1 ... p

    **Arguments**

    - `maps`, `spatial_ndim`: as in `entropy`.

    **Returns** `(...)`, float32 or wider. A map that is nowhere positive counts as constant: 0. A map that is not
    finite has NaN.

    **Raises** `CamError` as `entropy` does.

    >>> import torch
    >>> gini(torch.tensor([[[0.0, 5.0]], [[1.0, 1.0]]]))
    tensor([0.5000, 0.0000])

    Chalasani et al., Concise Explanations of Neural Networks using Adversarial Training, ICML 2020 (arXiv 1810.06583),
    section 4.
    """
    ordered = rectified(rows(maps, spatial_ndim)).sort(-1).values
    count = ordered.shape[-1]
    places = torch.arange(1 - count, count, 2, device=ordered.device, dtype=ordered.dtype)
    total = ordered.sum(-1)
    return known_of(torch.where(total > 0, (places * ordered).sum(-1) / (count * torch.where(total > 0, total, 1)), 0), ordered)
