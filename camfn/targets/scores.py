"""Scores: targets as pure functions of one sample's output and a row of tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from camfn._errors import CamError
from camfn._types import Weights
from camfn.targets.outputs import Entries, Observed, logits_of, of_image

Scale = Literal["logit", "probability", "log_probability", "rest"]


Way = Literal["mapped", "one by one", "entries"]
"""How a score is computed: mapped over the samples of a batch; one sample after the other; or from one entry of the output for
each image, as in detectors, whose shapes may differ."""


class Kind(NamedTuple):
    """The pure functions that compute a score from an output, and their static arguments.

    They are the same for all rows of a sweep. Everything that differs between images or calls is in the rows, so that one
    compiled kernel serves all targets of a kind.
    """

    read: Callable[..., Any]  # (*told, output) -> the tensors that are scored, of a batch (of a sample if the way is "entries")
    score: Callable[..., Tensor]  # (*told, those tensors of one sample, row) -> (t,), float32 or wider
    names: Callable[..., list[str]]  # (*told, row) -> t names, or a single name for all t
    told: tuple[Any, ...] = ()  # the static arguments
    way: Way = "mapped"


class Score(NamedTuple):
    """A target resolved on the clean output: the functions, and the tensors of each image."""

    of: Kind
    rows: Any  # a tensor (n, ...), or a nested tuple of them
    single: bool  # one map per image, without a target axis
    classes: Tensor | None  # (n, t), if the target is classes or numbered outputs
    linear: bool = False  # whether the score is a linear function of the logits
    remarks: tuple[str, ...] = ()  # what `explain` tells about the target


class Clean(NamedTuple):
    """The clean output that a target is resolved on."""

    output: Any
    n: int
    device: torch.device
    scale: Scale  # the recipe's scale, for classes that name none
    observed: Callable[[], Observed]  # which parts of the output belong to the images; found when it is first asked

    @property
    def way(self) -> Way:
        """How targets that read one tensor of the output are computed: a list may have one entry for each image."""
        return "entries" if isinstance(self.output, list) and self.observed().reading == "each" else "mapped"

    def tensor(self, read: Callable[[Any], Tensor]) -> Tensor:
        """Apply `read` to the output, or to the entry of each image, and stack the results."""
        return read(self.output) if self.way == "mapped" else torch.stack([read(sample) for sample in self.output])

    def of(self, image: int) -> "Clean":
        """Return the clean output of one image."""
        return self._replace(output=of_image(self.observed().reading, self.output, image), n=1)

    def refuse_probabilities(self, target: str) -> None:
        """Raise CamError if the recipe scores by probabilities, for targets that have none."""
        if self.scale != "logit":
            raise CamError(
                f"this recipe scores by probabilities, and the target is {target}, which has none; "
                "pass classes, or another recipe"
            )


# ----------------------------------------------------------------------------------------------------- the output


def read_logits(*told: Any) -> Tensor:
    """Return the logits of the last argument, the output. This is the `read` of a `Kind`."""
    return logits_of(told[-1])


def read_parts(parts: "tuple[Kind, ...]", output: Any) -> tuple[Any, ...]:
    """Return what each part of a composite kind reads from the output."""
    return tuple(part.read(*part.told, output) for part in parts)


def reads_logits(of: "Kind") -> bool:
    """Return True if the kind reads nothing but the logits."""
    return of.read is read_logits or (of.read is read_parts and all(map(reads_logits, of.told[0])))


def tensor_of(value: Any, what: str) -> Tensor:
    """Convert an argument to a tensor. Raise CamError if this fails."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CamError(f"{what} {value!r} cannot be made a tensor: {error}") from error


# ----------------------------------------------------------------------------------------------------- the scores


def score_rows(of: Kind, output: Any, rows: Any) -> Tensor:
    """Return the scores of all samples of a batched output, `(b, t)`, in float32 or wider."""
    score = functools.partial(of.score, *of.told)
    if of.way == "entries":
        samples = [of.read(*of.told, sample) for sample in output]
        return torch.stack([score(found, _at(rows, i)) for i, found in enumerate(samples)])
    found = of.read(*of.told, output)
    if of.way == "one by one":
        return torch.stack([score(_at(found, i), _at(rows, i)) for i in range(len(tree_flatten(rows)[0][0]))])
    return vmap(score, in_dims=(tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, found), 0))(found, rows)


def _at(batch: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, (Tensor, Entries)) else leaf, batch)


def way_of(kinds: Sequence[Kind]) -> Way:
    """Return the way of a kind that is made of others on the same output."""
    ways = {kind.way for kind in kinds}
    return "entries" if "entries" in ways else "one by one" if "one by one" in ways else "mapped"


def at_columns(score: Score, matrix: Float[Tensor, "k c"]) -> Weights:
    """Return a linear score of each column of a matrix, read as the logits of k classes: `(n, t, c)`."""
    of, told = score.of, score.of.told

    def of_image(row: Any) -> Tensor:
        return vmap(lambda y: of.score(*told, of.read(*told, y), row), out_dims=1)(matrix.T)

    return vmap(of_image)(score.rows)


def at_rows(score: Score, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n t"]:
    """Return a linear score of other logits, of one row for each image."""
    of, told = score.of, score.of.told
    rows = rows_at(score.rows, torch.arange(len(logits), device=logits.device))
    return vmap(lambda y, row: of.score(*told, of.read(*told, y), row))(logits, rows)


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
