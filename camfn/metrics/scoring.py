"""Score functions: from inputs to the scores of a target that is fixed on the original inputs. Metrics ask a model no more."""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Classes, Inputs, State, Target, wide
from camfn.methods._common import clean_scores
from camfn.model.forward import Forward, another_batch, first_nonfinite, look
from camfn.model.inputs import Key, rows_of
from camfn.model.prepare import Call, Prepared, prepare, restarted
from camfn.sweep.kernel import Kernel, Rows, Scorer, one_by_one, scored_images
from camfn.sweep.options import Sweep
from camfn.sweep.runner import Room, Runner, renewed, runner_of
from camfn.sweep.scoring import in_chunks
from camfn.targets import Score, resolve

Scores: TypeAlias = Callable[[Tensor], Tensor]
"""A function from inputs `(k * n, ...)` to scores `(k * n, t)`. Row j belongs to image j % n."""

_MANY = 1000  # inputs that a metric asks for: enough for a rewritten model to pay


def score_function(
    model: nn.Module | Prepared | Call,
    x: Inputs,
    target: Target = None,
    *,
    state: State | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    axes: str | None = None,
    masked: Key = None,
) -> "ScoreFunction":
    """The scores of a target, as a function of inputs.

    The function fixes the target on the original inputs `x`: the class `None` is the class predicted on x, and stays that class
    for all inputs. Metrics take this function, or any other with the same shapes.

    **Arguments**

    - `model`: a module, or a model prepared by `camfn.prepare`. A module is prepared here.
    - `x`: the inputs `(n, channels, *size)`, a tuple or a mapping of inputs, or a detector's list of images of one size.
    - `target`: as for `camfn.grad_cam`. An integer means the logit of the class. Most metrics of faithfulness want its
      probability: `camfn.targets.probability()`.
    - `state`: the parameters and buffers. `None` means the model's own.
    - `chunk_size`: inputs per forward pass, as `camfn.Sweep(chunk=...)`.
    - `axes`, `masked`: as for `camfn.score_cam`.

    **Returns** a `ScoreFunction`. Make another after the model is trained: a part of the state may have been copied.

    **Raises** `CamError` as `camfn.score_cam` does.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> score = camfn.metrics.score_function(model, x)
    >>> score(torch.cat([x, 0 * x])).shape
    torch.Size([4, 1])
    >>> torch.allclose(score(x), score.clean), torch.equal(score.classes[:, 0], model(x).argmax(1))
    (True, True)
    """
    if chunk_size != "auto" and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise CamError(f'chunk_size={chunk_size!r} must be "auto" or a positive int, inputs per forward')
    options = Sweep(chunk=None if chunk_size == "auto" else chunk_size, compile=False)
    prepared = model.prepared if isinstance(model, Call) else prepare(model)
    with torch.inference_mode(False), torch.no_grad(), Call(prepared) as own:

        def found() -> tuple[Forward, Score]:
            forward = look(own, None, x, state, masked, axes, masks=True, taps=False)
            another = partial(another_batch, forward)
            return forward, resolve(target, forward.output, forward.n, forward.image.device, "logit", another)

        forward, score = restarted(prepared, found)
        return ScoreFunction(prepared, forward, score, options)


