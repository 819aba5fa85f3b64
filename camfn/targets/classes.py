"""Targets that are classes, or other numbered outputs: on a scale, the best ones, one against others."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Classes, Target, wide
from camfn.targets.algebra import Named
from camfn.targets.scores import Clean, Kind, Scale, Score, batch_of, logits_of, read_logits


@dataclasses.dataclass(frozen=True)
class OfClasses(Named):
    """A class, or several, on a scale; without one, on the recipe's."""

    classes: Any
    scale: Scale | None = None

    def resolve(self, clean: Clean) -> Score:
        """Indices are the rows."""
        scale = self.scale or clean.scale
        if scale != "probability":
            clean.refuse_probabilities(f"targets.{scale}")
        classes, single = resolve_classes(self.classes, _class_logits(clean), clean.n)
        kind = Kind(read_logits, _of_classes, _names_of_classes, (scale,))
        return Score(kind, classes, single, classes, linear=scale == "logit")

    def settled(self, clean: Clean) -> "OfClasses":
        """The classes as they are found; what one stands for is still the recipe's, where that was so."""
        classes, single = resolve_classes(self.classes, _class_logits(clean), clean.n)
        return OfClasses(classes[:, 0] if single else classes, self.scale)


@dataclasses.dataclass(frozen=True)
class Top(Named):
    """The k classes with the highest logits."""

    k: int

    def settled(self, clean: Clean) -> OfClasses:
        """The classes as they are found."""
        return OfClasses(self).settled(clean)

    def resolve(self, clean: Clean) -> Score:
        """The classes, on the recipe's scale."""
        return OfClasses(self).resolve(clean)


@dataclasses.dataclass(frozen=True)
class Contrast(Named):
    """A class against others."""

    classes: Any
    against: Any
    top: int
    alpha: float

    def resolve(self, clean: Clean) -> Score:
        """The class and the others are the rows, `(n, t, 1 + others)`, and what each counts."""
        clean.refuse_probabilities("targets.contrast")
        y = _class_logits(clean)
        classes, single = resolve_classes(self.classes, y, clean.n)
        others = _nearest(classes, y, self.top) if self.against is None else _others(self.against, classes, y)
        rows = _weighed(classes, others, self.alpha, wide(y.dtype))
        return Score(Kind(read_logits, _of_contrast, _names_of_contrast), rows, single, classes, linear=True)


@dataclasses.dataclass(frozen=True)
class Output(Named):
    """A plain output, or several, by number."""

    index: Any

    def resolve(self, clean: Clean) -> Score:
        """As classes are, but that there is no predicted one."""
        clean.refuse_probabilities("targets.regression")
        y = batch_of(logits_of, clean.output)
        if y.ndim not in (1, 2) or y.shape[0] != clean.n:
            raise CamError(f"targets.regression wants outputs (n={clean.n},) or (n={clean.n}, k), found {tuple(y.shape)}")
        y = y.reshape(clean.n, -1)
        if self.index is None and y.shape[1] > 1:
            raise CamError(f'the model has {y.shape[1]} outputs: targets.regression(0) is the first, and "all" all of them')
        if isinstance(self.index, Named):
            raise CamError('targets.regression takes the number of an output, a number for each image, or "all"')
        index, single = resolve_classes(0 if self.index is None else self.index, y, clean.n, "an output", "outputs")
        return Score(Kind(read_logits, _of_classes, _names_of_outputs, ("logit",)), index, single, index, linear=True)


def logit(c: Any = None) -> Target:
    """The model's raw output for class `c`, as `c` itself is in recipes of logits. `None` is the predicted class.

    Here and below `c` may be an int, n ints (one for each image), a long tensor `(n,)` or `(n, t)`, `"all"`, or `top(k)`.
    """
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


def contrast(c: Any = None, against: Any = None, *, top: int = 3, alpha: float = 1.0) -> Target:
    """`y_c - alpha * mean(y_d)` over the classes d of `against`, by default the `top` nearest to c in logit (Finer-CAM).

    `against`: ints; n sequences of ints, one for each image; or a long tensor `(m,)` or `(n, m)`. The class itself is left out
    of them. For several classes c, each has its own nearest ones. Near is told on the clean input.

    Zhang et al., Finer-CAM, CVPR 2025 (arXiv 2501.11309). Theirs weighs the others by their probabilities, and differentiates
    through these; torchcam's is the mean with `alpha=0.6`.
    """
    if not isinstance(top, int) or isinstance(top, bool) or not isinstance(alpha, (int, float)):
        raise CamError(f"targets.contrast wants a whole number of others and a number, found top={top!r} and alpha={alpha!r}")
    return Contrast(c, against, top, alpha)


def regression(index: Any = None) -> Target:
    """The plain output of a regression model, `(n,)` or `(n, 1)`; or, of `(n, k)`, the one with this number.

    `index`: an int, n ints, a long tensor `(n,)` or `(n, t)`, or `"all"`. `-regression()` explains what lowers the value.
    """
    return Output(index)


# ---------------------------------------------------------------------------------------------------- which classes


