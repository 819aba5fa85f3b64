"""From an image to the network's input: opened, decoded and preprocessed, in other processes while the model runs."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
        self._with_views = views
        self._views: dict[tuple[int, int], tuple[float, ...] | None] = {}

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
        if picture.size not in self._views:
            self._views[picture.size] = self._view(picture.size)
        return Decoded(item, x, picture.size, self._views[picture.size])

    def _view(self, size: tuple[int, int]) -> tuple[float, ...] | None:
        if not self._with_views:
            return None
        try:
            rows = images.view_of(self._network.preprocess, size).matrix
        except CamError:  # it cannot be undone
            return None
        return (*rows[0], *rows[1])


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

    Where such a process dies, the images that it may have had are decoded one after the other: the one that kills a process
    again has failed, and the others are as they were.
    """
    if not workers:
        yield from map(decoder, items)
        return
    rest, window = iter(items), deque[_Sent]()
    while True:
        with _pool(decoder, workers) as pool:
            try:
                for item in rest:
                    window.append(_Sent(item))
                    window[-1].result = pool.submit(_decode, item)
                    if len(window) == workers * AHEAD:
                        yield window[0].result.result()
                        window.popleft()
                while window:
                    yield window[0].result.result()
                    window.popleft()
                return
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        yield from _one_by_one(window, decoder)
        window.clear()


class _Sent:
    """An image that was sent to be decoded."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.result: Future[Decoded] = Future()  # of no process yet


def _one_by_one(sent: Iterable[_Sent], decoder: Decoder) -> Iterator[Decoded]:
    """Decode images again that a dead process may have had, with a new process after each death."""
    pool = None
    for each in sent:
        if each.result.done() and not each.result.cancelled() and each.result.exception() is None:
            yield each.result.result()
            continue
        pool = pool or _pool(decoder, 1)
        try:
            yield pool.submit(_decode, each.item).result()
        except BrokenProcessPool:
            pool.shutdown()
            pool = None
            yield Decoded(each.item, error="it kills the process that decodes it")
    if pool:
        pool.shutdown()


def _pool(decoder: Decoder, workers: int) -> ProcessPoolExecutor:
    """Processes that decode. On Linux they are forked, as those of torch's `DataLoader`, so that any preprocessing will do.

    The processes of a `DataLoader` are not used: where one dies, torch raises in the main thread, at whatever line it is.
    """
    forks = sys.platform == "linux"
    try:
        if not forks:
            pickle.dumps(decoder)
    except Exception as error:  # each type has its own error
        raise CamError(f"the preprocessing cannot be sent to another process: pass workers=0 ({sentence(error)})") from error
    context = multiprocessing.get_context("fork" if forks else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(decoder,))


_decoder: list[Decoder] = []
"""The decoder of this process, if it was started to decode."""


def _decode(item: Item) -> Decoded:
    return _decoder[0](item)


def _begin(decoder: Decoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    end_with_parent()
    torch.set_num_threads(1)
    _decoder[:] = [decoder]


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
