"""Which files are read, and which are written."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from camfn._errors import CamError
from camfn._paths import kind
from camfn.cli import signals

WRITTEN = ("png", "npy", "json")


# ----------------------------------------------------------------------------------------------------- the pictures


def pictures(paths: Iterable[Path]) -> list[Path]:
    """The files that are meant: a folder stands for the pictures in it."""
    found = []
    for path in paths:
        found += _inside(path) if os.path.isdir(path) else [path]
    return found


def _inside(folder: Path) -> list[Path]:
    """The folder's pictures by name, without hidden files, pipes and devices, and not those of folders inside it."""
    try:
        files = sorted(path for path in folder.iterdir() if kind(path) is None)  # to read a pipe is to wait for it
    except OSError as error:
        raise CamError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from None
    known = _endings()
    found = [path for path in files if path.suffix.lower() in known and not path.name.startswith(".")]
    if not found:
        raise CamError(
            f"the folder {str(folder)!r} has no pictures in it (files that end in .png, .jpg, .tif, .webp or the like)"
        )
    return found


def _endings() -> set[str]:
    """Of what Pillow reads as pictures; it also knows endings of what it only writes, of films, and of other programs."""
    from PIL import Image, ImageFile

    def is_picture(kind: str) -> bool:
        opens = Image.OPEN.get(kind, (ImageFile.StubImageFile,))[0]
        elsewhere = isinstance(opens, type) and issubclass(opens, ImageFile.StubImageFile)
        return not elsewhere and Image.MIME.get(kind, "image/").startswith("image/")

    return {ending for ending, kind in Image.registered_extensions().items() if is_picture(kind)}


# ------------------------------------------------------------------------------------------------------ the results


def make(folder: Path) -> None:
    """The output folder; whether it can be written to is seen before the first sweep."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamError(f"--out {str(folder)!r} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CamError(f"--out {str(folder)!r} cannot be written to")
    if _room(folder) < 40:
        raise CamError(f"--out {str(folder)!r} leaves no room for file names in a path: name a folder with a shorter path")


def write(folder: Path, name: str, overlay: Any, raw: np.ndarray, facts: dict[str, Any]) -> Path:
    """Write the three files of a map; returns their name, less the ending."""
    with claimed(folder, plain(name), WRITTEN) as base:
        overlay.save(f"{base}.png")
        np.save(f"{base}.npy", raw)
        Path(f"{base}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return base


def plain(name: str) -> str:
    """A name of letters, digits and little else."""
    return re.sub(r"[^\w.+ -]", "_", name)


def fitted(folder: Path, name: str) -> str:
    """The name, or what fits of it in that folder: its beginning, digits that tell cut names apart, and its end."""
    room, whole = _room(folder), name.encode()
    if len(whole) <= room:
        return name
    mark = f"~{hashlib.sha256(whole).hexdigest()[:8]}~"
    end = (room - len(mark)) // 2  # layer, method and class
    start = room - len(mark) - end
    return whole[:start].decode(errors="ignore") + mark + whole[-end:].decode(errors="ignore")


def _room(folder: Path) -> int:
    """The bytes of a file's name in that folder, less those of a number and an ending."""
    try:
        name, path = (os.pathconf(folder, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    except (AttributeError, OSError, ValueError):  # elsewhere than on Unix
        name, path = 255, 4096
    return min(name, path - len(os.fsencode(folder)) - len("/\0")) - len("-99999.json")


@contextmanager
def claimed(folder: Path, name: str, endings: Sequence[str]) -> Iterator[Path]:
    """A name, less its ending, that no file has yet: all of the files with these endings are written under it, or none."""
    try:
        with signals.held():
            base = claim(folder, name, endings)
            try:
                yield base
            except BaseException:
                for ending in endings:
                    Path(f"{base}.{ending}").unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CamError(f"the files cannot be written to {str(folder)!r}: {error.strerror}") from None


def claim(folder: Path, name: str, endings: Sequence[str]) -> Path:
    """A path, less its ending, that no file has: the first of `name`, `name-2`, `name-3`, ... The last ending is taken."""
    name = fitted(folder, name)
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        if not any(os.path.lexists(f"{base}.{ending}") for ending in endings):
            try:
                Path(f"{base}.{endings[-1]}").open("x").close()  # another run may be at the same point
            except FileExistsError:
                continue
            return base
    raise AssertionError("unreachable")
