"""Targets for classes and other numbered outputs: on a scale, the top k, a class against others."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Classes, Target, wide
from camfn.formulas.probabilities import log_probabilities, probabilities
from camfn.targets.algebra import Named
from camfn.targets.outputs import logits_of, other_targets, shown, similarities
from camfn.targets.scores import Clean, Kind, Scale, Score, read_logits


@dataclasses.dataclass(frozen=True)
class OfClasses(Named):
    """One or more classes on a scale. Without a scale, the recipe's scale is used."""

    classes: Any
    scale: Scale | None = None
    multi_label: bool = False  # whether the probability of a class is its sigmoid

    def resolve(self, clean: Clean) -> Score:
        """Find the classes. The rows are their indices `(n, t)`."""
        scale = self.scale or clean.scale
        if scale != "probability":
            clean.refuse_probabilities(f"targets.{scale}")
        classes, single = resolve_classes(self.classes, _class_logits(clean), clean.n)
        kind = Kind(read_logits, _of_classes, _names_of_classes, (scale, self.multi_label), clean.way)
        return Score(kind, classes, single, classes, linear=scale == "logit")

    def settled(self, clean: Clean) -> "OfClasses":
        """Fix the classes. The scale stays open if it was not given."""
        classes, single = resolve_classes(self.classes, _class_logits(clean), clean.n)
        return OfClasses(classes[:, 0] if single else classes, self.scale, self.multi_label)


@dataclasses.dataclass(frozen=True)
class Top(Named):
    """The k classes with the highest logits."""

    k: int

    def settled(self, clean: Clean) -> OfClasses:
        """Fix the k classes."""
        return OfClasses(self).settled(clean)

    def resolve(self, clean: Clean) -> Score:
        """Find the k classes, and score them on the recipe's scale."""
        return OfClasses(self).resolve(clean)


@dataclasses.dataclass(frozen=True)
class Contrast(Named):
    """The logit of a class minus the mean logit of others."""

    classes: Any
    against: Any
    top: int
    alpha: float

    def resolve(self, clean: Clean) -> Score:
        """Find the other classes. The rows are the class indices `(n, t, 1 + others)` and their weights."""
        clean.refuse_probabilities("targets.contrast")
        y = _class_logits(clean)
        classes, single = resolve_classes(self.classes, y, clean.n)
        others = _nearest(classes, y, self.top) if self.against is None else _others(self.against, classes, y)
        rows = _with_weights(classes, others, self.alpha, wide(y.dtype))
        return Score(Kind(read_logits, _of_contrast, _names_of_contrast, (), clean.way), rows, single, classes, linear=True)


@dataclasses.dataclass(frozen=True)
class Output(Named):
    """One or more plain outputs by number."""

    index: Any

    def resolve(self, clean: Clean) -> Score:
        """Find the outputs. The rows are their indices `(n, t)`."""
        clean.refuse_probabilities("targets.regression")
        _check_features(clean)
        y = clean.tensor(logits_of)
        if y.ndim not in (1, 2) or y.shape[0] != clean.n:
            raise CamError(
                f"targets.regression wants outputs (n={clean.n},) or (n={clean.n}, k), found {tuple(y.shape)}"
                f"{other_targets(clean.output) if y.ndim > 2 else ''}"
            )
        y = y.reshape(clean.n, -1)
        if self.index is None and y.shape[1] > 1:
            raise CamError(f'the model has {y.shape[1]} outputs: targets.regression(0) is the first, and "all" all of them')
        if isinstance(self.index, Named):
            raise CamError('targets.regression takes the number of an output, a number for each image, or "all"')
        index, single = resolve_classes(0 if self.index is None else self.index, y, clean.n, "an output", "outputs")
        kind = Kind(read_logits, _of_classes, _names_of_outputs, ("logit", False), clean.way)
        return Score(kind, index, single, index, linear=True)


