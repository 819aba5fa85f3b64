"""The command line: parses, calls, shows progress, writes files. Click, Pillow and tqdm are imported where they are used."""

import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import camfn
from camfn import images
from camfn._errors import CamError, CamWarning, closest
from camfn.targets import logits_of

if TYPE_CHECKING:
    import click

ENDINGS = (".png", ".npy", ".json")


class Model(NamedTuple):
    """What the function of `--model` returned."""

    spec: str
    file: Path
    module: nn.Module
    preprocess: Callable[[Any], Any]
    names: tuple[str, ...]  # of the classes; empty where they have none


class Job(NamedTuple):
    """What is wanted of each picture."""

    model: Model
    layers: tuple[str | None, ...]
    method: str
    target: str | None
    out: Path


# -------------------------------------------------------------------------------------------------- the model file


def load_model(spec: str) -> Model:
    """Run the file of `path/to/file.py:function` and call the function."""
    path, colon, name = spec.rpartition(":")
    if not (colon and path and name):
        raise CamError(f"--model {spec!r} has no function in it: write path/to/file.py:function")
    file = Path(path)
    if not file.is_file():
        raise CamError(f"--model: there is no file {path!r}")
    module = _run_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CamError(f"--model: {path!r} has no function {name!r}; closest: {closest(name, known)}")
    with _told(f"--model: {spec}", file):
        return _model_of(spec, file, _call_bare(function, spec))


