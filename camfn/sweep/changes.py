"""Sweeps at a layer: the scores of activations that are changed there, by what comes after the layer and nothing else.

One image at a time: what comes before the layer, where a part of it is needed again, then runs once for many changes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from camfn import _compat
from camfn._errors import CamError, RefusedError
from camfn._types import Inputs
from camfn.layouts import Read
from camfn.model.agreement import is_close
from camfn.model.attention import unfused
from camfn.model.capture import Captured, tap_from
from camfn.model.forward import Forward
from camfn.model.head import Head, head_of
from camfn.model.inputs import rows_of
from camfn.model.memory import is_exhausted
from camfn.model.prepare import shapes
from camfn.sweep.kernel import Kernel, Rows
from camfn.sweep.options import Sweep
from camfn.sweep.runner import Room, chunk_of, free_share
from camfn.sweep.scoring import in_chunks
from camfn.targets import Score, rows_at, score_rows
from camfn.targets.scores import fields_of, is_record

CHUNK = 64
"""Changed activations that go on at once: what comes after a layer is small, and reads its weights once for all of them."""
_TIMES = 64  # a head holds less than so many times the input, or the activation, at once: else it is measured


class Change(NamedTuple):
    """What is done to an activation, in so many ways."""

    make: Callable[[Tensor, Tensor], Tensor]  # of an activation (c, p) and the numbers (b,) of ways, (b, c, p)
    ways: int
    said: Callable[[int], str]  # what a way does, for the end of a sentence


class Scored(NamedTuple):
    """The scores of changed activations, and what they took."""

    scores: list[Tensor]  # of each image, (r, t)
    forwards: int  # inputs that went through what comes before the layer, again
    heads: int  # activations that went through what comes after it


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
    """The scores of each image's activation, changed in the ways `wanted` of it."""
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
    """For how many changed activations there is room: as many in each chunk, so that the last is not short of others."""
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


# ----------------------------------------------------------------------------------------------------- how it is run


class _Sweeper:
    """How the changed activations of a layer are scored, as it is found out, and what it took."""

    def __init__(self, forward: Forward, layer: str, score: Score) -> None:
        self.forward, self.layer, self.score = forward, layer, score
        self.heads: dict[Any, Head | None] = {}  # by how many activations they take, and the form of an input
        self.maps = True  # does the model take `vmap` over what is swapped in?
        self.forwards = 0

    @functools.cached_property
    def run(self) -> Callable[..., Captured]:
        """The model with ports at the layer."""
        return tap_from(self.forward.task.model.shell(), [self.layer])


class _Site(NamedTuple):
    """An image at a layer."""

    sweeper: _Sweeper
    read: Read
    image: int
    number: Tensor  # (1,): of the image

    @property
    def activation(self) -> Tensor:
        """`(c, p)`"""
        return self.read.values[self.image]

    def inputs(self, count: int) -> Inputs:
        """The image `count` times, with what belongs to it."""
        forward, numbers = self.sweeper.forward, self.number.expand(count)
        if isinstance(forward.batch.x, list):  # of several sizes, maybe
            return [forward.batch.x[self.image].clone() for _ in range(count)]
        return rows_of(forward.batch.x, forward.companions, numbers, forward.image.index_select(0, numbers))

    def restored(self, values: Tensor) -> Tensor:
        """Activations `(b, c, p)` as the layer returns them."""
        return self.read.restore(values, self.number.expand(len(values)))

    def scores(self, output: Any, count: int) -> Tensor:
        """Of an output for `count` activations."""
        score = self.sweeper.score
        return score_rows(score.of, output, rows_at(score.rows, self.number.expand(count)))


def _kernel(site: _Site, chunk: int) -> Kernel:
    """The scores of one image's changed activations."""
    after = {chunk: _by_head(site, chunk)}
    pads = after[chunk] is not None

    def call(rows: Rows) -> Tensor:
        values = rows["values"]
        count = len(values)
        if pads and count not in after:  # memory ran out, and chunks are smaller now
            after[count] = _by_head(site, count)
        return (after.get(count) or functools.partial(_by_swap, site))(values)

    return Kernel(call, pads)


