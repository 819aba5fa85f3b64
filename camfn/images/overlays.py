"""Maps over pictures: in color, as contours, or as a mask."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from camfn._errors import CamError
from camfn.images.colors import colorize
from camfn.images.pictures import array_of, pillow, tensor_of, unit
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

        heat:     (1 - a) * faded + a * color(map),    a = alpha * |map|^0.6
        contour:  the picture, with lines of color(level) where |map| is 0.25, 0.5 and 0.75
        mask:     (1 - alpha * (1 - max(map, 0))) * picture

    `faded` is the picture with less color (by `alpha`) and less light (by `alpha / 2`), so that the highest value is the
    lightest on any picture. Parts of the picture that the network's input does not show are dark and gray.

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
    picture, values = array_of(image).astype(np.float32), _map(map)
    size = (picture.shape[1], picture.shape[0])
    if view is not None and view.photo != size:
        raise CamError(f"the view belongs to a photo of {_size(view.photo)} pixels, and the picture has {_size(size)}")
    laid, shown = (whole(size, size) if view is None else view).on_photo(values)
    chosen = colormap or default_colormap(values)
    drawn = _STYLES[style](picture, _drawn_values(laid.numpy(), chosen), alpha, chosen)
    return pillow().Image.fromarray(
        np.rint(np.where(shown.numpy()[..., None], drawn, _cropped(picture)) * 255).astype(np.uint8)
    )


def default_colormap(map: torch.Tensor) -> str:
    """The color map of a map: one with a middle for signed maps."""
    return SIGNED if bool((map < 0).any()) else UNSIGNED


def blended(picture: np.ndarray, values: np.ndarray, alpha: float, colormap: str) -> np.ndarray:
    """Blend the colors of values `(h, w)` in [-1, 1] with a picture `(h, w, 3)`: the style `"heat"`."""
    opacity = (alpha * np.abs(values) ** _GROWTH)[..., None]
    faded = (1 - alpha / 2) * ((1 - alpha) * picture + alpha * _gray(picture))
    return (1 - opacity) * faded + opacity * _colors(values, colormap)


def _contours(picture: np.ndarray, values: np.ndarray, alpha: float, colormap: str) -> np.ndarray:
    drawn, radius = picture.copy(), max(1, round(min(values.shape) / 250))
    for level in (*LEVELS, *(-level for level in LEVELS if colormap == SIGNED)):
        inside = torch.from_numpy(values >= level if level > 0 else values <= level)
        for width, color in ((2 * radius, np.ones(3, np.float32)), (radius, _colors(np.array(level), colormap))):
            line = _band(inside, width)[..., None]
            drawn = np.where(line, (1 - alpha) * drawn + alpha * color, drawn)
    return drawn


def _band(inside: torch.Tensor, radius: int) -> np.ndarray:
    """The pixels around the border of a region. The border of the picture itself is none."""

    def grown(region: torch.Tensor) -> torch.Tensor:
        wide = F.max_pool2d(region.float()[None, None], (2 * radius + 1, 1), 1, (radius, 0))
        return F.max_pool2d(wide, (1, 2 * radius + 1), 1, (0, radius))[0, 0] > 0

    return (grown(inside) & grown(~inside)).numpy()


def _masked(picture: np.ndarray, values: np.ndarray, alpha: float, colormap: str) -> np.ndarray:
    return picture * (1 - alpha * (1 - values.clip(0)))[..., None]


_STYLES = {"heat": blended, "contour": _contours, "mask": _masked}
STYLES = tuple(_STYLES)
"""The names that `style=` takes."""


def _drawn_values(values: np.ndarray, colormap: str) -> np.ndarray:
    """The values that a color map shows: a color map without a middle shows no negative ones."""
    return values if colormap == SIGNED else values.clip(0)


def _colors(values: np.ndarray, colormap: str) -> np.ndarray:
    return colorize(values / 2 + 0.5 if colormap == SIGNED else values, colormap).astype(np.float32)


def _gray(picture: np.ndarray) -> np.ndarray:
    return (picture @ _LUMA)[..., None]


def _cropped(picture: np.ndarray) -> np.ndarray:
    """What the network did not see: gray, darker than black and white are apart."""
    return 0.1 + 0.3 * _gray(picture) + np.zeros(3)


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
    return unit(values, "map", remedy, lowest=-1.0).float()
