"""Where the graph from a tensor to a score ends: a forward pass is watched, and each end is named by module and function."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn.model.capture import Tapped
from camfn.model.guard import is_metadata, traits_of
from camfn.model.ports import unrecorded
from camfn.model.torch_errors import WITHOUT_GRADIENTS

_OTHERWISE = "use a method without gradients, such as camfn.score_cam or camfn.mean_cam"


class End(NamedTuple):
    """A function that gave a tensor without a graph, from one that has a graph."""

    place: str  # where it ran
    function: str
    why: str  # why it gave no graph; empty if it is not known
    at_once: bool  # whether it took the followed tensor itself


class Reason(NamedTuple):
    """Why no gradient reaches a tensor."""

    sentence: str  # empty if a gradient does reach it
    cut: bool  # whether the score depends on the tensor, and the graph ends in between


class GraphEnds(TorchFunctionMode):
    """Follow the values of one leaf, which alone requires grad, and record where their graph ends.

    A tensor that requires grad hangs on the leaf. A tensor that descends from the leaf and does not require grad has come
    through an end. It sees what a torch-function mode sees: no scripted functions, no NumPy, and no other threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.leaf: Tensor | None = None
        self.left: list[End] = []  # the ends of what went to NumPy or became a Python number
        self._lost: dict[Any, tuple[Tensor, tuple[End, ...]]] = {}  # by memory, which the tensor keeps from being reused

    def ends_of(self, tensor: Tensor) -> tuple[End, ...]:
        """The ends that a tensor without a graph has come through, in the order of execution."""
        return self._lost.get(_compat.storage_id(tensor), (tensor, ()))[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        if self.leaf is None or is_metadata(traits):
            return func(*args, **kwargs)
        given = _tensors(_read_by(func, args, kwargs))
        alive = [tensor for tensor in given if tensor.grad_fn is not None or tensor is self.leaf]
        ends = dict.fromkeys(end for tensor in given if not tensor.requires_grad for end in self.ends_of(tensor))
        out = func(*args, **kwargs)
        if alive or ends:
            written = traits.targets(args, kwargs) if traits.targets else []
            made = _tensors(out)
            for tensor in (*made, *map(_compat.unwrapped, written)):
                if not tensor.requires_grad:
                    new = [self._end(func, tensor, alive)] if alive else []
                    self._lost[_compat.storage_id(tensor)] = tensor, tuple(dict.fromkeys((*ends, *new)))
            if not made and getattr(func, "__name__", "") in _TO_PYTHON:
                self.left += [*ends, *([self._end(func, None, alive)] if alive else [])]
        return out

    def _end(self, func: Any, out: Tensor | None, alive: list[Tensor]) -> End:
        name = getattr(func, "__name__", "")
        name = "detach" if name in ("__get__", "__set__", "detach_") else name  # `.data`
        off = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        why = ""
        if not torch.is_grad_enabled():
            why = f"ran under {off}"
        elif name.startswith("quantize_per") or "quantized" in str(getattr(func, "_qualified_op_name", "")):
            why = "quantizes"
        elif out is None:
            why = "gives a Python number"
        elif not out.is_floating_point():
            why = f"gives {out.dtype}"
        return End(_place(), name, why, any(tensor is self.leaf for tensor in alive))


_TO_PYTHON = frozenset(("item", "tolist", "numpy", "__array__", "__float__", "__int__"))


def _read_by(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments whose values a function uses. Of some it uses the shape and the dtype only."""
    name = getattr(func, "__name__", "")
    if name.endswith("_like") or name.startswith("new_"):
        return ()
    return args[:1] if name == "to" or name.endswith("_as") else (args, kwargs)


def _tensors(given: Any) -> list[Tensor]:
    """The tensors, without the wrappers of `vmap`: the graph that counts is that of the plain tensors inside."""
    return [_compat.unwrapped(leaf) for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]


def _place() -> str:
    """The innermost registered module whose forward runs, by the frames of this thread."""
    inside: list[nn.Module] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, Tapped):
            name = next(filter(None, map(own.name_of, inside)), "")
            return repr(name) if name else "the model's own forward"
        if isinstance(own, nn.Module):
            inside.append(own)
        frame = frame.f_back
    return "the target"


def end_of(what: str, follow: Callable[[GraphEnds], Tensor], moved: Callable[[], Tensor]) -> Reason:
    """Say why no gradient of a score reaches `what`, by one forward pass or two.

    - `follow`: runs the model and returns the score; it sets the leaf of the mode.
    - `moved`: the same score, without a graph, with other values of the leaf.
    """
    mode = GraphEnds()
    with mode:
        score = follow(mode)
    if score.requires_grad:
        return Reason("", False)
    ends = mode.ends_of(score)
    if not ends and torch.equal(score, moved()):
        return Reason(f"the score does not depend on {what}: choose a layer on the way to it, or another target", False)
    for end in (*ends, *mode.left):
        return Reason(_sentence(what, end), True)
    return Reason(
        f"no gradient reaches {what}, though the score depends on it: the graph ends in something that camfn does not see (a "
        f"scripted function, another thread); {_OTHERWISE}",
        True,
    )


def _sentence(what: str, end: End) -> str:
    if end.at_once and end.why.startswith("ran under"):
        return unrecorded(what)
    if end.why == "quantizes":
        return f"no gradient reaches {what}, since {end.place} quantizes ({end.function}): {WITHOUT_GRADIENTS}"
    cut = "detach cuts it" if end.function == "detach" and not end.why else f"{end.function} {end.why}".rstrip()
    return f"no gradient reaches {what}: the graph ends in {end.place}, where {cut}; choose a later layer, or {_OTHERWISE}"
