"""First components of a matrix of channels and positions: Eigen-CAM and its kin. Tensors only."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camfn import _compat
from camfn._types import Activations, FlatMaps, Gradients, Weights, wide
from camfn.formulas.scaling import is_flat, magnitude

Sign = Literal["sum", "peak"]
Side = Literal["largest", "class"]
Kernel = Literal["sigmoid", "rbf", "poly", "linear"]


class First(NamedTuple):
    """The unit vector `v` of channels that maximizes `|X v|` (`loadings`), and `X v` (`scores`)."""

    scores: Float[Tensor, "*b p"]
    loadings: Float[Tensor, "*b c"]


def first(values: Float[Tensor, "*b c p"], sign: Sign = "sum") -> First:
    """The first singular vector `v` of `X`, whose rows are positions, and the projection `X v`.

    - `values`: `X^T`, channels by positions.
    - `sign`: the sign of a singular vector is arbitrary, and is fixed by this rule. `"sum"` makes `sum_k v_k` positive.
      `"peak"` makes the value of `X v` with the largest magnitude positive. If one rule is undecided, the other is used.

    `v` is the top eigenvector of the Gram matrix of channels or of positions, whichever is smaller. It does not depend on the
    order of channels or positions. It is twice differentiable if the largest singular value is simple. If `X` is zero, so are
    both results.

    >>> import torch
    >>> scores, loadings = first(torch.tensor([[3.0, 0.0, -6.0], [4.0, 0.0, -8.0]]))
    >>> [round(value, 3) for value in (*scores.tolist(), *loadings.tolist())]
    [5.0, 0.0, -10.0, 0.6, 0.8]
    """
    size = values.detach().abs().amax((-2, -1), keepdim=True)
    scaled = values / torch.where(size == 0, 1, size)  # same vector, but no square overflows or underflows
    if values.shape[-1] < values.shape[-2]:
        loadings = times(scaled, top(scaled.mT @ scaled))
    else:
        loadings = torch.where(size[..., 0] == 0, 0, top(scaled @ scaled.mT))
    square = loadings.square().sum(-1, keepdim=True)
    loadings = loadings / torch.where(square == 0, 1, square).sqrt()
    scores = times(values.mT, loadings)
    turn = orientation(loadings.sum(-1), scores, sign)
    return First(turn * scores, turn * loadings)


def eigen_cam(activations: Activations, center: bool = False) -> First:
    """Eigen-CAM: `L = X v`, with v the first singular vector of X, whose rows are positions (Muhammad & Yeasin, 2020).

    X is the activation, less each channel's mean over positions if `center`. The entry of L with the largest size is positive.

    >>> import torch
    >>> eigen_cam(torch.tensor([[[3.0, 0.0, -6.0], [4.0, 0.0, -8.0]]])).scores.abs().round().tolist()
    [[5.0, 0.0, 10.0]]
    """
    values = centered(activations, activations.dtype) if center else activations.to(wide(activations.dtype))
    return first(values, "peak")


def eigen_grad_cam(gradients: Gradients, activations: Activations, center: bool = True) -> FlatMaps:
    """EigenGrad-CAM: the first component of `G * A`, with the sign of HiResCAM's map (pytorch-grad-cam's `EigenGradCAM`)."""
    return component(gradients, activations, center=center)


def seg_eigen_cam(gradients: Gradients, activations: Activations, center: bool = True, side: Side = "largest") -> FlatMaps:
    """Seg-Eigen-CAM: the first component of `|G| * A`; its entry with the largest size is positive (Chung & Ying, 2025).

    `side="class"` gives it the sign of its product with `sum_k G_k A_k` instead, as `eigen_grad_cam` has it.
    """
    found = component(gradients.abs(), activations, center=center, sign="peak")
    if side == "largest":
        return found
    evidence = torch.einsum("ntcp,ncp->ntp", gradients.to(found.dtype), activations.to(found.dtype))
    evidence = evidence - evidence.mean(-1, keepdim=True) if center else evidence
    along = (found * evidence).sum(-1)
    length = (found.square().sum(-1) * evidence.square().sum(-1)).sqrt()
    return orientation(along / torch.where(length == 0, 1, length), found) * found


def kpca_cam(
    activations: Float[Tensor, "*b c p"], kernel: Kernel = "sigmoid", gamma: float | None = None, *, unit: bool = False
) -> Float[Tensor, "*b p"]:
    """The first kernel principal component of the positions.

        sqrt(l) a,   for the largest eigenvalue l and its eigenvector a of the centered matrix k(x_p, x_q)

    - `gamma`: the scale of the kernel; `None` is 1/c.
    - `unit`: return a positive multiple, which is finite even if the component overflows (with `"poly"` it is a cube).

    The value with the largest magnitude is positive. Centering removes constants of a kernel, so they are omitted here. Small
    values then keep their precision, and equal positions give exactly zero.
    """
    values = centered(activations, activations.dtype)
    gamma = 1 / values.shape[-2] if gamma is None else gamma
    own = magnitude(values, (-2, -1))
    values = values / own
    # The kernel of smaller values is linear up to rounding: compute it at this size, without loss of precision, and scale down.
    linear = math.sqrt(torch.finfo(values.dtype).eps / (32 * values.shape[-2] * gamma))
    size = own if kernel == "linear" else own.clamp(min=2.0 ** min(100, max(-100, math.floor(math.log2(linear)))))
    matrix, factor = KERNELS[kernel](values.mT @ values, gamma, size)
    rows = matrix.mean(-1, keepdim=True)
    matrix = matrix - rows - rows.mT + rows.mean(-2, keepdim=True)
    vector = top(matrix)
    value = (vector * times(matrix, vector)).sum(-1, keepdim=True)
    none = value <= 0  # only for zeros: else a kernel that grows with x.y has a positive eigenvalue
    scores = torch.where(none, 0, torch.where(none, 1, value).sqrt() * vector)
    sums = values.detach().sum(-2)
    length = (sums.square().sum(-1) * scores.detach().square().sum(-1)).sqrt()
    scores = orientation((sums * scores).sum(-1) / torch.where(length == 0, 1, length), scores, "peak") * scores
    return scores if unit else scores * factor[..., 0] * (own / size)[..., 0]


def _sigmoid(gram: Tensor, gamma: float, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return `tanh(g + 1) - tanh(1)`."""
    gram = gamma * gram * size * size  # in this order, since `size * size` may overflow or underflow
    return torch.tanh(gram) * (1 - math.tanh(1) * torch.tanh(gram + 1)), torch.ones_like(size)


