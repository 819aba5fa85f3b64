"""The private copy of a module tree that every call makes for itself.

`torch.func.functional_call` swaps tensors into the module that it is handed, and back: on the caller's own module that is
neither pure nor safe in threads. A *shell* is a copy in eval mode that shares every parameter, made in a few milliseconds,
given to one call and to nobody else.
"""

import enum
import functools
import inspect
import sys
import types
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from camfn import _compat
from camfn._errors import CamError, RefusedError, layer_called
from camfn._types import State

Place = tuple[dict[str, Any], str, str]
"""A module's parameters or buffers, the key of one, and its name in the state."""


class Shell(NamedTuple):
    """A private copy of a model, and the names by which its tensors are known."""

    module: nn.Module
    modules: dict[str, nn.Module]  # by each of their names
    twins: "Twins"  # id of the caller's object -> its copy
    aliases: dict[str, str]  # every name of a tensor -> the one name under which the state holds it
    slots: dict[str, str]  # every place that holds a tensor, once -> its name in the state
    places: list[Place]  # the same, as a forward fills them
    tensors: State  # the caller's own tensors, detached, by name
    buffers: set[str]
    optional: set[str]  # non-persistent buffers: a state_dict does not hold them
    written: set[str]  # of the others, those that a forward was seen to write to: they are copied for each run, as buffers are
    original: nn.Module  # the caller's model
    named: dict[int, str]  # id of a module of the caller's -> the first name of its copy
    foreign: dict[int, str]  # id of a tensor of the caller's own modules -> its name

    def own_tensors(self) -> list[Tensor]:
        """What the modules hold beside the state: plain attributes, and the tensors of modules that are not registered."""
        modules = [twin for _, twin in self.twins.modules]
        hidden = [t for twin in modules for t in (*twin._parameters.values(), *twin._buffers.values())]
        return [twin for twin in (*self.twins.values(), *hidden) if isinstance(twin, Tensor)]

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Put a state into the modules."""
        for holder, key, name in self.places:
            holder[key] = state[name]

    def paths(self) -> dict[int, str]:
        """The first name of each module, by its id."""
        return {id(module): path for path, module in reversed(self.modules.items())}

    def distinct(self) -> dict[str, nn.Module]:
        """Each module once, by its first name."""
        paths = self.paths()
        return {path: module for path, module in self.modules.items() if paths[id(module)] == path}


ATOMS = frozenset(
    (
        *(int, float, complex, bool, str, bytes, type(None), type, range, slice),
        *(types.BuiltinFunctionType, types.ModuleType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    )
)
"""Types whose values can be shared: they hold no module and nobody writes to them."""

_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))


class Twins(dict[int, Any]):
    """From the id of a caller's object to its copy."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live  # the copy holds the caller's own parameters, wherever these are
        self.own_tensors = False  # does it hold tensors of its own, which a forward may write to?
        self.in_graph = False  # may the caller take a gradient of what a forward gave? A checkpointed block runs again then
        self.modules: list[tuple[nn.Module, nn.Module]] = []  # of the caller's, which are kept alive, and their copies


def _copy(value: Any, twins: Twins) -> Any:
    """A copy of `value` in which every module that it leads to is a copy.

    Bound methods, partials and closures must be pointed to the copies, or the caller's batch norm would run, in train
    mode, and move. Those that lead to no module and no tensor are shared, and so keep their identity. Containers are copied
    wherever they lead: a model that counts its calls in one must not count ours.
    """
    if type(value) in ATOMS:
        return value
    if id(value) in twins:
        return twins[id(value)]
    if isinstance(value, _SHARED_WHERE_BARREN) and not _leads_on(value):
        return value
    return _copier_of(value.__class__)(value, twins)  # not `type`: a weak proxy of a module says that it is one


def _copy_module(module: nn.Module, twins: Twins) -> nn.Module:
    inner = _inside(module)
    if inner is not module:
        twin = twins[id(module)] = _copy(inner, twins)
        twins.modules.append((module, twin))
        return twin
    _refuse(module)
    twin = twins[id(module)] = object.__new__(type(module))
    twins.modules.append((module, twin))
    own = twin.__dict__
    own.update(vars(module))
    for name, value in vars(module).items():
        if type(value) in ATOMS or name in _NO_FORWARD:
            continue
        if name in ("_parameters", "_buffers") or (type(value) in _CONTAINERS and not value):
            own[name] = value.copy()  # the tensors are shared: functional_call puts the state in their place
        elif name in _LEFT_OUT:
            del own[name]
        elif name == "forward":
            own[name] = _copy(_own_forward(module), twins)
        else:
            own[name] = _copy(value, twins)
    for name, item in slots_of(module):
        object.__setattr__(twin, name, _copy(item, twins))
    own["training"] = False
    own["_backward_hooks"], own["_backward_pre_hooks"] = OrderedDict(), OrderedDict()  # no part of a forward; grad refuses them
    _write_out_attention(twin)
    return twin


