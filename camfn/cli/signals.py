"""Signals that end a run: raised as an exception, so that files are cleaned up, and delayed while files are written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WORDS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hung up"}


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Watch:
    """The signal handler, of which there is one per process. It delays signals while `holding`."""

    holding = False
    arrived: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.arrived = number
        if not self.holding:
            raise Stopped(number)


_watch = _Watch()


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Stopped` for signals that would end the process. Signals that are ignored, as under nohup, stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
        for number in [getattr(signal, name) for name in _WORDS if hasattr(signal, name)]:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _watch)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.arrived = None


@contextmanager
def held() -> Iterator[None]:
    """Delay signals until the end of the block, so that all of its files are written or none."""
    _watch.holding = True
    try:
        yield
    finally:
        _watch.holding = False
        if _watch.arrived is not None:
            raise Stopped(_watch.arrived)


def told(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the message for a stopped run, and the exit status: 128 plus the signal's number, as in shells."""
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    return f"{_WORDS[signal.Signals(number).name]}: the files written so far are complete", 128 + number
