"""One pure function per formula: how much each channel counts. Tensors only, no spatial axis is named."""

import torch

from camfn._types import Gradients, Scores, Weights


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
