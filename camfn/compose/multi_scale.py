"""SESS, a composition that averages a method's maps of windows of the enlarged input."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError
from camfn._types import Maps
from camfn.compose._common import Clean, Question, composed, each_layer, joined, look_at, scaled
from camfn.formulas import maps
from camfn.methods._common import checked_blur, checked_size
from camfn.methods.registry import Made, Outcome, made
from camfn.targets import as_probabilities

Shape = tuple[int, ...]


def multi_scale(
    method: Callable[..., Maps], sizes: Sequence[int | Sequence[int]], *, blur: tuple[int, float] | None = (11, 5.0)
) -> Callable[..., Maps]:
    """Return a method whose map is a score-weighted mean over windows of the enlarged input (SESS).

    The input is enlarged to each of `sizes`, and covered by adjacent windows of its own size. The last window of each axis is
    shifted to end at the border. Each window's **normalized** map is multiplied by the target's score there, divided by that of
    the best window. An integer target means the probability of that class. The maps are then put back in place and
    resized to the input's size. Each pixel gets the mean of the maps that are positive there, and a Gaussian blur follows.

    A score below 0 counts as 0. If no window has a positive score, all windows count the same. The authors can drop windows of
    a low score, which this function does not do. The cost is that of the method and one forward pass for each window, plus one
    forward pass.

    **Arguments**

    - `method`: as in `camfn.smooth`.
    - `sizes`: an int is the length of the shorter side, a sequence is the whole shape. An axis of time is not enlarged. The
      authors' sizes, for inputs of 224 pixels, are 224, 288, ... 928.
    - `blur`: kernel size in pixels (an odd number) and standard deviation of the Gaussian, or `None` for no blur.

    **Returns** a method like any other (see `camfn.smooth`). Its map has the input's size unless `size=` is given, because the
    sizes make it finer than the layer's grid.

    **Raises** `CamError` for invalid options, and for a function that is not a method.

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
        window, covered = tuple(clean.image.shape[2:]), len(clean.batch.pixels.axes.still)
        to = checked_size(question.size, clean.batch, len(window))
        outcomes, fused = _fused(inner, clean, [_enlarged(one, window, covered) for one in wanted])

        def finish(found: Tensor) -> Tensor:
            found = found if blur is None else maps.blur(found, *blur, covered)
            return scaled(found if to is None else maps.resize(found, to), len(window), question.normalize)

        return joined(each_layer(finish, fused), outcomes, clean.outcome)

    return composed(f"multi_scale({inner.name})", answer, inner.of_layer, inner.needs)


def _enlarged(wanted: int | Sequence[int], window: Shape, covered: int) -> Shape:
    """Return the shape of an enlarged input, or raise an error. Only the last axes, the `covered` ones, are enlarged."""
    lead, sides = window[: len(window) - covered], window[len(window) - covered :]
    if not sides:
        raise CamError('multi_scale enlarges depth, height and width, and the input has time alone; axes="ncw" makes it width')
    found = tuple(side * wanted // min(sides) for side in sides) if isinstance(wanted, int) else wanted
    whole = isinstance(found, Sequence) and all(isinstance(side, int) for side in found)
    if not whole or len(found) != len(sides) or any(large < side for large, side in zip(found, sides)):
        raise CamError(
            f"sizes has {wanted!r} for an input of {sides}: it must be the length of the shorter side, or {len(sides)} "
            "whole numbers, none below the input's"
        )
    return (*lead, *found)


def _places(large: Shape, window: Shape) -> Iterator[Shape]:
    """The corners of adjacent windows. The last window of each axis ends at the border."""
    return itertools.product(*([*range(0, whole - side, side), whole - side] for whole, side in zip(large, window)))


def _patch(image: Tensor, window: Shape, size: Shape, place: Shape) -> Tensor:
    """Cut a window out of the image enlarged to `size`."""
    cuts = (slice(start, start + side) for start, side in zip(place, window))
    return maps.resize(image, size)[(..., *cuts)]


def _fused(method: Made, clean: Clean, sizes: Sequence[Shape]) -> tuple[list[Outcome], Maps]:
    """Return the mean over the windows of all sizes. Each window is cut twice: for its score, then for its map."""
    window = tuple(clean.image.shape[2:])
    patches = [(size, place) for size in sizes for place in _places(size, window)]
    looks = [_look_at_patch(clean, _patch(clean.image, window, *where)) for where in patches]
    weights = torch.stack([one.scores[:, 0] if one.single else one.scores for one in looks]).clamp(min=0)
    best = weights.amax(0)
    weights = torch.where(best > 0, weights / torch.where(best > 0, best, 1), 1)  # without a positive score, all windows count
    outcomes: list[Outcome] = []
    total: Maps = torch.zeros((), device=clean.image.device)
    count = total
    for where, weight in zip(patches, weights):
        outcomes.append(clean.put_to(method, _patch(clean.image, window, *where), size=window, normalize=True))
        back = functools.partial(_put_back, window, *where, weight[(..., *[None] * len(window))])
        found = each_layer(back, outcomes[-1].maps)
        total, count = each_layer(torch.add, total, found), each_layer(_count, count, found)
    return outcomes + looks, each_layer(lambda total, count: total / count.clamp(min=1), total, count)


def _count(count: Tensor, found: Tensor) -> Tensor:
    """Count the maps that are positive at each pixel."""
    return count + (found > 0).to(found.dtype)


def _look_at_patch(clean: Clean, patch: Tensor) -> Outcome:
    """Run the forward pass of one window."""
    asked = clean.question
    x = clean.batch.with_image(patch).x
    return look_at(asked._replace(x=x, target=as_probabilities(asked.target))).outcome


def _put_back(window: Shape, size: Shape, place: Shape, weight: Tensor, found: Tensor) -> Tensor:
    """Place a window's map on zeros of the enlarged size, and resize it to the input's size."""
    around = [(start, whole - start - side) for start, whole, side in zip(place, size, window)]
    padded = F.pad(found * weight, [pad for pair in reversed(around) for pad in pair])
    return maps.resize(padded, window)
