"""How good a map is, in numbers: does it lie on the object? Tensors in, tensors out; no model, no method."""

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
    """The share of a map's energy that lies inside the object: `sum_(p in mask) L_p / sum_p L_p`, from 0 to 1.

    **Arguments**

    - `maps`: `(..., *grid)`, resized to the masks' size (multilinear). Negative values count as 0. The scale does not matter,
      an offset does: compare maps that were normalised alike.
    - `masks`: `(..., *size)` of bools, with the same leading axes: where the object is (the paper: its bounding box).
    - `spatial_ndim`: how many axes, the last ones, are spatial.

    **Returns** `(...)`, float32 or wider. A map with nothing positive has no energy to share out: NaN. A map that is the same
    everywhere gets the object's share of the picture, which is what a map has to beat.

    **Raises** `CamError` where the masks are not bools or the leading axes differ.

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
    """Is the map's maximum on the object? 1 for a hit and 0 for a miss; the mean over images is the accuracy.

    **Arguments**

    - `maps`, `masks`, `spatial_ndim`: as for `energy_pointing_game`.
    - `tolerance`: so many pixels beyond the object, along each axis, are a hit too (the paper: 15, in a circle).

    **Returns** `(...)`, float32 or wider. Where several pixels share the maximum, the share of them that are hits: a flat map
    hits as often as a random pixel does.

    **Raises** `CamError` as `energy_pointing_game` does, and for a negative tolerance.

    >>> import torch
    >>> left = torch.tensor([[True, True, False, False]] * 4)
    >>> pointing_game(torch.tensor([[3.0, 1.0]]), left), pointing_game(torch.zeros(1, 2), left)
    (tensor(1.), tensor(0.5000))

    Zhang et al., Top-down Neural Attention by Excitation Backprop, 2016 (arXiv 1608.00507), section 4.1.
    """
    if not isinstance(tolerance, int) or tolerance < 0:
        raise CamError(f"tolerance={tolerance!r} must be a whole number of pixels, 0 or more")
    values, inside = _on_pixels(maps, masks, spatial_ndim, tolerance)
    highest = (values == values.amax(-1, keepdim=True)).to(values.dtype)
    return (highest * inside).sum(-1) / highest.sum(-1)


def _on_pixels(maps: Tensor, masks: Tensor, axes: int, dilation: int = 0) -> tuple[Tensor, Tensor]:
    """Maps and dilated masks as `(..., pixels)` of one size."""
    if axes not in _POOL:
        raise CamError(f"spatial_ndim={axes!r} must be 1, 2 or 3")
    if masks.dtype != torch.bool:
        raise CamError(f"masks are {masks.dtype}: an object's mask is of bools (masks > 0.5)")
    if maps.shape[:-axes] != masks.shape[:-axes] or min(maps.ndim, masks.ndim) < axes:
        raise CamError(
            f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: all axes but the last {axes} must be the same"
        )
    resized = resize(maps.to(wide(maps.dtype)), masks.shape[-axes:])
    return resized.flatten(-axes), _dilated(masks, dilation, axes).flatten(-axes)


def _dilated(masks: Tensor, by: int, axes: int) -> Tensor:
    if by == 0:
        return masks
    flat = masks.reshape(-1, 1, *masks.shape[-axes:]).float()
    return (_POOL[axes](flat, 2 * by + 1, 1, by) > 0).reshape(masks.shape)
