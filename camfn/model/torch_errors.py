"""Errors of torch in a forward pass, turned into messages that name the arguments.

They are about mixed dtypes and devices, quantized tensors beside others, checkpoints, and custom `autograd.Function`s that
cannot run. torch raises them deep in the model, without names of tensors. Only errors that torch itself raised, and that the
arguments explain, are turned. Errors that the model raises are passed on unchanged.
"""

import dis
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn._errors import CamError, first_line
from camfn._types import Inputs, State
from camfn.model.memory import is_exhausted
from camfn.model.private_copy import is_quantized


class ForwardError(CamError, RuntimeError):
    """A `CamError` that replaces an error of torch. It is still a `RuntimeError`, for callers that catch that."""


class Given(NamedTuple):
    """The arguments of a forward pass."""

    x: Inputs
    state: State
    own: Mapping[str, Tensor]  # the model's own tensors, which `state` may replace
    ports: Mapping[str, Any]  # nudges and swaps by name
    modules: Mapping[str, nn.Module]


@contextmanager
def about_forward(given: Given) -> Iterator[None]:
    """Turn torch's errors in a forward pass."""
    try:
        yield
    except Exception as error:
        sentence = _forward_error(error, given)
        if sentence:
            raise ForwardError(sentence) from error
        raise


@contextmanager
def about_gradient() -> Iterator[None]:
    """Turn torch's errors in a backward pass."""
    try:
        yield
    except Exception as error:
        sentence = _backward_error(error)
        if sentence:
            raise ForwardError(sentence) from error
        raise


@contextmanager
def about_record(modules: Mapping[str, nn.Module], after: str) -> Iterator[None]:
    """Turn torch's errors while the part after a layer is recorded."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CamError) or is_exhausted(error) or not _is_from_torch(error):
            raise
        said = f"what comes after {after} cannot be recorded ({_first_line(error)})"
        if names := quantized_in(modules):
            raise ForwardError(
                f"{said}, since the model is quantized ({names}): use a method that only reads the layer or masks the input, "
                "such as camfn.mean_cam or camfn.score_cam"
            ) from error
        raise ForwardError(f"{said}: use a method that runs the whole model, such as camfn.grad_cam") from error


WITHOUT_GRADIENTS = "use a method without gradients, such as camfn.score_cam or camfn.mean_cam, or the unquantized model"


def refuse_once(score: Tensor) -> None:
    """Raise CamError if a second derivative would silently be missing.

    torch returns a gradient without a graph from a backward that is marked `once_differentiable`.
    """
    nodes, seen = [score.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function: Any = getattr(node, "_forward_cls", None)
        backward: Any = getattr(function, "backward", None)
        if hasattr(backward, "__wrapped__") and backward.__globals__.get("__name__") == "torch.autograd.function":
            raise CamError(_ONCE.format(function.__name__))
        nodes.extend(after for after, _ in node.next_functions)


_ONCE = (
    "the method needs a second derivative of {}, an autograd.Function of the model, whose backward is marked "
    "once_differentiable: use a method of first derivatives, such as camfn.grad_cam, or remove the mark if the backward can be "
    "differentiated"
)


def quantized_in(modules: Mapping[str, nn.Module]) -> str:
    """Return the names of the first quantized layers for a message, or an empty string."""
    found = [path for path, module in modules.items() if is_quantized(module)]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    return ", ".join(map(repr, outer[:3]))


def _forward_error(error: Exception, given: Given) -> str:
    if isinstance(error, CamError) or not _is_from_torch(error):
        return ""
    return (
        _checkpoint_error(error)
        or _function_error(error)
        or _quantized_error(error, given)
        or _device_error(error, given)
        or _dtype_error(error, given)
    )


def _backward_error(error: Exception) -> str:
    return (
        "" if isinstance(error, CamError) or not _is_from_torch(error) else _checkpoint_error(error) or _function_error(error)
    )


# ----------------------------------------------------------------------------------------------------------- checkpoints


def is_reentrant(error: Exception) -> bool:
    """Return True for torch's error that a checkpoint with `use_reentrant=True` supports only `backward()`."""
    return bool(re.search(r"\.grad\(\)|inputs.{1,3} parameter", str(error))) and _in_checkpoint(error)


def _in_checkpoint(error: Exception) -> bool:
    return any(frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame in _frames(error))


def _checkpoint_error(error: Exception) -> str:
    if not _in_checkpoint(error) or not re.search(r"heckpoint|saved tensor hooks|setup_context|functorch", str(error)):
        return ""
    return (
        f"the model checkpoints its activations (torch.utils.checkpoint), which this call does not support "
        f"({_first_line(error)}): switch that off for the explanation (model.gradient_checkpointing_disable(), "
        "model.set_grad_checkpointing(False), use_checkpoint=False or the like), or use a method without gradients, such as "
        "camfn.score_cam"
    )


# ------------------------------------------------------------------------------------------------ the origin of an error


def _is_from_torch(error: Exception) -> bool:
    """Return True if torch raised the error, in Python or C++."""
    return _raised_in(error) in ("torch", "")


def _raised_in(error: Exception) -> str:
    """Return the package whose `raise` statement raised the error. Empty if C++ raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return ""
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def _first_line(error: Exception) -> str:
    """Return the first line of torch's message, cut to 160 characters."""
    line = first_line(error)
    return line if len(line) <= 160 else line[:157] + "..."


# ------------------------------------------------------------------------------------------------------ autograd.Function


