"""Which layers can be explained, and which one is where none is named."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Inputs, Layer, State
from camfn.capture import watch
from camfn.layouts import Clues, Sides
from camfn.ports import resolve_layers
from camfn.shell import Shell, shell_of
from camfn.targets import logits_of


class Candidate(NamedTuple):
    """A layer that can be explained: it runs once, and its output has spatial axes."""

    name: str
    kind: str  # its class
    shape: tuple[int, ...]  # of its output, with the batch
    class_maps: bool  # a channel for each class: what a fully convolutional head ends in


def candidates(model: nn.Module, state: State, x: Inputs, spatial_ndim: int) -> list[Candidate]:
    """The layers that can be explained, in the order of execution; one forward. The model itself is none of its layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    runs: Counter[str] = Counter()

    def see(name: str, args: tuple[Any, ...], out: object) -> None:
        runs[name] += 1
        if isinstance(out, Tensor):
            shapes[name] = tuple(out.shape)

    with torch.no_grad():
        logits = logits_of(watch(model, state, x, see))
    classes = logits.shape[1] if logits.ndim == 2 else None
    kinds = {name: type(module).__name__ for name, module in shell_of(model).module.named_modules()}
    return [
        Candidate(name, kinds[name], shape, shape[1] == classes)
        for name, shape in shapes.items()
        if name and runs[name] == 1 and len(shape) == spatial_ndim + 2 and math.prod(shape[2:]) > 1
    ]


def last_of(found: Sequence[Candidate], model: nn.Module, spatial_ndim: int) -> str:
    """The layer that is chosen where none is named: the last, but class maps only where there is nothing else.

    As torchcam's rule, but for the class maps, the model itself, and layers that run more than once.
    """
    if not found:
        raise CamError(
            f"no layer of {type(model).__name__} has {spatial_ndim} spatial axes of more than one position; "
            "name one: [name for name, _ in model.named_modules()]"
        )
    return ([layer for layer in found if not layer.class_maps] or found)[-1].name


def choose(model: nn.Module, state: State, x: Inputs, spatial_ndim: int) -> str:
    """The last layer, in the order of execution, whose output still has spatial axes; one forward."""
    return last_of(candidates(model, state, x, spatial_ndim), model, spatial_ndim)


def clues_of(model: nn.Module, spatial: Sides | None) -> Clues:
    """What the layers of a model tell about the layout of its activations, for an input of this size."""
    first: set[int] = set()
    last: set[int] = set()
    grids: set[Sides] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd):
            first |= {module.in_channels, module.out_channels}
            if spatial is not None and len(spatial) == len(module.kernel_size) and max(module.stride) > 1:
                grids.add(_strided(module, spatial))
        elif isinstance(module, _NormBase):
            first.add(module.num_features)
        elif isinstance(module, nn.GroupNorm):
            first.add(module.num_channels)
        elif isinstance(module, nn.LayerNorm):
            last.add(module.normalized_shape[-1])
    return Clues(frozenset(first), frozenset(last), frozenset(grids))


def _strided(conv: _ConvNd, spatial: Sides) -> Sides:
    """What a convolution makes of a grid."""
    padding = (0,) * len(spatial) if isinstance(conv.padding, str) else conv.padding
    knobs = zip(spatial, conv.kernel_size, conv.stride, padding, conv.dilation)
    return tuple((side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, dilation in knobs)


def find_linear(shell: Shell, model: nn.Module, fc: Layer | None, channels: int, output: Any) -> str:
    """The name of the linear layer (or 1x1 convolution) that takes `channels` and gives the model's classes."""
    classes = logits_of(output).shape[-1]
    modules = shell.distinct()
    if fc is not None:
        try:
            (name,) = resolve_layers(shell, model, fc)
        except CamError as error:
            raise CamError(f"fc={fc!r}: {error}") from None
        if name not in modules:
            raise CamError(f"fc={fc!r} names a layer, without a part or a call")
        _check_linear(name, modules[name], channels, classes)
        return name
    linear = {name: module for name, module in modules.items() if _sides(module) is not None}
    fitting = [name for name, module in linear.items() if _sides(module) == (channels, classes)]
    if len(fitting) == 1:
        if not _compat.transformed():
            warn(f"fc=None: {fitting[0]!r} was found, the only linear layer of {channels} channels and {classes} classes")
        return fitting[0]
    if fitting:
        raise CamError(f"several layers could be fc=: {', '.join(map(repr, fitting))}; name the one behind the pooling")
    found = ", ".join(f"{name!r} {_sides(module)}" for name, module in linear.items()) or "no linear layer at all"
    raise CamError(
        f"cam needs a linear layer from the layer's {channels} channels to {classes} classes, behind global average pooling; "
        f"found {found}; name another layer, or another method"
    )


def _check_linear(name: str, module: nn.Module, channels: int, classes: int) -> None:
    sides = _sides(module)
    if sides is None:
        raise CamError(f"fc={name!r} is a {type(module).__name__}, not a Linear or a 1x1 convolution")
    if sides[0] != channels:
        raise CamError(f"fc={name!r} takes {sides[0]} inputs, and the layer has {channels} channels: CAM needs one for each")
    if sides[1] != classes:
        raise CamError(f"fc={name!r} gives {sides[1]} values, and the model gives {classes} classes")


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that is linear in channels; else `None`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd) and math.prod(module.kernel_size) == 1 and module.groups == 1 and not module.transposed:
        return module.in_channels, module.out_channels
    return None
