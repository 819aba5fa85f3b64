"""Torch-function modes that watch a forward pass, and stop random draws and writes before they happen.

A torch-function mode sees every torch function that this thread calls from Python, also under `vmap`, `grad`, `vjp` and
`jvp`. It does not see scripted or traced functions, other threads, `Tensor.set_`, NumPy, or the inside of `torch.compile`.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn._errors import RefusedError
from camfn.model.memory import Ledger


def input_called(number: int) -> str:
    """Return the name of an input, as used next to the names of the state."""
    return f"input {number}"


class WriteError(BaseException):
    """A forward is about to write to a tensor that it shares with the caller.

    The call starts again with a copy of the tensor. This is a `BaseException`, so that no `except Exception` in a forward or
    a fallback catches it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Allowed(NamedTuple):
    """The tensors that belong to one run of a private copy."""

    state: Mapping[str, Tensor]
    copied: frozenset[str]  # names of the tensors and inputs that are copies made for this run
    inputs: list[Any]  # the leaves of the inputs
    twins: Mapping[int, Any]  # id of a caller's object -> its copy
    foreign: Mapping[int, str]  # id of a tensor of the caller's own modules -> its name


class Guard(TorchFunctionMode):
    """Refuse random draws and the caller's own modules, and stop writes to shared tensors.

    Raises `RefusedError` for the first two and `WriteError` for the last, before the function runs.
    """

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self.allowed = allowed
        self.foreign = allowed.foreign
        self._names: dict[Any, str] | None = None  # names of the state and inputs by storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits is not _METADATA:
            foreign = self.foreign
            for arg in (*args, *kwargs.values()) if kwargs else args:
                if id(arg) in foreign or (type(arg) in _SEQUENCES and not _NUMBERS.issuperset(map(type, arg))):
                    self._check_owner(arg)
            if "out" in kwargs:
                for target in _tensors(kwargs["out"]):
                    self._write(target, traits)
            if traits is not _PLAIN:
                self._look(traits, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, traits: "Traits", args: Any, kwargs: Any) -> None:
        if traits.draws is not None and traits.draws(args, kwargs):
            raise RefusedError(
                f"the model draws random numbers in eval mode ({traits.name}): its scores would differ from forward "
                "to forward; make the layer that draws obey self.training"
            )
        for target in traits.targets(args, kwargs) if traits.targets else ():
            self._write(target, traits)

    def _check_owner(self, given: Any) -> None:
        """Raise RefusedError for tensors of the caller's own module objects, unless they are arguments of this run."""
        for leaf in tree_flatten(given)[0]:
            name = self.foreign.get(id(leaf))
            if name is not None and not any(leaf is own for own in self._handed_in()):
                raise RefusedError(_unfollowed_message(f"{name!r} of your model"))

    def _handed_in(self) -> Iterator[Any]:
        yield from self.allowed.state.values()
        yield from self.allowed.inputs

    def _write(self, target: Tensor, traits: "Traits") -> None:
        name = self._name_of(target)
        if name is None:
            self._check_statistics(target, traits)
        elif name not in self.allowed.copied:
            raise WriteError(name)

    def _name_of(self, target: Tensor) -> str | None:
        """Return the name of the state tensor or input that has this memory."""
        if self._names is None:
            inputs = {input_called(i): leaf for i, leaf in enumerate(self.allowed.inputs) if isinstance(leaf, Tensor)}
            self._names = _compat.storages({**inputs, **self.allowed.state})
        return self._names.get(_compat.storage_id(target))

    def _check_statistics(self, target: Tensor, traits: "Traits") -> None:
        """Raise RefusedError if the running statistics that are written are not those of the copy."""
        if traits.statistics:
            own = (twin for twin in self.allowed.twins.values() if isinstance(twin, Tensor))
            if all(_compat.storage_id(target) != _compat.storage_id(twin) for twin in own):
                raise RefusedError(_unfollowed_message("the running statistics of a norm in train mode"))
        elif traits.name == "add_" and not target.ndim:
            # A norm layer in train mode increments its batch counter before it computes anything.
            owner = sys._getframe(4).f_locals.get("self")
            if isinstance(owner, _NormBase) and all(owner is not twin for twin in self.allowed.twins.values()):
                raise RefusedError(_unfollowed_message(f"a {type(owner).__name__} in train mode"))


