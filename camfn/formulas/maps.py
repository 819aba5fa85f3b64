"""Maps: weighted sums of activations, and the map formulas of methods that need more than a sum. Tensors only.

`n` images, `c` channels, `p` positions of the layer's grid, `t` targets. `A` is the activation `(n, c, p)`. `U` is multilinear
interpolation, and `norm` is min-max normalization to [0, 1].
"""

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
    "negative_share",
    "normalize",
    "percentile",
    "poly_cam",
    "pooled_logits",
    "recipro_cam",
    "remainder",
    "resize",
    "rise",
    "score_cam_pp",
    "share",
]

Fuse = Literal["paper", "torchcam"]

_CHANNELS_AT_ONCE = 64  # maps or masks at the input's size
_VALUES_AT_ONCE = 1 << 22  # values of upsampled activations


def combine(weights: Weights | Gradients, activations: Activations) -> FlatMaps:
    """The weighted sum of the channels: the map of most methods, before the ReLU.

    `L_tp = sum_k w_tk A_kp`.

    Args:
        weights: `w`, `(n, t, c)` or, element by element, `(n, t, c, p)`.
        activations: `A`, `(n, c, p)`.

    Returns:
        The maps `(n, t, p)`, in float32 or wider.

    >>> import torch
    >>> combine(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 2.0], [0.5, 4.0]]])).tolist()
    [[[0.5, -2.0]]]
    """
    dtype = wide(torch.promote_types(weights.dtype, activations.dtype))
    if weights.ndim == 4:
        return torch.einsum("ntcp,ncp->ntp", weights.to(dtype), activations.to(dtype))
    return weights.to(dtype) @ activations.to(dtype)


def remainder(weights: Weights | Gradients, activations: Activations, found: FlatMaps) -> Float[Tensor, "n t"]:
    """What is left of a sum after its parts cancel: the size of `combine`, as a share of that of its parts without signs.

    `max_p |L_tp| / max_p sum_k |w_tk A_kp|`. It is 1 if all parts have one sign, or are zero.

    Args:
        weights: `w`, as in `combine`.
        activations: `A`, `(n, c, p)`.
        found: `L = combine(w, A)`.

    >>> import torch
    >>> w, activations = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 2.0], [1.0, 1.5]]])
    >>> remainder(w, activations, combine(w, activations)).tolist()
    [[0.1428571492433548]]
    """
    whole, left = combine(weights.abs(), activations.abs()).amax(-1), found.abs().amax(-1)
    return torch.where(whole > 0, left / torch.where(whole > 0, whole, 1), 1)


def pooled_logits(
    activations: Activations, matrix: Float[Tensor, "classes c"], bias: Float[Tensor, " classes"]
) -> Float[Tensor, "n classes"]:
    """The logits of a linear layer behind global average pooling: `W mean_p A_p + b`.

    >>> import torch
    >>> pooled_logits(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[2.0], [-1.0]]), torch.tensor([0.0, 1.0])).tolist()
    [[4.0, -1.0]]
    """
    return activations.mean(-1).to(matrix.dtype) @ matrix.mT + bias


def negative_share(weights: Float[Tensor, "n c"], values: Activations) -> Float[Tensor, " n"]:
    """The share of `sum_kp |w_k B_kp|` that comes from negative weights. 0 if all are zero.

    >>> import torch
    >>> negative_share(torch.tensor([[3.0, -1.0]]), torch.ones(1, 2, 5)).tolist()
    [0.25]
    """
    parts = (weights * values.sum(-1)).abs()
    whole = parts.sum(-1)
    return torch.where(weights < 0, parts, 0).sum(-1) / torch.where(whole > 0, whole, 1)


def score_cam_pp(scores: Weights, activations: Activations, grid: Sequence[int], size: Sequence[int]) -> FlatMaps:
    """ScoreCAM++ maps: the channels' tanh gates at the size of the input, weighted by their scores.

    `L = sum_k S_k tanh(U(A_k))`.

    Args:
        scores: `S`, `(n, t, c)`.
        activations: `A`, `(n, c, p)`.
        grid: the layer's spatial size, with product `p`.
        size: the spatial size of the map.

    Returns:
        The maps `(n, t, q)`, with `q` the product of `size`.

    >>> import torch
    >>> score_cam_pp(torch.tensor([[[2.0]]]), torch.zeros(1, 1, 4), (2, 2), (3, 3)).shape
    torch.Size([1, 1, 9])

    Chen et al., ScoreCAM++, 2024 (arXiv 2404.19341).
    """
    values = activations.to(scores.dtype).unflatten(-1, tuple(grid))
    pieces = zip(scores.split(_CHANNELS_AT_ONCE, -1), values.split(_CHANNELS_AT_ONCE, 1))
    return reduce(torch.add, (combine(w, torch.tanh(resize(some, size)).flatten(2)) for w, some in pieces))


