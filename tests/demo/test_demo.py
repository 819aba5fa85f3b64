"""The scenes (their masks, their independence of the class) and the network that ships (accuracy, and where its maps lie)."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import camfn
from camfn import demo, metrics
from camfn.demo import scenes, train
from camfn.demo.network import WEIGHTS

SEEDS = st.integers(0, 10_000)
COUNT = 200
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def unseen() -> list[demo.Scene]:
    """Single-object scenes that the network was not trained on."""
    return [demo.scene(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def network() -> torch.nn.Sequential:
    return demo.network()


def stacked(found: list[demo.Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, classes and masks of single-object scenes."""
    x = torch.stack([demo.preprocess(s.image) for s in found])
    return x, torch.tensor([s.classes[0] for s in found]), torch.stack([s.masks[0] for s in found])


# --------------------------------------------------------------------------------------------------------- the scenes


@given(seed=SEEDS, objects=st.integers(1, 3), height=st.integers(1, 70), width=st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_a_scene_is_a_picture_masks_and_classes(seed, objects, height, width):
    image, masks, classes = demo.scene(seed, objects, size=(height, width))
    assert (image.shape, image.dtype) == ((3, height, width), torch.float32)
    assert image.min() >= 0
    assert image.max() <= 1
    assert (masks.shape, masks.dtype) == ((objects, height, width), torch.bool)
    assert masks.sum(0).max() <= 1  # a pixel belongs to one object at most
    assert len(set(classes)) == objects
    assert set(classes) <= set(range(len(demo.CLASSES)))


@given(seed=SEEDS, objects=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_the_same_seed_is_the_same_scene(seed, objects):
    state = torch.get_rng_state()
    (a, masks, classes), (b, again, same) = demo.scene(seed, objects), demo.scene(seed, objects)
    assert torch.equal(a, b)
    assert torch.equal(masks, again)
    assert classes == same
    assert not torch.equal(a, demo.scene(seed + 1, objects).image)
    assert torch.equal(torch.get_rng_state(), state)


def test_there_are_eight_shapes_and_all_are_drawn(unseen):
    assert len(demo.CLASSES) >= 8
    assert {s.classes[0] for s in unseen} == set(range(len(demo.CLASSES)))


@given(seed=SEEDS, names=st.permutations(demo.CLASSES))
@settings(max_examples=15, deadline=None)
def test_nothing_but_the_shape_depends_on_the_class(seed, names):
    """Away from either shape two scenes of one seed are equal, and where both are, the paint is the same."""
    a, b = (demo.scene(seed, classes=[name], size=48).image for name in names[:2])
    one, other = (demo.scene(seed, classes=[name], size=384).masks[0] for name in names[:2])
    alike = wholly(one & other) | wholly(~(one | other))
    assert alike.any()
    assert torch.equal(a[:, alike], b[:, alike])


def wholly(mask: torch.Tensor) -> torch.Tensor:
    """The pixels, eight times as wide, that lie in the mask with some room around them."""
    return -torch.nn.functional.max_pool2d(-mask[None].float(), 16, 8, 4)[0] > 0


def test_size_and_place_do_not_depend_on_the_class():
    for seed in (1, 3, 5, 7):
        found = [demo.scene(seed, classes=[name], size=256).masks[0] for name in demo.CLASSES]
        areas = torch.tensor([float(mask.sum()) for mask in found])
        assert (areas / areas.mean() - 1).abs().max() < 0.02
        centres = torch.stack([mask.nonzero().float().mean(0) for mask in found])
        assert (centres - centres.mean(0)).abs().max() < 1.5  # pixels, of 256


def test_classes_are_drawn_evenly_and_apart_from_all_else():
    """Chi-square of the classes, and the correlation of each class with size, place and colour."""
    found = [demo.scene(seed, size=32) for seed in range(1600)]
    classes = np.array([s.classes[0] for s in found])
    counts = np.bincount(classes, minlength=8)
    assert ((counts - 200) ** 2 / 200).sum() < 24.3  # 7 degrees of freedom, p = 0.001
    facts = [[*s.masks[0].nonzero().float().mean(0), s.masks[0].sum(), *s.image[:, s.masks[0]].mean(1)] for s in found]
    for name in range(8):
        for fact in np.array(facts, dtype=float).T:
            assert abs(np.corrcoef(classes == name, fact)[0, 1]) < 4 / math.sqrt(1600)


def test_the_masks_are_the_shapes():
    """Against shapes written down a second time: distances from the centre, and straight edges."""
    place, (y, x) = scenes.Place(0.0, 0.0, 1.0, 0.0), np.mgrid[-2:2:1601j, -2:2:1601j]
    radius = np.hypot(x, y)
    side = math.sqrt(math.pi) / 2
    expected = {
        "disc": radius < 1,
        "square": (abs(x) < side) & (abs(y) < side),
        "triangle": (y < 0.7776) & (y > 2 * 0.7776 * -1 + math.sqrt(3) * abs(x)),
        "ring": (radius < 1 / math.sqrt(1 - 0.55**2)) & (radius > 0.55 / math.sqrt(1 - 0.55**2)),
    }
    for name, mask in expected.items():
        assert (scenes._inside(name, place, x, y) != mask).mean() < 0.003, name
    for name in demo.CLASSES:
        inside = scenes._inside(name, place, x, y)
        assert inside.mean() * 16 == pytest.approx(math.pi, rel=0.005), name
        assert radius[inside].max() < scenes.REACH, name


def test_a_star_has_five_points_and_a_cross_four_arms():
    turns = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    for name, radius, points in (("star", 1.2, 5), ("cross", 1.0, 4), ("triangle", 1.2, 3), ("square", 1.1, 4)):
        on = scenes._inside(name, scenes.Place(0, 0, 1, 0), radius * np.sin(turns), -radius * np.cos(turns))
        assert (on & ~np.roll(on, 1)).sum() == points, name


def test_a_turn_turns():
    y, x = np.mgrid[-2:2:201j, -2:2:201j]
    square = [scenes._inside("square", scenes.Place(0, 0, 1, turn), x, y) for turn in (0, math.pi / 2, math.pi / 4)]
    assert (square[0] != square[1]).mean() < 0.001
    assert (square[0] != square[2]).mean() > 0.03


@given(seed=SEEDS, objects=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_the_size_only_samples_the_scene(seed, objects):
    small, large = demo.scene(seed, objects, size=48), demo.scene(seed, objects, size=192)
    assert small.classes == large.classes
    mean = torch.nn.functional.avg_pool2d(large.masks.float(), 4)
    assert (mean - small.masks.float()).abs().mean() < 0.02
    assert (torch.nn.functional.avg_pool2d(large.image, 4) - small.image).abs().mean() < 0.02


def test_at_most_a_corner_of_an_object_is_outside_the_picture():
    for seed in range(20):
        found = [demo.scene(seed, classes=[name], size=128).masks[0] for name in demo.CLASSES]
        areas = torch.stack([mask.sum() for mask in found])
        assert areas.min() > 0.9 * areas[demo.CLASSES.index("disc")]


def test_the_centre_is_seldom_in_the_object():
    at = [bool(demo.scene(seed, size=33).masks[0, 16, 16]) for seed in range(1000)]
    assert sum(at) / len(at) <= 0.30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"objects": 4}, "a scene has 1 to 3 objects, found 4"),
        ({"objects": 0}, "a scene has 1 to 3 objects, found 0"),
        ({"classes": []}, "a scene has 1 to 3 objects, found 0"),
        ({"classes": ["sta"]}, "no shape is called 'sta'; closest: 'star'"),
        ({"classes": ["star", "star"]}, "the objects of a scene must have different classes; found star, star"),
        ({"size": 0}, "size=0: a scene must have at least one pixel on each side"),
        ({"size": (5, -1)}, r"size=\(5, -1\): a scene must have at least one pixel"),
    ],
)
def test_scenes_that_there_are_not(arguments, said):
    with pytest.raises(camfn.CamError, match=said):
        demo.scene(0, **arguments)


