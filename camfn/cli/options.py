"""The options of the commands, and errors on one line.

Nothing here imports torch, so that help and errors of usage do not wait for it.
"""

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, TypeVar

from camfn import _specs
from camfn._errors import CamError, escaped
from camfn.cli import catalog, signals

F = TypeVar("F", bound=Callable[..., Any])
Size = tuple[int, int] | Literal["photo", "input"]

TARGET = (
    "A class: its index, its name, a synonym (names have commas between synonyms), or a part of its name, in any case. topK, "
    "such as top3: the K classes with the highest output (use the index for a class that is itself called top3). Repeatable; "
    "all targets come from one sweep.  [default: the predicted class]"
)
_MODEL = "demo, torchvision:NAME, timm:NAME, hf:NAME or FILE.py:FUNCTION; see camfn explain --help."
SIZE = (
    "Size of the pictures: photo; input, which is the picture as the network saw it; or the pixels that they fit into, such as "
    "800 or 600x800 (height by width)."
)
LARGEST = 25_000_000
"""The maximal number of pixels of a picture that is written."""
COLORS = ("inferno", "viridis", "berlin", "turbo", "jet")
"""The names of `camfn.images.COLORMAPS`, the default first, as a test verifies."""
STYLES = ("heat", "contour", "mask")
"""The names of `camfn.images.STYLES`, the default first."""
ALPHA = 0.75
"""The default of `camfn.images.overlay`."""


class Wish(NamedTuple):
    """The arguments of `camfn explain`."""

    images: Sequence[str]
    model: str
    weights: Path | None
    no_pretrained: bool
    device: str | None
    layers: Sequence[str]
    methods: Sequence[str]
    targets: Sequence[str]
    size: Size
    style: Any
    colors: str
    alpha: float
    captions: bool | None
    layout: str
    seed: int | None
    chunk: int | None
    check: bool
    out: Path
    no_progress: bool


def wish(methods: Sequence[str], size: str, seed: int | None, chunk: int | None, **others: Any) -> Wish:
    """Check the arguments that say all by themselves."""
    catalog.check_options(catalog.methods_of(methods), seed, chunk)
    _specs.check(others["model"])
    return Wish(methods=methods, size=size_of(size), seed=seed, chunk=chunk, **others)


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


def of_the_pictures(command: F) -> F:
    """Add the options for the pictures that are written."""
    import click

    shown: dict[str, Any] = {"show_default": True}
    style = "The map as colors, as contours at 0.25, 0.5 and 0.75, or as light on a dark picture."
    captions = "Write class, method and layer under each map.  [default: where one picture has several maps]"
    layout = "One picture for all maps of an IMAGE, or one for each map."
    alpha, layouts = click.FloatRange(0, 1), ("grid", "separate")
    for option in (
        click.option("--layout", type=click.Choice(layouts), default=layouts[0], help=layout, **shown),
        click.option("--captions/--no-captions", default=None, help=captions),
        click.option("--alpha", type=alpha, default=ALPHA, metavar="A", help="Opacity of the map, from 0 to 1.", **shown),
        click.option("--colors", type=click.Choice(COLORS), default=COLORS[0], help="Colors of the map.", **shown),
        click.option("--style", type=click.Choice(STYLES), default=STYLES[0], help=style, **shown),
        click.option("--size", default="photo", metavar="S", help=SIZE, **shown),
    ):
        command = option(command)
    return command


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


def size_of(text: str) -> Size:
    """Parse `--size`."""
    if text in ("photo", "input"):
        return text
    sides = re.fullmatch(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", text)
    if sides is None:
        raise CamError(
            f"--size {text!r} is not a size: write photo, input, or pixels, such as 800 or 600x800 (height by width)"
        )
    height, width = int(sides[1]), int(sides[2] or sides[1])
    if height * width > LARGEST:
        raise CamError(f"--size {text!r} is more than {LARGEST // 10**6} megapixels: write a smaller one")
    return height, width
