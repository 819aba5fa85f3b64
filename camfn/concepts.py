"""Deep feature factorization: the concepts in a layer's activation, with their maps and scores."""

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
    """The result of `factorize`. The concept with the largest share of the activation is first."""

    maps: Float[Tensor, "n k *grid"]  # the strength of each concept, with maximum 1 over the batch
    vectors: Float[Tensor, "k c"]  # the activation of each concept at strength 1
    scores: Float[Tensor, "n k t"]  # the scores of the model if the layer shows one concept at all positions
    classes: Int[Tensor, "n t"] | None  # the classes that are scored, if the target is classes
    error: Float[Tensor, ""]  # the relative error |A - M F| / |A|, for the positive part A
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
) -> Concepts:
    """Deep feature factorization: split a layer's activation into a few concepts, shared by all images of the batch.

        A_np ~ sum_j M_jnp F_j,   with M, F >= 0

    At each position p of each image n, the activation is a sum of concepts `F_j`, weighted by their maps `M_jn`. Coordinate
    descent finds the factors, from a start given by the singular vectors. Nothing is random. Negative values of the
    activation count as 0; a warning says so if they matter.

    **Arguments**: those of `camfn.score_cam`, for one layer, and

    - `target`: the scores of each concept; all classes by default.
    - `concepts`: the number k of concepts. With more concepts, an object is split into smaller parts.
    - `steps`: the number of sweeps of coordinate descent.

    **Returns** `camfn.Concepts`:

    - `maps` `(n, k, *grid)`: the maximum over the batch is 1 for each concept.
    - `vectors` `(k, c)`.
    - `scores` `(n, k, t)`: the target of image n with the concept's vector at every position of the layer. For a pooled
      linear head this is the linear layer applied to the vector.
    - `classes`, `error` and `layer`.

    The batch is factorized as one matrix, so the concepts of an image depend on the other images. The
    derivative goes through the sweeps but not through the start.

    **Raises** `CamError` if there are fewer channels, or positions in the batch, than concepts, or if no value is positive.

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
    with _compat.unnarrowed(), without_graph(x, state):
        seen = explain_layer(model, layer, x, target, state, Drawing(False, size, False, layout, axes))
        forward, (part,) = seen.forward, seen.reads
        # in units of its size, so that squares do not overflow or underflow
        own = part.values.to(wide(part.values.dtype))
        scale = magnitude(own, (0, 1, 2))
        values = _positive_part(own / scale, concepts, forward.layers[0])
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


def _positive_part(activation: Tensor, concepts: int, layer: str) -> Tensor:
    """Return the positive part of the activation, `(c, n p)`. Raise CamError if it cannot be factorized."""
    values = activation.transpose(0, 1).flatten(1)
    if isinstance(concepts, bool) or not isinstance(concepts, int) or not 0 < concepts <= min(values.shape):
        raise CamError(
            f"concepts={concepts!r} must be a number from 1 to {min(values.shape)}: layer {layer!r} has {values.shape[0]} "
            f"channels, and {values.shape[1]} positions in the batch"
        )
    above = torch.relu(values)
    if not _compat.transformed():
        all_, kept = (float(each.detach().square().sum()) for each in (values, above))
        if not math.isfinite(all_):
            raise CamError(
                f"layer {layer!r} has NaN or infinite values, which have no factors: choose an earlier layer, or find "
                "the operation that makes them"
            )
        if not kept > 0:
            raise CamError(f"layer {layer!r} has no positive value, and nothing to factorize; choose a layer after a ReLU")
        if kept < 0.99 * all_:
            warn(
                f"{1 - kept / all_:.0%} of the activation's energy at layer {layer!r} is negative and left out: concepts are "
                "found in the positive part; a layer after a ReLU loses nothing"
            )
    return above


def _scores(seen: Explained, vectors: Tensor, image: int) -> Tensor:
    """Return the target of one image with each concept in place of the layer's output, `(k, t)`."""
    forward, (part,) = seen.forward, seen.reads
    numbers = torch.full((len(vectors),), image, device=vectors.device)
    values = vectors[..., None].expand(-1, -1, part.values.shape[-1]).to(part.values.dtype)
    inputs = rows_of(forward.batch.x, forward.companions, numbers, forward.image.index_select(0, numbers))
    run = tap_from(forward.task.model.borrow(), forward.layers)
    output = run(forward.task.state, inputs, None, (part.restore(values, numbers),)).output
    return score_rows(seen.score.of, output, rows_at(seen.score.rows, numbers))
