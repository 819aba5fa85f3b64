"""From an image to the network's input: opened, decoded and preprocessed, in other processes while the model runs."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from camfn import images, zoo
from camfn._errors import CamError
from camfn.runs.sources import Given, Item

AHEAD = 8
"""The number of images that each process decodes ahead of the model."""


class Decoded(NamedTuple):
    """An image as the network takes it, or why it could not be decoded."""

    item: Item
    x: np.ndarray | None = None  # (channels, h, w)
    photo: tuple[int, int] | None = None  # (width, height)
    view: tuple[float, ...] | None = None
    error: str | None = None


class Decoder:
    """Decode images for a network."""

    def __init__(self, network: zoo.Loaded, views: bool = True) -> None:
        self._network = zoo.Loaded(*network._replace(model=nn.Identity()))  # the model stays where it runs
        self._views = images.Views(network.preprocess) if views else None

    def __call__(self, item: Item) -> Decoded:
        """Decode an image. Never raises an error: it is a part of the result."""
        try:
            with images.random_states_kept():  # of this process, if it is the caller's
                return self._decoded(item)
        except Exception as error:  # a decoder, or the user's preprocessing, may raise anything
            return Decoded(item, error=sentence(error))

    def _decoded(self, item: Item) -> Decoded:
        if isinstance(item.source, Given) and isinstance(item.source.picture, torch.Tensor):
            return _as_input(item, item.source.picture)
        picture = opened(item)
        x = zoo.input_of(self._network, picture)[0].cpu().numpy()
        return Decoded(item, x, picture.size, self._view(picture.size))

    def _view(self, size: tuple[int, int]) -> tuple[float, ...] | None:
        view = self._views(size) if self._views else None
        return view and (*view.matrix[0], *view.matrix[1])


def sentence(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CamError) else f"{type(error).__name__}: {text}"[:500]


def _as_input(item: Item, x: torch.Tensor) -> Decoded:
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    if x.ndim != 3 or not x.is_floating_point():
        raise CamError(f"a tensor is the network's input, floats of shape (channels, h, w); found {x.dtype} {tuple(x.shape)}")
    return Decoded(item, x.detach().cpu().float().numpy(), (x.shape[2], x.shape[1]), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))


def opened(item: Item) -> Any:
    """The upright RGB picture of an image."""
    if isinstance(item.source, Given):
        return images.upright(item.source.picture)[0]
    from PIL import Image

    try:
        with item.source.open() as stream, Image.open(stream) as file:
            if file.width * file.height > images.LARGEST:
                raise CamError(f"it has more than {images.LARGEST // 10**6} megapixels: make it smaller first")
            return images.upright(file)[0]
    except FileNotFoundError:
        raise CamError(f"there is no file {str(item.source)!r}") from None


# --------------------------------------------------------------------------------------------------- other processes


def decoded(items: Iterable[Item], decoder: Decoder, workers: int) -> Generator[Decoded, None, None]:
    """Decode images in their order, in `workers` processes, or in this one if it is 0.

    Where a process dies, its image is tried once more, in a new one. An image that kills this too has failed.
    """
    if not workers:
        yield from map(decoder, items)
        return
    processes, window = _Processes(decoder, workers), deque[tuple[Item, Future[Decoded | None]]]()
    with contextlib.closing(processes):
        for item in items:
            window.append((item, processes.submit(item)))
            if len(window) == workers * AHEAD:
                yield _settled(*window.popleft(), processes)
        while window:
            yield _settled(*window.popleft(), processes)


def _settled(item: Item, result: "Future[Decoded | None]", processes: "_Processes") -> Decoded:
    return result.result() or processes.decode_anew(item) or Decoded(item, error="it kills the process that decodes it")


class _Processes:
    """Processes that decode, one image at a time each, so that a death tells its image.

    A thread gives a process its images, and ends where the process dies. Images are taken and settled in one order; a process
    that died is replaced when its image is settled. So the image that is waited for is always taken by some process.

    Those of torch's `DataLoader` are not used: where one dies, torch raises in the main thread, at whatever line it is.
    """

    def __init__(self, decoder: Decoder, workers: int) -> None:
        self._decoder = decoder
        self._waiting: SimpleQueue[tuple[Item, Future[Decoded | None]] | None] = SimpleQueue()
        self._all: list[tuple[_Process, threading.Thread]] = []
        for process in [_Process(decoder) for _ in range(workers)]:
            self._serve(process)

    def submit(self, item: Item) -> "Future[Decoded | None]":
        """An image decoded by the next process that is free; None if the process dies."""
        result: Future[Decoded | None] = Future()
        self._waiting.put((item, result))
        return result

    def decode_anew(self, item: Item) -> Decoded | None:
        """Decode an image whose process died in the one that replaces it; None if this dies too, and is replaced.

        Only the thread that runs the model starts processes, between two batches, since a fork copies held locks.
        """
        self._all = [each for each in self._all if each[1].is_alive()]
        process = _Process(self._decoder)
        found = process.decode(item)
        self._serve(process if found else _Process(self._decoder))
        return found

    def _serve(self, process: "_Process") -> None:
        """Give a process images in a thread of its own."""
        thread = threading.Thread(target=self._feed, args=(process,), daemon=True)
        self._all.append((process, thread))
        thread.start()

    def _feed(self, process: "_Process") -> None:
        while task := self._waiting.get():
            item, result = task
            try:
                result.set_result(found := process.decode(item))
            except Exception as error:  # of an image, or a result, that cannot be pickled
                result.set_exception(error)
            else:
                if found is None:
                    return

    def close(self) -> None:
        for process, _ in self._all:
            process.kill()
            self._waiting.put(None)  # for a thread that waits
        for _, thread in self._all:
            thread.join()


class _Process:
    """A process that decodes. On Linux it is forked, as those of torch's `DataLoader`, so that any preprocessing will do."""

    def __init__(self, decoder: Decoder) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_decode_from, args=(other, decoder), daemon=True)
        try:
            self._process.start()
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # of what is spawned
            raise CamError(
                f"the preprocessing cannot be sent to another process: pass workers=0 ({sentence(error)})"
            ) from error
        other.close()  # so that its death ends the pipe

    def decode(self, item: Item) -> Decoded | None:
        try:
            self._pipe.send(item)
            while not self._pipe.poll(1):
                if not self._process.is_alive():  # and the pipe has not ended: a process forked meanwhile has its other end too
                    raise EOFError
            return self._pipe.recv()
        except (EOFError, OSError):  # it died
            self.kill()
            return None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _decode_from(pipe: Connection, decoder: Decoder) -> None:
    """Decode images that come through a pipe, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    end_with_parent()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(decoder(pipe.recv()))


def end_with_parent() -> None:
    """End this process when its parent ends, even if it was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------ batches


def batches(found: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Gather images into batches of one shape, and images that failed into batches of their own.

    At most four batches wait: then the largest one is given as it is.
    """
    waiting: dict[Any, list[Decoded]] = {}
    for each in found:
        key = None if each.x is None else each.x.shape
        waiting.setdefault(key, []).append(each)
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()
