"""Sweeps at a layer: the scores of changed activations, computed by the head (the part of the model after the layer) alone.

Images are swept one at a time. If the head needs a part of the model before the layer, that part then runs once for many
changes.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from camfn import _compat
from camfn._errors import CamError, RefusedError
from camfn._types import Inputs, State
from camfn.layouts import Read
from camfn.model.agreement import is_close
from camfn.model.attention import unfused
from camfn.model.capture import Captured, tap_from
from camfn.model.forward import Forward
from camfn.model.gradients import recomputed
from camfn.model.head import Head, head_of
from camfn.model.inputs import rows_of
from camfn.model.memory import is_exhausted
from camfn.model.prepare import shapes
from camfn.sweep.kernel import Kernel, Rows
from camfn.sweep.options import Sweep
from camfn.sweep.runner import Room, chunk_of, free_share
from camfn.sweep.scoring import in_chunks
from camfn.targets import Score, flatten, rows_at, score_rows

CHUNK = 64
"""Changed activations per forward pass of the head: it is small, and reads its weights once for all of them."""
# For each row, a head is assumed to need at most this many times the memory of the larger of input and activation. If that
# does not fit, its memory is measured.
_TIMES = 64


class Change(NamedTuple):
    """A numbered family of changes of an activation."""

    make: Callable[[Tensor, Tensor], Tensor]  # from an activation (c, p) and the numbers (b,) of changes to (b, c, p)
    ways: int  # the number of changes
    said: Callable[[int], str]  # the description of a change, for error messages


class Scored(NamedTuple):
    """The scores of changed activations, and their cost."""

    scores: list[Tensor]  # (r, t) for each image
    forwards: int  # inputs that ran again through the part before the layer
    heads: int  # activations that ran through the head


def sweep_at(
    forward: Forward,
    layer: str,
    read: Read,
    score: Score,
    change: Change,
    *,
    wanted: Sequence[Tensor],
    room: Room,
    tick: Callable[[int | None], None],
) -> Scored:
    """Score the changed activations of each image. `wanted` holds the numbers of its changes, for each image."""
    sweeper = _Sweeper(forward, layer, score)
    found = []
    for image, numbers in enumerate(wanted):
        site = _Site(sweeper, read, image, torch.tensor([image], device=read.values.device))

        def rows(numbers: Tensor, site: _Site = site) -> Rows:
            return {"values": change.make(site.activation, numbers)}

        found.append(in_chunks(_kernel(site, room.chunk), rows, numbers.to(site.number.device), room, tick))
    if not _compat.transformed() and not bool(torch.isfinite(torch.cat(found)).all()):
        _raise_nonfinite(found, wanted, layer, change)
    return Scored(found, sweeper.forwards, sum(map(len, found)))


def room_for(forward: Forward, options: Sweep, ways: int) -> Room:
    """The chunk size for `ways` changed activations: what fits in memory, divided evenly over the chunks."""
    most = _most(forward, options)
    return Room(-(-ways // -(-ways // most)), "changed activations")


def _most(forward: Forward, options: Sweep) -> int:
    if not _compat.transformed() and options.memory is None and options.chunk is None:
        free = free_share(forward.image.device)
        largest = max(t[:1].numel() * t.element_size() for t in (forward.image, *forward.activations))
        if free is None or CHUNK * _TIMES * largest <= free:
            return CHUNK
    return chunk_of(forward, options, CHUNK)


def _raise_nonfinite(found: list[Tensor], wanted: Sequence[Tensor], layer: str, change: Change) -> None:
    for image, (scores, numbers) in enumerate(zip(found, wanted)):
        bad = numbers[(~torch.isfinite(scores)).any(1).cpu()]
        if len(bad):
            raise CamError(f"the score of image {image} with {change.said(int(bad[0]))} at layer {layer!r} is not finite")


# ------------------------------------------------------------------------------------------------------- execution


class _Sweeper:
    """The state of a sweep at a layer: recorded heads, whether the model can be mapped over, and the cost."""

    def __init__(self, forward: Forward, layer: str, score: Score) -> None:
        self.forward, self.layer, self.score = forward, layer, score
        self.heads: dict[Any, Head | None] = {}  # by the number of activations, and the shapes of the input
        self.maps = True  # whether `vmap` over the swapped activation works
        self.forwards = 0

    @functools.cached_property
    def run(self) -> Callable[..., Captured]:
        """The model with ports at the layer."""
        private = self.forward.task.model.borrow()
        # With a graph it runs again in the backward pass, and must not be lent meanwhile.
        private.twins.in_graph |= self.forward.task.graphed
        return tap_from(private, [self.layer])


class _Site(NamedTuple):
    """An image at a layer."""

    sweeper: _Sweeper
    read: Read
    image: int
    number: Tensor  # (1,): the index of the image

    @property
    def activation(self) -> Tensor:
        """The clean activation of the image, `(c, p)`."""
        return self.read.values[self.image]

    def inputs(self, count: int, forward: Forward | None = None) -> Inputs:
        """The image `count` times, with its companion inputs."""
        forward, numbers = forward or self.sweeper.forward, self.number.expand(count)
        if isinstance(forward.batch.x, list):  # the images may differ in size
            return [forward.batch.x[self.image].clone() for _ in range(count)]
        return rows_of(forward.batch.x, forward.companions, numbers, forward.image.index_select(0, numbers))

    def restored(self, values: Tensor) -> Tensor:
        """Activations `(b, c, p)` in the layer's own shape."""
        return self.read.restore(values, self.number.expand(len(values)))

    def scores(self, output: Any, count: int, targets: Any) -> Tensor:
        """The scores `(count, t)` of an output for `count` activations, by the rows of the targets."""
        return score_rows(self.sweeper.score.of, output, rows_at(targets, self.number.expand(count)))


