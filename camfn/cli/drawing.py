"""The pictures that `camfn explain` writes: maps over the photo, each by itself or all on one page."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from camfn import images
from camfn._errors import CamError
from camfn.cli import page
from camfn.cli.options import LARGEST, Wish
from camfn.explanation import Picture
from camfn.explanation.pictures import resized, unplaced, view_or_error
from camfn.images import View

if TYPE_CHECKING:
    from PIL.Image import Image

Views = dict[tuple[int, int], View | CamError]
"""Where the input lies on a photo, by its size, or why that is not known."""


def ground(wish: Wish, photo: "Image", x: Tensor, preprocess: Any, views: Views) -> tuple[Picture, tuple[str, ...]]:
    """Return the picture to draw on, in the size that is wished, and notes about it.

    It is the photo, or the picture as the network saw it: where that is wished, or preprocess cannot be undone.
    """
    notes: tuple[str, ...] = ()
    if wish.size != "input":
        if photo.size not in views:
            views[photo.size] = view_or_error(preprocess, photo.size)
        view = views[photo.size]
        if isinstance(view, View):
            return _in_size(Picture(photo, view), wish.size)
        notes = (unplaced(view),)
    seen, true_colors = images.as_seen(x[0], preprocess, photo.size)
    if not true_colors:
        notes = (*notes, "the overlay's colors are stretched: preprocess does more than scale each channel")
    image = images.image_of(seen)
    found, more = _in_size(Picture(image, images.whole(image.size, image.size)), wish.size)
    return found, (*notes, *more)


def _in_size(picture: Picture, wanted: Any) -> tuple[Picture, tuple[str, ...]]:
    """Scale the picture to fit into (height, width). Otherwise it keeps its size, up to the maximal number of pixels."""
    width, height = picture.image.size
    if isinstance(wanted, tuple):
        return resized(picture, min(wanted[0] / height, wanted[1] / width)), ()
    if width * height <= LARGEST:
        return picture, ()
    found = resized(picture, math.sqrt(LARGEST / (width * height)))
    size = " x ".join(map(str, found.image.size))
    return found, (f"the picture is drawn with {size} pixels, since the photo has more than {LARGEST // 10**6} megapixels",)


def overlay(wish: Wish, picture: Picture, map: Tensor) -> "Image":
    """Draw one map, `(h, w)` in [0, 1], over the picture."""
    how: dict[str, Any] = {"style": wish.style, "alpha": wish.alpha, "colormap": wish.colors}
    return images.overlay(picture.image, map, view=picture.view, **how)


def single(wish: Wish, picture: Picture, map: Tensor, caption: Sequence[str]) -> "Image":
    """Draw one map, with its caption below if there is one."""
    drawn = overlay(wish, picture, map)
    return page.drawn([page.Cell(drawn, caption)], 1) if caption else drawn


def together(
    wish: Wish, picture: Picture, maps: Sequence[Tensor], captions: Sequence[Sequence[str]], group: int, title: Sequence[str]
) -> "Image":
    """Draw all maps on one page. `group` is the number of maps that belong together: the classes."""
    width, height = page.panel_size(picture.image.size, 1)
    lines = max(map(len, captions))
    columns = page.columns_of(len(maps), group, height / width + lines / 12)
    small = resized(picture, page.panel_size(picture.image.size, columns)[0] / picture.image.width)
    cells = [page.Cell(overlay(wish, small, map), caption) for map, caption in zip(maps, captions)]
    bar = page.Bar(wish.alpha, wish.colors) if wish.style == "heat" else None
    return page.drawn(cells, columns, title, bar)
