"""Ports: read (seen), add to (nudge) or replace (swap) the output of a layer of the private copy.

A layer has the name that it has in the model. `"layer:key"` is one part of its output, `"layer@2"` its second call in a
forward pass.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError, layer_called, suggested
from camfn._types import Layer
from camfn.model.private_copy import PrivateCopy, without_wrappers

# ------------------------------------------------------------------------------------------------------- the names


class Place(NamedTuple):
    """A module, one of its calls, and a part of its output."""

    module: str
    call: int | None = None
    part: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.module + (f"@{self.call}" if self.call else ""), *self.part))


_PLACE = re.compile(r"(?P<module>.*?)(?:@(?P<call>[1-9]\d*))?(?::(?P<part>.+))?", re.DOTALL)


def place_of(name: str, known: Mapping[str, Any]) -> Place | None:
    """Parse the name of a place. Return None if its module is not `known`. Names of modules take precedence."""
    found = _PLACE.fullmatch(name)
    assert found is not None
    module, call, part = found.group("module", "call", "part")
    places = Place(name), Place(module, int(call) if call else None, tuple(part.split(":")) if part else ())
    return next((p._replace(module=m) for p in places for m in without_wrappers(p.module) if m in known), None)


def is_several(layer: Any) -> bool:
    """Return True for a sequence of layers, for which the result is a tuple."""
    return isinstance(layer, Sequence) and not isinstance(layer, str)


def resolve_layers(private: PrivateCopy, layer: Layer | Sequence[Layer]) -> list[str]:
    """Return the names in the private copy of layers that are given by name or as modules of the caller's model."""
    layers: Any = layer if is_several(layer) else [layer]
    paths = private.paths()
    return [_resolve_layer(private, layer, paths) for layer in layers]


def _resolve_layer(private: PrivateCopy, layer: Layer, paths: dict[int, str]) -> str:
    model = private.original
    if isinstance(layer, str):
        place = place_of(layer, private.modules)
        if place is not None:
            return str(place._replace(module=paths[id(private.modules[place.module])]))
        raise CamError(
            f"no layer named {layer!r} in {type(model).__name__}{suggested(layer, private.modules)} "
            "(all of them: [name for name, _ in model.named_modules()])"
        )
    if not isinstance(layer, nn.Module):
        raise CamError(f"layer must be a name or a module, or a sequence of them; found {type(layer).__name__}")
    if any(layer is not model and module is model for module in layer.modules()):
        raise CamError("model and layer are swapped: the model given is a part of the layer given")
    if id(layer) not in private.named:
        raise CamError(
            f"layer, a {type(layer).__name__}, is not a registered submodule of {type(model).__name__} "
            "(a module held by a plain list or another object is not; nn.ModuleList registers)"
        )
    return private.named[id(layer)]


# ------------------------------------------------------------------------------------------------------- the ports

Passes = Callable[[tuple[Any, ...], Any], Any]
"""A function `(positional arguments, output) -> output` that is applied to a layer's output."""


class Port:
    """The port at one place: its tensor is stored in `seen`, and changed by `nudge` and `swap`."""

    __slots__ = ("call", "name", "nudge", "part", "seen", "swap")

    def __init__(self, place: Place) -> None:
        self.name, self.call, self.part = str(place), place.call, place.part
        self.set(None, None)

    def set(self, nudge: Any, swap: Tensor | None) -> None:
        """Prepare the next run. A nudge is a tensor, or a function from the layer's output to one."""
        self.seen: Tensor | None = None
        self.nudge, self.swap = nudge, swap


class _Gate:
    """The ports of one module."""

    __slots__ = ("calls", "over", "ports")

    def __init__(self) -> None:
        self.calls = 0
        self.over = False  # whether the forward has ended; a checkpointed block runs again in the backward
        self.ports: list[Port] = []

    def __call__(self, args: tuple[Any, ...], out: Any) -> Any:
        if self.over:
            return self._again(out)
        self.calls += 1
        for port in self.ports:
            out = _apply(port, out) if port.call in (None, self.calls) else out
        return out

    def _again(self, out: Any) -> Any:
        """Apply the ports in a rerun of a checkpointed block, without storing what is seen."""
        for port in self.ports:
            if self.calls > 1:
                raise CamError(
                    f"{layer_called(port.name)} runs several times in a forward, and again in the backward, since the model "
                    "checkpoints its activations: it is not known which of its calls runs again; switch checkpointing off"
                )
            out = _apply_unseen(port, out)
        return out