def group_levels(weights: Weights, activations: Activations, groups: int) -> Tensor:
    """Group-CAM's group maps: the positive weighted sums over groups of consecutive channels.

    `L_g = relu(sum_{k in g} w_k A_k)`, up to a positive factor for each group.

    Args:
        weights: `w`, `(n, t, c)`.
        activations: `A`, `(n, c, p)`.
        groups: the number of groups; `torch.chunk` cuts them, so there can be fewer.

    Returns:
        The group maps `(n, t, groups, p)`.

    >>> import torch
    >>> group_levels(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[0.5], [0.5]]]), 2).tolist()
    [[[[0.5], [0.0]]]]

    Zhang et al., Group-CAM, 2021 (arXiv 2103.13859).
    """
    pieces = zip(weights.chunk(groups, -1), activations.chunk(groups, 1))
    return torch.relu(torch.stack([combine(rescale(w, -1), values) for w, values in pieces], 2))


def group_cam(scores: Weights, group_masks: Tensor) -> FlatMaps:
    """Group-CAM maps: the groups' masks, weighted by their scores.

    `L = sum_g S_g M_g`.

    Args:
        scores: `S`, `(n, t, g)`.
        group_masks: `M`, `(n, t, g, p)`.

    Returns:
        The maps `(n, t, p)`.

    >>> import torch
    >>> group_cam(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])).tolist()
    [[[2.5, 1.0]]]

    Zhang et al., Group-CAM, 2021 (arXiv 2103.13859).
    """
    return torch.einsum("ntg,ntgp->ntp", scores, group_masks.to(scores.dtype))


def rise(scores: Scores, cells: Tensor, shifts: Tensor, size: Sequence[int], probability: float) -> FlatMaps:
    """RISE maps: the random masks, weighted by the scores of the masked inputs.

    `L = sum_i S_i M_i / (N p)`, with N masks `M_i`. The masks are rebuilt from their cells, a few at a time.

    Args:
        scores: `S`, `(n, N, t)`.
        cells: `(N, *s)`, the random cells of each mask.
        shifts: `(N, axes)`, in pixels: where the window of each mask begins.
        size: the spatial size of the input, and of the map.
        probability: `p`, of a cell to be kept.

    Returns:
        The maps `(n, t, q)`, with `q` the product of `size`.

    >>> import torch
    >>> rise(torch.ones(1, 2, 1), torch.ones(2, 2, 2), torch.zeros(2, 2, dtype=torch.long), (4, 4), 0.5).unique().tolist()
    [2.0]

    Petsiuk et al., RISE, BMVC 2018 (arXiv 1806.07421).
    """
    window = vmap(lambda some, shift: masks.window(some, shift, size))
    pieces = zip(*(each.split(_CHANNELS_AT_ONCE, axis) for each, axis in ((scores, 1), (cells, 0), (shifts, 0))))
    total = reduce(torch.add, (s.mT @ window(some, shift).flatten(1).to(s.dtype) for s, some, shift in pieces))
    return total / (len(cells) * probability)


def recipro_cam(scores: Sequence[Float[Tensor, "p t"]]) -> FlatMaps:
    """Recipro-CAM maps: at each position, the score of the activation masked to that position.

    `L_p = s(head(A * m_p))`.

    Args:
        scores: `(p, t)` for each image.

    Returns:
        The maps `(n, t, p)`.

    >>> import torch
    >>> recipro_cam([torch.tensor([[0.25], [0.75]])]).tolist()
    [[[0.25, 0.75]]]

    Byun and Lee, Recipro-CAM, CVPR Workshops 2024 (arXiv 2209.14074).
    """
    return torch.stack(tuple(scores)).mT


