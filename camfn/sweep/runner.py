"""How the model runs in a sweep: what a few forwards tell about it, and the copy that is made for it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, RefusedError, warn
from camfn._types import Inputs, State
from camfn.model.agreement import is_close
from camfn.model.capture import pure_from
from camfn.model.forward import Forward, once
from camfn.model.inputs import rows_of
from camfn.model.memory import free_bytes, is_exhausted
from camfn.model.private_copy import Shell
from camfn.sweep.folding import Found, channels_last, find_folds, merge_norms
from camfn.sweep.options import CHUNK, Sweep
from camfn.targets import Score, distinct, logits_of, reads_logits, score_rows

_WORTH = 24  # rows from which the forward that checks a rewritten model pays
_REUSED = 1500  # how often a weight has to be used in a sweep for a copy of it to pay
_SHARE = 0.5  # of the CPU's free memory, that a chunk of the default size may take
_HELD = 48 << 20  # bytes that a forward may hold for each of a CPU's threads: with more, memory is slower than arithmetic


class Room:
    """How many rows per forward memory has room for: fewer, once it ran out. Shared by all that one call sweeps."""

    def __init__(self, chunk: int, rows: str = "masked inputs") -> None:
        self.asked = self.chunk = chunk
        self.rows = rows

    def halve(self, used: int) -> None:
        """`used` were too many."""
        self.chunk = max(1, min(self.chunk, used) // 2)

    def tell(self) -> None:
        """Warn if memory ran out."""
        if self.chunk < self.asked:
            warn(
                f"memory ran out at {self.asked} {self.rows} per forward; {self.chunk} fitted "
                f"(Sweep(chunk={self.chunk}) starts with that)"
            )


class Runner(NamedTuple):
    """The model as a sweep runs it."""

    shell: Shell
    state: State
    merged: bool  # are batch norms merged into convolutions?
    channels_last: bool
    folded: bool
    room: Room
    dtype: torch.dtype | None = None  # what it runs in, where that is not its own

    def call(self, guarded: bool = False) -> Callable[[State, Inputs], Any]:
        """A function `(state, x) -> output`."""
        inner, last, dtype = pure_from(self.shell, guarded=guarded, fresh=True), self.channels_last, self.dtype

        def prepared(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf
            return leaf.contiguous(memory_format=torch.channels_last) if last and leaf.ndim == 4 else leaf

        def call(state: State, x: Inputs) -> Any:
            return inner(state, tree_map(prepared, x))

        return call


def runner_of(forward: Forward, score: Score, options: Sweep, rows: int) -> Runner:
    """The model as it is best run for so many rows: as it is, or as a copy whose function is the same to rounding.

    Two forwards tell: a second image alone, and the two images together, by the copy; that one alone again, where it is known
    how a batch is taken.
    """
    shell = forward.task.model.shell()  # the forward's own has ports
    own = Runner(shell, forward.task.state, False, False, options.fold is not False, Room(chunk_of(forward, options, CHUNK)))
    if _compat.transformed():
        return own
    asks = options.fold == "auto" and min(rows, own.room.chunk) > 1
    for found in _rewritten(forward, own, rows):
        if _agrees(found, forward, score, _LOOSE, pair=asks):
            return found
    if not asks or _agrees(own, forward, score, _TIGHT):
        return own
    maps = _agrees(own._replace(folded=False), forward, score, _TIGHT)
    how = "maps through the model" if maps else "runs the model on one input at a time"
    warn(
        f"the model's output for an input depends on the others of its batch: the sweep {how} (slower); "
        f"{'Sweep(fold=False)' if maps else 'Sweep(chunk=1)'} says that this is known"
    )
    return own._replace(folded=False) if maps else own._replace(room=Room(1))


def _rewritten(forward: Forward, own: Runner, rows: int) -> Iterator[Runner]:
    """Copies, the fastest first: batch norms merged and channels last; less of it, for models that do not take that."""
    if not own.folded or rows < _WORTH or rows * second_of(forward).found.reuse < _REUSED:
        return
    folds, images = second_of(forward).found.folds, any(tensor.ndim == 4 for tensor in own.state.values())
    for merged, spread in dict.fromkeys(((bool(folds), images), (bool(folds), False), (False, images))):
        if merged or spread:
            shell, state = merge_norms(forward.task.model.shell(), own.state, folds if merged else ())
            state = channels_last(state) if spread else state
            yield own._replace(shell=shell, state=state, merged=merged, channels_last=spread)


def narrowed(forward: Forward, runner: Runner, dtype: torch.dtype) -> Runner:
    """The same in a narrow dtype."""
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in runner.state.items()}
    narrow = runner._replace(state=state, dtype=dtype)
    try:
        narrow.call(guarded=True)(state, _first(forward, forward.image[:1]))
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        found = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CamError(f"Sweep(dtype={dtype}): the model does not run in it ({found}); leave dtype= out") from error
    return narrow


def _image(forward: Forward) -> Tensor:
    """The first image, to be written to by a model that does."""
    return forward.image[:1].clone()


def _first(forward: Forward, images: Tensor) -> Inputs:
    """Inputs with these images, and with what belongs to the first image beside each."""
    first = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return rows_of(forward.batch.x, forward.companions, first, images)


def _compared(score: Score, output: Any, count: int) -> list[Tensor]:
    """What counts of an output for `count` inputs: it, or its logits, or what the targets make of it. Other parts do not.

    One tensor counts as it is: rounding is of its size, and a difference of two of its values may be far smaller.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return [output]
    if reads_logits(score.of) and not isinstance(output, list):
        return [logits_of(output)]

    def of(image: int) -> Any:
        return tree_map(lambda leaf: leaf[image : image + 1].expand(count, *leaf.shape[1:]), score.rows)

    return [score_rows(score.of, output, of(image)) for image in distinct(score.rows)]


