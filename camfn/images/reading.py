"""Picture files, and the largest pictures and inputs that are accepted."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from camfn._errors import CamError
from camfn._paths import kind
from camfn.images.pictures import pillow, rgb
from camfn.images.preprocessing import pixels_of, random_states_kept

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 100_000_000
"""The maximal number of pixels of a picture file."""


def read(path: str | os.PathLike[str] | IO[bytes]) -> "Image":
    """Read a picture file, given by its path or open, as an RGB image, rotated by its EXIF tag.

    Gray, palette, CMYK and 16-bit pictures are converted to 8-bit RGB. Opacity is dropped. Only the first frame is read.

    **Raises** `CamError` if the path is not a file, Pillow cannot read all of it, or it has more than 100 megapixels. The size
    is checked before a pixel is decoded.
    """
    pil, name, other = pillow(), str(getattr(path, "name", "the file")), None
    if isinstance(path, (str, os.PathLike)):
        name, other = repr(os.fspath(path)), kind(path)
    if other:
        raise CamError(f"{name} is {other}, not a picture" + ("" if other == "a folder" else ": copy it to a file first"))
    try:
        # A stream, not a path: Pillow memory-maps an uncompressed TIFF of a path, and garbles it if its tag rotates it.
        with _opened(path) as stream, pil.Image.open(stream) as file:
            if file.width * file.height > LARGEST:
                raise pil.Image.DecompressionBombError
            return rgb(pil.ImageOps.exif_transpose(file), name)
    except FileNotFoundError:
        raise CamError(f"there is no file {name}") from None
    except pil.UnidentifiedImageError:
        raise CamError(f"{name} is not a picture that Pillow can read") from None
    except pil.Image.DecompressionBombError:  # ours, or that of Pillow's own, larger limit
        raise CamError(f"{name} has more than {LARGEST // 10**6} megapixels: make it smaller first") from None
    except CamError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file: struct.error, IndexError, ...
        raise CamError(f"{name} cannot be read as a picture: {str(error) or type(error).__name__}") from error


def _opened(path: str | os.PathLike[str] | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return open(path, "rb") if isinstance(path, (str, os.PathLike)) else nullcontext(path)


# ------------------------------------------------------------------------------------------ the size of the input


ENLARGED = 16_000_000
"""The maximal number of pixels of a network input that is larger than its picture."""
_NARROW = 32  # the aspect ratio from which preprocess is first tried on a small picture
_PROBE_ASPECT = 8


def check_narrow(preprocess: Callable[[Any], Any], size: tuple[int, int]) -> None:
    """Raise CamError if `preprocess` would enlarge a narrow picture beyond the limit. A small picture is used to find out.

    Most preprocessing scales the shorter side to a fixed length. A picture of 1 x 10000 pixels would then exceed the memory
    before a crop. `size` is (width, height).
    """
    aspect = max(size) / min(size)
    scaled = None if aspect < _NARROW else _measure_scaling(preprocess, size[0] > size[1], min(*size, 64))
    if scaled is None:
        return
    short, cropped = scaled
    limit = LARGEST if cropped else max(ENLARGED, size[0] * size[1])
    if short**2 * aspect > limit:
        sides = (round(short * aspect), short) if size[0] > size[1] else (short, round(short * aspect))
        raise _size_error(size, "would make", sides, limit)


def _measure_scaling(preprocess: Callable[[Any], Any], wide: bool, side: int) -> tuple[int, bool] | None:
    """Return the length of the shorter side after `preprocess` of a narrow picture, and whether it crops.

    Return `None` if it changes the aspect ratio or fails. The ends of the probe are white, so that a crop can be detected.
    """
    new, long = pillow().Image.new, side * _PROBE_ASPECT
    probe = new("RGB", (long, side) if wide else (side, long))
    for start in (0, long - side):
        probe.paste((255, 255, 255), (start, 0, start + side, side) if wide else (0, start, side, start + side))
    try:
        with random_states_kept():
            x = pixels_of(preprocess, probe).detach().double()
        long, short = max(x.shape[-2:]), min(x.shape[-2:])
        cropped = float((x.amax((-2, -1)) - x.amin((-2, -1))).max()) < 1e-3
    except Exception:  # the picture itself will raise the error
        return None
    kept = long * 2 >= short * _PROBE_ASPECT
    return (short, not kept) if kept or cropped else None


def check_input(x: Tensor, size: tuple[int, int]) -> None:
    """Raise CamError if the input `(..., h, w)` of a picture of `size` (width, height) exceeds the limit."""
    height, width = x.shape[-2:]
    limit = max(ENLARGED, size[0] * size[1])
    if height * width > limit:
        raise _size_error(size, "makes", (width, height), limit)


def _size_error(size: tuple[int, int], verb: str, sides: tuple[int, int], limit: int) -> CamError:
    made, found = (" x ".join(map(str, each)) for each in (sides, size))
    return CamError(
        f"preprocess {verb} an input of {made} pixels of the picture's {found}, more than {limit // 10**6} megapixels: "
        "crop or pad the picture first"
    )
