"""Metrics of class sensitivity: whether a map is that of its class. They come first: a map of no class can pass all others.

Related checks: `rank_correlation` of the maps of two classes; `rank_correlation` of a map and that of a `permuted_classifier`
or a `random_classifier` (`camfn.metrics.states`); and the removal of an object (`camfn.metrics.removal`).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError
from camfn.metrics.pixels import check_axes, known_where, on_pixels, rectified


def object_energy(
    maps: Float[Tensor, "n t *grid"], masks: Bool[Tensor, "n k *size"], *, spatial_ndim: int = 2
) -> Float[Tensor, "n t k"]:
    """The share of each map's energy that lies on each object: `energy_pointing_game` of every pair.

        sum_(p in mask_j) L_p / sum_p L_p

    **Arguments**

    - `maps`: `(..., t, *grid)`, of t targets, resized to the masks' size (multilinear). Negative values count as 0. Give raw
      maps: min-max normalization adds an offset.
    - `masks`: bools `(..., k, *size)`, of k objects.
    - `spatial_ndim`: the number of spatial axes, which come last.

    **Returns** `(..., t, k)`, float32 or wider. A value is NaN if its map is nowhere positive or not finite, or its mask
    is empty.

    **Raises** `CamError` if the masks are not bools, or the leading axes differ.

    >>> import torch
    >>> masks = torch.tensor([[[True, False, False]], [[False, True, False]]])
    >>> object_energy(torch.tensor([[[6.0, 2.0, 2.0]], [[0.0, 1.0, 0.0]]]), masks)
    tensor([[0.6000, 0.2000],
            [0.0000, 1.0000]])

    Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279), section 4.3.
    """
    check_axes(spatial_ndim)
    if min(maps.ndim, masks.ndim) <= spatial_ndim:
        raise CamError(
            f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: the axis before the last {spatial_ndim} must "
            "be that of the targets, and of the objects"
        )
    targets, objects = maps.shape[-spatial_ndim - 1], masks.shape[-spatial_ndim - 1]
    axis = -spatial_ndim - 1
    pairs = maps.unsqueeze(axis).expand(*maps.shape[:axis], targets, objects, *maps.shape[-spatial_ndim:])
    of = masks.unsqueeze(axis - 1).expand(*masks.shape[:axis], targets, objects, *masks.shape[-spatial_ndim:])
    energy, inside = on_pixels(pairs, of, spatial_ndim)
    energy = rectified(energy)
    return known_where(inside.any(-1), (energy * inside).sum(-1) / energy.sum(-1))


def other_object_energy(
    maps: Float[Tensor, "n t *grid"], masks: Bool[Tensor, "n t *size"], *, spatial_ndim: int = 2
) -> Float[Tensor, "n t"]:
    """The energy on the objects of other classes, as a share of that on all objects. Lower is better.

        sum_(j != i) E_ij / sum_j E_ij,   E = object_energy

    A map that does not depend on the class has `1 - 1/t` on the average over its t targets.

    **Arguments**

    - `maps`, `spatial_ndim`: as in `object_energy`, of two targets or more.
    - `masks`: bools `(..., t, *size)`: object i is of target i.

    **Returns** `(..., t)`, float32 or wider. A value is NaN if its map has no energy on any object or is not finite, or an
    object's mask is empty.

    **Raises** `CamError` as `object_energy` does, or if there are not as many objects as targets, and two of each.

    >>> import torch
    >>> masks = torch.tensor([[[True, False, False]], [[False, True, False]]])
    >>> other_object_energy(torch.tensor([[[6.0, 2.0, 2.0]], [[0.0, 1.0, 0.0]]]), masks)
    tensor([0.2500, 0.0000])

    It is the second half of GridPG, on objects instead of cells: Rao et al., CVPR 2022 (arXiv 2205.10435), section 3.
    """
    energy = object_energy(maps, masks, spatial_ndim=spatial_ndim)
    if energy.shape[-1] != energy.shape[-2] or energy.shape[-1] < 2:
        raise CamError(
            f"there are {energy.shape[-2]} targets and {energy.shape[-1]} objects: pass as many of each, at least two"
        )
    total = energy.sum(-1)
    own = energy.diagonal(dim1=-2, dim2=-1)
    return known_where(total > 0, (total - own) / total)
