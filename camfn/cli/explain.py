"""`camfn explain`: the loop over pictures."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import camfn
from camfn import figures, images, zoo
from camfn._errors import CamError, escaped
from camfn.cli import catalog, files, models, options
from camfn.cli.cards import Facts, Written, classes
from camfn.cli.job import Job, Map, Seen, check_grid, maps_of, options_of, through
from camfn.cli.options import Wish
from camfn.methods._common import read_layer
from camfn.model.capture import tap
from camfn.model.forward import look
from camfn.model.layers import choose
from camfn.model.task import begin


def run(wish: Wish, paths: Sequence[Path]) -> Iterator[tuple[Path, list[Written] | CamError]]:
    """Explain every picture, and yield what was written for it, or its error. Errors of all pictures are raised first."""
    methods, device = catalog.methods_of(wish.methods), models.device_of(wish.device)
    given = options_of(methods, wish.seed, wish.chunk)
    if all(isinstance(_read(path), CamError) for path in paths):  # without loading the model
        yield from ((path, _read(path)) for path in paths)
        return
    with models.opened(wish.model, wish.weights, wish.no_pretrained, device) as loaded:
        if wish.layers:
            tap(loaded.model, list(dict.fromkeys(wish.layers)))
        targets = zoo.targets_of(wish.targets, loaded.names, "--target")
        job = Job(wish, loaded, tuple(dict.fromkeys(wish.layers)) or (None,), methods, device, targets, given)
        _check_pictures(job, paths)
        files.make(wish.out)
        for path in paths:
            picture = _read(path)
            yield path, picture if isinstance(picture, CamError) else _attempt(path, _explain, job, path, picture)


def _read(path: Path) -> Any:
    """Return the picture, or the error."""
    try:
        return images.read(path)
    except CamError as error:
        return error


def _attempt(path: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work` on a picture, or the error."""
    try:
        return work(*arguments)
    except CamError as error:
        return CamError(f"{escaped(path)}: {error}")


# ---------------------------------------------------------------------------------------------------- the rehearsal


def _check_pictures(job: Job, paths: Sequence[Path]) -> None:
    """Check the pictures before any sweep, up to the first that passes. If none does, raise the error of the first."""
    errors = []
    for path in paths:
        picture = _read(path)
        if isinstance(picture, CamError):
            continue
        found = _attempt(path, through, job, picture)
        if not isinstance(found, CamError):
            classes = _attempt(path, zoo.classes_of, job.targets, found.outputs)
            if isinstance(classes, CamError):  # no other picture has more classes
                raise classes
            found = _attempt(path, _check_layers, job, path, found)
        if not isinstance(found, CamError):
            return
        errors.append(found)
    raise errors[0]


def _check_layers(job: Job, path: Path, seen: Seen) -> None:
    """Run the methods without a sweep, and check the layers of the others."""
    model, quick = job.loaded.model, tuple(method for method in job.methods if not catalog.ROWS[method].chunk)
    if quick and catalog.ALL not in job.wish.methods:
        given = options_of(quick, job.wish.seed, None)
        for layer in job.layers:
            maps_of(job._replace(methods=quick, options=given), path, seen, layer)
    if len(quick) == len(job.methods) or not any(camfn.METHODS[method].of_layer for method in job.methods):
        return
    with zoo.told("the model", job.loaded.file), torch.no_grad():
        names = [layer or choose(begin(model, seen.x, None)).name for layer in job.layers]
        forward = look(model, names, seen.x, None)
        for name, activation in zip(names, forward.activations):
            check_grid(name, read_layer(forward, name, activation, "auto").grid)


# -------------------------------------------------------------------------------------------------------- a picture


