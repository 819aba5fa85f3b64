"""The command line: parses, calls, shows progress, writes files. Click, Pillow and tqdm are imported where they are used."""

import importlib.util
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import camfn
from camfn import images, zoo
from camfn._errors import CamError, CamWarning, closest

if TYPE_CHECKING:
    import click

_HELP = """Map where in each IMAGE the network sees a class.

--model names a Python file and a function in it. The file is run, with its own folder importable, so name only files that you
trust. The function takes no argument and returns the model, or (model, preprocess), or (model, preprocess, class names).
preprocess takes an RGB picture (PIL) and returns the network's input, (channels, height, width); without it the picture goes
in as it is, as numbers from 0 to 1, not resized.

For each image and layer three files are written, under a name that no file has yet:

\b
  .png   the map in colours over the picture, half and half
  .npy   the raw map on the layer's own grid, not scaled to [0, 1]
  .json  class, score, probability (softmax), layer, method, cost, notes

The picture under the map is the one that the network saw, resized and cropped by preprocess, since that is what the map
belongs to. Its colours are brought back by undoing preprocess's scaling of each channel; where preprocess does something
else to colours, they are stretched instead, and a note says so.
"""


class Job(NamedTuple):
    """What is wanted of each picture."""

    loaded: zoo.Loaded
    layers: tuple[str | None, ...]
    method: str
    target: str | None
    out: Path


