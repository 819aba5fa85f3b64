"""Boxes against OpenCV's contours, and MaxBoxAccV2 against the numbers of the published evaluator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camfn import CamError, metrics
from camfn.metrics import boxes as boxes_file


def opencv(picture: np.ndarray, level: int) -> list[tuple[int, ...]]:
    """The boxes of all contours, as the published evaluator takes them from OpenCV."""
    cv2 = pytest.importorskip("cv2")
    height, width = picture.shape
    _, above = cv2.threshold(picture, level, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    found = [cv2.boundingRect(contour) for contour in contours]
    return sorted((x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in found) or [(0, 0, 0, 0)]


@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    levels=st.sampled_from([2, 4, 256]),
)
@settings(max_examples=60, deadline=None)
def test_boxes_are_those_of_opencv(seed, height, width, levels):
    picture = np.random.default_rng(seed).integers(0, levels, (height, width)).astype(np.uint8)
    for level, found in boxes_file.contour_boxes(picture, {0, 1, 2, 100, 255}):
        assert sorted(map(tuple, found.tolist())) == opencv(picture, level), level


def test_a_region_has_eight_neighbors_and_a_hole_four():
    cross = np.zeros((7, 7), np.uint8)
    cross[1, 1] = cross[2, 2] = cross[4:7, 4:7] = 9
    cross[5, 5] = 0
    ((_, found),) = boxes_file.contour_boxes(cross, {0})
    assert sorted(map(tuple, found.tolist())) == [(1, 1, 3, 3), (4, 4, 6, 6), (4, 4, 6, 6)]  # with the contour of the hole


# ------------------------------------------------------------------------------------------------------ MaxBoxAccV2

SIDE = 224


def bumps(count: int) -> tuple[np.ndarray, list[list[list[int]]]]:
    """The maps and boxes of the files that the published evaluator judged: bumps, one with a hole, and noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    maps, boxes = [], []
    for _ in range(count):
        several = random.integers(1, 4)
        centers, sizes = random.uniform(0, SIDE, (several, 2)), random.uniform(8, 50, several)
        peaks = zip(centers, sizes, random.uniform(0.4, 1, several))
        map = sum(peak * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s**2)) for (cy, cx), s, peak in peaks)
        map = map * (np.hypot(y - centers[0, 0], x - centers[0, 1]) > sizes[0] / 3) + 0.05 * random.random((SIDE, SIDE))
        maps.append((map - map.min()) / (map.max() - map.min()))
        boxes.append([])
        for (cy, cx), s in zip(centers[:2], sizes):
            r = s * random.uniform(0.7, 1.8)
            corners = max(0, cx - r), max(0, cy - r), min(SIDE - 1, cx + r), min(SIDE - 1, cy + r)
            boxes[-1].append([int(corner) for corner in corners])
    return np.stack(maps), boxes


def test_max_box_acc_is_that_of_the_published_evaluator():
    """`evaluate_wsol` of clovaai/wsolevaluation (96f4b88), with multi_contour_eval and multi_iou_eval, on `bumps(8)` as files:
    100, 87.5 and 62.5 %, at the thresholds number 475, 463 and 463; and the number of pairs (image, threshold) that fit."""
    maps, boxes = bumps(8)
    ious = metrics.box_ious(torch.from_numpy(maps), boxes)
    assert ious.shape == (8, 1000)
    assert [int((ious >= enough).sum()) for enough in (0.3, 0.5, 0.7)] == [5367, 3785, 2083]
    found = metrics.max_box_acc(ious)
    assert found.accuracies == (1.0, 0.875, 0.625)
    assert found.thresholds == (0.475, 0.463, 0.463)
    assert found.mean == pytest.approx(0.8333333333333333, abs=1e-12)


def test_the_threshold_is_one_for_all_images():
    ious = torch.tensor([[0.9, 0.0, 0.6], [0.0, 0.9, 0.6]])
    assert metrics.max_box_acc(ious, at=(0.5, 0.7)) == (0.75, (1.0, 0.5), (2 / 3, 0.0))


def test_the_best_of_several_boxes_counts():
    map = torch.zeros(1, 20, 20)
    map[0, 2:6, 2:6] = map[0, 12:18, 12:18] = 1
    near, far, second = [2, 2, 6, 6], [0, 15, 3, 19], [12, 12, 18, 18]
    for of, best in (([near], 1.0), ([far], 0.0), ([far, second], 1.0), ([near, second], 1.0)):
        found = metrics.box_ious(map, [of], interval=0.5)
        assert found.tolist() == [[best, best]]


def test_iou_counts_both_ends_of_a_side():
    (found,) = boxes_file.overlaps(np.array([[0, 0, 1, 1]]), np.array([[1, 1, 2, 2], [3, 3, 3, 3]]))
    assert found.tolist() == [1 / 7, 0]


