"""The sweep: the plan of masked inputs, their scores in chunks, and the scores of the channels."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.func import vmap

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Scores, wide
from camfn.formulas.masks import Rule, Variation
from camfn.formulas.noise import noise_stream
from camfn.layouts import Read
from camfn.model.forward import Forward, first_nonfinite
from camfn.model.inputs import rows_of
from camfn.model.memory import is_exhausted
from camfn.sweep.kernel import Kernel, Rows, kernel_of, mask_row
from camfn.sweep.options import Sweep, checked, counter, pays, refuse_with_graph
from camfn.sweep.runner import Room, Runner, runner_of
from camfn.targets import Score, score_rows


class Swept(NamedTuple):
    """The scores of a sweep, and their cost."""

    scores: Scores
    forwards: int  # forward passes, counted in masked inputs
    error: Tensor | None = None  # (n, t): the stated error of the normalized map; None for a full sweep


class Plan(NamedTuple):
    """The rows to sweep: `(draw, channel, image)` of each masked input, draws outermost, on the CPU."""

    read: Read
    rows: Tensor  # (r, 3)
    zeros: Tensor  # (m, 3): for each image with flat channels, the one row that they share; empty if they do not share
    flat: Tensor  # (n, c): the channels with a mask of zeros

    @property
    def rows_in_all(self) -> int:
        """The number of masked inputs."""
        return len(self.rows) + len(self.zeros)

    def swept(self) -> Tensor:
        """The channels `(n, c)` that are swept individually."""
        _, channel, image = self.rows.T
        return torch.zeros_like(self.flat, device="cpu").index_put((image, channel), torch.tensor(True)).to(self.flat.device)

    def of(self, channels: Tensor) -> "Plan":
        """The plan for the rows of some channels `(n, c)` only, without shared rows."""
        _, channel, image = self.rows.T
        return self._replace(rows=self.rows[channels.cpu()[image, channel]], zeros=self.zeros[:0])


def plan(read: Read, variation: Variation) -> Plan:
    """Plan the rows to sweep. Flat channels are left out or share a row; under a transform all channels are swept."""
    n, c, _ = read.values.shape
    recipe = variation.recipe
    draws, flat = len(variation.scales), variation.blank(read.values)
    alive = torch.ones(n, c, dtype=torch.bool, device="cpu") if _compat.transformed() else ~flat.cpu()
    if recipe.flat == "zero" and not variation.zeros_are_equal:
        alive = torch.ones_like(alive)
    rows = alive.T.expand(draws, c, n).nonzero()
    if recipe.flat == "skip":
        if not len(rows):
            raise CamError("every channel of the layer is flat, and the recipe leaves flat channels out: nothing to sweep")
        return Plan(read, rows, rows[:0], flat)
    first = (~alive).int().argmax(1)  # any flat channel of the image can stand for all: their masks are zero
    image = torch.arange(n, device="cpu")
    zeros = torch.stack([torch.zeros_like(image), first, image], 1)[~alive.all(1)]
    return Plan(read, rows, zeros, flat)


class Scoring(NamedTuple):
    """The arguments of a sweep."""

    forward: Forward
    runner: Runner
    score: Score
    plan: Plan
    variation: Variation
    options: Sweep
    tick: Callable[[int | None], None]


def sweep_layers(
    forward: Forward,
    score: Score,
    plans: Sequence[Plan],
    ways: Sequence[Callable[[Scoring], Swept]],
    variation: Variation,
    options: Sweep,
    *,
    rows: int,
) -> list[Swept]:
    """Sweep each layer's plan by the function in `ways`; `rows` masked inputs in all. All layers share one runner."""
    refuse_with_graph(forward.task.graphed, options)
    runner, tick = runner_of(forward, score, options, rows), counter(options.progress, rows)
    found = [way(Scoring(forward, runner, score, todo, variation, options, tick)) for todo, way in zip(plans, ways)]
    tick(None)
    runner.room.tell()
    return found


