"""The lock of a run's folder. It belongs to a process and ends with it, however it ends: no lock is stale."""

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from camfn._errors import CamError, CamWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "lock"
WAIT = 5.0
"""Seconds to wait for the processes of a run that was just killed."""
_held: set[str] = set()
_guard = threading.Lock()  # a process does not lock itself out, so its own locks are listed


@contextmanager
def locked(out: Path, rank: int | None = None) -> Iterator[Callable[[], None]]:
    """Lock a run's folder: all of the lock file, or the byte of one rank of several processes.

    Yields a function that gives up all but the first byte, so that the ranks of this run can take theirs: a second run, which
    needs all, waits for the last of them.

    **Raises** `CamError` if another run has the folder.
    """
    if fcntl is None:
        warnings.warn("this system has no file locks: start no second run into the same folder", CamWarning, stacklevel=3)
        yield lambda: None
        return
    key = f"{os.path.realpath(out)}:{rank}"
    with _guard:
        if key in _held:  # opening and closing the file again would end the lock
            raise CamError(f"{str(out)!r} is being written by another run of this process: wait for it, or use another folder")
        _held.add(key)
    file = None
    try:
        file = _taken(out, (0, 0) if rank is None else (1, rank + 1))
        yield partial(fcntl.lockf, file.fileno(), fcntl.LOCK_UN, 0, 1)
    finally:
        if file:
            file.close()
        with _guard:
            _held.discard(key)


def _taken(out: Path, part: tuple[int, int]) -> IO[bytes]:
    """Open the lock file, and lock a part of it: its length (0 for all that follows) and its start."""
    try:
        file = open(out / FILE, "a+b")  # noqa: SIM115 (it is closed when the run ends)
    except OSError as error:
        raise CamError(f"{str(out)!r} cannot be written to: {error.strerror or error}") from error
    until = time.monotonic() + WAIT
    while not _tried(file, out, part):
        if time.monotonic() > until:
            file.close()
            raise CamError(f"{str(out)!r} is being written by another run{_holder(out)}: wait for it, or use another folder")
        time.sleep(0.1)
    if part[1] == 0:
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        file.flush()
    return file


def _tried(file: IO[bytes], out: Path, part: tuple[int, int]) -> bool:
    assert fcntl is not None
    try:
        fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, *part)
    except (BlockingIOError, PermissionError):  # taken
        return False
    except OSError as error:
        file.close()
        raise CamError(f"{str(out / FILE)!r} cannot be locked: {error.strerror or error}") from error
    return True


def _holder(out: Path) -> str:
    try:
        found = json.loads((out / FILE).read_bytes())
        return f" (process {found['process']} on {found['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