def _kernel(site: _Site, chunk: int) -> Kernel:
    """The kernel that scores one image's changed activations."""
    after = {chunk: _by_head(site, chunk)}
    pads = after[chunk] is not None

    def call(rows: Rows) -> Tensor:
        values = rows["values"]
        count = len(values)
        if pads and count not in after:  # memory ran out, and the chunk was halved
            after[count] = _by_head(site, count)
        return (after.get(count) or functools.partial(_by_swap, site))(values)

    return Kernel(call, pads)


def _by_head(site: _Site, count: int) -> Callable[[Tensor], Tensor] | None:
    """Score by the recorded head, `count` activations at a time; `None` if there is no head that holds."""
    sweeper = site.sweeper
    if _compat.transformed():
        return None
    x = site.inputs(1)
    key = count, shapes(x)
    head = sweeper.heads.get(key)
    if key not in sweeper.heads or (head is not None and (head.record.reads or not _holds(head, site, x, count))):
        head = sweeper.heads[key] = _recorded(site, x, count)  # the head of another image does not hold for this one
    if head is None:
        return None
    sweeper.forwards += head.record.around
    handed = head.handed(sweeper.forward.task.state, x)

    def scores(handed: list[Tensor], targets: Any, value: Tensor) -> Tensor:
        return site.scores(head.onward(handed)(value), count, targets)

    return lambda values: recomputed(scores, handed, sweeper.score.rows, site.restored(values))


def _recorded(site: _Site, x: Inputs, count: int) -> Head | None:
    """Record the head; `None` if it cannot be recorded, or may not hold for other activations."""
    forward, layer = site.sweeper.forward, site.sweeper.layer
    halves = site.restored(_halved(site, count)).detach()
    try:
        head = head_of(forward.task, layer, x, halves, lambda head: _holds(head, site, x, count))
        return None if head.record.unseen else head
    except Exception as error:  # for example a model that asserts its shapes
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return None


def _halved(site: _Site, count: int) -> Tensor:
    """The halved activation, `count` times."""
    return (site.activation / 2).expand(count, -1, -1)


def _checking(site: _Site, count: int) -> Tensor:
    """The activation, followed by multiples of it that must not change its output.

    With them, the maximum, the minimum and the mean over the batch differ from the activation's own. A model that uses one of
    these over its batch then gives another output.
    """
    share = torch.full((count, 1, 1), 1.5, dtype=site.activation.dtype, device=site.activation.device)
    share[2:][-1:] = 0.25
    return site.activation * share.index_fill(0, torch.zeros_like(site.number), 1)


def _holds(head: Head, site: _Site, x: Inputs, count: int) -> bool:
    """Whether the head gives the clean output for the clean activation."""
    forward = site.sweeper.forward
    score = site.sweeper.score
    with nullcontext() if _compat.transformed() else torch.no_grad():
        found = _sample(head.at(forward.task.state, x)(site.restored(_checking(site, count))), 0, count, score)
    clean = _sample(forward.output, site.image, forward.n, score)
    return 0 < len(found) == len(clean) and all(is_close(a, b, 1000) for a, b in zip(found, clean))


def _sample(output: Any, i: int, count: int, score: Score) -> list[Tensor]:
    """The floating-point tensors of sample `i` in an output for `count` samples."""

    def row(leaf: Any) -> Any:
        return leaf[i] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf

    leaves = flatten(output[i])[0] if score.of.way == "entries" else map(row, flatten(output)[0])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _by_swap(site: _Site, values: Tensor) -> Tensor:
    """Score by the whole model with the layer's output swapped: under `vmap`, so that the part before the layer runs once.

    If `vmap` fails, the activations run one at a time, under a transform as one batch.
    """
    sweeper = site.sweeper
    if sweeper.forward.task.graphed:
        return _by_swap_recomputed(site, values)
    if sweeper.maps:
        mapped = vmap(lambda value: _swapped(site, value[None])[0])
        try:
            scores = mapped(values) if _compat.transformed() else unfused(lambda: mapped(values))
            sweeper.forwards += 1
            return scores
        except RuntimeError as error:  # for example a model that adds a mapped tensor in place to one that is not mapped
            if is_exhausted(error):
                raise
            sweeper.maps = False
    sweeper.forwards += len(values)
    # The head could not be recorded either, so samples may depend on their batch. Under a transform that cannot be tested.
    parts = values.split(len(values) if _compat.transformed() else 1)
    return torch.cat([_swapped(site, part) for part in parts])


def _by_swap_recomputed(site: _Site, values: Tensor) -> Tensor:
    """The same for scores with a graph: one activation at a time, and again in the backward pass."""
    sweeper = site.sweeper
    forward = sweeper.forward

    def scores(state: State, x: Inputs, targets: Any, wholes: list[Tensor]) -> Tensor:
        return torch.cat([_swapped_whole(site, forward.moved(state, x), targets, whole) for whole in wholes])

    sweeper.forwards += len(values)
    wholes = [site.restored(value[None]) for value in values]
    return recomputed(scores, forward.task.state, forward.batch.x, sweeper.score.rows, wholes)


def _swapped(site: _Site, values: Tensor) -> Tensor:
    """Score the model with the activations `(b, c, p)` swapped in, and the image repeated for each of them."""
    whole = site.restored(values)
    return _swapped_whole(site, site.sweeper.forward, site.sweeper.score.rows, whole, len(values))


def _swapped_whole(site: _Site, forward: Forward, targets: Any, whole: Tensor, count: int = 1) -> Tensor:
    """The same for activations in the layer's own shape."""
    output = site.sweeper.run(forward.task.state, site.inputs(count, forward), None, (whole,)).output
    return site.scores(output, count, targets)
