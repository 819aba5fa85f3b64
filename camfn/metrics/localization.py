"""Metrics of localization: how well a map lies on the object. Functions of tensors."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.resampling import resize

_POOL = {1: torch.nn.functional.max_pool1d, 2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}


def energy_pointing_game(
    maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, spatial_ndim: int = 2
) -> Float[Tensor, "..."]:
    """The energy-based pointing game: the share of a map's energy that lies inside the object, from 0 to 1.

        sum_(p in mask) L_p / sum_p L_p

    **Arguments**

    - `maps`: `(..., *grid)`, resized to the masks' size (multilinear). Negative values count as 0. The scale of a map does
      not matter, but an offset does: compare maps with the same normalization.
    - `masks`: bools `(..., *size)` with the same leading axes, true inside the object (the paper uses its bounding box).
    - `spatial_ndim`: the number of spatial axes, which come last.

    **Returns** `(...)`, float32 or wider. The value is NaN if a map is nowhere positive. For a constant map it is the
    object's share of the picture, which is the baseline.

    **Raises** `CamError` if the masks are not bools or the leading axes differ.

    >>> import torch
    >>> left = torch.tensor([[True, True, False, False]] * 4)
    >>> energy_pointing_game(torch.tensor([[3.0, 1.0]]), left)
    tensor(0.6875)

    Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279), section 4.3.
    """
    energy, inside = _on_pixels(maps, masks, spatial_ndim)
    energy = energy.clamp(min=0)
    return (energy * inside).sum(-1) / energy.sum(-1)


def pointing_game(
    maps: Float[Tensor, "..."], masks: Bool[Tensor, "..."], *, tolerance: int = 0, spatial_ndim: int = 2
) -> Float[Tensor, "..."]:
    """The pointing game: 1 if the map's maximum is on the object, else 0. The mean over images is the accuracy.

    **Arguments**

    - `maps`, `masks`, `spatial_ndim`: as in `energy_pointing_game`.
    - `tolerance`: the number of pixels beyond the object, along each axis, that still count as a hit (the paper uses a circle
      of 15).

    **Returns** `(...)`, float32 or wider. If several pixels share the maximum, the value is the share of them that are hits.
    A flat map therefore scores like a random pixel.

    **Raises** `CamError` as `energy_pointing_game` does, or if the tolerance is negative.

    >>> import torch
    >>> left = torch.tensor([[True, True, False, False]] * 4)
    >>> pointing_game(torch.tensor([[3.0, 1.0]]), left), pointing_game(torch.zeros(1, 2), left)
    (tensor(1.), tensor(0.5000))

    Zhang et al., Top-down Neural Attention by Excitation Backprop, 2016 (arXiv 1608.00507), section 4.1.
    """
    if not isinstance(tolerance, int) or tolerance < 0:
        raise CamError(f"tolerance={tolerance!r} must be an integer number of pixels, 0 or more")
    values, inside = _on_pixels(maps, masks, spatial_ndim, tolerance)
    highest = (values == values.amax(-1, keepdim=True)).to(values.dtype)
    return (highest * inside).sum(-1) / highest.sum(-1)


def _on_pixels(maps: Tensor, masks: Tensor, axes: int, dilation: int = 0) -> tuple[Tensor, Tensor]:
    """Return the maps and the dilated masks at the masks' size, `(..., pixels)`."""
    if axes not in _POOL:
        raise CamError(f"spatial_ndim={axes!r} must be 1, 2 or 3")
    if masks.dtype != torch.bool:
        raise CamError(f"masks are {masks.dtype}: they must be bools (masks > 0.5)")
    if maps.shape[:-axes] != masks.shape[:-axes] or min(maps.ndim, masks.ndim) < axes:
        raise CamError(
            f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: all axes but the last {axes} must be the same"
        )
    resized = resize(maps.to(wide(maps.dtype)), masks.shape[-axes:])
    return resized.flatten(-axes), _dilate(masks, dilation, axes).flatten(-axes)


def _dilate(masks: Tensor, by: int, axes: int) -> Tensor:
    if by == 0:
        return masks
    flat = masks.reshape(-1, 1, *masks.shape[-axes:]).float()
    return (_POOL[axes](flat, 2 * by + 1, 1, by) > 0).reshape(masks.shape)
