"""Scenes with objects removed, with distractors, and on other grounds: nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import camfn
from camfn import demo


def grown(masks: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The masks with the pixels beside them, since one at an edge has some of both."""
    return torch.nn.functional.max_pool2d(masks[:, None].float(), 2 * by + 1, 1, by)[:, 0] > 0


@given(seed=st.integers(0, 10_000), objects=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_without_distractors_the_picture_is_the_scene(seed, objects):
    found, scene = demo.interventions(seed, objects, size=48), demo.scene(seed, objects, size=48)
    assert torch.equal(found.image, scene.image)
    assert torch.equal(found.without[0], scene.image)
    assert torch.equal(found.masks, scene.masks)
    assert found.classes == scene.classes
    assert found.without.shape == (2**objects, 3, 48, 48)
    assert found.distractors.shape == (0, 48, 48)
    assert found.undistracted.shape == found.grounds.shape == (0, 3, 48, 48)


@given(seed=st.integers(0, 10_000), objects=st.integers(1, 3), distractors=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_a_removal_changes_the_object_and_nothing_else(seed, objects, distractors):
    found = demo.interventions(seed, objects, distractors=distractors, size=64)
    near, bars = (grown(masks, 3) for masks in (found.masks, found.distractors))  # the tips of a star are thin
    for gone in range(2**objects):
        taken = [j for j in range(objects) if gone >> j & 1]
        changed = (found.without[gone] != found.image).any(0)
        assert not (changed & ~near[taken].any(0)).any()
        assert all((changed & found.masks[j]).sum() > 0.9 * found.masks[j].sum() for j in taken)
    for bar in range(distractors):
        changed = (found.undistracted[bar] != found.image).any(0)
        assert changed.any()
        assert not (changed & ~bars[bar]).any()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_another_ground_is_around_the_same_objects(seed):
    found = demo.interventions(seed, 2, distractors=1, grounds=2, size=128)
    objects = torch.cat([found.masks, found.distractors]).any(0)
    wholly, around = ~grown(~objects[None])[0], ~grown(objects[None])[0]
    assert wholly.any()
    for ground in found.grounds:
        assert torch.equal(ground[:, wholly], found.image[:, wholly])
        assert (ground != found.image).any(0)[around].float().mean() > 0.9
    assert not torch.equal(found.grounds[0], found.grounds[1])


def test_distractors_hide_no_object_and_classes_are_those_of_the_objects():
    for seed in range(8):
        plain, busy = (demo.interventions(seed, 3, distractors=bars, size=64) for bars in (0, 2))
        assert torch.equal(plain.masks, busy.masks)
        assert plain.classes == busy.classes
        assert (busy.distractors.flatten(1).sum(1) > 20).all()
        assert busy.distractors.sum(0).max() <= 1


def test_a_named_class_changes_the_shape_alone():
    one, other = (demo.interventions(5, classes=names, distractors=1, size=64) for names in (["star"], ["ring"]))
    assert one.classes != other.classes
    assert torch.equal(one.distractors, other.distractors)
    assert torch.equal(one.without[1], other.without[1])  # without the object, nothing tells its class


def test_numbers_are_not_negative():
    with pytest.raises(camfn.CamError, match="distractors=-1 and grounds=0 must be 0 or more"):
        demo.interventions(0, distractors=-1)