def sweep_in_full(
    method: str, forward: Forward, score: Score, reads: Sequence[Read], variation: Variation, options: Sweep
) -> list[Swept]:
    """Score all masks of each layer, for methods without a budget and without low precision."""
    if checked(options).dtype is not None:
        raise CamError(
            f"Sweep(dtype={options.dtype}) is not for {method}: it needs one score for each channel, weighted as in score_cam; "
            "leave dtype= out"
        )
    plans = [plan(part, variation) for part in reads]
    rows = sum(todo.rows_in_all for todo in plans)
    return sweep_layers(forward, score, plans, [sweep_all] * len(plans), variation, options, rows=rows)


def sweep_all(scoring: Scoring) -> Swept:
    """Sweep all rows: `S_k` is the mean score of the masked inputs of channel k."""
    todo = scoring.plan
    index = torch.cat([todo.rows, todo.zeros])
    return Swept(gather(scorer(scoring)(index), todo, scoring.variation), len(index))


def scorer(scoring: Scoring) -> Callable[[Tensor], Tensor]:
    """Return a function from rows `(r, 3)` (draw, channel, image), draws in order, to their scores `(r, t)`."""
    forward, runner, score, (read, *_), variation, options, tick = scoring
    size = tuple(forward.image.shape[2:])
    rule = Rule(size, read.values.dtype, variation.recipe, variation.noise, variation.form, variation.under)
    kernel = kernel_of(forward, runner, score, rule, read.grid, options)
    rows_from = _rows_from(forward, read, variation, size)

    def scored(index: Tensor) -> Tensor:
        if not len(index):
            return score_rows(score.of, forward.output, score.rows)[:0]
        found = in_chunks(kernel, rows_from, index, runner.room, tick)
        if not _compat.transformed() and not bool(torch.isfinite(found).all()):
            bad = index[(~torch.isfinite(found)).any(1).nonzero()[0]]
            _raise_nonfinite(forward, runner, rule, bad, rows_from(bad))
        return found

    return scored


def scores_of(score: Callable[[Tensor], Tensor], todo: Plan, variation: Variation, channels: Tensor) -> Scores:
    """Score some channels `(n, c)` of a plan by `score`; zeros for the others."""
    part = todo.of(channels)
    return gather(score(part.rows), part, variation)


def _raise_nonfinite(forward: Forward, runner: Runner, rule: Rule, index: Tensor, rows: Rows) -> NoReturn:
    masked = vmap(partial(mask_row, rule, forward.image))(rows)
    x = rows_of(forward.batch.x, forward.companions, rows["image"], masked)
    _, channel, image = index[0].tolist()
    where = first_nonfinite(forward.task, x)
    if runner.dtype is not None:
        where = f"the sweep runs in {runner.dtype}, which may be too narrow for this model: leave Sweep(dtype=) out"
    if not bool(torch.isfinite(rows["channel"]).all()):
        where = "the mask itself has NaN or infinite values, which the layer gave: choose an earlier layer"
    mask = "channel" if rule.form in ("recipe", "tanh") else "mask"
    raise CamError(f"the score of image {image} masked by {mask} {channel} is not finite; {where}")


def _rows_from(forward: Forward, read: Read, variation: Variation, size: tuple[int, ...]) -> Callable[[Tensor], Rows]:
    """Return a function from rows `(r, 3)` (draw, channel, image) to the kernel's inputs."""
    n, c, _ = read.values.shape
    device = read.values.device
    channels = read.values.to(wide(read.values.dtype)).reshape(n * c, *read.grid)
    scales = torch.tensor(variation.scales, dtype=channels.dtype, device=device)
    shape = tuple(forward.image.shape[1:]) if variation.noise == "input" else size
    noise_of = noise_stream(variation, c, shape, device)

    def rows(index: Tensor) -> Rows:
        draw, channel, image = index.T.contiguous().to(device)
        noise = noise_of(index[:, :2])
        made = {"image": image, "channel": channels.index_select(0, image * c + channel), "scale": scales.index_select(0, draw)}
        return made if noise is None else {**made, "noise": noise}

    return rows


