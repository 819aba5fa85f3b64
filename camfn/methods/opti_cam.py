"""Methods whose weights are found by optimisation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, masks, weights
from camfn.layouts import Read
from camfn.methods._common import Drawing, Explained, explained, weighed
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import Forward, check_differentiable, look, without_graph
from camfn.model.gradients import gradient_of, ungraphed
from camfn.model.inputs import Key, rows_of
from camfn.sweep.kernel import Kernel, Rows
from camfn.sweep.options import Sweep, checked, counter
from camfn.sweep.runner import Room, Runner, chunk_of, runner_of
from camfn.sweep.scoring import in_chunks
from camfn.targets import rows_at, score_rows

_CHUNK = 8  # images at once: a gradient keeps many times what a forward pass holds


@method(weights.opti_cam, (Need.ACTIVATIONS, Need.GRADIENTS, Need.MASKED_INPUTS), Cost(51, backwards=50))
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
    options = checked(sweep)._replace(compile=False, dtype=None)
    with torch.inference_mode(False), without_graph():
        forward = _bare(look(model, layer, x, state, masked, masks=True))
        check_differentiable(forward.task.shell)
        found = explained(forward, target, Drawing(relu, size, normalize, layout, combine))
        forwards = found.clean.numel() * steps * len(found.reads)
        runner, tick = runner_of(forward, found.score, options, forwards), counter(options.progress, forwards)
        room = Room(min(runner.room.chunk, chunk_of(forward, options, _CHUNK)), "images")
        climb = partial(weights.opti_cam, steps=steps, rate=rate)
        sites = [_Site(found, runner, part) for part in found.reads]
        outcome = weighed(found, [_weights(site, climb, room, partial(_tell, tick, steps)) for site in sites])
        tick(None)
        room.tell()
        return outcome._replace(forwards=outcome.forwards + forwards, backwards=forwards)


def _tell(tick: Callable[[int | None], None], steps: int, rows: int | None) -> None:
    """Of every row its forwards."""
    tick(None if rows is None else rows * steps)


class _Site(NamedTuple):
    """A layer whose channels are weighed."""

    found: Explained
    runner: Runner
    read: Read


def _bare(forward: Forward) -> Forward:
    """In a plain call each step has a graph of its own: nothing else may belong to one, or forbid it."""
    if _compat.transformed():
        return forward
    task = forward.task
    x, state, activations = (tree_map(ungraphed, part) for part in (task.batch.x, task.state, forward.activations))
    return forward._replace(task=task._replace(state=state, batch=task.batch._replace(x=x)), activations=activations)


@_compat.eager
def _weights(site: _Site, climb: Callable[..., Tensor], room: Room, tick: Callable[[int | None], None]) -> Tensor:
    """The weights of each image and target, `(n, t, c)`."""
    values, targets = site.read.values, site.found.clean.shape[1]
    n, c, _ = values.shape

    def found(rows: Rows) -> Tensor:
        u = torch.zeros(len(rows["image"]), c, dtype=wide(values.dtype), device=values.device)
        return climb(gradient_of(partial(_height, site, rows)), u)

    def rows(index: Tensor) -> Rows:
        return {"image": torch.div(index, targets, rounding_mode="floor"), "target": index % targets}

    each = in_chunks(Kernel(found, False), rows, torch.arange(n * targets, device=values.device), room, tick)
    if not _compat.transformed() and not bool(torch.isfinite(each).all()):
        if not bool(torch.isfinite(values).all()):
            raise CamError(
                "the layer's output has NaN or infinite values: opti_cam has no mask of them; choose an earlier layer"
            )
        raise CamError("opti_cam came to scores that are not finite: a smaller rate=, or another target, may do")
    return each.reshape(n, targets, c)


def _height(site: _Site, rows: Rows, u: Tensor) -> Tensor:
    """What Adam maximizes: the sum of the scores of images that are masked by their maps."""
    (found, runner, part), pixels, image = site, site.found.forward.image, rows["image"]
    levels = maps.combine(torch.softmax(u, -1)[:, None], part.values.index_select(0, image))[:, 0]
    size, dtype = tuple(pixels.shape[2:]), part.values.dtype
    each = vmap(lambda level: masks.opti_cam(level, part.grid, size, dtype))(levels)
    masked = pixels.index_select(0, image) * each[:, None].to(pixels.dtype)
    scored = partial(_scores, found, runner)
    scores = scored(image, masked) if runner.folded else vmap(lambda i, m: scored(i[None], m[None])[0])(image, masked)
    return scores.gather(1, rows["target"][:, None]).sum()


def _scores(found: Explained, runner: Runner, image: Tensor, masked: Tensor) -> Tensor:
    forward, score = found.forward, found.score
    with forward.task.model.inner() as own:
        if _compat.transformed():  # a model may write to tensors that it holds if they are as new as the innermost transform
            runner = runner._replace(shell=own.shell())
        output = runner.call(guarded=True)(runner.state, rows_of(forward.batch.x, forward.companions, image, masked))
        return score_rows(score.of, output, rows_at(score.rows, image))
