"""Probabilities of logits. Every probability of a class, in targets and on cards, is computed here."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def probabilities(y: Float[Tensor, " k"], multi_label: bool = False) -> Float[Tensor, " k"]:
    """The probability of each of k logits: their softmax, or the sigmoid of each.

        p = softmax(y),   or   p_c = 1 / (1 + exp(-y_c))

    A single logit has no others to compare it with: its probability is its sigmoid.

    Args:
        y: the logits of one sample.
        multi_label: whether the logits are of independent labels. The probability of each is then its sigmoid.
    """
    return torch.sigmoid(y) if multi_label or y.shape[-1] == 1 else torch.softmax(y, -1)


def log_probabilities(y: Float[Tensor, " k"], multi_label: bool = False) -> Float[Tensor, " k"]:
    """The logarithm of `probabilities`, without underflow. The arguments are the same."""
    return F.logsigmoid(y) if multi_label or y.shape[-1] == 1 else torch.log_softmax(y, -1)
