"""The axes of an input, as a forward pass shows them: where the first layer that knows its channels finds each of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from camfn import _compat
from camfn.model.axes import Axes, unclear_of, usual
from camfn.model.linear_head import is_convolution

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
    """Collect the first entrances of a forward pass, and stop it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Entrance] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        axis = _CHANNELS.get(func)
        if axis is not None and args and isinstance(args[0], Tensor):
            given = args[0].detach()
            self.found.append(_Entrance(func, given.clone(), axis % given.ndim))
            if len(self.found) == _MOST:
                raise _Stop
        return func(*args, **(kwargs or {}))


def axes_of(model: nn.Module, image: Tensor, run: Run) -> Axes:
    """The order of the axes of `image`, the input as the model takes it.

    An input of the usual order, whose second axis alone has the channels of the first convolution, needs no forward pass. In
    all other cases, `run(image)` is called once for each axis, and stops at the first layers. It gets an image of the same
    shape with half of the axis changed.
    """
    if image.ndim < 3:
        return usual(image.ndim)
    conv = next(filter(is_convolution, model.modules()), None)
    sides = list(image.shape[1:])
    if _fits(image, conv) and sides.count(sides[0]) == 1:
        return usual(image.ndim)
    letters = None if _compat.compiling() else _observed(image, run)
    if letters is not None:
        return Axes(letters)
    return usual(image.ndim) if _is_usual(image, conv) else unclear_of(image.ndim, _WAYS.get(image.ndim, ()))


_WAYS = {3: ("ncw", "ntc", "nhw"), 4: ("nchw", "nhwc"), 5: ("ncdhw", "ndhwc", "ntchw")}


def _fits(image: Tensor, conv: Any) -> bool:
    """Whether an image of the usual order has the convolution's channels."""
    return conv is not None and image.ndim == len(conv.kernel_size) + 2 and image.shape[1] == conv.in_channels


def _is_usual(image: Tensor, conv: Any) -> bool:
    """Whether the usual order is the only one that fits the shape, where no layer shows the axes."""
    return image.ndim == 4 and image.shape[-1] not in (1, 3, 4) and not _fits(image.movedim(-1, 1), conv)


def _observed(image: Tensor, run: Run) -> str | None:
    """The letters of the axes, by forward passes of changed images; None if they do not show."""
    with _compat.outside_transforms(), torch.no_grad():
        noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image.device, image.dtype)
        try:
            base = _entrances(noise, run)
            changed = {axis: _entrances(_half_changed(noise, axis), run) for axis in range(1, image.ndim)}
        except Exception:  # the clean forward pass will say what is wrong
            return None
    for number, entrance in enumerate(base):
        others = {axis: found[number] for axis, found in changed.items() if len(found) > number}
        if len(others) < len(changed) or any(other.given.shape != entrance.given.shape for other in others.values()):
            return None  # the forward pass took another way
        where = {axis: _moved(entrance.given != other.given) for axis, other in others.items()}
        if (letters := _letters(entrance, where, image.shape)) is not None:
            return letters
    return None


def _entrances(image: Tensor, run: Run) -> list[_Entrance]:
    mode = _Entrances()
    try:
        with mode:
            run(image)
    except _Stop:
        pass
    return mode.found


def _half_changed(image: Tensor, axis: int) -> Tensor:
    """The image with the first half of one axis changed; all of an axis of length 1."""
    changed = image.clone()
    some = changed.narrow(axis, 0, (image.shape[axis] + 1) // 2)
    some.copy_(1 - some)
    return changed


def _moved(differs: Tensor) -> int | None:
    """The axis along which the differences vary, if it is one alone."""
    alone = []
    for axis in range(differs.ndim):
        line = differs.any(tuple(other for other in range(differs.ndim) if other != axis), keepdim=True)
        if bool(line.any()) and not bool(line.all()) and torch.equal(line.expand_as(differs), differs):
            alone.append(axis)
    return alone[0] if len(alone) == 1 else None


def _letters(entrance: _Entrance, where: dict[int, int | None], shape: Sequence[int]) -> str | None:
    """The letters of the input's axes, from the axis of the entrance at which each was found."""
    function, given, channel = entrance
    channels = [axis for axis, place in where.items() if place == channel]
    lost = [axis for axis, place in where.items() if place is None]
    if not channels and given.shape[channel] == 1 and len(lost) == 1 and shape[lost[0]] == 1:
        channels = lost  # the only channel
    if len(channels) > 1 or (not channels and (lost or given.shape[channel] != 1)):
        return None
    letters = {0: "n", **dict.fromkeys(channels, "c")}
    rest = [axis for axis in where if axis not in channels]
    named = _by_convolution(_CONVOLUTIONS.get(function, 0), {axis: where[axis] for axis in rest}, channels)
    if named is None:
        named = _by_order(rest, function in _RECURRENT)
    if named is None or len(set(named.values())) < len(rest):
        return None
    letters.update(named)
    return "".join(letters[axis] for axis in range(len(shape)))


def _by_convolution(sides: int, where: dict[int, int | None], channels: list[int]) -> dict[int, str] | None:
    """The letters by the convolution's own axes. Axes that it takes as its batch are time, as are those before the channels."""
    if not sides or None in where.values() or len(set(where.values())) < len(where):
        return None
    names = dict(enumerate({1: "w", 2: "hw", 3: "dhw"}[sides], 2)) | {0: "t"}
    found = {axis: names[place] for axis, place in where.items() if place in names}
    early = [axis for axis in found if channels and axis < channels[0]]
    return {axis: "t" if letter == "d" and axis in early else letter for axis, letter in found.items()}


def _by_order(rest: list[int], recurrent: bool) -> dict[int, str] | None:
    """The letters by the order of the axes."""
    names = {1: "t" if recurrent else "w", 2: "hw", 3: "dhw", 4: "tdhw"}.get(len(rest))
    return None if names is None else dict(zip(rest, names))
