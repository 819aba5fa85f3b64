"""What all metrics of maps keep to: the order of images and of classes, rescaling, neighbors, and dtypes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from camfn import metrics

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of maps and other maps `(n, t, h, w)` and masks `(n, t, 8, 8)`, to `(n, t)`."""


METRICS: dict[str, Metric] = {
    "energy_pointing_game": lambda maps, other, masks: metrics.energy_pointing_game(maps, masks),
    "pointing_game": lambda maps, other, masks: metrics.pointing_game(maps, masks),
    "pointing_game with a tolerance": lambda maps, other, masks: metrics.pointing_game(maps, masks, tolerance=1),
    "pixel_auc": lambda maps, other, masks: metrics.pixel_auc(maps, masks),
    "iou": lambda maps, other, masks: metrics.iou(maps, masks),
    "entropy": lambda maps, other, masks: metrics.entropy(maps),
    "gini": lambda maps, other, masks: metrics.gini(maps),
    "rank_correlation": lambda maps, other, masks: metrics.rank_correlation(maps, other),
    "ssim": lambda maps, other, masks: metrics.ssim(maps, other),
    "other_object_energy": lambda maps, other, masks: metrics.other_object_energy(maps, masks),
    "grid_pointing_game": lambda maps, other, masks: metrics.grid_pointing_game(
        maps, torch.arange(maps.shape[1]).expand(maps.shape[:2])
    ),
    "maximum_sensitivity": lambda maps, other, masks: metrics.maximum_sensitivity(lambda x: x * x, maps),
    "target_sensitivity": lambda maps, other, masks: metrics.target_sensitivity(
        metrics.object_energy(maps, masks), metrics.object_energy(other, masks)
    )[:, None].expand(maps.shape[:2]),
}
RANKING = ["pointing_game", "pointing_game with a tolerance", "pixel_auc", "rank_correlation"]
"""Metrics that only read the order of a map's values. They are asked at the masks' size: resizing mixes values."""
WITH_A_PLACE = ["grid_pointing_game", "maximum_sensitivity"]
"""Here each class has a cell, or noise, of its own."""

every_metric = pytest.mark.parametrize("name", METRICS)


def drawn(seed: int = 0, side: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps, other = (torch.rand(4, 3, side, side, generator=generator, dtype=torch.float64) - 0.3 for _ in range(2))
    masks = torch.rand(4, 3, 8, 8, generator=generator) > 0.7
    return maps.to(dtype), other.to(dtype), masks


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@every_metric
def test_permuting_images_permutes_the_result(name):
    given, order = drawn(), torch.tensor([2, 0, 3, 1])
    assert same(METRICS[name](*(part[order] for part in given)), METRICS[name](*given)[order])


@every_metric
def test_an_image_has_its_value_beside_any_other(name):
    given = drawn()
    whole = METRICS[name](*given)
    assert whole.shape == (4, 3)
    for i in range(4):
        assert same(METRICS[name](*(part[i : i + 1] for part in given))[0], whole[i])


@every_metric
def test_metrics_map_over_a_batch(name):
    given = drawn()
    mapped = torch.func.vmap(lambda *one: METRICS[name](*(part[None] for part in one))[0])(*given)
    assert same(mapped, METRICS[name](*given))


@pytest.mark.parametrize("name", [name for name in METRICS if name not in WITH_A_PLACE])
def test_permuting_classes_permutes_the_result(name):
    given, order = drawn(), torch.tensor([2, 0, 1])
    assert same(METRICS[name](*(part[:, order] for part in given)), METRICS[name](*given)[:, order])


@every_metric
def test_the_scale_of_a_map_does_not_matter(name):
    maps, other, masks = drawn()
    assert same(METRICS[name](1024 * maps, other, masks), METRICS[name](maps, other, masks))


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("rescale", [lambda maps: 3 * maps - 7, torch.exp, lambda maps: maps**3], ids=["affine", "exp", "cube"])
def test_rescaling_that_keeps_the_order_changes_no_ranking_metric(name, rescale):
    maps, other, masks = drawn(side=8)
    assert same(METRICS[name](rescale(maps), other, masks), METRICS[name](maps, other, masks))


@every_metric
def test_the_same_call_gives_the_same_value_and_draws_nothing(name):
    before = torch.get_rng_state()
    assert torch.equal(METRICS[name](*drawn()).nan_to_num(7), METRICS[name](*drawn()).nan_to_num(7))
    assert torch.equal(torch.get_rng_state(), before)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_value_is_float32_or_wider(name, dtype):
    assert METRICS[name](*drawn(dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)


@every_metric
@pytest.mark.parametrize("level", [-0.5, 0.0, 0.5])
def test_flat_maps_have_a_value_or_none_and_never_an_error(name, level):
    maps, other, masks = drawn()
    found = METRICS[name](torch.full_like(maps, level), other, masks)
    assert found.shape == (4, 3)
    energy = name in ("energy_pointing_game", "other_object_energy", "grid_pointing_game")
    if energy and level <= 0:
        assert found.isnan().all()
    elif name != "target_sensitivity":
        assert found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("maximum_sensitivity", "target_sensitivity")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_a_map_that_is_not_finite_is_nan_alone(name, value, whole):
    """These two have a value of all targets of an image; their own tests ask it."""
    given = drawn()
    expected = METRICS[name](*given)
    for part in given[:2] if name in ("rank_correlation", "ssim") else given[:1]:
        maps = part.clone()
        maps[1, 2, :, slice(None) if whole else 0] = value
        expected[1, 2] = torch.nan
        found = METRICS[name](*(maps if other is part else other for other in given))
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    if name in ("rank_correlation", "ssim"):
        assert METRICS[name](maps, maps, given[2])[1, 2].isnan()


@pytest.mark.parametrize("name", ["entropy", "gini", "energy_pointing_game", "other_object_energy", "grid_pointing_game"])
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**127])
def test_metrics_of_energy_do_not_overflow(name, scale):
    maps, other, masks = drawn(dtype=torch.float32)
    assert torch.equal(METRICS[name](scale * maps, other, masks).nan_to_num(7), METRICS[name](maps, other, masks).nan_to_num(7))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_leave_their_arguments(name):
    given = drawn()
    copies = [part.clone() for part in given]
    METRICS[name](*given)
    assert all(torch.equal(a, b) for a, b in zip(given, copies))
