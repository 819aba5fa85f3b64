"""Token relevance from attention and its gradients: one pure function of tensors per formula.

Layers are in the order of execution. The papers multiply matrices `(q, k)` of all layers. Only some rows of the product are
needed, so these functions multiply a row vector by the layers, from the last to the first.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from camfn._types import Attentions, Relevances, wide
from camfn.formulas.scaling import magnitude


def readers(gradient: Attentions) -> Relevances:
    """The tokens that the output reads, as weights that sum to one.

    - `gradient`: the gradient of the score at the attention of the last layer.

    A query that the output does not read has a gradient of zero. If the head reads the class token, this token gets weight 1
    and the others 0. If the head takes the mean, or if the whole gradient is zero, all weights are equal.

    >>> import torch
    >>> readers(torch.tensor([[[[0.0, 2.0], [0.0, 0.0]]]])).tolist()
    [[1.0, 0.0]]
    """
    read = (gradient != 0).any(3).any(1).to(wide(gradient.dtype))
    some = read.sum(-1, keepdim=True) > 0
    read = torch.where(some, read, 1)
    return read / read.sum(-1, keepdim=True)


def row_of(gradient: Attentions, query: int) -> Relevances:
    """The row of one token: 1 for it, 0 for the others."""
    others = torch.zeros_like(readers(gradient))
    query = query % gradient.shape[2]
    return torch.cat([others[:, :query], others[:, :1] + 1, others[:, query + 1 :]], 1)


def attended(seen: Sequence[Attentions]) -> Bool[Tensor, "n k"]:
    """The tokens that some query attends to, in some head of some layer. Masks exclude the others, such as padding.

    >>> import torch
    >>> attended([torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.1, 0.9, 0.0]]]])]).tolist()
    [[True, True, False]]
    """
    return torch.stack([(attention > 0).any(2).any(1) for attention in seen]).any(0)


def attention_rollout(seen: Sequence[Attentions], row: Relevances) -> Relevances:
    """Attention rollout (Abnar & Zuidema, 2020).

        row B_L ... B_1,   with B_l the row-normalized mean_h A_l + I

    >>> import torch
    >>> even = torch.full((1, 1, 2, 2), 0.5)
    >>> attention_rollout([even], torch.tensor([[1.0, 0.0]])).tolist()
    [[0.75, 0.25]]
    """
    for attention in reversed(seen):
        mixed = attention.to(row.dtype).mean(1)
        row = row / (mixed.sum(-1) + 1)
        row = row + _times(row, mixed)
    return row


def gradient_attention(
    seen: Sequence[Attentions], gradients: Sequence[Attentions], row: Relevances, *, unit: bool = False
) -> Relevances:
    """Gradient-weighted attention (Chefer et al., ICCV 2021, eq. 5 and 6).

        row R,   R = I at first, then R += mean_h relu(G_l A_l) R for each layer l

    - `unit`: return a positive multiple, which is finite even if the product over layers overflows.
    """
    total = torch.ones_like(row[:, :1])
    for attention, gradient in zip(reversed(seen), reversed(gradients)):
        row = row + _times(row, torch.relu(gradient.to(row.dtype) * attention.to(row.dtype)).mean(1))
        size = magnitude(row, -1)
        row, total = row / size, total * size
    return row if unit else row * total


def mean_token(tokens: Tensor, axis: int) -> Tensor:
    """LeGrad's `mean over tokens of Z`, in the place of every token (Bousselham et al., 2024)."""
    return tokens.mean(axis, keepdim=True).expand_as(tokens)


def legrad(gradients: Sequence[Attentions]) -> Relevances:
    """LeGrad (Bousselham et al., 2024).

    mean_l mean_h mean_q relu(G_l),   with G_l the gradient of the score of layer l
    """
    return torch.stack([torch.relu(g.to(wide(g.dtype))).mean((1, 2)) for g in gradients]).mean(0)


def ag_cam(logits: Sequence[Attentions], gradients: Sequence[Attentions]) -> Relevances:
    """Attention-guided CAM (Leem & Seo, AAAI 2024).

    sum_l sum_h sum_q relu(G_l) sigmoid(S_l),   with S_l the logits of the attention of layer l
    """
    pairs = [(s.to(wide(s.dtype)), g.to(wide(g.dtype))) for s, g in zip(logits, gradients)]
    return torch.stack([(torch.relu(g) * torch.sigmoid(s)).sum((1, 2)) for s, g in pairs]).sum(0)


def _times(row: Relevances, matrix: Tensor) -> Relevances:
    return (row[:, None] @ matrix)[:, 0]
