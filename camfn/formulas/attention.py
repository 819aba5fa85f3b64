"""One pure function per formula: how much each token counts, from attention and its gradients. Tensors only.

Layers are in the order of execution. A relevance of all tokens for all tokens, `(q, k)` as the papers have it, is never made:
of the product of the layers only some rows are wanted, and they are followed from the last layer to the first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from camfn._types import Attentions, Relevances, wide
from camfn.formulas.scaling import magnitude


def readers(gradient: Attentions) -> Relevances:
    """The tokens that the output reads, with weights that sum to one; `gradient` is the score's at the last layer's attention.

    A query that nothing reads has no gradient at all. So this is one for the class token and zero elsewhere where the head
    takes the class token, and equal weights where it takes the mean; also where the score has no gradient.

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


def attention_rollout(seen: Sequence[Attentions], row: Relevances) -> Relevances:
    """`row R`, `R = B_L ... B_1` with `B_l` the row-normalised `mean_h A_l + I`: attention rollout (Abnar & Zuidema, 2020).

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
    """`row R`; from `R = I`, layer by layer, `R += mean_h relu(G_l A_l) R` (Chefer et al., ICCV 2021, eq. 5 and 6).

    `unit`: a positive multiple of it, which is finite where the product over layers has no number.
    """
    total = torch.ones_like(row[:, :1])
    for attention, gradient in zip(reversed(seen), reversed(gradients)):
        row = row + _times(row, torch.relu(gradient.to(row.dtype) * attention.to(row.dtype)).mean(1))
        size = magnitude(row, -1)
        row, total = row / size, total * size
    return row if unit else row * total


def legrad(gradients: Sequence[Attentions]) -> Relevances:
    """`mean_l mean_h mean_q relu(G_l)`, G_l the gradient of layer l's own score (Bousselham et al., 2024)."""
    return torch.stack([torch.relu(g.to(wide(g.dtype))).mean((1, 2)) for g in gradients]).mean(0)


def ag_cam(logits: Sequence[Attentions], gradients: Sequence[Attentions]) -> Relevances:
    """`sum_l sum_h sum_q relu(G_l) sigmoid(S_l)`, S_l the logits of the attention (Leem & Seo, AAAI 2024)."""
    pairs = [(s.to(wide(s.dtype)), g.to(wide(g.dtype))) for s, g in zip(logits, gradients)]
    return torch.stack([(torch.relu(g) * torch.sigmoid(s)).sum((1, 2)) for s, g in pairs]).sum(0)


def _times(row: Relevances, matrix: Tensor) -> Relevances:
    return (row[:, None] @ matrix)[:, 0]
