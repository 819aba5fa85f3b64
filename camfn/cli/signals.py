"""Signals that end a run: they are raised, so that what is begun is taken away, and wait while files are written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WORDS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hung up"}


class Stopped(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Watch:
    """What has arrived, and whether it has to wait. Signals are of the process, so there is one of these."""

    holding = False
    arrived: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.arrived = number
        if not self.holding:
            raise Stopped(number)


_watch = _Watch()


@contextmanager
def raised() -> Iterator[None]:
    """For the length of a command, raise `Stopped` where a signal would end it. One that is ignored stays so, as by nohup."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread set a handler
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
    """Until the end of the block signals wait: of the files that are written in it, there are all or none."""
    _watch.holding = True
    try:
        yield
    finally:
        _watch.holding = False
        if _watch.arrived is not None:
            raise Stopped(_watch.arrived)


def told(error: KeyboardInterrupt) -> tuple[str, int]:
    """What is said of a run that a signal has ended, and the exit status: 128 and the signal's number, as shells have it."""
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    return f"{_WORDS[signal.Signals(number).name]}: what was written is whole", 128 + number
