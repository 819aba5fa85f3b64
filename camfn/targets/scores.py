"""What every kind of target becomes: pure functions of one sample's output and a row of tensors, and each image's row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Weights

Scale = Literal["logit", "probability", "log_probability", "rest"]


class Kind(NamedTuple):
    """How a score comes out of an output: pure functions, the same for all rows of a sweep, and what they are told first.

    Whatever differs between images, or between two calls, is in the rows: a kernel is compiled for the kind.
    """

    read: Callable[..., Any]  # (*told, output) -> the tensors that count, of a batch; of one sample, where outputs are lists
    score: Callable[..., Tensor]  # (*told, those tensors of one sample, row) -> (t,), float32 or wider
    names: Callable[..., list[str]]  # (*told, row) -> t names, or one for however many there are
    told: tuple[Any, ...] = ()


class Score(NamedTuple):
    """A target, resolved on the clean output: what is computed of a sample, and with which tensors for each image."""

    of: Kind
    rows: Any  # a tensor (n, ...), or a tuple of such
    single: bool  # one map per image, without an axis of targets
    classes: Tensor | None  # (n, t), where the target is of classes (or of outputs by number)
    linear: bool = False  # a linear function of the logits


class Clean(NamedTuple):
    """What a target is resolved on."""

    output: Any
    n: int
    device: torch.device
    scale: Scale = "logit"  # what a plain class stands for: the recipe's

    def of(self, image: int) -> "Clean":
        """That of one image."""
        return self._replace(output=_cut(self.output, image), n=1)

    def refuse_probabilities(self, target: str) -> None:
        """For targets that are no probability, in a recipe that scores by them."""
        if self.scale != "logit":
            raise CamError(
                f"this recipe scores by probabilities, and the target is {target}, which has none; "
                "pass classes, or another recipe"
            )


# ----------------------------------------------------------------------------------------------------- the output


def found_in(output: Any, keys: tuple[str, ...]) -> Tensor | None:
    """The tensor of an output: itself, what is under the first of these keys or attributes, or that of its first part.

    Of a quantised one, the floats that it stands for.
    """
    if isinstance(output, Tensor):
        return output.dequantize() if _compat.is_quantised(output) else output
    for key in keys:
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return found_in(value, ())
    return found_in(output[0], keys) if isinstance(output, (tuple, list)) and output else None


def logits_of(output: Any) -> Tensor:
    """The logits in an output, of a batch or of one sample: itself, `logits`, `out`, `logits_per_image`, or the first part."""
    found = found_in(output, ("logits", "out", "logits_per_image"))
    if found is None:
        raise CamError(
            f"the model returns a {type(output).__name__} without logits in it; pass a callable target that reads it"
        )
    return found


def read_logits(*told: Any) -> Tensor:
    """As a kind reads them: the last argument is the output."""
    return logits_of(told[-1])


def read_parts(parts: "tuple[Kind, ...]", output: Any) -> tuple[Any, ...]:
    """For a kind that is made of others: what each of them reads."""
    return tuple(part.read(*part.told, output) for part in parts)


def reads_logits(of: "Kind") -> bool:
    """Whether nothing but the logits of an output counts."""
    return of.read is read_logits or (of.read is read_parts and all(map(reads_logits, of.told[0])))


def batch_of(read: Callable[[Any], Tensor], output: Any) -> Tensor:
    """What `read` finds for all samples, where the output is a list of theirs too."""
    return torch.stack([read(sample) for sample in output]) if isinstance(output, list) else read(output)


def tensor_of(value: Any, what: str) -> Tensor:
    """What the caller gave, as a tensor."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CamError(f"{what} {value!r} cannot be made a tensor: {error}") from error


def is_record(output: Any) -> bool:
    """A plain dataclass, whose tensors torch's tree functions do not see."""
    return dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping))


def fields_of(record: Any) -> dict[str, Any]:
    """By name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _cut(output: Any, image: int) -> Any:
    """An output for one image alone, still a batch."""
    if isinstance(output, list):
        return output[image : image + 1]
    if is_record(output):
        return type(output)(**_cut(fields_of(output), image))
    return tree_map(lambda leaf: leaf[image : image + 1] if isinstance(leaf, Tensor) else leaf, output)


# ----------------------------------------------------------------------------------------------------- the scores


def score_rows(of: Kind, output: Any, rows: Any) -> Tensor:
    """The score of every sample of a batch output: `(b, t)`, float32 or wider."""
    score = functools.partial(of.score, *of.told)
    if isinstance(output, list):  # one entry per sample, as detectors have it: no two need be alike
        each = enumerate(of.read(*of.told, sample) for sample in output)
        return torch.stack([score(found, tree_map(lambda leaf, i=i: leaf[i], rows)) for i, found in each])
    found = of.read(*of.told, output)
    return vmap(score, in_dims=(tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, found), 0))(found, rows)


def at_columns(score: Score, matrix: Float[Tensor, "k c"]) -> Weights:
    """A linear score of each column of a matrix, as if that were the logits of k classes: `(n, t, c)`."""
    of, told = score.of, score.of.told

    def of_image(row: Any) -> Tensor:
        return vmap(lambda y: of.score(*told, of.read(*told, y), row), out_dims=1)(matrix.T)

    return vmap(of_image)(score.rows)


def rows_at(rows: Any, image: Tensor) -> Any:
    """The rows of these images; of a single image no row is copied."""

    def at(leaf: Tensor) -> Tensor:
        return leaf.expand(len(image), *leaf.shape[1:]) if len(leaf) == 1 else leaf.index_select(0, image)

    return tree_map(at, rows)


def distinct(rows: Any) -> list[int]:
    """An image for each row that differs from those before it."""
    leaves = tree_flatten(rows)[0]
    if len(leaves[0]) == 1:
        return [0]
    each = torch.stack([leaf.flatten(1).unique(dim=0, return_inverse=True)[1] for leaf in leaves], 1)
    which = each.unique(dim=0, return_inverse=True)[1].tolist()
    return sorted({row: image for image, row in reversed(list(enumerate(which)))}.values())


def names(score: Score, count: int = 1) -> tuple[tuple[str, ...], ...]:
    """What each of an image's `count` scores is, for all images: `"logit 281"`, `"logit 281 - mean of 282, 285"`.

    >>> import camfn, torch
    >>> target = camfn.targets.logit(3) - 0.5 * camfn.targets.probability([1, 0])
    >>> camfn.targets.names(camfn.targets.resolve(target, torch.randn(2, 5), 2, torch.device("cpu")))
    (('logit 3 - 0.5 * probability 1',), ('logit 3 - 0.5 * probability 0',))
    """
    rows = tree_map(lambda leaf: leaf.detach().cpu(), score.rows)
    images = range(len(tree_flatten(rows)[0][0]))
    each = [score.of.names(*score.of.told, tree_map(lambda leaf, i=i: leaf[i], rows)) for i in images]
    return tuple(
        tuple(found if len(found) > 1 or count == 1 else [f"{found[0]} [{i}]" for i in range(count)]) for found in each
    )
