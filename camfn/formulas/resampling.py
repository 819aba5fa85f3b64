"""Resizing and blurring. The last axes are spatial; the leading axes are batched."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError
from camfn._types import wide
from camfn.formulas.scaling import magnitude

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_KEPT = {torch.float64: 44, torch.float32: 16}  # bits of a map's largest value that its interpolated values keep
_SHIFT = 0.3183  # of a step: equal values must not straddle an edge, so no edge lies at a simple fraction of the steps


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize the last axes by multilinear interpolation, without antialiasing.

    Args:
        maps: `(..., *sides)`.
        size: the new sides of the last one to three axes.
        align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        A tensor `(..., *size)`.

    Raises:
        CamError: if `size` has none or more than three axes, or more than `maps`.

    >>> import torch
    >>> resize(torch.tensor([[0.0, 1.0]]), (4,)).tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    size = tuple(int(side) for side in size)
    axes = len(size)
    if axes not in _LINEAR or maps.ndim < axes:
        raise CamError(
            f"size has {axes} axes, maps have shape {tuple(maps.shape)}: one to three of their last axes can be resized"
        )
    if tuple(maps.shape[-axes:]) == size:
        return maps
    lead = maps.shape[:-axes]
    flat = maps.reshape(1, -1, *maps.shape[-axes:])
    return F.interpolate(flat, size, mode=_LINEAR[axes], align_corners=align_corners).reshape(*lead, *size)


def resize_with_ties(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize as `resize` does, for values that are compared: what is equal but for rounding comes out equal.

    Args:
        maps: `(..., *sides)`, float32 or wider.
        size: the new sides of the last one to three axes.

    Returns:
        A tensor `(..., *size)`, rounded as by `with_ties`; `maps` themselves if they have this size.

    >>> import torch
    >>> flat = torch.full((8, 8), 0.1)
    >>> len(resize(flat, (300, 300)).unique()) > 1, len(resize_with_ties(flat, (300, 300)).unique())
    (True, 1)
    """
    if tuple(maps.shape[-len(size) :]) == tuple(size):
        return maps
    return with_ties(lambda exact: resize(exact, size), maps, len(size))


def with_ties(change: Callable[[Tensor], Tensor], maps: Tensor, axes: int) -> Tensor:
    """Return weighted means of maps, in which values that are equal but for rounding are equal.

    Means round differently from place to place, and with the number of maps. They are made in float64 here, and rounded to
    2^-44 of each map's largest value, which is more than float32 holds. MPS has no float64: there it is float32, and 2^-16.

    Args:
        change: from maps to means of their values, with the same number of axes.
        maps: `(..., *sides)`, float32 or wider.
        axes: the number of axes of a map, which come last.

    Returns:
        The result of `change`, in the dtype of `maps`.

    >>> import torch
    >>> with_ties(lambda exact: torch.stack([exact.mean(-1), exact[..., 0]], -1), torch.full((3,), 0.1), 1)
    tensor([0.1000, 0.1000])
    """
    exact = maps.to(torch.float32 if maps.device.type == "mps" else torch.float64)
    found = change(exact)
    step = magnitude(exact, range(-axes, 0)) * 2.0 ** -_KEPT[exact.dtype]
    step = step.clamp(min=torch.finfo(exact.dtype).tiny)
    return (torch.floor(found / step + _SHIFT) * step).to(maps.dtype)


def blur(values: Tensor, kernel: int, sigma: float, axes: int) -> Tensor:
    """Gaussian blur of the last axes, mirrored at the border. An axis may be shorter than the kernel.

    Args:
        values: `(..., *sides)`.
        kernel: the width of the kernel in pixels, an odd number.
        sigma: the standard deviation in pixels.
        axes: the number of axes to blur.

    Returns:
        A tensor of the same shape.

    >>> import torch
    >>> blur(torch.tensor([0.0, 0.0, 4.0, 0.0, 0.0]), 3, 1e9, 1)  # a box
    tensor([0.0000, 1.3333, 1.3333, 1.3333, 0.0000])
    """
    offsets = torch.arange(kernel, device=values.device) - kernel // 2
    bell = torch.exp(-0.5 * (offsets.to(values.dtype) / sigma).square())
    for axis in range(-axes, 0):
        side = values.shape[axis]
        at = (torch.arange(side, device=values.device)[:, None] + offsets).abs() % max(1, 2 * side - 2)
        mirrored = torch.minimum(at, (2 * side - 2 - at).abs())
        matrix = torch.zeros(side, side, dtype=values.dtype, device=values.device)
        matrix = matrix.scatter_add(1, mirrored, (bell / bell.sum()).expand(side, kernel))
        values = (values.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    return values


def cubic(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image by cubic interpolation, along one axis after the other.

    Args:
        image: `(n, k, *sides)`, with any number of spatial axes.
        size: the new sides.

    Returns:
        The image `(n, k, *size)`, in the dtype of `image`.

    >>> import torch
    >>> cubic(torch.tensor([[[1.0, 1.0, 1.0]]]), (6,)).tolist()
    [[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]
    """
    found = image.to(wide(image.dtype))
    for axis, side in enumerate(size, 2):
        last = found.movedim(axis, -1)
        flat = last.reshape(1, -1, last.shape[-1], 1)  # torch's cubic takes two axes; one of length 1 is left unchanged
        longer = F.interpolate(flat, (side, 1), mode="bicubic", align_corners=False)
        found = longer.reshape(*last.shape[:-1], side).movedim(-1, axis)
    return found.to(image.dtype)
