"""Maps over pictures: in color, as contours, or as a mask."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from camfn._errors import CamError
from camfn.images.colors import colorize
from camfn.images.pictures import array_of, pillow, slack, tensor_of, unit
from camfn.images.views import View, whole

if TYPE_CHECKING:
    from PIL.Image import Image

Style = Literal["heat", "contour", "mask"]
ALPHA = 0.75
"""The default opacity. From 0.69, the highest value is lighter on any photo than the lowest: 0.95 alpha > 1 - alpha / 2."""
UNSIGNED, SIGNED = "inferno", "berlin"
"""The default color maps of maps in [0, 1], and of maps with negative values."""
LEVELS = (0.25, 0.5, 0.75)
"""The values at which contours are drawn."""
_GROWTH = 0.6
"""The exponent by which opacity grows with the value. Below 1, so that middle values keep their colors."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def overlay(
    image: Any,
    map: Any,
    *,
    view: View | None = None,
    style: Style = "heat",
    alpha: float = ALPHA,
    colormap: str | None = None,
) -> "Image":
    """Overlay a map on its picture, as an RGB image of the picture's size.

        heat:     (1 - a) * faded + a * color(map),    a = alpha * map^0.6, or alpha * |map| in signed colors
        contour:  the picture, with lines of color(level) where |map| is 0.25, 0.5 and 0.75
        mask:     (1 - alpha * (1 - max(map, 0))) * picture

    `faded` is the picture with less color (by `alpha`) and less light (by `alpha / 2`), so that the highest value is the
    lightest on any picture. Parts of the picture that the network's input does not show are dark and gray, with a gray line
    around what it shows.

    **Arguments**

    - `image`: a PIL image, or a tensor or array `(h, w)`, `(h, w, k)` or `(k, h, w)`, uint8 or floats in [0, 1]. k is 1
      (gray), 3 (RGB) or 4 (RGBA; the opacity is ignored).
    - `map`: `(h', w')` in [0, 1], the map of one image, such as `maps[0]` from a method of camfn, or a signed map in [-1, 1].
      It is resized bilinearly to the picture (bicubic would overshoot) and not rescaled.
    - `view`: where the network's input lies on the picture, from `camfn.images.view_of`; by default, on all of it.
    - `style`: `"heat"`, `"contour"` or `"mask"`.
    - `alpha`: the opacity of the highest value. 0 gives the picture. (In torchcam's `overlay_mask` and in pytorch-grad-cam's
      `image_weight` it is the weight of the picture.)
    - `colormap`: a name of `camfn.images.COLORMAPS`. The default is `"inferno"`, or `"berlin"` for a map with negative values.
      Only `"berlin"` shows negative values: its middle is zero.

    **Raises** `CamError` if the picture or map is out of range, not finite, or of another shape, the view belongs to a picture
    of another size, or an option is unknown.

    >>> import torch
    >>> gray = torch.full((3, 6, 8), 0.5)
    >>> overlay(gray, torch.eye(2), alpha=0.0).getpixel((0, 0)), overlay(gray, torch.eye(2), style="mask").size
    ((128, 128, 128), (8, 6))
    """
    if not 0 <= alpha <= 1:
        raise CamError(f"alpha is the opacity of the map, from 0 (the picture alone) to 1; found {alpha!r}")
    if style not in _STYLES:
        raise CamError(f"style must be 'heat', 'contour' or 'mask'; found {style!r}")
    picture, values = array_of(image), _map(map)
    size = (picture.shape[1], picture.shape[0])
    if view is not None and view.photo != size:
        raise CamError(f"the view belongs to a photo of {_size(view.photo)} pixels, and the picture has {_size(size)}")
    laid, shown = (whole(size, size) if view is None else view).on_photo(values)
    look = _Look(alpha, colormap or default_colormap(values), max(1, round(min(size) / 250)))
    return pillow().Image.fromarray(_drawn(picture, laid.numpy(), shown.numpy(), style, look))


class _Look(NamedTuple):
    """How values are drawn."""

    alpha: float
    colormap: str
    radius: int  # of lines, in pixels


