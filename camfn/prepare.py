"""What is worth keeping of a model is kept by the caller, as a value."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn._errors import CamError
from camfn.guard import WriteError
from camfn.shell import Shell, copy_of

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Slot:
    """A kept thing and the lock under which it is made."""

    __slots__ = ("lock", "made")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Any = None


class Prepared:
    """A snapshot of a model's structure, and what calls keep for other calls. Made by `camfn.prepare`.

    Replaced submodules, changed attributes and re-assigned parameters are not seen: prepare the model again after such a
    change.
    Tensors are the model's own: in-place updates, `.data =` and `.to()` are seen.

    `len(prepared)` is the number of kept records and compiled kernels.
    """

    def __init__(self, model: nn.Module, limit: int, snapshot: bool) -> None:
        self.model = model
        self.limit = limit
        self.lasting = snapshot  # it outlives a call
        self.written: set[str] = set()
        self._lock = threading.Lock()
        self._slots: OrderedDict[Hashable, Slot] = OrderedDict()
        self._template = copy_of(model, live=True) if snapshot else None
        self._buffers = _places(self._template) if self._template else []

    @_compat.eager
    def shell(self) -> Shell:
        """A private copy, for one call."""
        if self._template is None:
            shell = copy_of(self.model)
        else:
            for own, copy, key in self._buffers:  # `.to()` puts new buffers in the place of the old
                if (tensor := own._buffers.get(key)) is not None:
                    copy._buffers[key] = tensor
            shell = copy_of(self._template.module)._replace(named=self._template.named, original=self.model)
        return shell._replace(written=self.written)

    def slot(self, key: Hashable) -> Slot:
        """The slot for `key`, empty if it is new; the oldest goes where there are too many."""
        with self._lock:
            slot = self._slots.setdefault(key, Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > self.limit:
                self._slots.popitem(last=False)
            return slot

    def has(self, key: Hashable) -> bool:
        """Is there something for `key`?"""
        with self._lock:
            return key in self._slots and self._slots[key].made is not None

    def __len__(self) -> int:
        with self._lock:
            return sum(slot.made is not None for slot in self._slots.values())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        state = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}.values()
        size = sum(t.numel() * t.element_size() for t in state)
        return f"Prepared({type(self.model).__name__}, {size} bytes of tensors, {len(self)} of at most {self.limit} kept)"


def _places(template: Shell) -> list[tuple[nn.Module, nn.Module, str]]:
    """Every buffer: the caller's module, the template's, and the key."""
    return [(own, copy, key) for own, copy in template.twins.modules for key in own.__dict__.get("_buffers", {})]


def prepare(model: nn.Module | Prepared, *, limit: int = 64) -> Prepared:
    """A snapshot of a model's structure, to be passed to any function of camfn in the model's place.

    Replaced submodules, changed attributes and re-assigned parameters are not seen. In-place updates of tensors, `.data =` and
    `.to()` are seen, and `state=` is used as ever. A plain call prepares the model for that call alone; calls on a prepared
    model share what they record of it and the kernels that they compile. At most `limit` of these are kept, the oldest goes.

    It may be shared by threads, and dies like any object. A prepared model is returned as it is.

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
        raise CamError(f"limit must be a positive int, the number of records and kernels that are kept; found {limit!r}")
    return Prepared(model, limit, snapshot=True)


class Session:
    """A prepared model in one call of `explain`, whose methods share what they see of it."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared


@_compat.eager
def opened(model: nn.Module | Prepared | Session) -> Prepared:
    """A prepared model as it is, a plain one prepared for one call."""
    if isinstance(model, Session):
        return model.prepared
    return model if isinstance(model, Prepared) else Prepared(model, 64, snapshot=False)


def restarted(prepared: Prepared, call: Callable[[], T]) -> T:
    """What `call` gives. It starts again where a forward was about to write to a parameter, which is copied from then on."""
    while not _compat.compiling():
        try:
            return call()
        except WriteError as error:
            if error.name in prepared.written:
                raise
            prepared.written.add(error.name)
    return call()


def prepares(function: F) -> F:
    """A public function whose first argument is a model: it gets a prepared one, and starts again where it has to."""

    @functools.wraps(function)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = opened(model)
        given = model if isinstance(model, Session) else prepared
        return restarted(prepared, lambda: function(given, *args, **kwargs))

    return cast(F, call)


def shell_of(model: nn.Module | Prepared) -> Shell:
    """A private copy, for one call."""
    return opened(model).shell()


def kept(prepared: Prepared, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once for `key` however many threads ask."""
    slot = prepared.slot(key)
    if slot.made is None:
        with slot.lock:
            if slot.made is None:
                slot.made = make()
    return slot.made


def shapes(x: Any) -> Hashable:
    """What of the inputs compiled code may depend on, but for the tensors' values."""
    leaves, tree = tree_flatten(x)
    signed = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return tuple(signed), str(tree)
