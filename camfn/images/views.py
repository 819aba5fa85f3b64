"""Where a network's input lies on the photo that it was made of: observed by pictures of known positions."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn.images.pictures import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 0.9
"""The share of the full contrast that a pixel of the photo keeps, at least. Padding has none."""
_REPEATS = 8
"""The number of repetitions by which a preprocessing that draws random numbers shows whether they matter."""
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

    A black and a white picture of the photo's size show how the preprocessing scales colors, and which pixels are padding. Two
    pictures that brighten from left to right and from top to bottom then show the place of each pixel. An affine map is fitted
    to the places. Nothing is read from the attributes of `preprocess`, which can be any function. Crops, resizes, squashes,
    pads, flips and turns can be found. What depends on the photo's content, such as a crop around the object, cannot.

    **Arguments**

    - `preprocess`: a function from an RGB picture (PIL) to the network's input, `(channels, h, w)` or `(1, channels, h, w)`; or
      an image processor of transformers.
    - `size`: the (width, height) of the photo.

    **Raises** `CamError` if the preprocessing cannot be undone: it fails on these pictures, its output has another shape, it
    draws random numbers, it does not scale colors by a factor and an offset, or pixels lie more than one pixel (of the photo or
    of the input, whichever is larger) away from the affine map.

    >>> import camfn
    >>> from camfn import demo
    >>> view = camfn.images.view_of(demo.preprocess, (96, 96))
    >>> view.size, view.to_photo(np.array([10.0, 20.0])).round(1)
    ((96, 96), array([10., 20.]))
    """
    gray = pillow().Image.new("L", size, 0), pillow().Image.new("L", size, 255), _ramp(size, 0), _ramp(size, 1)
    with _random_states_kept():
        states = _random_states()
        black, white, *levels = (_run(preprocess, picture) for picture in gray)
        for _ in range(_REPEATS if states != _random_states() else 1):
            if not torch.equal(levels[0], _run(preprocess, gray[2])):
                raise _lost("it draws random numbers, and two runs on one photo differ")
    contrast = white - black
    power = contrast.square().sum(0)
    if not bool(torch.isfinite(power).all()) or not bool(power.max() > 0):
        raise _lost("a black and a white picture give the same input")
    places = torch.stack([((level - black) * contrast).sum(0) / power * side for level, side in zip(levels, size)])
    matrix, distance, scale = _fitted(places, power > _SHOWN**2 * power.max())
    if distance > max(1.0, scale):
        limit = f"{max(1.0, scale):.1f}"
        raise _lost(
            f"it moves pixels by up to {distance:.1f} photo pixels from an affine map, more than the {limit} of a pixel"
        )
    rows = [(float(a), float(b), float(c)) for a, b, c in matrix]
    return View((rows[0], rows[1]), (black.shape[2], black.shape[1]), size)


def _lost(why: str) -> CamError:
    return CamError(f"the preprocessing cannot be undone: {why}")


def _ramp(size: tuple[int, int], axis: int) -> "Image":
    """A picture whose level is the place along an axis. It is dithered, since 256 levels are few for a large photo."""
    x, y = (np.arange(side, dtype=np.float32) for side in size)
    noise = (x * 0.75487766 % 1 + (y * 0.56984029 % 1)[:, None]) % 1
    level = (y[:, None] if axis else x) * (255 / size[axis]) + 127.5 / size[axis]
    return pillow().Image.fromarray((level + noise).clip(0, 255).astype(np.uint8))


def _run(preprocess: Callable[[Any], Any], picture: "Image") -> Tensor:
    """The input `(channels, h, w)` that is made of a gray picture."""
    try:
        found = pixels_of(preprocess, picture.convert("RGB"))
    except CamError:
        raise
    except Exception as error:  # the caller's code
        raise _lost(f"on a plain picture it fails with {first_line(error)}") from error
    if found.ndim != 3 or found.numel() == 0:
        raise _lost(f"its output has shape {tuple(found.shape)}, which is not (channels, h, w)")
    return found.detach().cpu().double()


def _random_states() -> tuple[Any, ...]:
    """The states of the generators that a transform may draw from."""
    numpy = np.random.get_state()  # noqa: NPY002 (the caller's transforms may draw from it)
    return (
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy],
        random.getstate(),
    )


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python at the end."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)


def pixels_of(preprocess: Callable[[Any], Any], picture: Any) -> Tensor:
    """Run a preprocessing on a picture, and return its pixels without an axis for the batch.

    An image processor of transformers returns a mapping with lists of arrays.
    """
    found = preprocess(picture)
    if isinstance(found, Mapping):
        found = found["pixel_values"]
    found = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    return found[0] if found.ndim == 4 and len(found) == 1 else found


def _fitted(places: Tensor, shown: Tensor) -> tuple[np.ndarray, float, float]:
    """Fit an affine map to the places `(2, h, w)` of pixels.

    **Returns** the matrix `(2, 3)`, the largest distance from it, and the number of the photo's pixels in one of the input's.
    """
    height, width = shown.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    block = max(1, min(height, width) // _BLOCKS)
    values = F.avg_pool2d(torch.cat([places, torch.stack([x, y]).to(places.dtype)])[None], block)[0].flatten(1)
    kept = _inner(F.avg_pool2d(shown[None, None].to(places.dtype), block)[0, 0] == 1).flatten()
    target, source = values[:2, kept].T.numpy(), values[2:, kept].T.numpy()
    source = np.concatenate([source, np.ones((len(source), 1))], 1)
    if len(source) < 3 or np.linalg.matrix_rank(source) < 3:
        raise _lost("too few pixels of the input show the photo")
    matrix = np.linalg.lstsq(source, target, rcond=None)[0].T
    scale = float(np.linalg.norm(matrix[:, :2], axis=0).max())
    if abs(np.linalg.det(matrix[:, :2])) < 1e-6 * scale**2:
        raise _lost("its output is constant along an axis of the photo")
    return matrix, float(np.abs(source @ matrix.T - target).max()), scale


def _inner(shown: Tensor) -> Tensor:
    """Take a margin from the blocks that show the photo: a filter repeats the photo's border, or mixes it with padding."""
    margin = 2 if min(shown.shape) >= _BLOCKS else 1
    outside = F.pad((~shown).double()[None, None], [margin] * 4, value=1.0)
    inner = F.max_pool2d(outside, 2 * margin + 1, stride=1)[0, 0] == 0
    return inner if int(inner.sum()) >= 9 else shown