# -------------------------------------------------------------------------------------------------------- the network


def test_the_network_is_small_and_has_batch_norms_and_a_pooled_linear_head(network):
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()) == 6
    assert not network.training
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        features = network[:3](x)
        head = torch.nn.functional.linear(features.mean((2, 3)), network.classify.weight, network.classify.bias)
        assert torch.allclose(network(x), head, atol=1e-5)


def test_the_network_knows_unseen_scenes(network):
    assert train.FIRST > 100_000  # these seeds were not trained on
    assert train.accuracy(network, range(500)) >= 0.97
    assert train.accuracy(demo.network(pretrained=False), range(COUNT)) < 0.3  # the check can fail


def test_score_cams_maximum_is_on_the_object(network, unseen):
    count, cell = 30, 8  # pixels
    x, classes, masks = stacked(unseen[:count])

    def hits(maps: torch.Tensor) -> float:
        return float(metrics.pointing_game(maps, masks, tolerance=cell).mean())

    grid = (12, 12)
    centre = torch.zeros(count, 96, 96)
    centre[:, 47:49, 47:49] = 1
    found = {
        "score_cam": hits(camfn.score_cam(network, "features", x, classes)),
        "untrained": hits(camfn.score_cam(demo.network(pretrained=False), "features", x, classes)),
        "random": hits(torch.rand(count, *grid, generator=torch.Generator().manual_seed(0))),
        "centre": hits(centre),
    }
    assert found["score_cam"] >= 0.9, found
    assert found["score_cam"] > max(found["untrained"], found["random"], found["centre"]) + 0.1, found


