"""Composite targets: weighted sums, one target per image, and user-defined functions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn._errors import CamError
from camfn._types import wide
from camfn.targets.outputs import Reading, Shared, has_entries, other_targets, rows_in, shown, with_rows
from camfn.targets.scores import Clean, Kind, Score, Way, read_parts, score_rows, way_of

Terms: TypeAlias = "tuple[tuple[float, Named], ...]"


class Named:
    """The base class of targets. Targets support `+`, `-`, and `*` and `/` by a number; the result is again a target.

    Each term is resolved on the clean output. The scores `(t,)` of the terms are then added, and broadcast: a term with one
    score can be added to a term with several. A term may be a callable: `targets.logit(3) - my_function`.

    >>> import camfn, torch
    >>> T = camfn.targets
    >>> target, y = (T.top(2) - T.logit(0)) / 2, torch.tensor([[1.0, 5.0, 3.0]])
    >>> score = T.resolve(target, y, 1, y.device)
    >>> T.score_rows(score.of, y, score.rows)
    tensor([[2., 1.]])
    """

    __array_ufunc__ = None  # so that a NumPy scalar times a target calls `__rmul__`

    def resolve(self, clean: Clean) -> Score:
        """Return the score of this target for a clean output."""
        raise NotImplementedError

    def settled(self, clean: Clean) -> "Named":
        """Return a target that gives the same score on every output as this one gives on the clean output."""
        return Settled(self.resolve(clean))

    def __add__(self, other: Any) -> "Sum":
        return Sum(_terms(self) + _terms(other))

    def __radd__(self, other: Any) -> "Named":
        is_start = isinstance(other, int) and other == 0  # `sum` starts from 0
        return self if is_start else Sum(_terms(other) + _terms(self))

    def __mul__(self, number: Any) -> "Sum":
        by = _number(number)
        return Sum(tuple((by * weight, term) for weight, term in _terms(self)))

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> "Sum":
        if _number(number) == 0:
            raise CamError("a target cannot be divided by 0")
        return self * (1 / _number(number))

    def __neg__(self) -> "Sum":
        return self * -1

    def __sub__(self, other: Any) -> "Sum":
        return self + -1 * Sum(_terms(other))

    def __rsub__(self, other: Any) -> "Sum":
        return Sum(_terms(other)) - self


def _terms(target: Any) -> Terms:
    if isinstance(target, Sum):
        return target.terms
    if not isinstance(target, Named) and not callable(target):
        raise CamError(
            f"{target!r} cannot be added to a target or subtracted from one: only targets (the score of class 3 is "
            "camfn.targets.logit(3)) and callables can"
        )
    return ((1.0, target if isinstance(target, Named) else Function(target)),)


def _number(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise CamError(f"a target times {value!r}: the weight must be a finite number; use a callable for anything else")
    return float(value)


# ---------------------------------------------------------------------------------------------------------- a sum


@dataclasses.dataclass(frozen=True)
class Sum(Named):
    """`sum_i weight_i * score_i`."""

    terms: Terms

    def resolve(self, clean: Clean) -> Score:
        """Resolve each term on the clean output. The rows hold the weights and the rows of the terms."""
        scores = [term.resolve(clean) for _, term in self.terms]
        found = [score_rows(score.of, clean.output, score.rows) for score in scores]
        counts = {values.shape[1] for values in found} - {1}
        if len(counts) > 1:
            raise CamError(
                f"targets with {' and '.join(map(str, sorted(counts)))} scores per image cannot be added: each must have one "
                "score, or as many as the others"
            )
        weights = torch.tensor([weight for weight, _ in self.terms], dtype=_widest(found), device=clean.device)
        parts = tuple(score.of for score in scores)
        kind = Kind(read_parts, _of_sum, _names_of_sum, (parts,), way_of(parts))
        rows = weights.repeat(clean.n, 1), tuple(score.rows for score in scores)
        classes = scores[0].classes if len(scores) == 1 else None
        return _joined(Score(kind, rows, True, classes), scores)


def _joined(score: Score, parts: Sequence[Score]) -> Score:
    """Return the score with what holds for all its parts, and the remarks on each of them."""
    single, linear = all(part.single for part in parts), all(part.linear for part in parts)
    remarks = dict.fromkeys(remark for part in parts for remark in part.remarks)
    return score._replace(single=single, linear=linear, remarks=tuple(remarks))


def _each(parts: tuple[Kind, ...], samples: tuple[Any, ...], rows: tuple[Any, ...]) -> list[Tensor]:
    return [part.score(*part.told, sample, row) for part, sample, row in zip(parts, samples, rows)]


def _widest(scores: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (score.dtype for score in scores))


def _of_sum(parts: tuple[Kind, ...], samples: tuple[Any, ...], row: tuple[Tensor, tuple[Any, ...]]) -> Tensor:
    weights, rows = row
    first, *others = (weight * score for weight, score in zip(weights.unbind(0), _each(parts, samples, rows)))
    for other in others:
        first = first + other
    return first


def _names_of_sum(parts: tuple[Kind, ...], row: tuple[Tensor, tuple[Any, ...]]) -> list[str]:
    weights, rows = row
    each = [part.names(*part.told, own) for part, own in zip(parts, rows)]
    count = max(map(len, each))
    return [_format_sum(weights.tolist(), [own[i if len(own) > 1 else 0] for own in each]) for i in range(count)]


def _format_sum(weights: list[float], terms: list[str]) -> str:
    text = ""
    for weight, term in zip(weights, terms):
        term = f"({term})" if " - " in term or " + " in term else term
        term = term if abs(weight) == 1 else f"{abs(weight):g} * {term}"
        sign = "-" if weight < 0 else "+"
        text = f"{text} {sign} {term}" if text else term if weight >= 0 else f"-{term}"
    return text


# ------------------------------------------------------------------------------------------------- one for each image


@dataclasses.dataclass(frozen=True)
class Each(Named):
    """One target per image. The kinds of the targets may differ."""

    targets: tuple[Named, ...]

    def resolve(self, clean: Clean) -> Score:
        """Resolve each target on the output of its image, and merge those of one kind. This adds no forward pass."""
        if len(self.targets) != clean.n:
            raise CamError(
                f"target has {len(self.targets)} entries for a batch of {clean.n}: give one target for all, or one each"
            )
        scores = [_resolve_for_image(target, clean, image) for image, target in enumerate(self.targets)]
        counts = [score_rows(score.of, clean.of(i).output, score.rows).shape[1] for i, score in enumerate(scores)]
        if len(set(counts)) > 1:
            raise CamError(f"the targets of the images have {counts} scores: all images must have the same number of scores")
        groups = _groups(scores)
        of, rows = scores[groups[0][0]].of, _rows_of(groups[0], scores)
        if len(groups) > 1:
            kinds = tuple(scores[group[0]].of for group in groups)
            which = [number for image in range(clean.n) for number, group in enumerate(groups) if image in group]
            of = Kind(read_parts, _of_choice, _names_of_choice, (kinds,), way_of(kinds))
            rows = torch.tensor(which, device=clean.device)[:, None], tuple(_rows_of(group, scores) for group in groups)
        classes = [score.classes for score in scores if score.classes is not None]
        every = torch.cat(classes) if len(classes) == clean.n else None
        return _joined(Score(of, rows, True, every), scores)

    def settled(self, clean: Clean) -> "Each":
        """Settle each target on the output of its image. Plain classes stay plain."""
        return Each(tuple(target.settled(clean.of(image)) for image, target in enumerate(self.targets)))


def _resolve_for_image(target: Named, clean: Clean, image: int) -> Score:
    try:
        return target.resolve(clean.of(image))
    except CamError as error:
        raise CamError(f"the target of image {image}: {error}") from error


def _groups(scores: list[Score]) -> list[list[int]]:
    """Group the images by kind, and by the shape and dtype of their rows."""
    shapes: list[Any] = []
    groups: list[list[int]] = []
    for image, score in enumerate(scores):
        leaves, tree = tree_flatten(score.rows)
        shape = score.of, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]
        if shape not in shapes:
            shapes.append(shape)
            groups.append([])
        groups[shapes.index(shape)].append(image)
    return groups


def _rows_of(group: list[int], scores: list[Score]) -> Any:
    """Return rows for all images. Images outside the group get the rows of its first image as padding."""
    filled = [tree_flatten(scores[image if image in group else group[0]].rows) for image in range(len(scores))]
    return tree_unflatten([torch.cat(leaves) for leaves in zip(*(leaves for leaves, _ in filled))], filled[0][1])


def _of_choice(parts: tuple[Kind, ...], samples: tuple[Any, ...], row: tuple[Tensor, tuple[Any, ...]]) -> Tensor:
    which, rows = row  # all kinds are computed and one is selected: cheap beside a forward pass, and one function for all rows
    each = _each(parts, samples, rows)
    return torch.stack([score.to(_widest(each)) for score in each]).index_select(0, which)[0]


def _names_of_choice(parts: tuple[Kind, ...], row: tuple[Tensor, tuple[Any, ...]]) -> list[str]:
    which, rows = row
    return parts[int(which)].names(*parts[int(which)].told, rows[int(which)])


# ------------------------------------------------------------------------------------- independent of later outputs


@dataclasses.dataclass(frozen=True)
class Settled(Named):
    """A target that was already resolved on a clean output."""

    score: Score

    def resolve(self, clean: Clean) -> Score:
        """Return the stored score, whatever the output."""
        clean.refuse_probabilities("a target settled on another input")
        return self.score


@dataclasses.dataclass(frozen=True)
class Function(Named):
    """A user-defined function from one sample's output to a scalar or a tensor `(t,)`."""

    function: Callable[[Any], Any]

    def resolve(self, clean: Clean) -> Score:
        """Call the function once on the clean output, to find out how it can be run, and the rank of its result.

        It is mapped over the samples, or run on one after the other where it cannot be mapped or a part of the output has one
        entry for each image.
        """
        clean.refuse_probabilities("a callable")
        reading, remark = clean.observed()
        if reading is None:
            raise CamError(
                "the target is a callable of one image's output, and no part of the output has a row for each of the "
                f"{clean.n} images: {shown(clean.output)}"
            )
        failed: list[Exception] = []
        for way in _ways(reading):
            try:
                score = self._tried(Kind(_whole, _of_function, _name_of_function, (self.function, reading), way), clean)
            except Exception as error:
                failed.append(error)
                if isinstance(error, CamError):
                    break
                continue
            said = [remark] * bool(remark) + [_one_by_one(self.function, error) for error in failed]
            return score._replace(remarks=tuple(said))
        raise _failed(failed, clean) from failed[-1]

    def _tried(self, kind: Kind, clean: Clean) -> Score:
        rows = torch.zeros(clean.n, 1, dtype=torch.long, device=clean.device)
        axes: list[int] = []

        def probe(sample: Any) -> Any:
            score = self.function(sample)
            axes.append(getattr(score, "ndim", 1))
            return score

        score_rows(kind._replace(told=(probe, *kind.told[1:])), clean.output, rows)
        return Score(kind, rows, not any(axes), None)


