"""Where a layer's activation has its channels. Inside, it is `(n, c, p)`: positions flattened, the grid beside it."""

import math
from typing import NamedTuple

from torch import Tensor

from camfn._errors import CamError, layer_called
from camfn._types import Activations, Layout


class Read(NamedTuple):
    """An activation and the grid that its positions lie on."""

    values: Activations
    grid: tuple[int, ...]


def channels_first(activation: Tensor) -> Tensor:
    """`(n, c, *grid)`, as convolutions have it."""
    return activation


def channels_last(activation: Tensor) -> Tensor:
    """`(n, *grid, c)`, as Swin and ConvNeXt blocks have it."""
    return activation.movedim(-1, 1)


_NAMED = {"channels_first": channels_first, "channels_last": channels_last}


def read(activation: Tensor, layout: Layout, spatial: tuple[int, ...] | None, layer: str, batch: int) -> Read:
    """The activation as `(n, c, p)`. `spatial` is the size of the masked input, if there is one."""
    if layout == "auto":
        layout = "channels_last" if _looks_channels_last(activation, spatial) else "channels_first"
    if layout not in _NAMED if isinstance(layout, str) else not callable(layout):
        raise CamError(f'layout must be "auto", "channels_first", "channels_last" or a callable; found {layout!r}')
    moved = (_NAMED[layout] if isinstance(layout, str) else layout)(activation)
    if moved.ndim < 3 or math.prod(moved.shape[2:]) == 0:
        raise CamError(
            f"{layer_called(layer)} gives {tuple(activation.shape)}, which has no spatial axes; "
            "choose a layer before pooling and flattening, or pass layout= to say where they are"
        )
    if moved.shape[0] != batch:
        raise CamError(
            f"{layer_called(layer)} gives a batch of {moved.shape[0]} for x with a batch of {batch}: "
            "is the batch axis of x missing? (x[None] adds one)"
        )
    return Read(moved.flatten(2), tuple(moved.shape[2:]))


def _looks_channels_last(activation: Tensor, spatial: tuple[int, ...] | None) -> bool:
    """Only where the grid has the input's proportions read this way, and is far from them the other way."""
    if spatial is None or len(spatial) < 2 or activation.ndim != len(spatial) + 2:
        return False
    return _distortion(spatial, activation.shape[2:]) > 4 and _distortion(spatial, activation.shape[1:-1]) < 1.25


def _distortion(spatial: tuple[int, ...], grid: tuple[int, ...]) -> float:
    ratios = [side / max(cell, 1) for side, cell in zip(spatial, grid)]
    return max(ratios) / min(ratios)
