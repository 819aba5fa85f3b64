"""Boxes: those that a map gives, judged by reference boxes as the benchmark of weakly supervised localization does it."""

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn.metrics.scoring import numbers

LEVELS = 256
"""The published evaluator reads a map as an 8-bit picture."""


def boxes_to_masks(boxes: Sequence[Tensor | Sequence[Sequence[float]]], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """The union of each image's boxes as a mask: a pixel is inside if its center is.

    **Arguments**

    - `boxes`: for each image `(k, 4)` numbers `x0, y0, x1, y1` in pixels of `size`, the edges of the box; k may differ.
    - `size`: the (height, width) of the masks.

    **Returns** bools `(n, h, w)`, on the CPU. An image without boxes has an empty mask.

    **Raises** `CamError` if a box does not have four numbers.

    >>> boxes_to_masks([[[1, 0, 3, 1]], []], (2, 4)).int().tolist()
    [[[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    """
    y, x = (torch.arange(side) + 0.5 for side in size)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, of in zip(masks, boxes):
        for left, top, right, bottom in _box_table(of).tolist():
            mask |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return masks


def box_ious(
    maps: Float[Tensor, "n h w"], boxes: Sequence[Tensor | Sequence[Sequence[float]]], *, interval: float = 0.001
) -> Float[Tensor, "n thresholds"]:
    """The best overlap of a reference box with a box of the map, at each threshold. The input of `max_box_acc`.

    A threshold gives the bounding boxes of all contours of the region above it: of its connected parts (8 neighbors) and of the
    holes in them. This is the rule of the published evaluator, to the pixel: maps are read as 8-bit pictures, a threshold is a
    share of the picture's maximum, boxes are one pixel too wide except at the border, and sides count their ends.

    **Arguments**

    - `maps`: `(n, h, w)` in [0, 1], at the size in which the boxes are given.
    - `boxes`: for each image `(k, 4)` numbers `x0, y0, x1, y1`, which are cut to integers; k is 1 or more.
    - `interval`: the distance of thresholds, from 0 up to 1: 1 divided by their number.

    **Returns** the IoU `(n, thresholds)`, float64, on the CPU.

    **Raises** `CamError` if a map leaves [0, 1], an image has no box, or the interval does not divide 1.

    >>> import torch
    >>> maps = torch.zeros(1, 8, 8)
    >>> maps[0, 2:5, 2:5] = 1
    >>> box_ious(maps, [[[2, 2, 5, 5]]], interval=0.5).tolist()
    [[1.0, 1.0]]

    Choe et al., Evaluation for Weakly Supervised Object Localization, 2020 (arXiv 2007.04178), section 3.2.
    """
    if maps.ndim != 3 or len(boxes) != len(maps):
        raise CamError(f"maps have shape {tuple(maps.shape)}, and boxes are of {len(boxes)} images: maps must be (n, h, w)")
    if not bool(((maps >= 0) & (maps <= 1)).all()):
        raise CamError("maps must lie in [0, 1], as those of normalize='minmax' do")
    pictures = (maps.detach().cpu().double() * (LEVELS - 1)).to(torch.uint8).numpy()
    thresholds = np.arange(_count_of(interval)) * interval
    found = [_ious_of(picture, _box_table(of).long().numpy(), thresholds) for picture, of in zip(pictures, boxes)]
    return torch.from_numpy(np.stack(found) if found else np.zeros((0, len(thresholds))))


class BoxAccuracy(NamedTuple):
    """MaxBoxAccV2 of a data set."""

    mean: float
    accuracies: tuple[float, ...]  # of each IoU: the share of images with a box that overlaps as much
    thresholds: tuple[float, ...]  # of each IoU: the lowest threshold with this accuracy, the same for all images


def max_box_acc(ious: Float[Tensor, "n thresholds"], *, at: Sequence[float] = (0.3, 0.5, 0.7)) -> BoxAccuracy:
    """MaxBoxAccV2: the share of images with a box that fits, at the threshold that is best over the data. Higher is better.

    The threshold is chosen on the images that are judged, as the benchmark allows. Report it, and choose it on other images
    where you can.

    **Arguments**

    - `ious`: of `box_ious`, for all images of the data: join batches by `torch.cat`.
    - `at`: the IoU from which on a box fits. MaxBoxAccV2 is the mean over the three, MaxBoxAcc is `at=(0.5,)` (and takes the
      largest contour only, where this takes all).

    **Returns** a `BoxAccuracy`, with shares from 0 to 1.

    **Raises** `CamError` if there are no images, no thresholds, or no IoUs to reach.

    >>> import torch
    >>> max_box_acc(torch.tensor([[0.2, 0.6], [0.9, 0.6]]), at=(0.5,))
    BoxAccuracy(mean=1.0, accuracies=(1.0,), thresholds=(0.5,))

    Choe et al., Evaluation for Weakly Supervised Object Localization, 2020 (arXiv 2007.04178), section 3.2.
    """
    if ious.ndim != 2 or not ious.numel():
        raise CamError(f"ious have shape {tuple(ious.shape)}: pass at least one image and one threshold, (n, thresholds)")
    at = numbers("at", at, "IoUs, as (0.3, 0.5, 0.7)")
    shares = [(ious >= enough).double().mean(0) for enough in at]
    best = [(float(share.max()), int(share.argmax()) / ious.shape[1]) for share in shares]
    accuracies, thresholds = zip(*best)
    return BoxAccuracy(sum(accuracies) / len(accuracies), accuracies, thresholds)


def _count_of(interval: float) -> int:
    """The number of thresholds. `max_box_acc` reads a threshold off its place, so they must divide 1 evenly."""
    usable = isinstance(interval, Real) and 0 < interval <= 1
    count = round(1 / interval) if usable else 0
    if not usable or abs(count * interval - 1) > 1e-9:
        raise CamError(f"interval={interval!r} must be 1 divided by a number of thresholds, as 0.001 or 0.25")
    return count


def _box_table(boxes: Tensor | Sequence[Sequence[float]]) -> Tensor:
    try:
        table = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    except (TypeError, ValueError) as error:  # boxes with different counts of numbers
        raise CamError(f"boxes of an image are not (k, 4) numbers x0, y0, x1, y1: {first_line(error)}") from error
    table = table.reshape(-1, 4) if table.numel() == 0 else table
    if table.ndim != 2 or table.shape[1] != 4:
        raise CamError(f"boxes of an image have shape {tuple(table.shape)}: they must be (k, 4), x0, y0, x1, y1")
    return table


def _ious_of(picture: np.ndarray, references: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the best IoU at each threshold. Between two levels of an 8-bit picture nothing changes: each is judged once."""
    if not len(references):
        raise CamError("an image has no box: leave it out")
    levels = (thresholds * picture.max()).astype(int)
    best = {level: overlaps(found, references).max() for level, found in contour_boxes(picture, set(levels.tolist()))}
    return np.array([best[level] for level in levels.tolist()])


def overlaps(found: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the IoU of each pair of boxes, `(found, references)`. A side from a to b has b - a + 1 pixels."""
    low = np.maximum(found[:, None, :2], references[None, :, :2])
    high = np.minimum(found[:, None, 2:], references[None, :, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (found, references)]
    either = areas[0][:, None] + areas[1][None] - shared
    return np.where(either > 0, shared / np.where(either > 0, either, 1), 0)


def contour_boxes(picture: np.ndarray, levels: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each level with the boxes of all contours of `picture > level`, `(k, 4)`. Without a contour it is one box of zeros.

    Regions have 8 neighbors and holes 4, as in OpenCV. The contour of a hole runs in the region around it. A box ends one pixel
    after its region, except at the border.
    """
    height, width = picture.shape
    padded = np.pad(picture.astype(int), 1, constant_values=-1).ravel()  # what is around the picture is never above
    steps = width + 2
    around = (-steps - 1, -steps, -steps + 1, -1, 1, steps - 1, steps, steps + 1)
    cross = (-steps, -1, 1, steps)
    wider = np.array([-1, -1, 1, 1])
    regions = dict(_grown(padded, steps, around, range(LEVELS, -1, -1)))
    holes = dict(_grown(padded, steps, cross, range(-1, LEVELS)))
    for level in levels:
        beneath = holes[level]
        beneath = beneath[(beneath[:, :2] > 0).all(1)]  # what touches the padding surrounds the picture
        found = np.concatenate([regions[level + 1], beneath + wider]) - 1
        found[:, 2:] = np.minimum(found[:, 2:] + 1, (width - 1, height - 1))
        yield level, found if len(found) else np.zeros((1, 4), int)


def _grown(values: np.ndarray, steps: int, neighbors: Sequence[int], order: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Add the pixels of one value after the other; yield each value with the boxes of the connected regions so far.

    A region is a tree of pixels. Its root holds the box, and two regions that meet become one.
    """
    parent, box = [-1] * len(values), {}
    by_value = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[by_value], order, "left")
    ends = np.searchsorted(values[by_value], order, "right")

    def root(pixel: int) -> int:
        while parent[pixel] != pixel:
            parent[pixel] = pixel = parent[parent[pixel]]
        return pixel

    for value, start, end in zip(order, starts, ends):
        for pixel in by_value[start:end].tolist():
            parent[pixel] = own = pixel
            y, x = divmod(pixel, steps)
            box[own] = (x, y, x, y)
            for step in neighbors:
                other = pixel + step
                if 0 <= other < len(parent) and parent[other] >= 0 and (other := root(other)) != own:
                    a, b = box.pop(own), box.pop(other)
                    parent[own] = own = other
                    box[own] = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
        yield value, np.array([*box.values()], dtype=int).reshape(-1, 4)
