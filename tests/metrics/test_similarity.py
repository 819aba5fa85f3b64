"""Rank correlation and SSIM of two maps, against SciPy, a loop and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camfn import CamError, metrics
from camfn.metrics import pixels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 999), levels=st.sampled_from([2, 4, 10_000]), count=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_ranks_are_those_of_a_loop(seed, levels, count):
    values = (random(count, seed=seed) * levels).floor()
    expected = [sum(float(b < a) + 0.5 * float(b == a) for b in values) + 0.5 for a in values]
    assert pixels.ranks(values).tolist() == expected


@given(seed=st.integers(0, 999), levels=st.sampled_from([3, 10_000]))
@settings(max_examples=30, deadline=None)
def test_rank_correlation_is_that_of_scipy(seed, levels):
    stats = pytest.importorskip("scipy.stats")
    a, b = ((random(2, 5, 6, seed=seed + k) * levels).floor() for k in (0, 1000))
    expected = [stats.spearmanr(a[i].flatten(), b[i].flatten()).statistic for i in range(2)]
    assert metrics.rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_an_order_and_its_reverse():
    map = random(5, 6)
    assert float(metrics.rank_correlation(map, 3 * map + 2)) == pytest.approx(1, abs=1e-12)
    assert float(metrics.rank_correlation(map, map.exp())) == pytest.approx(1, abs=1e-12)
    assert float(metrics.rank_correlation(map, -map)) == pytest.approx(-1, abs=1e-12)


def test_flat_maps_are_equal_to_each_other_and_unlike_others():
    flat, map = torch.full((5, 6), 0.3), random(5, 6).float()
    assert metrics.rank_correlation(flat, 0 * map) == 1
    assert metrics.rank_correlation(flat, map) == 0
    assert metrics.ssim(flat, 0 * map) == 1
    assert 0 < metrics.ssim(flat, map) < 0.1


def test_ssim_is_its_formula_at_each_position():
    a, b = random(7, 9), random(7, 9, seed=1)
    one, other = ((m - m.min()) / (m.max() - m.min()) for m in (a, b))
    bell = [math.exp(-0.5 * (d / 1.5) ** 2) for d in range(-5, 6)]
    total = 0.0

    def mirrored(at: int, side: int) -> int:
        at = abs(at) % (2 * side - 2)
        return min(at, 2 * side - 2 - at)

    for y in range(7):
        for x in range(9):
            near = [
                (bell[i] * bell[j] / sum(bell) ** 2, mirrored(y + i - 5, 7), mirrored(x + j - 5, 9))
                for i in range(11)
                for j in range(11)
            ]
            ma, mb = (sum(w * float(m[r, c]) for w, r, c in near) for m in (one, other))
            saa, sbb, sab = (
                sum(w * (float(p[r, c]) - mp) * (float(q[r, c]) - mq) for w, r, c in near)
                for p, mp, q, mq in ((one, ma, one, ma), (other, mb, other, mb), (one, ma, other, mb))
            )
            c1, c2 = 0.01**2, 0.03**2
            total += (2 * ma * mb + c1) * (2 * sab + c2) / ((ma**2 + mb**2 + c1) * (saa + sbb + c2))
    assert float(metrics.ssim(a, b)) == pytest.approx(total / 63, abs=1e-12)


def test_ssim_of_equal_and_of_opposite_maps():
    map = random(12, 12).float()
    assert metrics.ssim(map, 5 * map - 1) == pytest.approx(1, abs=1e-5)
    assert metrics.ssim(map, -map) < 0
    assert metrics.ssim(map, map + 0.1 * random(12, 12, seed=1).float()) > metrics.ssim(map, random(12, 12, seed=1).float())


@pytest.mark.parametrize("metric", [metrics.rank_correlation, metrics.ssim])
def test_maps_are_compared_pair_by_pair(metric):
    a, b = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=1)
    found = metric(a, b)
    assert found.shape == (2, 3)
    assert torch.allclose(found, metric(b, a), rtol=1e-9)
    assert float(found[1, 2]) == pytest.approx(float(metric(a[1, 2], b[1, 2])), abs=1e-12)
    assert torch.allclose(torch.func.vmap(metric)(a, b), found)
    assert metric(a, b, spatial_ndim=1).shape == (2, 3, 6)
    assert metric(a.half(), b.half()).dtype == torch.float32
    with pytest.raises(CamError, match="they must be the same"):
        metric(a, b[:1])
