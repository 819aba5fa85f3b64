"""Non-negative matrix factorization, `V ~ W H` with `W, H >= 0`. Deterministic functions of tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camfn.formulas import components


class Factors(NamedTuple):
    """The factors `W` (`left`) and `H` (`right`) of `V ~ W H`, largest component first."""

    left: Float[Tensor, "i k"]
    right: Float[Tensor, "k j"]


def factors(values: Float[Tensor, "i j"], parts: int, steps: int) -> Factors:
    """Factorize a non-negative matrix by coordinate descent on `|V - W H|^2`.

    - `values`: `V`.
    - `parts`: the number k of components. If the rank of `V` is lower, some components are zero.
    - `steps`: the number of sweeps.

    A sweep sets each column of W, and then each row of H, to its optimum with all else fixed (HALS: Cichocki and Phan, 2009).
    The error therefore never grows. The start is the non-negative part of the singular vectors (NNDSVD: Boutsidis and
    Gallopoulos, 2008). Nothing is random.

    >>> import torch
    >>> left, right = factors(torch.tensor([[2.0, 0.0, 4.0], [0.0, 3.0, 0.0]]), 2, 10)
    >>> (left @ right).round(decimals=4).tolist()
    [[2.0, 0.0, 4.0], [0.0, 3.0, 0.0]]
    """
    left, right = _start(values.detach(), parts)
    for _ in range(steps):
        left = _sweep(left.mT, right @ values.mT, right @ right.mT).mT
        right = _sweep(right, left.mT @ values, left.mT @ left)
    order = (left.square().sum(0) * right.square().sum(1)).argsort(descending=True)
    return Factors(left[:, order], right[order])


def _sweep(rows: Float[Tensor, "k j"], product: Float[Tensor, "k j"], gram: Float[Tensor, "k k"]) -> Float[Tensor, "k j"]:
    """Set each row in turn to its optimum, `h_a <- relu(h_a + (w_a'V - w_a'W H) / |w_a|^2)`."""
    found = list(rows)
    for a in range(len(found)):
        size = gram[a, a]
        off = product[a] - gram[a] @ torch.stack(found)
        found[a] = torch.where(size > 0, torch.relu(found[a] + off / torch.where(size > 0, size, 1)), found[a])
    return torch.stack(found)


def _start(values: Float[Tensor, "i j"], parts: int) -> Factors:
    """Return the start: of each of the largest singular pairs, the larger of the positive and the negative halves."""
    wide = values.shape[0] <= values.shape[1]
    _, vectors = components.spectrum(values @ values.mT if wide else values.mT @ values)
    short = vectors.flip(-1)[:, :parts]
    long = (values.mT if wide else values) @ short  # times the singular values
    left, right = (short, long) if wide else (long, short)
    halves = [(torch.relu(sign * left), torch.relu(sign * right)) for sign in (1, -1)]
    sizes = [(w.square().sum(0) * h.square().sum(0)).sqrt() for w, h in halves]
    positive = sizes[0] >= sizes[1]
    w, h = (torch.where(positive, plus, minus) for plus, minus in zip(*halves))
    # Scale both vectors of a pair to the same length, the geometric mean of their lengths.
    lengths = w.square().sum(0).sqrt(), h.square().sum(0).sqrt()
    scale = [
        torch.where(length > 0, other / torch.where(length > 0, length, 1), 0).sqrt()
        for length, other in zip(lengths, lengths[::-1])
    ]
    return Factors(w * scale[0], (h * scale[1]).mT)
