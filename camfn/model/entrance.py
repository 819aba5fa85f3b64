"""The axes of an input, as a forward pass shows them: where the first layer that knows its channels finds each of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from camfn import _compat
from camfn._axes import Axes, unclear_of, usual
from camfn.model.linear_head import first_convolution

_MOST = 6
"""The number of layers that are looked at: the first ones may belong to a companion input."""

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_CHANNELS: dict[Any, int] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d, F.batch_norm, F.group_norm, F.instance_norm), 1),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), 1),
    **dict.fromkeys((F.linear, F.multi_head_attention_forward, *_RECURRENT), -1),
}
"""The channel axis of the input of each function."""
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

Run = Callable[[Tensor], Any]


class _Entrance(NamedTuple):
    """A layer that knows which axis of its input has the channels."""

    function: Any
    given: Tensor
    channel: int  # the axis


class _Stop(BaseException):
    """Ends a forward pass. No model catches it."""


class _Entrances(TorchFunctionMode):
    """Collect the first entrances of a forward pass, and stop it. A convolution of the image itself needs no other."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image
        self.found: list[_Entrance] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        axis = _CHANNELS.get(func)
        if axis is not None and args and isinstance(args[0], Tensor):
            given = args[0].detach()
            self.found.append(_Entrance(func, given.clone(), axis % given.ndim))
            if len(self.found) == _MOST or _takes(self.found[-1], self.image):
                raise _Stop
        return func(*args, **(kwargs or {}))


def _takes(entrance: _Entrance, image: Tensor) -> bool:
    """Whether a convolution is given the image as it is."""
    function, given, _ = entrance
    return _CONVOLUTIONS.get(function) == image.ndim - 2 and given.shape == image.shape and torch.equal(given, image)


def axes_of(model: nn.Module, image: Tensor, run: Run) -> Axes:
    """The order of the axes of `image`, the input as the model takes it.

    An input of the usual order, whose second axis alone has the channels of some layer, needs no forward pass. In all other
    cases, `run(image)` is called a few times for each axis, and stops at the first layers. It gets an image of the same shape
    with half of the axis changed.
    """
    if image.ndim < 3:
        return usual(image.ndim)
    widths = _widths(model)
    conv = first_convolution(model)
    if _fits(image, conv) and not widths & {*image.shape[2:]}:
        return usual(image.ndim)
    letters = _observed(image, run)
    if letters is not None:
        return Axes(letters)
    return usual(image.ndim) if _is_usual(image, conv) else unclear_of(image.ndim, _WAYS.get(image.ndim, ()))


_WAYS = {3: ("ncw", "ntc", "nhw"), 4: ("nchw", "nhwc"), 5: ("ncdhw", "ndhwc", "ntchw")}


def _widths(model: nn.Module) -> set[int]:
    """The channel counts that layers take."""
    names = ("in_channels", "in_features", "input_size", "embed_dim")
    found = (vars(module).get(name) for module in model.modules() for name in names)
    return {width for width in found if isinstance(width, int)}


def _fits(image: Tensor, conv: Any) -> bool:
    """Whether an image of the usual order has the convolution's channels."""
    return conv is not None and image.ndim == len(conv.kernel_size) + 2 and image.shape[1] == conv.in_channels


def _is_usual(image: Tensor, conv: Any) -> bool:
    """Whether the usual order is the only one that fits the shape, where no layer shows the axes."""
    if max(image.shape[1:]) == 1 or (_fits(image, conv) and image.shape[1] not in image.shape[2:]):
        return True
    colors = [side in _COLORS for side in image.shape[1:]]
    return colors == [True, False, False] and not _fits(image.movedim(-1, 1), conv)


_COLORS = (1, 3, 4)
"""Channels of gray and color pictures, with or without transparency."""


_RANGES = (1.0, 255.0)
"""The ranges of the noise. A model that rounds or thresholds bytes sees nothing of a change between 0 and 1."""


def _observed(image: Tensor, run: Run) -> str | None:
    """The letters of the axes, by forward passes of changed images; None if they do not show."""
    with _compat.outside_transforms(), torch.no_grad():
        for most in _RANGES:
            drawn = torch.rand(2, *image.shape, generator=torch.Generator().manual_seed(0), device="cpu")
            low, high = (most * torch.stack([0.4 * drawn[0], 0.6 + 0.4 * drawn[1]])).to(image.device, image.dtype)
            try:
                if (letters := _shown(low, high, run)) is not None:
                    return letters
            except Exception:  # the clean forward pass will say what is wrong
                return None
    return None


def _shown(image: Tensor, other: Tensor, run: Run) -> str | None:
    """The letters that the first layers show. No value of `other` is near that of `image`, and they differ by no constant."""
    base = _entrances(image, run)
    if base and _takes(base[-1], image):
        return usual(image.ndim).letters
    halves = {axis: [_entrances(_mixed(image, other, axis, half), run) for half in (0, 1)] for axis in range(1, image.ndim)}
    for number, entrance in enumerate(base):
        if any(len(found) <= number for pair in halves.values() for found in pair):
            return None  # the forward pass took another way
        given = {axis: [found[number].given for found in pair] for axis, pair in halves.items()}
        if any(other.shape != entrance.given.shape for pair in given.values() for other in pair):
            return None
        where = {axis: _found(entrance.given, *pair) for axis, pair in given.items()}
        if any(place.axis is not None or place.mixed for place in where.values()):
            return _letters(entrance, _with_single(entrance, where, image.shape), image.shape)
    return None


