"""One pure function per formula: how much each channel counts. Tensors only, no spatial axis is named."""

import torch
from jaxtyping import Float
from torch import Tensor

from camfn._types import Activations, Gradients, Scores, Weights, wide


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
    values = activations.detach().to(wide(activations.dtype))
    off = values - values.mean(-1, keepdim=True)
    sigma = off.square().mean(-1, keepdim=True).sqrt()
    # One position alone above zero is sqrt(p - 1) deviations above the mean: with five, two, and rounding must not tell.
    rounding = 16 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return (off > k * sigma + rounding).to(values.dtype)


def random_cam(drawn: Float[Tensor, "*c"], activations: Activations) -> Float[Tensor, "n c"]:
    """`w_k = 2 u_k - 1`, of `u_k` in [0, 1), for each image."""
    return (2 * drawn - 1).to(activations.device, wide(activations.dtype)).expand(activations.shape[0], -1)


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