def test_box_metrics_are_of_each_image_alone():
    maps, boxes = bumps(3)
    small = torch.from_numpy(maps[:, ::8, ::8].copy())
    boxes = [[[corner // 8 for corner in box] for box in of] for of in boxes]
    together = metrics.box_ious(small, boxes, interval=0.05)
    alone = [metrics.box_ious(small[i : i + 1], boxes[i : i + 1], interval=0.05) for i in (2, 0, 1)]
    assert torch.equal(together[[2, 0, 1]], torch.cat(alone))


def test_flat_maps_have_the_box_of_nothing():
    assert metrics.box_ious(torch.zeros(1, 4, 4), [[[1, 1, 2, 2]]], interval=0.5).tolist() == [[0, 0]]
    whole = metrics.box_ious(torch.ones(1, 4, 4), [[[0, 0, 3, 3]]], interval=0.5)
    assert whole.tolist() == [[1, 1]]


def test_what_box_metrics_do_not_take():
    with pytest.raises(CamError, match=r"maps must lie in \[0, 1\]"):
        metrics.box_ious(torch.full((1, 4, 4), 1.5), [[[0, 0, 1, 1]]])
    with pytest.raises(CamError, match=r"maps must lie in \[0, 1\]"):
        metrics.box_ious(torch.full((1, 4, 4), math.nan), [[[0, 0, 1, 1]]])
    with pytest.raises(CamError, match="boxes are of 2 images"):
        metrics.box_ious(torch.zeros(1, 4, 4), [[[0, 0, 1, 1]], []])
    with pytest.raises(CamError, match="an image has no box"):
        metrics.box_ious(torch.zeros(1, 4, 4), [[]])
    for boxes in ([[0, 0, 1, 1], [0, 0, 1]], [["left", 0, 1, 1]]):
        with pytest.raises(CamError, match=r"boxes of an image are not \(k, 4\) numbers"):
            metrics.box_ious(torch.zeros(1, 4, 4), [boxes])
        with pytest.raises(CamError, match=r"boxes of an image are not \(k, 4\) numbers"):
            metrics.boxes_to_masks([boxes], (4, 4))
    with pytest.raises(CamError, match=r"must be \(k, 4\)"):
        metrics.box_ious(torch.zeros(1, 4, 4), [[[0, 0, 1]]])
    for shape in ((0, 1000), (4, 0), (4,)):
        with pytest.raises(CamError, match="pass at least one image and one threshold"):
            metrics.max_box_acc(torch.zeros(shape))
    for at in ((), 0.5, "0.5"):
        with pytest.raises(CamError, match=r"at=.* must be a sequence of IoUs"):
            metrics.max_box_acc(torch.zeros(2, 10), at=at)


@pytest.mark.parametrize("interval", [0.3, 0, -0.1, 2, math.nan, "0.1"])
def test_an_interval_divides_1(interval):
    with pytest.raises(CamError, match="must be 1 divided by a number of thresholds"):
        metrics.box_ious(torch.zeros(1, 4, 4), [[[0, 0, 1, 1]]], interval=interval)


@pytest.mark.parametrize("count", [1, 2, 7, 49, 1000])
def test_there_are_as_many_thresholds_as_the_interval_divides_1_into(count):
    """`np.arange(0, 1, 1 / 49)` has 50 numbers, of which the last is 1."""
    ious = metrics.box_ious(torch.linspace(0, 1, 64).reshape(1, 8, 8), [[[0, 5, 7, 7]]], interval=1 / count)
    assert ious.shape == (1, count)


# ------------------------------------------------------------------------------------------------- boxes to masks


@given(seed=st.integers(0, 999), count=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_mask_is_the_union_of_boxes(seed, count):
    boxes = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * 8
    (mask,) = metrics.boxes_to_masks([boxes], (6, 8))
    for r in range(6):
        for c in range(8):
            inside = any(x0 <= c + 0.5 < x1 and y0 <= r + 0.5 < y1 for x0, y0, x1, y1 in boxes.tolist())
            assert bool(mask[r, c]) == inside


def test_metrics_of_masks_take_several_boxes():
    masks = metrics.boxes_to_masks([[[0, 0, 1, 1], [3, 0, 4, 1]], [[0, 0, 1, 1]], []], (1, 4))
    map = torch.tensor([[[0.0, 0.0, 1.0, 3.0]]]).expand(3, 1, 4)
    assert torch.allclose(metrics.energy_pointing_game(map, masks), torch.tensor([0.75, 0.0, math.nan]), equal_nan=True)
    assert torch.allclose(metrics.pointing_game(map, masks), torch.tensor([1.0, 0.0, math.nan]), equal_nan=True)
