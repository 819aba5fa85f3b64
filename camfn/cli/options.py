"""What the options of the commands mean, checked before any work; and how a refusal is said."""

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
    "A class: its index, or its name in any case of letters. topK, as in top3: the K classes with the highest output, from one "
    "sweep (a class that is itself called top3: by its index).  [default: the predicted class]"
)
_MODEL = "demo, torchvision:NAME, timm:NAME, hf:NAME or FILE.py:FUNCTION; camfn explain --help says more."
ALL = "all"
SIZE = "Of the map in the .npy: grid (the layer's own), input (the network's input), or HxW, as in 224x224."


# ----------------------------------------------------------------------------------------------------- the refusals


def need(*modules: str) -> None:
    """What the command line needs beside torch."""
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append({"PIL": "Pillow"}.get(name, name))
    if missing:
        raise CamError(f"the command line needs {' and '.join(missing)}: pip install 'camfn[cli]'")


def one_line(message: object) -> str:
    """A message as it is printed: on one line, whatever it quotes."""
    return escaped(" ".join(str(message).split()))


@contextmanager
def refusing() -> Iterator[TextIO]:
    """For the length of a command: what camfn refuses, and what others warn of, is one line each on stderr.

    Gives stdout, which is the command's alone: what a model prints goes to stderr.
    """
    import click

    class Refusal(click.ClickException):
        exit_code = 2

    def note(message: Warning | str, category: type[Warning], *_: Any) -> None:
        line = f"note: {category.__name__}: {one_line(message)}"
        if line not in said:  # once, and not for every picture
            said.add(line)
            click.echo(line, err=True)

    said: set[str] = set()
    stdout = sys.stdout
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr), signals.raised():
            warnings.showwarning = note
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds")  # Pillow's; camfn has a limit of its own
            yield stdout
    except CamError as error:
        raise Refusal(one_line(error)) from None
    except KeyboardInterrupt as error:
        line, status = signals.told(error)
        click.echo(line, err=True)
        raise SystemExit(status) from None


def no_progress(command: F) -> F:
    """The option that hides the bar."""
    import click

    return click.option("--no-progress", is_flag=True, help="No bar, on a terminal either.")(command)


# ------------------------------------------------------------------------------------------------------- the model


def of_the_model(command: F) -> F:
    """The options that name a model and where it runs."""
    import click

    place = click.Path(readable=False, path_type=Path)
    for option in (
        click.option("--device", metavar="D", help="Where it runs: cpu, cuda, cuda:1, mps.  [default: where it is]"),
        click.option("--no-pretrained", is_flag=True, help="Random weights, the same in every run; nothing is downloaded."),
        click.option(
            "--weights", type=place, metavar="FILE", help="Weights to load: .safetensors, or a state_dict of torch.save."
        ),
        click.option("--model", required=True, metavar="SPEC", help=_MODEL),
    ):
        command = option(command)
    return command


@contextmanager
def opened(spec: str, weights: Path | None, no_pretrained: bool, device: torch.device | None) -> Iterator[zoo.Loaded]:
    """The model that the options name, on the device that they name."""
    with zoo.opened(spec, weights=weights, pretrained=not no_pretrained) as loaded:
        with zoo.told(f"moving the model to {device}", loaded.file):
            model = loaded.model if device is None else loaded.model.to(device)
        yield loaded._replace(model=model)


def device_of(text: str | None) -> torch.device | None:
    """A device that is there."""
    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CamError(f"--device {text!r} is no device that torch knows: write cpu, cuda, cuda:1, mps or the like") from None
    try:
        float(torch.ones(1, device=device))
    except Exception as error:  # each backend has its own way to say that it is not there
        why = one_line(error).partition(". ")[0]
        raise CamError(f"--device {text!r} cannot be used here: {why}; leave it out to run where the model is") from None
    return device


def input_of(loaded: zoo.Loaded, picture: Any, device: torch.device | None) -> Tensor:
    """What the network sees of a picture, as a batch of one; a model without tensors does not say on which device."""
    x = zoo.input_of(loaded, picture)
    return x if device is None else x.to(device)


# ------------------------------------------------------------------------------------------------- what is explained


def target_of(text: str | None, names: tuple[str, ...]) -> Target:
    """A class, or for `topK` the K best."""
    best = re.fullmatch(r"top([1-9]\d*)", (text or "").strip(), re.IGNORECASE)
    return zoo.class_of(text, names) if best is None else camfn.targets.top(int(best[1]))


def size_of(text: str) -> Size:
    """As the methods take it."""
    if text in ("grid", "input"):
        return None if text == "grid" else "input"
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sides is None:
        raise CamError(f"--size {text!r} is no size: write grid, input, or HxW, height by width, as in 224x224")
    height, width = int(sides[1]), int(sides[2])
    if height * width > LARGEST:
        raise CamError(f"--size {text!r} is more than {LARGEST // 10**6} megapixels: write a smaller one")
    return height, width


def methods_of(named: Sequence[str]) -> tuple[str, ...]:
    """The methods that are named, each once; `all` are those of the table."""
    for method in named:
        if method not in (*camfn.METHODS, ALL):
            raise CamError(
                f"--method {method!r} is not known; closest: {closest(method, camfn.METHODS)}; `camfn methods` lists all"
            )
    return tuple(camfn.METHODS) if ALL in named else tuple(dict.fromkeys(named))


def method_options(methods: Sequence[str], seed: int | None, chunk: int | None) -> dict[str, Any]:
    """What the methods are given beside model, layer, input and target, each what it has."""
    some, one = ", ".join(methods), len(methods) == 1
    given: dict[str, Any] = {"normalize": False}
    if seed is not None and not 0 <= seed < 2**63:
        raise CamError(f"--seed {seed}: a seed is a whole number from 0 to 2**63 - 1")
    if any(draws(method) for method in methods):
        given["seed"] = 0 if seed is None else seed
    elif seed is not None:
        verb = "draws" if one else "draw"
        raise CamError(f"--seed {seed}: {some} {verb} no random numbers; leave it out, or take {_some(draws)}")
    if any(map(_sweeps, methods)):
        given["sweep"] = camfn.Sweep(chunk=chunk)
    elif chunk is not None:
        has = "has" if one else "have"
        raise CamError(f"--chunk {chunk}: {some} {has} no sweep to cut up; leave it out, or take {_some(_sweeps)}")
    return given


def draws(method: str) -> bool:
    """Is there noise in a plain call of the method? A seed alone may be of the draws that a tolerance is judged by."""
    return takes(method, "seed") and not (takes(method, "tolerance") and not takes(method, "noise"))


def takes(method: str, option: str) -> bool:
    """Does the method have an option of that name?"""
    return option in _parameters(method)


def _parameters(method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(camfn.METHODS[method].function).parameters


def _sweeps(method: str) -> bool:
    return takes(method, "sweep")


def _some(fit: Callable[[str], bool]) -> str:
    """The first three methods that fit: all of them are too many for a sentence."""
    *names, last = [name for name in camfn.METHODS if fit(name)][:3]
    return f"another method, such as {', '.join(names)} or {last}"
