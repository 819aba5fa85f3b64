"""Writing down what a function does to tensors, as tapes of aten operations: one of what a value changes, one of the rest."""

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
    """A function of the state's tensors, the inputs' and a value, with what no result hangs on left out.

    Record it at one value and compare its results at another with the model's: what was taken for a constant, and hangs on the
    value by a way that was not seen, differs then.
    """

    front: Tape  # of state and inputs: all that the value does not change; gives what the rest wants of it
    rest: Tape  # of the value, and of what the front gives; gives the results
    around: bool  # do the inputs reach a result by a way around the value?
    reads: str  # what read a value in Python, of state, inputs or a constant: it holds for these alone; "" if nothing did
    unseen: bool  # does a result hang on a tensor that was not seen being made? Another call may have another one


def record(
    function: Callable[..., list[Any]],
    state: list[Tensor],
    inputs: list[Tensor],
    value: Tensor,
    after: str,
    known: Iterable[Any] = (),
) -> Record:
    """The function `(*state, *inputs, value) -> results`, run once on these. `after` names, in an error, where the value is;
    `known` are tensors that belong to the model beside its state.

    Raises `CamError` where the value itself is read in Python: the record would hold for that one alone.
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
                f"what comes after {after} hangs on values that are read in Python ({step.target}): a record of it would hold "
                "for these alone; choose a later layer"
            )
    used = _parts([results, *((step.args, step.kwargs) for step in (*live, *reads))])
    around = any("input" in step.hangs and "value" not in step.hangs for step in live)
    tapes = _two_tapes(given, live, results, recorder.constants)
    return Record(*tapes, around, str(reads[0].target) if reads else "", any(part.step.kind == "unseen" for part in used))


# ------------------------------------------------------------------------------------------------------ writing down


class _Step:
    """An operation that was run; or what it began with: a tensor that was given, a constant of the model."""

    __slots__ = ("args", "hangs", "kind", "kwargs", "reads", "target")

    def __init__(self, kind: str, target: Any, args: Any, kwargs: Any, hangs: frozenset[str], reads: bool = False) -> None:
        self.kind, self.target, self.args, self.kwargs = kind, target, args, kwargs
        self.hangs = hangs  # on "state", "input", "value"
        self.reads = reads  # its results are numbers or sizes in Python


@dataclass(frozen=True)
class _Part:
    """A tensor that a step gave: all of it, or at these indices."""

    step: _Step
    at: tuple[int, ...] = ()


class _Recorder(TorchDispatchMode):
    """Writes down every operation that this thread runs.

    `make_fx` would do, but it patches `nn.Module` for the whole process while it traces, under the feet of other threads. And
    no graph is made of what comes to nothing: that would take as long as running it.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: dict[Any, Tensor] = {}  # by their memory, tensors that the model holds, and those made of numbers
        self.steps: list[_Step] = []
        self.parts: dict[int, _Part] = {}  # by the id of a tensor, for as long as that lives
        self.constants: dict[str, Tensor] = {}
        for tensor in known:
            self.know(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_draw(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default and _compat.owns_memory(args[0]):
            self.know(args[0])  # copies of numbers, as `torch.tensor` makes them; memory that NumPy shares changes
        out = func(*args, **kwargs)
        given, named = mapped(self.part_of, tuple(args)), mapped(self.part_of, kwargs)
        hangs = frozenset().union(*(part.step.hangs for part in _parts((given, named))))
        self.steps.append(_Step("call", func, given, named, hangs, reads_values(func, args)))
        self.bind(out, _Part(self.steps[-1]))
        return out

    def bind(self, out: Any, part: _Part) -> None:
        """From now on `part` stands for `out`."""
        if isinstance(out, Tensor):
            if id(out) not in self.parts:  # what an operation in place hands back is there already
                weakref.finalize(out, self.parts.pop, id(out)).atexit = False
            self.parts[id(out)] = part
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                self.bind(item, _Part(part.step, (*part.at, i)))

    def part_of(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.parts:  # made by no operation that was seen: a constant of the model
            name = f"constant{len(self.constants)}"
            self.constants[name] = leaf
            kind = "constant" if _compat.storage_id(leaf) in self.known else "unseen"
            self.parts[id(leaf)] = _Part(_Step(kind, name, (), {}, frozenset()))
        return self.parts[id(leaf)]

    def know(self, tensor: Tensor) -> None:
        self.known[_compat.storage_id(tensor)] = tensor

    def read(self, func: Any, tensor: Tensor) -> None:
        """Values of a tensor are read in Python by what is no operation."""
        part = self.part_of(tensor)
        self.steps.append(_Step("read", func.__name__, (part,), {}, part.step.hangs, True))


class _PythonSide(TorchFunctionMode):
    """What happens between tensors and Python, and is no operation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            # What `functionalize` hands out has no memory of its own: NumPy would read whatever is there.
            args = (_compat.unwrapped(args[0]), *args[1:])
            self.recorder.read(func, args[0])
        return func(*args, **(kwargs or {}))


_READS = frozenset(("numpy", "__array__", "__dlpack__", "tolist"))


def _parts(value: Any) -> list[_Part]:
    return leaves(value, _Part)


# ---------------------------------------------------------------------------------------------------------- two tapes


def _live(steps: list[_Step], results: Iterable[Any]) -> list[_Step]:
    """The steps that a result hangs on."""
    wanted = {part.step for part in results if isinstance(part, _Part)}
    for step in reversed(steps):
        if step in wanted:
            wanted.update(part.step for part in _parts((step.args, step.kwargs)))
    return [step for step in steps if step in wanted]


def _two_tapes(given: list[_Step], live: list[_Step], results: list[Any], constants: dict[str, Tensor]) -> tuple[Tape, Tape]:
    """What does not hang on the value, and what does; the first hands on what is wanted of it."""
    *fixed, value = given
    still, moving = ([step for step in live if ("value" in step.hangs) is hangs] for hangs in (False, True))
    wanted = _parts([results, *((step.args, step.kwargs) for step in moving)])
    handed = list(dict.fromkeys(part for part in wanted if "value" not in part.step.hangs))
    front = _written([_Part(step) for step in fixed], still, handed, constants)
    return front, _written([_Part(value), *handed], moving, results, {})


def _written(given: list[_Part], steps: list[_Step], results: list[Any], constants: dict[str, Tensor]) -> Tape:
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
