"""The streams of the process. A stdout that takes nothing is one line on stderr; a stderr that takes nothing stops no run."""

import io
import os
import select
import sys
from typing import Any

from camfn._errors import CamError


class Guarded(io.RawIOBase):
    """A stream's lowest layer, with errors of writing to it in one sentence, or in none where there is nobody to tell.

    After an error it drops what it is given: Python writes what is left over once more when it ends.
    """

    def __init__(self, raw: Any, tells: bool) -> None:
        self.raw, self.tells, self.failed = raw, tells, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data: Any) -> int:
        while not self.failed:
            try:
                written = self.raw.write(data)
            except OSError as error:
                self.failed = True
                if self.tells:
                    raise _told(error) from None
            else:
                if written is not None:
                    return written
                select.select([], [self.raw], [])  # a pipe that is full, and set not to wait
        return len(data)


def _told(error: OSError) -> Exception:
    """A reader that has gone, as `head` does, knows why: click ends the run without a word."""
    if isinstance(error, BrokenPipeError):
        return error
    return CamError(f"stdout cannot be written to ({error.strerror}): send it to another file, or to /dev/null")


def take() -> None:
    """Guard stdout and stderr, for the whole process; a name that they have no letters for is spelt out.

    **Raises** `CamError` where stdout is closed.
    """
    closed = sys.stdout is None
    _occupy()
    sys.stderr = open(os.devnull, "w") if sys.stderr is None else _guarded(sys.stderr, tells=False)  # noqa: SIM115
    sys.stdout = open(os.devnull, "w") if closed else _guarded(sys.stdout, tells=True)  # noqa: SIM115
    if closed:
        raise CamError("stdout is closed: send it to a file, or to /dev/null")


def _occupy() -> None:
    """Take the numbers of closed streams: a file that is opened later would get one, and what others print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _guarded(stream: Any, tells: bool) -> Any:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = Guarded(getattr(stream.buffer, "raw", stream.buffer), tells)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
