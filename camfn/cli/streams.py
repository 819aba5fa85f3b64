"""Guards for stdout and stderr. A failing stdout is reported in one line on stderr; a failing stderr is ignored."""

import io
import os
import select
import sys
from typing import Any

from camfn._errors import CamError


class Guarded(io.RawIOBase):
    """A raw stream whose write errors are raised as one sentence (`tells`) or ignored.

    After an error it drops all data, since Python flushes the rest once more at exit.
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
                    raise _write_error(error) from None
            else:
                if written is not None:
                    return written
                select.select([], [self.raw], [])  # a full, non-blocking pipe
        return len(data)


def _write_error(error: OSError) -> Exception:
    """Return a CamError. A closed pipe, as after `head`, stays a BrokenPipeError, for which click exits silently."""
    if isinstance(error, BrokenPipeError):
        return error
    return CamError(f"stdout cannot be written to ({error.strerror}): redirect it to another file, or to /dev/null")


def take() -> None:
    """Guard stdout and stderr of the process. Characters that they cannot encode are escaped.

    **Raises** `CamError` if stdout is closed.
    """
    closed = sys.stdout is None
    _occupy_descriptors()
    sys.stderr = open(os.devnull, "w") if sys.stderr is None else _guard(sys.stderr, tells=False)  # noqa: SIM115
    sys.stdout = open(os.devnull, "w") if closed else _guard(sys.stdout, tells=True)  # noqa: SIM115
    if closed:
        raise CamError("stdout is closed: redirect it to a file, or to /dev/null")


def _occupy_descriptors() -> None:
    """Occupy the file descriptors of closed streams. Else a file opened later would get one, and receive printed text."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _guard(stream: Any, tells: bool) -> Any:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = Guarded(getattr(stream.buffer, "raw", stream.buffer), tells)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
