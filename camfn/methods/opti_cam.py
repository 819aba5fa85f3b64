"""Opti-CAM, which optimizes its weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, layer_called
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, masks, weights
from camfn.layouts import Read
from camfn.methods._common import Drawing, Explained, explained, weighed
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import Forward, check_differentiable, look, lost_at, lost_layers, without_graph
from camfn.model.gradients import gradient_of, recomputed, ungraphed
from camfn.model.graph_ends import Reason
from camfn.model.inputs import Key, rows_of
from camfn.sweep.kernel import Kernel, Rows
from camfn.sweep.options import Sweep, checked, counter
from camfn.sweep.runner import Room, Runner, chunk_of, runner_of
from camfn.sweep.scoring import in_chunks
from camfn.targets import rows_at, score_rows

_CHUNK = 8  # images at once: a backward pass needs many times the memory of a forward pass


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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Opti-CAM: optimize the channel weights so that the input masked with the map scores highest.

    `L(u) = sum_k softmax(u)_k A_k`, where u maximizes `s(x * norm(U(L(u))))`.

    U upsamples linearly to the input's size, and norm is min-max normalization. Adam starts from equal weights. Because the map
    is optimized for a high score, a high score is no evidence for it. The cost, for each image and target, is one forward and
    one backward pass through the whole model per step.

    50 steps at a rate of 0.1 are those of the authors' script. Their class uses 100 steps at 0.01. Their script also applies a
    ReLU to the activation first, and stops when a loss over all images rises. Neither is done here.

    **Arguments**

    - `steps`: the number of Adam's steps.
    - `rate`: Adam's learning rate.
    - `sweep`: a `camfn.Sweep`. Only chunk (images at once, 8 by default), memory, fold and progress have an effect.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. Maps are
    differentiable with respect to `x` and `state`, through all steps.

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
    with torch.inference_mode(False), without_graph(x, state):
        forward = _bare(look(model, layer, x, state, masked, axes, masks=True))
        check_differentiable(forward.task.private)
        found = explained(forward, target, Drawing(relu, size, normalize, layout, axes, combine))
        forwards = found.clean.numel() * steps * len(found.reads)
        runner, tick = runner_of(forward, found.score, options, forwards), counter(options.progress, forwards)
        room = Room(min(runner.room.chunk, chunk_of(forward, options, _CHUNK)), "images")
        climb = partial(weights.opti_cam, steps=steps, rate=rate)
        sites = [_Site(found, runner, part, name) for part, name in zip(found.reads, forward.layers)]
        outcome = weighed(found, [_weights(site, climb, room, partial(_tell, tick, steps)) for site in sites])
        tick(None)
        room.tell()
        return outcome._replace(forwards=outcome.forwards + forwards, backwards=forwards)


def _tell(tick: Callable[[int | None], None], steps: int, rows: int | None) -> None:
    """Advance the progress bar by `steps` forward passes for each finished row."""
    tick(None if rows is None else rows * steps)


class _Site(NamedTuple):
    """A layer whose channel weights are optimized."""

    found: Explained
    runner: Runner
    read: Read
    layer: str

    def moved(self, state: State, x: Inputs, values: Tensor, of: Any) -> "_Site":
        """The same layer with other tensors of the same values: the state, the inputs, the activation, the targets' rows."""
        forward, score = self.found.forward.moved(state, x), self.found.score._replace(rows=of)
        found = self.found._replace(forward=forward, score=score)
        return self._replace(found=found, runner=self.runner._replace(state=state), read=self.read._replace(values=values))


def _bare(forward: Forward) -> Forward:
    """Detach all tensors in a plain call, because each step builds its own graph."""
    if _compat.transformed() or forward.task.graphed:
        return forward
    task = forward.task
    x, state, activations = (tree_map(ungraphed, part) for part in (task.batch.x, task.state, forward.activations))
    return forward._replace(task=task._replace(state=state, batch=task.batch._replace(x=x)), activations=activations)


def _weights(site: _Site, climb: Callable[..., Tensor], room: Room, tick: Callable[[int | None], None]) -> Tensor:
    """The weights of each image and target, `(n, t, c)`."""
    values, targets, forward = site.read.values, site.found.clean.shape[1], site.found.forward
    n, c, _ = values.shape
    at_layer = lost_at(forward.task, len(set(forward.layers)) > 1, lambda name: f"the masks of {layer_called(name)}")

    def lost(names: Sequence[str], why: Callable[[str, str], Reason]) -> None:
        at_layer([site.layer], lambda _, what: why(names[0], what))

    def climbed(state: State, x: Inputs, values: Tensor, of: Any, rows: Rows) -> Tensor:
        u = torch.zeros(len(rows["image"]), c, dtype=wide(values.dtype), device=values.device)
        return climb(gradient_of(partial(_height, site.moved(state, x, values, of), rows), lost), u)

    def found(rows: Rows) -> Tensor:
        return recomputed(climbed, site.runner.state, forward.batch.x, values, site.found.score.rows, rows)

    def rows(index: Tensor) -> Rows:
        return {"image": torch.div(index, targets, rounding_mode="floor"), "target": index % targets}

    each = in_chunks(Kernel(found, False), rows, torch.arange(n * targets, device=values.device), room, tick)
    if not _compat.transformed() and not bool(torch.isfinite(each).all()):
        if not bool(torch.isfinite(values).all()):
            raise CamError(
                "the layer's output has NaN or infinite values: opti_cam cannot make masks of them; choose an earlier layer"
            )
        raise CamError("opti_cam came to scores that are not finite: try a smaller rate=, or another target")
    found_one = site.layer not in lost_layers(forward)
    return each.reshape(n, targets, c) if found_one else each.new_zeros(n, targets, c)


def _height(site: _Site, rows: Rows, u: Tensor) -> Tensor:
    """The objective that Adam maximizes: the sum of the scores of images masked with their maps."""
    found, runner, part, _ = site
    pixels, image = found.forward.image, rows["image"]
    levels = maps.combine(torch.softmax(u, -1)[:, None], part.values.index_select(0, image))[:, 0]
    size, dtype = tuple(pixels.shape[2:]), part.values.dtype
    each = vmap(lambda level: masks.opti_cam(level, part.grid, size, dtype))(levels)
    masked = pixels.index_select(0, image) * each[:, None].to(pixels.dtype)
    scored = partial(_scores, found, runner)
    scores = scored(image, masked) if runner.folded else vmap(lambda i, m: scored(i[None], m[None])[0])(image, masked)
    return scores.gather(1, rows["target"][:, None]).sum()


def _scores(found: Explained, runner: Runner, image: Tensor, masked: Tensor) -> Tensor:
    """The scores of masked images."""
    forward, score = found.forward, found.score
    with forward.task.model.inner() as own:
        if _compat.transformed():  # the model may write to its tensors only if they are made inside the innermost transform
            runner = runner._replace(private=own.borrow())
        output = runner.call(guarded=True)(runner.state, rows_of(forward.batch.x, forward.companions, image, masked))
        return score_rows(score.of, output, rows_at(score.rows, image))
