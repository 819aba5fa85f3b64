"""What must not change: arguments with all that they hold, and the process."""

import collections
import contextlib
import itertools
import random
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camfn import _compat


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Everything that tells one tensor from another, and from itself at another time."""
    plain = tensor.detach()
    return (
        *(id(tensor), type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr()),
        *(tensor.requires_grad, id(tensor.grad_fn) if tensor.grad_fn is not None else None),
        None if tensor.is_inference() else tensor._version,
        (plain.float() if tensor.dtype == torch.bfloat16 else plain).cpu().numpy().tobytes(),
        fingerprint(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None,
    )


def picture(value: Any, seen: set[int] | None = None) -> Any:
    """A value as nested tuples of plain data: identities, classes, attributes, tensors, in their order."""
    seen = set() if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return fingerprint(value)
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    head = id(value), type(value)
    if isinstance(value, dict):
        return (*head, *((repr(key), picture(item, seen)) for key, item in value.items()))
    if isinstance(value, (list, tuple, collections.deque)):
        return (*head, *(picture(item, seen) for item in value))
    if isinstance(value, types.FunctionType):
        return (*head, *(picture(cell.cell_contents, seen) for cell in value.__closure__ or ()))
    if isinstance(value, types.MethodType):
        return (type(value), value.__func__, picture(value.__self__, seen))
    return (*head, picture(vars(value), seen)) if hasattr(value, "__dict__") and not isinstance(value, type) else head


def process() -> dict[str, Any]:
    """What belongs to the process or the thread, and to no argument."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the one that the process has
    return {
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "numpy rng": (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
        "python rng": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled(), torch.is_autocast_cache_enabled()),
        "default dtype": torch.get_default_dtype(),
        "warning filters": (id(warnings.filters), tuple(warnings.filters), warnings.showwarning),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "threads": torch.get_num_threads(),
        "nn.Module": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, nn.Module.forward),
        **_compat.switches(),
    }


@contextlib.contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """Inside, nothing changes of `values`, of what they hold, and of the process. Otherwise an `AssertionError` says what did.

    Modules that are imported meanwhile may add their warning filters.
    """
    __tracebackhide__ = True
    before, modules = (process(), picture(values)), set(sys.modules)
    try:
        yield
    finally:
        after = process(), picture(values)
        imported = {"warning filters"} if set(sys.modules) - modules else set()
        moved = [key for key in before[0] if before[0][key] != after[0][key] and key not in imported]
        if moved:
            raise AssertionError(f"the process is not what it was: {', '.join(moved)}")
        arguments = list(itertools.islice(differences(before[1], after[1]), 8))
        if arguments:
            raise AssertionError(f"an argument is not what it was: {'; '.join(arguments)}")


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two pictures differ: the names of attributes and keys on the way there."""
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        named = len(old) == 2 and isinstance(old[0], str)
        for pair in zip(old, new):
            yield from differences(*pair, f"{path}.{old[0]}" if named else path)
    elif old != new:
        yield f"{path}: {str(old)[:40]} -> {str(new)[:40]}"
