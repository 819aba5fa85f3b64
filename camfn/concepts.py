"""What a layer's activation is made of: concepts, where they are, and what the model takes each of them for."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Inputs, Layer, Layout, Size, State, Target, wide
from camfn.formulas import factorization, maps
from camfn.formulas.scaling import magnitude
from camfn.methods._common import Drawing, Explained, checked_size, explain_layer
from camfn.model.capture import is_several, tap_from
from camfn.model.forward import without_graph
from camfn.model.inputs import rows_of
from camfn.model.prepare import prepares
from camfn.targets import rows_at, score_rows


class Concepts(NamedTuple):
    """What `factorize` returns, the concept with the largest part of the activation first."""

    maps: Float[Tensor, "n k *grid"]  # where each is; 1 where it is strongest in the batch
    vectors: Float[Tensor, "k c"]  # the activation that it adds there
    scores: Float[Tensor, "n k t"]  # what the model gives where the layer shows one concept, everywhere
    classes: Int[Tensor, "n t"] | None  # what the scores are of, where the target is of classes
    error: Float[Tensor, ""]  # how much of the activation is not in the concepts, as a share of its length
    layer: str


@prepares
def factorize(
    model: nn.Module,
    layer: Layer | None,
    x: Inputs,
    target: Target = "all",
    *,
    concepts: int = 5,
    steps: int = 200,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
) -> Concepts:
    """Deep feature factorization: the few things that a layer's activation is made of, in all images of a batch together.

    `A_np ~ sum_j M_jnp F_j` with `M, F >= 0`: at each position of each image a sum of concepts `F_j`, as much of each as its
    map says. The factors are found by `steps` sweeps of coordinate descent from where the singular vectors are; nothing is
    drawn. Of an activation that has values below zero only what is above takes part, which a warning says where it matters.

    **Arguments**: as those of `camfn.score_cam`, for one layer.

    - `target`: what is scored of each concept; every class by default.
    - `concepts`: how many. The more there are, the smaller the parts into which an object falls.

    **Returns** `camfn.Concepts`: `maps` `(n, k, *grid)`, of which each concept's largest value in the batch is 1; `vectors`
    `(k, c)`; `scores` `(n, k, t)`, of image n with the concept's vector at every position of the layer (on a pooled linear head
    that is the linear layer of the vector); `classes`, `error`, `layer`. The batch is one matrix: with other neighbours an
    image has other concepts. Under a transform concepts are differentiable in what the sweeps do, not in where they begin.

    **Raises** `CamError` where there are fewer channels, or positions in the batch, than concepts, or nothing is above zero.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> found = camfn.factorize(model, "1", torch.randn(2, 3, 8, 8), concepts=3)
    >>> found.maps.shape, found.vectors.shape, found.scores.shape
    (torch.Size([2, 3, 6, 6]), torch.Size([3, 4]), torch.Size([2, 3, 5]))
    >>> torch.allclose(found.scores[0], model[4](found.vectors), atol=1e-5)
    True

    Collins, Achanta and Suesstrunk, Deep Feature Factorization for Concept Discovery, ECCV 2018 (arXiv 1806.10206).
    """
    if is_several(layer):
        raise CamError("factorize takes one layer: found a sequence of them")
    with _compat.unnarrowed(), without_graph():
        seen = explain_layer(model, layer, x, target, state, Drawing(False, size, False, layout))
        forward, (part,) = seen.forward, seen.reads
        # In units of its size, so that no square leaves the range of the dtype.
        own = part.values.to(wide(part.values.dtype))
        scale = magnitude(own, (0, 1, 2))
        values = _above_zero(own / scale, concepts, forward.layers[0])
        left, right = factorization.factors(values, concepts, steps)
        peaks = right.amax(-1)
        found = (
            (right / torch.where(peaks > 0, peaks, 1)[:, None]).unflatten(-1, (len(part.values), *part.grid)).transpose(0, 1)
        )
        vectors = (left * peaks).mT * scale[0]
        sides = checked_size(size, forward.batch, len(part.grid))
        shown = found if sides is None else maps.resize(found, sides)
        error = (values - left @ right).norm() / values.norm()
        scores = torch.stack([_scores(seen, vectors, image) for image in range(len(part.values))])
        return Concepts(shown, vectors, scores, seen.score.classes, error, forward.layers[0])


def _above_zero(activation: Tensor, concepts: int, layer: str) -> Tensor:
    """`(c, n p)`, checked."""
    values = activation.transpose(0, 1).flatten(1)
    if isinstance(concepts, bool) or not isinstance(concepts, int) or not 0 < concepts <= min(values.shape):
        raise CamError(
            f"concepts={concepts!r} must be a number from 1 to {min(values.shape)}: layer {layer!r} has {values.shape[0]} "
            f"channels, and {values.shape[1]} positions in the batch"
        )
    above = torch.relu(values)
    if not _compat.transformed():
        all_, kept = (float(each.square().sum()) for each in (values, above))
        if not math.isfinite(all_):
            raise CamError(
                f"layer {layer!r} has NaN or infinite values, which have no factors: choose an earlier layer, or find "
                "the operation that makes them"
            )
        if not kept > 0:
            raise CamError(f"layer {layer!r} has nothing above zero: there is nothing to factorize; choose one behind a ReLU")
        if kept < 0.99 * all_:
            warn(
                f"{1 - kept / all_:.0%} of the activation's energy at layer {layer!r} is below zero and left out: concepts are "
                "what is above; a layer behind a ReLU has all of it there"
            )
    return above


def _scores(seen: Explained, vectors: Tensor, image: int) -> Tensor:
    """The target of one image with one concept in place of the layer's output, for each concept: `(k, t)`."""
    forward, (part,) = seen.forward, seen.reads
    numbers = torch.full((len(vectors),), image, device=vectors.device)
    values = vectors[..., None].expand(-1, -1, part.values.shape[-1]).to(part.values.dtype)
    inputs = rows_of(forward.batch.x, forward.companions, numbers, forward.image.index_select(0, numbers))
    run = tap_from(forward.task.model.shell(), forward.layers)
    output = run(forward.task.state, inputs, None, (part.restore(values, numbers),)).output
    return score_rows(seen.score.of, output, rows_at(seen.score.rows, numbers))
