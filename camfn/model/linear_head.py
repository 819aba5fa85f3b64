"""The linear layer after global pooling, with its matrix and bias."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError, warn
from camfn._types import Layer, State
from camfn.model.ports import resolve_layers
from camfn.model.private_copy import PrivateCopy, is_quantized
from camfn.targets import logits_of


def find_linear(private: PrivateCopy, fc: Layer | None, channels: int, output: Any) -> str:
    """Return the name of the linear layer (or 1x1 convolution) from `channels` inputs to the model's classes."""
    classes = logits_of(output).shape[-1]
    modules = private.distinct()
    if fc is not None:
        try:
            (name,) = resolve_layers(private, fc)
        except CamError as error:
            raise CamError(f"fc={fc!r}: {error}") from None
        if name not in modules:
            raise CamError(f"fc={fc!r} must name a layer, without a part or a call")
        _check_linear(name, modules[name], channels, classes)
        return name
    linear = {name: taken for name, module in modules.items() if (taken := sides(module)) is not None}
    fitting = [name for name, taken in linear.items() if taken == (channels, classes) and not is_auxiliary(name)]
    if len(fitting) == 1:
        if not _compat.transformed():
            warn(f"fc=None: {fitting[0]!r} was found, the only linear layer from {channels} channels to {classes} classes")
        return fitting[0]
    if fitting:
        raise CamError(f"several layers could be fc=: {', '.join(map(repr, fitting))}; name the one after the pooling")
    heads = [f"{name!r} {taken}" for name, taken in linear.items() if taken[1] == classes]  # not all, which may be hundreds
    found = ", ".join(heads) or ("no linear layer with that many classes" if linear else "no linear layer at all")
    raise CamError(
        f"cam needs a linear layer from the layer's {channels} channels to {classes} classes, after global average pooling; "
        f"found {found}; name another layer, or another method"
    )


def is_auxiliary(name: str) -> bool:
    """Return True for layers of an auxiliary head, which is used in training only, by torchvision's names."""
    return any(part.startswith("aux") for part in name.lower().split("."))


def linear_of(private: PrivateCopy, state: State, name: str) -> tuple[Tensor, Tensor]:
    """Return the matrix `(classes, channels)` of a linear layer, and its bias `(classes,)`."""
    weight, bias = (private.aliases.get(f"{name}.{part}") for part in ("weight", "bias"))
    module: Any = private.modules[name]
    if weight is not None and (bias is not None or getattr(module, "bias", None) is None):
        matrix = state[weight].flatten(1)
        return matrix, matrix.new_zeros(len(matrix)) if bias is None else state[bias]
    if is_quantized(module):
        matrix, bias = module.weight().dequantize().flatten(1), module.bias()
        return matrix, matrix.new_zeros(len(matrix)) if bias is None else bias
    # A parametrized weight is computed in each forward: run the layer on the unit vectors.
    channels, _ = sides(module) or (0, 0)
    own = {slot.removeprefix(f"{name}."): state[of] for slot, of in private.slots.items() if slot.startswith(f"{name}.")}
    like = next((tensor for tensor in own.values() if tensor.is_floating_point()), torch.zeros(()))
    inputs = torch.eye(channels + 1, channels, dtype=like.dtype, device=like.device)  # the last row gives the bias
    inputs = inputs.reshape(*inputs.shape, *(1,) * (len(module.kernel_size) if isinstance(module, _ConvNd) else 0))
    rows = functional_call(module, own, (inputs,), tie_weights=False).flatten(1)
    return (rows[:-1] - rows[-1:]).mT, rows[-1]


def _check_linear(name: str, module: nn.Module, channels: int, classes: int) -> None:
    taken = sides(module)
    if taken is None:
        raise CamError(f"fc={name!r} is a {type(module).__name__}, not a Linear or a 1x1 convolution")
    if taken[0] != channels:
        raise CamError(f"fc={name!r} takes {taken[0]} inputs, and the layer has {channels} channels: the two must be equal")
    if taken[1] != classes:
        raise CamError(f"fc={name!r} has {taken[1]} outputs, and the model has {classes} classes")


def is_convolution(module: nn.Module) -> TypeGuard[_ConvNd]:
    """Return True for torch's convolutions, quantized or not."""
    return isinstance(module, _ConvNd) or (is_quantized(module) and {"kernel_size", "groups"} <= vars(module).keys())


def first_convolution(model: nn.Module) -> _ConvNd | None:
    """Return the first convolution among the registered modules."""
    return next(filter(is_convolution, model.modules()), None)


def sides(module: Any) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a layer that is linear in its channels, else `None`."""
    if isinstance(module, nn.Linear) or (is_quantized(module) and hasattr(module, "in_features")):
        return module.in_features, module.out_features
    if is_convolution(module) and math.prod(module.kernel_size) == 1 and module.groups == 1 and not module.transposed:
        return module.in_channels, module.out_channels
    return None