def _unfollowed_message(what: str) -> str:
    return (
        f"the forward reached {what}, and not that of camfn's private copy: the module is held by something that the copy does "
        "not follow (a cache, a weak reference, a global, a context variable); register the module, and call it through self"
    )


class Followed(TorchFunctionMode):
    """Refuse convolutions, linear layers and batch norms that are not of the private copy, for a method that needs all."""

    def __init__(self, kinds: tuple[type, ...], own: Iterable[Any]) -> None:
        super().__init__()
        self.kinds, self.own = kinds, {id(module) for module in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith(("conv", "linear", "batch_norm")):
            layer = _calling_module()
            if isinstance(layer, self.kinds) and id(layer) not in self.own:
                raise RefusedError(_unfollowed_message(f"a {type(layer).__name__}"))
        return func(*args, **(kwargs or {}))


def _calling_module() -> Any:
    """Return the module whose method calls the function that a mode sees."""
    frame: Any = sys._getframe(2)
    while frame is not None and not isinstance(frame.f_locals.get("self"), torch.nn.Module):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


class Watcher(TorchFunctionMode):
    """Record which functions take the followed tensors, and whether a value is read in Python. `origins` are told of it."""

    def __init__(self, origins: "Origins") -> None:
        super().__init__()
        self.reads = False
        self.origins = origins
        self.consumers: dict[str, list[Any]] = {}  # name of a followed tensor -> the functions that took it
        self._names: dict[int, str] = {}  # id of a living tensor -> its name

    def follow(self, tensor: Tensor, name: str) -> None:
        """Record from now on which functions take this tensor."""
        if id(tensor) not in self._names:
            weakref.finalize(tensor, self._names.pop, id(tensor)).atexit = False
        self._names[id(tensor)] = name
        self.consumers[name] = []

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of a followed tensor, else None."""
        return self._names.get(id(tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits is not _METADATA:
            if traits.reads:
                self.reads = True
                self.origins.read(traits.name, (args, kwargs))
            for leaf in tree_flatten((args, kwargs))[0] if self._names else ():
                if id(leaf) in self._names:
                    self.consumers[self._names[id(leaf)]].append(func)
        return func(*args, **kwargs)


class Origins(Ledger):
    """Record whether sizes or Python numbers depend on values (`reads`), also on those of the input (`asks`), and whether an
    operation takes a tensor of unknown origin (`unseen`).

    The origin is unknown if no recorded operation made the tensor, and it is neither `fixed` nor of the `inputs`. Another
    thread, NumPy or a cache may have made it. It may hang on the input.
    """

    def __init__(self, fixed: Iterable[Any], inputs: Iterable[Any]) -> None:
        super().__init__()
        self.reads = self.unseen = False
        self.asks = ""  # the function that read a value which hangs on the input
        given = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (fixed, inputs)]
        self._kept = given  # alive, so that their memory is not reused
        # the memory that hangs on no input, and that of the inputs
        self._fixed, moving = ({_compat.storage_id(leaf) for leaf in leaves} for leaves in given)
        self._given = self._fixed | moving

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_values(func, args):
            self.reads = True
            self.read(str(func), (args, kwargs))
        fresh = func is torch.ops.aten.lift_fresh.default and _compat.owns_memory(args[0])  # from `torch.tensor` of numbers
        given = set() if fresh else _memory((args, kwargs))
        self.unseen = self.unseen or not all(map(self._is_known, given))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = _memory(out) | {_compat.storage_id(leaf) for leaf in _written(func, args, kwargs)}
        if given <= self._fixed:
            self._fixed |= made
        else:
            self._fixed -= made
        return out

    def read(self, name: str, given: Any) -> None:
        """Record that a function reads a value of these tensors in Python."""
        if not _memory(given) <= self._fixed:
            self.asks = self.asks or name

    def _is_known(self, storage: Any) -> bool:
        return storage in self._given or self._holders[storage] > 0


def _memory(value: Any) -> set[Any]:
    """Return the memory of the tensors in a value."""
    return {_compat.storage_id(leaf) for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)}


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **(kwargs or {})}
    written = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [leaf for name in written for leaf in _tensors(given.get(name))]


def reads_values(func: Any, args: Any) -> bool:
    """Return True if an operation's result is a Python number or a size that depends on values."""
    if func is torch.ops.aten.index.Tensor:  # the size depends on values for masks, not for indices
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


# --------------------------------------------------------------------------------------------------- function traits

Test = Callable[[Any, Any], bool]
Targets = Callable[[Any, Any], list[Tensor]]


class Traits(NamedTuple):
    """The side effects of a torch function."""

    name: str
    draws: Test | None = None  # (args, kwargs) -> whether it draws random numbers
    reads: bool = False  # whether its result, or the result's size, is a Python value that depends on tensor values
    targets: Targets | None = None  # (args, kwargs) -> the tensors that it writes to
    statistics: bool = False  # whether those are running statistics


_PLAIN, _METADATA = Traits(""), Traits("metadata")
_SEQUENCES = frozenset((list, tuple))
_NUMBERS = frozenset((int,))
"""The item types of most sequences among arguments: sizes."""

_METADATA_OF = frozenset(
    (
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__),
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_sparse", "is_quantized")
        ),
    )
)
"""Functions that read no value."""

