"""From weights and activations to maps: sums over channels, and what some methods do beyond them. Tensors only."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from camfn._errors import CamError
from camfn._types import Activations, FlatMaps, Gradients, Scores, Weights, wide
from camfn.formulas import masks
from camfn.formulas.components import centered, component
from camfn.formulas.resampling import blur, cubic, resize
from camfn.formulas.scaling import is_flat, magnitude, normalize, percentile, rescale, share

__all__ = [
    "Fuse",
    "Product",
    "Resized",
    "batch_norm_bias",
    "blur",
    "cameras",
    "centered",
    "combine",
    "component",
    "cubic",
    "full_grad",
    "fuse",
    "gradient_times",
    "group_cam",
    "group_levels",
    "is_flat",
    "layer_cam",
    "normalize",
    "percentile",
    "poly_cam",
    "recipro_cam",
    "resize",
    "rise",
    "score_cam_pp",
    "share",
]

Fuse = Literal["paper", "torchcam"]

_CHANNELS_AT_ONCE = 64  # maps or masks at the input's size
_VALUES_AT_ONCE = 1 << 22  # values of upsampled activations


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


def score_cam_pp(scores: Weights, activations: Activations, grid: Sequence[int], size: Sequence[int]) -> FlatMaps:
    """ScoreCAM++: `L = sum_k S_k tanh(U(A_k))`, with U to `size` (Chen et al., 2024). `scores` are `(n, t, c)`."""
    values = activations.to(scores.dtype).unflatten(-1, tuple(grid))
    pieces = zip(scores.split(_CHANNELS_AT_ONCE, -1), values.split(_CHANNELS_AT_ONCE, 1))
    return reduce(torch.add, (combine(w, torch.tanh(resize(some, size)).flatten(2)) for w, some in pieces))


def group_levels(weights: Weights, activations: Activations, groups: int) -> Tensor:
    """`relu(sum_{k in g} w_k A_k)` over groups of consecutive channels, `(n, t, g, p)`, each to a positive factor."""
    pieces = zip(weights.chunk(groups, -1), activations.chunk(groups, 1))
    return torch.relu(torch.stack([combine(rescale(w, -1), values) for w, values in pieces], 2))


def group_cam(scores: Weights, group_masks: Tensor) -> FlatMaps:
    """Group-CAM: `L = sum_g S_g M_g`, for scores `(n, t, g)` and masks `(n, t, g, p)` (Zhang et al., 2021)."""
    return torch.einsum("ntg,ntgp->ntp", scores, group_masks.to(scores.dtype))


def rise(scores: Scores, cells: Tensor, shifts: Tensor, size: Sequence[int], probability: float) -> FlatMaps:
    """RISE: `L = sum_i S_i M_i / (N p)` over N masks (Petsiuk et al., 2018).

    A mask is made of its cells again, a few at a time. `scores (n, N, t)`, `cells (N, *s)`, `shifts (N, axes)`.
    """
    window = vmap(lambda some, shift: masks.window(some, shift, size))
    pieces = zip(*(each.split(_CHANNELS_AT_ONCE, axis) for each, axis in ((scores, 1), (cells, 0), (shifts, 0))))
    total = reduce(torch.add, (s.mT @ window(some, shift).flatten(1).to(s.dtype) for s, some, shift in pieces))
    return total / (len(cells) * probability)


def recipro_cam(scores: Sequence[Float[Tensor, "p t"]]) -> FlatMaps:
    """Recipro-CAM: `L_p = s(head(A * m_p))`, the score with the mask of position p (Byun and Lee, 2024)."""
    return torch.stack(tuple(scores)).mT


def poly_cam(signed: Sequence[FlatMaps], grids: Sequence[tuple[int, ...]]) -> list[FlatMaps]:
    """Poly-CAM: `L_l = S_l / U(D(relu(S_l))) * U(relu(L_{l+1}))`, from the deepest layer up (Englebert et al., 2022).

    `signed` are the layers' sums `S_l`, from shallow to deep; D resizes to the next layer's grid, U back. The factor is 0 where
    its denominator is: the authors divide by 1e-12 there, which gives the map's largest values to what D does not see.
    """
    found = [signed[-1]]
    for own, grid, deeper in zip(reversed(signed[:-1]), reversed(grids[:-1]), reversed(grids[1:])):
        coarse = resize(torch.relu(own).unflatten(-1, grid), deeper)
        around, above = (resize(each, grid).flatten(2) for each in (coarse, torch.relu(found[0]).unflatten(-1, deeper)))
        found.insert(0, torch.where(around > 0, own / torch.where(around > 0, around, 1) * above, 0))
    return found


def layer_cam(found: Sequence[Tensor], axes: int, how: Fuse, size: Sequence[int]) -> Tensor:
    """LayerCAM's fusion: the maximum over layers of `tanh(2 L / max L)`, after resizing to `size` (Jiang et al., 2021).

    The deepest layer's map is `L / max L`: the paper does not say how it is scaled, and unscaled it would not compare with the
    others. `how="torchcam"`: `tanh(2 norm(L))` for all layers, with the min-max norm.
    """
    if how == "torchcam":
        return fuse([torch.tanh(2 * normalize(each, tuple(range(-axes, 0)))) for each in found], size)
    shares = [share(each, axes) for each in found]
    return fuse([*(torch.tanh(2 * each) for each in shares[:-1]), shares[-1]], size)


class Resized(NamedTuple):
    """The activation and the gradient of an input at one size."""

    activations: Activations
    gradients: Gradients
    grid: tuple[int, ...]


def cameras(parts: Sequence[Resized], shares: Float[Tensor, "r n"], size: Sequence[int]) -> FlatMaps:
    """CAMERAS: `L = sum_k mean_r U(G_k(x_r)) * mean_r U(A_k(x_r))`, with U to `size` (Jalwana et al., 2021).

    `shares` weigh the sizes for each image. Channels are upsampled a few at a time.
    """
    _, targets, channels, _ = parts[0].gradients.shape
    step = max(1, _VALUES_AT_ONCE // (math.prod(size) * shares.shape[1] * (1 + targets)))
    total: Any = 0
    for start in range(0, channels, step):
        activations: Any = 0
        gradients: Any = 0
        for part, share_ in zip(parts, shares):
            activations = activations + _upsampled(part.activations[:, start : start + step], part.grid, size, share_)
            gradients = gradients + _upsampled(part.gradients[:, :, start : start + step], part.grid, size, share_)
        total = total + combine(gradients, activations)
    return total


def _upsampled(values: Tensor, grid: Sequence[int], size: Sequence[int], share_: Tensor) -> Tensor:
    """Values on a grid, at another size, times each image's share."""
    found = resize(values.to(wide(values.dtype)).unflatten(-1, tuple(grid)), size).flatten(-len(size))
    return found * share_.to(found.dtype).reshape(-1, *[1] * (found.ndim - 1))


