"""What a call may not change: everything that a model leads to, bit for bit, and the state of the process."""

import functools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Facts = dict[str, Any]


def facts_of(roots: Mapping[str, Any]) -> Facts:
    """Of each path from the roots, what is there: values of tensors and plain values, and the identity of all else."""
    found: Facts = {}
    seen: dict[int, Any] = {}  # keeps what it has seen, so that no number is given twice
    waiting = list(roots.items())
    while waiting:
        path, value = waiting.pop()
        found[path] = _fact(value)
        if id(value) not in seen:
            seen[id(value)] = value
            waiting += [(f"{path}{step}", part) for step, part in _parts(value)]
    return found


def process() -> Facts:
    """The generators, and the modes of torch."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
        "NumPy's generator": (kind, keys.tolist(), rest),
        "the grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's defaults": (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        "autocast": torch.is_autocast_enabled(),
    }


def changed(before: Facts, after: Facts) -> list[str]:
    """The paths where something else is than was."""
    return sorted(path for path in {*before, *after} if not _same(before.get(path), after.get(path)))


def _fact(value: Any) -> Any:
    if isinstance(value, Tensor):
        where = value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.requires_grad
        return value.detach().clone(), (id(value), *where, None if value.is_inference() else value._version)
    if isinstance(value, (str, int, float, complex, bytes, type(None))):
        return value
    return type(value), id(value), len(value) if isinstance(value, (dict, list, tuple, set)) else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from [(".grad", value.grad)] if value.is_leaf else []
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from ((f".cell {i}", cell.cell_contents) for i, cell in enumerate(value.__closure__ or ()))
        yield from ((f".default {i}", part) for i, part in enumerate(value.__defaults__ or ()))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((f".argument {i}", part) for i, part in enumerate(value.args))
    elif isinstance(value, nn.Module) or type(value).__module__ == "fuzz":
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        yield from ((f".{name}", getattr(value, name)) for name in getattr(type(value), "__slots__", ()))
