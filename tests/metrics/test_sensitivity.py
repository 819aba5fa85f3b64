"""Class sensitivity: objects and grids against loops, and on the shipped network what tells methods of a class from others."""

import functools

import pytest
import torch

import camfn
from camfn import CamError, demo, metrics

RAW = {"relu": False, "normalize": False}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ objects


def test_the_energy_on_objects_is_that_of_each_pair():
    maps, masks = random(2, 3, 4, 4) - 0.2, random(2, 5, 8, 8, seed=1) > 0.7
    found = metrics.object_energy(maps, masks)
    assert found.shape == (2, 3, 5)
    for i in range(2):
        for t in range(3):
            for k in range(5):
                assert float(found[i, t, k]) == pytest.approx(
                    float(metrics.energy_pointing_game(maps[i, t], masks[i, k])), abs=1e-12
                )


@pytest.mark.parametrize("axes", [1, 3])
def test_objects_in_one_and_three_axes(axes):
    maps, masks = random(2, 3, *(4,) * axes), random(2, 2, *(4,) * axes, seed=1) > 0.5
    flat = metrics.object_energy(maps.reshape(2, 3, 1, -1), masks.reshape(2, 2, 1, -1))
    assert torch.allclose(metrics.object_energy(maps, masks, spatial_ndim=axes), flat, equal_nan=True)


