"""Compatibility: everything that differs between torch versions or uses a private name of torch.

camfn needs torch 2.0. Every function here has a fallback for it.
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
    """Return True while `torch.compile` traces this code."""
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    dynamo = sys.modules.get("torch._dynamo")  # torch < 2.1: not compiling if it is not loaded
    return dynamo is not None and dynamo.is_compiling()


_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: the stubs do not have it


def transformed() -> bool:
    """Return True inside `vmap`, `grad`, `jvp` or `torch.compile`, where values cannot be read."""
    return compiling() or _functorch.peek_interpreter_stack() is not None


def recording() -> bool:
    """Return True inside `functionalize`, where operations are recorded."""
    level = _functorch.peek_interpreter_stack()
    return level is not None and level.key() == _functorch.TransformType.Functionalize


def modes_break() -> bool:
    """Return True inside (or possibly inside) `jvp` on an old torch, whose decompositions fail under a dispatch mode."""
    if _version() >= (2, 3):
        return False
    level = _functorch.peek_interpreter_stack()
    return level is not None and (level.level() > 1 or level.key() == _functorch.TransformType.Jvp)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def eager(function: F) -> F:
    """Decorate a function to run uncompiled when the caller is compiled."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (_disabled(function) if compiling() else function)(*args, **kwargs)

    return cast(F, call)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not at import, since this loads the compiler, which takes as long as importing torch.
    return torch.compiler.disable(function) if hasattr(torch, "compiler") else function


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Disable functorch's transforms. This is the only way to draw from a generator under `vmap`."""
    guard = torch._C._DisableFuncTorch()
    if hasattr(guard, "__enter__"):
        with guard:
            yield
    else:  # torch 2.0: active until it is deleted
        try:
            yield
        finally:
            del guard


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast, so that products are computed in the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor inside functorch's wrappers."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor inside functorch's wrappers: for each `vmap` around it, its first sample."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    inside = sample_of(_functorch.get_unwrapped(tensor))
    axis = _functorch.maybe_get_bdim(tensor)
    return inside.select(axis, 0) if axis >= 0 else inside


def storage_id(tensor: torch.Tensor) -> Any:
    """Return an identifier of a tensor's memory, independent of its shape and of transforms."""
    plain = unwrapped(tensor)
    return plain.untyped_storage()._cdata if plain.layout == torch.strided else id(plain)


def parametrizations_are_cached() -> bool:
    """Return True inside `torch.nn.utils.parametrize.cached()`."""
    return bool(torch.nn.utils.parametrize._cache_enabled)  # pyright: ignore[reportAttributeAccessIssue]


def owns_memory(tensor: torch.Tensor) -> bool:
    """Return True if torch owns the memory, not NumPy or another library. On an old torch, which cannot tell, return True."""
    plain = unwrapped(tensor)
    resizable = plain.layout == torch.strided and getattr(plain.untyped_storage(), "resizable", None)
    return resizable() if resizable else True


def storages(tensors: Mapping[str, torch.Tensor]) -> dict[Any, str]:
    """Return the names of tensors by the identifier of their memory."""
    if _functorch.peek_interpreter_stack() is not None:
        return {storage_id(tensor): name for name, tensor in tensors.items()}
    strided = torch.strided
    return {(t.untyped_storage()._cdata if t.layout == strided else id(t)): name for name, t in tensors.items()}


_QUANTIZED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Return True for quantized tensors, by the dtype: `is_quantized` is False inside transforms."""
    return tensor.dtype in _QUANTIZED


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Return True if `grad`, `vjp` or `jvp` tracks this tensor."""
    while not compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a tensor from the innermost gradient transform only.

    `detach` and `no_grad` would detach it from all outer transforms as well.
    """
    level = _functorch.peek_interpreter_stack()
    if level is None:
        return tensor.detach()
    if level.key() == _functorch.TransformType.Grad and _functorch.maybe_get_level(tensor) == level.level():
        return _functorch.get_unwrapped(tensor)
    return tensor


def storage_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors with the same memory, shape and strides at the same transform levels."""
    levels: list[int] = []
    while _functorch.is_functorch_wrapped_tensor(tensor):
        levels.append(_functorch.maybe_get_level(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    return (*levels, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


_Narrowing = tuple[tuple[str, torch.dtype], ...]
_AUTOCAST: "ContextVar[_Narrowing | None]" = ContextVar("the autocast that a method was called under", default=None)


@contextmanager
def unnarrowed() -> Iterator[None]:
    """Turn autocast off for camfn's own arithmetic. `narrowed_as_called` restores it for the model.

    Under `torch.compile` nothing is switched, since the switch would have to be traced.
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
    """Return a factory of contexts for forwards of the model, under the caller's autocast."""
    found = None if compiling() else _AUTOCAST.get()
    return functools.partial(_narrowed, found) if found else nullcontext


@contextmanager
def _narrowed(found: _Narrowing) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in found:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def narrowing() -> _Narrowing:
    """Return the device types with autocast, and their dtypes."""
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
    """Call `function` outside all transforms, in a separate thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, function).result()


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the device computes in this narrow dtype natively. If unknown, return False."""
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
    """Return why `torch.compile(fullgraph=True)` cannot compile the kernel on this installation, or an empty string."""
    if _version() < (2, 3):
        return f"torch {torch.__version__} cannot compile vmap and functional_call into one graph (torch 2.3 can)"
    if not torch._dynamo.is_dynamo_supported():
        return f"torch.compile does not support Python {sys.version.split()[0]} here"
    return ""


def compiled(function: types.FunctionType, **options: Any) -> Callable[..., Any]:
    """Compile a function as one graph, with its own recompile limit.

    torch counts recompilations per code object, and the ninth raises. Each kernel therefore gets a copy of the code object.
    (Newer versions of torch have options for this.)
    """
    code = function.__code__
    own = types.FunctionType(
        code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False, **options)


def switches() -> dict[str, Any]:
    """torch's switches of the process that only its internals tell."""
    cuda, mha = torch.backends.cuda, torch.backends.mha if hasattr(torch.backends, "mha") else None
    return {
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "fast path": mha.get_fastpath_enabled() if mha else None,
        "fx": sys.modules["torch.fx._symbolic_trace"]._is_fx_tracing_flag,
        "transforms": _functorch.peek_interpreter_stack(),
    }
