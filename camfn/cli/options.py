"""The options of the commands: parsed and checked before any work, with errors on one line."""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor

import camfn
from camfn import zoo
from camfn._errors import CamError, closest, escaped
from camfn._types import Size, Target
from camfn.cli import signals
from camfn.images import LARGEST

F = TypeVar("F", bound=Callable[..., Any])

TARGET = (
    "A class: its index, or its name (case-insensitive). topK, such as top3: the K classes with the highest output, in one "
    "sweep (use the index for a class that is itself called top3).  [default: the predicted class]"
)
_MODEL = "demo, torchvision:NAME, timm:NAME, hf:NAME or FILE.py:FUNCTION; see camfn explain --help."
ALL = "all"
SIZE = "Size of the map in the .npy: grid (the layer's own), input (the network's input), or HxW, such as 224x224."


# ----------------------------------------------------------------------------------------------------------- errors


def need(*modules: str) -> None:
    """Raise CamError if a package that the command line needs is not installed."""
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append({"PIL": "Pillow"}.get(name, name))
    if missing:
        raise CamError(f"the command line needs {' and '.join(missing)}: pip install 'camfn[cli]'")


def one_line(message: object) -> str:
    """Return a message on one line, without control characters."""
    return escaped(" ".join(str(message).split()))


@contextmanager
def refusing() -> Iterator[TextIO]:
    """Print errors of camfn and warnings of others during a command as one line each, on stderr.

    Yields stdout for the output of the command. What a model prints goes to stderr.
    """
    import click

    class Refusal(click.ClickException):
        exit_code = 2

    def note(message: Warning | str, category: type[Warning], *_: Any) -> None:
        line = f"note: {category.__name__}: {one_line(message)}"
        if line not in said:  # once, not once per picture
            said.add(line)
            click.echo(line, err=True)

    said: set[str] = set()
    stdout = sys.stdout
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr), signals.raised():
            warnings.showwarning = note
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds")  # camfn has its own limit
            yield stdout
    except CamError as error:
        raise Refusal(one_line(error)) from None
    except KeyboardInterrupt as error:
        line, status = signals.told(error)
        click.echo(line, err=True)
        raise SystemExit(status) from None


def no_progress(command: F) -> F:
    """Add the option that hides the progress bar."""
    import click

    return click.option("--no-progress", is_flag=True, help="Hide the progress bar.")(command)


# ------------------------------------------------------------------------------------------------------- the model


def of_the_model(command: F) -> F:
    """Add the options for the model and its device."""
    import click

    place = click.Path(readable=False, path_type=Path)
    for option in (
        click.option("--device", metavar="D", help="Device to run on: cpu, cuda, cuda:1, mps.  [default: the model's]"),
        click.option("--no-pretrained", is_flag=True, help="Use random weights, the same in every run, and download nothing."),
        click.option(
            "--weights", type=place, metavar="FILE", help="Weights to load: .safetensors, or a state_dict from torch.save."
        ),
        click.option("--model", required=True, metavar="SPEC", help=_MODEL),
    ):
        command = option(command)
    return command


@contextmanager
def opened(spec: str, weights: Path | None, no_pretrained: bool, device: torch.device | None) -> Iterator[zoo.Loaded]:
    """Load the model and move it to the device."""
    with zoo.opened(spec, weights=weights, pretrained=not no_pretrained) as loaded:
        with zoo.told(f"moving the model to {device}", loaded.file):
            model = loaded.model if device is None else loaded.model.to(device)
        yield loaded._replace(model=model)


def device_of(text: str | None) -> torch.device | None:
    """Parse a device. Raise CamError if it is not available."""
    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CamError(f"--device {text!r} is not a device of torch: write cpu, cuda, cuda:1, mps or similar") from None
    try:
        float(torch.ones(1, device=device))
    except Exception as error:  # each backend raises its own type
        why = one_line(error).partition(". ")[0]
        raise CamError(f"--device {text!r} cannot be used here: {why}; leave it out to run where the model is") from None
    return device


def input_of(loaded: zoo.Loaded, picture: Any, device: torch.device | None) -> Tensor:
    """Preprocess a picture to a batch of one on the device. A model without tensors has no device of its own."""
    x = zoo.input_of(loaded, picture)
    return x if device is None else x.to(device)


# ------------------------------------------------------------------------------------------ targets, sizes, methods


def target_of(text: str | None, names: tuple[str, ...]) -> Target:
    """Parse `--target`: a class, or `topK`."""
    best = re.fullmatch(r"top([1-9]\d*)", (text or "").strip(), re.IGNORECASE)
    return zoo.class_of(text, names) if best is None else camfn.targets.top(int(best[1]))


def size_of(text: str) -> Size:
    """Parse `--size`."""
    if text in ("grid", "input"):
        return None if text == "grid" else "input"
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sides is None:
        raise CamError(f"--size {text!r} is not a size: write grid, input, or HxW, height by width, such as 224x224")
    height, width = int(sides[1]), int(sides[2])
    if height * width > LARGEST:
        raise CamError(f"--size {text!r} is more than {LARGEST // 10**6} megapixels: write a smaller one")
    return height, width


def methods_of(named: Sequence[str]) -> tuple[str, ...]:
    """Return the named methods without duplicates. `all` means every method."""
    for method in named:
        if method not in (*camfn.METHODS, ALL):
            raise CamError(
                f"--method {method!r} is not known; closest: {closest(method, camfn.METHODS)}; `camfn methods` lists all"
            )
    return tuple(camfn.METHODS) if ALL in named else tuple(dict.fromkeys(named))


def method_options(methods: Sequence[str], seed: int | None, chunk: int | None) -> dict[str, Any]:
    """Return the options for the methods. Raise CamError if no method uses the seed or the chunk."""
    some, one = ", ".join(methods), len(methods) == 1
    given: dict[str, Any] = {"normalize": False}
    if seed is not None and not 0 <= seed < 2**63:
        raise CamError(f"--seed {seed}: a seed is an integer from 0 to 2**63 - 1")
    if any(draws(method) for method in methods):
        given["seed"] = 0 if seed is None else seed
    elif seed is not None:
        verb = "draws" if one else "draw"
        raise CamError(f"--seed {seed}: {some} {verb} no random numbers; omit it, or use {_examples(draws)}")
    if any(map(_sweeps, methods)):
        given["sweep"] = camfn.Sweep(chunk=chunk)
    elif chunk is not None:
        has = "has" if one else "have"
        raise CamError(f"--chunk {chunk}: {some} {has} no sweep to split; omit it, or use {_examples(_sweeps)}")
    return given


def draws(method: str) -> bool:
    """Return True if a plain call of the method draws random numbers. With `tolerance=`, a seed may be unused by default."""
    return takes(method, "seed") and not (takes(method, "tolerance") and not takes(method, "noise"))


def takes(method: str, option: str) -> bool:
    """Return True if the method has an option of that name."""
    return option in _parameters(method)


def _parameters(method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(camfn.METHODS[method].function).parameters


def _sweeps(method: str) -> bool:
    return takes(method, "sweep")


def _examples(fit: Callable[[str], bool]) -> str:
    """Return the first three methods that fit, for a message."""
    *names, last = [name for name in camfn.METHODS if fit(name)][:3]
    return f"another method, such as {', '.join(names)} or {last}"
