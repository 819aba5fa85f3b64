"""Record a function as two tapes of aten operations: those that depend on a value, and the rest."""

import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functionalize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from camfn import _compat
from camfn._errors import CamError
from camfn.model.guard import reads_values
from camfn.model.randomness import TURNS, refuse_draw
from camfn.model.tape import Operation, Tape, Value, leaves, mapped, tape


class Record(NamedTuple):
    """A recorded function of the state, the inputs and a value. Operations that no result depends on are left out.

    To check a record, compare its results at another value with those of the model. They differ if something was recorded as
    a constant that depends on the value in an unseen way.
    """

    front: Tape  # (*state, *inputs) -> the tensors that `rest` needs; independent of the value
    rest: Tape  # (value, *front's results) -> the results
    around: bool  # whether the inputs reach a result by a path that avoids the value
    reads: str  # the function that read a state, input or constant in Python, so that the record holds for these only; or ""
    unseen: bool  # whether a result depends on a tensor of unknown origin, which may differ in another call


def record(
    function: Callable[..., list[Any]],
    state: list[Tensor],
    inputs: list[Tensor],
    value: Tensor,
    after: str,
    known: Iterable[Any] = (),
) -> Record:
    """Run `(*state, *inputs, value) -> results` once and record it.

    - `after`: the name of the layer that the value comes from, for error messages.
    - `known`: tensors of the model outside its state.

    Raises `CamError` if the value is read in Python, since the record would hold for that value only.
    """
    recorder = _Recorder(known)
    with torch.inference_mode(False), torch.no_grad():
        arguments = [t.clone() if t.is_inference() else t.detach() for t in (*state, *inputs, value)]
        kinds = (*["state"] * len(state), *["input"] * len(inputs), "value")
        given = [_Step("given", kind, (), {}, frozenset((kind,))) for kind in kinds]
        for argument, step in zip(arguments, given):
            recorder.bind(argument, _Part(step))
        with TURNS, recorder, _PythonSide(recorder):
            # Mutations only: with views too, a view of a weight becomes a copy of it on every call.
            out = functionalize(function, remove="mutations")(*arguments)
    results = [recorder.part_of(leaf) for leaf in out]
    live = _live(recorder.steps, results)
    reads = [step for step in recorder.steps if step.reads]
    for step in reads:
        if "value" in step.hangs:
            raise CamError(
                f"what comes after {after} depends on values that are read in Python ({step.target}): a record of it would "
                "hold for these values only; choose a later layer"
            )
    used = _parts([results, *((step.args, step.kwargs) for step in (*live, *reads))])
    around = any("input" in step.hangs and "value" not in step.hangs for step in live)
    tapes = _split_tapes(given, live, results, recorder.constants)
    return Record(*tapes, around, str(reads[0].target) if reads else "", any(part.step.kind == "unseen" for part in used))


# --------------------------------------------------------------------------------------------------------- recording


class _Step:
    """An operation that was run, a given tensor, or a constant of the model."""

    __slots__ = ("args", "hangs", "kind", "kwargs", "reads", "target")

    def __init__(self, kind: str, target: Any, args: Any, kwargs: Any, hangs: frozenset[str], reads: bool = False) -> None:
        self.kind, self.target, self.args, self.kwargs = kind, target, args, kwargs
        self.hangs = hangs  # what it depends on: "state", "input", "value"
        self.reads = reads  # whether its results are numbers or sizes in Python


@dataclass(frozen=True)
class _Part:
    """The output of a step, or the part of it at these indices."""

    step: _Step
    at: tuple[int, ...] = ()