_READS = frozenset(
    (
        *(
            "item",
            "tolist",
            "numpy",
            "__array__",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
            "__complex__",
            "__contains__",
        ),
        *("equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"),
    )
)

_DRAWS = frozenset(
    (
        *(
            "rand",
            "randn",
            "randint",
            "randperm",
            "rand_like",
            "randn_like",
            "randint_like",
            "normal",
            "bernoulli",
            "multinomial",
        ),
        *("poisson", "binomial", "uniform_", "normal_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"),
        *("bernoulli_", "kaiming_uniform_", "kaiming_normal_", "gumbel_softmax", "_standard_gamma", "_sample_dirichlet"),
    )
)

_DROPS = {
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"), (1, 2)),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), (1, 2)),
    **dict.fromkeys(("dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"), (1, 2)),
}
"""Positions of the probability and of the training flag in the dropout family."""

_SHARES_MEMORY = frozenset(("numpy", "__array__", "__dlpack__"))
"""Functions that share a tensor's memory with code that may write to it."""


def is_metadata(traits: Traits) -> bool:
    """Return True for functions that tell the shape, the dtype or the like of a tensor, and read no value."""
    return traits is _METADATA


@functools.cache
def traits_of(func: Any) -> Traits:
    """Return the traits of a torch function, from its name and signature."""
    name = getattr(func, "__name__", "")
    if func in _METADATA_OF:
        return _METADATA
    signature = _signature(func)
    traits = Traits(
        name, _draws(name, signature), name in _READS, _targets(func, name, signature), name in ("batch_norm", "instance_norm")
    )
    return _PLAIN if traits[1:] == (None, False, None, False) else traits


def _signature(func: Any) -> inspect.Signature | None:
    """Return the signature of a Python function, else None. torch's built-in functions have none."""
    try:
        return inspect.signature(func) if inspect.isfunction(func) else None
    except ValueError:
        return None


class _Argument(NamedTuple):
    """An argument of a function, by position or name."""

    name: str
    place: int | None
    default: Any

    def of(self, args: Any, kwargs: Any) -> Any:
        if self.place is not None and len(args) > self.place:
            return args[self.place]
        return kwargs.get(self.name, self.default)


def _argument(signature: inspect.Signature | None, name: str, place: int | None, default: Any) -> _Argument:
    """Find an argument in the signature. Without a signature, use the given position."""
    if signature is None or name not in signature.parameters:
        return _Argument(name, place, default)
    found = signature.parameters[name]
    by_name = found.kind == found.KEYWORD_ONLY
    return _Argument(name, None if by_name else [*signature.parameters].index(name), found.default)


