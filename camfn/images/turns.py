"""Photos with an EXIF tag that turns them: upright, and turned back for a preprocessing that ignores the tag."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from camfn.images.pictures import image_of, pillow, rgb
from camfn.images.reading import read

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112
_BACK = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}
"""For each value of the EXIF tag, the operation of Pillow that turns an upright photo back to how it is stored."""


def upright(image: Any) -> "tuple[Image, int | None]":
    """Return a picture as an upright RGB image, and the value of its EXIF tag if the tag turned it.

    - `image`: a PIL image, an array or tensor (`camfn.images.overlay`), or a path.
    """
    if isinstance(image, (str, os.PathLike)):
        found = read(image)
        with pillow().Image.open(image) as file:
            return found, _turn(file)
    if not hasattr(image, "convert"):
        return image_of(image), None
    return rgb(pillow().ImageOps.exif_transpose(image), "image"), _turn(image)


def turned(preprocess: Callable[[Any], Any], turn: int | None) -> Callable[[Any], Any]:
    """The preprocessing of upright pictures that first turns them back to how they are stored."""
    if turn is None:
        return preprocess
    back = getattr(pillow().Image.Transpose, _BACK[turn])
    return lambda picture: preprocess(picture.transpose(back))


def _turn(image: Any) -> int | None:
    """The value of the EXIF tag "orientation" if it turns or mirrors the picture."""
    value = image.getexif().get(_ORIENTATION)
    return value if value in _BACK else None
