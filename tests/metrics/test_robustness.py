"""Maximum sensitivity, against closed forms and a loop."""

import math

import pytest
import torch

from camfn import CamError, metrics
from camfn.formulas.noise import uniform


def inputs(n: int = 3) -> torch.Tensor:
    x = torch.rand(n, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * torch.tensor([1.0, 10.0, 0.1])[:n, None, None, None]


def first_channel(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_largest_of_the_draws(seed):
    x = inputs()
    noise = (2 * uniform(seed, 4 * 32) - 1).reshape(4, 2, 4, 4)
    for i, found in enumerate(metrics.maximum_sensitivity(first_channel, x, radius=0.1, draws=4, seed=seed)):
        spread = float(x[i].max() - x[i].min())
        changes = [float((0.1 * spread * unit[0]).norm() / x[i, 0].norm()) for unit in noise]
        assert float(found) == pytest.approx(max(changes), rel=1e-12)


def test_the_radius_is_a_share_of_each_images_range():
    """A map that scales with the input has the same sensitivity at every scale of it."""
    x = inputs()[:1]
    found = [float(metrics.maximum_sensitivity(first_channel, scale * x)) for scale in (0.01, 1.0, 255.0)]
    assert found == pytest.approx([found[1]] * 3, rel=1e-9)


def test_more_draws_and_a_larger_radius_find_more():
    x = inputs()
    few, many = (metrics.maximum_sensitivity(first_channel, x, draws=draws) for draws in (1, 20))
    assert (many >= few).all()
    assert (many > few).any()
    wide = metrics.maximum_sensitivity(first_channel, x, draws=1, radius=0.04)
    assert torch.allclose(wide, 2 * few)


def test_flat_maps_are_defined():
    x = inputs()
    assert (metrics.maximum_sensitivity(lambda x: torch.zeros(len(x), 2, 2), x) == 0).all()
    assert (metrics.maximum_sensitivity(lambda x: torch.ones(len(x), 2, 2), x) == 0).all()
    found = metrics.maximum_sensitivity(lambda x: (x != inputs()).double()[:, 0], x)
    assert (found == math.inf).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first_call", [True, False])
def test_a_map_that_is_not_finite_is_nan_alone(value, first_call):
    x = inputs()

    def explain(given):
        maps = given.clone()
        if torch.equal(given, x) == first_call:
            maps[1, 0, 0, 0] = value
        return maps

    found, expected = metrics.maximum_sensitivity(explain, x), metrics.maximum_sensitivity(lambda given: given, x)
    expected[1, 0] = math.nan
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_an_image_has_its_value_beside_any_other_and_targets_are_apart():
    x = inputs()
    together = metrics.maximum_sensitivity(lambda x: x, x)
    assert together.shape == (3, 2)
    for i in (2, 0, 1):
        assert torch.equal(metrics.maximum_sensitivity(lambda x: x, x[i : i + 1])[0], together[i])
    assert torch.equal(metrics.maximum_sensitivity(lambda x: x[:, 1], x), together[:, 1])
    assert not torch.equal(metrics.maximum_sensitivity(lambda x: x, x, seed=1), together)


def test_global_random_numbers_are_not_drawn():
    before = torch.get_rng_state()
    metrics.maximum_sensitivity(first_channel, inputs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [{"radius": 0}, {"draws": 0}, {"draws": 2.5}])
def test_what_it_does_not_take(wrong):
    with pytest.raises(CamError, match="must be positive, and draws="):
        metrics.maximum_sensitivity(first_channel, inputs(), **wrong)
