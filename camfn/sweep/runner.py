"""The model as a sweep runs it: a rewritten copy if that is faster, and the tests that choose it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, RefusedError, first_line, warn
from camfn._types import Inputs, State
from camfn.model.agreement import is_close
from camfn.model.capture import pure_from
from camfn.model.forward import Forward
from camfn.model.inputs import beside, companions_of, rows_of
from camfn.model.memory import free_bytes, is_exhausted
from camfn.model.private_copy import PrivateCopy
from camfn.model.task import once
from camfn.sweep.folding import Found, channels_last, find_folds, merge_norms, with_channels_last
from camfn.sweep.options import CHUNK, Sweep
from camfn.targets import Score, distinct, logits_of, reads_logits, score_rows

_WORTH = 24  # number of rows from which the test of a rewritten model pays
_REUSED = 1500  # number of uses of a weight in a sweep from which copying it pays
_SHARE = 0.5  # share of the CPU's free memory that a chunk of the default size may take
_HELD = 48 << 20  # bytes that a forward pass may hold for each CPU thread: with more, memory is the bottleneck


class Room:
    """The chunk size, which shrinks when memory runs out. All sweeps of a call share it."""

    def __init__(self, chunk: int, rows: str = "masked inputs") -> None:
        self.asked = self.chunk = chunk
        self.rows = rows

    def halve(self, used: int) -> None:
        """Halve the chunk, after `used` rows did not fit."""
        self.chunk = max(1, min(self.chunk, used) // 2)

    def tell(self) -> None:
        """Warn if memory ran out during the sweep."""
        if self.chunk < self.asked:
            warn(
                f"memory ran out at {self.asked} {self.rows} per forward; {self.chunk} fitted "
                f"(Sweep(chunk={self.chunk}) starts with that)"
            )


class Runner(NamedTuple):
    """The model as a sweep runs it."""

    private: PrivateCopy
    state: State
    merged: bool  # whether batch norms are folded into convolutions
    channels_last: bool
    folded: bool  # whether the model runs on a chunk as one batch
    room: Room
    dtype: torch.dtype | None = None  # the dtype that it runs in; None for its own

    def call(self, guarded: bool = False) -> Callable[[State, Inputs], Any]:
        """The model as a function `(state, x) -> output`."""
        inner, last, dtype = pure_from(self.private, guarded=guarded, fresh=True), self.channels_last, self.dtype

        def prepared(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf
            return with_channels_last(leaf) if last else leaf

        def call(state: State, x: Inputs) -> Any:
            return inner(state, tree_map(prepared, x))

        return call


def runner_of(forward: Forward, score: Score, options: Sweep, rows: int) -> Runner:
    """Choose how to run the model on `rows` rows: as it is, or as a copy with the same function up to rounding.

    Two forward passes test the copy: a second image alone, by the model, and both images together, by the copy. If `fold` is
    given, the copy runs on the second image alone.
    """
    private = forward.task.model.borrow()  # a fresh copy: that of the forward pass has ports
    own = Runner(private, forward.task.state, False, False, options.fold is not False, Room(chunk_of(forward, options, CHUNK)))
    if _compat.transformed():
        return own
    asks = options.fold == "auto" and min(rows, own.room.chunk) > 1
    # A detector reads its images one by one, and takes or returns a list of them: there the test of two images has to do.
    lists = isinstance(forward.batch.x, list) or isinstance(forward.output, list)
    if asks and not lists and (asked := second_of(forward).found.asks):
        warn(
            "the model's output for an input depends on the others of its batch, unless the value that it reads of its input "
            f"in Python ({asked}) decides nothing: the sweep runs the model on one input at a time (slower); Sweep(fold=True) "
            "runs it in batches nonetheless, and Sweep(chunk=1) skips this warning"
        )
        return own._replace(room=Room(1))
    for found in _rewritten(forward, own, rows):
        if _agrees(found, forward, score, _LOOSE, pair=asks):
            return found
    if not asks or _agrees(own, forward, score, _TIGHT):
        return own
    maps = _agrees(own._replace(folded=False), forward, score, _TIGHT)
    how = "maps through the model" if maps else "runs the model on one input at a time"
    warn(
        f"the model's output for an input depends on the others of its batch: the sweep {how} (slower); "
        f"{'Sweep(fold=False)' if maps else 'Sweep(chunk=1)'} skips the test and this warning"
    )
    return own._replace(folded=False) if maps else own._replace(room=Room(1))


def _rewritten(forward: Forward, own: Runner, rows: int) -> Iterator[Runner]:
    """Yield rewritten copies, fastest first: with folded batch norms and channels last, then with only one of them."""
    if forward.task.graphed or not own.folded or rows < _WORTH or rows * second_of(forward).found.reuse < _REUSED:
        return
    folds, images = second_of(forward).found.folds, any(tensor.ndim == 4 for tensor in own.state.values())
    for merged, spread in dict.fromkeys(((bool(folds), images), (bool(folds), False), (False, images))):
        if merged or spread:
            private, state = merge_norms(forward.task.model.borrow(), own.state, folds if merged else ())
            state = channels_last(state) if spread else state
            yield own._replace(private=private, state=state, merged=merged, channels_last=spread)


def renewed(forward: Forward, runner: Runner) -> Runner:
    """The same way to run the model, on a private copy that the forward's call lends."""
    private = forward.task.model.borrow()
    if runner.merged:
        private, _ = merge_norms(private, forward.task.state, second_of(forward).found.folds)
    return runner._replace(private=private)