class Ports:
    """Ports at the named layers of a private copy, in the order of the names."""

    def __init__(self, private: PrivateCopy, names: Sequence[str]) -> None:
        self.ports: list[Port] = []
        self.gates: dict[str, _Gate] = {}
        self.modules = private.modules
        for name in names:
            place = place_of(name, private.modules)
            assert place is not None
            if place.module not in self.gates:
                self.gates[place.module] = _Gate()
                check_port(place.module, private.modules[place.module])
                watched(private.modules[place.module], self.gates[place.module])
            self.ports.append(Port(place))
            self.gates[place.module].ports.append(self.ports[-1])

    def set(self, nudges: Sequence[Any], swaps: Sequence[Tensor | None]) -> None:
        """Prepare the next run."""
        for port, nudge, swap in zip(self.ports, nudges, swaps):
            port.set(nudge, swap)
        for gate in self.gates.values():
            gate.calls, gate.over = 0, False

    def take(self) -> tuple[Tensor | None, ...]:
        """Return what was seen, and end the run."""
        seen = tuple(port.seen for port in self.ports)
        for port in self.ports:
            port.seen = None
        for gate in self.gates.values():
            gate.over = True
        return seen

    def check(self, seen: Sequence[Tensor | None]) -> None:
        """Raise CamError if a layer did not run, or not as often as its name says."""
        for port, value in zip(self.ports, seen):
            if value is None:
                calls = next(gate.calls for gate in self.gates.values() if port in gate.ports)
                often = (
                    f"ran {calls} time{'s' * (calls > 1)} in this forward"
                    if calls
                    else "did not run in this forward; choose one that does"
                )
                raise CamError(f"{layer_called(port.name)} {often}{self._why(port)}")

    def _why(self, port: Port) -> str:
        """Return a likely reason why a port saw nothing, or an empty string."""
        place = place_of(port.name, self.gates)
        kind = type(self.modules[place.module]) if place else nn.Module
        if kind.__call__ is nn.Module.__call__:
            return ""
        return f" (`__call__` of its class, {kind.__name__}, may not reach `forward`, where camfn reads it)"


def watched(module: nn.Module, passes: Passes) -> None:
    """Wrap the module's `forward` so that its output goes through `passes`, with the positional arguments.

    The wrapper is set on the copy's own instance. It therefore runs before the caller's forward hooks, which record the
    nudged or swapped output. The class is unchanged, for forwards that check it.
    """
    run = module.forward
    inside = False

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # a forward that calls itself is one call of the layer
            return run(*args, **kwargs)
        inside = True
        try:
            out = run(*args, **kwargs)
        finally:
            inside = False
        return passes(args, out)

    module.__dict__["forward"] = forward


def check_port(name: str, module: nn.Module) -> None:
    """Raise CamError if the module's `forward` cannot be wrapped."""
    kind = type(module)
    if isinstance(getattr(kind, "forward", None), property):
        raise CamError(
            f"{layer_called(name)} is a {kind.__name__}, whose `forward` is a property: its output cannot be read. Choose a "
            "layer inside or around it, or define `forward` as a method"
        )


def _apply(port: Port, out: Any) -> Any:
    if port.seen is not None:
        base = port.name.partition(":")[0]
        raise CamError(
            f"{layer_called(port.name)} runs more than once in a forward, and so has several activations; choose one of its "
            f"calls, counted from 1: '{base}@1', '{base}@2', ..."
        )
    part = _part_of(port, out)
    value: Tensor = functools.reduce(_get, part, out)
    if _compat.is_quantized(value):
        value = _dequantized(port, value)
    if port.swap is not None:
        value = port.swap
    # `seen` is a clone, since an in-place ReLU after the layer would change it. The original is passed on, since the model may
    # hold it under another name (a layer that returns its input) and write to it.
    port.seen = value.clone()
    if port.swap is None and port.nudge is None:
        return out
    nudge: Any = port.nudge
    nudge = nudge(value) if callable(nudge) else nudge
    return _put(out, part, value.clone() if nudge is None else value + nudge)


