"""The two things that outlive a call, traced heads and compiled kernels: kept weakly by model, found by structure.

What is kept was made from a copy of the model as it was. The key holds everything that such a thing depends on and is not
handed at each call (classes, settings, shapes), so that a changed model simply finds nothing.
"""

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from camfn._types import Inputs
from camfn.shell import ATOMS, Shell, held

_LIMIT = 64  # kept things per model, some five for each shape of inputs; the oldest goes


class Slot:
    """A kept thing and the lock under which it is made."""

    __slots__ = ("lock", "made")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Any = None


_LOCK = threading.Lock()
_KEPT: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Slot]]" = weakref.WeakKeyDictionary()


def slot_of(model: nn.Module, key: Hashable) -> Slot:
    """The slot for `key`, empty if it is new."""
    with _LOCK:
        table = _KEPT.setdefault(model, OrderedDict())
        slot = table.setdefault(key, Slot())
        table.move_to_end(key)
        if len(table) > _LIMIT:
            table.popitem(last=False)
        return slot


def has_any(model: nn.Module) -> bool:
    """Is anything kept for the model? Cheap, before a key is computed."""
    return model in _KEPT


def is_made(model: nn.Module, key: Hashable) -> bool:
    """Is there something for `key`?"""
    with _LOCK:
        slot = _KEPT.get(model, {}).get(key)
        return slot is not None and slot.made is not None


def kept(model: nn.Module, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for `key` however many threads ask, and forgotten with the model."""
    slot = slot_of(model, key)
    if slot.made is None:
        with slot.lock:
            if slot.made is None:
                slot.made = make()
    return slot.made


def shapes(x: Inputs, batch: bool = True) -> Hashable:
    """What of the inputs code may depend on, but for the tensors' values; without the batch, if so asked."""
    leaves, tree = tree_flatten(x)
    first = 0 if batch else 1
    signed = ((leaf.shape[first:], leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return tuple(signed), str(tree)


class Structure:
    """Two shells with the same structure run the same code on the same shapes; only the state may differ."""

    __slots__ = ("hash", "parts")

    def __init__(self, shell: Shell) -> None:
        paths = shell.paths()
        modules = tuple((path, type(module), _signed(vars(module), paths)) for path, module in shell.distinct().items())
        tensors = tuple((name, t.shape, t.dtype, t.device) for name, t in shell.tensors.items())
        self.parts = modules, tensors, tuple(shell.slots.items())
        self.hash = hash(self.parts)  # once: it is large, and part of every key

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.hash == other.hash and self.parts == other.parts


_LAST: "weakref.WeakKeyDictionary[nn.Module, Structure]" = weakref.WeakKeyDictionary()


def structure(model: nn.Module, shell: Shell) -> Structure:
    """That of a model: one object while it stays the same, so that it is compared once in a call, and not with every key."""
    found = Structure(shell)
    with _LOCK:
        if (last := _LAST.get(model)) is None or last != found:
            last = _LAST[model] = found
        return last


_SKIPPED = frozenset(("_parameters", "_buffers", "_backward_hooks"))
_PLAIN = frozenset((bool, int, str, type(None)))  # of the attributes, those that are their own signature
_EMPTY = frozenset((dict, OrderedDict, set))  # what a module has no hooks in, say: most of its attributes


def _signed(fields: dict[str, Any], paths: dict[int, str]) -> tuple[Hashable, ...]:
    signed, seen = [], set()
    for name, value in fields.items():
        kind = type(value)
        if kind in _PLAIN:
            signed.append((name, value))
        elif (kind not in _EMPTY or value) and name not in _SKIPPED:
            signed.append((name, _sign(value, paths, seen)))
    return tuple(signed)


def _sign(value: Any, paths: dict[int, str], seen: set[int]) -> Hashable:
    if type(value) in ATOMS:
        return (type(value).__name__, repr(value)) if isinstance(value, (slice, float)) else value
    if type(value) is tuple:  # before the others, since there are many
        return "tuple", *(item if type(item) in _PLAIN else _sign(item, paths, seen) for item in value)
    if isinstance(value, nn.Module) and id(value) in paths:
        return "module", paths[id(value)]
    if isinstance(value, Tensor):  # a plain attribute becomes a constant of what is traced: its values count
        return (value.shape, value.dtype, value.device, tuple(value.flatten().tolist())) if value.numel() < 4096 else object()
    if id(value) in seen:
        return type(value).__name__
    seen.add(id(value))
    if isinstance(value, dict):
        return tuple((repr(key), _sign(item, paths, seen)) for key, item in value.items())
    code = value.__code__ if isinstance(value, types.FunctionType) else getattr(value, "__func__", None)
    return (type(value), code, *(_sign(item, paths, seen) for item in held(value)))
