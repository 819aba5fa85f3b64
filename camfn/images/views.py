"""Where a network's input lies on the photo that it was made of: observed by pictures of known positions."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn.images.pictures import pillow
from camfn.images.preprocessing import pixels_of, random_states, random_states_kept
from camfn.images.reading import check_narrow

if TYPE_CHECKING:
    from PIL.Image import Image

Span = tuple[float, float]
_SHOWN = 0.9
"""The share of the full contrast that a pixel of the photo keeps, at least. Padding has none."""
_REPEATS = 8
"""The number of pairs of repetitions by which a preprocessing that draws random numbers shows whether they matter."""
_BLUE = 128
"""The level of blue beside a ramp in red and one in green. Where it arrives alone, so do they."""
_BLOCKS = 32
"""Positions are compared in the means of so many blocks a side, in which rounding to 256 levels averages out."""


class View(NamedTuple):
    """An affine map from the pixels of a network's input to the pixels of a photo.

        (X, Y) = matrix @ (x, y, 1)

    Positions count from the upper left corner, so that the center of the first pixel is at (0.5, 0.5).

    >>> half = View(((2.0, 0.0, 10.0), (0.0, 2.0, 0.0)), size=(40, 30), photo=(100, 60))
    >>> half.to_photo(np.array([0.5, 0.5])), half.to_input(np.array([11.0, 1.0]))
    (array([11.,  1.]), array([0.5, 0.5]))
    """

    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    size: tuple[int, int]  # (width, height) of the network's input
    photo: tuple[int, int]  # (width, height) of the photo

    def to_photo(self, points: np.ndarray) -> np.ndarray:
        """Map positions `(..., 2)` on the input, each (x, y), to positions on the photo."""
        matrix = np.asarray(self.matrix)
        return points @ matrix[:, :2].T + matrix[:, 2]

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """Map positions `(..., 2)` on the photo, each (x, y), to positions on the input."""
        matrix = np.asarray(self.matrix)
        return (points - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T

    def resized(self, photo: tuple[int, int]) -> "View":
        """The view on the photo resized to (width, height)."""
        across, down = photo[0] / self.photo[0], photo[1] / self.photo[1]
        (a, b, c), (d, e, f) = self.matrix
        return View(((a * across, b * across, c * across), (d * down, e * down, f * down)), self.size, photo)

    def on_photo(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Lay a map `(h, w)` of the input, of any resolution, over the photo.

        **Returns** its values at the photo's pixels `(height, width)`, interpolated bilinearly, and bools of the same shape:
        whether the input shows the pixel. The others were cropped away.
        """
        rows = max(1, _PIXELS // self.photo[0])
        starts = range(0, self.photo[1], rows)
        parts = [self._rows(values, start, min(start + rows, self.photo[1])) for start in starts]
        return torch.cat([part for part, _ in parts]), torch.cat([inside for _, inside in parts])

    def _rows(self, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        y, x = np.mgrid[start:stop, : self.photo[0]] + 0.5
        size = np.array(self.size)
        at = self.to_input(np.stack([x, y], -1))
        inside = ((at >= -_EDGE) & (at <= size + _EDGE)).all(-1)
        places = torch.from_numpy(at / size * 2 - 1).to(values.dtype)
        found = F.grid_sample(values[None, None], places[None], padding_mode="border", align_corners=False)
        return found[0, 0], torch.from_numpy(inside)


_PIXELS = 2**20
"""The number of the photo's pixels that are computed at once."""
_EDGE = 0.5
"""How far a pixel may lie outside of the input, in its pixels, to count as shown: the map is measured, and not exact."""


def whole(size: tuple[int, int], photo: tuple[int, int]) -> View:
    """The view of an input of `size` (width, height) that shows all of a photo, resized and neither cropped nor padded."""
    (width, height), (columns, rows) = size, photo
    return View(((columns / width, 0.0, 0.0), (0.0, rows / height, 0.0)), size, photo)


def view_of(preprocess: Callable[[Any], Any], size: tuple[int, int]) -> View:
    """Find where the network's input lies on a photo, by running the preprocessing on pictures of known positions.

    A black and a white picture of the photo's size show how the preprocessing scales colors, and which pixels are padding.
    Pictures that brighten from left to right and from top to bottom, and their negatives, then show the place of each pixel. An
    affine map is fitted to the places. Last, a white rectangle must arrive where the map says. Nothing is read from the
    attributes of `preprocess`, which can be any function. Crops, resizes, squashes, pads, flips and turns can be found. What
    depends on the photo's content, such as a crop around the object, cannot. The preprocessing runs 5 times: 7 times if it
    crops away more than half of a side, and 16 times more if it draws random numbers. Where it mixes red, green and blue, it
    runs up to 14 times.

    **Arguments**

    - `preprocess`: a function from an RGB picture (PIL) to the network's input, `(channels, h, w)` or `(1, channels, h, w)`; or
      an image processor of transformers.
    - `size`: the (width, height) of the photo.

    **Raises** `CamError` if the preprocessing cannot be undone: it fails on these pictures, its output has another shape, it
    draws random numbers, its colors are curved or depend on the whole picture, or pixels lie more than one pixel (of the photo
    or of the input, whichever is larger) away from the affine map, as behind a lens.

    >>> import camfn
    >>> from camfn import demo
    >>> view = camfn.images.view_of(demo.preprocess, (96, 96))
    >>> view.size, view.to_photo(np.array([10.0, 20.0])).round(1)
    ((96, 96), array([10., 20.]))
    """
    size = _checked(size)
    check_narrow(preprocess, size)
    with random_states_kept():
        scaling = _Scaling.of(preprocess, size)
        places = _observed(scaling)
        matrix, distance, scale = _fitted(places, scaling.shown, size)
        limit = max(1.0, scale)
        if distance > limit:
            raise _lost(
                f"it moves pixels by up to {distance:.1f} photo pixels from an affine map, more than the {limit:.1f} of a pixel"
            )
        view = _view(matrix, scaling)
        _check_mark(view, scaling, limit)
    return view


def _view(matrix: np.ndarray, scaling: "_Scaling") -> View:
    rows = [(float(a), float(b), float(c)) for a, b, c in matrix]
    height, width = scaling.shown.shape
    return View((rows[0], rows[1]), (width, height), scaling.size)


def _observed(scaling: "_Scaling") -> Tensor:
    """The places `(2, 2, h, w)` of the input's pixels on the photo's axes, each observed twice."""
    size, states = scaling.size, random_states()
    spans = [(0.0, float(side)) for side in size]
    places = scaling.places(spans)
    for _ in range(_REPEATS if states != random_states() else 0):
        if not torch.equal(scaling.places(spans), places):
            raise _lost("it draws random numbers, and two runs on one photo differ")
    seen = [_seen(place[:, scaling.shown], side) for place, side in zip(places, size)]
    narrow = any(stop - start < side / 2 for (start, stop), side in zip(seen, size))
    return scaling.places(seen) if narrow else places  # a ramp over what is seen alone is steeper


def _check_mark(view: View, scaling: "_Scaling", limit: float) -> None:
    """Raise CamError if a white rectangle on black does not arrive where it should, so that the content decides."""
    width, height = view.size
    corners = view.to_photo(np.array([[0, 0], [width, 0], [0, height], [width, height]]))
    low, high = corners.min(0).clip(0, view.photo), corners.max(0).clip(0, view.photo)
    (left, top), (right, bottom) = (np.rint(low + (high - low) * share).astype(int) for share in _MARK)
    picture = pillow().Image.new("L", view.photo)
    picture.paste(255, (left, top, right, bottom))
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    (a, b, c), (d, e, f) = view.matrix
    inside = (abs(a * x + b * y + c - (left + right) / 2) < (right - left) / 2) & (
        abs(d * x + e * y + f - (top + bottom) / 2) < (bottom - top) / 2
    )
    wrong = (scaling.level(picture).numpy() > 0.5) != inside
    area = wrong[scaling.shown.numpy()].sum() * abs(np.linalg.det(np.asarray(view.matrix)[:, :2]))
    if area > 2 * (right - left + bottom - top) * limit:
        raise _lost("a white rectangle arrives elsewhere than ramps tell, so that its output depends on what a picture shows")


_MARK = np.array([[0.2, 0.15], [0.55, 0.6]])
"""Two corners of a rectangle, as shares of what is seen. It is not its own mirror image."""


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    width, height = (int(side) for side in size)
    if min(width, height) < 2:
        raise _lost(f"a photo of {width} x {height} pixels is too small to tell places")
    return width, height


class _Scaling(NamedTuple):
    """How a preprocessing scales colors: what a black picture gives, and how a white one differs."""

    preprocess: Callable[[Any], Any]
    size: tuple[int, int]
    black: Tensor  # (channels, h, w)
    contrast: Tensor
    power: Tensor  # (h, w)
    shown: Tensor  # (h, w), false in padding

    @classmethod
    def of(cls, preprocess: Callable[[Any], Any], size: tuple[int, int]) -> "_Scaling":
        black, white = (_run(preprocess, pillow().Image.new("L", size, level)) for level in (0, 255))
        contrast = _beside(white, black) - black
        power = contrast.square().sum(0)
        if not bool(power.max() > 0):
            raise _lost("a black and a white picture give the same input, as where each picture is scaled by its own mean")
        return cls(preprocess, size, black, contrast, power, power > _SHOWN**2 * power.max())

    def places(self, spans: Sequence[Span]) -> Tensor:
        """The places `(2, 2, h, w)` of the input's pixels along the photo's axes, as told by ramps over spans.

        They are observed twice, by the ramps and by their negatives, so that halves that are rounded up cancel in the mean.
        """
        ramps = [_ramp(self.size, axis, span) for axis, span in enumerate(spans)]
        negatives = [ramp.point(lambda level: 255 - level) for ramp in ramps]
        rising, falling = (self._levels(each) for each in (ramps, negatives))
        lengths = torch.tensor([[stop - start] for start, stop in spans])[..., None, None]
        starts = torch.tensor([[start] for start, _ in spans])[..., None, None]
        return torch.stack([rising, 1 - falling], 1) * lengths + starts

    def _levels(self, ramps: "list[Image]") -> Tensor:
        """The levels `(2, h, w)` of two pictures. Where the preprocessing mixes colors, it is run on each."""
        together = self._colored(ramps)
        return torch.stack([self.level(each) for each in ramps]) if together is None else together

    def _colored(self, ramps: "list[Image]") -> Tensor | None:
        """The levels `(2, h, w)` of two ramps, one in red and one in green; None if the input does not keep them apart."""
        if len(self.black) != 3 or not bool((self.contrast[:, self.shown] != 0).all()):
            return None
        blue = pillow().Image.new("L", self.size, _BLUE)
        found = _beside(_run(self.preprocess, pillow().Image.merge("RGB", (*ramps, blue))), self.black)
        levels = ((found - self.black) / self.contrast).masked_fill_(~self.shown, 0)
        apart = bool(((levels[2] - _BLUE / 255)[self.shown].abs() < 1 / 255).all())
        return levels[:2] if apart else None

    def level(self, picture: "Image") -> Tensor:
        brighter = _beside(_run(self.preprocess, picture), self.black) - self.black
        return torch.where(self.shown, brighter.mul_(self.contrast).sum(0) / self.power, 0)


def _beside(found: Tensor, black: Tensor) -> Tensor:
    if found.shape != black.shape:
        shapes = " and ".join(str(tuple(each.shape)) for each in (black, found))
        raise _lost(f"two pictures of one size give inputs of shapes {shapes}")
    return found


def _seen(places: Tensor, side: int) -> Span:
    """The part of the photo's side that the input shows, with a margin of a few of the ramp's 256 levels."""
    margin, within = 3 * side / 255, places.clamp(0, side)
    return max(0.0, float(within.min()) - margin), min(float(side), float(within.max()) + margin)


def _lost(why: str) -> CamError:
    return CamError(f"the preprocessing cannot be undone: {why}")


def _ramp(size: tuple[int, int], axis: int, span: Span) -> "Image":
    """A picture whose level is the place along an axis, black before a span and white after it.

    It is dithered, since 256 levels are few for a large photo.
    """
    x, y = (np.arange(side, dtype=np.float32) for side in size)
    start, stop = span
    level = ((y[:, None] if axis else x) + (0.5 - start)) * np.float32(255 / (stop - start))
    noise = (x * 0.75487766 % 1).astype(np.float32) + (y * 0.56984029 % 1).astype(np.float32)[:, None]
    np.subtract(noise, 1, out=noise, where=noise >= 1)
    noise += level
    return pillow().Image.fromarray(noise.clip(0, 255, out=noise).astype(np.uint8))


def _run(preprocess: Callable[[Any], Any], picture: "Image") -> Tensor:
    """The input `(channels, h, w)` that is made of a gray picture."""
    try:
        found = pixels_of(preprocess, picture.convert("RGB"))
    except CamError:
        raise
    except Exception as error:  # the caller's code
        raise _lost(f"on a plain picture it fails with {first_line(error)}") from error
    found = found[None] if found.ndim == 2 else found  # gray
    if found.ndim != 3 or found.numel() == 0:
        raise _lost(f"its output has shape {tuple(found.shape)}, which is not (channels, h, w)")
    if found.shape[0] not in _CHANNELS and found.shape[-1] in _CHANNELS:
        found = found.movedim(-1, 0)
    found = found.detach().cpu().float()
    if not math.isfinite(float(found.sum(dtype=torch.float64))):
        raise _lost("its output on a plain picture has NaN or infinite values")
    return found


_CHANNELS = (1, 3, 4)


def _fitted(places: Tensor, shown: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, float, float]:
    """Fit an affine map to the places `(2, 2, h, w)` of pixels.

    **Returns** the matrix `(2, 3)`, the largest distance from it, and the number of the photo's pixels in one of the input's.
    """
    height, width = shown.shape
    block = max(1, height // _BLOCKS), max(1, width // _BLOCKS)
    values = F.avg_pool2d(places, block).double()
    y, x = ((torch.arange(count) + 0.5) * side for count, side in zip(values.shape[2:], block))
    positions = torch.stack(torch.meshgrid(x, y, indexing="xy")).double()
    target = values.mean(1)
    kept = F.avg_pool2d(shown[None, None].to(places.dtype), block)[0, 0] == 1
    inner = kept & _inner(kept)
    checked = _telling(positions, inner, kept)
    used = _telling(positions, inner & _between(target, size), checked)
    source = _with_ones(positions.flatten(1).T.numpy())
    matrix = np.linalg.lstsq(source[used.flatten()], target[:, used].T.numpy(), rcond=None)[0].T
    scale = float(np.linalg.norm(matrix[:, :2], axis=0).max())
    if abs(np.linalg.det(matrix[:, :2])) < 1e-6 * scale**2:
        raise _lost("its output is constant along an axis of the photo")
    away = (values.flatten(2).numpy() - (source @ matrix.T).T[:, None])[..., checked.flatten()]
    away -= away.mean(-1, keepdims=True)  # by as much, rounding shifts the two observations apart
    return matrix, float(np.abs(away).max()), scale


def _telling(positions: Tensor, *choices: Tensor) -> Tensor:
    """The first choice of blocks that determines an affine map, with enough of them to show a deviation."""
    for kept in choices:
        points = _with_ones(positions[:, kept].T.numpy())
        if len(points) >= min(_FEWEST, int(choices[-1].sum())) and np.linalg.matrix_rank(points) == 3:
            return kept
    raise _lost("too few pixels of the input show the photo")


_FEWEST = 9


def _with_ones(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((len(points), 1))], 1)


def _inner(shown: Tensor) -> Tensor:
    """The blocks with no border of what is shown nearby: a filter mixes pixels at the border otherwise."""
    margin = 2 if min(shown.shape) >= _BLOCKS else 1
    outside = F.pad((~shown).double()[None, None], [margin] * 4, value=1.0)
    return F.max_pool2d(outside, 2 * margin + 1, stride=1)[0, 0] == 0


def _between(places: Tensor, size: tuple[int, int]) -> Tensor:
    """The blocks that lie between the centers of the photo's outermost pixels. Beyond them, an enlarged photo is constant."""
    sides = torch.tensor(size)[:, None, None]
    margin = 0.5 + sides / 255
    return ((places > margin) & (places < sides - margin)).all(0)
