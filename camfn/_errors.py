"""The exceptions and the warning of camfn, and helpers for messages."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class CamError(ValueError):
    """The call cannot return a meaningful map. The message says what was passed, what was found, and what to do."""


class RefusedError(CamError):
    """The model did something that is not allowed in eval mode. camfn does not retry in another way."""


class CamWarning(UserWarning):
    """The call returned a map, but the user should know something about it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggested(name: str, known: Iterable[str]) -> str:
    """Return the known names closest to `name` as a part of a message, or nothing if none is close.

    >>> suggested("layer5", ["layer4", "fc"]), suggested("qqqq", ["layer4", "fc"])
    ("; closest: 'layer4'", '')
    """
    near = get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; closest: {', '.join(map(repr, near))}" if near else ""


def escaped(name: object) -> str:
    """Escape unprintable characters of a name as `repr` does, so that none moves the cursor.

    >>> print(escaped("a\\nb"), escaped("maße"))
    a\\nb maße
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(name))


def layer_called(name: str) -> str:
    """Return a layer's name for the start of a sentence. The empty name is the model itself."""
    return f"layer {name!r}" if name else "the model itself, as a layer,"


def warn(message: str) -> None:
    """Emit a CamWarning at the line that called camfn."""
    level = 1
    frame = sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "camfn":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, CamWarning, stacklevel=level)


def shortened(name: str, most: int) -> str:
    """Cut a long name in the middle. Names of layers and classes often differ in their beginning or end.

    >>> shortened("layer4.1.downsample.conv", 16)
    'layer4.1…le.conv'
    """
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"