class _Recorder(TorchDispatchMode):
    """Record every operation that this thread runs.

    `make_fx` is not used, since it patches `nn.Module` for the whole process while it traces, and other threads may run. Also,
    no graph is built of operations that no result needs, which would take as long as running them.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: dict[Any, Tensor] = {}  # by storage: tensors of the model, and those made from numbers
        self.steps: list[_Step] = []
        self.parts: dict[int, _Part] = {}  # by the id of a living tensor
        self.constants: dict[str, Tensor] = {}
        for tensor in known:
            self.know(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_draw(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default and _compat.owns_memory(args[0]):
            self.know(args[0])  # a copy of numbers from `torch.tensor`; memory shared with NumPy may change
        out = func(*args, **kwargs)
        given, named = mapped(self.part_of, tuple(args)), mapped(self.part_of, kwargs)
        hangs = frozenset().union(*(part.step.hangs for part in _parts((given, named))))
        self.steps.append(_Step("call", _IN_PLACE_VIEWS.get(func, func), given, named, hangs, reads_values(func, args)))
        self.bind(out, _Part(self.steps[-1]))
        return out

    def bind(self, out: Any, part: _Part) -> None:
        """Record that `out` is the tensor (or tensors) of `part`."""
        if isinstance(out, Tensor):
            if id(out) not in self.parts:  # an in-place operation returns a tensor that is already bound
                weakref.finalize(out, self.parts.pop, id(out)).atexit = False
            self.parts[id(out)] = part
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                self.bind(item, _Part(part.step, (*part.at, i)))

    def part_of(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.parts:  # made by no recorded operation: a constant of the model
            name = f"constant{len(self.constants)}"
            self.constants[name] = leaf
            kind = "constant" if _compat.storage_id(leaf) in self.known else "unseen"
            self.parts[id(leaf)] = _Part(_Step(kind, name, (), {}, frozenset()))
        return self.parts[id(leaf)]

    def know(self, tensor: Tensor) -> None:
        self.known[_compat.storage_id(tensor)] = tensor

    def read(self, func: Any, tensor: Tensor) -> None:
        """Record that a function which is not an operation reads the tensor's values in Python."""
        part = self.part_of(tensor)
        self.steps.append(_Step("read", func.__name__, (part,), {}, part.step.hangs, True))


class _PythonSide(TorchFunctionMode):
    """Record functions that read tensors in Python without an operation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            # The wrappers of `functionalize` have no memory of their own, and NumPy would read garbage.
            args = (_compat.unwrapped(args[0]), *args[1:])
            self.recorder.read(func, args[0])
        return func(*args, **(kwargs or {}))


def _in_place_views() -> dict[Any, Any]:
    """Return the operations that change a tensor's shape in place, and those that return the result as another tensor.

    `functionalize` replaces them where the model calls them, but not where torch's own kernels do.
    """

    def arguments(operation: Any) -> list[str]:
        return [str(argument.type) for argument in operation._schema.arguments]

    found: dict[Any, Any] = {}
    for name in ("as_strided", "detach", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unsqueeze"):
        others, packet = getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_")
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            twins = (getattr(others, overload) for overload in others.overloads())
            found[operation] = next(twin for twin in twins if arguments(twin) == arguments(operation))
    return found


_IN_PLACE_VIEWS = _in_place_views()

_READS = frozenset(("numpy", "__array__", "__dlpack__", "tolist"))


def _parts(value: Any) -> list[_Part]:
    return leaves(value, _Part)


# ---------------------------------------------------------------------------------------------------------- two tapes


def _live(steps: list[_Step], results: Iterable[Any]) -> list[_Step]:
    """Return the steps that a result depends on."""
    wanted = {part.step for part in results if isinstance(part, _Part)}
    for step in reversed(steps):
        if step in wanted:
            wanted.update(part.step for part in _parts((step.args, step.kwargs)))
    return [step for step in steps if step in wanted]


def _split_tapes(given: list[_Step], live: list[_Step], results: list[Any], constants: dict[str, Tensor]) -> tuple[Tape, Tape]:
    """Return the tape of the steps that do not depend on the value, and that of those that do."""
    *fixed, value = given
    still, moving = ([step for step in live if ("value" in step.hangs) is hangs] for hangs in (False, True))
    wanted = _parts([results, *((step.args, step.kwargs) for step in moving)])
    handed = list(dict.fromkeys(part for part in wanted if "value" not in part.step.hangs))
    front = _tape_of([_Part(step) for step in fixed], still, handed, constants)
    return front, _tape_of([_Part(value), *handed], moving, results, {})


def _tape_of(given: list[_Part], steps: list[_Step], results: list[Any], constants: dict[str, Tensor]) -> Tape:
    values: dict[_Part, Any] = {part: Value(i) for i, part in enumerate(given)}
    operations: list[Operation] = []

    def call(target: Callable[..., Any], args: Any, kwargs: Any) -> Value:
        operations.append(Operation(target, args, kwargs))
        return Value(len(given) + len(operations) - 1)

    def value_of(leaf: Any) -> Any:
        if not isinstance(leaf, _Part):
            return leaf
        if leaf not in values:
            step, at = leaf.step, leaf.at
            whole = at and value_of(_Part(step, at[:-1]))
            values[leaf] = call(operator.getitem, (whole, at[-1]), {}) if at else constants[step.target]
        return values[leaf]

    for step in steps:
        values[_Part(step)] = call(step.target, mapped(value_of, step.args), mapped(value_of, step.kwargs))
    results = mapped(value_of, results)
    return tape(len(given), operations, results)