def _run_file(file: Path) -> types.ModuleType:
    name = "_camfn_model_" + re.sub(r"\W", "_", file.stem)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CamError(f"--model: {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for their module there
    with _told(f"--model: {file}", file):
        spec.loader.exec_module(module)
    return module


def _call_bare(function: Callable[..., Any], spec: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CamError(f"--model: {spec} must take no argument ({error})") from None
    except ValueError:  # a callable without a signature
        pass
    return function()


def _model_of(spec: str, file: Path, made: Any) -> Model:
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    module, preprocess, names = (*parts, None, None)[:3]
    right = len(parts) <= 3 and isinstance(module, nn.Module) and (preprocess is None or callable(preprocess))
    listed = names is None or (isinstance(names, Sequence) and not isinstance(names, str))
    if not right or not listed:
        found = ", ".join(type(part).__name__ for part in parts)
        raise CamError(
            f"--model: {spec} must return the model, (model, preprocess) or (model, preprocess, class names); found {found}"
        )
    return Model(spec, file, module, preprocess or as_it_is, tuple(map(str, names or ())))


@contextmanager
def _told(what: str, file: Path) -> Iterator[None]:
    """An exception in the user's code becomes one sentence that says in which line of the file."""
    try:
        yield
    except CamError:
        raise
    except (Exception, SystemExit) as error:
        raise CamError(f"{what} failed{_where(error, file)}: {_short(error)}") from error


def _where(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f" at line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" at line {frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _short(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(str(text).split())[:500]}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """As for a script that is run: modules beside the file can be imported."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


# ------------------------------------------------------------------------------------------------------ the inputs


def as_it_is(picture: Any) -> Tensor:
    """The default preprocessing: `(3, h, w)` in [0, 1], neither resized nor normalised."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _input(model: Model, picture: Any, path: Path) -> Tensor:
    """What preprocess makes of a picture, as a batch of one on the model's device and in its dtype."""
    with _told(f"{path}: preprocess", model.file):
        x = model.preprocess(picture)
    if not isinstance(x, Tensor) or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[0] != 1):
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise CamError(f"{path}: preprocess must return a tensor of shape (channels, height, width); found {found}")
    like = next((p for p in itertools.chain(model.module.parameters(), model.module.buffers()) if p.is_floating_point()), x)
    x = x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
    return x if x.ndim == 4 else x[None]


def _outputs(model: Model, x: Tensor, path: Path) -> Tensor:
    """The model's output for one picture, `(classes,)`."""
    try:
        with torch.no_grad():
            y = logits_of(camfn.pure(model.module)(camfn.state_of(model.module), x))
    except CamError:
        raise
    except Exception as error:
        raise CamError(
            f"{path}: the model failed on an input of shape {tuple(x.shape)}{_where(error, model.file)}: {_short(error)}"
        ) from error
    if y.ndim != 2 or y.shape[0] != 1:
        raise CamError(
            f"{path}: the model's output has shape {tuple(y.shape)}, and a class is explained: (1, classes) is wanted"
        )
    if model.names and len(model.names) != y.shape[1]:
        raise CamError(f"--model: {model.spec} gives {len(model.names)} class names, and the model {y.shape[1]} classes")
    return y[0].float()


def class_of(target: str | None, names: Sequence[str]) -> int | None:
    """The class that `--target` means: a number is an index, anything else a name, in any case of letters."""
    if target is None:
        return None
    if re.fullmatch(r"[+-]?\d+", target.strip()):
        return int(target)
    found = [index for index, name in enumerate(names) if name.lower() == target.strip().lower()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CamError(f"--target {target!r} is the name of the classes {', '.join(map(str, found))}: give a number")
    known = f"closest: {closest(target, names)}" if names else "the model's function gives no class names, so give a number"
    raise CamError(f"--target {target!r} is not a class; {known}")


def probabilities(outputs: Tensor) -> Tensor:
    """Softmax, except of outputs that are probabilities already."""
    already = bool((outputs >= 0).all()) and abs(float(outputs.sum()) - 1) < 1e-4
    return outputs if already else torch.softmax(outputs, 0)


# ----------------------------------------------------------------------------------------------------- the picture


def run(paths: Sequence[Path], spec: str, layers: Sequence[str], method: str, target: str | None, out: Path) -> Iterator[str]:
    """Explain every picture; yields a line about each. All that can be refused is refused before the first sweep."""
    _need("PIL", "tqdm")
    if method not in camfn.METHODS:
        raise CamError(
            f"--method {method!r} is not known; closest: {closest(method, camfn.METHODS)}; all: {', '.join(camfn.METHODS)}"
        )
    for path in paths:
        images.read(path)
    with _importable(Path(spec.rpartition(":")[0]).parent):
        model = load_model(spec)
        if layers:
            camfn.tap(model.module, list(layers))
        class_of(target, model.names)
        _make(out)
        job = Job(model, tuple(layers) or (None,), method, target, out)
        for path in paths:
            yield _explain(job, path)


def _explain(job: Job, path: Path) -> str:
    picture = images.read(path)
    x = _input(job.model, picture, path)
    outputs = _outputs(job.model, x, path)
    wanted = class_of(job.target, job.model.names)
    seen, true_colours = images.as_seen(x[0], job.model.preprocess, picture.size)
    files = []
    for layer in job.layers:
        card, raw, notes = _map(job, path, x, layer, wanted)
        if not true_colours:
            notes += ("the overlay's colours are stretched: preprocess does more than scale and shift each channel",)
        for note in notes:
            sys.stderr.write(f"note: {path}: {note}\n")
        facts = _facts(job, path, x, outputs, card, raw, notes)
        overlay = images.overlay(seen, camfn.maps.normalize(raw, (-2, -1)))
        files.append(_write(job.out, f"{path.stem}-{facts['layer']}-{job.method}-{facts['class']}", overlay, raw, facts))
    return f"{path}: {_summary(facts)} -> {', '.join(files)}"


def _map(job: Job, path: Path, x: Tensor, layer: str | None, target: int | None) -> Any:
    """The card, the raw map and all that camfn had to say about them."""
    options: dict[str, Any] = {"normalize": False}
    with warnings.catch_warnings(record=True) as caught, _bar(path.name if layer is None else f"{path.name} {layer}") as report:
        warnings.simplefilter("always", CamWarning)
        if "masked inputs" in camfn.METHODS[job.method].needs:
            options["sweep"] = camfn.Sweep(progress=report)
        try:
            card = camfn.explain(job.model.module, layer, x, target, method=job.method, **options)
        except CamError as error:
            raise CamError(f"{path}: {error}") from error
        except Exception as error:
            raise CamError(f"{path}: the model failed on a masked input: {_short(error)}") from error
    notes = tuple(str(w.message) for w in caught if issubclass(w.category, CamWarning))
    for other in (w for w in caught if not issubclass(w.category, CamWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    raw = card.maps[0].detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    if raw.ndim != 2:
        raise CamError(f"{path}: layer {card.layers[0]!r} gives a map of shape {tuple(raw.shape)}, and a picture needs (h, w)")
    return card, raw, (*notes, *card.notes)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of forwards done and time left, on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="forward", file=sys.stderr, disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _facts(job: Job, path: Path, x: Tensor, outputs: Tensor, card: Any, raw: Tensor, notes: Sequence[str]) -> dict[str, Any]:
    index, best = int(card.classes[0, 0]), int(outputs.argmax())
    name = dict(enumerate(job.model.names)).get
    return {
        "image": str(path),
        "model": job.model.spec,
        "input": list(x.shape[1:]),
        "class": index,
        "class_name": name(index),
        "score": float(card.scores[0, 0]),
        "probability": float(probabilities(outputs)[index]),
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


def _summary(facts: dict[str, Any]) -> str:
    name = f"{facts['class_name']} (class {facts['class']})" if facts["class_name"] else f"class {facts['class']}"
    return f"{name}, score {facts['score']:.4g}, probability {facts['probability']:.3g}"


# ------------------------------------------------------------------------------------------------------- the files


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamError(f"--out {str(folder)!r} cannot be made: {error.strerror}") from None


def _write(folder: Path, name: str, overlay: Any, raw: Tensor, facts: dict[str, Any]) -> str:
    """Write the three files under a name that none of them has yet; returns it, as a shell would abbreviate them."""
    try:
        base = _claim(folder, re.sub(r"[^\w.+ -]", "_", name))
        overlay.save(f"{base}.png")
        np.save(f"{base}.npy", raw.numpy())
        Path(f"{base}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CamError(f"the files cannot be written to {str(folder)!r}: {error.strerror}") from None
    return f"{base}.{{{','.join(ending[1:] for ending in ENDINGS)}}}"


def _claim(folder: Path, name: str) -> Path:
    """A path without its ending that no file has: the first of `name`, `name-2`, `name-3`, ..."""
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        if not any(os.path.lexists(f"{base}{ending}") for ending in ENDINGS):
            try:
                Path(f"{base}.json").open("x").close()  # another run may be just as far
            except FileExistsError:
                continue
            return base
    raise AssertionError("unreachable")


# ----------------------------------------------------------------------------------------------------- the command


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CamError(f"the command line needs {', '.join(missing)}: pip install 'camfn[cli]'")


def app() -> "click.Group":
    """The `camfn` command, for click."""
    import click

    @click.group(context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(camfn.__version__, prog_name="camfn")
    def group() -> None:
        """Class activation maps: where in a picture a network saw what it says."""

    @group.command(help=_HELP)
    @click.argument("image", nargs=-1, required=True, type=click.Path(path_type=Path))
    @click.option(
        "--model", required=True, metavar="FILE.py:FUNCTION", help="The function that returns the model. The file is RUN."
    )
    @click.option(
        "--layer", multiple=True, metavar="L", help="A layer by its dotted name; may be repeated.  [default: chosen, and said]"
    )
    @click.option("--method", default="score_cam", show_default=True, metavar="M", help=f"One of {', '.join(camfn.METHODS)}.")
    @click.option(
        "--target", metavar="T", help="A class: its index, or its name if there are names.  [default: the predicted class]"
    )
    @click.option(
        "--out",
        default="camfn-maps",
        show_default=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Where the files go.",
    )
    def explain(
        image: tuple[Path, ...], model: str, layer: tuple[str, ...], method: str, target: str | None, out: Path
    ) -> None:
        try:
            for line in run(image, model, layer, method, target, out):
                click.echo(line)
        except CamError as error:
            refusal = click.ClickException(" ".join(str(error).split()))
            refusal.exit_code = 2
            raise refusal from None

    return group


_HELP = """Map where in each IMAGE the network sees a class.

--model names a Python file and a function in it. The file is run, with its own folder importable, so name only files that you
trust. The function takes no argument and returns the model, or (model, preprocess), or (model, preprocess, class names).
preprocess takes an RGB picture (PIL) and returns the network's input, (channels, height, width); without it the picture goes in as
it is, as numbers from 0 to 1, not resized.

For each image and layer three files are written, under a name that no file has yet:

\b
  .png   the map in colours over the picture, half and half
  .npy   the raw map on the layer's own grid, not scaled to [0, 1]
  .json  class, score, probability, layer, method, cost, notes

The picture under the map is the one that the network saw: resized and cropped by preprocess, since that is what the map
belongs to. Its colours are brought back by undoing preprocess's scaling of each channel; where preprocess does something
else to colours, they are stretched instead, and a note says so.
"""


def main() -> None:
    """Run the command; without click, say what to install."""
    try:
        _need("click")
        command = app()
    except CamError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
    command(prog_name="camfn")