def _ways(reading: Reading) -> tuple[Way, ...]:
    """Return the ways in which a function of one image's output may be run, the fastest first."""
    return ("entries",) if reading == "each" else ("one by one",) if has_entries(reading) else ("mapped", "one by one")


def _failed(errors: list[Exception], clean: Clean) -> CamError:
    """Return the error about a function that could be run in no way."""
    seen = f"the output for {clean.n} images is {shown(clean.output)}{other_targets(clean.output)}"
    if isinstance(errors[0], CamError):
        return CamError(f"{errors[0]} ({seen})")
    each = "; image by image: ".join(dict.fromkeys(f"{_type_of(error)}{error}" for error in errors))
    return CamError(
        f"the target failed on the model's output: {each} (it is called with ONE sample's output, without a batch axis; {seen})"
    )


def _type_of(error: Exception) -> str:
    return "" if isinstance(error, CamError) else f"{type(error).__name__}: "


def _one_by_one(function: Callable[[Any], Any], error: Exception) -> str:
    (name,) = _name_of_function(function, None, None)
    return f"the target ({name}) is run image by image: vmap cannot map it over them ({type(error).__name__})"


def _whole(function: Callable[[Any], Any], reading: Reading, output: Any) -> tuple[list[Any], Shared]:
    """Return the rows of the output, and the output around them. The entry of an image has no rows: it is handed whole."""
    return ([], Shared(output)) if reading == "each" else (rows_in(reading, output), Shared(output))


def _of_function(function: Callable[[Any], Any], reading: Reading, sample: tuple[list[Any], Shared], row: Tensor) -> Tensor:
    own, around = sample
    score = function(around.value if reading == "each" else with_rows(reading, around.value, iter(own)))
    if not isinstance(score, Tensor) or score.ndim > 1:
        found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise CamError(f"a target must return a scalar tensor or one of shape (t,) for one sample; found {found}")
    return score.reshape(-1).to(wide(score.dtype))


def _name_of_function(function: Callable[[Any], Any], reading: Reading, row: Any) -> list[str]:
    name = getattr(function, "__name__", type(function).__name__)
    return ["a callable" if name == "<lambda>" else name]
