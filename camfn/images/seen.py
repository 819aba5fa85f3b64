"""The picture that a network saw: its input with the scaling of colors undone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camfn.formulas import maps
from camfn.images.pictures import pillow
from camfn.images.preprocessing import pixels_of, random_states_kept


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
    with random_states_kept():
        undo = _measure_inverse(preprocess, size, x)
    if undo is not None:
        return undo(x).clamp(0, 1).movedim(0, -1).expand(-1, -1, 3), True
    gray = x if x.shape[0] in (1, 3) else x.mean(0, keepdim=True)
    return maps.normalize(gray, (-3, -2, -1)).movedim(0, -1).expand(-1, -1, 3), False


def _measure_inverse(preprocess: Callable[[Any], Any], size: tuple[int, int], x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the inverse of `preprocess` on colors, or `None` if it is not a scale and an offset per channel."""
    if x.shape[0] not in (1, 3):
        return None
    new = pillow().Image.new

    def of(*color: int) -> Tensor:
        return pixels_of(preprocess, new("RGB", size, color)).detach().cpu().double().reshape(x.shape)

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
