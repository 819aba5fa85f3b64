"""Entropy and the Gini index, against closed forms and loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camfn import CamError, metrics


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("equal", [1, 3, 12])
def test_entropy_of_equal_positions(equal):
    map = torch.zeros(12, dtype=torch.float64)
    map[:equal] = 0.3
    assert float(metrics.entropy(map.reshape(3, 4))) == pytest.approx(math.log(equal), abs=1e-12)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_entropy_is_its_sum(seed):
    map = random(4, 5, seed=seed) - 0.3
    values = [max(0.0, float(v)) for v in map.flatten()]
    shares = [v / sum(values) for v in values]
    assert float(metrics.entropy(map)) == pytest.approx(-sum(s * math.log(s) for s in shares if s), abs=1e-12)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_gini_is_the_mean_difference_of_pairs(seed):
    """Another form of it: the mean of |v_i - v_j| over all pairs, over twice the mean."""
    values = (random(4, 5, seed=seed) - 0.3).clamp(min=0).flatten()
    pairs = (values[:, None] - values[None]).abs().mean() / (2 * values.mean())
    assert float(metrics.gini(random(4, 5, seed=seed) - 0.3)) == pytest.approx(float(pairs), abs=1e-12)


def test_gini_of_one_position_of_many():
    map = torch.zeros(4, 5, dtype=torch.float64)
    map[2, 2] = 7
    assert float(metrics.gini(map)) == pytest.approx(1 - 1 / 20, abs=1e-12)


@pytest.mark.parametrize("value", [0.7, 0.0, -0.7])
def test_a_flat_map_is_the_most_complex(value):
    flat = torch.full((3, 4), value, dtype=torch.float64)
    assert float(metrics.entropy(flat)) == pytest.approx(math.log(12), abs=1e-12)
    assert float(metrics.gini(flat)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", [metrics.entropy, metrics.gini])
def test_the_scale_does_not_matter_and_batches_are_of_single_maps(metric):
    maps = random(2, 3, 4, 5) - 0.3
    found = metric(maps)
    assert found.shape == (2, 3)
    assert torch.allclose(found, metric(1e-3 * maps), rtol=1e-12)
    assert float(found[1, 2]) == pytest.approx(float(metric(maps[1, 2])), abs=1e-12)
    assert torch.allclose(metric(maps, spatial_ndim=3), metric(maps.reshape(2, 3, 20)))
    with pytest.raises(CamError, match="they must be floating-point"):
        metric(torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(CamError, match="with 2 spatial axes last"):
        metric(torch.ones(4))
