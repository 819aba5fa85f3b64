"""Targets for detectors, whose output is a list with one mapping of boxes, labels and scores per image."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Target, wide
from camfn.targets.algebra import Named
from camfn.targets.outputs import is_detections, other_targets, shown
from camfn.targets.scores import Clean, Kind, Score, score_rows, tensor_of

Detected: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Boxes `(d, 4)`, labels `(d,)` and scores `(d,)` of one image."""

Labelled: TypeAlias = tuple[Tensor, Tensor]
"""Boxes `(m, 4)` and labels `(m,)`."""


@dataclasses.dataclass(frozen=True)
class Boxes(Named):
    """Reference boxes with labels."""

    boxes: Any
    labels: Any
    each: bool

    def resolve(self, clean: Clean) -> Score:
        """Find the reference boxes. The rows are boxes `(n, m, 4)` and labels `(n, m)`, padded with -1."""
        clean.refuse_probabilities("targets.boxes")
        found = _detections(clean.output)
        given = [_best(i, one) for i, one in enumerate(found)] if self.boxes is None else _per_image(self, clean.n)
        _check(given)
        counts = [len(labels) for _, labels in given]
        if self.each and len(set(counts)) > 1:
            raise CamError(f"targets.boxes(each=True) of {counts} boxes: all images must have the same number of boxes")
        boxes, labels = (_pad(parts, clean.device) for parts in zip(*given))
        rows = boxes.to(wide(found[0][2].dtype)), labels.long()
        of = Kind(_read_detections, _of_boxes, _names_of_boxes, (self.each,), "entries")
        _check_overlap(score_rows(of, clean.output, rows), given, found)
        return Score(of, rows, not self.each, None)


def boxes(boxes: Any = None, labels: Any = None, *, each: bool = False) -> Target:
    """The detection score of reference boxes: the best overlap times confidence, summed over the boxes.

        sum_r max_d IoU(r, d) * score_d,   over the detections d with the label of box r

    The term of a box without such a detection is 0. The model must return a list with one mapping of `boxes`
    (x1, y1, x2, y2), `labels` and `scores` per image, as torchvision's detectors do.

    - `boxes`: in pixels of the model's input. `(4,)` or `(m, 4)` for all images; `(n, m, 4)` or a list of n tensors for boxes
      per image. `None` takes the detection with the highest score on each clean image.
    - `labels`: the shape of `boxes` without its last axis, or one int for all boxes.
    - `each`: return one score per box instead of their sum. One sweep gives all maps, `(n, m, *grid)`.

    Raises `CamError` if only one of `boxes` and `labels` is given, or later if no detection on the clean input overlaps a box.

    The maximum and the product are those of D-RISE (Petsiuk et al., CVPR 2021, arXiv 2006.03204). Its similarity of class
    probabilities is 1 or 0 here, since the detections have labels. The maximum stays continuous when non-maximum suppression
    drops or adds a second detection of an object; a sum over detections does not. pytorch-grad-cam adds the IoU and the score
    of the box with the largest IoU, if this is above 0.5 and the label is right; that score is not continuous either.

    >>> import camfn, torch
    >>> found = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]]), "scores": torch.tensor([0.5, 0.8])}
    >>> output = [{**found, "labels": torch.tensor([7, 7])}]
    >>> score = camfn.targets.resolve(camfn.targets.boxes([0, 0, 4, 4], 7), output, 1, torch.device("cpu"))
    >>> camfn.targets.score_rows(score.of, output, score.rows)
    tensor([[0.5000]])
    """
    if (boxes is None) != (labels is None):
        raise CamError("targets.boxes needs both boxes and labels, or neither (which takes the best detection of each image)")
    return Boxes(boxes, labels, each)


# ------------------------------------------------------------------------------------------------------- references


def _best(image: int, found: Detected) -> Labelled:
    boxes, labels, scores = (part.detach() for part in found)
    if not len(scores):
        raise CamError(f"targets.boxes() takes the best detection of each image, and image {image} has none")
    best = scores.argmax(0, keepdim=True)
    return boxes.index_select(0, best), labels.index_select(0, best)


def _per_image(target: Boxes, n: int) -> list[Labelled]:
    """Return the given boxes and labels per image."""
    boxes, labels = target.boxes, target.labels
    if _depth(boxes) < 3:
        return [_check_boxes(boxes, labels, "targets.boxes")] * n
    labels = labels if _depth(labels) else [labels] * len(boxes)
    if len(boxes) != n or len(labels) != n:
        raise CamError(f"targets.boxes has boxes for {len(boxes)} images and labels for {len(labels)}, for a batch of {n}")
    return [_check_boxes(*pair, f"targets.boxes for image {image}") for image, pair in enumerate(zip(boxes, labels))]