def _draws(name: str, signature: inspect.Signature | None) -> Test | None:
    def all_of(*switches: _Argument) -> Test:
        return lambda args, kwargs: all(switch.of(args, kwargs) for switch in switches)

    if name in _DRAWS:
        return lambda args, kwargs: True
    if name in _DROPS:
        p, train = _DROPS[name]
        flag = "training" if signature is not None else "train"
        return all_of(_argument(signature, "p", p, 0.5), _argument(signature, flag, train, False))
    if name in ("rrelu", "rrelu_"):
        return all_of(_argument(signature, "training", 3, False))
    if name == "scaled_dot_product_attention":
        return all_of(_argument(signature, "dropout_p", 4, 0.0))
    if name == "multi_head_attention_forward":
        return all_of(_argument(signature, "dropout_p", None, 0.0), _argument(signature, "training", None, True))
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return _recurrent_draws
    if name.startswith("fractional_max_pool"):
        samples = _argument(signature, "_random_samples", None, None)
        return lambda args, kwargs: samples.of(args, kwargs) is None
    return None


def _recurrent_draws(args: Any, kwargs: Any) -> bool:
    """Return True if a recurrent network drops. Dropout and its flag are 3 and 4 positions after the list of weights."""
    weights = max((i for i, arg in enumerate(args) if isinstance(arg, (list, tuple))), default=0)
    return bool(all(args[weights + 3 : weights + 5])) and len(args) > weights + 4


def _targets(func: Any, name: str, signature: inspect.Signature | None) -> Targets | None:
    if name in ("batch_norm", "instance_norm"):
        return _running_statistics(signature, name)
    if name in ("embedding", "embedding_bag"):
        return _renormed_weight(signature)
    if name == "__set__":
        return _first if func == Tensor.data.__set__ else None  # pyright: ignore[reportAttributeAccessIssue]
    if name == "fused_moving_avg_obs_fake_quant":
        return lambda args, kwargs: [arg for arg in args[3:7] if isinstance(arg, Tensor)]
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _SHARES_MEMORY or name == "__setitem__" or (name.startswith("__i") and name in _AUGMENTED):
        return _first
    if signature is not None and "inplace" in signature.parameters:
        inplace = _argument(signature, "inplace", None, False)
        return lambda args, kwargs: _first(args, kwargs) if inplace.of(args, kwargs) else []
    return None


_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    )
)


def _first(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors of the first argument, which is a list in `torch._foreach_add_`."""
    first = args[0] if args else kwargs.get("input", kwargs.get("self", kwargs.get("tensor")))
    return [first] if isinstance(first, Tensor) else _tensors(first)


def _tensors(given: Any) -> list[Tensor]:
    return [] if given is None else [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]


def _running_statistics(signature: inspect.Signature | None, name: str) -> Targets:
    """Return the running statistics, if the function updates them."""
    first = 1 if signature is not None else 3  # torch.batch_norm has weight and bias before them
    flag = "training" if signature is not None and name == "batch_norm" else "use_input_stats"
    own = _argument(signature, flag, 5, True)
    parts = [_argument(signature, part, first + i, None) for i, part in enumerate(("running_mean", "running_var"))]

    def targets(args: Any, kwargs: Any) -> list[Tensor]:
        if not own.of(args, kwargs):
            return []
        return [tensor for tensor in (part.of(args, kwargs) for part in parts) if isinstance(tensor, Tensor)]

    return targets


def _renormed_weight(signature: inspect.Signature | None) -> Targets:
    """Return the embedding's weight, if `max_norm` rescales its rows in place."""
    norm, weight = _argument(signature, "max_norm", None, None), _argument(signature, "weight", 1, None)

    def targets(args: Any, kwargs: Any) -> list[Tensor]:
        if norm.of(args, kwargs) is None:
            return []
        found = weight.of(args, kwargs)
        return [found] if isinstance(found, Tensor) else []

    return targets