def _class_logits(clean: Clean) -> Tensor:
    y = batch_of(logits_of, clean.output)
    if y.ndim != 2 or y.shape[0] != clean.n:
        raise CamError(
            f"a class is asked for, and the model's output has shape {tuple(y.shape)}, not (n={clean.n}, classes); "
            "pass a callable target from one sample's output to a scalar"
        )
    return y


def resolve_classes(target: Any, y: Tensor, n: int, a: str = "a class", many: str = "classes") -> tuple[Classes, bool]:
    """Which of the columns of y: `(n, t)`; and whether that is one for each image."""
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
            raise CamError(f"target {low if low < 0 else high} is not {a}: the model has {many} 0 to {count - 1}")
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


# -------------------------------------------------------------------------------------------------- against which


def _nearest(classes: Classes, y: Tensor, top: int) -> Tensor:
    """The `top` classes nearest in logit to each, `(n, t, top)`."""
    if not 1 <= top < y.shape[1]:
        raise CamError(f"targets.contrast with top={top} of a model with {y.shape[1]} classes: 1 to {y.shape[1] - 1} others")
    away = (y[:, None] - y.gather(1, classes)[..., None]).abs().scatter(2, classes[..., None], torch.inf)
    return away.topk(top, 2, largest=False).indices


def _others(against: Any, classes: Classes, y: Tensor) -> Tensor:
    """The classes that the caller names, `(n, t, m)`; -1 stands for the class itself, and where an image names fewer."""
    n, count = y.shape
    others = _as_table(against, count).to(y.device)
    if others.ndim == 2 and len(others) != n:
        raise CamError(f"against= has {len(others)} entries for a batch of {n}: give classes for all, or a list for each image")
    others = others.expand(n, -1)[:, None].expand(-1, classes.shape[1], -1)
    others = torch.where(others == classes[..., None], -1, others)
    if not _compat.transformed() and bool((others < 0).all(-1).any()):
        raise CamError(f"against={against!r} names no class but the one that is explained")
    return others


def _as_table(against: Any, count: int) -> Tensor:
    """`(m,)`, or `(n, m)` with -1 where an image names fewer than another."""
    wrong = f"against={against!r} must name classes from 0 to {count - 1}: a list, one list for each image, or a long tensor"
    if isinstance(against, Tensor):
        integral = not against.is_floating_point() and not against.is_complex() and against.dtype != torch.bool
        if not integral or against.ndim not in (1, 2) or not against.numel():
            raise CamError(f"{wrong}; found {against.dtype} {tuple(against.shape)}")
        if not _compat.transformed() and bool(((against < 0) | (against >= count)).any()):
            raise CamError(wrong)
        return against.long()
    if not isinstance(against, Sequence) or isinstance(against, str):
        raise CamError(wrong)
    several = any(isinstance(one, Sequence) for one in against)
    lists = [[_as_int(c) for c in one] for one in (against if several else [against])]
    if not lists or not all(lists) or any(not 0 <= c < count for one in lists for c in one):
        raise CamError(wrong)
    table = torch.tensor([one + [-1] * (max(map(len, lists)) - len(one)) for one in lists], device="cpu")
    return table if several else table[0]


def _weighed(classes: Classes, others: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The classes and the others, `(n, t, 1 + m)`, and their weights: 1, and `-alpha` shared by those that are there."""
    there = (others >= 0).to(dtype)
    count = there.sum(-1, keepdim=True)
    weights = torch.cat([torch.ones_like(count), -alpha * there / count.clamp(min=1)], -1)
    return torch.cat([classes[..., None], others.clamp(min=0)], -1), weights


# ---------------------------------------------------------------------------------------------- scores and their names


def _of_classes(scale: Scale, y: Tensor, row: Tensor) -> Tensor:
    y = y.reshape(-1).to(wide(y.dtype))  # of a regression it may have no axis
    if scale == "probability":
        y = torch.softmax(y, -1)
    elif scale == "log_probability":
        y = torch.log_softmax(y, -1)
    elif scale == "rest":
        y = y + torch.log_softmax(y, -1)
    return y.index_select(0, row)


def _names_of_classes(scale: Scale, row: Tensor) -> list[str]:
    return [f"{scale.replace('_', ' ')} {c}" for c in row.tolist()]


def _names_of_outputs(scale: Scale, row: Tensor) -> list[str]:
    return [f"output {index}" for index in row.tolist()]


def _of_contrast(y: Tensor, row: tuple[Tensor, Tensor]) -> Tensor:
    classes, weights = row
    y = y.to(wide(y.dtype)).index_select(0, classes.reshape(-1)).reshape(classes.shape)
    return (y * weights).sum(-1)


def _names_of_contrast(row: tuple[Tensor, Tensor]) -> list[str]:
    named = []
    for (c, *others), (_, *weights) in zip(*(part.tolist() for part in row)):
        alpha = f"{-sum(weights):g} * "
        among = ", ".join(str(d) for d, weight in zip(others, weights) if weight != 0)
        named.append(f"logit {c} - {'' if alpha == '1 * ' else alpha}mean of {among}")
    return named
