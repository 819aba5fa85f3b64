"""Where a network's input lies on the photo that it was made of."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
_EDGE = 0.4
"""How far a pixel's center may lie outside of the input, in its pixels, to count as shown: the map is measured."""


def whole(size: tuple[int, int], photo: tuple[int, int]) -> View:
    """The view of an input of `size` (width, height) that shows all of a photo, resized and neither cropped nor padded."""
    (width, height), (columns, rows) = size, photo
    return View(((columns / width, 0.0, 0.0), (0.0, rows / height, 0.0)), size, photo)
