"""A preprocessing observed by pictures of known positions: where the network's input lies on its photo."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn.images.pictures import pillow
from camfn.images.preprocessing import pixels_of, random_states, random_states_kept
from camfn.images.reading import check_narrow
from camfn.images.views import View

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
        return _observed_view(_Scaling.of(preprocess, size))


class Views:
    """The views of one preprocessing on photos of many sizes.

    How it scales colors is observed once, on pictures of one size. Then one picture tells the view of each size: a ramp in red,
    a ramp in green, and a level of blue, which has to arrive as that level at all pixels. Where it does not, or the places are
    not those of an affine map, or random numbers are drawn, `view_of` tells.

    - `preprocess`: that of `view_of`.

    >>> from camfn import demo
    >>> views = Views(demo.preprocess)
    >>> [views(size).photo for size in ((96, 96), (120, 160))], views((1, 40))
    ([(96, 96), (120, 160)], None)
    """

    def __init__(self, preprocess: Callable[[Any], Any]) -> None:
        self._preprocess = preprocess
        self._found: dict[tuple[int, int], View | None] = {}

    def __call__(self, size: tuple[int, int]) -> View | None:
        """The view on a photo of (width, height); None where `view_of` raises an error."""
        if size not in self._found:
            with random_states_kept():
                self._found[size] = self._by_one_picture(size) or self._by_many(size)
        return self._found[size]

    def _by_many(self, size: tuple[int, int]) -> View | None:
        with contextlib.suppress(CamError):
            return view_of(self._preprocess, size)

    def _by_one_picture(self, size: tuple[int, int]) -> View | None:
        colors, states = self._colors, random_states()
        if colors is None:
            return None
        with contextlib.suppress(CamError):  # what it says may hold for these pictures alone
            check_narrow(self._preprocess, _checked(size))
            view = colors.view(self._preprocess, size, _all(size))
            if view and _narrow(spans := _shown_by(view), size):
                view = colors.view(self._preprocess, size, spans)
            return view if states == random_states() else None

    @cached_property
    def _colors(self) -> "_Colors | None":
        states = random_states()
        with contextlib.suppress(CamError):
            found = _Colors.of(_Scaling.of(self._preprocess, _USUAL))
            return found if states == random_states() else None


_USUAL = (320, 240)
"""The size of the pictures that show how colors are scaled."""


def _all(size: tuple[int, int]) -> list[Span]:
    return [(0.0, float(side)) for side in size]


def _observed_view(scaling: "_Scaling") -> View:
    view = _affine(_Blocks.of(_observed(scaling), scaling.shown), scaling.size)
    _check_mark(view, scaling)
    return view


class _Blocks(NamedTuple):
    """The mean places of the pixels in each block of the input."""

    places: Tensor  # (2, k, rows, columns), each observed k times
    shown: Tensor  # (rows, columns): whether all of the block is
    side: tuple[int, int]  # the pixels in a block, (down, across)
    input: tuple[int, int]  # (width, height)

    @classmethod
    def of(cls, places: Tensor, shown: Tensor) -> "_Blocks":
        """Gather the places `(2, k, h, w)` of pixels."""
        side = _side(shown)
        kept = F.avg_pool2d(shown[None, None].to(places.dtype), side)[0, 0] == 1
        return cls(F.avg_pool2d(places, side).double(), kept, side, (shown.shape[1], shown.shape[0]))

    @property
    def centers(self) -> Tensor:
        """The centers of the blocks, `(2, rows, columns)`, each (x, y)."""
        y, x = ((torch.arange(count) + 0.5) * side for count, side in zip(self.shown.shape, self.side))
        return torch.stack(torch.meshgrid(x, y, indexing="xy")).double()


def _side(pixels: Tensor) -> tuple[int, int]:
    height, width = pixels.shape[-2:]
    return max(1, height // _BLOCKS), max(1, width // _BLOCKS)


def _affine(blocks: _Blocks, size: tuple[int, int]) -> View:
    """The view on a photo of (width, height) that places tell."""
    matrix, distance = _fitted(blocks, size)
    rows = [(float(a), float(b), float(c)) for a, b, c in matrix]
    view = View((rows[0], rows[1]), blocks.input, size)
    limit = _cell(view)
    if distance > limit:
        raise _lost(
            f"it moves pixels by up to {distance:.1f} photo pixels from an affine map, more than the {limit:.1f} of a pixel"
        )
    return view


def _cell(view: View) -> float:
    """The side of a pixel of the input or of the photo, whichever is larger, in pixels of the photo."""
    return max(1.0, float(np.linalg.norm(np.asarray(view.matrix)[:, :2], axis=0).max()))


def _observed(scaling: "_Scaling") -> Tensor:
    """The places `(2, 2, h, w)` of the input's pixels on the photo's axes, each observed twice."""
    size, states = scaling.size, random_states()
    places = scaling.places(_all(size))
    for _ in range(_REPEATS if states != random_states() else 0):
        if not torch.equal(scaling.places(_all(size)), places):
            raise _lost("it draws random numbers, and two runs on one photo differ")
    spans = [_seen(place[:, scaling.shown], side) for place, side in zip(places, size)]
    return scaling.places(spans) if _narrow(spans, size) else places


def _seen(places: Tensor, side: int) -> Span:
    """The part of the photo's side that the input shows, with a margin of a few of a ramp's 256 levels."""
    margin, within = 3 * side / 255, places.clamp(0, side)
    return max(0.0, float(within.min()) - margin), min(float(side), float(within.max()) + margin)


def _shown_by(view: View) -> list[Span]:
    """The parts of the photo's sides that a view shows, with such a margin."""
    return [_seen(places, side) for places, side in zip(torch.from_numpy(_corners(view)).T, view.photo)]


