"""Bootstrap intervals, beside a closed form and a loop."""

import torch

from camfn.evaluation import statistics
from camfn.evaluation.statistics import difference, interval


def test_the_interval_of_many_normal_values_is_that_of_the_central_limit():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, error = interval(values), float(values.std(correction=0)) / 20
    assert found.mean == float(values.mean())
    # The percentiles of 2000 draws have an error of some 5 % of the width.
    assert abs(found.low - (found.mean - 1.96 * error)) < 0.3 * error
    assert abs(found.high - (found.mean + 1.96 * error)) < 0.3 * error


def test_two_values_have_the_interval_of_their_four_samples():
    """Of the four samples of two values one is all low and one all high: 25 % each, so that both ends are in the interval."""
    assert interval(torch.tensor([0.0, 1.0]))[:3] == (0.5, 0, 1)
    assert interval(torch.tensor([0.0, 1.0, 1.0, 1.0]), seed=1).low > 0, "0 has a chance of 1 in 256"


def test_what_is_not_known_does_not_count():
    nan = float("nan")
    assert interval(torch.tensor([2.0, nan, 4.0])).n == 2
    assert interval(torch.tensor([2.0, nan, 4.0])).mean == 3
    assert interval(torch.full((3,), nan)).n == 0


def test_differences_are_paired():
    """A shift by one is sure, however far the values are spread."""
    values = torch.tensor([0.0, 50.0, 100.0, -70.0])
    assert difference(values + 1, values)[:3] == (1, 1, 1)
    assert difference(values, torch.tensor([0.0, float("nan"), 1.0, 2.0])).n == 3


def test_one_value_has_no_interval():
    found = interval(torch.tensor([0.5, torch.nan]))
    assert (found.mean, found.n) == (0.5, 1)
    assert torch.tensor([found.low, found.high]).isnan().all()


def test_many_values_are_drawn_in_parts(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = interval(values)
    monkeypatch.setattr(statistics, "_VALUES", 1000)
    assert interval(values) == whole
