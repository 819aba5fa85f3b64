"""Refuse models that draw random numbers in eval mode, before anything is drawn."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from camfn import _compat
from camfn._errors import CamError

TURNS = threading.RLock()
"""A lock for forwards under a dispatch mode, of which each call of a method runs one. Sweeps do not take it.

torch creates an operator's Python handle when a mode first sees it, without a lock. Two threads that do so at once can crash.
"""


def refusing_draws() -> AbstractContextManager[Any]:
    """Return a context in which random draws raise CamError, but not inside `jvp` on an old torch, which a mode breaks."""
    return nullcontext() if _compat.modes_break() else _refusing()


@contextmanager
def _refusing() -> Iterator[None]:
    with TURNS, _NoDraws():
        yield


class _NoDraws(TorchDispatchMode):
    """Raise CamError before an operation of this thread draws random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse_draw(func: Any, args: Any, kwargs: Any) -> None:
    """Raise CamError if an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        raise CamError(
            f"the model draws random numbers in eval mode ({func}): its scores would differ from forward to forward; "
            "make the layer that draws obey self.training"
        )


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return True if a tagged operation draws. Attention and rrelu have the tag, but draw only with dropout or in training."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    return all(given.get(name, default) not in (0.0, False) for name, default in _defaults(func))


def _defaults(func: Any) -> list[tuple[str, Any]]:
    switches = ("dropout_p", "train", "training")
    return [(a.name, a.default_value) for a in func._schema.arguments if a.name in switches]
