"""What metrics of maps share: maps and masks as rows of pixels, and ranks with ties shared."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.resampling import resize, resize_with_ties
from camfn.formulas.scaling import rescale
from camfn.metrics.scoring import real

_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def rows(maps: Tensor, axes: int) -> Tensor:
    """Return the maps as `(..., positions)`, float32 or wider. A map that is not finite is NaN as a whole."""
    check_axes(axes)
    if maps.ndim < axes or not maps.is_floating_point():
        raise CamError(
            f"maps are {maps.dtype} of shape {tuple(maps.shape)}: they must be floating-point, with {axes} spatial axes last"
        )
    return _nan_unless_finite(maps.to(wide(maps.dtype)), axes).flatten(-axes)


def _nan_unless_finite(maps: Tensor, axes: int) -> Tensor:
    finite = maps.isfinite().flatten(-axes).all(-1)
    return torch.where(finite[(..., *(None,) * axes)], maps, torch.nan)


def rectified(rows: Tensor) -> Tensor:
    """Return each map's energy: its values without the negative ones, in units in which their sum is finite."""
    return rescale(rows.clamp(min=0), -1)


def on_pixels(maps: Tensor, masks: Tensor, axes: int, dilation: int = 0, *, compared: bool = False) -> tuple[Tensor, Tensor]:
    """Return the maps and the dilated masks at the masks' size, `(..., pixels)`. `compared` keeps ties of values.

    A map that is not finite is NaN as a whole.
    """
    check_axes(axes)
    if masks.dtype != torch.bool:
        raise CamError(f"masks are {masks.dtype}: they must be bools (masks > 0.5)")
    if maps.shape[:-axes] != masks.shape[:-axes] or min(maps.ndim, masks.ndim) < axes:
        raise CamError(
            f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: all axes but the last {axes} must be the same"
        )
    known = _nan_unless_finite(real(maps), axes)
    resized = (resize_with_ties if compared else resize)(known, masks.shape[-axes:])
    return resized.flatten(-axes), _dilate(masks, dilation, axes).flatten(-axes)


def check_axes(axes: int) -> None:
    """Raise `CamError` unless there are one to three spatial axes."""
    if axes not in _POOL:
        raise CamError(f"spatial_ndim={axes!r} must be 1, 2 or 3")


def _dilate(masks: Tensor, by: int, axes: int) -> Tensor:
    if by == 0:
        return masks
    flat = masks.reshape(-1, 1, *masks.shape[-axes:]).float()
    return (_POOL[axes](flat, 2 * by + 1, 1, by) > 0).reshape(masks.shape)


def known_where(known: Tensor, values: Tensor) -> Tensor:
    """Return the values, and NaN where they are not known: an empty mask, no energy."""
    return torch.where(known, values, torch.nan)


def known_of(values: Tensor, *maps: Tensor) -> Tensor:
    """Return the values, and NaN where one of the maps has a NaN, which a comparison or a rank would hide."""
    return known_where(~torch.stack([rows.isnan().any(-1) for rows in maps]).any(0), values)


def ranks(values: Tensor) -> Tensor:
    """Return the ranks over the last axis, from 1, in float64: their sums are exact. Equal values share the mean rank.

    >>> import torch
    >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    ordered, order = values.sort(-1)
    count = values.shape[-1]
    at = torch.arange(count, device=values.device)
    edge = torch.ones_like(ordered[..., :1], dtype=torch.bool)
    step = ordered[..., 1:] != ordered[..., :-1]
    first = torch.where(torch.cat([edge, step], -1), at, 0).cummax(-1).values
    last = torch.where(torch.cat([step, edge], -1), at, count).flip(-1).cummin(-1).values.flip(-1)
    return ((first + last).double() / 2 + 1).gather(-1, order.argsort(-1))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation over the last axis. Two constants correlate by 1, a constant and another row by 0."""
    a, b = (row - row.mean(-1, keepdim=True) for row in (a, b))
    sizes = a.square().sum(-1) * b.square().sum(-1)
    alike = ((a == 0).all(-1) & (b == 0).all(-1)).to(sizes.dtype)
    found = (a * b).sum(-1) / torch.where(sizes > 0, sizes, 1).sqrt()
    return torch.where(sizes > 0, found, alike).clamp(-1, 1)
