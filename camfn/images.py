"""Images: read files, overlay maps, and recover the picture that a network saw. Pillow is imported on use."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from camfn._errors import CamError, closest
from camfn._paths import kind
from camfn.formulas import maps

if TYPE_CHECKING:
    from PIL.Image import Image


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise CamError("pictures need Pillow: pip install 'camfn[cli]'") from error
    return PIL


# ------------------------------------------------------------------------------------------------------ color maps


def _anchors(table: str) -> tuple[Any, ...]:
    colors = np.array([list(bytes.fromhex(color)) for color in table.split()]) / 255
    at = np.linspace(0, 1, len(colors))
    return tuple((at, colors[:, channel]) for channel in range(3))


_COLORMAPS = {
    "jet": (
        ((0.0, 0.35, 0.66, 0.89, 1.0), (0.0, 0.0, 1.0, 1.0, 0.5)),
        ((0.0, 0.125, 0.375, 0.64, 0.91, 1.0), (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)),
        ((0.0, 0.11, 0.34, 0.65, 1.0), (0.5, 1.0, 1.0, 0.0, 0.0)),
    ),
    "turbo": _anchors(
        "30123d 3b3183 434fbd 466be3 4786fc 3ba1fe 2abbeb 19d3d0 19e5b7 30f298 55fb74 7fff52 a4fd3b "
        "bef433 d7e434 edd03a fabb38 fea02e fb8020 f26013 e44509 d23004 b91e00 9c0f00 7a0401"
    ),
    "viridis": _anchors(
        "440153 471063 481f70 472c7b 443982 404687 3a528a 355d8c 30688d 2c728d 287c8d 24868d 20908c "
        "1e9a89 20a485 27ae80 35b778 47c06e 5cc862 74d054 8fd643 aadc31 c7e01f e3e317 fde724"
    ),
}
COLORMAPS = tuple(_COLORMAPS)
"""The names that `colormap=` takes."""


def colorize(values: Any, colormap: str = "turbo") -> np.ndarray:
    """Map values in [0, 1], of any shape, to RGB colors `(*shape, 3)` in [0, 1].

    - `colormap`: `"jet"`; `"turbo"`, as vivid as jet but without its false edges; or `"viridis"`, which is perceptually
      uniform and also readable in gray.

    The colors are matplotlib's, up to 1.9/255 for turbo and 1.4/255 for viridis, and exact for jet. They are interpolated
    between 25 fitted anchors. Raises `CamError` if the color map is unknown.

    >>> colorize([0.0, 1.0], "jet").tolist()
    [[0.0, 0.0, 0.5], [0.5, 0.0, 0.0]]
    """
    if colormap not in _COLORMAPS:
        raise CamError(
            f"no colormap named {colormap!r}; closest: {closest(str(colormap), COLORMAPS)}; all: {', '.join(COLORMAPS)}"
        )
    values = np.asarray(values, dtype=np.float64)
    return np.stack([np.interp(values, *lines) for lines in _COLORMAPS[colormap]], -1)


# -------------------------------------------------------------------------------------------------------- overlays


def overlay(image: Any, map: Any, *, alpha: float = 0.5, colormap: str = "turbo") -> "Image":
    """Overlay a map on its picture, as an RGB image of the picture's size.

        (1 - alpha) * picture + alpha * color(map)

    **Arguments**

    - `image`: a PIL image, or a tensor or array `(h, w)`, `(h, w, k)` or `(k, h, w)`, uint8 or floats in [0, 1]. k is 1
      (gray), 3 (RGB) or 4 (RGBA; the opacity is ignored).
    - `map`: `(h', w')` in [0, 1], the map of one image, such as `maps[0]` from a method of camfn. It is resized bilinearly to
      the picture (bicubic would overshoot) and not rescaled.
    - `alpha`: the weight of the MAP, the same everywhere. 0 gives the picture, 1 the colored map. (In torchcam's
      `overlay_mask` and in pytorch-grad-cam's `image_weight` it is the weight of the picture.)
    - `colormap`: a name of `camfn.images.COLORMAPS`.

    **Raises** `CamError` if the picture or map is out of range, not finite, or of another shape.

    >>> import torch
    >>> gray = torch.full((3, 6, 8), 0.5)
    >>> overlay(gray, torch.eye(2), alpha=0.0).getpixel((0, 0)), overlay(gray, torch.eye(2), colormap="jet").size
    ((128, 128, 128), (8, 6))
    """
    if not 0 <= alpha <= 1:
        raise CamError(f"alpha is the weight of the map, from 0 (the picture alone) to 1 (the map alone); found {alpha!r}")
    picture = _picture(image)
    resized = maps.resize(_map(map), picture.shape[:2]).numpy()
    blend = (1 - alpha) * picture + alpha * colorize(resized, colormap)
    return _pillow().Image.fromarray(np.rint(blend * 255).astype(np.uint8))


def _map(map: Any) -> Tensor:
    """Check a map, and return it as a float64 tensor `(h, w)` on the CPU."""
    values = _tensor(map, "map", "a tensor or an array")
    if values.ndim != 2 or values.numel() == 0:
        raise CamError(f"map has shape {tuple(values.shape)}, but must be one map (h, w): index the batch, as in maps[0]")
    return _unit(
        values,
        "map",
        "must lie in [0, 1]: methods return such maps by default (normalize=True), and "
        "camfn.maps.normalize(map, (-2, -1)) scales a raw or signed one",
    )


def _picture(image: Any) -> np.ndarray:
    """Check a picture, and return it as an array `(h, w, 3)` in [0, 1]."""
    if hasattr(image, "convert"):
        return np.asarray(_rgb(image, "image"), dtype=np.float64) / 255
    values = _tensor(image, "image", "a PIL image, a tensor or an array")
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise CamError(f"image is {values.dtype}: it must be uint8, or floats in [0, 1]")
    values = values.double() / 255 if values.dtype == torch.uint8 else values
    remedy = "must lie in [0, 1]: undo the normalization (image * std + mean), or divide by 255"
    return _unit(_channels_last(values), "image", remedy).expand(-1, -1, 3).numpy()


def _unit(values: Tensor, name: str, remedy: str) -> Tensor:
    """Return `values` as float64 in [0, 1]. Raise CamError if they are outside by more than rounding."""
    slack = 4 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    values = values.double()
    if not bool(torch.isfinite(values).all()):
        raise CamError(f"{name} has NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < -slack or high > 1 + slack:
        raise CamError(f"{name} has values from {low:.4g} to {high:.4g}, but {remedy}")
    return values.clamp(0, 1)


def _tensor(values: Any, name: str, wanted: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(np.array(values))  # a copy, since torch warns of read-only arrays
    except (TypeError, ValueError) as error:
        raise CamError(f"{name} must be {wanted}; found {type(values).__name__}") from error


def _channels_last(values: Tensor) -> Tensor:
    """Move the channels last, and drop an opacity: `(h, w, 1 or 3)`."""
    shape = tuple(values.shape)
    if values.ndim == 2 and values.numel():
        return values[..., None]
    first, last = (values.ndim == 3 and values.numel() > 0 and shape[axis] in (1, 3, 4) for axis in (0, -1))
    if first and last:
        raise CamError(f"image of shape {shape} could be (channels, h, w) or (h, w, channels); pass it as a PIL image")
    if not first and not last:
        raise CamError(
            f"image has shape {shape}, but must be one picture: (h, w), (h, w, k) or (k, h, w) with k = 1, 3 or 4 "
            "(index a batch, as in x[0])"
        )
    return (values.movedim(0, -1) if first else values)[..., :3]


def _rgb(image: Any, name: str) -> "Image":
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, name)
    # by way of RGBA, else Pillow warns of palettes with opacities
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _eight_bits(image: Any, name: str) -> "Image":
    """Convert a 16-bit gray picture to 8 bits. Pillow's own `convert` clips at 255, and would make nearly all white."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise CamError(
            f"{name} has pixels of mode {image.mode!r}, floats of an unknown range: scale them to 8 or 16 bits first"
        )
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise CamError(
            f"{name} has pixels of mode {image.mode!r} with values from {low} to {high}: scale them to 8 or 16 bits first"
        )
    return _pillow().Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


