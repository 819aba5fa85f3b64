"""Free memory, peak memory of a computation, and out-of-memory errors."""

import os
import re
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on `device`, or `None` if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [amount for amount in (_available(), _left_in_group()) if amount is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
        return int(match[1]) * 1024 if match else None
    except OSError:
        names = getattr(os, "sysconf_names", {})
        known = "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def _left_in_group() -> int | None:
    """Return the bytes below the container's memory limit, if any. A container is killed at its limit."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cache = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.M)
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + (int(cache[1]) if cache else 0)


def is_exhausted(error: BaseException) -> bool:
    """Return True for out-of-memory errors of torch's allocators. Only these are retried with smaller chunks."""
    kinds = tuple(kind for kind in (getattr(torch, "OutOfMemoryError", None), torch.cuda.OutOfMemoryError) if kind)
    cpu = type(error) is RuntimeError and "DefaultCPUAllocator:" in str(error)
    return isinstance(error, kinds) or cpu


class Ledger(TorchDispatchMode):
    """Count the bytes of living tensors that were made inside the mode; `peak` is their maximum.

    Workspaces within an operator are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._holders: Counter[int] = Counter()  # storage -> number of tensors that hold it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_flatten((args, kwargs))[0] if _is_dense(leaf)}
        for leaf in tree_flatten(out)[0]:
            if _is_dense(leaf) and (_storage(leaf) not in given or _storage(leaf) in self._holders):
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if not self._holders[storage]:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._holders[storage] += 1
        weakref.finalize(tensor, self._release, storage, size).atexit = False

    def _release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.alive -= size


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