class ScoreFunction:
    """A function from inputs to scores. Made by `camfn.metrics.score_function`.

    `score(inputs)` takes `(k * n, channels, *size)`, the n images in order, k times over, and returns `(k * n, t)`, in float32
    or wider. Row j belongs to image j % n: it has the target of this image, and its companion inputs. It is pure,
    deterministic, safe to share between threads, and runs in chunks. Scores have no graph.

    - `x`: the input with the pixels, `(n, channels, *size)`. It is what metrics take for x: of several inputs, they mask this
      one. Its axes have this order whatever the model's.
    - `clean` `(n, t)`: the scores of x.
    - `classes` `(n, t)`: the classes, or `None` if the target is not classes.
    - `single`: whether the target has no axis of its own, as a class for each image. Maps are then `(n, *grid)`.
    """

    def __init__(self, prepared: Prepared, forward: Forward, score: Score, options: Sweep) -> None:
        self._prepared, self._forward, self._score, self._options = prepared, forward, score, options
        self._runner: Runner | None = None  # how the model runs, once it is known; its copy is that of another call
        self.x: Float[Tensor, "n c *size"] = forward.image.detach()
        self.clean: Float[Tensor, "n t"] = clean_scores(forward, score)
        self.classes: Classes | None = score.classes
        self.single = score.single

    def __call__(self, inputs: Float[Tensor, "b c *size"]) -> Float[Tensor, "b t"]:
        """Return the scores of inputs."""
        shape, n = tuple(self.x.shape[1:]), len(self.x)
        if tuple(inputs.shape[1:]) != shape or len(inputs) % n or not len(inputs):
            raise CamError(
                f"inputs have shape {tuple(inputs.shape)}: the score function of x={tuple(self.x.shape)} takes (k * {n}, "
                f"{', '.join(map(str, shape))}), its images in order, k times over"
            )
        with torch.inference_mode(False), torch.no_grad(), Call(self._prepared) as own:
            return restarted(self._prepared, lambda: self._scores(own, inputs.to(self.x)))

    def whole(self, inputs: Float[Tensor, "b c *size"]) -> Inputs:
        """What the model takes for these inputs: in the order of its axes, with the companion inputs of their images."""
        return _inputs(self._forward, torch.arange(len(inputs), device=inputs.device) % len(self.x), inputs.to(self.x))

    def _scores(self, own: Call, inputs: Tensor) -> Tensor:
        forward = self._forward._replace(task=self._forward.task._replace(model=own))
        runner = self._renewed(forward)
        kernel, room = _kernel(forward, runner, self._score), Room(runner.room.chunk, "inputs")

        def rows(index: Tensor) -> Rows:
            return {"image": index % len(self.x), "input": inputs.index_select(0, index)}

        scores = in_chunks(kernel, rows, torch.arange(len(inputs), device=inputs.device), room, lambda used: None)
        room.tell()
        runner.room.chunk = room.chunk
        if not bool(torch.isfinite(scores).all()):
            bad = (~torch.isfinite(scores)).any(1).nonzero()[0]
            where = first_nonfinite(forward.task, _inputs(forward, **rows(bad)))
            raise CamError(f"the score of input {int(bad)} is not finite; {where}")
        return scores

    def _renewed(self, forward: Forward) -> Runner:
        """How the model runs. It is found in the first call, and each call has a copy of its own."""
        if self._runner is not None:
            return renewed(forward, self._runner)
        self._runner = runner_of(forward, self._score, self._options, _MANY)
        return self._runner


def _inputs(forward: Forward, image: Tensor, input: Tensor) -> Inputs:
    return rows_of(forward.batch.x, forward.companions, image, input)


def _kernel(forward: Forward, runner: Runner, score: Score) -> Kernel:
    def of(call: Callable[[State, Inputs], Any]) -> Callable[[Rows], Tensor]:
        scorer = Scorer(call, score.of, forward.companions)

        def folded(rows: Rows) -> Tensor:
            return scored_images(scorer, runner.state, forward.batch.x, score.rows, rows["image"], rows["input"])

        return folded if runner.folded else partial(one_by_one, score.of, folded)

    return Kernel(of(runner.call()), False, guarded=of(runner.call(guarded=True)))


# ------------------------------------------------------------------------------------------------ what metrics share

_PIXELS = 1 << 24  # of changed inputs that are made at once


def check_inputs(x: Tensor) -> None:
    """Raise `CamError` unless inputs can be masked, filled and disturbed: in integers all of these round."""
    if not x.is_floating_point():
        raise CamError(f"x is {x.dtype}: a metric that changes the inputs needs floating-point inputs (x.float())")


