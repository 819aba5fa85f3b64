"""How much each channel counts: one pure function per formula, named after its method. Tensors only."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._types import Activations, Gradients, Scores, Weights, wide
from camfn.formulas.scaling import magnitude, rescale

__all__ = [
    "Alphas",
    "FemForm",
    "Moments",
    "Variant",
    "Weighting",
    "ablation_cam",
    "cam",
    "far_above",
    "fem",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "group_cam",
    "hires_cam",
    "layer_cam",
    "lift_cam",
    "mean_cam",
    "opti_cam",
    "poly_cam",
    "random_cam",
    "score_cam",
    "shapley_cam",
    "smooth_grad_cam_pp",
    "winsor_cam",
    "with_draw",
    "xgrad_cam",
]

Alphas = Literal["paper", "authors"]
FemForm = Literal["mean", "share"]
Weighting = Literal["softmax", "score"]
Variant = Literal["+", "-", "+-"]


def score_cam(scores: Scores, weighting: Weighting = "softmax") -> Weights:
    """Score-CAM: `w_k = exp(S_k) / sum_j exp(S_j)`, or `w_k = S_k` for `weighting="score"` (Wang et al., 2020).

    `scores (n, c, t)` are those of the masked inputs, one for each channel. Algorithm 1 of the paper takes the softmax over
    channels, in which a constant added to S cancels. The authors' code has probabilities for S and no softmax.

    >>> import torch
    >>> score_cam(torch.zeros(1, 4, 1)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    return torch.softmax(scores, 1).mT if weighting == "softmax" else scores.mT


def cam(score: Callable[[Tensor], Weights], matrix: Float[Tensor, "classes c"]) -> Weights:
    """CAM: `w_k = s(W_k)`, with W the matrix of the linear layer behind the pooling (Zhou et al., 2016).

    `score` maps a matrix to the target's score of each column `W_k`, read as logits: for a class it picks the row `W_ck`.
    """
    return score(matrix)


def mean_cam(activations: Activations) -> Float[Tensor, "n c"]:
    """LaFAM: `w_k = 1/c` (Karjauv and Albayrak, 2024)."""
    return torch.ones_like(activations[..., 0], dtype=wide(activations.dtype)) / activations.shape[1]


def fem(activations: Activations, k: float = 2.0, form: FemForm = "mean") -> tuple[Float[Tensor, "n c"], Activations]:
    """FEM: `L = sum_k mu_k B_k` with `B = far_above(A, k)` (Fuad et al., 2020). Returns the weights and the values summed.

    `form="share"`, as in pytorch-grad-cam: `L = sum_k mean(B_k) A_k`.
    """
    strong = far_above(activations, k)
    if form == "share":
        return strong.mean(-1), activations
    return activations.to(wide(activations.dtype)).mean(-1), strong


def far_above(activations: Activations, k: float) -> Activations:
    """`B_kp = 1` where `A_kp > mu_k + k sigma_k`, over positions, by more than rounding; 0 elsewhere: FEM's binary maps.

    >>> import torch
    >>> far_above(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 5.0]]]), 1.9).tolist()
    [[[0.0, 0.0, 0.0, 0.0, 1.0]]]
    """
    values = rescale(activations.detach().to(wide(activations.dtype)), -1)
    off = values - values.mean(-1, keepdim=True)
    sigma = off.square().mean(-1, keepdim=True).sqrt()
    # One position alone above zero is sqrt(p - 1) deviations above the mean: with five, two, and rounding must not tell.
    rounding = 16 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return (off > k * sigma + rounding).to(values.dtype)


def random_cam(drawn: Float[Tensor, "*c"], activations: Activations) -> Float[Tensor, "n c"]:
    """`w_k = 2 u_k - 1`, of `u_k` in [0, 1), for each image."""
    return (2 * drawn - 1).to(activations.device, wide(activations.dtype)).expand(activations.shape[0], -1)


# ------------------------------------------------------------------------- of gradients G `(n, t, c, p)`, float32 or wider


def grad_cam(gradients: Gradients) -> Weights:
    """`w_k = mean_p G_kp`: Grad-CAM (Selvaraju et al., 2017)."""
    return gradients.mean(-1)


def group_cam(scores: Scores, groups: int) -> Weights:
    """`w_tg = relu(S_g - S_0)`: Group-CAM (Zhang et al., 2021).

    `scores (n, t * g + 1, t)` are of every target's groups, each scored for all targets; the last is of no group.
    """
    n, _, t = scores.shape
    own = scores[:, :-1].reshape(n, t, groups, t).diagonal(dim1=1, dim2=3)  # (n, g, t)
    return torch.relu(own - scores[:, -1:]).mT


def poly_cam(scores: Scores, clean: Float[Tensor, "n t"], flat: Bool[Tensor, "n c"], variant: Variant = "+-") -> Weights:
    """`s(x M_k)`, `relu(s(x) - s(x (1 - M_k)))`, or the ReLU of their sum: Poly-CAM (Englebert et al., 2022).

    `scores` are of masks M, of masks 1 - M, or of both, one after the other. Where a channel is flat, M is zero.

    >>> import torch
    >>> kept, left, clean = torch.tensor([[[0.25], [0.5]]]), torch.tensor([[[0.25], [1.0]]]), torch.tensor([[0.5]])
    >>> poly_cam(torch.cat([kept, left], 1), clean, torch.zeros(1, 2, dtype=torch.bool)).tolist()
    [[[0.5, 0.0]]]
    """
    if variant == "+":
        return scores.mT
    left = torch.where(flat[..., None], clean[:, None], scores[:, -flat.shape[1] :])
    fall = clean[:, None] - left
    return torch.relu(fall if variant == "-" else scores[:, : flat.shape[1]] + fall).mT


def ablation_cam(scores: Scores, clean: Float[Tensor, "n t"]) -> Weights:
    """`w_k = (y - y^k) / |y|`: Ablation-CAM (Desai & Ramaswamy, 2020); y^k is the score without channel k.

    The paper divides by y, which turns the map about where y is negative. Where y is 0 it is the drop itself.

    >>> import torch
    >>> ablation_cam(torch.tensor([[[1.5], [4.0]]]), torch.tensor([[2.0]])).tolist()
    [[[0.25, -1.0]]]
    """
    size = clean.abs()
    return ((clean[:, None] - scores) / torch.where(size == 0, 1, size)[:, None]).mT


def lift_cam(multipliers: Gradients, activations: Activations) -> Weights:
    """`w_k = sum_p m_kp A_kp`: LIFT-CAM (Jung & Oh, 2021), of DeepLIFT's multipliers with a baseline of zero."""
    return (multipliers * activations[:, None]).sum(-1)


class Moments(NamedTuple):
    """Sums of the first three powers of gradients over draws, in units of `size`."""

    size: Gradients  # of each gradient, the largest of its draws' powers of two; 0 where all are 0
    first: Gradients
    second: Gradients
    third: Gradients


def with_draw(held: Moments | None, gradients: Gradients) -> Moments:
    """The moments with one more draw. The cube of 1e-15 is 0 in float32: so each gradient has its own unit."""
    own = torch.where(gradients == 0, 0, magnitude(gradients[..., None], -1)[..., 0])
    size = own if held is None else torch.maximum(held.size, own)
    some = torch.where(size == 0, 1, size)
    share = gradients / some
    powers = share, share**2, share**3
    if held is not None:
        grown = held.size / some
        powers = (held.first * grown + powers[0], held.second * grown**2 + powers[1], held.third * grown**3 + powers[2])
    return Moments(size, *powers)


def grad_cam_pp(gradients: Gradients, activations: Activations, alphas: Alphas = "paper") -> Weights:
    """`w_k = sum_p a_kp relu(G_kp)`, `a = G^2 / (2 G^2 + S_k G^3)`, `S_k = sum_p A_kp`: Grad-CAM++, equation 19.

    `alphas="authors"`: as their code has it, alphas sum to one over a channel's positions of positive gradient.

    >>> import torch
    >>> grad_cam_pp(torch.tensor([[[[1.0, 2.0, -1.0]]]]), torch.tensor([[[1.0, 0.0, 1.0]]])).tolist()
    [[[0.5833333730697632]]]
    """
    size = magnitude(gradients, -1)
    g, total = torch.relu(gradients / size), _total(activations)[:, None, :, None]
    # Where G > 0, the only places that count, alpha is 1 / (2 + S G): a cube of small gradients would be 0. With G in units
    # of a channel's size so is alpha, in units of one over it, and S G stays within the dtype.
    below = 2 / size + total * g
    # Where the denominator is not positive, alpha is 0. S can be negative, of which the paper does not speak: the exponential
    # that equation 19 comes from has no such derivatives there. pytorch-grad-cam keeps the alpha, of the other sign.
    counts = (below > 0) & (g > 0)
    alpha = torch.where(counts, 1 / torch.where(counts, below, 1), 0)
    if alphas == "authors":
        alpha = alpha / torch.where(counts.any(-1), alpha.sum(-1), 1)[..., None] * size
    return (alpha * g).sum(-1)


def smooth_grad_cam_pp(moments: Moments, draws: int, activations: Activations) -> Weights:
    """`w_k = sum_p a_kp relu(D1_kp)`, `a = D2 / (2 D2 + S_k D3)`; D1, D2, D3 are means of G, G^2, G^3 over noisy inputs.

    Smooth Grad-CAM++ (Omeiza et al., 2019). The paper prints D1 as the numerator of alpha; without noise that would not be
    Grad-CAM++. D2 stands here, as in torchcam.
    """
    first, second, third = (total / draws for total in moments[1:])
    # In units of the size z of each gradient: a is alpha / z, and D1 is z times `first`.
    below = 2 * second / torch.where(moments.size == 0, 1, moments.size) + _total(activations)[:, None, :, None] * third
    counts = below > 0
    alpha = torch.where(counts, second / torch.where(counts, below, 1), 0)
    return (alpha * torch.relu(first)).sum(-1)


def xgrad_cam(gradients: Gradients, activations: Activations) -> Weights:
    """`w_k = sum_p G_kp A_kp / sum_p A_kp`: XGrad-CAM (Fu et al., 2020). 0 where A sums to zero up to its rounding.

    >>> import torch
    >>> xgrad_cam(torch.tensor([[[[1.0, 3.0], [1.0, 1.0]]]]), torch.tensor([[[2.0, 2.0], [1.0, -1.0]]])).tolist()
    [[[2.0, 0.0]]]
    """
    values = rescale(activations.to(wide(activations.dtype)), -1)  # by which the quotient does not change
    total, size = values.sum(-1), values.abs().sum(-1)
    # The paper's A comes out of a ReLU, and sums to zero only where it is zero. Of other layers a sum that cancels means
    # nothing.
    none = total.abs() <= 4 * torch.finfo(activations.dtype).eps * size
    weighed = (gradients * values[:, None]).sum(-1)
    return torch.where(none[:, None], 0, weighed / torch.where(none, 1, total)[:, None])


def hires_cam(gradients: Gradients) -> Gradients:
    """HiResCAM: `w_kp = G_kp`, so that `L = sum_k G_k * A_k` (Draelos and Carin, 2020)."""
    return gradients


def layer_cam(gradients: Gradients) -> Gradients:
    """LayerCAM: `w_kp = relu(G_kp)` (Jiang et al., 2021)."""
    return torch.relu(gradients)


def grad_cam_elementwise(gradients: Gradients, activations: Activations) -> Gradients:
    """`w_kp`, by which `w_kp A_kp = relu(G_kp A_kp)`: the gradient, where it has the sign of the activation."""
    sign = torch.sign(activations)[:, None]
    return torch.relu(gradients * sign) * sign


def shapley_cam(gradients: Gradients, bends: Gradients) -> Weights:
    """`w_k = mean_p (G - 1/2 H A)_kp`: ShapleyCAM (Cai, 2025); `H A` is what the score's Hessian makes of the activation."""
    return (gradients - bends / 2).mean(-1)


def _total(activations: Activations) -> Tensor:
    return activations.to(wide(activations.dtype)).sum(-1)


_MEMORY, _SQUARES, _EPS = 0.9, 0.999, 1e-8  # Adam's


def opti_cam(gradient: Callable[[Tensor], Tensor], u: Tensor, steps: int = 50, rate: float = 0.1) -> Tensor:
    """Opti-CAM: `w = softmax(u)`, with u after `steps` steps of Adam that maximize a score (Zhang et al., 2023).

    `gradient` gives that of the score with respect to u `(b, c)`. The steps are those of `torch.optim.Adam` with the opposite
    sign (Kingma and Ba, 2014).
    """
    memory, squares, size = torch.zeros_like(u), torch.zeros_like(u), torch.ones_like(u)
    for step in range(1, steps + 1):
        g = gradient(u)
        memory = _MEMORY * memory + (1 - _MEMORY) * g
        # In units of the largest slope so far, from 1 on: its square may have no number. What is far below 1 is as nothing
        # beside `_EPS`.
        before, size = size, torch.maximum(size, magnitude(g[..., None], -1)[..., 0])
        squares = _SQUARES * squares * (before / size).square() + (1 - _SQUARES) * (g / size).square()
        mean = squares / (1 - _SQUARES**step)
        # The inner `where`: the root of zero, where a channel has no part, has no derivative.
        root = torch.where(mean > 0, torch.where(mean > 0, mean, 1).sqrt(), 0) * size
        u = u + rate / (1 - _MEMORY**step) * memory / (root + _EPS)
    return torch.softmax(u, -1)


def winsor_cam(weights: Sequence[Weights | Gradients], percentile: float) -> Float[Tensor, "l n t"]:
    """Winsor-CAM: the share `v` of each layer's map, of its channels' weights (Wall et al., 2026).

    A layer's importance is the mean of its weights, 0 if that is negative. Importances above their `percentile` are cut down to
    it, and scaled to [0.1, 1] by min-max. Layers of importance 0 have no share, and do not count in the percentile.
    """
    importance = torch.relu(torch.stack([w.flatten(2).mean(-1) for w in weights]))
    counts = importance > 0
    bound = torch.where(counts, importance, torch.nan).nanquantile(percentile / 100, dim=0)
    cut = torch.where(counts, torch.minimum(importance, bound), 0)
    low, high = torch.where(counts, cut, torch.inf).amin(0), cut.amax(0)
    even = ~(high > low)  # one layer that counts, or several that count the same, or none
    scaled = 0.1 + 0.9 * (cut - torch.where(even, 0, low)) / torch.where(even, 1, high - low)
    return torch.where(counts, torch.where(even, 1, scaled), 0)