def poly_cam(signed: Sequence[FlatMaps], grids: Sequence[tuple[int, ...]]) -> list[FlatMaps]:
    """Poly-CAM maps: each layer's sum, modulated by the map of the next deeper layer.

    `L_l = S_l / U(D(relu(S_l))) * U(relu(L_{l+1}))`, from the deepest layer up, whose map is its sum. `D` resizes to the grid
    of the next layer, `U` back. The map is 0 where the denominator is. The authors divide by 1e-12 there, so that the largest
    values of their map lie where `D` samples nothing.

    Args:
        signed: the sums `S_l`, `(n, t, p_l)` for each layer, from shallow to deep.
        grids: the layers' spatial sizes.

    Returns:
        The map `(n, t, p_l)` of each layer, from shallow to deep.

    >>> import torch
    >>> shallow, deep = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[4.0]]])
    >>> [each.tolist() for each in poly_cam([shallow, deep], [(2,), (1,)])]
    [[[[2.0, 6.0]]], [[[4.0]]]]

    Englebert et al., Poly-CAM, ICPR 2022 (arXiv 2204.13359).
    """
    found = [signed[-1]]
    for own, grid, deeper in zip(reversed(signed[:-1]), reversed(grids[:-1]), reversed(grids[1:])):
        coarse = resize(torch.relu(own).unflatten(-1, grid), deeper)
        around, above = (resize(each, grid).flatten(2) for each in (coarse, torch.relu(found[0]).unflatten(-1, deeper)))
        found.insert(0, torch.where(around > 0, own / torch.where(around > 0, around, 1) * above, 0))
    return found


def layer_cam(found: Sequence[Tensor], axes: int, how: Fuse, size: Sequence[int]) -> Tensor:
    """LayerCAM's fusion of several layers: the element-wise maximum of their scaled maps.

    `max_l U(tanh(2 L_l / max L_l))`. The deepest layer's map is `L / max L`: the paper does not say how to scale it, and
    without scaling it would not compare with the others.

    Args:
        found: the layers' maps, `(n, *grid)` or `(n, t, *grid)`, from shallow to deep.
        axes: the number of spatial axes.
        how: `"paper"` is the formula above. `"torchcam"` takes `tanh(2 norm(L))` for all layers.
        size: the spatial size of the fused map.

    Returns:
        The fused map, `(n, *size)` or `(n, t, *size)`.

    >>> import torch
    >>> layer_cam([torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 4.0]])], 1, "paper", (2,)).tolist()
    [[0.25, 1.0]]

    Jiang et al., LayerCAM, IEEE TIP 2021 (doi 10.1109/TIP.2021.3089943).
    """
    if how == "torchcam":
        return fuse([torch.tanh(2 * normalize(each, tuple(range(-axes, 0)))) for each in found], size)
    shares = [share(each, axes) for each in found]
    return fuse([*(torch.tanh(2 * each) for each in shares[:-1]), shares[-1]], size)


class Resized(NamedTuple):
    """The activation and the gradient at a layer, for the input at one size."""

    activations: Activations  # (n, c, p)
    gradients: Gradients  # (n, t, c, p)
    grid: tuple[int, ...]  # the layer's spatial size at this size of the input


def cameras(parts: Sequence[Resized], shares: Float[Tensor, "r n"], size: Sequence[int]) -> FlatMaps:
    """CAMERAS maps: the product of gradients and activations, each averaged over several sizes of the input.

    `L = sum_k mean_r U(G_k(x_r)) * mean_r U(A_k(x_r))`. Channels are upsampled a few at a time, to bound memory.

    Args:
        parts: the activations and gradients at each of the `r` sizes.
        shares: `(r, n)`, the weight of each size in the mean, for each image.
        size: the spatial size of the map.

    Returns:
        The maps `(n, t, q)`, with `q` the product of `size`.

    >>> import torch
    >>> part = Resized(torch.ones(1, 2, 4), torch.full((1, 1, 2, 4), 3.0), (2, 2))
    >>> cameras([part], torch.ones(1, 1), (2, 2)).tolist()
    [[[6.0, 6.0, 6.0, 6.0]]]

    Jalwana et al., CAMERAS, CVPR 2021 (arXiv 2106.10649).
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
    """Resize values on a grid, and multiply them by each image's share."""
    found = resize(values.to(wide(values.dtype)).unflatten(-1, tuple(grid)), size).flatten(-len(size))
    return found * share_.to(found.dtype).reshape(-1, *[1] * (found.ndim - 1))