def narrowed(forward: Forward, runner: Runner, dtype: torch.dtype) -> Runner:
    """The runner in a narrow dtype. Raises `CamError` if the model does not run in it."""
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in runner.state.items()}
    narrow = runner._replace(state=state, dtype=dtype)
    try:
        narrow.call(guarded=True)(state, _first(forward, forward.image[:1]))
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        found = first_line(error)
        raise CamError(f"Sweep(dtype={dtype}): the model does not run in it ({found}); leave dtype= out") from error
    return narrow


def _image(forward: Forward) -> Tensor:
    """A copy of the first image, since a model may write to its input."""
    return forward.image[:1].clone()


def _first(forward: Forward, images: Tensor) -> Inputs:
    """Inputs with these images, each with the companion inputs of the first image."""
    first = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return rows_of(forward.batch.x, forward.companions, first, images)


def _compared(score: Score, output: Any, count: int) -> list[Tensor]:
    """The part of an output for `count` inputs that must agree: the tensor itself, its logits, or the targets' scores.

    A single tensor is compared as a whole: its rounding scales with its largest values, and a score may be a small difference
    of two of them.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return [output]
    if reads_logits(score.of) and score.of.way == "mapped":
        return [logits_of(output)]

    def of(image: int) -> Any:
        return tree_map(lambda leaf: leaf[image : image + 1].expand(count, *leaf.shape[1:]), score.rows)

    return [score_rows(score.of, output, of(image)) for image in distinct(score.rows)]


# ------------------------------------------------------------------------------------------- facts about the model


class Second(NamedTuple):
    """A second image, and what the forward pass on it alone shows."""

    image: Tensor
    found: Found


def second_of(forward: Forward) -> Second:
    """Run the second image: the first, flipped and halved. Random values could be outside the range that a model accepts."""

    def find() -> Second:
        image = 0.5 * _image(forward).flip(tuple(range(2, forward.image.ndim)))
        x = _first(forward, image.clone())
        given, pixels, n = forward.batch
        shared = n == 1 or not beside(given, pixels.key, forward.companions.rows)
        fixed = companions_of(x, pixels.key) if shared else []
        return Second(image, find_folds(forward.task.model, forward.task.state, x, fixed))

    return once(forward.task, "second", find)


_TIGHT, _LOOSE = 100, 1000
"""Tolerances, in multiples of the rounding: for two runs of one function, and for two functions equal up to rounding."""


def _first_alone(forward: Forward, score: Score, runner: Runner) -> list[Tensor]:
    """The compared output of the first image alone.

    The row of the clean batch is that output only if samples do not depend on their batch. If the runner is not folded, they
    may, and the image runs alone.
    """
    if runner.folded or forward.n == 1:
        return [part[:1] for part in _compared(score, forward.output, forward.n)]
    call = pure_from(forward.task.model.borrow())
    return _compared(score, once(forward.task, "first", lambda: call(forward.task.state, _first(forward, _image(forward)))), 1)


def _agrees(runner: Runner, forward: Forward, score: Score, times: int, pair: bool = True) -> bool:
    """Whether the runner gives, for both images together (`pair`) or for the second, what each image gave alone."""

    def find() -> list[Tensor]:
        images, call = second_of(forward).image.clone(), runner.call(guarded=True)
        images = torch.cat((_image(forward), images)) if pair else images

        def read(images: Tensor) -> list[Tensor]:
            return _compared(score, call(runner.state, _first(forward, images)), len(images))

        return read(images) if runner.folded else vmap(lambda image: [part[0] for part in read(image[None])])(images)

    try:
        expected = _compared(score, second_of(forward).found.output, 1)
        expected = [torch.cat(parts) for parts in zip(_first_alone(forward, score, runner), expected)] if pair else expected
        with torch.inference_mode(False), torch.no_grad():
            return all(is_close(a, b, times) for a, b in zip(find(), expected))
    except RefusedError:
        raise
    except Exception as error:  # for example `view` on a tensor that is no longer contiguous
        if not is_exhausted(error):
            return False
        if runner.merged or runner.channels_last or not runner.folded:
            raise
        return True  # running out of memory says nothing about the function; the sweep halves its chunk


def chunk_of(forward: Forward, options: Sweep, usual: int) -> int:
    """The chunk size: as the options ask, or as fits in memory. `usual` is the default."""
    device, memory = forward.image.device, options.memory
    if _compat.transformed() or (memory is None and (options.chunk is not None or device.type != "cpu")):
        return options.chunk or usual
    most = options.chunk or (1024 if memory is not None else min(usual, _best_on_cpu(forward)))
    allowed = memory if isinstance(memory, int) else free_share(device, _SHARE if memory is None else memory)
    if allowed is None:
        if memory is None:
            return most
        raise CamError(f"Sweep(memory={memory}): the free memory of {device} is unknown; give bytes")
    pixels = forward.image[0].numel() * forward.image.element_size()
    return min(most, max(1, allowed // (second_of(forward).found.bytes + 4 * pixels)))


def _best_on_cpu(forward: Forward) -> int:
    """The chunk size that is fastest on this CPU: a power of two, so that threads get equal parts.

    Small chunks hold little memory, but each chunk reads all weights again: it should hold at least half as many bytes as
    they do. `benchmarks/chunk.py` measures the best size and its effect.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in forward.task.state.values())
    rows = max(_HELD * max(2, torch.get_num_threads()), weights // 2) // max(1, second_of(forward).found.bytes)
    return 1 << max(1, rows).bit_length() - 1


def free_share(device: torch.device, share: float = _SHARE) -> int | None:
    """A share of the free memory, in bytes; `None` if the free memory is unknown."""
    free = free_bytes(device)
    return None if free is None else int(share * free)
