"""Prepared models: private copies, recorded heads and compiled kernels, kept by the caller as a value."""

import functools
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn._errors import CamError
from camfn._types import State
from camfn.model.guard import WriteError
from camfn.model.private_copy import PrivateCopy, copy_of, tensors_in
from camfn.model.restore import Snapshot, disarm

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
C = TypeVar("C", bound="Call")

_SPARE = 4
"""The largest number of idle private copies kept for later calls."""


class Slot:
    """A cache entry, and the lock for making it."""

    __slots__ = ("lock", "made", "size")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Any = None
        self.size = 0  # bytes of the tensors in the entry that are not the model's


class Prepared:
    """A snapshot of a model's structure, with a cache that calls share. Made by `camfn.prepare`.

    Replaced submodules, changed attributes and re-assigned parameters are not seen: prepare the model again after such a
    change. Tensors are the model's own: in-place updates, `.data =` and `.to()` are seen.

    `len(prepared)` is the number of recorded heads and compiled kernels in the cache. `repr(prepared)` also gives their size.

    >>> import camfn, torch
    >>> prepared = camfn.prepare(torch.nn.Linear(3, 2))
    >>> len(prepared), camfn.prepare(prepared) is prepared
    (0, True)
    """

    def __init__(self, model: nn.Module, limit: int, snapshot: bool) -> None:
        self.model = model
        self.limit = limit
        self.lasting = snapshot  # whether it outlives a call
        self.written: set[str] = set()  # names of parameters that a forward writes to, which are copied for each run
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[Hashable, ...], Slot] = OrderedDict()
        self._source = _Source(model) if snapshot else None
        self._spare: list[Copy] = []
        self._armed: dict[int, nn.Module] = {}  # copies of modules with a destructor, to be disarmed before they are freed
        weakref.finalize(self, disarm, self._armed).atexit = False
        if self._source is not None:
            self._arm(self._source.private)

    @_compat.eager
    def copy(self) -> "Copy":
        """Lend a private copy: an idle one, or a new one."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        private = copy_of(self.model) if self._source is None else self._source.copied()
        private = private._replace(written=self.written)
        self._arm(private)
        return Copy(private, Snapshot(private) if self._can_restore(private) else None)

    def _arm(self, private: PrivateCopy) -> None:
        self._armed.update((id(twin), twin) for _, twin in private.twins.modules if hasattr(type(twin), "__del__"))

    def _can_restore(self, private: PrivateCopy) -> bool:
        return self.lasting and not private.twins.own_tensors  # writes to a copy's own tensors cannot be detected

    def put_back(self, copy: "Copy") -> None:
        """Take back a private copy: restore and keep it, or drop it."""
        if copy.snapshot is not None and not copy.private.twins.in_graph:
            copy.snapshot.restore()
            with self._lock:
                if len(self._spare) < _SPARE:
                    self._spare.append(copy)
                    return
        if self._armed:
            twins = {id(twin): twin for _, twin in copy.private.twins.modules}
            disarm({key: self._armed.pop(key) for key in [*self._armed] if key in twins})

    def tensors(self, private: PrivateCopy) -> tuple[State, dict[int, str]]:
        """The model's current tensors by name, and the names of all tensors that its modules hold, by id."""
        return (private.tensors, private.foreign) if self._source is None else self._source.tensors()

    def slot(self, key: tuple[Hashable, ...]) -> Slot:
        """The slot for `key`, empty if it is new. Above the limit, the least recently used slot is dropped."""
        with self._lock:
            slot = self._slots.setdefault(key, Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > self.limit:
                self._slots.popitem(last=False)
            return slot

    def has(self, key: tuple[Hashable, ...]) -> bool:
        """Whether the cache has an entry for `key`."""
        with self._lock:
            return key in self._slots and self._slots[key].made is not None

    def __len__(self) -> int:
        with self._lock:
            return sum(slot.made is not None for slot in self._slots.values())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        with self._lock:
            kept = Counter(str(key[0]) for key, slot in self._slots.items() if slot.made is not None)
            size = sum(slot.size for slot in self._slots.values())
        what = ", ".join(f"{kept[kind]} {kind}{'s' * (kept[kind] != 1)}" for kind in ("record", "kernel"))
        return f"Prepared({type(self.model).__name__}: {what} of at most {self.limit}, {size} bytes beside the model's)"


class Copy(NamedTuple):
    """A private copy of a prepared model."""

    private: PrivateCopy
    snapshot: Snapshot | None  # restores the copy for the next call; None if the copy cannot be restored


class _Source:
    """A copy of a model that never runs, and of which private copies are made. It holds the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        private = copy_of(model, live=True)
        self.names = [*private.tensors]
        self.private = private._replace(tensors={}, foreign={})
        # `.to()` replaces buffers by new tensors, so they are looked up again for each copy.
        self.buffers = [
            (vars(own)["_buffers"], vars(twin)["_buffers"])
            for own, twin in self.private.twins.modules
            if vars(own).get("_buffers") and vars(twin).get("_buffers")
        ]
        self.holders = {name: (holder, key) for holder, key, name in reversed(self.private.places)}
        self.inside = [(holder, key, name) for holder, key, name in tensors_in(self.private) if holder[key] is not None]

    def copied(self) -> PrivateCopy:
        self._refresh()
        names = {"named": self.private.named, "original": self.private.original}
        return copy_of(self.private.module)._replace(**names, tensors={}, foreign={})  # each call fills in its own tensors

    def tensors(self) -> tuple[State, dict[int, str]]:
        self._refresh()
        found = {name: self.holders[name] for name in self.names}
        foreign = {id(holder[key]): name for holder, key, name in self.inside}
        return {name: holder[key].detach() for name, (holder, key) in found.items()}, foreign

    def _refresh(self) -> None:
        for own, twin in self.buffers:
            twin.update((key, own[key]) for key in twin if own.get(key) is not None)


def prepare(model: nn.Module | Prepared, *, limit: int = 64) -> Prepared:
    """Prepare a model for many calls. Pass the result to any function of camfn in place of the model.

    A prepared model is a snapshot of the model's structure, and a cache of private copies, recorded heads and compiled kernels.
    Calls on it share the cache; a plain call prepares the model for that call only. Nothing outlives the prepared model.

    Replaced submodules, changed attributes and re-assigned parameters are not seen: prepare the model again after such a
    change. In-place updates of tensors, `.data =` and `.to()` are seen, and `state=` works as usual. A prepared model can be
    shared by threads.

    Args:
        model: a module. A prepared model is returned as it is.
        limit: the largest number of recorded heads and compiled kernels in the cache; the least recently used is dropped.

    Returns:
        The prepared model.

    Raises:
        CamError: if `model` is not a module, or `limit` is not a positive int.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> prepared, x = camfn.prepare(model), torch.randn(2, 3, 8, 8)
    >>> torch.equal(camfn.score_cam(prepared, "1", x), camfn.score_cam(model, "1", x))
    True
    """
    if isinstance(model, Prepared):
        return model
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise CamError(f"limit must be a positive int, the largest number of records and kernels to keep; found {limit!r}")
    return Prepared(model, limit, snapshot=True)


class Call:
    """One call on a prepared model. It borrows private copies, and returns them when it ends."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._lent: list[Copy] = []
        self._now: tuple[State, dict[int, str]] | None = None

    @_compat.eager
    def borrow(self) -> PrivateCopy:
        """Borrow a private copy until the call ends."""
        copy = self.prepared.copy()
        self._lent.append(copy)
        self._now = self._now or self.prepared.tensors(copy.private)
        tensors, foreign = self._now
        private = copy.private._replace(tensors=tensors, foreign=foreign)
        private.put(tensors)
        return private

    @_compat.eager
    def close(self) -> None:
        """End the call, and return its private copies."""
        while self._lent:
            self.prepared.put_back(self._lent.pop())

    def inner(self) -> "AbstractContextManager[Call]":
        """A nested call, with separate private copies."""
        return Call(self.prepared)

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Model: TypeAlias = nn.Module | Prepared | Call
"""A model as functions take it: from the user, or from another function of the same call."""


@_compat.eager
def opened(model: Model) -> Call:
    """Begin a call on a prepared model. A plain model is prepared for this call only."""
    if isinstance(model, Call):
        return model
    return Call(model if isinstance(model, Prepared) else Prepared(model, 64, snapshot=False))


def restarted(prepared: Prepared, call: Callable[[], T]) -> T:
    """Return `call()`, restarted if a forward is about to write to a parameter, which is copied for each run from then on."""
    met: set[str] = set()  # the parameters that this call met; another thread may have added the same ones to `written`
    while True:
        try:
            return call()
        except WriteError as error:
            if error.name in met:
                raise
            met.add(error.name)
            prepared.written.add(error.name)


def prepares(function: F) -> F:
    """Decorate a public function whose first argument is a model: it receives a `Call`, and is restarted if necessary.

    While `torch.compile` traces the caller, it runs uncompiled: the compiler cannot follow a mode, and would compile the code
    around each forward pass piece by piece, for seconds.
    """

    @functools.wraps(function)
    @_compat.eager
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        with model.inner() if isinstance(model, Call) else opened(model) as own:
            return restarted(own.prepared, lambda: function(own, *args, **kwargs))

    return cast(F, call)


def shapes(x: Any) -> Hashable:
    """All that compiled code may depend on in the inputs, except the values of tensors."""
    leaves, tree = tree_flatten(x)
    signed = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return tuple(signed), str(tree)


class _Same:
    """A key that is equal for the same object, and holds it weakly if it allows weak references."""

    def __init__(self, value: Any) -> None:
        self.id = id(value)
        try:
            self.ref: Any = weakref.ref(value)
        except TypeError:
            self.ref = lambda: value

    def __hash__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.ref() is not None and self.ref() is other.ref()


def weakly(value: Any) -> Any:
    """Replace callables by weak keys: a callable may reference the model, which the cache must not keep alive."""
    if isinstance(value, tuple):
        return tuple(map(weakly, value))
    return _Same(value) if callable(value) else value