class Product(NamedTuple):
    """A gradient times an input or a bias, in units of both magnitudes, so that it stays within the range of the dtype."""

    values: Tensor  # the product of both, each divided by its magnitude
    magnitudes: tuple[Tensor, Tensor]  # powers of two: one for each image of the gradient, and one for the other factor

    def sum(self) -> Tensor:
        """The sum `(n,)` over each image, with the magnitudes multiplied in."""
        first, second = (each.flatten() for each in self.magnitudes)
        return self.values.flatten(1).sum(1) * first * second


def gradient_times(gradient: Tensor, other: Tensor) -> Product:
    """FullGrad's part of the score: a gradient times the input or the bias that it belongs to.

    `G * B`.

    Args:
        gradient: `G`, with the batch first.
        other: `B`, an input or a bias, broadcastable to `G`.

    Returns:
        The product, scaled; `Product.sum` gives its sum for each image.

    >>> import torch
    >>> gradient_times(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).sum().tolist()
    [11.0]

    Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019 (arXiv 1905.00780).
    """
    other = other.to(wide(other.dtype))
    sizes = magnitude(gradient, tuple(range(1, gradient.ndim))), magnitude(other, tuple(range(other.ndim)))
    return Product(gradient / sizes[0] * (other / sizes[1]), sizes)


def full_grad(part: Tensor, size: Sequence[int], *, each: bool = False, align_corners: bool = True) -> Tensor:
    """FullGrad's map of one part of the score: the input or a bias, times its gradient.

    `psi(P) = sum_k U(norm(|P_k|))`.

    Args:
        part: `P`, `(n, c, *grid)`.
        size: the spatial size of the map.
        each: if true, `norm` is over each channel's positions; if false, over an image's channels and positions together.
        align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        The map `(n, *size)`.

    >>> import torch
    >>> full_grad(torch.tensor([[[0.0, -2.0], [1.0, 0.0]]]), (2,)).tolist()
    [[0.5, 1.0]]

    Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019 (arXiv 1905.00780).
    """
    axes = tuple(range(2 if each else 1, part.ndim))
    return resize(normalize(part.abs(), axes).sum(1), size, align_corners=align_corners)


def batch_norm_bias(
    bias: Tensor | None, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Float[Tensor, " c"]:
    """The constant that a batch norm adds in eval mode: FullGrad's bias of that layer.

    `b - m w / sqrt(v + eps)`.

    Args:
        bias: `b`, `(c,)`; `None` without affine parameters.
        weight: `w`, `(c,)`; `None` without affine parameters.
        mean: `m`, `(c,)`, the running mean.
        variance: `v`, `(c,)`, the running variance.
        eps: added to the variance.

    Returns:
        The bias `(c,)`.

    >>> import torch
    >>> batch_norm_bias(None, torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([4.0]), 0.0).tolist()
    [-3.0]
    """
    shift = -mean * torch.rsqrt(variance + eps)
    shift = shift if weight is None else shift * weight
    return shift if bias is None else bias + shift


def fuse(maps: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
    """Fuse the maps of several layers: the element-wise maximum after resizing, as torchcam's `fuse_cams`.

    `max_l U(L_l)`.

    Args:
        maps: a list or tuple of maps, `(n, *grid)` or `(n, t, *grid)`, as a method returns them for several layers.
        size: the spatial size of the result; by default the largest side of each axis.

    Returns:
        The fused map, `(n, *size)` or `(n, t, *size)`.

    Raises:
        CamError: if `maps` is empty or not a sequence of tensors, or if the maps differ in batch or number of axes.

    >>> import torch
    >>> fuse([torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5, 0.5]])]).tolist()
    [[0.5, 0.5, 0.75, 1.0]]
    """
    maps = list(maps) if isinstance(maps, (list, tuple)) else []
    if not maps or any(not isinstance(m, Tensor) for m in maps):
        raise CamError("maps must be a list or tuple of at least one map tensor")
    if len({m.ndim for m in maps}) > 1 or len({m.shape[0] for m in maps}) > 1:
        raise CamError(f"maps to fuse differ in batch or axes: {[tuple(m.shape) for m in maps]}")
    if size is None:  # leading axes of equal length, such as targets, are not spatial and are left alone
        size = [max(sides) for sides in zip(*(m.shape[1:] for m in maps))]
        first = next((i for i, side in enumerate(size) if any(m.shape[1 + i] != side for m in maps)), len(size))
        size = size[first:]
    fused = maps[0] if not size else resize(maps[0], size)
    for other in maps[1:]:
        fused = torch.maximum(fused, resize(other, size) if size else other)
    return fused