def _by_head(site: _Site, count: int) -> Callable[[Tensor], Tensor] | None:
    """By what was recorded of the model after the layer, for so many activations at once; where there is that."""
    sweeper = site.sweeper
    if _compat.transformed():
        return None
    x = site.inputs(1)
    key = count, shapes(x)
    head = sweeper.heads.get(key)
    if key not in sweeper.heads or (head is not None and (head.record.reads or not _holds(head, site, x, count))):
        head = sweeper.heads[key] = _recorded(site, x, count)  # another image's does not hold for this one
    if head is None:
        return None
    sweeper.forwards += head.record.around
    onward = head.at(sweeper.forward.task.state, x)
    return lambda values: site.scores(onward(site.restored(values)), count)


def _recorded(site: _Site, x: Inputs, count: int) -> Head | None:
    """What comes after the layer; `None` where it cannot be recorded, or may not hold for other activations."""
    forward, layer = site.sweeper.forward, site.sweeper.layer
    halves = site.restored(_halved(site, count))
    try:
        head = head_of(forward.task, layer, x, halves, lambda head: _holds(head, site, x, count))
        return None if head.record.unseen else head
    except Exception as error:  # a model that makes sure of its shapes, say
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return None


def _halved(site: _Site, count: int) -> Tensor:
    """Halves of the activation."""
    return (site.activation / 2).expand(count, -1, -1)


def _checking(site: _Site, count: int) -> Tensor:
    """The activation itself, and beside it more and less of it, which must not change what comes of it.

    Their largest value, their smallest and their mean are not its own: a model may take any of them over its batch.
    """
    share = torch.full((count, 1, 1), 1.5, dtype=site.activation.dtype, device=site.activation.device)
    share[2:][-1:] = 0.25
    return site.activation * share.index_fill(0, torch.zeros_like(site.number), 1)


def _holds(head: Head, site: _Site, x: Inputs, count: int) -> bool:
    """Does the activation itself give what the clean forward gave?"""
    forward = site.sweeper.forward
    found = _sample(head.at(forward.task.state, x)(site.restored(_checking(site, count))), 0, count)
    clean = _sample(forward.output, site.image, forward.n)
    return 0 < len(found) == len(clean) and all(is_close(a, b, 1000) for a, b in zip(found, clean))


def _sample(output: Any, i: int, count: int) -> list[Tensor]:
    """The floating-point tensors in an output that belong to sample `i` of `count`."""

    def row(leaf: Any) -> Any:
        return leaf[i] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf

    output = fields_of(output) if is_record(output) else output
    leaves = tree_flatten(output[i] if isinstance(output, list) else tree_map(row, output))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _by_swap(site: _Site, values: Tensor) -> Tensor:
    """By the model with the layer's output swapped: mapped over, so that what comes before runs once; else as a batch."""
    sweeper = site.sweeper
    if sweeper.maps:
        mapped = vmap(lambda value: _swapped(site, value[None])[0])
        try:
            scores = mapped(values) if _compat.transformed() else unfused(lambda: mapped(values))
            sweeper.forwards += 1
            return scores
        except RuntimeError as error:  # a model that adds in place what is mapped to what is not cannot be mapped
            if is_exhausted(error):
                raise
            sweeper.maps = False
    sweeper.forwards += len(values)
    # Nor could it be recorded: its samples may not be independent. Under a transform nothing can be told.
    parts = values.split(len(values) if _compat.transformed() else 1)
    return torch.cat([_swapped(site, part) for part in parts])


def _swapped(site: _Site, values: Tensor) -> Tensor:
    """The scores of a model that gets the activations `(b, c, p)` in the place of the layer's own, and the image for each."""
    count = len(values)
    output = site.sweeper.run(site.sweeper.forward.task.state, site.inputs(count), None, (site.restored(values),)).output
    return site.scores(output, count)