# ----------------------------------------------------------------------------------------------------- in chunks


def in_chunks(
    kernel: Kernel, rows_from: Callable[[Tensor], Rows], index: Tensor, room: Room, tick: Callable[[int | None], None]
) -> Tensor:
    """Run the kernel in chunks on the rows made from an index.

    Only the first chunk runs under the guard. If the state of torch's generator has changed after the sweep, another chunk (or
    another thread) drew random numbers, and all chunks run again under the guard.
    """
    if _compat.transformed() or kernel.guarded is None:
        return _in_chunks(kernel, rows_from, index, room, tick)
    before = _generators(index.device)
    found = _in_chunks(kernel, rows_from, index, room, tick)
    if all(map(torch.equal, before, _generators(index.device))):
        return found
    guarded = Kernel(kernel.guarded, False, guarded=kernel.guarded)
    return _in_chunks(guarded, rows_from, index, room, lambda used: None)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's default generators for this device and the CPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _in_chunks(
    kernel: Kernel, rows_from: Callable[[Tensor], Rows], index: Tensor, room: Room, tick: Callable[[int | None], None]
) -> Tensor:
    found = []
    while (start := sum(map(len, found))) < len(index):
        begun = time.perf_counter() if kernel.compiled else 0.0
        first = kernel._replace(call=kernel.guarded) if kernel.guarded and not found and not kernel.pads else kernel
        scores = _scores(first, rows_from(index[start : start + room.chunk]), room)
        found.append(scores)
        tick(len(scores))
        left = (len(index) - start - len(scores)) / len(scores)
        if kernel.compiled and len(found) == 2 and pays(left * _seconds_since(begun, scores)):
            kernel = kernel.compiled()
    return torch.cat(found)


def _seconds_since(begun: float, scores: Tensor) -> float:
    if scores.device.type == "cuda":
        torch.cuda.synchronize(scores.device)  # only once in a sweep, so it costs little
    return time.perf_counter() - begun


def _scores(kernel: Kernel, rows: Rows, room: Room) -> Tensor:
    """The scores of the rows of one chunk. When memory runs out, the chunk is halved and the rows run again."""
    while True:
        chunk = room.chunk
        try:
            return torch.cat([kernel.call(_padded(kernel, part, chunk))[: _count(part)] for part in _split(rows, chunk)])
        except RuntimeError as error:
            if chunk == 1 or _compat.transformed() or not is_exhausted(error):
                raise
        room.halve(_count(rows))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _split(rows: Rows, chunk: int) -> Iterator[Rows]:
    for start in range(0, _count(rows), chunk):
        yield {name: value[start : start + chunk] for name, value in rows.items()}


def _padded(kernel: Kernel, rows: Rows, chunk: int) -> Rows:
    """Pad the rows to the chunk size, so that all chunks use one compiled graph."""
    missing = chunk - _count(rows)
    if not kernel.pads or not missing:
        return rows
    return {name: torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) for name, value in rows.items()}


def gather(found: Tensor, todo: Plan, variation: Variation) -> Scores:
    """Gather the rows' scores by channel: the mean over draws. Flat channels get the score of the row that they share."""
    (n, c), t = todo.flat.shape, found.shape[1]
    swept, zeros = found.split([len(todo.rows), len(todo.zeros)])
    _, channel, image = todo.rows.to(found.device).unbind(1)
    scores = found.new_zeros(n * c, t).index_add(0, image * c + channel, swept / len(variation.scales)).reshape(n, c, t)
    if variation.recipe.flat == "skip":
        return torch.where(todo.flat[..., None], 0, scores)  # under a transform flat channels were swept too
    if len(todo.zeros):
        shared = found.new_zeros(n, t).index_add(0, todo.zeros[:, 2].to(found.device), zeros)
        scores = torch.where(todo.flat[..., None], shared[:, None], scores)
    return scores