def logit(c: Any = None) -> Target:
    """The logit `y_c` of class `c`: the model's raw output.

    - `c`: an int, n ints (one per image), n sequences of t ints, a long tensor `(n,)` or `(n, t)`, `"all"`, or `top(k)`.
      `None` is the predicted class. The same forms are accepted by `probability`, `log_probability`, `rest` and `contrast`.

    >>> import camfn, torch
    >>> y = torch.tensor([[1.0, 5.0, 3.0]])
    >>> score = camfn.targets.resolve(camfn.targets.logit([2]), y, 1, y.device)
    >>> camfn.targets.score_rows(score.of, y, score.rows)
    tensor([[3.]])
    """
    return OfClasses(c, "logit")


def probability(c: Any = None, *, multi_label: bool = False) -> Target:
    """The probability `softmax(y)_c` of class `c`. For `c`, see `logit`.

    The probability of a model's single logit is its sigmoid.

    - `multi_label`: whether the classes are independent labels, of which several may hold at once. The probability of each is
      then its sigmoid, `1 / (1 + exp(-y_c))`. `log_probability` and `rest` accept it too.

    >>> import camfn, torch
    >>> y = torch.tensor([[0.0, 5.0, 0.0]])
    >>> score = camfn.targets.resolve(camfn.targets.probability([2], multi_label=True), y, 1, y.device)
    >>> camfn.targets.score_rows(score.of, y, score.rows)
    tensor([[0.5000]])
    """
    return OfClasses(c, "probability", _checked(multi_label))


def log_probability(c: Any = None, *, multi_label: bool = False) -> Target:
    """The log-probability `log softmax(y)_c` of class `c`. For `c`, see `logit`; for `multi_label`, see `probability`."""
    return OfClasses(c, "log_probability", _checked(multi_label))


def rest(c: Any = None, *, multi_label: bool = False) -> Target:
    """ShapleyCAM's ReST score, `y_c + log softmax(y)_c`. For `c`, see `logit`; for `multi_label`, see `probability`.

    The score rises with the logit of the class and with its margin over the other classes. For a single logit and for
    independent labels, of which the paper does not speak, the second term is the logarithm of the sigmoid.

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261).
    """
    return OfClasses(c, "rest", _checked(multi_label))


def _checked(multi_label: Any) -> bool:
    if not isinstance(multi_label, bool):
        raise CamError(f"multi_label must be True or False, found {multi_label!r}")
    return multi_label


