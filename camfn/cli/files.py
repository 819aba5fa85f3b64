"""Files: the pictures to read, and the results to write."""

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
    """Return the picture files. A folder stands for the pictures in it."""
    found = []
    for path in paths:
        found += _inside(path) if os.path.isdir(path) else [path]
    return found


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


def write(folder: Path, name: str, overlay: Any, raw: np.ndarray, facts: dict[str, Any]) -> Path:
    """Write the three files of a map, and return their path without the extension."""
    with claimed(folder, plain(name), WRITTEN) as base:
        overlay.save(f"{base}.png")
        np.save(f"{base}.npy", raw)
        Path(f"{base}.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return base


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