def _copy_tensor(tensor: Tensor, twins: Twins) -> Tensor:
    # A plain attribute may be written in place by the forward (a counter, a cache), a parameter may not.
    if isinstance(tensor, nn.Parameter) and twins.live:
        return tensor
    twins.own_tensors = True
    twin = twins[id(tensor)] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    return twin


def _emptied(value: Any, twins: Twins) -> Any:
    """A container of the same class, with its attributes, and nothing in it yet: it may come to hold itself."""
    if type(value) in _CONTAINERS:
        twin = value.copy()
        twin.clear()
    else:  # not by copy.copy: a dict whose attributes are its items may not survive the look for `__getstate__`
        base: Any = next(cls for cls in type(value).__mro__ if cls.__module__ in ("builtins", "collections"))
        twin = base.__new__(type(value))
        if hasattr(twin, "__dict__"):
            vars(twin).update(vars(value))
        if isinstance(value, defaultdict):
            twin.default_factory = value.default_factory
    twins[id(value)] = twin
    return twin


def _copy_dict(value: dict[Any, Any], twins: Twins) -> dict[Any, Any]:
    twin = _emptied(value, twins)
    for key, item in value.items():  # a module may be a key
        twin[key if type(key) in ATOMS else _copy(key, twins)] = item if type(item) in ATOMS else _copy(item, twins)
    return twin


def _copy_bag(value: Any, twins: Twins) -> Any:
    twin = _emptied(value, twins)
    items = [item if type(item) in ATOMS else _copy(item, twins) for item in value]
    (twin.update if isinstance(twin, set) else twin.extend)(items)
    return twin


def _copy_namespace(value: types.SimpleNamespace, twins: Twins) -> types.SimpleNamespace:
    twin = twins[id(value)] = type(value)()
    vars(twin).update(_copy(vars(value), twins))
    return twin


def _copy_fixed(value: Any, twins: Twins) -> Any:
    if type(value) is tuple and ATOMS.issuperset(map(type, value)):  # a kernel's size, say: most are
        return value
    items = [item if type(item) in ATOMS else _copy(item, twins) for item in value]
    if all(new is old for new, old in zip(items, value)):
        return value
    base: Any = tuple if isinstance(value, tuple) else frozenset
    twin = base.__new__(type(value), items)  # a subclass may want other arguments, and has only these parts
    if hasattr(value, "__dict__"):
        vars(twin).update(_copy(vars(value), twins))
    return twin


def _copy_view(value: "types.MappingProxyType[Any, Any]", twins: Twins) -> Any:
    return types.MappingProxyType({key: _copy(item, twins) for key, item in value.items()})


def _copy_weakref(value: "weakref.ref[Any]", twins: Twins) -> Any:
    return weakref.ref(_copy(value(), twins)) if isinstance(value(), nn.Module) else value


def _copy_method(value: types.MethodType, twins: Twins) -> types.MethodType:
    return types.MethodType(value.__func__, _copy(value.__self__, twins))


def _copy_partial(value: "functools.partial[Any]", twins: Twins) -> Any:
    return functools.partial(*_copy((value.func, *value.args), twins), **_copy(value.keywords, twins))


def _copy_function(function: types.FunctionType, twins: Twins) -> types.FunctionType:
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function)):
        return function
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    code, defaults = function.__code__, _copy(function.__defaults__, twins)
    twin = types.FunctionType(code, function.__globals__, function.__name__, defaults, cells or None)
    twins[id(function)] = twin  # before the cells: a closure may hold itself
    for new, old in zip(cells, function.__closure__ or ()):
        if filled(old):
            new.cell_contents = _copy(old.cell_contents, twins)
    twin.__kwdefaults__ = _copy(function.__kwdefaults__, twins)
    twin.__dict__.update(_copy(vars(function), twins))
    return twin


_SHARED_WHERE_BARREN = (types.FunctionType, functools.partial)


def _leads_on(value: Any) -> bool:
    """Does a Python object lead to a module or a tensor?"""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, (nn.Module, Tensor)):
            return True
        if type(found) in ATOMS or id(found) in seen:
            continue
        seen.add(id(found))
        waiting.extend(held(found))
    return False


