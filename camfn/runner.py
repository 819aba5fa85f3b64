"""How the model runs in a sweep: what a few forwards tell about it, and the copy that is made for it."""

import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, RefusedError, warn
from camfn._types import Inputs, State
from camfn.capture import pure_from
from camfn.execution import CHUNK, Sweep
from camfn.inputs import rows_of
from camfn.memory import Ledger, free_bytes, is_exhausted
from camfn.rewrite import channels_last, find_folds, is_close, merge_norms
from camfn.shell import Shell
from camfn.subject import Subject, once
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


def runner_of(subject: Subject, score: Score, options: Sweep, rows: int) -> Runner:
    """The model as it is best run for so many rows: as it is, or as a copy whose function is the same to rounding."""
    shell = subject.model.shell()  # the subject's own has ports
    own = Runner(shell, subject.state, False, False, options.fold is not False, Room(chunk_of(subject, options, CHUNK)))
    if _compat.transformed():
        return own
    takes = takes_batches(subject, score) if options.fold == "auto" and min(rows, own.room.chunk) > 1 else "whole"
    if takes != "whole":
        how = "maps through the model" if takes == "mapped" else "runs the model on one input at a time"
        warn(
            f"the model's output for an input depends on the others of its batch: the sweep {how} (slower); "
            f"{'Sweep(fold=False)' if takes == 'mapped' else 'Sweep(chunk=1)'} says that this is known"
        )
        return own._replace(folded=False) if takes == "mapped" else own._replace(room=Room(1))
    return _rewritten(subject, score, own, rows) if own.folded and rows >= _WORTH else own


def _rewritten(subject: Subject, score: Score, own: Runner, rows: int) -> Runner:
    """Batch norms merged, channels last; less of it where the model does not take that, which one forward tells."""
    folds, reuse = once(subject, "folds", lambda: find_folds(subject.model, subject.state, _first(subject, _image(subject))))
    if rows * reuse < _REUSED:
        return own
    images = any(tensor.ndim == 4 for tensor in own.state.values())
    expected = [part[:1] for part in _read(score, subject.output, subject.n)]
    for merged, spread in dict.fromkeys(((bool(folds), images), (bool(folds), False), (False, images))):
        if merged or spread:
            shell, state = merge_norms(subject.model.shell(), own.state, folds if merged else ())
            state = channels_last(state) if spread else state
            found = own._replace(shell=shell, state=state, merged=merged, channels_last=spread)
            if _gives(found, subject, score, expected):
                return found
    return own


def narrowed(subject: Subject, runner: Runner, dtype: torch.dtype) -> Runner:
    """The same in a narrow dtype."""
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in runner.state.items()}
    narrow = runner._replace(state=state, dtype=dtype)
    try:
        narrow.call(guarded=True)(state, _first(subject, subject.image[:1]))
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        found = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CamError(f"Sweep(dtype={dtype}): the model does not run in it ({found}); leave dtype= out") from error
    return narrow


def _gives(runner: Runner, subject: Subject, score: Score, expected: list[Tensor]) -> bool:
    """Is the output for the first input what is expected, to rounding?"""
    try:
        found = _read(score, runner.call(guarded=True)(runner.state, _first(subject, _image(subject))), 1)
    except Exception as error:  # a view of what was contiguous, say
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return False
    return all(is_close(a, b, 1000) for a, b in zip(found, expected))


def _image(subject: Subject) -> Tensor:
    """The first image, to be written to by a model that does."""
    return subject.image[:1].clone()


def _first(subject: Subject, images: Tensor) -> Inputs:
    """Inputs with these images, and with what belongs to the first image beside each."""
    first = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return rows_of(subject.x, subject.place, first, images)


def _read(score: Score, output: Any, count: int) -> list[Tensor]:
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


def takes_batches(subject: Subject, score: Score) -> Literal["whole", "mapped", "alone"]:
    """How the model may be shown several inputs: as one batch, mapped, or only one at a time. Found by three forwards."""
    read = None if reads_logits(score.of) else weakly(score.of)

    def find() -> Literal["whole", "mapped", "alone"]:
        call, image = pure_from(subject.model.shell()), _image(subject)
        pair = image, 0.5 * image.flip(tuple(range(2, image.ndim)))  # not made up: a model may have its range of values
        alone = [_read(score, call(subject.state, _first(subject, one.clone())), 1) for one in pair]
        expected = [torch.cat(parts) for parts in zip(*alone)]

        def gives(run: Callable[[Tensor], list[Tensor]]) -> bool:
            try:
                return all(is_close(a, b, 100) for a, b in zip(run(torch.cat(pair)), expected))
            except Exception as error:
                if is_exhausted(error) or isinstance(error, RefusedError):
                    raise
                return False

        def one(image: Tensor) -> list[Tensor]:
            return [part[0] for part in _read(score, call(subject.state, _first(subject, image[None])), 1)]

        if gives(lambda images: _read(score, call(subject.state, _first(subject, images)), 2)):
            return "whole"
        return "mapped" if gives(vmap(one)) else "alone"

    try:
        return once(subject, ("batches", read), find)
    except RuntimeError as error:
        if is_exhausted(error):  # which says nothing about the model; the sweep will see
            return "whole"
        raise


def _row_bytes(subject: Subject) -> int:
    """What a forward holds at its peak, for each input."""

    def find() -> int:
        with Ledger() as ledger:
            pure_from(subject.model.shell())(subject.state, _first(subject, _image(subject)))
        return ledger.peak

    return once(subject, "bytes", find)


class _Same:
    """Equal for one and the same object, which it does not keep alive; the object may be without hash or weak references."""

    def __init__(self, value: Any) -> None:
        self.id = id(value)
        try:
            self.ref: Any = weakref.ref(value)
        except TypeError:
            self.ref = lambda: value

    def __hash__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ref() is not None and self.ref() is other.ref()


def weakly(value: Any) -> Any:
    """A caller's callable may lead to the model, which what is kept must not hold on to."""
    if isinstance(value, tuple):
        return tuple(map(weakly, value))
    return _Same(value) if callable(value) else value


def chunk_of(subject: Subject, options: Sweep, usual: int) -> int:
    """Rows per forward: what was asked for, or what fits."""
    device, memory = subject.image.device, options.memory
    if _compat.transformed() or (memory is None and (options.chunk is not None or device.type != "cpu")):
        return options.chunk or usual
    most = options.chunk or (1024 if memory is not None else min(usual, _best_on_cpu(subject)))
    allowed = memory if isinstance(memory, int) else free_share(device, _SHARE if memory is None else memory)
    if allowed is None:
        if memory is None:
            return most
        raise CamError(f"Sweep(memory={memory}): how much is free on {device} is not known; give bytes")
    pixels = subject.image[0].numel() * subject.image.element_size()
    return min(most, max(1, allowed // (_row_bytes(subject) + 4 * pixels)))


def _best_on_cpu(subject: Subject) -> int:
    """A power of two, so that threads have equal parts: few rows hold little, but each chunk reads all weights again, for
    which it has to hold half as much as they do (`benchmarks/chunk.py` measures the rows, and by how much they matter)."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in subject.state.values())
    rows = max(_HELD * max(2, torch.get_num_threads()), weights // 2) // max(1, _row_bytes(subject))
    return 1 << max(1, rows).bit_length() - 1


def free_share(device: torch.device, share: float = _SHARE) -> int | None:
    """A share of the memory that is free, in bytes; `None` where that is not known."""
    free = free_bytes(device)
    return None if free is None else int(share * free)
