"""The localisation metrics, against loops over pixels and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camfn import CamError, maps, metrics

TOP_LEFT = torch.zeros(4, 6, dtype=torch.bool)
TOP_LEFT[:2, :2] = True


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(row: int, column: int, shape: tuple[int, int] = (4, 6)) -> torch.Tensor:
    map = torch.zeros(shape)
    map[row, column] = 1
    return map


# ---------------------------------------------------------------------------------------------------------- energy


def test_energy_is_the_share_inside():
    map = random(4, 6)
    inside = sum(float(map[r, c]) for r in range(2) for c in range(2))
    assert float(metrics.energy_pointing_game(map, TOP_LEFT)) == pytest.approx(inside / float(map.sum()), abs=1e-12)


def test_energy_counts_what_is_negative_as_nothing():
    map = one(0, 0) - one(3, 5) * 7
    assert metrics.energy_pointing_game(map, TOP_LEFT) == 1


def test_energy_of_an_even_map_is_the_objects_share_of_the_picture():
    assert float(metrics.energy_pointing_game(torch.full((2, 3), 0.3), TOP_LEFT)) == pytest.approx(4 / 24)


def test_energy_of_nothing_is_not_a_number():
    assert math.isnan(metrics.energy_pointing_game(torch.zeros(4, 6), TOP_LEFT))
    assert math.isnan(metrics.energy_pointing_game(-torch.ones(4, 6), TOP_LEFT))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_energy_does_not_mind_the_scale(scale, seed):
    map = random(4, 6, seed=seed)
    a, b = metrics.energy_pointing_game(map, TOP_LEFT), metrics.energy_pointing_game(scale * map, TOP_LEFT)
    assert float(a) == pytest.approx(float(b), abs=1e-12)


# --------------------------------------------------------------------------------------------------------- pointing


@pytest.mark.parametrize(
    ("row", "column", "tolerance", "hit"), [(1, 1, 0, 1), (2, 1, 0, 0), (2, 2, 1, 1), (3, 1, 1, 0), (3, 3, 2, 1)]
)
def test_pointing_is_a_hit_in_the_object_or_near_it(row, column, tolerance, hit):
    assert metrics.pointing_game(one(row, column), TOP_LEFT, tolerance=tolerance) == hit


def test_pointing_of_shared_maxima_is_the_share_of_hits():
    assert metrics.pointing_game(one(0, 0) + one(3, 5) + one(3, 0), TOP_LEFT) == pytest.approx(1 / 3)
    assert metrics.pointing_game(torch.zeros(4, 6), TOP_LEFT) == pytest.approx(4 / 24)


def test_pointing_takes_signed_maps():
    assert metrics.pointing_game(one(0, 0) - 5, TOP_LEFT) == 1


@given(seed=st.integers(0, 999), tolerance=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_pointing_is_the_loop_over_pixels(seed, tolerance):
    map, mask = random(5, 7, seed=seed), random(5, 7, seed=seed + 1000) > 0.8
    y, x = divmod(int(map.argmax()), 7)
    near = any(mask[r, c] and abs(r - y) <= tolerance and abs(c - x) <= tolerance for r in range(5) for c in range(7))
    assert metrics.pointing_game(map, mask, tolerance=tolerance) == float(near)


# ------------------------------------------------------------------------------------------------------------- AUC


@given(seed=st.integers(0, 999), levels=st.sampled_from([2, 5, 1000]))
@settings(max_examples=30, deadline=None)
def test_auc_is_the_share_of_pairs_in_order(seed, levels):
    map, mask = (random(5, 7, seed=seed) * levels).floor() - 2, random(5, 7, seed=seed + 1000) > 0.6
    inside, outside = map[mask], map[~mask]
    pairs = [1.0 * bool(a > b) + 0.5 * bool(a == b) for a in inside for b in outside]
    assert float(metrics.pixel_auc(map, mask)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_is_that_of_sklearn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    map, mask = (random(40, 40) * 20).round(), random(40, 40, seed=1) > 0.7
    expected = sklearn_metrics.roc_auc_score(mask.flatten().numpy(), map.flatten().numpy())
    assert float(metrics.pixel_auc(map, mask)) == pytest.approx(expected, abs=1e-12)


def test_auc_of_a_large_picture_counts_pairs_exactly():
    """The rank sum, 2.4e9, leaves float32, in which the maps are."""
    ramp, mask = torch.arange(70_000.0)[None], torch.arange(70_000)[None] >= 20_000
    assert metrics.pixel_auc(ramp, mask) == 1
    assert metrics.pixel_auc(-ramp, mask) == 0
    assert metrics.pixel_auc(torch.zeros_like(ramp), mask) == 0.5


def test_auc_needs_pixels_on_both_sides():
    assert math.isnan(metrics.pixel_auc(one(0, 0), torch.ones(4, 6, dtype=torch.bool)))


# ------------------------------------------------------------------------------------------------------------- IoU


@given(seed=st.integers(0, 999), threshold=st.sampled_from([0.0, 0.3, 0.9]))
@settings(max_examples=30, deadline=None)
def test_iou_is_the_loop_over_pixels(seed, threshold):
    map, mask = random(5, 7, seed=seed) - 0.2, random(5, 7, seed=seed + 1000) > 0.6
    above = [(r, c) for r in range(5) for c in range(7) if map[r, c] > max(0.0, threshold * float(map.max()))]
    inside = [(r, c) for r in range(5) for c in range(7) if mask[r, c]]
    expected = len({*above} & {*inside}) / len({*above} | {*inside})
    assert float(metrics.iou(map, mask, threshold=threshold)) == pytest.approx(expected, abs=1e-12)


def test_iou_of_flat_maps():
    assert metrics.iou(torch.full((4, 6), 0.3), TOP_LEFT) == pytest.approx(4 / 24)  # all pixels are above half of the maximum
    assert metrics.iou(torch.zeros(4, 6), TOP_LEFT) == 0
    assert metrics.iou(-torch.ones(4, 6), TOP_LEFT) == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_is_a_share_of_the_maximum(threshold):
    with pytest.raises(CamError, match="must be a share of the map's maximum"):
        metrics.iou(one(0, 0), TOP_LEFT, threshold=threshold)


# ------------------------------------------------------------------------------------------------------ what all do

ALL = [metrics.energy_pointing_game, metrics.pointing_game, metrics.pixel_auc, metrics.iou]


@pytest.mark.parametrize("metric", ALL)
def test_an_empty_mask_is_no_hit_and_no_miss(metric):
    masks = torch.stack([TOP_LEFT, TOP_LEFT & False])
    found = metric(TOP_LEFT.float().expand(2, -1, -1), masks)
    assert found[0] == 1
    assert found[1].isnan()


def test_an_empty_mask_stays_empty_with_a_tolerance():
    assert metrics.pointing_game(one(0, 0), TOP_LEFT & False, tolerance=2).isnan()


@pytest.mark.parametrize("metric", ALL)
def test_maps_are_resized_to_the_masks(metric):
    map, mask = random(3, 4), random(12, 20, seed=1) > 0.5
    expected = metric(maps.resize(map, (12, 20)).round(decimals=13), mask)  # which mends the ties at the border
    assert float(metric(map, mask)) == pytest.approx(float(expected), abs=1e-12)


def test_energy_is_that_of_the_resized_map():
    map, mask = random(3, 4), random(12, 20, seed=1) > 0.5
    assert float(metrics.energy_pointing_game(map, mask)) == pytest.approx(
        float(maps.resize(map, (12, 20))[mask].sum() / maps.resize(map, (12, 20)).sum()), abs=1e-12
    )


@pytest.mark.parametrize("metric", ALL)
def test_a_batch_of_several_targets_is_each_alone(metric):
    map, mask = random(2, 3, 5, 5), random(2, 3, 10, 10, seed=1) > 0.6
    found = metric(map, mask)
    assert found.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            assert found[i, t] == pytest.approx(float(metric(map[i, t], mask[i, t])), abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("grid", "size"), [((8, 8), (300, 300)), ((5, 4), (10, 14)), ((7, 7), (32, 32))])
def test_resizing_keeps_the_ties_of_a_flat_map(grid, size, value):
    map, mask = torch.full(grid, value), torch.zeros(size, dtype=torch.bool)
    mask[: size[0] // 3, : size[1] // 2] = True
    share = float(mask.double().mean())
    assert float(metrics.pointing_game(map, mask)) == pytest.approx(share, rel=1e-6)
    assert metrics.pixel_auc(map, mask) == 0.5
    assert float(metrics.iou(map, mask, threshold=1 - 1e-7)) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", [metrics.pointing_game, metrics.pixel_auc])
def test_ties_do_not_depend_on_the_batch(metric, dtype):
    """A Gaussian has its maximum at four pixels, of which one lies in the quarter."""
    maps = metrics.centered_gaussian(torch.zeros(4, 3, 12, 10, dtype=dtype), (6, 5))
    masks = torch.zeros(4, 12, 10, dtype=torch.bool)
    masks[:, :6, :5] = True
    found = metric(maps, masks)
    for image in range(4):
        assert torch.equal(metric(maps[image : image + 1], masks[image : image + 1]), found[image : image + 1])
    assert metric is metrics.pixel_auc or float(found[0]) == 0.25


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_spatial_axes(metric, axes):
    shape = (4,) * axes
    map, mask = random(2, *shape), random(2, *shape, seed=1) > 0.5
    flat = metric(map.reshape(2, 1, -1), mask.reshape(2, 1, -1))
    assert torch.allclose(metric(map, mask, spatial_ndim=axes), flat, equal_nan=True)


@pytest.mark.parametrize("axes", [1, 3])
def test_tolerance_in_one_and_three_axes(axes):
    mask = torch.zeros(5, 5, 5)[(0,) * (3 - axes)] > 0
    mask[(0,) * axes] = True
    map = torch.zeros(mask.shape)
    map[(2,) * axes] = 1
    assert [float(metrics.pointing_game(map, mask, tolerance=t, spatial_ndim=axes)) for t in (0, 1, 2)] == [0, 0, 1]


@pytest.mark.parametrize("metric", ALL)
def test_metrics_map_over_a_batch(metric):
    map, mask = random(4, 6, 6), random(4, 6, 6, seed=1) > 0.5
    assert torch.equal(torch.func.vmap(metric)(map, mask), metric(map, mask))


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_metrics_are_float32_or_wider(metric, dtype):
    map = TOP_LEFT.to(dtype) * 3
    found = metric(map, TOP_LEFT)
    assert found == 1
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("metric", ALL)
def test_what_a_metric_does_not_take(metric):
    with pytest.raises(CamError, match=r"masks are torch\.float32: they must be bools"):
        metric(one(0, 0), TOP_LEFT.float())
    with pytest.raises(CamError, match=r"maps are torch\.complex64: they must be real"):
        metric(one(0, 0).to(torch.complex64), TOP_LEFT)
    with pytest.raises(CamError, match=r"maps have shape \(2, 4, 6\) and masks \(4, 6\): all axes but the last 2"):
        metric(torch.zeros(2, 4, 6), TOP_LEFT)
    with pytest.raises(CamError, match=r"maps have shape \(4,\) and masks"):
        metric(torch.zeros(4), TOP_LEFT)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("axes", [0, 4])
def test_there_are_one_to_three_spatial_axes(metric, axes):
    with pytest.raises(CamError, match=f"spatial_ndim={axes} must be 1, 2 or 3"):
        metric(torch.zeros(1, 1, 1, 4, 6), TOP_LEFT[None, None, None], spatial_ndim=axes)


def test_a_tolerance_does_not_hide_what_is_wrong_with_the_masks():
    with pytest.raises(CamError, match=r"masks are torch\.float32"):
        metrics.pointing_game(one(0, 0), TOP_LEFT.float(), tolerance=1)
    with pytest.raises(CamError, match=r"maps have shape \(4, 6\) and masks \(6,\)"):
        metrics.pointing_game(one(0, 0), TOP_LEFT[0], tolerance=1)


def test_metrics_map_over_a_batch_with_a_tolerance():
    map, mask = random(4, 6, 6), random(4, 6, 6, seed=1) > 0.9
    found = torch.func.vmap(lambda m, k: metrics.pointing_game(m, k, tolerance=1))(map, mask)
    assert torch.equal(found, metrics.pointing_game(map, mask, tolerance=1))


@pytest.mark.parametrize("tolerance", [-1, 1.5, True])
def test_tolerance_is_a_whole_number_of_pixels(tolerance):
    with pytest.raises(CamError, match="must be an integer number of pixels"):
        metrics.pointing_game(one(0, 0), TOP_LEFT, tolerance=tolerance)
