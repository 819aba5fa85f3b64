"""From weights and activations to maps. Tensors only: no model, no layer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Activations, FlatMaps, Gradients, Weights, wide
from camfn.formulas import components

__all__ = [
    "blur",
    "centered",
    "checked_blur",
    "combine",
    "component",
    "cubic",
    "fuse",
    "is_flat",
    "normalize",
    "percentile",
    "resize",
    "saliency",
    "share",
]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def combine(weights: Weights | Gradients, activations: Activations) -> FlatMaps:
    """`L_tp = sum_k w_tk A_kp`, for weights `(n, t, c)` or `(n, t, c, p)`, in float32 or wider.

    >>> import torch
    >>> combine(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 2.0], [0.5, 4.0]]])).tolist()
    [[[0.5, -2.0]]]
    """
    dtype = wide(torch.promote_types(weights.dtype, activations.dtype))
    if weights.ndim == 4:
        return torch.einsum("ntcp,ncp->ntp", weights.to(dtype), activations.to(dtype))
    return weights.to(dtype) @ activations.to(dtype)


def component(
    weights: Weights | Gradients, activations: Activations, *, center: bool = True, sign: components.Sign = "sum"
) -> FlatMaps:
    """The first principal component over positions of `w_k A_k`, for weights `(n, t, c)` or `(n, t, c, p)`.

    `L = X v`, `X_pk = w_k A_kp - mean_p w_k A_kp`, v the unit vector that makes `L` longest; without the mean taken off unless
    `center`. Its sign is that of its product with what `combine` gives; with `sign="peak"`, what is largest in size is
    positive. As `combine` goes, pytorch-grad-cam's `eigen_smooth`, up to the sign, that is left to chance there.

    >>> import torch
    >>> component(torch.ones(1, 1, 2), torch.tensor([[[3.0, 0.0, -3.0], [0.0, 0.0, 0.0]]])).tolist()
    [[[3.0, 0.0, -3.0]]]
    """
    dtype = wide(torch.promote_types(weights.dtype, activations.dtype))
    values, weights = activations.to(dtype), (weights if weights.ndim == 4 else weights[..., None]).to(dtype)
    # One target after the other: together they would take t times the memory of the activation.
    weighed = (each * values for each in weights.unbind(1))
    found = [components.first(centered(each, activations.dtype) if center else each, sign).scores for each in weighed]
    return torch.stack(found, 1)


def centered(activations: Float[Tensor, "*b c p"], dtype: torch.dtype) -> Float[Tensor, "*b c p"]:
    """`A_kp - mean_p A_kp`, in float32 or wider; zeros where a channel is flat up to the rounding of `dtype`.

    >>> import torch
    >>> centered(torch.tensor([[1.0, 3.0], [0.1, 0.1]]), torch.float32).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    flat = is_flat(activations.amin(-1, keepdim=True), activations.amax(-1, keepdim=True), dtype)
    values = activations.to(wide(activations.dtype))
    return torch.where(flat, 0, values - values.mean(-1, keepdim=True))