def _function_error(error: Exception) -> str:
    text = str(error)
    if "once_differentiable" in text:
        return _ONCE.format("something")
    if _frames(error)[-1].f_globals.get("__name__") not in ("torch.autograd.function", "torch._functorch.autograd_function"):
        return ""
    who = f"{_function_in(error)}, an autograd.Function of the model,"
    if "backward or vjp" in text:
        return f"{who} has no backward, and so no gradient: use a method without gradients, such as camfn.score_cam"
    if _compat.recording() or "Functionalize" in text:
        return (
            f"{who} cannot be recorded (camfn.head and camfn.lift_cam record what comes after a layer): use a method that "
            "runs the whole model, such as camfn.grad_cam or camfn.ablation_cam"
        )
    if not _compat.transformed():
        return ""
    return (
        f"{who} does not run under the transform that it is called in (vmap, grad, vjp or jvp of torch.func, or "
        f"Sweep(fold=False)): {_first_line(error).partition('. For more')[0]}. Add what torch asks for, or call camfn "
        "without the transform: plain calls of camfn.score_cam and camfn.grad_cam run the Function unchanged"
    )


def _function_in(error: Exception) -> str:
    """Return the name of the Function that torch was about to run."""
    for frame in reversed(_frames(error)):
        for key in ("cls", "autograd_function", "self"):
            found = frame.f_locals.get(key)
            found = getattr(found, "_forward_cls", found)
            if isinstance(found, type) and issubclass(found, torch.autograd.Function):
                return found.__name__
    return "what the model runs"


def _frames(error: Exception) -> list[Any]:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


# -------------------------------------------------------------------------------------------- quantized, devices, dtypes


def _quantized_error(error: Exception, given: Given) -> str:
    names = quantized_in(given.modules)
    if not names or not re.search(r"Quantized(CPU|CUDA)|Could not run 'quantized::|with quantized numbers", str(error)):
        return ""
    return (
        f"the model is quantized ({names}), and a quantized tensor meets one that is not ({_first_line(error)}): "
        "put QuantStub before its quantized layers and DeQuantStub after them; does the model run by itself?"
    )


def _device_error(error: Exception, given: Given) -> str:
    if not re.search(r"device|cuda|meta|mps|xpu|fake impl|\w+ backend", str(error)):
        return ""
    who = [*_tensors(given.x), *_ports(given), *_kinds(given, lambda tensor: tensor.device, [*given.state])]
    found = {tensor.device: name for name, tensor in who}
    if len(found) < 2:
        return ""
    said = _listed(f"{name} is on {tensor.device}" for name, tensor in who)
    meta = " (on the meta device there are no values: load them)" if any(device.type == "meta" for device in found) else ""
    return f"{said}, and torch does not compute across devices ({_first_line(error)}): move all of them to one{meta}"


_DTYPES = re.compile(
    r"dtypes?\b|scalar types?\b|data ?types?\b|[Ii]nput type .* type|[Tt]ype promoting|result type .* cast|expected indices"
    r"|not implemented for '|used as indices must be|LongTensor|only works on Float Tensor|element size change"
)


def _dtype_error(error: Exception, given: Given) -> str:
    text = str(error)
    if not _DTYPES.search(text):
        return ""
    inputs, ports = [*_tensors(given.x)], [*_ports(given)]
    floats = [name for name, tensor in given.state.items() if _has_slope(tensor)]
    state = [*_kinds(given, lambda tensor: tensor.dtype, floats)]
    said = _listed(f"{name} is {tensor.dtype}" for name, tensor in (*inputs, *ports, *state))
    if re.search(r"indices|index tensor", text):
        wrong = any(_has_slope(tensor) for _, tensor in inputs)
        return f"{said}, and the model takes one for indices ({_first_line(error)}): pass those as .long()" if wrong else ""
    known = [tensor.dtype for _, tensor in state]
    expected = known or [torch.float32]
    odd = [(name, tensor) for name, tensor in (*inputs, *ports) if tensor.dtype not in expected]
    odd = [pair for pair in odd if _has_slope(pair[1])] or odd  # integers next to an image are likely to be indices
    if odd:
        name, tensor = max(odd, key=lambda pair: pair[1].ndim)
        way = f"pass {name}.to({expected[0]})"
        if name.startswith("x"):
            if not _has_slope(tensor):
                way += ", preprocessed as in training (a picture: x.float() / 255, then mean and standard deviation)"
            elif len(known) == 1:
                way += f", or a model of its dtype, model.to({tensor.dtype})"
        return f"{said}, and torch does not mix them here ({_first_line(error)}): {way}"
    if len(known) > 1:
        return f"{said}, and torch does not mix them here ({_first_line(error)}): bring the model to one, model.to({known[0]})"
    if known and known[0] not in (torch.float32, torch.float64):
        return f"{said}, which torch has no code for here ({_first_line(error)}): use model.float() and x.float()"
    return ""


def _listed(clauses: Iterable[str]) -> str:
    *rest, last = clauses
    return f"{', '.join(rest)} and {last}" if rest else last


def _has_slope(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(x: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the inputs with their names, such as `x[0]`."""
    if isinstance(x, Tensor):
        yield "x", x
        return
    for key, item in x.items() if isinstance(x, Mapping) else enumerate(x):
        yield from ((f"x[{key!r}]", leaf) for leaf in tree_flatten(item)[0] if isinstance(leaf, Tensor))


def _ports(given: Given) -> Iterator[tuple[str, Tensor]]:
    for name, values in given.ports.items():
        yield from ((name, value) for value in values if isinstance(value, Tensor))


def _kinds(given: Given, of: Callable[[Tensor], Any], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the first tensor of the state of each kind, with its name for a message."""
    whose = "the model" if all(of(given.state[name]) == of(given.own[name]) for name in names) else "state="
    kinds: dict[Any, str] = {}
    for name in names:
        kinds.setdefault(of(given.state[name]), name)
    for name in kinds.values():
        yield whose if len(kinds) == 1 else f"{name!r} of {whose}", given.state[name]
