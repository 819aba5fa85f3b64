"""How near two tensors must be: in units of rounding, or by a stated error."""

import numpy as np
import torch
from torch import Tensor

UNITS = 256
"""Rounding errors that `close` allows: those of float64 sums of some hundred terms, added in another order. Where maps, weights
and gradients are computed twice, 63 are the most seen, with the newest and the oldest kernels of MKL, oneDNN and ATen."""


def close(
    found: Tensor,
    expected: Tensor,
    what: str = "",
    *,
    units: float = UNITS,
    size: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """The largest difference is at most `units` times the rounding of the largest value compared.

    A unit of rounding is `eps` of the dtype of `found`, times the largest value of both tensors. Give `size`, the largest
    value that was added, where the result is the small rest of larger terms; and `dtype` where a step on the way is narrower.
    """
    if size is None:
        size = max((float(t.detach().abs().max()) for t in (found, expected) if t.numel()), default=0.0)
    unit = torch.finfo(dtype or found.dtype).eps * float(size)
    _assert_within(found, expected, units * unit, what, unit)


def assert_close(ours: Tensor, theirs: Tensor, atol: float, what: str = "") -> None:
    """The largest absolute difference is at most `atol`: 0, or the error of an approximation. For rounding there is `close`."""
    _assert_within(ours, theirs, atol, what)


def but_the_same(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, with zeros where both are NaN or the same infinity: their difference is NaN there."""
    if found.shape != expected.shape:
        return found, expected
    same = (found.isnan() & expected.isnan()) | (found.isinf() & (found == expected))
    return found.masked_fill(same, 0), expected.masked_fill(same, 0)


def _assert_within(found: Tensor, expected: Tensor, atol: float, what: str, unit: float = 0.0) -> None:
    """Fails with the index and the values of the largest difference, and its ratio to the bound."""
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    difference = (found.double() - expected.double()).abs()
    if bool((difference <= atol).all()):
        return
    flat = int(difference.nan_to_num(torch.inf).argmax())
    index = tuple(int(i) for i in np.unravel_index(flat, tuple(found.shape)))
    worst = float(difference.flatten()[flat])
    values = f"{found.flatten()[flat]:.17g} against {expected.flatten()[flat]:.17g}"
    ratio = f", {worst / atol:.3g} times the bound" if atol else ""
    rounding = f", {worst / unit:.3g} units of rounding" if unit else ""
    raise AssertionError(f"{what}: differs by {worst:.3g} (allowed {atol:.3g}{ratio}{rounding}) at {index}: {values}")