def _copy_object(value: Any, twins: Twins) -> Any:
    fields = attributes(value)
    # A sentinel is compared by identity, and anything of torch's or Python's own is left alone. A copy with a destructor
    # would give the caller's file back to the system when it dies.
    if not fields or hasattr(type(value), "__del__") or not _leads_on(value):
        return value
    try:
        twin = object.__new__(type(value))
    except TypeError:  # its state is not in Python: a file, a lock
        return value
    twins[id(value)] = twin
    for name, item in fields:
        object.__setattr__(twin, name, _copy(item, twins))
    return twin


_COPIERS: tuple[tuple[Any, Callable[[Any, Twins], Any]], ...] = (
    (nn.Module, _copy_module),
    (Tensor, _copy_tensor),
    (dict, _copy_dict),
    ((list, set, deque), _copy_bag),
    ((tuple, frozenset), _copy_fixed),
    (weakref.ref, _copy_weakref),
    (types.MethodType, _copy_method),
    (functools.partial, _copy_partial),
    (types.FunctionType, _copy_function),
    (types.SimpleNamespace, _copy_namespace),
    (types.MappingProxyType, _copy_view),
)


@functools.lru_cache(maxsize=256)
def _copier_of(cls: type) -> Callable[[Any, Twins], Any]:
    return next((copier for kind, copier in _COPIERS if issubclass(cls, kind)), _copy_object)


_LEFT_OUT = frozenset(("_compiled_call_impl",))
"""What `module.compile()` left: it would run the caller's module."""

_NO_FORWARD = frozenset(
    ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
)
"""What a forward never uses: shared, since each container more is work for Python's garbage collector."""

_NOT_OURS = sys.stdlib_module_names | {"torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric"}


def attributes(value: Any) -> list[tuple[str, Any]]:
    """What a plain object of the model's own code holds; nothing for those of torch, NumPy, Lightning and Python itself."""
    cls = type(value)
    foreign = cls.__module__.partition(".")[0] in _NOT_OURS and not isinstance(value, (UserDict, UserList))
    # A dataset, which a trainer leads to, is no part of a forward, and may be large.
    if foreign or isinstance(value, (type, enum.Enum, Dataset)):
        return []
    return [*slots_of(value), *getattr(value, "__dict__", {}).items()]


def slots_of(value: Any) -> list[tuple[str, Any]]:
    """What an object holds in the `__slots__` of its classes, by the names that Python has for them."""
    found = []
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.append((name, getattr(value, name)))
    return found


def filled(cell: types.CellType) -> bool:
    """Does a closure's cell hold anything yet?"""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def held(value: Any) -> Iterable[Any]:
    """What a Python object holds, one step deep."""
    if isinstance(value, (dict, types.MappingProxyType)):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if filled(cell)]
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
    return [item for _, item in attributes(value)]