def test_the_energy_on_other_objects():
    masks = torch.zeros(1, 3, 1, 4, dtype=torch.bool)
    for k in range(3):
        masks[0, k, 0, k] = True
    maps = torch.tensor([[[[5.0, 1.0, 2.0, 9.0]], [[0.0, 1.0, -3.0, 9.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    found = metrics.other_object_energy(maps, masks)
    assert torch.allclose(found, torch.tensor([[3 / 8, 0.0, torch.nan]]), equal_nan=True)
    masks[0, 1] = False
    assert metrics.other_object_energy(maps, masks).isnan().all()


def test_a_map_of_no_class_has_its_share_on_other_objects():
    maps, masks = random(1, 1, 6, 6).expand(1, 4, 6, 6), torch.eye(4).reshape(1, 4, 2, 2) > 0
    assert float(metrics.other_object_energy(maps, masks).mean()) == pytest.approx(1 - 1 / 4, abs=1e-12)


def test_what_object_metrics_do_not_take():
    with pytest.raises(CamError, match="must be that of the targets, and of the objects"):
        metrics.object_energy(random(4, 4), random(4, 4) > 0.5)
    with pytest.raises(CamError, match="there are 3 targets and 2 objects"):
        metrics.other_object_energy(random(1, 3, 4, 4), random(1, 2, 4, 4) > 0.5)
    with pytest.raises(CamError, match="there are 1 targets and 1 objects"):
        metrics.other_object_energy(random(1, 1, 4, 4), random(1, 1, 4, 4) > 0.5)


# ------------------------------------------------------------------------------------------------ the shipped network


@functools.cache
def network() -> torch.nn.Module:
    pytest.importorskip("safetensors")
    return demo.network()


@functools.cache
def grids() -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of 2 x 2 scenes of different classes, and these classes."""
    by_class: dict[int, list[torch.Tensor]] = {c: [] for c in range(8)}
    for seed in range(60):
        scene = demo.scene(seed)
        by_class[scene.classes[0]].append(demo.preprocess(scene.image))
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(k))[:4] for k in range(12)])
    chosen = [[by_class[c][k % len(by_class[c])] for c in row] for k, row in enumerate(order.tolist())]
    return metrics.grid_of(torch.stack([torch.stack(row) for row in chosen])), order


@functools.cache
def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes of two objects: inputs, classes and masks."""
    scenes = [demo.scene(seed, 2) for seed in range(12)]
    x = torch.stack([demo.preprocess(scene.image) for scene in scenes])
    return x, torch.tensor([scene.classes for scene in scenes]), torch.stack([scene.masks for scene in scenes])


def maps_of(name: str, x: torch.Tensor, classes: torch.Tensor, **options) -> torch.Tensor:
    """`(n, t, *grid)`; a method without a class gives the same map for each."""
    maps = camfn.METHODS[name].function(network(), "features", x, classes, **RAW, **options)
    return maps if maps.ndim == 4 else maps[:, None].expand(-1, classes.shape[1], -1, -1)


def on_grids(name: str, change=lambda maps: maps) -> float:
    x, classes = grids()
    cell = torch.arange(4).expand(len(x), 4)
    return float(metrics.grid_pointing_game(change(maps_of(name, x, classes)), cell).nanmean())


BLIND = ["mean_cam", "eigen_cam", "random_cam"]


def test_grids_tell_methods_that_know_the_class():
    """Measured from outside: Grad-CAM .73, LayerCAM .37, and .25 without a class."""
    assert on_grids("grad_cam") > 0.65
    assert 0.3 < on_grids("layer_cam") < 0.5
    for name in BLIND:
        assert on_grids(name) == pytest.approx(0.25, abs=0.02), name


def test_single_objects_do_not_tell_them():
    """Lesson 1: a mask of the only object is hit as well by the mean of all channels."""
    scenes = [demo.scene(seed) for seed in range(40)]
    x = torch.stack([demo.preprocess(scene.image) for scene in scenes])
    classes, masks = torch.tensor([scene.classes for scene in scenes]), torch.stack([scene.masks for scene in scenes])
    grad, mean = (metrics.pixel_auc(maps_of(name, x, classes), masks).mean() for name in ("grad_cam", "mean_cam"))
    assert mean > 0.9
    assert abs(grad - mean) < 0.05


def test_energy_needs_the_raw_map():
    """Lesson 4: min-max adds an offset to a signed map, and its energy is spread over all cells."""

    def min_max(maps: torch.Tensor) -> torch.Tensor:
        flat = maps.flatten(2)
        low, high = flat.amin(2)[..., None, None], flat.amax(2)[..., None, None]
        return (maps - low) / (high - low)

    assert on_grids("grad_cam") > on_grids("grad_cam", min_max) + 0.3


def test_the_map_of_another_class_tells_them():
    """Lesson 5: the rank correlation is 1 without a class."""
    x, classes, masks = pairs()
    for name, low, high in (("grad_cam", -1.0, 0.5), ("layer_cam", 0.5, 0.95), ("mean_cam", 1.0, 1.0), ("eigen_cam", 1.0, 1.0)):
        maps = maps_of(name, x, classes)
        assert low <= float(metrics.rank_correlation(maps[:, 0], maps[:, 1]).mean()) <= high, name
        other = float(metrics.other_object_energy(maps, masks).nanmean())
        assert other == pytest.approx(0.5, abs=1e-6) if name in BLIND else other < 0.3, name


@pytest.mark.parametrize("changed", [metrics.permuted_classifier, metrics.random_classifier])
def test_another_classifier_tells_them(changed):
    x, classes, _ = pairs()
    state = changed(network(), x)
    alike = {
        name: float(metrics.rank_correlation(maps_of(name, x, classes), maps_of(name, x, classes, state=state)).mean())
        for name in ("grad_cam", "layer_cam", *BLIND)
    }
    assert alike["grad_cam"] < 0.5
    assert alike["layer_cam"] < 0.95
    assert [alike[name] for name in BLIND] == pytest.approx([1.0] * 3, abs=1e-6)


def test_class_metrics_are_of_each_image_alone():
    x, classes, masks = pairs()
    maps = maps_of("grad_cam", x, classes)
    order = torch.tensor([3, 0, 7])
    for metric in (metrics.object_energy, metrics.other_object_energy):
        assert torch.allclose(metric(maps, masks)[order], metric(maps[order], masks[order]), equal_nan=True)
