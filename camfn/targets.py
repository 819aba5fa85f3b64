"""What is explained: from the model's output to one score, or several, per input.

Every kind of target is resolved, once, on the clean output, to a `Score`: a function of one sample's output and a row of
tensors. The function is the same for all rows of a sweep and the tensors are looked up by image, so that one compiled
kernel serves every target.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Target, wide

Scale = Literal["logit", "probability", "log_probability", "rest"]


class Score(NamedTuple):
    """`of(sample_output, row) -> (t,)`, and its row for every image."""

    of: "functools.partial[Tensor]"
    rows: Tensor  # (n, ...): class indices, or the number of the callable
    single: bool  # one map per image, without an axis of targets
    classes: Tensor | None  # (n, t), where the target is of classes
    is_logit: bool = False  # and is their plain logits


class OfClasses(NamedTuple):
    """A class, or several, on a scale."""

    classes: Any
    scale: Scale


class Top(NamedTuple):
    """The k classes with the highest logits."""

    k: int


class Contrast(NamedTuple):
    """A class against others."""

    classes: Any
    against: Any
    top: int
    alpha: float


def logit(c: Any = None) -> Target:
    """The model's raw output for class `c`, as `c` itself is in recipes of logits. `None` is the predicted class."""
    return OfClasses(c, "logit")


def probability(c: Any = None) -> Target:
    """`softmax(y)_c`."""
    return OfClasses(c, "probability")


def log_probability(c: Any = None) -> Target:
    """`log softmax(y)_c`."""
    return OfClasses(c, "log_probability")


def rest(c: Any = None) -> Target:
    """`y_c + log softmax(y)_c`: ShapleyCAM's ReST, which rises with the class and with its lead over the rest."""
    return OfClasses(c, "rest")


def top(k: int) -> Target:
    """The `k` classes with the highest logits on the clean input, best first: `(n, k, *grid)` maps from one sweep."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise CamError(f"targets.top wants a positive number of classes, found {k!r}")
    return Top(k)


def contrast(c: Any = None, against: Sequence[int] | None = None, *, top: int = 3, alpha: float = 1.0) -> Target:
    """`y_c - alpha * mean(y_d)` over the classes d of `against`, by default the `top` nearest to c in logit (Finer-CAM)."""
    return Contrast(c, against, top, alpha)


# ----------------------------------------------------------------------------------------------------- the output


def logits_of(output: Any) -> Tensor:
    """The logits in an output, of a batch or of one sample: itself, `.logits`, `["logits"]`, `["out"]`, or the first part."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
    elif isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    raise CamError(f"the model returns a {type(output).__name__} without logits in it; pass a callable target that reads it")


def score_rows(of: Callable[[Any, Tensor], Tensor], output: Any, rows: Tensor) -> Tensor:
    """The score of every sample of a batch output: `(b, t)`, float32 or wider."""
    if isinstance(output, list):  # one entry per sample, as detectors have it
        return torch.stack([of(sample, row) for sample, row in zip(output, rows)])
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        whole: Any = output
        parts = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return score_rows(lambda sample, row: of(dataclasses.replace(whole, **sample), row), parts, rows)
    axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, output)
    return vmap(of, in_dims=(axes, 0))(output, rows)


def _of_callable(function: Callable[[Any], Any], sample: Any, row: Tensor) -> Tensor:
    score = function(sample)
    if not isinstance(score, Tensor) or score.ndim > 1:
        found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise CamError(f"a target must return a scalar tensor or one of shape (t,) for one sample; found {found}")
    return score.reshape(-1).to(wide(score.dtype))


def _of_callables(functions: Sequence[Callable[[Any], Any]], sample: Any, row: Tensor) -> Tensor:
    # Each row wants one of them; all are cheap beside a forward, and computing all keeps one function for all rows.
    return torch.stack([_of_callable(function, sample, row) for function in functions]).index_select(0, row)[0]


def _of_classes(scale: Scale, sample: Any, row: Tensor) -> Tensor:
    y = logits_of(sample)
    y = y.to(wide(y.dtype))
    if scale == "probability":
        y = torch.softmax(y, -1)
    elif scale == "log_probability":
        y = torch.log_softmax(y, -1)
    elif scale == "rest":
        y = y + torch.log_softmax(y, -1)
    return y.index_select(0, row)


def _of_contrast(alpha: float, sample: Any, row: Tensor) -> Tensor:
    y = _of_classes("logit", sample, row)
    return y[:1] - alpha * y[1:].mean(0, keepdim=True)


# ----------------------------------------------------------------------------------------------------- resolution


def resolve(target: Target, output: Any, n: int, device: torch.device, scale: Scale = "logit") -> Score:
    """The score that `target` means for this clean output. `scale` is what a plain class stands for."""
    if isinstance(target, Contrast):
        _only_logits(target, scale)
        return _resolve_contrast(target, _class_logits(output, n))
    if callable(target) or _is_callables(target):
        _only_logits(target, scale)
        return _resolve_callables(target, output, n, device)
    if isinstance(target, OfClasses):
        if target.scale != "probability":
            _only_logits(target, scale)
        target, scale = target.classes, target.scale
    y = _class_logits(output, n)
    classes, single = _resolve_classes(target, y, n)
    return Score(functools.partial(_of_classes, scale), classes, single, classes, scale == "logit")


