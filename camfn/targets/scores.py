"""Scores: targets as pure functions of one sample's output and a row of tensors."""

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
    """The pure functions that compute a score from an output, and their static arguments.

    They are the same for all rows of a sweep. Everything that differs between images or calls is in the rows, so that one
    compiled kernel serves all targets of a kind.
    """

    read: Callable[..., Any]  # (*told, output) -> the tensors that are scored, of a batch (of a sample if outputs are lists)
    score: Callable[..., Tensor]  # (*told, those tensors of one sample, row) -> (t,), float32 or wider
    names: Callable[..., list[str]]  # (*told, row) -> t names, or a single name for all t
    told: tuple[Any, ...] = ()  # the static arguments


class Score(NamedTuple):
    """A target resolved on the clean output: the functions, and the tensors of each image."""

    of: Kind
    rows: Any  # a tensor (n, ...), or a nested tuple of them
    single: bool  # one map per image, without a target axis
    classes: Tensor | None  # (n, t), if the target is classes or numbered outputs
    linear: bool = False  # whether the score is a linear function of the logits


class Clean(NamedTuple):
    """The clean output that a target is resolved on."""

    output: Any
    n: int
    device: torch.device
    scale: Scale = "logit"  # the recipe's scale, for classes that name none

    def of(self, image: int) -> "Clean":
        """Return the clean output of one image."""
        return self._replace(output=_cut(self.output, image), n=1)

    def refuse_probabilities(self, target: str) -> None:
        """Raise CamError if the recipe scores by probabilities, for targets that have none."""
        if self.scale != "logit":
            raise CamError(
                f"this recipe scores by probabilities, and the target is {target}, which has none; "
                "pass classes, or another recipe"
            )


# ----------------------------------------------------------------------------------------------------- the output


def found_in(output: Any, keys: tuple[str, ...]) -> Tensor | None:
    """Return the tensor in an output: itself, the first of these keys or attributes, or that of its first element.

    Quantized tensors are dequantized.
    """
    if isinstance(output, Tensor):
        return output.dequantize() if _compat.is_quantized(output) else output
    for key in keys:
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return found_in(value, ())
    return found_in(output[0], keys) if isinstance(output, (tuple, list)) and output else None


def logits_of(output: Any) -> Tensor:
    """Return the logits of a batch or sample: the output itself, `logits`, `out`, `logits_per_image` or the first element."""
    found = found_in(output, ("logits", "out", "logits_per_image"))
    if found is None:
        raise CamError(
            f"the model returns a {type(output).__name__} without logits in it; pass a callable target that reads it"
        )
    return found


def read_logits(*told: Any) -> Tensor:
    """Return the logits of the last argument, the output. This is the `read` of a `Kind`."""
    return logits_of(told[-1])


def read_parts(parts: "tuple[Kind, ...]", output: Any) -> tuple[Any, ...]:
    """Return what each part of a composite kind reads from the output."""
    return tuple(part.read(*part.told, output) for part in parts)


def reads_logits(of: "Kind") -> bool:
    """Return True if the kind reads nothing but the logits."""
    return of.read is read_logits or (of.read is read_parts and all(map(reads_logits, of.told[0])))


def batch_of(read: Callable[[Any], Tensor], output: Any) -> Tensor:
    """Apply `read` to a batched output, or to each sample of a list and stack the results."""
    return torch.stack([read(sample) for sample in output]) if isinstance(output, list) else read(output)


def tensor_of(value: Any, what: str) -> Tensor:
    """Convert an argument to a tensor. Raise CamError if this fails."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CamError(f"{what} {value!r} cannot be made a tensor: {error}") from error


def is_record(output: Any) -> bool:
    """Return True for plain dataclasses, whose tensors torch's pytree functions do not see."""
    return dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping))


def fields_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _cut(output: Any, image: int) -> Any:
    """Return the output of one image as a batch of one."""
    if isinstance(output, list):
        return output[image : image + 1]
    if is_record(output):
        return type(output)(**_cut(fields_of(output), image))
    return tree_map(lambda leaf: leaf[image : image + 1] if isinstance(leaf, Tensor) else leaf, output)


# ----------------------------------------------------------------------------------------------------- the scores


def score_rows(of: Kind, output: Any, rows: Any) -> Tensor:
    """Return the scores of all samples of a batched output, `(b, t)`, in float32 or wider."""
    score = functools.partial(of.score, *of.told)
    if isinstance(output, list):  # one entry per sample, as in detectors: their shapes may differ
        each = enumerate(of.read(*of.told, sample) for sample in output)
        return torch.stack([score(found, tree_map(lambda leaf, i=i: leaf[i], rows)) for i, found in each])
    found = of.read(*of.told, output)
    return vmap(score, in_dims=(tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, found), 0))(found, rows)


def at_columns(score: Score, matrix: Float[Tensor, "k c"]) -> Weights:
    """Return a linear score of each column of a matrix, read as the logits of k classes: `(n, t, c)`."""
    of, told = score.of, score.of.told

    def of_image(row: Any) -> Tensor:
        return vmap(lambda y: of.score(*told, of.read(*told, y), row), out_dims=1)(matrix.T)

    return vmap(of_image)(score.rows)


def rows_at(rows: Any, image: Tensor) -> Any:
    """Return the rows of these images. Rows of a single image are expanded without a copy."""

    def at(leaf: Tensor) -> Tensor:
        return leaf.expand(len(image), *leaf.shape[1:]) if len(leaf) == 1 else leaf.index_select(0, image)

    return tree_map(at, rows)


def distinct(rows: Any) -> list[int]:
    """Return the index of the first image of each distinct row."""
    leaves = tree_flatten(rows)[0]
    if len(leaves[0]) == 1:
        return [0]
    each = torch.stack([leaf.flatten(1).unique(dim=0, return_inverse=True)[1] for leaf in leaves], 1)
    which = each.unique(dim=0, return_inverse=True)[1].tolist()
    return sorted({row: image for image, row in reversed(list(enumerate(which)))}.values())


def names(score: Score, count: int = 1) -> tuple[tuple[str, ...], ...]:
    """Return the names of the `count` scores of each image, such as `"logit 281"` or `"logit 281 - mean of 282, 285"`.

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
