"""Photos with boxes, as batches of an evaluation; and the shipped scenes, whose masks are exact."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from camfn import demo, zoo
from camfn._errors import CamError
from camfn.images import View
from camfn.metrics import boxes_to_masks
from camfn.runs.decoding import Decoded, Decoder, batches, decoded
from camfn.runs.sources import Item

_COLUMNS = ("id", "x0", "y0", "x1", "y1")


class Boxes(NamedTuple):
    """The boxes of a photo, and the class that they are of."""

    boxes: tuple[tuple[float, float, float, float], ...]  # x0, y0, x1, y1 in pixels of the photo
    label: str | None = None


def read_boxes(path: str | os.PathLike[str]) -> dict[str, Boxes]:
    """Read boxes from a CSV file with the columns id, x0, y0, x1, y1 and, if you like, label: a class by index or name.

    An image has a line for each of its boxes.

    **Raises** `CamError` for a file without these columns, for values that are not numbers, and for two labels of one image.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise CamError(f"{str(path)!r} has no column {missing[0]!r}: boxes need {', '.join(_COLUMNS)}")
            return _gathered(path, reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CamError(f"{str(path)!r} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _gathered(path: str | os.PathLike[str], lines: Iterable[Mapping[str, str | None]]) -> dict[str, Boxes]:
    found: dict[str, Boxes] = {}
    for number, line in enumerate(lines, 2):
        try:
            x0, y0, x1, y1 = (float(line[name] or "") for name in _COLUMNS[1:])
        except ValueError:
            raise CamError(f"{str(path)!r}, line {number}: x0, y0, x1 and y1 must be numbers") from None
        if not (x0 < x1 and y0 < y1):
            raise CamError(f"{str(path)!r}, line {number}: a box must have x0 < x1 and y0 < y1")
        id, label = line["id"] or "", (line.get("label") or "").strip() or None
        before = found.get(id, Boxes((), label))
        if before.label != label:
            raise CamError(f"{str(path)!r}, line {number}: {id!r} has the labels {before.label!r} and {label!r}")
        found[id] = Boxes((*before.boxes, (x0, y0, x1, y1)), label)
    return found


def on_input(boxes: Boxes, view: View) -> Tensor:
    """The boxes in pixels of the network's input, `(k, 4)`, cut off at its border. What was cropped away is not there."""
    (width, height), found = view.size, []
    for x0, y0, x1, y1 in boxes.boxes:
        corners = view.to_input(np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]))
        low, high = corners.min(0).clip(0, (width, height)), corners.max(0).clip(0, (width, height))
        if (low < high).all():
            found.append([*low, *high])
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 4)


class Photos:
    """Photos as batches of an evaluation, of one shape each."""

    def __init__(
        self,
        network: zoo.Loaded,
        items: Iterable[Item],
        *,
        boxes: Mapping[str, Boxes] | None = None,
        target: str | None = None,
        batch: int = 16,
        workers: int = 1,
    ) -> None:
        self.ids: list[str] = []
        """The ids of the images that were yielded, in their order."""
        self.failed: dict[str, str] = {}
        """Why images are missing."""
        self._network, self._items, self._boxes = network, items, boxes
        self._target, self._batch, self._workers = target, batch, workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        decoder = Decoder(self._network, views=self._boxes is not None)
        for group in batches(decoded(self._items, decoder, self._workers), self._batch):
            known = [each for each in group if self._taken(each)]
            if known:
                self.ids += [each.item.id for each in known]
                yield self._joined(known)

    def _taken(self, image: Decoded) -> bool:
        """Whether an image can be judged. If not, the reason is kept."""
        why = image.error
        if why is None and self._boxes is not None:
            if image.item.id not in self._boxes:
                why = "it has no box"
            elif image.view is None:
                why = "the preprocessing cannot be undone, so that its boxes have no place on the input"
            elif not len(on_input(self._boxes[image.item.id], view_of(image))):
                why = "its boxes are cropped away"
        if why is not None:
            self.failed[image.item.id] = why
        return why is None

    def _joined(self, group: Sequence[Decoded]) -> dict[str, Any]:
        x = torch.stack([torch.from_numpy(each.x) for each in group]).to(*_like(self._network))
        found: dict[str, Any] = {"x": x}
        if self._boxes is not None:
            boxes = [on_input(self._boxes[each.item.id], view_of(each)) for each in group]
            found |= {"boxes": boxes, "masks": boxes_to_masks(boxes, (x.shape[2], x.shape[3])).to(x.device)}
        labels = [self._label(each) for each in group]
        if any(label is not None for label in labels):
            with torch.no_grad():
                found["target"] = torch.tensor([self._index(label, each) for label, each in zip(labels, group)])
        return found

    def _label(self, image: Decoded) -> str | None:
        if self._target is not None:
            return self._target
        return self._boxes[image.item.id].label if self._boxes is not None else image.item.label

    def _index(self, label: str | None, image: Decoded) -> int:
        if label is None:
            raise CamError(f"{image.item.id!r} has no label, and others have: give each one, or name the class by target=")
        (found,) = zoo.targets_of([label], self._network.names)
        if not isinstance(found, int):
            raise CamError(f"the label {label!r} must name one class")
        return found


def view_of(image: Decoded) -> View:
    """Where the input of a decoded image lies on its photo."""
    assert image.view is not None
    assert image.x is not None
    assert image.photo is not None
    a, b, c, d, e, f = image.view
    return View(((a, b, c), (d, e, f)), (image.x.shape[2], image.x.shape[1]), image.photo)


def _like(network: zoo.Loaded) -> tuple[torch.device, torch.dtype]:
    tensor = next((each for each in network.model.parameters() if each.is_floating_point()), torch.zeros(()))
    return tensor.device, tensor.dtype


def scenes(count: int, *, objects: int = 2, batch: int = 25, first: int = 0) -> Iterator[dict[str, Any]]:
    """Drawn scenes as batches: the first object is explained, and the others are objects of other classes.

    The first 100,000 seeds are not in the network's training data.
    """
    for start in range(first, first + count, batch):
        drawn = [demo.scene(seed, objects) for seed in range(start, min(start + batch, first + count))]
        found: dict[str, Any] = {
            "x": torch.stack([demo.preprocess(each.image) for each in drawn]),
            "target": torch.tensor([each.classes[0] for each in drawn]),
            "masks": torch.stack([each.masks[0] for each in drawn]),
            "boxes": [box_of(each.masks[0]) for each in drawn],
        }
        if objects > 1:
            found["others"] = torch.stack([each.masks[1:].any(0) for each in drawn])
        yield found


def box_of(mask: Tensor) -> Tensor:
    """The box of a mask, `(1, 4)`; none, `(0, 4)`, if it is empty."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros(0, 4)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])[None].double()
