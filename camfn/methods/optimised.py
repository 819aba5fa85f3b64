"""Methods whose weights are found by optimisation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps
from camfn.formulas.masks import unit
from camfn.formulas.scaling import size_of
from camfn.layouts import Read
from camfn.methods.table import Drawing, Outcome, checked_combine, clean_scores, combined, drawn, method, read
from camfn.model.forward import Key, Subject, check_slopes, look, without_graph
from camfn.model.gradients import slope_of, ungraphed
from camfn.model.inputs import rows_of
from camfn.sweep.kernel import Kernel, Rows
from camfn.sweep.options import Sweep, checked, counter
from camfn.sweep.runner import Room, Runner, chunk_of, runner_of
from camfn.sweep.scoring import in_chunks
from camfn.targets import Score, resolve, rows_at, score_rows

_CHUNK = 8  # images at once: what a gradient keeps of a forward is many times what a forward holds
_MEMORY, _SQUARES, _EPS = 0.9, 0.999, 1e-8  # Adam's


@method("activations", "gradients", "masked inputs", cost="51, 50 backward")
def opti_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    steps: int = 50,
    rate: float = 0.1,
    masked: Key = None,
    combine: Combine = "sum",
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Opti-CAM: the weights of channels that make the input, masked by the map, score highest.

    `L(u) = sum_k softmax(u)_k A_k`, and u maximises `s(x * norm(U(L(u))))`; U upsamples linearly to the input's size, norm is
    min-max. From equal weights, `steps` steps of Adam at the learning rate `rate`: one forward and one backward through the
    whole model for each, of each image and target. 50 steps at 0.1 are those of the authors' script (their class has 100 at
    0.01), which also takes the activation's ReLU first, and stops where a loss over all images rises: not so here. The map has
    been made to score high: that it does says nothing of it.

    **Arguments**, beside those that all methods share (`camfn.score_cam` tells them, and `masked` and `combine`): `steps`;
    `rate`; `sweep`, of which chunk (images at once, 8 by default), memory, fold and progress count.

    Under `torch.func.grad` and `jvp` maps are differentiable in `x` and `state`, through all the steps. What is returned and
    raised is what `camfn.score_cam` returns and raises.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> maps = [camfn.opti_cam(model, "1", x, 3, steps=steps, size="input") for steps in (1, 50)]
    >>> scores = [model(x * m[:, None])[:, 3] for m in maps]
    >>> bool((scores[1] > scores[0]).all())
    True

    Zhang et al., Opti-CAM: Optimizing saliency maps for interpretability, 2023 (arXiv 2301.07002).
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise CamError(f"opti_cam needs a whole number of steps >= 1, found {steps!r}")
    if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise CamError(f"opti_cam needs a finite rate > 0, found {rate!r}")
    drawing = Drawing(relu, size, normalize, checked_combine(combine))
    with torch.inference_mode(False), without_graph():
        subject = _bare(look(model, layer, x, state, masked, masks=True))
        check_slopes(subject.shell)
        score = resolve(target, subject.output, subject.n, subject.image.device)
        clean = clean_scores(subject, score)
        reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        forwards = clean.numel() * steps * len(reads)
        options = checked(sweep)._replace(compile=False, dtype=None)
        runner, tick = runner_of(subject, score, options, forwards), counter(options.progress, forwards)
        room = Room(min(runner.room.chunk, chunk_of(subject, options, _CHUNK)), "images")
        climb = partial(ascend, steps=steps, rate=rate)
        found = [
            _weights(subject, runner, score, part, clean.shape[1], climb, room, partial(_tell, tick, steps)) for part in reads
        ]
        tick(None)
        room.tell()
        outcome = drawn(subject, score, clean, combined(found, reads, drawing), [part.grid for part in reads], drawing)
        total = outcome.forwards + forwards
        return outcome._replace(weights=tuple(found), forwards=total, backwards=forwards)


def _bare(subject: Subject) -> Subject:
    """In a plain call a graph of its own is made of each step: nothing else may belong to one, or forbid it."""
    if _compat.transformed():
        return subject
    x, state, seen = (tree_map(ungraphed, part) for part in (subject.x, subject.state, subject.seen))
    return subject._replace(x=x, state=state, seen=seen)


def _tell(tick: Callable[[int | None], None], steps: int, rows: int | None) -> None:
    """Of every row its forwards."""
    tick(None if rows is None else rows * steps)


@_compat.eager
def _weights(
    subject: Subject,
    runner: Runner,
    score: Score,
    part: Read,
    targets: int,
    climb: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    room: Room,
    tick: Callable[[int | None], None],
) -> Tensor:
    """Each image's and target's weights, `(n, t, c)`."""
    n, c, _ = part.values.shape
    device = part.values.device

    def found(rows: Rows) -> Tensor:
        u = torch.zeros(len(rows["image"]), c, dtype=wide(part.values.dtype), device=device)
        height = partial(_height, subject, runner, score, part, rows["image"], rows["target"])
        return torch.softmax(climb(slope_of(height), u), -1)

    def rows(index: Tensor) -> Rows:
        return {"image": torch.div(index, targets, rounding_mode="floor"), "target": index % targets}

    weights = in_chunks(Kernel(found, False), rows, torch.arange(n * targets, device=device), room, tick)
    if not _compat.transformed() and not bool(torch.isfinite(weights).all()):
        if not bool(torch.isfinite(part.values).all()):
            raise CamError(
                "the layer's output has NaN or infinite values: opti_cam has no mask of them; choose an earlier layer"
            )
        raise CamError("opti_cam came to scores that are not finite: a smaller rate=, or another target, may do")
    return weights.reshape(n, targets, c)


def _height(subject: Subject, runner: Runner, score: Score, part: Read, image: Tensor, target: Tensor, u: Tensor) -> Tensor:
    """What is climbed: the sum of the scores of images that are masked by their maps."""
    weights = torch.softmax(u, -1)[:, None]
    levels = maps.combine(weights, part.values.index_select(0, image))[:, 0]
    masks = vmap(partial(_mask, tuple(subject.image.shape[2:]), part))(levels)
    masked = subject.image.index_select(0, image) * masks[:, None].to(subject.image.dtype)
    scored = partial(_scores, subject, runner, score)
    scores = scored(image, masked) if runner.folded else vmap(lambda i, m: scored(i[None], m[None])[0])(image, masked)
    return scores.gather(1, target[:, None]).sum()


def _mask(size: tuple[int, ...], part: Read, level: Tensor) -> Tensor:
    return unit(maps.resize(level.unflatten(0, part.grid), size), 0.0, part.values.dtype)


def _scores(subject: Subject, runner: Runner, score: Score, image: Tensor, masked: Tensor) -> Tensor:
    with subject.model.inner() as own:
        if _compat.transformed():  # a model may write to tensors that it holds if they are as new as the innermost transform
            runner = runner._replace(shell=own.shell())
        output = runner.call(guarded=True)(runner.state, rows_of(subject.x, subject.place, image, masked))
        return score_rows(score.of, output, rows_at(score.rows, image))


def ascend(slope: Callable[[Tensor], Tensor], u: Tensor, steps: int, rate: float) -> Tensor:
    """So many steps of Adam (Kingma & Ba, 2014) from `u` up the slope, `torch.optim.Adam`'s but for its sign."""
    memory, squares, size = torch.zeros_like(u), torch.zeros_like(u), torch.ones_like(u)
    for step in range(1, steps + 1):
        g = slope(u)
        memory = _MEMORY * memory + (1 - _MEMORY) * g
        # In units of the largest slope so far, from 1 on: its square may have no number. What is far below 1 is as nothing
        # beside `_EPS`.
        before, size = size, torch.maximum(size, size_of(g[..., None], -1)[..., 0])
        squares = _SQUARES * squares * (before / size).square() + (1 - _SQUARES) * (g / size).square()
        mean = squares / (1 - _SQUARES**step)
        # The inner `where`: the root of zero, where a channel has no part, has no derivative.
        root = torch.where(mean > 0, torch.where(mean > 0, mean, 1).sqrt(), 0) * size
        u = u + rate / (1 - _MEMORY**step) * memory / (root + _EPS)
    return u
