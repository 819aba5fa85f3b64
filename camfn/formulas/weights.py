"""One pure function per formula: how much each channel counts. Tensors only, no spatial axis is named."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._types import Activations, Gradients, Scores, Weights, wide
from camfn.formulas.scaling import size_of, unit

__all__ = [
    "Alphas",
    "Moments",
    "Variant",
    "ablation",
    "contributions",
    "far_above",
    "gain",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "mean_cam",
    "means",
    "poly_cam",
    "random_cam",
    "score",
    "shapley_cam",
    "smooth_grad_cam_pp",
    "softmax",
    "with_draw",
    "xgrad_cam",
]

Alphas = Literal["paper", "authors"]
Variant = Literal["+", "-", "+-"]


def softmax(scores: Scores) -> Weights:
    """`w_k = exp(S_k) / sum_j exp(S_j)`: Score-CAM, Algorithm 1 (Wang et al., 2020). A constant added to S cancels.

    >>> import torch
    >>> softmax(torch.zeros(1, 4, 1)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    return torch.softmax(scores, 1).mT


def score(scores: Scores) -> Weights:
    """`w_k = S_k`: the weights of the Score-CAM authors' code, with probabilities for S."""
    return scores.mT


def mean_cam(activations: Activations) -> Float[Tensor, "n c"]:
    """`w_k = 1/c`: LaFAM (Karjauv and Albayrak, 2024)."""
    return torch.ones_like(activations[..., 0], dtype=wide(activations.dtype)) / activations.shape[1]


def means(activations: Activations) -> Float[Tensor, "n c"]:
    """`w_k = mean_p A_kp`: FEM (Fuad et al., 2020)."""
    return activations.to(wide(activations.dtype)).mean(-1)


def far_above(activations: Activations, k: float) -> Activations:
    """`B_kp = 1` where `A_kp > mu_k + k sigma_k`, over positions, by more than rounding; 0 elsewhere: FEM's binary maps.

    >>> import torch
    >>> far_above(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 5.0]]]), 1.9).tolist()
    [[[0.0, 0.0, 0.0, 0.0, 1.0]]]
    """
    values = unit(activations.detach().to(wide(activations.dtype)), -1)
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


def gain(scores: Scores, groups: int) -> Weights:
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


def ablation(scores: Scores, clean: Float[Tensor, "n t"]) -> Weights:
    """`w_k = (y - y^k) / |y|`: Ablation-CAM (Desai & Ramaswamy, 2020); y^k is the score without channel k.

    The paper divides by y, which turns the map about where y is negative. Where y is 0 it is the drop itself.

    >>> import torch
    >>> ablation(torch.tensor([[[1.5], [4.0]]]), torch.tensor([[2.0]])).tolist()
    [[[0.25, -1.0]]]
    """
    size = clean.abs()
    return ((clean[:, None] - scores) / torch.where(size == 0, 1, size)[:, None]).mT


def contributions(multipliers: Gradients, activations: Activations) -> Weights:
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
    own = torch.where(gradients == 0, 0, size_of(gradients[..., None], -1)[..., 0])
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
    size = size_of(gradients, -1)
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
    values = unit(activations.to(wide(activations.dtype)), -1)  # by which the quotient does not change
    total, size = values.sum(-1), values.abs().sum(-1)
    # The paper's A comes out of a ReLU, and sums to zero only where it is zero. Of other layers a sum that cancels means
    # nothing.
    none = total.abs() <= 4 * torch.finfo(activations.dtype).eps * size
    weighed = (gradients * values[:, None]).sum(-1)
    return torch.where(none[:, None], 0, weighed / torch.where(none, 1, total)[:, None])


def grad_cam_elementwise(gradients: Gradients, activations: Activations) -> Gradients:
    """`w_kp`, by which `w_kp A_kp = relu(G_kp A_kp)`: the gradient, where it has the sign of the activation."""
    sign = torch.sign(activations)[:, None]
    return torch.relu(gradients * sign) * sign


def shapley_cam(gradients: Gradients, bends: Gradients) -> Weights:
    """`w_k = mean_p (G - 1/2 H A)_kp`: ShapleyCAM (Cai, 2025); `H A` is what the score's Hessian makes of the activation."""
    return (gradients - bends / 2).mean(-1)


def _total(activations: Activations) -> Tensor:
    return activations.to(wide(activations.dtype)).sum(-1)