def _corners(view: View) -> np.ndarray:
    """The corners `(4, 2)` of the input, on the photo."""
    width, height = view.size
    return view.to_photo(np.array([[0, 0], [width, 0], [0, height], [width, height]]))


def _narrow(spans: Sequence[Span], size: tuple[int, int]) -> bool:
    """Whether more than half of a side is cropped away. Then a ramp over what is seen alone is steeper."""
    return any(stop - start < side / 2 for (start, stop), side in zip(spans, size))


def _check_mark(view: View, scaling: "_Scaling") -> None:
    """Raise CamError if a white rectangle on black does not arrive where it should, so that the content decides."""
    (width, height), corners = view.size, _corners(view)
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
    if area > 2 * (right - left + bottom - top) * _cell(view):
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
        if len(self.black) != 3 or not bool((self.contrast != 0).logical_or_(~self.shown).all()):
            return None
        found = _beside(_run(self.preprocess, _colored(ramps)), self.black)
        levels = ((found - self.black) / self.contrast).masked_fill_(~self.shown, _BLUE / 255)
        return levels[:2] if _is_blue(levels[2]) else None

    def level(self, picture: "Image") -> Tensor:
        brighter = _beside(_run(self.preprocess, picture), self.black) - self.black
        return torch.where(self.shown, brighter.mul_(self.contrast).sum(0) / self.power, 0)


def _beside(found: Tensor, black: Tensor) -> Tensor:
    if found.shape != black.shape:
        shapes = " and ".join(str(tuple(each.shape)) for each in (black, found))
        raise _lost(f"two pictures of one size give inputs of shapes {shapes}")
    return found


