"""Metrics of class sensitivity: whether a map is that of its class. They come first: a map of no class can pass all others.

Three more questions are asked with the same means: `rank_correlation` of the maps of two classes, of a map and that of a
`permuted_classifier` or a `random_classifier` (`camfn.metrics.states`), and what happens if an object is removed
(`camfn.metrics.removal`).
"""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn.metrics.pixels import check_axes, known_where, on_pixels, rectified, rows


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

    **Returns** `(..., t, k)`, float32 or wider. A value is NaN if its map is nowhere positive or its mask is empty.

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

    **Returns** `(..., t)`, float32 or wider. A value is NaN if its map has no energy on any object, or an object's mask is
    empty.

    **Raises** `CamError` as `object_energy` does, or if there are not as many objects as targets, and two of each.

    >>> import torch
    >>> masks = torch.tensor([[[True, False, False]], [[False, True, False]]])
    >>> other_object_energy(torch.tensor([[[6.0, 2.0, 2.0]], [[0.0, 1.0, 0.0]]]), masks)
    tensor([0.2500, 0.0000])

    It is the second half of GridPG, on objects instead of cells: Rao et al., CVPR 2022 (arXiv 2205.10435), section 3.
    """
    energy = object_energy(maps, masks, spatial_ndim=spatial_ndim)
    if energy.shape[-1] != energy.shape[-2] or energy.shape[-1] < 2:
        raise CamError(f"there are {energy.shape[-2]} targets and {energy.shape[-1]} objects: as many of each, and two or more")
    total = energy.sum(-1)
    own = energy.diagonal(dim1=-2, dim2=-1)
    return known_where(total > 0, (total - own) / total)


# ------------------------------------------------------------------------------------------------------------- grids


def grid_of(inputs: Float[Tensor, "n cells c h w"]) -> Float[Tensor, "n c gh gw"]:
    """Tile g x g inputs to one, row by row: the input of the grid pointing game.

    **Arguments**

    - `inputs`: `(..., g*g, c, h, w)`, inputs of different classes that the model is sure of.

    **Returns** `(..., c, g*h, g*w)`. The model must take this size, as one with global pooling does.

    **Raises** `CamError` if the number of inputs is no square of 2 or more.

    >>> import torch
    >>> grid_of(torch.arange(4.0).reshape(4, 1, 1, 1))
    tensor([[[0., 1.],
             [2., 3.]]])

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    cells = inputs.shape[-4] if inputs.ndim >= 4 else 0
    side = math.isqrt(cells)
    if side < 2 or side * side != cells:
        raise CamError(f"inputs have shape {tuple(inputs.shape)}: they must be (..., g*g, c, h, w), with g of 2 or more")
    *lead, _, channels, height, width = inputs.shape
    cut = inputs.reshape(*lead, side, side, channels, height, width)
    return cut.movedim((-5, -4), (-4, -2)).reshape(*lead, channels, side * height, side * width)


def cell_energy(maps: Float[Tensor, "... h w"], *, cells: int = 2) -> Float[Tensor, "... cells"]:
    """The share of a map's energy in each cell of a grid of inputs.

    **Arguments**

    - `maps`: `(..., h, w)`, of an input of `grid_of`. Negative values count as 0. A map keeps its own size: a position that
      lies in two cells counts in each by its area.
    - `cells`: the number of cells along each side, g.

    **Returns** `(..., g*g)`, row by row, float32 or wider. It is NaN for a map that is nowhere positive.

    **Raises** `CamError` if there are not two cells or more along a side.

    >>> import torch
    >>> cell_energy(torch.tensor([[3.0, 0.0, 1.0]] * 3)).tolist()
    [0.375, 0.125, 0.375, 0.125]

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    if cells < 2:
        raise CamError(f"cells={cells!r} must be 2 or more along each side")
    energy = rectified(rows(maps, 2)).reshape(maps.shape)
    fine = energy.repeat_interleave(cells, -2).repeat_interleave(cells, -1)
    *lead, height, width = energy.shape
    parts = fine.reshape(*lead, cells, height, cells, width).sum((-3, -1)).flatten(-2)
    return parts / parts.sum(-1, keepdim=True)


def grid_pointing_game(maps: Float[Tensor, "..."], cell: Int[Tensor, "..."], *, cells: int = 2) -> Float[Tensor, "..."]:
    """The grid pointing game: the share of a map's energy in the cell of its class. Higher is better; chance is `1 / g^2`.

    The grid has inputs of different classes (`grid_of`), and the map is that of the class of one cell. A map that does not
    depend on the class scores chance, however well it lies on objects.

    **Arguments**

    - `maps`, `cells`: as in `cell_energy`. Give raw maps: min-max normalization adds an offset.
    - `cell`: the number of the right cell of each map, row by row, from 0: an integer tensor of the maps' leading axes.

    **Returns** the leading axes, float32 or wider. It is NaN for a map that is nowhere positive.

    **Raises** `CamError` if `cell` has another shape, or no cell has this number.

    >>> import torch
    >>> grid_pointing_game(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([0]))
    tensor([0.7500])

    Böhle et al., Convolutional Dynamic Alignment Networks, CVPR 2021 (arXiv 2104.00032), section 4.2.
    """
    energy = cell_energy(maps, cells=cells)
    if cell.shape != energy.shape[:-1]:
        raise CamError(f"cell has shape {tuple(cell.shape)}, and the maps need {tuple(energy.shape[:-1])}: a cell for each map")
    if not _compat.transformed() and bool(((cell < 0) | (cell >= cells**2)).any()):
        raise CamError(f"cell must number the {cells**2} cells from 0; found {int(cell.min())} to {int(cell.max())}")
    return energy.gather(-1, cell.to(energy.device).long()[..., None])[..., 0]