def _apply_unseen(port: Port, out: Any) -> Any:
    """Apply a nudge or swap without storing what is seen."""
    if port.swap is None and port.nudge is None:
        return out
    part = _part_of(port, out)
    value = functools.reduce(_get, part, out) if port.swap is None else port.swap
    nudge: Any = port.nudge(value) if callable(port.nudge) else port.nudge
    return _put(out, part, value.clone() if nudge is None else value + nudge)


def unrecorded(what: str) -> str:
    """Return the message for a layer that runs where autograd is off."""
    return (
        f"{what} runs where the model records no gradient (torch.no_grad, inference_mode, or "
        "torch.utils.checkpoint with use_reentrant=True): choose a later layer, switch that off, or use a method "
        "without gradients, such as camfn.score_cam"
    )


def _dequantized(port: Port, value: Tensor) -> Tensor:
    """Dequantize the output of a quantized layer. Raise CamError if it is nudged, swapped or differentiated."""
    if port.swap is not None or port.nudge is not None or _compat.is_differentiated(value):
        raise CamError(
            f"{layer_called(port.name)} is quantized (it returns {value.dtype}): its output can be read, but not replaced or "
            "differentiated; use a method that only reads the layer or masks the input, such as "
            "camfn.mean_cam, camfn.eigen_cam or camfn.score_cam, or choose a layer that returns floats"
        )
    return value.dequantize()


# ------------------------------------------------------------------------------------------------------- the parts


def parts_of(out: Any) -> dict[str, Any]:
    """Return the parts of a structured output by key; nothing for tensors and unknown types."""
    if isinstance(out, Mapping):
        return {str(key): part for key, part in out.items()}
    if isinstance(out, (tuple, list)):
        return dict(zip(map(str, getattr(out, "_fields", range(len(out)))), out))
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    return {}


def tensors_of(out: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield the tensors of an output with their keys."""
    if isinstance(out, Tensor):
        yield (), out
    for key, part in parts_of(out).items():
        yield from (((key, *keys), tensor) for keys, tensor in tensors_of(part))


def _part_of(port: Port, out: Any) -> tuple[str, ...]:
    """Return the keys of the port's tensor. The last key may be omitted if there is only one tensor."""
    part, found = (), out
    for key in port.part:
        parts = parts_of(found)
        if key not in parts:
            raise CamError(f"{layer_called(port.name)} has no part {key!r}; {_list_parts(port, part, found)}")
        part, found = (*part, key), parts[key]
    if isinstance(found, Tensor):
        return part
    tensors = [key for key, item in parts_of(found).items() if isinstance(item, Tensor)]
    if len(tensors) == 1:
        return (*part, tensors[0])
    raise CamError(f"{layer_called(port.name)} returns {_describe(found)}, not one tensor; {_list_parts(port, part, found)}")


def _list_parts(port: Port, part: tuple[str, ...], found: Any) -> str:
    base = Place(port.name.partition(":")[0], None, part)
    keys = [key for key, item in parts_of(found).items() if isinstance(item, Tensor) or parts_of(item)]
    ways = ", ".join(repr(str(base._replace(part=(*part, key)))) for key in keys)
    return f"choose one of its parts: {ways}" if ways else "choose a layer inside it"


def _describe(out: Any) -> str:
    def name(part: Any) -> str:
        return f"Tensor{tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__

    parts = ", ".join(f"{key}: {name(part)}" for key, part in parts_of(out).items())
    return f"a {type(out).__name__}" + (f" of {parts}" if parts else "")


def _get(out: Any, key: str) -> Any:
    return parts_of(out)[key]


def _put(out: Any, part: tuple[str, ...], value: Tensor) -> Any:
    """Return a copy of `out` with one part replaced."""
    if not part:
        return value
    parts = parts_of(out)
    parts[part[0]] = _put(parts[part[0]], part[1:], value)
    if isinstance(out, Mapping):
        twin: Any = copy.copy(out)
        twin[next(key for key in out if str(key) == part[0])] = parts[part[0]]
        return twin
    if isinstance(out, (tuple, list)):
        named: Any = type(out)
        return tuple.__new__(named, parts.values()) if hasattr(out, "_fields") else named(parts.values())
    return dataclasses.replace(out, **{part[0]: parts[part[0]]})
