"""The checked arguments of `camfn explain`, and the maps of a picture."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import camfn
from camfn import zoo
from camfn._errors import CamError, CamWarning, escaped
from camfn.cli import catalog, models
from camfn.cli.drawing import Views
from camfn.cli.files import Source
from camfn.cli.options import Wish
from camfn.explanation import prepared
from camfn.targets import Top


class Job(NamedTuple):
    """The checked arguments, which are the same for all pictures."""

    wish: Wish
    loaded: zoo.Loaded
    layers: tuple[str | None, ...]
    methods: tuple[str, ...]
    device: torch.device | None
    targets: tuple[int | Top, ...]
    options: dict[str, Any]  # options of the methods
    views: Views  # found so far


class Map(NamedTuple):
    """The maps of one method at one layer."""

    card: Any
    raw: Tensor  # (t, h, w), one map per class
    notes: tuple[str, ...]  # all warnings and notes of camfn


def options_of(methods: Sequence[str], seed: int | None, chunk: int | None) -> dict[str, Any]:
    """Return the options for the methods."""
    given: dict[str, Any] = {"normalize": False}
    if any(catalog.ROWS[method].seed for method in methods):
        given["seed"] = 0 if seed is None else seed
    if any(catalog.ROWS[method].chunk for method in methods):
        given["sweep"] = camfn.Sweep(chunk=chunk)
    return given


class Seen(NamedTuple):
    """A picture as the network has it."""

    x: Tensor  # the input, (1, channels, h, w)
    outputs: Tensor  # (classes,)


def through(job: Job, picture: Any) -> Seen:
    """Run the network on a picture."""
    x = models.input_of(job.loaded, picture, job.device)
    return Seen(x, zoo.outputs_of(job.loaded, x))


def maps_of(job: Job, source: Source, seen: Seen, layer: str | None, check: bool = False) -> list[Map]:
    """Return the maps of each method at the layer. With `all`, methods that do not fit are skipped with a note."""
    given, report = dict(job.options), _Report()
    target = torch.tensor([zoo.classes_of(job.targets, seen.outputs)])
    if "sweep" in given:
        given["sweep"] = given["sweep"]._replace(progress=report)
    made, left_out = [], []
    with prepared(job.loaded.model, layer, seen.x, target, job.methods, given, check=check) as makes:
        for name, make in zip(job.methods, makes):
            label = escaped(" ".join(filter(None, (source.path.name, layer, name if len(job.methods) > 1 else ""))))
            try:
                with _bar(label, job.wish.no_progress) as report.to:
                    made.append(_map(job, name, make))
            except CamError as error:
                if catalog.ALL not in job.wish.methods:
                    raise
                left_out.append((name, error))
    if not made:
        raise left_out[-1][1]
    said = tuple(f"{name} is left out: {error}" for name, error in left_out)
    return [made[0]._replace(notes=(*made[0].notes, *said)), *made[1:]]


class _Report:
    """A progress callback that forwards to the bar of the current method."""

    to: Callable[[int, int], None]

    def __call__(self, done: int, total: int) -> None:
        self.to(done, total)


def _map(job: Job, method: str, make: Callable[[], Any]) -> Map:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CamWarning)
        what = "the model, on masked inputs," if catalog.ROWS[method].chunk else "the model"
        with zoo.told(what, job.loaded.file):
            card = make()
    said = []
    for warning in caught:
        if issubclass(warning.category, CamWarning):
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    raw = card.maps[0].detach().cpu()
    check_grid(card.layers[0] if card.layers else method, raw.shape[1:])
    checked = [] if card.check is None else [f"{method}: {card.check.sentence}"]
    return Map(card, raw, (*said, *card.notes, *checked))


@contextmanager
def _bar(label: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of forwards on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="forward", file=sys.stderr, disable=hidden or None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def check_grid(layer: str, grid: Sequence[int]) -> None:
    if len(grid) != 2:
        raise CamError(f"layer {layer!r} gives a map of shape {tuple(grid)}, and a picture needs (height, width)")