def app() -> "click.Group":
    """The `camfn` command, for click."""
    import click

    class Refusal(click.ClickException):
        exit_code = 2

    @click.group("camfn", context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(camfn.__version__, prog_name="camfn")
    def group() -> None:
        """Class activation maps: where in a picture a network sees a class."""

    # Files are checked where they are read: click would print its usage for what is no misuse.
    place, methods = click.Path(readable=False, path_type=Path), ", ".join(camfn.METHODS)

    @group.command(help=_HELP)
    @click.argument("image", nargs=-1, required=True, type=place)
    @click.option("--model", required=True, metavar="FILE.py:FUNCTION", help="What returns the model. The file is run.")
    @click.option("--layer", multiple=True, metavar="L", help="A layer's dotted name; repeatable.  [default: chosen, and said]")
    @click.option("--method", default="score_cam", show_default=True, metavar="M", help=f"One of {methods}.")
    @click.option("--target", metavar="T", help="A class: its index, or its name.  [default: the predicted class]")
    @click.option("--out", default="camfn-maps", show_default=True, metavar="DIR", type=place, help="Where the files go.")
    def explain(
        image: tuple[Path, ...], model: str, layer: tuple[str, ...], method: str, target: str | None, out: Path
    ) -> None:
        try:
            for line in run(image, model, layer, method, target, out):
                click.echo(line)
        except CamError as error:
            raise Refusal(" ".join(str(error).split())) from None

    return group


def main() -> None:
    """Run the command; without click, say what to install."""
    try:
        _need("click")
        command = app()
    except CamError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
    command(prog_name="camfn")


def _need(*modules: str) -> None:
    missing = [{"PIL": "Pillow"}.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CamError(f"the command line needs {' and '.join(missing)}: pip install 'camfn[cli]'")


# ------------------------------------------------------------------------------------------------------ the explaining


def run(paths: Sequence[Path], spec: str, layers: Sequence[str], method: str, target: str | None, out: Path) -> Iterator[str]:
    """Explain every picture; yields a line about each. What can be refused is refused before the first sweep."""
    _need("PIL", "tqdm")
    if method not in camfn.METHODS:
        raise CamError(
            f"--method {method!r} is not known; closest: {closest(method, camfn.METHODS)}; all: {', '.join(camfn.METHODS)}"
        )
    for path in paths:
        images.read(path)
    with zoo.importable(zoo.file_of(spec)[0].parent):
        loaded = zoo.load(spec)
        if layers:
            camfn.tap(loaded.model, list(layers))
        zoo.class_of(target, loaded.names)
        _make(out)
        job = Job(loaded, tuple(layers) or (None,), method, target, out)
        for path in paths:
            try:
                yield _explain(job, path)
            except CamError as error:
                raise CamError(f"{path}: {error}") from error


def _explain(job: Job, path: Path) -> str:
    picture = images.read(path)
    x = zoo.input_of(job.loaded, picture)
    outputs = zoo.outputs_of(job.loaded, x)
    target = zoo.class_of(job.target, job.loaded.names)
    seen, true_colours = images.as_seen(x[0], job.loaded.preprocess, picture.size)
    files, summary = [], ""
    for layer in job.layers:
        card, raw, notes = _map(job, path, x, layer, target)
        if not true_colours:
            notes += ("the overlay's colours are stretched: preprocess does more than scale each channel",)
        for note in notes:
            sys.stderr.write(f"note: {path}: {note}\n")
        facts = _facts(job, path, x, outputs, card, raw, notes)
        overlay = images.overlay(seen, camfn.maps.normalize(raw, (-2, -1)))
        files.append(_write(job.out, f"{path.stem}-{facts['layer']}-{job.method}-{facts['class']}", overlay, raw, facts))
        summary = _summary(facts)
    return f"{path}: {summary} -> {', '.join(files)}"


def _map(job: Job, path: Path, x: Tensor, layer: str | None, target: int | None) -> tuple[Any, Tensor, tuple[str, ...]]:
    """The card, the raw map `(h, w)`, and all that camfn had to say about them."""
    options: dict[str, Any] = {"normalize": False}
    with warnings.catch_warnings(record=True) as caught, _bar(" ".join(filter(None, (path.name, layer)))) as report:
        warnings.simplefilter("always", CamWarning)
        if "masked inputs" in camfn.METHODS[job.method].needs:
            options["sweep"] = camfn.Sweep(progress=report)
        with zoo.told("the model, on masked inputs,", job.loaded.file):
            card = camfn.explain(job.loaded.model, layer, x, target, method=job.method, **options)
    said = []
    for warning in caught:
        if issubclass(warning.category, CamWarning):
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    raw = card.maps[0].detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    if raw.ndim != 2:
        raise CamError(f"layer {card.layers[0]!r} gives a map of shape {tuple(raw.shape)}, and a picture needs (height, width)")
    return card, raw, (*said, *card.notes)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of forwards done and time left, on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="forward", file=sys.stderr, disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


# ------------------------------------------------------------------------------------------------------------ the card


def _facts(job: Job, path: Path, x: Tensor, outputs: Tensor, card: Any, raw: Tensor, notes: Sequence[str]) -> dict[str, Any]:
    index, best = int(card.classes[0, 0]), int(outputs.argmax())
    name, probability = dict(enumerate(job.loaded.names)).get, float(probabilities(outputs)[index])
    return {
        "image": str(path),
        "model": job.loaded.spec,
        "input": list(x.shape[1:]),
        "class": index,
        "class_name": name(index),
        "score": float(card.scores[0, 0]),
        "probability": probability if math.isfinite(probability) else None,
        "predicted_class": best,
        "predicted_class_name": name(best),
        "layer": card.layers[0],
        "method": card.method,
        "grid": list(raw.shape),
        "seconds": card.seconds,
        "forwards": card.forwards,
        "notes": list(notes),
        "camfn": camfn.__version__,
        "torch": torch.__version__,
    }


def probabilities(outputs: Tensor) -> Tensor:
    """Softmax, except of outputs that are probabilities already."""
    already = bool((outputs >= 0).all()) and abs(float(outputs.sum()) - 1) < 1e-4
    return outputs if already else torch.softmax(outputs, 0)


def _summary(facts: dict[str, Any]) -> str:
    name = f"{facts['class_name']} (class {facts['class']})" if facts["class_name"] else f"class {facts['class']}"
    probability = "" if facts["probability"] is None else f", probability {facts['probability']:.3g}"
    return f"{name}, score {facts['score']:.4g}{probability}"


# ----------------------------------------------------------------------------------------------------------- the files


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamError(f"--out {str(folder)!r} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise CamError(f"--out {str(folder)!r} cannot be written to")


def _write(folder: Path, name: str, overlay: Any, raw: Tensor, facts: dict[str, Any]) -> str:
    """Write the three files under a name that none of them has yet; returns it as a shell would abbreviate the three."""
    try:
        base = _claim(folder, re.sub(r"[^\w.+ -]", "_", name))
        overlay.save(f"{base}.png")
        np.save(f"{base}.npy", raw.numpy())
        Path(f"{base}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CamError(f"the files cannot be written to {str(folder)!r}: {error.strerror}") from None
    return f"{base}.{{png,npy,json}}"


def _claim(folder: Path, name: str) -> Path:
    """A path, less its ending, that no file has: the first of `name`, `name-2`, `name-3`, ..."""
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        if not any(os.path.lexists(f"{base}{ending}") for ending in (".png", ".npy", ".json")):
            try:
                Path(f"{base}.json").open("x").close()  # another run may be at the same point
            except FileExistsError:
                continue
            return base
    raise AssertionError("unreachable")