# --------------------------------------------------------------------------------------------------------- reading


LARGEST = 100_000_000
"""The maximal number of pixels of a picture file."""


def read(path: str | os.PathLike[str]) -> "Image":
    """Read a picture file as an RGB image, rotated by its EXIF tag.

    Gray, palette, CMYK and 16-bit pictures are converted to 8-bit RGB. Opacity is dropped. Only the first frame is read.

    **Raises** `CamError` if the path is not a file, Pillow cannot read all of it, or it has more than 100 megapixels. The size
    is checked before a pixel is decoded.
    """
    pillow, name, other = _pillow(), repr(os.fspath(path)), kind(path)
    if other:
        raise CamError(f"{name} is {other}, not a picture" + ("" if other == "a folder" else ": copy it to a file first"))
    try:
        # A stream, not a path: Pillow memory-maps an uncompressed TIFF of a path, and garbles it if its tag rotates it.
        with open(path, "rb") as stream, pillow.Image.open(stream) as file:
            if file.width * file.height > LARGEST:
                raise pillow.Image.DecompressionBombError
            return _rgb(pillow.ImageOps.exif_transpose(file), name)
    except FileNotFoundError:
        raise CamError(f"there is no file {name}") from None
    except pillow.UnidentifiedImageError:
        raise CamError(f"{name} is not a picture that Pillow can read") from None
    except pillow.Image.DecompressionBombError:  # ours, or that of Pillow's own, larger limit
        raise CamError(f"{name} has more than {LARGEST // 10**6} megapixels: make it smaller first") from None
    except CamError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file: struct.error, IndexError, ...
        raise CamError(f"{name} cannot be read as a picture: {str(error) or type(error).__name__}") from error


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
    new, long = _pillow().Image.new, side * _PROBE_ASPECT
    probe = new("RGB", (long, side) if wide else (side, long))
    for start in (0, long - side):
        probe.paste((255, 255, 255), (start, 0, start + side, side) if wide else (0, start, side, start + side))
    try:
        x = preprocess(probe).detach().double()
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


