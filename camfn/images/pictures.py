"""Pictures of any kind, PIL images, tensors or arrays, as arrays and as RGB images. Pillow is imported on use."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from camfn._errors import CamError

if TYPE_CHECKING:
    from PIL.Image import Image


def pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise CamError("pictures need Pillow: pip install 'camfn[cli]'") from error
    return PIL


def array_of(image: Any) -> np.ndarray:
    """Check a picture, and return it as an array `(h, w, 3)`, of uint8 or of floats in [0, 1]."""
    if hasattr(image, "convert"):
        return np.asarray(rgb(image, "image"))
    values = tensor_of(image, "image", "a PIL image, a tensor or an array")
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise CamError(f"image is {values.dtype}: it must be uint8, or floats in [0, 1]")
    if values.dtype == torch.uint8:
        return _channels_last(values).expand(-1, -1, 3).numpy()
    remedy = "must lie in [0, 1]: undo the normalization (image * std + mean), or divide by 255"
    return unit(_channels_last(values), "image", remedy).expand(-1, -1, 3).numpy()


def image_of(image: Any) -> "Image":
    """Check a picture of any kind, and return it as an RGB image."""
    values = array_of(image)
    return pillow().Image.fromarray(values if values.dtype == np.uint8 else np.rint(values * 255).astype(np.uint8))


def unit(values: Tensor, name: str, remedy: str, lowest: float = 0.0) -> Tensor:
    """Return `values` as float64 in [lowest, 1]. Raise CamError if they are outside by more than rounding."""
    rounding, values = slack(values), values.double()
    if not bool(torch.isfinite(values).all()):
        raise CamError(f"{name} has NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < lowest - rounding or high > 1 + rounding:
        raise CamError(f"{name} has values from {low:.4g} to {high:.4g}, but {remedy}")
    return values.clamp(lowest, 1)


def slack(values: Tensor) -> float:
    """The largest rounding error of values of a size of 1."""
    return 4 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0


def tensor_of(values: Any, name: str, wanted: str) -> Tensor:
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


def rgb(image: Any, name: str) -> "Image":
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
    return pillow().Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
