"""Restore a private copy after a run, and disable destructors before it is dropped."""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from operator import is_
from types import FunctionType
from typing import Any

from torch import nn

from camfn.model.private_copy import PrivateCopy, filled, slots_of


class Snapshot:
    """The contents of all parts of a copy. `restore` puts them back. Items are compared by identity, so no value is read."""

    def __init__(self, private: PrivateCopy) -> None:
        self._empty: list[Any] = []  # empty containers, which most containers of a module are
        self._full: list[tuple[Any, list[Any]]] = []  # containers with their items
        self._maps: list[tuple[dict[Any, Any], list[Any], list[Any]]] = []  # dicts with their keys and values
        self._slots: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        for holder, key, _ in private.places:  # a copy that is not running holds no tensors
            holder[key] = None
        holders = {id(holder): holder for holder, *_ in private.places}
        self._tensors = {key: (holder, dict(holder)) for key, holder in holders.items()}
        for part in private.twins.values():
            self._add(part)

    def _add(self, part: Any) -> None:
        if isinstance(part, (dict, list, set, deque)):
            self._add_container(part)
        if isinstance(part, nn.Module):  # containers made with the copy itself, which are not in `twins`
            inner = [value for value in vars(part).values() if isinstance(value, (dict, list, set, deque))]
            for value in inner:
                self._add_container(value)
        if isinstance(part, FunctionType):
            self._cells.extend((cell, cell.cell_contents) for cell in part.__closure__ or () if filled(cell))
        if hasattr(part, "__dict__"):
            self._add_container(part.__dict__)
        self._slots.extend((part, name, item) for name, item in slots_of(part))

    def _add_container(self, container: Any) -> None:
        if id(container) in self._tensors:
            return
        if not len(container):
            self._empty.append(container)
        elif isinstance(container, dict):
            self._maps.append((container, [*dict.keys(container)], [*dict.values(container)]))
        else:
            self._full.append((container, [*container]))

    def restore(self) -> None:
        """Put everything back."""
        for container in self._empty:
            if container:
                _refill(container, [])
        for container, contents in self._full:
            if not _same(container, contents):
                _refill(container, contents)
        for holder, contents in self._tensors.values():
            holder.clear()
            holder.update(contents)
        of = dict.values
        for container, keys, values in self._maps:  # hundreds of them on every call, hence inlined
            if len(container) != len(keys) or not all(map(is_, of(container), values)) or not all(map(is_, container, keys)):
                _refill(container, zip(keys, values))
        for owner, name, item in self._slots:
            object.__setattr__(owner, name, item)
        for cell, item in self._cells:
            cell.cell_contents = item


def _same(container: Collection[Any], contents: list[Any]) -> bool:
    return len(container) == len(contents) and all(map(is_, container, contents))


_BASES: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


def _refill(container: Any, contents: Iterable[Any]) -> None:
    base = next(base for base in _BASES if isinstance(container, base))  # a subclass may override these methods
    base.clear(container)
    (base.extend if base in (list, deque) else base.update)(container, contents)


def disarm(modules: Mapping[int, nn.Module]) -> None:
    """Change the class of these modules, so that their destructors do not release the caller's files or servers."""
    for module in modules.values():
        module.__class__ = nn.Module