def real(maps: Tensor) -> Tensor:
    """Return the maps in float32 or wider, or raise `CamError` if they are complex."""
    if maps.is_complex():
        raise CamError(f"maps are {maps.dtype}: they must be real")
    return maps.to(wide(maps.dtype))


def is_count(value: object, least: int) -> bool:
    """Whether a value is an int, not a bool, of at least this size."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def numbers(name: str, values: Any, what: str) -> tuple[Any, ...]:
    """Return an argument that is a sequence of numbers as a tuple, or raise `CamError`."""
    given = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(given, Sequence) or not len(given) or not all(isinstance(each, Real) for each in given):
        raise CamError(f"{name}={values!r} must be a sequence of {what}")
    return tuple(int(each) if isinstance(each, Integral) and not isinstance(each, bool) else each for each in given)


def sides(grid: Any) -> tuple[int, ...]:
    """Return the size of a map as a tuple, or raise `CamError`."""
    found = numbers("grid", grid, "sides, as (7, 7)")
    if not all(is_count(side, 1) for side in found):
        raise CamError(f"grid={grid!r} must have sides that are ints of 1 or more")
    return found


def by_target(maps: Tensor, x: Tensor) -> Float[Tensor, "n t *grid"]:
    """Maps `(n, *grid)` or `(n, t, *grid)` of inputs `(n, channels, *size)` with an axis of targets, in float32 or wider."""
    check_inputs(x)
    if x.ndim < 3 or maps.ndim not in (x.ndim - 1, x.ndim) or len(maps) != len(x) or not maps.numel():
        raise CamError(
            f"maps have shape {tuple(maps.shape)} and x {tuple(x.shape)}: for x (n, channels, *size), maps are (n, *grid), or "
            "(n, targets, *grid)"
        )
    if not bool(torch.isfinite(maps).all()):
        raise CamError(f"maps have {int((~torch.isfinite(maps)).sum())} NaN or infinite values, which no metric can rank")
    found = real(maps.detach()).to(x.device)
    return found if maps.ndim == x.ndim else found[:, None]


def like(found: Float[Tensor, "n t *rest"], maps: Tensor, x: Tensor) -> Tensor:
    """Values for each map, without the axis of targets if the maps have none."""
    return found if maps.ndim == x.ndim else found[:, 0]


def scored(score: Scores, count: int, make: Callable[[Tensor], Tensor], x: Tensor, t: int) -> Float[Tensor, "n t k"]:
    """The scores of `count` changes of each input, for each of t targets.

    `make(numbers)` gives the inputs `(b, n, t, channels, *size)` of b changes by number, of which each target scores its own,
    or `(b, n, 1, channels, *size)`, which all targets share.
    """
    found, most = [], max(1, _PIXELS // (t * x.numel()))
    for numbers in torch.arange(count, device=x.device).split(most):
        inputs = make(numbers).transpose(1, 2)
        scores = score(inputs.flatten(0, 2))
        if scores.ndim != 2 or scores.shape[1] != t:
            raise CamError(
                f"the score has shape {tuple(scores.shape)} for {inputs.shape[:3].numel()} inputs, and maps have {t} "
                f"{'target' if t == 1 else 'targets'}: there must be one score for each target, (inputs, {t})"
            )
        each = scores.detach().to(wide(scores.dtype)).unflatten(0, inputs.shape[:3])  # (b, 1 or t, n, t)
        found.append(each[:, 0].permute(1, 2, 0) if each.shape[1] == 1 else each.diagonal(0, 1, 3).permute(1, 2, 0))
    return torch.cat(found, 2)


def clean_of(score: Scores, x: Tensor, t: int) -> Float[Tensor, "n t"]:
    """The scores of the inputs themselves."""
    return scored(score, 1, lambda numbers: x[None, :, None], x, t)[..., 0]