def _depth(nested: Any) -> int:
    """Return the number of axes of a tensor or of a nested, possibly ragged, list. Boxes per image have three."""
    if isinstance(nested, str) or not isinstance(nested, Sequence):
        return getattr(nested, "ndim", 0)
    return 1 + max(map(_depth, nested), default=0)


def _check_boxes(boxes: Any, labels: Any, what: str) -> Labelled:
    boxes, labels = tensor_of(boxes, f"{what}: boxes"), tensor_of(labels, f"{what}: labels")
    integral = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or not integral or labels.ndim > 1:
        raise CamError(
            f"{what} wants (m, 4) boxes with (m,) integer labels; found {tuple(boxes.shape)} and {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    boxes, labels = boxes.reshape(-1, 4), labels.reshape(-1)
    if len(labels) not in (1, len(boxes)) or not len(boxes):
        raise CamError(f"{what} has {len(boxes)} boxes and {len(labels)} labels")
    return boxes, labels.expand(len(boxes))


def _check(given: list[Labelled]) -> None:
    if _compat.transformed():
        return
    for image, (boxes, labels) in enumerate(given):
        low = int(labels.min())
        if low < 0:
            raise CamError(f"targets.boxes for image {image}: {low} is not a label")
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):  # NaN is not
            raise CamError(f"targets.boxes for image {image}: {boxes.tolist()} must be x1, y1, x2, y2 with x1 < x2 and y1 < y2")


def _check_overlap(scores: Tensor, given: list[Labelled], found: list[Detected]) -> None:
    if _compat.transformed() or bool((scores > 0).all()):
        return
    image, t = (~(scores > 0)).nonzero()[0].tolist()
    boxes, labels = (part if scores.shape[1] == 1 else part[t : t + 1] for part in given[image])
    raise CamError(
        f"targets.boxes for image {image}: no detection on the clean input overlaps {boxes.tolist()} and has its label, "
        f"{labels.tolist()} (the labels found are {found[image][1].tolist()}), so there is nothing to explain; boxes are in "
        "pixels of the model's input"
    )


def _pad(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack the tensors of all images, padded with -1. Padding scores 0: no detection has that label."""
    longest = max(map(len, parts))
    return torch.stack([torch.cat([part, part.new_full((longest - len(part), *part.shape[1:]), -1)]) for part in parts]).to(
        device
    )


# ------------------------------------------------------------------------------------------------------- detections


def _detections(output: Any) -> list[Detected]:
    """Return the detections of each image."""
    if is_detections(output):
        return [(sample["boxes"], sample["labels"], sample["scores"]) for sample in output]
    raise CamError(
        "targets.boxes wants a list with one mapping of boxes, labels, scores per image, as torchvision's detectors give in "
        f"eval mode; the model returns {_described(output)}{other_targets(output)}"
    )


def _described(output: Any) -> str:
    if not isinstance(output, list) or not output:
        return f"{type(output).__name__}, {shown(output)}"
    one = next((one for one in output if not is_detections([one])), output[0])
    return f"a list with {', '.join(map(str, one)) if isinstance(one, Mapping) else type(one).__name__}, {shown(output)}"


def _read_detections(each: bool, sample: Any) -> Detected:
    return _detections([sample])[0]


def _of_boxes(each: bool, found: Detected, row: Labelled) -> Tensor:
    boxes, labels, scores = found
    scores = scores.to(wide(scores.dtype))
    met = overlap(row[0], boxes.to(scores.dtype)) * scores * (row[1][:, None] == labels)
    best = torch.cat([met, met.new_zeros(len(met), 1)], 1).amax(1)  # 0 where there is no detection
    return best if each else best.sum(0, keepdim=True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of boxes `(m, 4)` and `(d, 4)`, `(m, d)`."""
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    both = sides.clamp(min=0).prod(-1)
    alone = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    either = alone[0][:, None] + alone[1][None] - both
    return both / either.clamp(min=torch.finfo(both.dtype).tiny)  # padding boxes have no area


def _names_of_boxes(each: bool, row: Labelled) -> list[str]:
    pairs = zip(*(part.tolist() for part in row))
    there = [f"label {c} in ({', '.join(f'{side:.0f}' for side in box)})" for box, c in pairs if c >= 0]
    shown = there if len(there) < 4 else [*there[:3], f"{len(there) - 3} more"]
    return there if each else [" + ".join(shown)]
