"""`camfn demo`: run methods on scenes with known objects."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import camfn
from camfn import demo, figures, metrics
from camfn._errors import escaped
from camfn.cli import catalog, files

LAYER, LINEAR = "features", "classify"
METHODS, FITTING = catalog.SHOWN, catalog.FITTING
CELL = 8  # pixels per cell of the layer's grid
SHOWN = ((0, 1), (1, 1), (2, 1), (3, 2), (4, 2))
"""Seed and number of objects of each scene: the first seeds, not selected by their maps, and not in the training data."""
_TITLE = "Where does the network see each shape?"
NOTE = "white outline: the explained object     +: maximum of the map     %: share of the map inside the outline"


class Shown(NamedTuple):
    """The map of one object by one method, with its metrics."""

    scene: demo.Scene
    object: int
    map: Tensor
    energy: float
    hit: float


class Row(NamedTuple):
    """The results of one method on all scenes."""

    method: str
    shown: Sequence[Shown]
    forwards: int
    seconds: float


def rows(methods: Sequence[str], report: Callable[[str], None] = lambda method: None) -> Iterator[Row]:
    """Yield the results of each method. `report` is called with a method before it starts."""
    model, scenes = demo.network(), [demo.scene(seed, objects) for seed, objects in SHOWN]
    for method in methods:
        report(method)
        cards = [explained(model, s, method) for s in scenes]
        shown = [one for s, card in zip(scenes, cards) for one in judged(s, card.maps[0])]
        yield Row(method, shown, sum(card.forwards for card in cards), sum(card.seconds for card in cards))


def explained(model: nn.Module, scene: demo.Scene, method: str) -> Any:
    """Return the explanation of all objects of a scene by a method, with raw maps."""
    layer = LAYER if camfn.METHODS[method].of_layer else None
    given: dict[str, Any] = {"fc": LINEAR} if "linear head" in catalog.ROWS[method].needs else {}
    x, classes = demo.preprocess(scene.image)[None], torch.tensor([scene.classes])
    return camfn.explain(model, layer, x, classes, method=method, normalize=False, **given)


def judged(scene: demo.Scene, maps: Any) -> list[Shown]:
    energy, hit = metrics.energy_pointing_game(maps, scene.masks), metrics.pointing_game(maps, scene.masks, tolerance=CELL)
    return [Shown(scene, i, maps[i], float(energy[i]), float(hit[i])) for i in range(len(scene.classes))]


def table(found: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table: one per method, and a constant map as the baseline."""
    head = f"{'method':20} {'energy inside':>13} {'hits':>9} {'forwards':>9} {'seconds':>8}"
    yield head
    yield "-" * len(head)
    shown = found[0].shown
    even = [judged(one.scene, torch.ones_like(one.scene.masks, dtype=torch.float))[one.object] for one in shown]
    yield _line("(even map)", even, "")
    for row in found:
        yield _line(row.method, row.shown, f" {row.forwards:9} {row.seconds:8.2f}")


def _line(name: str, shown: Sequence[Shown], cost: str) -> str:
    energy, hits = sum(one.energy for one in shown) / len(shown), sum(one.hit for one in shown)
    return f"{name:20} {energy:13.1%} {f'{hits:.3g} of {len(shown)}':>9}{cost}"


def picture(found: Sequence[Row]) -> Any:
    """Draw the scenes in the first row, then one row per method."""
    objects = found[0].shown
    names = [demo.CLASSES[one.scene.classes[one.object]] for one in objects]
    panels = [[figures.Panel(one.scene.image) for one in objects]]
    for row in found:
        panels.append([panel(one) for one in row.shown])
    return figures.grid(panels, rows=["scene", *(r.method for r in found)], columns=names, title=_TITLE, note=NOTE)


def panel(one: Shown) -> figures.Panel:
    """Return the panel of a map. Only its positive part is drawn, since the energy counts only that."""
    positive = camfn.maps.normalize(one.map.clamp(min=0), (-2, -1))
    return figures.Panel(one.scene.image.mean(0), positive, one.scene.masks[one.object], f"{one.energy:.0%}")


def run(methods: Sequence[str], out: Path, no_progress: bool, say: Callable[[str], None]) -> None:
    """Compute the maps, write the picture, and pass the lines of the table to `say`."""
    from tqdm import tqdm

    files.make(out)
    with tqdm(total=len(methods), unit="method", disable=no_progress or None, leave=False) as bar:
        found = []
        for row in rows(methods, bar.set_description):
            found.append(row)
            bar.update()
    drawn = picture(found)
    with files.claimed(out, "demo", ("png",)) as base:
        drawn.save(f"{base}.png")
    for line in table(found):
        say(line)
    say(f"-> {escaped(base)}.png")
