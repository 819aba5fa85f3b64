"""The kernel: the scores of a chunk of masked inputs, eager or compiled.

By definition it is a function of one row, `(state, x, mask, target) -> score`, mapped over the rows of a chunk. The folded
kernel maps only the masking and the targets, and runs the model on the chunk as one batch.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import first_line, warn
from camfn._types import Inputs, State
from camfn.formulas.masks import Rule, masked_input
from camfn.model.forward import Forward
from camfn.model.gradients import recomputed
from camfn.model.inputs import Companions, pick, rows_of
from camfn.model.memory import is_exhausted
from camfn.model.prepare import Slot, shapes, weakly
from camfn.sweep.folding import with_channels_last
from camfn.sweep.options import Sweep
from camfn.sweep.runner import Runner
from camfn.targets import Kind, Score, rows_at, score_rows

Rows = dict[str, Tensor]


class Kernel(NamedTuple):
    """The kernel with all arguments bound except the rows."""

    call: Callable[[Rows], Tensor]
    pads: bool  # whether all chunks must have one shape
    compiled: Callable[[], "Kernel"] | None = None  # makes the compiled kernel, if compiling may pay
    guarded: Callable[[Rows], Tensor] | None = None  # the eager kernel with every forward under the guard


class Scorer(NamedTuple):
    """The model, the targets and the companion inputs: all that scoring a batch of masked inputs needs."""

    call: Callable[[State, Inputs], Any]  # the model
    of: Any  # the targets
    companions: Companions


def mask_row(rule: Rule, images: Tensor, row: Rows) -> Tensor:
    """The masked input of one row."""

    def of_row(given: Tensor) -> Tensor:  # a single image is shared by all rows, without copies
        return given[0] if given.shape[0] == 1 else given.index_select(0, row["image"].reshape(1))[0]

    under = None if rule.under is None else of_row(rule.under)
    return masked_input(rule, of_row(images), under, row["channel"], row["scale"], row.get("noise"))


def folded(scorer: Scorer, rule: Rule, state: State, x: Inputs, targets: Any, rows: Rows) -> Tensor:
    """The scores `(b, t)` of a chunk of rows, with the chunk as one batch of the model."""
    images = pick(x, scorer.companions.pixels)
    masked = vmap(functools.partial(mask_row, rule, images))(rows)
    return scored_images(scorer, state, x, targets, rows["image"], masked)


def scored_images(scorer: Scorer, state: State, x: Inputs, targets: Any, image: Tensor, made: Tensor) -> Tensor:
    """The scores `(b, t)` of inputs that were made from these images, as one batch of the model."""
    output = scorer.call(state, rows_of(x, scorer.companions, image, made))
    return score_rows(scorer.of, output, rows_at(targets, image))


def mapped(scorer: Scorer, rule: Rule, state: State, x: Inputs, targets: Any, rows: Rows) -> Tensor:
    """The scores `(b, t)` by definition: one row, including the model, mapped over the chunk."""

    return one_by_one(scorer.of, functools.partial(folded, scorer, rule, state, x, targets), rows)


def one_by_one(of: Kind, folded: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
    """The scores of a function of a chunk that sees one row at a time: mapped, unless the target itself cannot be."""
    if of.way != "mapped":
        each = [folded({name: value[i : i + 1] for name, value in rows.items()}) for i in range(len(rows["image"]))]
        return torch.cat(each)
    return vmap(lambda row: folded({name: value[None] for name, value in row.items()})[0])(rows)


def kernel_of(forward: Forward, runner: Runner, score: Score, rule: Rule, grid: tuple[int, ...], options: Sweep) -> Kernel:
    """The kernel for a layer with this grid: compiled if the options ask for it, or if a compiled one is in the cache."""
    body = folded if runner.folded else mapped
    # Images with the channels last give masked inputs with the channels last, which need no conversion.
    image = with_channels_last(forward.image) if runner.channels_last else forward.image
    x = forward.batch.with_image(image).x
    scorer = Scorer(runner.call(), score.of, forward.companions)
    arguments = (scorer, rule, runner.state, x, score.rows)
    watched = scorer._replace(call=runner.call(guarded=True))
    if forward.task.graphed:
        runner.private.twins.in_graph = True  # it runs again in the backward pass, and must not be lent meanwhile
        calls = (functools.partial(recomputed, functools.partial(body, own), *arguments[1:]) for own in (scorer, watched))
        return Kernel(next(calls), False, guarded=next(calls))
    eager = Kernel(functools.partial(body, *arguments), False, guarded=functools.partial(body, watched, *arguments[1:]))
    if options.compile is False or _compat.transformed():
        return eager
    key = _key(forward, runner, score, rule, grid)

    def compiled() -> Kernel:
        slot = forward.task.model.prepared.slot(key)
        if reason := slot.made.reason if isinstance(slot.made, _Refused) else _compat.can_compile():
            _warn_of(reason)
            return eager
        if not forward.task.model.prepared.lasting:
            warn("the kernel is compiled for this call alone; camfn.prepare(model), passed in the model's place, keeps it")
        # A graph holds only if the same tensors are one object. Here those in the copy are never the objects in the state.
        with torch.inference_mode(False):
            runner.private.put({name: _plain(tensor).detach() for name, tensor in runner.state.items()})
        return Kernel(functools.partial(_call_compiled, slot, body, arguments), True, guarded=eager.guarded)

    if options.compile is True or forward.task.model.prepared.has(key):
        return compiled()
    return eager._replace(compiled=compiled)


def _key(forward: Forward, runner: Runner, score: Score, rule: Rule, grid: tuple[int, ...]) -> Any:
    state = tuple((t.dtype, t.device) for t in runner.state.values())
    of = weakly(score.of), shapes(score.rows)
    settings = (rule.static(), grid, forward.companions, runner.folded, runner.channels_last, runner.room.asked, runner.dtype)
    return "kernel", of, settings, shapes(forward.batch.x), state, runner.merged


class _Refused(NamedTuple):
    """The reason why a kernel cannot be compiled, cached in its place."""

    reason: str


def _warn_of(reason: str) -> None:
    warn(f"the kernel runs without compilation: {reason}")


def _plain(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _call_compiled(slot: Slot, body: Any, arguments: tuple[Any, ...], rows: Rows) -> Tensor:
    """Run the compiled kernel, without grad and inference mode: each mode would compile one more graph.

    The first call compiles, and holds the lock.
    """

    with torch.inference_mode(False), torch.no_grad():
        scorer, *tensors = arguments
        given = (scorer, *tree_map(_plain, tensors), tree_map(_plain, rows))
        with slot.lock if slot.made is None else nullcontext():
            kernel = slot.made or _compat.compiled(body)
            if not isinstance(kernel, _Refused):
                try:
                    scores = kernel(*given)
                    slot.made = kernel
                    return scores
                except Exception as error:
                    if is_exhausted(error):
                        slot.made = kernel  # the kernel compiled, but the chunk did not fit
                    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                        raise
                    found = first_line(error)
                    slot.made = _Refused(f"torch.compile does not take this model as one graph ({found})")
                    _warn_of(slot.made.reason)
        return body(*given)