def top(k: int) -> Target:
    """The `k` classes with the highest logits on the clean input, best first.

    One sweep gives all maps, `(n, k, *grid)`. Raises `CamError` if `k` is not a positive int, or later if it exceeds the
    number of classes.

    >>> import camfn, torch
    >>> y = torch.tensor([[1.0, 5.0, 3.0]])
    >>> camfn.targets.resolve(camfn.targets.top(2), y, 1, y.device).classes
    tensor([[1, 2]])
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise CamError(f"targets.top wants a positive number of classes, found {k!r}")
    return Top(k)


def contrast(c: Any = None, against: Any = None, *, top: int = 3, alpha: float = 1.0) -> Target:
    """The logit of a class minus the mean logit of similar classes (Finer-CAM).

        y_c - alpha * mean_d(y_d),   d in `against`

    - `c`: the explained class; see `logit`.
    - `against`: ints, n sequences of ints (one per image), or a long tensor `(m,)` or `(n, m)`. Class `c` is removed from
      it. `None` takes the `top` classes whose logits on the clean input are nearest to that of `c`, for each `c`.
    - `alpha`: the weight of the mean.

    Raises `CamError` if `top` or `alpha` has the wrong type, or later if a class does not exist.

    Zhang et al., Finer-CAM, CVPR 2025 (arXiv 2501.11309). The paper's code weights the other classes by their probabilities,
    and differentiates through these. torchcam takes the mean with `alpha=0.6`.

    >>> import camfn, torch
    >>> y = torch.tensor([[1.0, 5.0, 3.0]])
    >>> score = camfn.targets.resolve(camfn.targets.contrast(top=1), y, 1, y.device)
    >>> camfn.targets.score_rows(score.of, y, score.rows)
    tensor([[2.]])
    """
    if not isinstance(top, int) or isinstance(top, bool) or not isinstance(alpha, (int, float)):
        raise CamError(f"targets.contrast wants a whole number of others and a number, found top={top!r} and alpha={alpha!r}")
    return Contrast(c, against, top, alpha)


def regression(index: Any = None) -> Target:
    """An output of a regression model, without a scale.

    - `index`: an int, n ints, a long tensor `(n,)` or `(n, t)`, or `"all"`. It may be `None` if the output is `(n,)` or
      `(n, 1)`.

    `-regression()` explains what lowers the value.

    >>> import camfn, torch
    >>> y = torch.tensor([[1.0, 5.0, 3.0]])
    >>> score = camfn.targets.resolve(-camfn.targets.regression(2), y, 1, y.device)
    >>> camfn.targets.score_rows(score.of, y, score.rows)
    tensor([[-3.]])
    """
    return Output(index)


# ---------------------------------------------------------------------------------------------------- which classes


def _class_logits(clean: Clean) -> Tensor:
    """Return the logits `(n, classes)`. A model with a single logit may return `(n,)`."""
    _check_features(clean)
    y = clean.tensor(logits_of)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or y.shape[0] != clean.n:
        raise CamError(
            f"the target is a class, and the model's output has shape {tuple(y.shape)}, not (n={clean.n}, classes)"
            f"{'' if isinstance(clean.output, Tensor) else f', in {shown(clean.output)}'}; "
            f"pass a callable target from one sample's output to a scalar{other_targets(clean.output)}"
        )
    return y


def _check_features(clean: Clean) -> None:
    """Refuse image features, text features and a scale that may as well be logits, other logits and a loss."""
    output = clean.output
    if not isinstance(output, (tuple, list)) or clean.way != "mapped" or similarities(output) is None:
        return
    if len(output[1]) != clean.n or clean.observed().remark:
        return
    reading = clean.observed().reading
    if isinstance(reading, tuple) and 1 in dict(reading):
        raise CamError(
            f"the output {shown(output)} may be (image features, text features, scale), with a text for each image, or "
            "(logits, other logits, loss): pass a callable target, such as lambda output: output[0][3]"
        )


def resolve_classes(target: Any, y: Tensor, n: int, a: str = "a class", many: str = "classes") -> tuple[Classes, bool]:
    """Return the columns of y that the target names, `(n, t)`, and whether it names a single one per image."""
    count = y.shape[1]
    if target is None:
        return y.argmax(1, keepdim=True), True
    if isinstance(target, Top):
        if target.k > count:
            raise CamError(f"targets.top({target.k}) of a model with {count} classes: k must be at most {count}")
        return y.topk(target.k, 1).indices, False
    if isinstance(target, str):
        if target != "all":
            raise CamError(f'target {target!r} is not known; classes are numbers, and the only string is "all"')
        return torch.arange(count, device=y.device).repeat(n, 1), False
    classes = _as_indices(target, n).to(y.device)
    if not _compat.transformed():
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= count:
            wrong = f"target {low if low < 0 else high} is not {a}: the model has"
            single = f"{wrong} a single one, number 0; targets.regression() explains an output that is not a class"
            raise CamError(f"{wrong} {many} 0 to {count - 1}" if count > 1 else single)
    return (classes, False) if classes.ndim == 2 else (classes.expand(n)[:, None].contiguous(), True)


def _as_indices(target: Any, n: int) -> Tensor:
    """Convert an int, n ints or an integer tensor of shape `(n,)` or `(n, t)` to a long tensor."""
    if isinstance(target, Tensor):
        integral = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
        if not integral or target.ndim > 2:
            raise CamError(
                f"target must be an integer tensor of shape (n,) or (n, t); found {target.dtype} {tuple(target.shape)}"
            )
        classes = target.long()
    else:
        classes = torch.tensor(_as_ints(target), device="cpu")
    if classes.ndim and classes.numel() == 0 and classes.shape[0] == n:
        raise CamError(f"target has no class in it: shape {tuple(classes.shape)}")
    if classes.ndim and classes.shape[0] != n:
        raise CamError(f"target has {classes.shape[0]} entries for a batch of {n}: give one int for all, or one entry each")
    return classes


def _as_ints(target: Any) -> Any:
    """Convert an int, a sequence of ints, or a sequence with as many ints for each image."""
    if not isinstance(target, Sequence) or isinstance(target, str):
        return _as_int(target)
    rows = [getattr(one, "tolist", lambda one=one: one)() for one in target]  # a row may be a tensor
    if not any(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
        return [_as_int(c) for c in rows]
    table = [[_as_int(c) for c in row] if isinstance(row, Sequence) else _as_int(row) for row in rows]
    counts = [len(row) if isinstance(row, list) else "no list" for row in table]
    if len(set(counts)) > 1:
        raise CamError(f"target {target!r} is ragged: a table needs as many classes for each image, and the rows have {counts}")
    return table


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
    """Return the `top` classes that are nearest in logit to each class, `(n, t, top)`."""
    if not 1 <= top < y.shape[1]:
        raise CamError(
            f"targets.contrast with top={top} of a model with {y.shape[1]} classes: top must be from 1 to {y.shape[1] - 1}"
        )
    away = (y[:, None] - y.gather(1, classes)[..., None]).abs().scatter(2, classes[..., None], torch.inf)
    return away.topk(top, 2, largest=False).indices


def _others(against: Any, classes: Classes, y: Tensor) -> Tensor:
    """Return the classes of `against`, `(n, t, m)`. The class itself and padding are -1."""
    n, count = y.shape
    others = _as_table(against, count).to(y.device)
    if others.ndim == 2 and len(others) != n:
        raise CamError(f"against= has {len(others)} entries for a batch of {n}: give classes for all, or a list for each image")
    others = others.expand(n, -1)[:, None].expand(-1, classes.shape[1], -1)
    others = torch.where(others == classes[..., None], -1, others)
    if not _compat.transformed() and bool((others < 0).all(-1).any()):
        raise CamError(f"against={against!r} names no class other than the explained one")
    return others


def _as_table(against: Any, count: int) -> Tensor:
    """Convert `against` to a long tensor `(m,)`, or `(n, m)` padded with -1."""
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


def _with_weights(classes: Classes, others: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the classes `(n, t, 1 + m)` and their weights: 1 for the class, `-alpha / count` for each of the others."""
    there = (others >= 0).to(dtype)
    count = there.sum(-1, keepdim=True)
    weights = torch.cat([torch.ones_like(count), -alpha * there / count.clamp(min=1)], -1)
    return torch.cat([classes[..., None], others.clamp(min=0)], -1), weights