def is_flat(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Are values between `low` and `high`, computed in `dtype`, one value up to rounding?

    The bound is relative to the size of the values and to the dtype; an absolute one is 0 in float16, or calls a small
    map flat.
    """
    return high - low <= 4 * torch.finfo(dtype).eps * torch.maximum(high.abs(), low.abs())


def normalize(maps: Tensor, dim: int | Sequence[int] = -1) -> Tensor:
    """`(L - min L) / (max L - min L)` over `dim`: in [0, 1]. A map that is flat up to rounding becomes zeros.

    The division is exact (no epsilon in the denominator), so that a map of small values is not made smaller.

    >>> import torch
    >>> normalize(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).tolist()
    [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    flat = is_flat(low, high, maps.dtype)
    # The inner `where` matters: without it the branch that is not taken still makes NaN gradients.
    return torch.where(flat, 0, (maps - low) / torch.where(flat, 1, high - low))


def resize(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Multilinear interpolation of the last `len(size)` axes (one to three) to `size`, without antialiasing.

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


def blur(values: Tensor, kernel: int, sigma: float, axes: int) -> Tensor:
    """Gaussian blur of the last `axes` axes, by a kernel of so many pixels (an odd number), mirrored at the border.

    An axis may be shorter than the kernel.

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


def percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile over the last axis, which stays: `torch.quantile`, which has no limit of size here, and no loop in `vmap`.

    >>> import torch
    >>> percentile(torch.tensor([4.0, 1.0, 2.0]), 75)
    tensor([3.])
    """
    ordered = values.sort(-1).values
    place = percent / 100 * (values.shape[-1] - 1)
    low, high = (ordered[..., at(place) : at(place) + 1] for at in (math.floor, math.ceil))
    return low + (place - math.floor(place)) * (high - low)


def checked_blur(blur: tuple[int, float]) -> tuple[int, float]:
    """The kernel and deviation of a blur, or a sentence about what is wrong with them."""
    pair = isinstance(blur, (tuple, list)) and len(blur) == 2 and isinstance(blur[0], int)
    if not pair or blur[0] < 1 or blur[0] % 2 == 0 or not blur[1] > 0:
        raise CamError(f"blur={blur!r} must be an odd number of pixels and a standard deviation, as in (51, 50.0)")
    return blur


def cubic(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image `(n, k, *sides)` at another size, by cubic interpolation along one axis after the other.

    >>> import torch
    >>> cubic(torch.tensor([[[1.0, 1.0, 1.0]]]), (6,)).tolist()
    [[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]
    """
    found = image.to(wide(image.dtype))
    for axis, side in enumerate(size, 2):
        last = found.movedim(axis, -1)
        flat = last.reshape(1, -1, last.shape[-1], 1)  # torch has it for two axes; along one of length 1 it changes nothing
        longer = F.interpolate(flat, (side, 1), mode="bicubic", align_corners=False)
        found = longer.reshape(*last.shape[:-1], side).movedim(-1, axis)
    return found.to(image.dtype)


def share(maps: Tensor, axes: int) -> Tensor:
    """`L / max L` over the last `axes`; zeros where nothing is positive."""
    high = maps.amax(tuple(range(-axes, 0)), keepdim=True)
    return torch.where(high > 0, maps / torch.where(high > 0, high, 1), 0)


def saliency(part: Tensor, size: Sequence[int], *, each: bool = False, align_corners: bool = True) -> Tensor:
    """`sum_k U(norm(|part_k|))` of `(n, c, *grid)`: FullGrad's psi, summed over channels and brought to `size`.

    norm is min-max over an image's channels and positions together; `each`: over each channel's positions.
    """
    axes = tuple(range(2 if each else 1, part.ndim))
    return resize(normalize(part.abs(), axes).sum(1), size, align_corners=align_corners)


def fuse(maps: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
    """One map of several layers' maps: the element-wise maximum after resizing all to `size`.

    `maps` are `(n, *grid)` or `(n, t, *grid)`, as a method returns them for a tuple of layers; `size` is by default the
    largest side of each axis. As torchcam's `fuse_cams`.

    >>> import torch
    >>> fuse([torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5, 0.5]])]).tolist()
    [[0.5, 0.5, 0.75, 1.0]]
    """
    maps = list(maps) if isinstance(maps, (list, tuple)) else []
    if not maps or any(not isinstance(m, Tensor) for m in maps):
        raise CamError("maps must be a list or tuple of map tensors, with at least one in it")
    if len({m.ndim for m in maps}) > 1 or len({m.shape[0] for m in maps}) > 1:
        raise CamError(f"maps to fuse differ in batch or axes: {[tuple(m.shape) for m in maps]}")
    if size is None:  # axes that all share (targets) are resized to what they are: left alone
        size = [max(sides) for sides in zip(*(m.shape[1:] for m in maps))]
        first = next((i for i, side in enumerate(size) if any(m.shape[1 + i] != side for m in maps)), len(size))
        size = size[first:]
    fused = maps[0] if not size else resize(maps[0], size)
    for other in maps[1:]:
        fused = torch.maximum(fused, resize(other, size) if size else other)
    return fused