class _Colors(NamedTuple):
    """How a preprocessing scales red, green and blue, and how it shifts two ramps."""

    black: Tensor  # (3, 1, 1)
    contrast: Tensor  # (3, 1, 1)
    shift: Tensor  # (2, 1, 1): an output that is rounded down is half a level darker, say

    @classmethod
    def of(cls, scaling: _Scaling) -> "_Colors | None":
        """The colors at the middle pixel, where no pixel is padding; the shift is what a picture of ramps shows."""
        view, (channels, height, width) = _observed_view(scaling), scaling.black.shape
        if channels != 3 or not bool(scaling.shown.all()) or not bool(scaling.contrast.all()):
            return None
        middle = [each[:, height // 2, width // 2, None, None] for each in (scaling.black, scaling.contrast)]
        colors, sides = cls(middle[0], middle[1], torch.zeros(2, 1, 1)), torch.tensor(scaling.size)[:, None, None]
        blocks = colors.blocks(scaling.preprocess, scaling.size, _all(scaling.size))
        if blocks is None:
            return None
        wanted = torch.from_numpy(view.to_photo(blocks.centers.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        shift = ((blocks.places[:, 0] - wanted) / sides).flatten(1).median(1).values
        return colors._replace(shift=shift[:, None, None].float())

    def blocks(self, preprocess: Callable[[Any], Any], size: tuple[int, int], spans: Sequence[Span]) -> _Blocks | None:
        """The places that two ramps over spans tell; None if blue does not arrive as it is everywhere."""
        found = _run(preprocess, _colored([_ramp(size, axis, span) for axis, span in enumerate(spans)]))
        if len(found) != 3 or not _is_blue((found[2] - self.black[2]).div_(self.contrast[2])):
            return None
        starts, stops = torch.tensor(spans).T[..., None, None]
        side = _side(found)
        levels = (F.avg_pool2d(found[:2], side) - self.black[:2]) / self.contrast[:2] - self.shift
        places = (levels * (stops - starts) + starts)[:, None].double()
        return _Blocks(places, torch.ones(places.shape[2:], dtype=torch.bool), side, (found.shape[2], found.shape[1]))

    def view(self, preprocess: Callable[[Any], Any], size: tuple[int, int], spans: Sequence[Span]) -> View | None:
        """The view that two ramps over spans tell; None if blue does not arrive as it is everywhere."""
        blocks = self.blocks(preprocess, size, spans)
        return None if blocks is None else _affine(blocks, size)


def _colored(ramps: "list[Image]") -> "Image":
    """A picture with one ramp in red, one in green, and one level of blue."""
    image = pillow().Image
    return image.merge("RGB", (*ramps, image.new("L", ramps[0].size, _BLUE)))


def _is_blue(levels: Tensor) -> bool:
    """Whether blue has arrived as it was, so that colors are neither mixed nor scaled in another way."""
    return float(levels.sub(_BLUE / 255).abs_().max()) < 1 / 255


def _lost(why: str) -> CamError:
    return CamError(f"the preprocessing cannot be undone: {why}")


def _ramp(size: tuple[int, int], axis: int, span: Span) -> "Image":
    """A picture whose level is the place along an axis, black before a span and white after it.

    It is dithered, since 256 levels are few for a large photo. Levels and noise are counted in 256ths.
    """
    x, y = (np.arange(side) for side in size)
    start, stop = span
    level = ((y[:, None] if axis else x) + (0.5 - start)) * (255 * 256 / (stop - start))
    noise = _noise(x, 0.75487766) + _noise(y, 0.56984029)[:, None]
    exact = level.clip(0, 255 * 256).astype(np.uint16) + noise
    return pillow().Image.fromarray((exact >> 8).astype(np.uint8))


def _noise(at: np.ndarray, step: float) -> np.ndarray:
    """Evenly spread bytes, whose sums, as bytes, are so too."""
    return (at * step % 1 * 256).astype(np.uint8)


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


def _fitted(blocks: _Blocks, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Fit an affine map to places.

    **Returns** the matrix `(2, 3)` and the largest distance from it.
    """
    positions, target = blocks.centers, blocks.places.mean(1)
    inner = blocks.shown & _inner(blocks.shown)
    checked = _telling(positions, inner, blocks.shown)
    used = _telling(positions, inner & _between(target, size), checked)
    source = _with_ones(positions.flatten(1).T.numpy())
    matrix = np.linalg.lstsq(source[used.flatten()], target[:, used].T.numpy(), rcond=None)[0].T
    scale = float(np.linalg.norm(matrix[:, :2], axis=0).max())
    if abs(np.linalg.det(matrix[:, :2])) < 1e-6 * scale**2:
        raise _lost("its output is constant along an axis of the photo")
    away = (blocks.places.flatten(2).numpy() - (source @ matrix.T).T[:, None])[..., checked.flatten()]
    away -= away.mean(-1, keepdims=True)  # by as much, rounding shifts the two observations apart
    return matrix, float(np.abs(away).max())


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
