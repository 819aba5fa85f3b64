"""A composition that asks a method about patches of the input at several sizes: SESS."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Maps
from camfn.compose._common import Clean, Made, Question, composed, each_layer, joined, look_at, made, scaled
from camfn.formulas import maps
from camfn.methods._common import checked_blur, checked_size
from camfn.methods.registry import Outcome
from camfn.targets import as_probabilities

Shape = tuple[int, ...]


def multi_scale(
    method: Callable[..., Maps], sizes: Sequence[int | Sequence[int]], *, blur: tuple[int, float] | None = (11, 5.0)
) -> Callable[..., Maps]:
    """A method of the mean over patches of the input at several sizes, each weighted by its score (SESS).

    The input is enlarged to each of `sizes`: a number is the length of its shorter side, a shape is all of them. Windows of
    the input's own size cover it, side by side, the last one moved back inside. Their **normalised** maps, times the target's
    score there (of a plain class the probability) over that of the best window, are put back in their places and brought
    to the input's size; each pixel gets the mean of those that are positive there. (A score below 0 counts as 0; where no
    window has one above, all count the same.) Then comes a Gaussian `blur` (pixels, an odd number, and deviation), which
    `None` leaves out. For each window the method's cost and one forward, and one forward more.

    What it gives is a method like any other (`camfn.smooth` says how), but its map is of the input's size unless `size=` asks
    for another: finer than the layer's grid is what the sizes are for. The authors' sizes, for inputs of 224 pixels, are
    224, 288, ... 928. They can leave out windows of a low score, which this does not.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> method = camfn.multi_scale(camfn.grad_cam, [8, 12], blur=None)
    >>> method(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 8])

    Tursun et al., SESS: Saliency Enhancing with Scaling and Sliding, ECCV 2022 (arXiv 2207.01769).
    """
    inner, wanted = made(method), tuple(sizes)
    blur = None if blur is None else checked_blur(blur)
    if not wanted:
        raise CamError("sizes is empty: name one at least")

    def answer(question: Question) -> Outcome:
        clean = look_at(question)
        window = tuple(clean.image.shape[2:])
        to = checked_size(question.size, clean.batch, len(window))
        outcomes, fused = _fused(inner, clean, [_enlarged(one, window) for one in wanted])

        def finish(found: Tensor) -> Tensor:
            found = found if blur is None else maps.blur(found, *blur, len(window))
            return scaled(found if to is None else maps.resize(found, to), len(window), question.normalize)

        return joined(each_layer(finish, fused), outcomes, clean.outcome)

    return composed(f"multi_scale({inner.name})", answer, inner.of_layer)


def _enlarged(wanted: int | Sequence[int], window: Shape) -> Shape:
    found = tuple(side * wanted // min(window) for side in window) if isinstance(wanted, int) else wanted
    whole = isinstance(found, Sequence) and all(isinstance(side, int) for side in found)
    if not whole or len(found) != len(window) or any(large < side for large, side in zip(found, window)):
        raise CamError(
            f"sizes has {wanted!r} for an input of {window}: it must be the length of the shorter side, or {len(window)} "
            "whole numbers, none below the input's"
        )
    return tuple(found)


def _places(large: Shape, window: Shape) -> Iterator[Shape]:
    """Where windows begin that lie side by side; the last of each axis ends where the picture does."""
    return itertools.product(*([*range(0, whole - side, side), whole - side] for whole, side in zip(large, window)))


def _patch(image: Tensor, window: Shape, size: Shape, place: Shape) -> Tensor:
    """What is seen in a window of the picture enlarged to `size`."""
    cuts = (slice(start, start + side) for start, side in zip(place, window))
    return maps.resize(image, size)[(..., *cuts)]


def _fused(method: Made, clean: Clean, sizes: Sequence[Shape]) -> tuple[list[Outcome], Maps]:
    """The mean over the windows of all sizes, added up one after the other; they are made twice, for their scores first."""
    window = tuple(clean.image.shape[2:])
    patches = [(size, place) for size in sizes for place in _places(size, window)]
    told = [_look_at_patch(clean, _patch(clean.image, window, *where)) for where in patches]
    weights = torch.stack([one.scores[:, 0] if one.single else one.scores for one in told]).clamp(min=0)
    best = weights.amax(0)
    weights = torch.where(best > 0, weights / torch.where(best > 0, best, 1), 1)  # where none has a score above 0, all count
    outcomes: list[Outcome] = []
    total: Maps = torch.zeros((), device=clean.image.device)
    count = total
    for where, weight in zip(patches, weights):
        outcomes.append(clean.put_to(method, _patch(clean.image, window, *where), size=window, normalize=True))
        back = functools.partial(_put_back, window, *where, weight[(..., *[None] * len(window))])
        found = each_layer(back, outcomes[-1].maps)
        total, count = each_layer(torch.add, total, found), each_layer(_count, count, found)
    return outcomes + told, each_layer(lambda total, count: total / count.clamp(min=1), total, count)


def _count(count: Tensor, found: Tensor) -> Tensor:
    return count + (found > 0).to(found.dtype)


def _look_at_patch(clean: Clean, patch: Tensor) -> Outcome:
    asked = clean.question
    x = clean.batch.with_image(patch).x
    return look_at(asked._replace(x=x, target=as_probabilities(asked.target))).outcome


def _put_back(window: Shape, size: Shape, place: Shape, weight: Tensor, found: Tensor) -> Tensor:
    """A window's map in its place on the enlarged picture, zeros around it, brought to the input's size."""
    around = [(start, whole - start - side) for start, whole, side in zip(place, size, window)]
    padded = F.pad(found * weight, [pad for pair in reversed(around) for pad in pair])
    return maps.resize(padded, window)
