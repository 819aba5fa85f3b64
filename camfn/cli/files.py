"""Files: the pictures to read, and the results to write."""

import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from camfn._errors import CamError
from camfn._paths import kind
from camfn.cli import signals

PICTURE, FACTS = "png", ("npy", "json")


# ----------------------------------------------------------------------------------------------------- the pictures

STDIN = "-"
_LIMIT = 2**30
"""The maximal number of bytes that are read from standard input."""


class Source(NamedTuple):
    """A picture to read: a file, or what came from standard input."""

    path: Path
    data: bytes | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def missing(self) -> CamError | None:
        """The error of a file that is not there, without loading what reads it."""
        there = self.data is not None or os.path.lexists(self.path)
        return None if there else CamError(f"there is no file {str(self.path)!r}")

    def read(self) -> Any:
        """Return the picture. Raise CamError if there is none."""
        from camfn import images  # which imports torch

        return images.read(self.path if self.data is None else _Stdin(self.data))


class _Stdin(io.BytesIO):
    name = "standard input"


def pictures(given: Iterable[str]) -> list[Source]:
    """Return the pictures to read. A folder stands for the pictures in it, and "-" for standard input."""
    found, stdin = [], None
    for text in given:
        if text == STDIN:
            stdin = stdin or source(text)  # it can be read once
            found.append(stdin)
        else:
            found += map(Source, _inside(Path(text))) if os.path.isdir(text) else [source(text)]
    return found


def source(text: str) -> Source:
    """Return the file of that name, or standard input, which is read at once."""
    return Source(Path("stdin"), _stdin()) if text == STDIN else Source(Path(text))


def _stdin() -> bytes:
    """Read standard input. Raise CamError if it is a terminal, empty, closed or endless."""
    how = "pipe a picture into the command, as in: camfn explain - --model demo < photo.jpg"
    if sys.stdin is None:
        raise CamError(f"- stands for standard input, which is closed: {how}")
    if sys.stdin.isatty():
        raise CamError(f"- stands for standard input, which is a terminal: {how}")
    data = sys.stdin.buffer.read(_LIMIT + 1)
    if not data:
        raise CamError(f"- stands for standard input, which is empty: {how}")
    if len(data) > _LIMIT:
        raise CamError(f"standard input has more than {_LIMIT // 2**20} MiB, more than a picture: name a file")
    return data


def _inside(folder: Path) -> list[Path]:
    """Return a folder's pictures in the order of names, without hidden files, pipes, devices and subfolders."""
    try:
        files = sorted(path for path in folder.iterdir() if kind(path) is None)  # reading a pipe would block
    except OSError as error:
        raise CamError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from None
    known = _endings()
    found = [path for path in files if path.suffix.lower() in known and not path.name.startswith(".")]
    if not found:
        raise CamError(
            f"the folder {str(folder)!r} has no pictures in it (files that end in .png, .jpg, .tif, .webp or similar)"
        )
    return found


def _endings() -> set[str]:
    """Return the extensions that Pillow reads as pictures, without those of write-only formats, videos and stubs."""
    from PIL import Image, ImageFile

    def is_picture(kind: str) -> bool:
        opens = Image.OPEN.get(kind, (ImageFile.StubImageFile,))[0]
        elsewhere = isinstance(opens, type) and issubclass(opens, ImageFile.StubImageFile)
        return not elsewhere and Image.MIME.get(kind, "image/").startswith("image/")

    return {ending for ending, kind in Image.registered_extensions().items() if is_picture(kind)}


# ------------------------------------------------------------------------------------------------------ the results


def make(folder: Path) -> None:
    """Make the output folder, and raise CamError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamError(f"--out {str(folder)!r} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CamError(f"--out {str(folder)!r} cannot be written to")
    if _room(folder) < 40:
        raise CamError(f"--out {str(folder)!r} is too long a path for file names in it: name a folder with a shorter path")


def write(folder: Path, name: str, overlay: Any | None, raw: np.ndarray, facts: dict[str, Any]) -> Path:
    """Write the files of a map, with its picture if it has one of its own, and return their path without the extension."""
    with claimed(folder, plain(name), FACTS if overlay is None else (PICTURE, *FACTS)) as base:
        if overlay is not None:
            overlay.save(f"{base}.{PICTURE}")
        np.save(f"{base}.npy", raw)
        Path(f"{base}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return base


def write_picture(folder: Path, name: str, picture: Any) -> Path:
    """Write a picture, and return its path."""
    with claimed(folder, plain(name), (PICTURE,)) as base:
        picture.save(f"{base}.{PICTURE}")
    return Path(f"{base}.{PICTURE}")


def plain(name: str) -> str:
    """Replace all characters but letters, digits, spaces and `_.+-`."""
    return re.sub(r"[^\w.+ -]", "_", name)


def fitted(folder: Path, name: str) -> str:
    """Cut a name that is too long for the folder in the middle, and insert a hash that keeps it unique."""
    room, whole = _room(folder), name.encode()
    if len(whole) <= room:
        return name
    mark = f"~{hashlib.sha256(whole).hexdigest()[:8]}~"
    end = (room - len(mark)) // 2  # keeps layer, method and class
    start = room - len(mark) - end
    return whole[:start].decode(errors="ignore") + mark + whole[-end:].decode(errors="ignore")


def _room(folder: Path) -> int:
    """Return the maximal bytes of a file name in the folder, without a number and an extension."""
    try:
        name, path = (os.pathconf(folder, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    except (AttributeError, OSError, ValueError):  # not on Unix
        name, path = 255, 4096
    return min(name, path - len(os.fsencode(folder)) - len("/\0")) - len("-99999.json")


@contextmanager
def claimed(folder: Path, name: str, endings: Sequence[str]) -> Iterator[Path]:
    """Claim an unused path without extension. If the block fails, its files with these extensions are removed."""
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
    """Return the first unused path of `name`, `name-2`, `name-3`, ..., and create the file with the last extension."""
    name = fitted(folder, name)
    for number in itertools.count(1):
        base = folder / (name if number == 1 else f"{name}-{number}")
        if not any(os.path.lexists(f"{base}.{ending}") for ending in endings):
            try:
                Path(f"{base}.{endings[-1]}").open("x").close()  # another process may claim it at the same time
            except FileExistsError:
                continue
            return base
    raise AssertionError("unreachable")