def _rbf(gram: Tensor, gamma: float, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return `exp(-gamma |x - y|^2) - 1`."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    apart = (square[..., None] + square[..., None, :] - 2 * gram).clamp(min=0)  # rounding errors are scaled by size^2
    return torch.expm1(-gamma * apart * size * size), torch.ones_like(size)


def _poly(gram: Tensor, gamma: float, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(g + 1)^3 - 1` divided by its largest power of the size."""
    gram, below, above = gamma * gram, size.clamp(max=1), size.clamp(min=1)
    cubic = (gram * below**2) ** 2 + 3 * gram * below**2 / above**2 + 3 / above**4
    return gram * cubic, below * above**3


KERNELS = {"sigmoid": _sigmoid, "rbf": _rbf, "poly": _poly, "linear": lambda gram, gamma, size: (gram, size)}
"""Functions `(gram in units of size^2, gamma, size) -> (kernel matrix / f^2, f)`. The kernels omit their constants."""


def orientation(along: Float[Tensor, "*b"], scores: Float[Tensor, "*b p"], sign: Sign = "sum") -> Float[Tensor, "*b 1"]:
    """Return the sign, 1 or -1, that makes `along` (at most 1 in magnitude) or the peak of `scores` positive."""
    along, high, low = along.detach()[..., None], scores.detach().amax(-1, keepdim=True), scores.detach().amin(-1, keepdim=True)
    sums = torch.where(along.abs() > _rounding(along.dtype), along, 0)
    peaks = torch.where((high + low).abs() > _rounding(along.dtype) * (high - low), high + low, 0)
    told, other = (sums, peaks) if sign == "sum" else (peaks, sums)
    return torch.where(torch.where(told == 0, other, told) < 0, -1.0, 1.0).to(scores.dtype)


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.75  # 2e-12 for float64, 6e-6 for float32: above the rounding error of zero


def top(matrix: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m"]:
    """The unit eigenvector of the largest eigenvalue of a symmetric matrix. Its sign is arbitrary.

    The result is NaN if the matrix is not finite. The derivative of `eigh` is NaN if any two eigenvalues are equal, as with
    two dead channels. The derivative here needs only a simple largest eigenvalue; it is zero in undetermined directions.
    """
    values, vectors = spectrum(matrix)
    vector, others = vectors[..., -1], vectors[..., :-1]
    if matrix.requires_grad or _compat.transformed():
        gaps = values[..., -1:] - values[..., :-1]
        single = gaps > 8 * torch.finfo(matrix.dtype).eps * values.abs().amax(-1, keepdim=True)
        inverse = torch.where(single, 1 / torch.where(single, gaps, 1), 0)
        start = vector
        # The solution is a fixed point of `v <- v + (l - K)^+ (K - v'Kv) v`. With l and (l - K)^+ constant, and v constant at
        # first, each step makes one more derivative of v exact: two steps for second derivatives.
        for _ in range(2):
            moved = times(matrix, vector)
            off = moved - (start * moved).sum(-1, keepdim=True) * vector
            vector = vector + times(others, inverse * times(others.mT, off))
        vector = vector / vector.square().sum(-1, keepdim=True).sqrt()
        vector = start + (vector - vector.detach())  # bitwise the value without a derivative
    return vector


def spectrum(matrix: Float[Tensor, "*b m m"]) -> tuple[Float[Tensor, "*b m"], Float[Tensor, "*b m m"]]:
    """Return `eigh` without a derivative. Matrices that are not finite give NaN instead of an error."""
    sound = torch.isfinite(matrix).all(-1).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(sound[..., None], matrix, 0).detach())
    return torch.where(sound, values, torch.nan), torch.where(sound[..., None], vectors, torch.nan)


def times(matrix: Float[Tensor, "*b i j"], vector: Float[Tensor, "*b j"]) -> Float[Tensor, "*b i"]:
    """Return a batched matrix-vector product."""
    return (matrix @ vector[..., None])[..., 0]


def component(weights: Weights | Gradients, activations: Activations, *, center: bool = True, sign: Sign = "sum") -> FlatMaps:
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
    found = [first(centered(each, activations.dtype) if center else each, sign).scores for each in weighed]
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