def _drawn(picture: np.ndarray, values: np.ndarray, shown: np.ndarray, style: Style, look: _Look) -> np.ndarray:
    """Draw a large picture in strips of rows, since floats take many times its memory."""
    drawn, rows, halo = np.empty((*values.shape, 3), np.uint8), max(1, _PIXELS // values.shape[1]), 2 * look.radius
    for start in range(0, len(values), rows):
        own, around = slice(start, start + rows), slice(max(0, start - halo), start + rows + halo)
        strip = _light(picture[around])
        signed = values[around] if look.colormap == SIGNED else values[around].clip(0)  # no other map shows negative values
        found = np.where(shown[around, :, None], _STYLES[style](strip, signed, look), _cropped(strip, shown[around], look))
        drawn[own] = np.rint(found * 255)[start - around.start :][:rows]
    return drawn


_PIXELS = 2**19
"""The number of pixels that are drawn at once."""


def _light(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / (255 if picture.dtype == np.uint8 else 1)


def default_colormap(map: Any) -> str:
    """The color map of a map: one with a middle for a map with negative values, other than by rounding."""
    return SIGNED if bool((_map(map) < 0).any()) else UNSIGNED


def blended(picture: np.ndarray, values: np.ndarray, alpha: float, colormap: str) -> np.ndarray:
    """Blend the colors of values `(h, w)` in [-1, 1] with a picture `(h, w, 3)`: the style `"heat"`."""
    opacity = (alpha * np.abs(values) ** (1 if colormap == SIGNED else _GROWTH))[..., None]
    faded = (1 - alpha / 2) * ((1 - alpha) * picture + alpha * _gray(picture))
    return (1 - opacity) * faded + opacity * _colors(values, colormap)


def _heat(picture: np.ndarray, values: np.ndarray, look: _Look) -> np.ndarray:
    return blended(picture, values, look.alpha, look.colormap)


def _contours(picture: np.ndarray, values: np.ndarray, look: _Look) -> np.ndarray:
    drawn = picture.copy()
    for level in (*LEVELS, *(-level for level in LEVELS if look.colormap == SIGNED)):
        inside = values >= level if level > 0 else values <= level
        for width, color in ((2 * look.radius, np.ones(3, np.float32)), (look.radius, _colors(np.array(level), look.colormap))):
            line = _grown(inside, width) & _grown(~inside, width)  # the border of the picture itself is none
            drawn[line] = (1 - look.alpha) * drawn[line] + look.alpha * color
    return drawn


def _grown(region: np.ndarray, radius: int) -> np.ndarray:
    """The pixels at most `radius` rows and columns away from a region."""
    for _ in range(2):  # down the rows, then along them
        wide, reach = np.pad(region, ((radius, radius), (0, 0))), 1
        while reach <= 2 * radius:  # row i holds what rows i to i + reach - 1 hold
            step = min(reach, 2 * radius + 1 - reach)
            wide, reach = wide[:-step] | wide[step:], reach + step
        region = wide.T
    return region


def _masked(picture: np.ndarray, values: np.ndarray, look: _Look) -> np.ndarray:
    return picture * (1 - look.alpha * (1 - values.clip(0)))[..., None]


_STYLES = {"heat": _heat, "contour": _contours, "mask": _masked}
STYLES = tuple(_STYLES)
"""The names that `style=` takes."""


def _colors(values: np.ndarray, colormap: str) -> np.ndarray:
    return colorize(values / 2 + 0.5 if colormap == SIGNED else values, colormap).astype(np.float32)


def _gray(picture: np.ndarray) -> np.ndarray:
    return (picture @ _LUMA)[..., None]


def _cropped(picture: np.ndarray, shown: np.ndarray, look: _Look) -> np.ndarray:
    """Dark and gray pixels for the cropped parts, with a line around the part that the network saw."""
    line = _grown(shown, look.radius)[..., None]
    return np.where(line, np.float32(0.5), np.float32(0.25) * _gray(picture))


def _size(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


def _map(map: Any) -> torch.Tensor:
    """Check a map, and return it as a float32 tensor `(h, w)` on the CPU."""
    values = tensor_of(map, "map", "a tensor or an array")
    if values.ndim != 2 or values.numel() == 0:
        raise CamError(f"map has shape {tuple(values.shape)}, but must be one map (h, w): index the batch, as in maps[0]")
    remedy = (
        "must lie in [0, 1], or in [-1, 1] if it is signed: methods return maps in [0, 1] by default (normalize=True); scale a "
        "raw one by camfn.maps.normalize(map, (-2, -1)), or a signed one by its largest absolute value"
    )
    checked = unit(values, "map", remedy, lowest=-1.0)
    return checked.where(checked < -slack(values), checked.clamp(0)).float()