# ---------------------------------------------------------------------------------------------------------- facts


class Second(NamedTuple):
    """What a forward of a second image alone tells."""

    image: Tensor
    found: Found


def second_of(forward: Forward) -> Second:
    """The first image turned over and half as bright: not made up, since a model may have its range of values."""

    def find() -> Second:
        image = 0.5 * _image(forward).flip(tuple(range(2, forward.image.ndim)))
        return Second(image, find_folds(forward.task.model, forward.task.state, _first(forward, image.clone())))

    return once(forward.task, "second", find)


_TIGHT, _LOOSE = 100, 1000
"""Roundings by which the outputs of one function may differ, and of two that are equal but for rounding."""


def _first_alone(forward: Forward, score: Score, runner: Runner) -> list[Tensor]:
    """What the first image gives. In a batch of several it is what it gives alone only where the batch makes no difference."""
    if runner.folded or forward.n == 1:
        return [part[:1] for part in _compared(score, forward.output, forward.n)]
    call = pure_from(forward.task.model.shell())
    return _compared(score, once(forward.task, "first", lambda: call(forward.task.state, _first(forward, _image(forward)))), 1)


def _agrees(runner: Runner, forward: Forward, score: Score, times: int, pair: bool = True) -> bool:
    """Does it give, of both images together, or of the second, what each gave alone? Mapped, where it maps."""

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
    except Exception as error:  # a view of what was contiguous, say
        if not is_exhausted(error):
            return False
        if runner.merged or runner.channels_last or not runner.folded:
            raise
        return True  # which says nothing about the model; the sweep will see


def chunk_of(forward: Forward, options: Sweep, usual: int) -> int:
    """Rows per forward: what was asked for, or what fits."""
    device, memory = forward.image.device, options.memory
    if _compat.transformed() or (memory is None and (options.chunk is not None or device.type != "cpu")):
        return options.chunk or usual
    most = options.chunk or (1024 if memory is not None else min(usual, _best_on_cpu(forward)))
    allowed = memory if isinstance(memory, int) else free_share(device, _SHARE if memory is None else memory)
    if allowed is None:
        if memory is None:
            return most
        raise CamError(f"Sweep(memory={memory}): how much is free on {device} is not known; give bytes")
    pixels = forward.image[0].numel() * forward.image.element_size()
    return min(most, max(1, allowed // (second_of(forward).found.bytes + 4 * pixels)))


def _best_on_cpu(forward: Forward) -> int:
    """A power of two, so that threads have equal parts: few rows hold little, but each chunk reads all weights again, for
    which it has to hold half as much as they do (`benchmarks/chunk.py` measures the rows, and by how much they matter)."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in forward.task.state.values())
    rows = max(_HELD * max(2, torch.get_num_threads()), weights // 2) // max(1, second_of(forward).found.bytes)
    return 1 << max(1, rows).bit_length() - 1


def free_share(device: torch.device, share: float = _SHARE) -> int | None:
    """A share of the memory that is free, in bytes; `None` where that is not known."""
    free = free_bytes(device)
    return None if free is None else int(share * free)
