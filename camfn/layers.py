"""Which layer to explain, where none is named."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Inputs, Layer, State
from camfn.capture import resolve_layers, watch
from camfn.shell import Shell
from camfn.targets import logits_of


def choose(model: nn.Module, state: State, x: Inputs, spatial_ndim: int) -> str:
    """The last layer, in the order of execution, whose output still has spatial axes; one forward.

    As torchcam's rule, with three exceptions: the model itself (a segmentation model's output is no layer), layers that run
    more than once, and the class maps of a fully convolutional head, which have a channel for each class, where something
    else is left.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    runs: Counter[str] = Counter()

    def see(name: str, out: object) -> None:
        runs[name] += 1
        if isinstance(out, Tensor):
            shapes.pop(name, None)
            shapes[name] = tuple(out.shape)

    with torch.no_grad():
        output = watch(model, state, x, see)
    spatial = [
        (name, shape)
        for name, shape in shapes.items()
        if name and runs[name] == 1 and len(shape) == spatial_ndim + 2 and math.prod(shape[2:]) > 1
    ]
    if not spatial:
        raise CamError(
            f"no layer of {type(model).__name__} has {spatial_ndim} spatial axes of more than one position; "
            "name one: [name for name, _ in model.named_modules()]"
        )
    logits = logits_of(output)
    features = [name for name, shape in spatial if logits.ndim != 2 or shape[1] != logits.shape[1]]
    return features[-1] if features else spatial[-1][0]


def find_linear(shell: Shell, model: nn.Module, fc: Layer | None, channels: int, output: Any) -> str:
    """The name of the linear layer (or 1x1 convolution) that takes `channels` and gives the model's classes."""
    classes = logits_of(output).shape[-1]
    modules = dict(shell.module.named_modules())
    if fc is not None:
        try:
            (name,) = resolve_layers(shell, model, fc)
        except CamError as error:
            raise CamError(f"fc={fc!r}: {error}") from None
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
