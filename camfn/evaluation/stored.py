"""The evaluation of a run's maps, which are not made again."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camfn import runs
from camfn._errors import CamError
from camfn._types import State, Target
from camfn.evaluation.annotations import Boxes, Photos
from camfn.evaluation.evaluate import in_turn, judge
from camfn.evaluation.judged import Asked, Judged, Makes
from camfn.evaluation.result import Evaluation, Gathered
from camfn.metrics.controls import CONTROLS
from camfn.model.prepare import prepare
from camfn.runs import manifest
from camfn.runs.sources import File, Item
from camfn.zoo import Loaded

Key = tuple[str, str]
"""The id of an image, and a method."""


def evaluate_run(
    run: str | os.PathLike[str],
    network: Loaded,
    *,
    boxes: Mapping[str, Boxes] | None = None,
    images: Sequence[Item] | None = None,
    metrics: str | Sequence[str] | None = None,
    controls: bool = True,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[Evaluation, Photos]:
    """Judge the maps of a run as they were stored: with the ReLU of their methods, of the first target of each image.

    The network scores inputs; no map is made again. The map of another class is that of the second target, if the run has one
    (`target="top2"`). A permuted classifier and noise on the input ask for new maps. Such metrics are left out, with the
    reason.

    **Arguments**

    - `run`: the folder of a run with one layer.
    - `network`: the network of the run, as `camfn.open` gives it.
    - `boxes`: of each image, as `camfn.evaluation.read_boxes` reads them.
    - `images`: the images. By default, the files that the run was made of.
    - the others: as in `camfn.evaluate`. Controls are those that need no network.

    **Returns** the `Evaluation`, and the photos, which say why images are missing.

    **Raises** `CamError` if the run has several layers, other weights than the network, or no images are left.
    """
    settings = manifest.read(Path(run))["settings"]
    if len(settings["layers"]) > 1:
        raise CamError(f"the run has the layers {', '.join(settings['layers'])}: evaluate a run of one layer")
    if settings["weights"] != manifest.weights_of(network.model):
        raise CamError(f"the run was made with other weights than those of {network.spec}")
    stored = _Stored(network, list(settings["methods"]), controls)
    items = {item.id: item for item in images or ()}
    for row in runs.read(run):
        stored.add(row)
        if images is None:
            items.setdefault(row.id, Item(row.id, File(row.source), row.label))
    known = [item for id, item in items.items() if id in stored.ids]
    if not known:
        raise CamError(f"{str(run)!r} has no map of these images")
    photos = Photos(network, known, boxes=boxes, batch=batch)
    return judge(stored, stored.batches(photos), metrics, seed, progress or (lambda name: None)), photos


_NOTE = (
    "The maps are those of the run, after their methods' ReLU, and not signed; `mean_cam` and `random_cam` are not among the "
    "controls."
)


class _Stored:
    """The maps of a run, by image and method."""

    def __init__(self, network: Loaded, methods: Sequence[str], controls: bool) -> None:
        self.model = prepare(network.model)
        self.options: Mapping[str, Any] = {}
        self.origins: Mapping[str, str] = {}
        self.note = _NOTE
        self.controls = tuple(CONTROLS) if controls else ()
        self.names = (*methods, *self.controls)
        self.ids: set[str] = set()
        self._methods, self._maps = methods, dict[Key, list[tuple[int | None, Tensor]]]()
        self._photos: Photos | None = None
        self._seen = 0

    def add(self, row: runs.Row) -> None:
        """Keep a map. Those of an image and a method are in the order of its targets."""
        index = int(row.target) if row.target is not None and row.target.isdecimal() else None
        assert row.map is not None
        assert row.method is not None
        self._maps.setdefault((row.id, row.method), []).append((index, row.map))
        self.ids.add(row.id)

    def batches(self, photos: Photos) -> Iterator[dict[str, Any]]:
        """The photos, each with the first target that the run explains."""
        self._photos = photos
        for batch in photos:
            ids = photos.ids[-len(batch["x"]) :]
            classes = [self._maps[id, self._methods[0]][0][0] for id in ids]
            known = {} if None in classes else {"target": torch.tensor(classes)}
            yield {**{key: value for key, value in batch.items() if key != "target"}, **known}

    def judged(self, about: Asked, gathered: Gathered) -> Iterator[tuple[str, Judged]]:
        assert self._photos is not None
        ids = self._photos.ids[-len(about.x) :]
        yield from in_turn({name: self._makes(name, ids, about) for name in self._methods}, self, about, self._seen, gathered)
        self._seen += len(ids)

    def _makes(self, method: str, ids: Sequence[str], about: Asked) -> Makes:
        def makes(x: Tensor | None = None, target: Target = None, state: State | None = None) -> Tensor:
            if x is not None or state is not None:
                raise CamError("it needs new maps, and a run only has stored maps")
            asked = target is about.target
            return torch.stack([self._map(id, method, 0 if asked else 1) for id in ids]).to(about.x.device)

        return makes

    def _map(self, id: str, method: str, place: int) -> Tensor:
        found = self._maps.get((id, method), [])
        if len(found) <= place:
            raise CamError(
                f"the run has no map of {id!r} by {method}"
                if not place
                else "the run has one target for each image: make it with target='top2' to compare two classes"
            )
        return found[place][1]
