"""Targets for embedding models: the similarity to a given embedding."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Target, wide
from camfn.targets.algebra import Named
from camfn.targets.outputs import found_in, logits_of
from camfn.targets.scores import Clean, Kind, Score


@dataclasses.dataclass(frozen=True)
class Similarity(Named):
    """The cosine similarity of the output's embedding and a given one."""

    embedding: Tensor

    def resolve(self, clean: Clean) -> Score:
        """Check the embeddings. They are the rows, `(n, t, d)`."""
        clean.refuse_probabilities("targets.similarity")
        y = clean.tensor(embedding_of)
        if y.ndim < 2 or y.shape[0] != clean.n:
            raise CamError(f"targets.similarity wants embeddings (n={clean.n}, d), and the model's have shape {tuple(y.shape)}")
        given, single = _embeddings(self.embedding, clean.n, y[0].numel(), tuple(y.shape))
        rows = given.to(device=y.device, dtype=wide(y.dtype)).contiguous()
        return Score(Kind(embedding_of, _of_similarity, _names_of_similarity, (), clean.way), rows, single, None)


def similarity(embedding: Tensor) -> Target:
    """The cosine similarity of the model's embedding `y` and a given one `e`, such as that of a text or another image.

        <y, e> / (|y| |e|)

    The model's embedding is its output. In a structured output it is `image_embeds`, `image_features`, `pooler_output`,
    `embeddings` or `embedding`, or the first element.

    - `embedding`: a floating-point tensor. `(d,)` for all images, `(n, d)` for one per image, `(n, t, d)` for several per
      image.

    Raises `CamError` if it is no such tensor, or later if it is zero or not finite.

    >>> import camfn, torch
    >>> target = camfn.targets.similarity(torch.tensor([0.0, 2.0]))
    >>> output = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> score = camfn.targets.resolve(target, output, 2, output.device)
    >>> camfn.targets.score_rows(score.of, output, score.rows)
    tensor([[0.8000],
            [0.0000]])
    """
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point() or embedding.ndim not in (1, 2, 3):
        found = f"{embedding.dtype} {tuple(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding).__name__
        raise CamError(f"targets.similarity wants a floating-point tensor (d,), (n, d) or (n, t, d), found {found}")
    return Similarity(embedding)


# --------------------------------------------------------------------------------------------------- the embeddings


def embedding_of(output: Any) -> Tensor:
    """Return the embedding in the output of a batch or of one sample."""
    found = found_in(output, ("image_embeds", "image_features", "pooler_output", "embeddings", "embedding"))
    return logits_of(output) if found is None else found


def _embeddings(given: Tensor, n: int, d: int, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Return the embeddings `(n, t, d)`, and whether there is a single one per image."""
    if given.shape[-1] != d or (given.ndim > 1 and given.shape[0] != n) or not given.numel():
        raise CamError(
            f"targets.similarity to embeddings of shape {tuple(given.shape)}, where the model's have {shape}: "
            f"({d},) is one for all, ({n}, {d}) one per image, ({n}, t, {d}) several per image "
            "(texts.expand(n, -1, -1) compares all images with all texts)"
        )
    if not _compat.transformed() and not bool((torch.isfinite(given).all(-1) & given.any(-1)).all()):
        raise CamError("targets.similarity to an embedding that is zero or not finite: it has no direction")
    return given.expand(n, d)[:, None] if given.ndim == 1 else given[:, None] if given.ndim == 2 else given, given.ndim < 3


def _of_similarity(y: Tensor, row: Tensor) -> Tensor:
    return F.cosine_similarity(y.to(wide(y.dtype)).reshape(1, -1), row, dim=-1)


def _names_of_similarity(row: Tensor) -> list[str]:
    return [f"similarity to embedding {i}" for i in range(len(row))] if len(row) > 1 else ["similarity to the embedding"]