def _entrances(image: Tensor, run: Run) -> list[_Entrance]:
    mode = _Entrances(image)
    try:
        with mode:
            run(image)
    except _Stop:
        pass
    return mode.found


def _mixed(image: Tensor, other: Tensor, axis: int, half: int) -> Tensor:
    """The image with one half of one axis taken from another; all of an axis of length 1."""
    place = torch.arange(image.shape[axis], device=image.device)
    first = place < (len(place) + 1) // 2
    taken = first if half == 0 or len(place) == 1 else ~first
    return torch.where(taken.reshape(-1, *[1] * (image.ndim - axis - 1)), other, image)


class _Place(NamedTuple):
    """Where a layer finds an axis of the input."""

    axis: int | None  # the layer's axis; None if the axis is not found in one alone
    mixed: bool  # whether both halves of the axis reach all that the layer gets, as after a mean over it


def _found(base: Tensor, first: Tensor, second: Tensor) -> _Place:
    differs = base != first
    return _Place(_moved(differs), bool(differs.any()) and bool((base != second).any()))


def _with_single(entrance: _Entrance, where: dict[int, _Place], shape: Sequence[int]) -> dict[int, _Place]:
    """Place axes of length 1, which no change tells apart: where they are, if the layer has all other axes in their order."""
    given = entrance.given.shape
    others = {axis: place.axis for axis, place in where.items() if shape[axis] > 1}
    if given != shape or any(axis != place for axis, place in others.items()):
        return where
    return {axis: place if shape[axis] > 1 else _Place(axis, False) for axis, place in where.items()}


def _moved(differs: Tensor) -> int | None:
    """The axis along which the differences vary, if it is one alone."""
    alone = []
    for axis in range(differs.ndim):
        line = differs.any(tuple(other for other in range(differs.ndim) if other != axis), keepdim=True)
        if bool(line.any()) and not bool(line.all()) and torch.equal(line.expand_as(differs), differs):
            alone.append(axis)
    return alone[0] if len(alone) == 1 else None


def _letters(entrance: _Entrance, where: dict[int, _Place], shape: Sequence[int]) -> str | None:
    """The letters of the input's axes, from the axis of the entrance at which each was found."""
    function, given, channel = entrance
    sides = _CONVOLUTIONS.get(function, 0)
    channels = [axis for axis, place in where.items() if place.axis == channel]
    lost = [axis for axis, place in where.items() if place.axis is None]
    if not channels and len(lost) == 1 and where[lost[0]].mixed and _may_be_mixed(entrance, shape[lost[0]], sides):
        channels = lost  # the only channel, or channels of which each depends on all, as after a layer norm
    single = bool(sides) and given.shape[channel] == 1  # so frames may be taken one by one
    if len(channels) > 1 or (not channels and (any(where[axis].mixed or not single for axis in lost) or not sides)):
        return None
    rest = {axis: place.axis for axis, place in where.items() if axis not in channels}
    named = _by_convolution(sides, rest, channels) if sides else None
    if named is None and channels:
        named = _by_order([*rest], function in _RECURRENT)
    if named is None or len(set(named.values())) < len(rest):
        return None
    letters = {0: "n", **dict.fromkeys(channels, "c"), **named}
    return "".join(letters[axis] for axis in range(len(shape)))


def _may_be_mixed(entrance: _Entrance, length: int, sides: int) -> bool:
    """Whether an axis that reaches everything may be the channels': it is a single one, or a convolution found the others."""
    width = entrance.given.shape[entrance.channel]
    return (sides > 0 and width in (1, length)) or (length == 1 and (sides > 0 or width == 1))


def _by_convolution(sides: int, where: dict[int, int | None], channels: list[int]) -> dict[int, str] | None:
    """The letters by the convolution's own axes. Frames that it takes one by one, or as its batch, are time.

    So is an axis alone before the channels, as in `(n, t, c, h, w)`.
    """
    letters = {1: "w", 2: "hw", 3: "dhw"}[sides]
    names: dict[int | None, str] = {**dict(enumerate(letters, 2)), 0: "t", None: "t"}
    if not {*range(2, sides + 2)} <= {*where.values()}:
        return None  # it does not find its own axes in the input
    found = {axis: names[place] for axis, place in where.items() if place in names}
    alone = channels == [2]
    return {axis: "t" if letter == "d" and alone and axis == 1 else letter for axis, letter in found.items()}


def _by_order(rest: list[int], recurrent: bool) -> dict[int, str] | None:
    """The letters by the order of the axes."""
    names = {1: "t" if recurrent else "w", 2: "hw", 3: "dhw", 4: "tdhw"}.get(len(rest))
    return None if names is None else dict(zip(rest, names))
