"""One exception, one warning, and the sentences that several rooms share."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class CamError(ValueError):
    """The call cannot give a meaningful map. The message says what was asked, what was found, and what to do."""


class RefusedError(CamError):
    """A forward did what a model must not do in eval mode: no other way to run it is tried."""


class CamWarning(UserWarning):
    """The call gave a map, and something about it should be known."""


def closest(name: str, known: Iterable[str]) -> str:
    """The names most like `name`, for the end of a sentence."""
    return ", ".join(map(repr, get_close_matches(name, list(known), n=3, cutoff=0.4))) or "none is close"


def escaped(name: object) -> str:
    """A name as it is shown: its control characters and the like are spelt as `repr` spells them, so that none moves a cursor.

    >>> print(escaped("a\\nb"), escaped("maße"))
    a\\nb maße
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(name))


def layer_called(name: str) -> str:
    """A layer at the start of a sentence; the empty name is the model's own."""
    return f"layer {name!r}" if name else "the model itself, as a layer,"


def warn(message: str) -> None:
    """Warn the caller of camfn, wherever inside it we are."""
    level = 1
    frame = sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "camfn":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, CamWarning, stacklevel=level)
