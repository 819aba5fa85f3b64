"""What differs between torch versions, or lies behind a private name of torch: all of it is here.

camfn needs torch 2.0. Every function below works there too, by the fallback beside it.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def compiling() -> bool:
    """Is `torch.compile` tracing this code?"""
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    dynamo = sys.modules.get("torch._dynamo")  # torch < 2.1; not loaded means not compiling
    return dynamo is not None and dynamo.is_compiling()


_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: the stubs do not have it


def transformed() -> bool:
    """Are we inside `vmap`, `grad`, `jvp` or `torch.compile`, where values cannot be read?"""
    return compiling() or _functorch.peek_interpreter_stack() is not None


def recording() -> bool:
    """Are we inside `functionalize`, where operations are written down?"""
    level = _functorch.peek_interpreter_stack()
    return level is not None and level.key() == _functorch.TransformType.Functionalize


def modes_break() -> bool:
    """Inside `jvp` on an old torch, whose decompositions fail under a dispatch mode; or so deep that it may be around."""
    if _version() >= (2, 3):
        return False
    level = _functorch.peek_interpreter_stack()
    return level is not None and (level.level() > 1 or level.key() == _functorch.TransformType.Jvp)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def eager(function: F) -> F:
    """`function`, run as plain Python when the caller is being compiled."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (_disabled(function) if compiling() else function)(*args, **kwargs)

    return cast(F, call)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not at import: it loads the compiler, as long as torch itself takes.
    return torch.compiler.disable(function) if hasattr(torch, "compiler") else function


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Inside, torch functions act on plain tensors only: the one way to draw from a generator under `vmap`."""
    guard = torch._C._DisableFuncTorch()
    if hasattr(guard, "__enter__"):
        with guard:
            yield
    else:  # torch 2.0: in force for as long as it lives
        try:
            yield
        finally:
            del guard


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a product is computed in the dtype of its factors."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside what transforms made of it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def storage_id(tensor: torch.Tensor) -> Any:
    """What identifies the memory of a tensor, of whatever shape and however wrapped by transforms."""
    plain = unwrapped(tensor)
    return plain.untyped_storage()._cdata if plain.layout == torch.strided else id(plain)


def parametrizations_are_cached() -> bool:
    """Are we inside `torch.nn.utils.parametrize.cached()`?"""
    return bool(torch.nn.utils.parametrize._cache_enabled)  # pyright: ignore[reportAttributeAccessIssue]


def owns_memory(tensor: torch.Tensor) -> bool:
    """Is the memory torch's own, and not NumPy's or somebody else's? On an old torch that cannot tell: yes."""
    plain = unwrapped(tensor)
    resizable = plain.layout == torch.strided and getattr(plain.untyped_storage(), "resizable", None)
    return resizable() if resizable else True


def storages(tensors: Mapping[str, torch.Tensor]) -> dict[Any, str]:
    """The names of tensors by what identifies their memory."""
    if _functorch.peek_interpreter_stack() is not None:
        return {storage_id(tensor): name for name, tensor in tensors.items()}
    strided = torch.strided
    return {(t.untyped_storage()._cdata if t.layout == strided else id(t)): name for name, t in tensors.items()}


_QUANTISED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)


def is_quantised(tensor: torch.Tensor) -> bool:
    """Does it hold integers that stand for floats? By its dtype, since `is_quantized` is False inside transforms."""
    return tensor.dtype in _QUANTISED


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Is `grad`, `vjp` or `jvp` following this tensor?"""
    while not compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, as a constant to the innermost gradient that is being taken, and to no other.

    `detach` and `no_grad` would make it one to all gradients around as well.
    """
    level = _functorch.peek_interpreter_stack()
    if level is None:
        return tensor.detach()
    if level.key() == _functorch.TransformType.Grad and _functorch.maybe_get_level(tensor) == level.level():
        return _functorch.get_unwrapped(tensor)
    return tensor


def storage_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors share if they are views of one memory in one shape, wrapped by transforms or not."""
    levels: list[int] = []
    while _functorch.is_functorch_wrapped_tensor(tensor):
        levels.append(_functorch.maybe_get_level(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    return (*levels, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


_Narrowing = tuple[tuple[str, torch.dtype], ...]
_AUTOCAST: "ContextVar[_Narrowing | None]" = ContextVar("the autocast that a method was called under", default=None)


@contextmanager
def unnarrowed() -> Iterator[None]:
    """Inside, autocast is off, so that nothing of ours is narrowed; `narrowed_as_called` has for a model what the caller had.

    A compiler would have to trace the switch: what it compiles is as the caller has it.
    """
    if compiling() or _AUTOCAST.get() is not None:
        yield
        return
    found = narrowing()
    token = _AUTOCAST.set(found)
    try:
        with ExitStack() as stack:
            for kind, _ in found:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _AUTOCAST.reset(token)


def narrowed_as_called() -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts for the forwards of a model: under the autocast of the caller, where that was switched off."""
    found = None if compiling() else _AUTOCAST.get()
    return functools.partial(_narrowed, found) if found else nullcontext


@contextmanager
def _narrowed(found: _Narrowing) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in found:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def narrowing() -> _Narrowing:
    """The kinds of device that models run under autocast on, and in what."""
    found = _AUTOCAST.get()
    return tuple((kind, _autocast_dtype(kind)) for kind in _KINDS if _is_autocast(kind)) if found is None else found


_KINDS = ("cpu", "cuda", "mps", "xpu")


def _is_autocast(kind: str) -> bool:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.is_autocast_enabled(kind)
    return torch.is_autocast_enabled() if kind == "cuda" else kind == "cpu" and torch.is_autocast_cpu_enabled()


def _autocast_dtype(kind: str) -> torch.dtype:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.get_autocast_dtype(kind)
    return torch.get_autocast_gpu_dtype() if kind == "cuda" else torch.get_autocast_cpu_dtype()


def apart(function: Callable[[], T]) -> T:
    """What `function` gives where no transform is: in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, function).result()


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Does the device compute in this narrow dtype, and not only store it? Where it cannot be told: no."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return dtype == torch.float16 and device.type == "mps"
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names.get(dtype, ()))


def can_compile() -> str:
    """Why `torch.compile(fullgraph=True)` cannot take our kernel on this installation; empty if it can."""
    if _version() < (2, 3):
        return f"torch {torch.__version__} cannot compile vmap and functional_call into one graph (torch 2.3 can)"
    if not torch._dynamo.is_dynamo_supported():
        return f"torch.compile does not support Python {sys.version.split()[0]} here"
    return ""


def compiled(function: types.FunctionType, **options: Any) -> Callable[..., Any]:
    """`function` compiled as one graph, with a recompile limit of its own.

    torch counts recompilations per code object, shared by every user of it, and the ninth raises: so each kernel gets
    a code object of its own (newer torch has options for this, older has not).
    """
    code = function.__code__
    own = types.FunctionType(
        code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False, **options)