def _inside(module: nn.Module) -> nn.Module:
    """The module inside what torch wraps around one: compiled, DataParallel, DistributedDataParallel."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def _refuse(module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise CamError(f"{kind} is scripted or traced: camfn needs Python modules, pass the model that was scripted")
    if isinstance(module, torch.fx.GraphModule) and hasattr(module.graph._codegen, "pytree_info"):
        raise CamError(f"{kind} was exported: its layers do not run any more, pass the model that was exported")
    if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
        raise CamError(f"{kind} is a lazy module without shapes yet: run the model once before you explain it")
    if hasattr(type(module), "__del__") and type(module).__basicsize__ != nn.Module.__basicsize__:
        raise CamError(
            f"{kind} has a destructor and __slots__: a copy's destructor would give away what yours has (a file, a server) and "
            "cannot be taken off; define the class without __slots__"
        )
    if "forward" in vars(module) and _own_forward(module) is None:
        raise CamError(
            f"`forward` of {kind} was replaced on the instance (accelerate's hooks do this), by what is no method of that very "
            "module: a copy would run yours; take it off first (accelerate.hooks.remove_hook_from_module), or define it in the "
            "class"
        )


def _own_forward(module: nn.Module) -> types.MethodType | None:
    """The `forward` that stands on an instance, where it is a method of that very module, compiled or not."""
    forward = vars(module)["forward"]
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if getattr(forward, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":  # around a method, of torch's own
        forward = inspect.unwrap(forward)
    return forward if isinstance(forward, types.MethodType) and forward.__self__ is module else None


def _write_out_attention(twin: nn.Module) -> None:
    """Keep torch off its fused attention path, which never calls the children: a tap there would read nothing."""
    if type(twin) is nn.MultiheadAttention:  # a subclass may ask whether it is in training
        twin.training, twin.dropout = True, 0.0  # the path is for eval mode; without dropout the modes are equal
    elif isinstance(twin, nn.TransformerEncoderLayer):
        twin.activation_relu_or_gelu = 0  # read by the choice of path only
    elif isinstance(twin, nn.TransformerEncoder):
        twin.enable_nested_tensor = twin.use_nested_tensor = False


def is_quantised(module: nn.Module) -> bool:
    """Does it compute in integers, through which no gradient comes?"""
    return "quantized" in type(module).__module__.split(".")


def refuse_cached(shell: Shell) -> None:
    """Raise where torch keeps what parametrizations compute. It keeps that by the caller's module, which the copies share: one
    would get what another computed from other tensors."""
    if _compat.parametrizations_are_cached():
        paths = shell.paths()
        names = [
            paths.get(id(twin), type(twin).__name__) for _, twin in shell.twins.modules if parametrize.is_parametrized(twin)
        ]
        if names:
            raise RefusedError(
                f"torch.nn.utils.parametrize.cached() is on, and {layer_called(names[0])} is parametrized: torch would take "
                "the weight that your model computed for that of camfn's private copy, and the other way round; call camfn "
                "outside of it"
            )


def without_wrappers(name: str) -> Iterator[str]:
    """A dotted name, and what it may be inside wrappers: without `_orig_mod`, without one leading `module` after another."""
    yield name
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    yield ".".join(parts)
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
        yield ".".join(parts)


@_compat.eager
def copy_of(model: nn.Module, *, live: bool = False) -> Shell:
    """A private copy of the model with its names. About 2 ms for a ResNet-50. `live`: it holds the caller's own tensors, for
    other copies to be made of it, and is not run."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "; a layer's name comes second, after the model" if isinstance(model, str) else ""
        hint = "; pass the model that was exported" if kind == "ExportedProgram" else hint
        raise CamError(f"model must be a torch.nn.Module, found {kind}{hint}")
    twins = Twins(live)
    module = _copy_module(model, twins)
    if not live:
        _own_hidden(module, twins)
    modules = dict(module.named_modules(remove_duplicate=False))
    shell = _filled_in(Shell(module, modules, twins, {}, {}, [], {}, set(), set(), set(), model, {}, {}))
    paths = shell.paths()
    shell.named.update((id(own), paths[id(twin)]) for own, twin in twins.modules if id(twin) in paths)
    shell.foreign.update((id(holder[key]), name) for holder, key, name in tensors_in(shell) if holder[key] is not None)
    if not live:
        shell.put(shell.tensors)
    return shell


def tensors_in(shell: Shell) -> list[Place]:
    """Where the caller's own modules hold tensors, hidden modules too, and what these are called in an error."""
    paths, found = shell.paths(), []
    for own, twin in shell.twins.modules:
        path = paths.get(id(twin), type(own).__name__)
        holders = [vars(own)[kind] for kind in ("_parameters", "_buffers") if kind in vars(own)]  # a wrapper may lack them
        found.extend((holder, key, f"{path}.{key}" if path else key) for holder in holders for key in holder)
    return found


def _own_hidden(module: nn.Module, twins: Twins) -> None:
    """Modules that are not registered are out of functional_call's reach: they get tensors of their own here."""
    registered = {id(m) for m in module.modules()}
    for twin in [t for t in twins.values() if isinstance(t, nn.Module) and id(t) not in registered]:
        twins.own_tensors = True
        for kind in ("_parameters", "_buffers"):
            own = twin.__dict__[kind]
            for key, tensor in own.items():
                if tensor is not None:
                    own[key] = tensor.detach().clone() if kind == "_buffers" else tensor.detach()


def _filled_in(shell: Shell) -> Shell:
    """Fill in the names: parameters before buffers, each tensor under the first of its names."""
    names: dict[int, str] = {}  # id of a tensor -> its first name
    seen: set[tuple[int, str]] = set()  # places: a module may have several names
    for kind in ("_parameters", "_buffers"):
        for path, owner in shell.modules.items():
            for key, tensor in owner.__dict__[kind].items():
                if tensor is None:
                    continue
                full = f"{path}.{key}" if path else key
                name = shell.aliases[full] = names.setdefault(id(tensor), full)
                if name not in shell.tensors:
                    shell.tensors[name] = tensor.detach()
                    if kind == "_buffers":
                        shell.buffers.add(name)
                        shell.optional.update(
                            {name} & {f"{path}.{k}" if path else k for k in owner._non_persistent_buffers_set}
                        )
                if (id(owner), key) not in seen:
                    seen.add((id(owner), key))
                    shell.slots[full] = name
    return with_slots(shell, shell.slots)


def with_slots(shell: Shell, slots: dict[str, str]) -> Shell:
    """The shell with the places that a state fills."""
    places: list[Place] = []
    for full, name in slots.items():
        path, _, key = full.rpartition(".")
        tensors = vars(shell.modules[path])
        places.append((tensors["_parameters" if key in tensors["_parameters"] else "_buffers"], key, name))
    return shell._replace(slots=slots, places=places)