def _explain(job: Job, path: Path, picture: Any) -> list[Written]:
    """Compute all maps of a picture, then write all files, so that an error leaves no files."""
    through_net = through(job, picture)
    x, outputs = through_net
    seen, true_colors = images.as_seen(x[0], job.loaded.preprocess, picture.size)
    drawn, told = [], set[str]()  # methods may have the same notes
    for layer in job.layers:
        for made in maps_of(job, path, through_net, layer):
            if not true_colors:
                said = "the overlay's colors are stretched: preprocess does more than scale each channel"
                made = made._replace(notes=(*made.notes, said))
            for note in (note for note in dict.fromkeys(made.notes) if note not in told):
                told.add(note)
                sys.stderr.write(f"note: {escaped(path)}: {options.one_line(note)}\n")
            saved = _resize(job, x, made.raw)
            for number in range(len(made.raw)):
                explained = classes(made.card, number, outputs, job.loaded.names)
                facts = {**_about_run(job, path, x), **explained, **_about_map(job, made, saved)}
                drawn.append((made.raw[number], saved[number], facts))
    if len(job.methods) > 1:
        _write_grid(job, path, seen, drawn)
    written = [_write(job, path, seen, *each) for each in drawn]
    for cut in [base.name for facts, base in written if not base.name.startswith(files.plain(_name(path, facts)))][:1]:
        sys.stderr.write(f"note: {escaped(path)}: the name is too long for a file name, and is cut, as in {cut}\n")
    return written


def _write_grid(job: Job, path: Path, seen: Tensor, drawn: Sequence[tuple[Tensor, Tensor, Facts]]) -> None:
    """Draw all maps: a row per method and layer, a column per class. A single class gives a nearly square grid."""
    panels = [figures.Panel(seen, camfn.maps.normalize(raw, (-2, -1)), caption=_caption(job, facts)) for raw, _, facts in drawn]
    width = len({facts["class"] for *_, facts in drawn})
    width = width if width > 1 else math.ceil(len(panels) ** 0.5)
    picture = figures.grid(figures.lines(panels, width), title=escaped(path.name))
    with files.claimed(job.wish.out, files.plain(f"{path.stem}-grid"), ("png",)) as base:
        picture.save(f"{base}.png")
    sys.stderr.write(f"note: {escaped(path)}: all maps in one picture: {escaped(base)}.png\n")


def _caption(job: Job, facts: Facts) -> str:
    layer = f", {facts['layer']}" if len(job.layers) > 1 else ""
    return f"{facts['method']}{layer}, {facts['class_name'] or facts['class']}"


def _resize(job: Job, x: Tensor, raw: Tensor) -> Tensor:
    """Return the maps at the size to save. The overlay always uses the layer's own grid."""
    size = x.shape[2:] if job.wish.size == "input" else job.wish.size
    return raw if size is None else camfn.maps.resize(raw, size)


def _about_run(job: Job, path: Path, x: Tensor) -> Facts:
    return {
        "image": str(path),
        "model": job.loaded.spec,
        "weights": None if job.wish.weights is None else str(job.wish.weights),
        "pretrained": not job.wish.no_pretrained,
        "device": str(x.device),
        "input": list(x.shape[1:]),
    }


def _about_map(job: Job, made: Map, saved: Tensor) -> Facts:
    card, raw, notes = made
    return {
        "layer": card.layers[0] if card.layers else None,
        "method": card.method,
        "seed": job.options.get("seed") if catalog.ROWS[card.method].seed else None,
        "grid": list(raw.shape[1:]),
        "size": list(saved.shape[1:]),
        "seconds": card.seconds,
        "forwards": card.forwards,
        "backwards": card.backwards,
        "heads": card.heads,
        "findings": [finding._asdict() for finding in card.findings],
        "notes": list(notes),
        "camfn": camfn.__version__,
        "torch": torch.__version__,
    }


def _write(job: Job, path: Path, seen: Tensor, raw: Tensor, saved: Tensor, facts: Facts) -> Written:
    overlay = images.overlay(seen, camfn.maps.normalize(raw, (-2, -1)))
    return facts, files.write(job.wish.out, _name(path, facts), overlay, saved.numpy(), facts)


def _name(path: Path, facts: Facts) -> str:
    return "-".join(str(part) for part in (path.stem, facts["layer"], facts["method"], facts["class"]) if part is not None)