def test_a_map_is_on_the_object_of_its_class_and_not_on_the_other():
    network, on, off = demo.network(), [], []
    for seed in range(20):
        s = demo.scene(seed, 2)
        maps = camfn.cam(
            network, "features", demo.preprocess(s.image)[None], torch.tensor([s.classes]), fc="classify", relu=True
        )[0]
        on += metrics.pointing_game(maps, s.masks, tolerance=8).tolist()
        off += metrics.pointing_game(maps, s.masks.flip(0), tolerance=8).tolist()
    assert sum(on) / len(on) > 0.8 > 0.2 > sum(off) / len(off)


def test_making_a_network_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    a, b = demo.network(pretrained=False, seed=1), demo.network(pretrained=False, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.classify.weight, demo.network(pretrained=False, seed=2).classify.weight)
    assert all(torch.isfinite(p).all() for p in a.state_dict().values())


@pytest.mark.parametrize("size", [(200, 100), (50, 80), (96, 96)])
def test_a_picture_is_brought_to_the_size_of_the_scenes(size):
    x = demo.preprocess(Image.new("L", size, 255))
    assert min(x.shape[1:]) == demo.SIDE
    assert x.shape[2] / x.shape[1] == pytest.approx(size[0] / size[1], rel=0.02)
    assert (x == 2).all()
    assert torch.equal(demo.preprocess(torch.full((3, 5, 7), 0.5)), torch.zeros(3, 5, 7))  # grey is 0: what a mask leaves


def test_without_safetensors_the_network_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(camfn.CamError, match=r"need safetensors: pip install 'camfn\[cli\]'"):
        demo.network()


def test_training_learns(capsys):
    """A minute part of what the shipped weights took: the loss falls, and the same settings give the same weights."""
    few = train.Settings(scenes=192, window_epochs=3, scene_epochs=1)
    a, b = train.train(few), train.train(few)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1 of 4: loss 2.")
    assert lines[:4] == lines[4:]
    losses = [float(line.split()[-1]) for line in lines[:3]]
    assert losses[2] < losses[0]
    digests = [hashlib.sha256(b"".join(t.numpy().tobytes() for t in m.state_dict().values())).hexdigest() for m in (a, b)]
    assert digests[0] == digests[1]
