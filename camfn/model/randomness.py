"""A model that draws random numbers in eval mode is refused, at the draw, before anything is drawn."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from camfn import _compat
from camfn._errors import CamError

TURNS = threading.RLock()
"""torch makes an operator's Python handle when a mode first meets it, without a lock: two threads that meet it at once can
crash. So forwards under the mode, one for each call of a method, take turns; sweeps do not."""


def refusing_draws() -> AbstractContextManager[Any]:
    """Inside, a model that draws is refused; a compiler cannot trace that, and lets it pass."""
    return nullcontext() if _compat.compiling() or _compat.modes_break() else _refusing()


@contextmanager
def _refusing() -> Iterator[None]:
    with TURNS, _NoDraws():
        yield


class _NoDraws(TorchDispatchMode):
    """Inside, in this thread only, an operation that draws random numbers raises; nothing has been drawn then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse_draw(func: Any, args: Any, kwargs: Any) -> None:
    """Raise where an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
        raise CamError(
            f"the model draws random numbers in eval mode ({func}): its scores would differ from forward to forward; "
            "make the layer that draws obey self.training"
        )


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention and rrelu carry the random tag always, and draw only with dropout or in training."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    return all(given.get(name, default) not in (0.0, False) for name, default in _defaults(func))


def _defaults(func: Any) -> list[tuple[str, Any]]:
    switches = ("dropout_p", "train", "training")
    return [(a.name, a.default_value) for a in func._schema.arguments if a.name in switches]