class Product(NamedTuple):
    """A gradient times what it belongs to, divided by the magnitudes of both: no product leaves the dtype's range."""

    values: Tensor
    magnitudes: tuple[Tensor, Tensor]

    def sum(self) -> Tensor:
        """Each image's sum, in its own units, `(n,)`."""
        first, second = (each.flatten() for each in self.magnitudes)
        return self.values.flatten(1).sum(1) * first * second


def gradient_times(gradient: Tensor, other: Tensor) -> Product:
    """`G * B`, for a gradient with the batch first and an input, or a bias, that broadcasts to it."""
    other = other.to(wide(other.dtype))
    sizes = magnitude(gradient, tuple(range(1, gradient.ndim))), magnitude(other, tuple(range(other.ndim)))
    return Product(gradient / sizes[0] * (other / sizes[1]), sizes)


def full_grad(part: Tensor, size: Sequence[int], *, each: bool = False, align_corners: bool = True) -> Tensor:
    """FullGrad's `psi(P) = sum_k U(norm(|P_k|))`, for one part `(n, c, *grid)` of the score (Srinivas and Fleuret, 2019).

    A part is the input or a bias times its gradient. norm is min-max over an image's channels and positions together, or over
    each channel's positions with `each`. U resizes to `size`.
    """
    axes = tuple(range(2 if each else 1, part.ndim))
    return resize(normalize(part.abs(), axes).sum(1), size, align_corners=align_corners)


def batch_norm_bias(
    bias: Tensor | None, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Float[Tensor, " c"]:
    """`b - m w / sqrt(v + eps)`: all that a batch norm adds in eval mode."""
    shift = -mean * torch.rsqrt(variance + eps)
    shift = shift if weight is None else shift * weight
    return shift if bias is None else bias + shift


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
