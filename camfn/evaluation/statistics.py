"""Means over images with their intervals, by the bootstrap."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 2000
"""The number of bootstrap samples."""
_VALUES = 1 << 22
"""The number of values that are drawn at once."""


class Interval(NamedTuple):
    """A mean over images with its bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    n: int  # images with a value


def interval(values: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """The mean of the values that are not NaN, and the percentiles 2.5 and 97.5 of the means of resampled images.

    One image has no interval: its ends are NaN.

    Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979.

    >>> interval(torch.tensor([1.0, 1.0, float("nan")]))
    Interval(mean=1.0, low=1.0, high=1.0, n=2)
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if len(known) == 1:
        return Interval(float(known), float("nan"), float("nan"), 1)
    generator = torch.Generator().manual_seed(seed)
    draws = [len(part) for part in torch.arange(DRAWS).split(max(1, _VALUES // len(known)))]
    means = [known[torch.randint(len(known), (count, len(known)), generator=generator)].mean(1) for count in draws]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(known.mean()), float(low), float(high), len(known))


def difference(of: Float[Tensor, " n"], to: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """The mean of the paired differences, over images where both values are known."""
    return interval(of - to, seed)