# ------------------------------------------------------------------------------------------- the picture of an input


def as_seen(x: Tensor, preprocess: Callable[[Any], Any], size: tuple[int, int]) -> tuple[Tensor, bool]:
    """Recover the picture in a network's input, with its colors.

    A map belongs to the resized and cropped input, so it should be drawn over that picture. The scaling of colors is measured
    on pictures of a single color, and undone. If it is not a scale and an offset per channel, the input is stretched to
    [0, 1] instead.

    - `x`: the network's input, `(k, h, w)`.
    - `preprocess`: the function from a PIL image to `x`.
    - `size`: the (width, height) of the original picture.

    Returns the picture `(h, w, 3)` in [0, 1], and whether its colors are true.
    """
    x = x.detach().cpu().double()
    undo = _measure_inverse(preprocess, size, x)
    if undo is not None:
        return undo(x).clamp(0, 1).movedim(0, -1).expand(-1, -1, 3), True
    gray = x if x.shape[0] in (1, 3) else x.mean(0, keepdim=True)
    return maps.normalize(gray, (-3, -2, -1)).movedim(0, -1).expand(-1, -1, 3), False


def _measure_inverse(preprocess: Callable[[Any], Any], size: tuple[int, int], x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the inverse of `preprocess` on colors, or `None` if it is not a scale and an offset per channel."""
    if x.shape[0] not in (1, 3):
        return None
    new = _pillow().Image.new

    def of(*color: int) -> Tensor:
        return preprocess(new("RGB", size, color)).detach().cpu().double().reshape(x.shape)

    try:
        black, white, probe = of(0, 0, 0), of(255, 255, 255), of(*_PROBE) if x.shape[0] == 3 else of(128, 128, 128)
        order = _order(black, of(255, 0, 0), of(0, 255, 0), of(0, 0, 255)) if x.shape[0] == 3 else [0]
    except Exception:  # preprocess may refuse pictures of a single color
        return None
    span = white - black
    shown = span.abs() > 1e-6 * span.abs().max()  # false in padding

    def undo(t: Tensor) -> Tensor:
        return torch.where(shown, (t - black) / torch.where(shown, span, 1), 0)[order]

    expected = torch.tensor(_PROBE if x.shape[0] == 3 else (128,), dtype=torch.float64)[:, None, None] / 255
    right = sorted(order) == list(range(len(order))) and bool(shown.any()) and bool(torch.isfinite(span).all())
    return undo if right and bool(((undo(probe) - expected).abs() < 0.01)[shown[order]].all()) else None


_PROBE = (64, 128, 192)


def _order(black: Tensor, *primaries: Tensor) -> list[int]:
    """Return the channels of red, green and blue, which may be in the order BGR."""
    return [int((primary - black).abs().sum((1, 2)).argmax()) for primary in primaries]
