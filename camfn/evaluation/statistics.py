"""Means over images with their intervals, by the bootstrap."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 2000
"""The number of bootstrap samples."""


class Interval(NamedTuple):
    """A mean over images with its bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    n: int  # images with a value


def interval(values: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """The mean of the values that are not NaN, and the percentiles 2.5 and 97.5 of the means of resampled images.

    Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979.

    >>> interval(torch.tensor([1.0, 1.0, float("nan")]))
    Interval(mean=1.0, low=1.0, high=1.0, n=2)
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    chosen = torch.randint(len(known), (DRAWS, len(known)), generator=torch.Generator().manual_seed(seed))
    low, high = known[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(known.mean()), float(low), float(high), len(known))


def difference(of: Float[Tensor, " n"], to: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """The mean of the paired differences, over images where both values are known."""
    return interval(of - to, seed)