# ---------------------------------------------------------------------------------------------- scores and their names


def _of_classes(scale: Scale, multi_label: bool, y: Tensor, row: Tensor) -> Tensor:
    y = y.reshape(-1).to(wide(y.dtype))  # the output of a regression, and a single logit, may be a scalar
    if scale == "probability":
        y = probabilities(y, multi_label)
    elif scale == "log_probability":
        y = log_probabilities(y, multi_label)
    elif scale == "rest":
        y = y + log_probabilities(y, multi_label)
    return y.index_select(0, row)


def _names_of_classes(scale: Scale, multi_label: bool, row: Tensor) -> list[str]:
    return [f"{'multi-label ' if multi_label else ''}{scale.replace('_', ' ')} {c}" for c in row.tolist()]


def _names_of_outputs(scale: Scale, multi_label: bool, row: Tensor) -> list[str]:
    return [f"output {index}" for index in row.tolist()]


def _of_contrast(y: Tensor, row: tuple[Tensor, Tensor]) -> Tensor:
    classes, weights = row
    y = y.reshape(-1).to(wide(y.dtype)).index_select(0, classes.reshape(-1)).reshape(classes.shape)
    return (y * weights).sum(-1)


def _names_of_contrast(row: tuple[Tensor, Tensor]) -> list[str]:
    named = []
    for (c, *others), (_, *weights) in zip(*(part.tolist() for part in row)):
        alpha = f"{-sum(weights):g} * "
        among = ", ".join(str(d) for d, weight in zip(others, weights) if weight != 0)
        named.append(f"logit {c} - {'' if alpha == '1 * ' else alpha}mean of {among}")
    return named