def _only_logits(target: Target, scale: Scale) -> None:
    if scale != "logit":
        raise CamError(
            f"this recipe scores by probabilities, and the target is {_named(target)}, which has none; "
            "pass classes, or another recipe"
        )


def _named(target: Target) -> str:
    if isinstance(target, OfClasses):
        return f"targets.{target.scale}"
    return "targets.contrast" if isinstance(target, Contrast) else "a callable" if callable(target) else "a list of callables"


def _class_logits(output: Any, n: int) -> Tensor:
    y = torch.stack([logits_of(sample) for sample in output]) if isinstance(output, list) else logits_of(output)
    if y.ndim != 2 or y.shape[0] != n:
        raise CamError(
            f"a class is asked for, and the model's output has shape {tuple(y.shape)}, not (n={n}, classes); "
            "pass a callable target from one sample's output to a scalar"
        )
    return y


def _resolve_classes(target: Target, y: Tensor, n: int) -> tuple[Tensor, bool]:
    count = y.shape[1]
    if target is None:
        return y.argmax(1, keepdim=True), True
    if isinstance(target, Top):
        if target.k > count:
            raise CamError(f"targets.top({target.k}) of a model with {count} classes: at most all of them")
        return y.topk(target.k, 1).indices, False
    if isinstance(target, str):
        if target != "all":
            raise CamError(f'target {target!r} is not known; the only word is "all", classes are numbers')
        return torch.arange(count, device=y.device).repeat(n, 1), False
    classes = _as_indices(target, n).to(y.device)
    if not _compat.transformed():
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= count:
            raise CamError(f"target {low if low < 0 else high} is not a class: the model has classes 0 to {count - 1}")
    return (classes, False) if classes.ndim == 2 else (classes.expand(n)[:, None].contiguous(), True)


def _as_indices(target: Any, n: int) -> Tensor:
    """An int, n ints, or a long tensor of shape `(n,)` or `(n, t)`."""
    if isinstance(target, Tensor):
        integral = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
        if not integral or target.ndim > 2:
            raise CamError(
                f"target must be an integer tensor of shape (n,) or (n, t); found {target.dtype} {tuple(target.shape)}"
            )
        classes = target.long()
    else:
        found = [_as_int(c) for c in target] if isinstance(target, Sequence) else _as_int(target)
        classes = torch.tensor(found, device="cpu")
    if classes.ndim and classes.numel() == 0 and classes.shape[0] == n:
        raise CamError(f"target has no class in it: shape {tuple(classes.shape)}")
    if classes.ndim and classes.shape[0] != n:
        raise CamError(f"target has {classes.shape[0]} entries for a batch of {n}: give one int for all, or one entry each")
    return classes


def _as_int(value: Any) -> int:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise CamError(
            f"target {value!r} is not a class: it must be None, an int, one int per sample, a long tensor, "
            '"all", a name of camfn.targets, or callables'
        ) from None


def _is_callables(target: Target) -> bool:
    return isinstance(target, (list, tuple)) and len(target) > 0 and any(callable(t) for t in target)


def _resolve_callables(target: Any, output: Any, n: int, device: torch.device) -> Score:
    functions = (target,) if callable(target) else tuple(target)
    if not all(callable(function) for function in functions):
        raise CamError("target mixes callables with something else; give one callable, or one for each sample")
    if callable(target):
        of, rows = functools.partial(_of_callable, target), torch.zeros(n, 1, dtype=torch.long, device=device)
    else:
        if len(functions) != n:
            raise CamError(f"target has {len(functions)} callables for a batch of {n}: give one for all, or one each")
        of, rows = functools.partial(_of_callables, functions), torch.arange(n, device=device)[:, None]
    shapes: list[bool] = []

    def probe(sample: Any, row: Tensor) -> Tensor:
        shapes.extend(getattr(function(sample), "ndim", 1) == 0 for function in functions)
        return of(sample, row)

    try:
        score_rows(probe, output, rows)
    except CamError:
        raise
    except Exception as error:
        raise CamError(
            f"the target failed on the model's output: {type(error).__name__}: {error} (it is called with ONE sample's "
            "output, without a batch axis, inside vmap: no .item(), no `if` on values)"
        ) from error
    return Score(of, rows, all(shapes), None)


def _resolve_contrast(target: Contrast, y: Tensor) -> Score:
    n, count = y.shape
    classes, single = _resolve_classes(target.classes, y, n)
    if not single:
        raise CamError("targets.contrast takes one class, or one per sample")
    if target.against is not None:
        if not isinstance(target.against, Sequence):
            raise CamError(f"against={target.against!r} must be a list of classes")
        others = torch.tensor([_as_int(c) for c in target.against], device=y.device)
        if not len(others) or int(others.min()) < 0 or int(others.max()) >= count:
            raise CamError(f"against={list(target.against)!r} must name classes from 0 to {count - 1}")
        others = others.expand(n, -1)
    else:
        if not 1 <= target.top < count:
            raise CamError(f"targets.contrast with top={target.top} of a model with {count} classes: 1 to {count - 1} others")
        away = (y - y.gather(1, classes)).abs().scatter(1, classes, torch.inf)
        others = away.topk(target.top, 1, largest=False).indices
    return Score(functools.partial(_of_contrast, target.alpha), torch.cat([classes, others], 1), True, classes)
