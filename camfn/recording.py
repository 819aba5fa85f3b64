"""Writing down what a function does to tensors, as graphs of aten operations: one of what a value changes, one of the rest."""

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from camfn._errors import CamError
from camfn.draws import TURNS, refuse_draw


class Record(NamedTuple):
    """A function of the state's tensors, the inputs' and a value, with what no result hangs on left out."""

    front: GraphModule  # of state and inputs: all that the value does not change; gives what the rest wants of it
    rest: GraphModule  # of the value, and of what the front gives; gives the results
    around: bool  # do the inputs reach a result by a way around the value?


def record(function: Callable[..., list[Any]], state: list[Tensor], inputs: list[Tensor], value: Tensor, after: str) -> Record:
    """The function `(*state, *inputs, value) -> results`, run once on these. `after` names, in an error, where the value is.

    Raises `CamError` where a result hangs on a value that is read in Python: the record would hold for that one alone.
    """
    recorder = _Recorder()
    with torch.inference_mode(False), torch.no_grad():
        arguments = [t.clone() if t.is_inference() else t.detach() for t in (*state, *inputs, value)]
        kinds = (*["state"] * len(state), *["input"] * len(inputs), "value")
        given = [_Step("given", kind, (), {}, frozenset((kind,))) for kind in kinds]
        for argument, step in zip(arguments, given):
            recorder.bind(argument, _Part(step))
        with TURNS, recorder:
            # Mutations only: with views too, a view of a weight becomes a copy of it on every call.
            out = functionalize(function, remove="mutations")(*arguments)
    results = [recorder.part_of(leaf) for leaf in out]
    live = _live(recorder.steps, results)
    around = any("input" in step.hangs and "value" not in step.hangs for step in live)
    _check_reads(recorder.steps, around, after)
    return Record(*_two_graphs(given, live, results, recorder.constants), around)


# ------------------------------------------------------------------------------------------------------ writing down


class _Step:
    """An operation that was run; or what it began with: a tensor that was given, a constant of the model."""

    __slots__ = ("args", "hangs", "kind", "kwargs", "reads", "target")

    def __init__(self, kind: str, target: Any, args: Any, kwargs: Any, hangs: frozenset[str], reads: bool = False) -> None:
        self.kind, self.target, self.args, self.kwargs = kind, target, args, kwargs
        self.hangs = hangs  # on "state", "input", "value"
        self.reads = reads  # its results are numbers or sizes in Python


class _Part(NamedTuple):
    """A tensor that a step gave: all of it, or at these indices."""

    step: _Step
    at: tuple[int, ...] = ()


class _Recorder(TorchDispatchMode):
    """Writes down every operation that this thread runs.

    `make_fx` would do, but it patches `nn.Module` for the whole process while it traces, under the feet of other threads. And
    no graph is made of what comes to nothing: that would take as long as running it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.parts: dict[int, _Part] = {}  # by the id of a tensor, for as long as that lives
        self.constants: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_draw(func, args, kwargs)
        out = func(*args, **kwargs)
        given, named = _mapped(self.part_of, tuple(args)), _mapped(self.part_of, kwargs)
        hangs = frozenset().union(*(part.step.hangs for part in _parts((given, named))))
        self.steps.append(_Step("call", func, given, named, hangs, _reads_values(func, args)))
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
            self.parts[id(leaf)] = _Part(_Step("constant", name, (), {}, frozenset()))
        return self.parts[id(leaf)]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of every leaf of an operator's arguments."""
    if isinstance(value, _Part):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(function, item) for item in value])
    return {key: _mapped(function, item) for key, item in value.items()} if isinstance(value, dict) else function(value)


def _parts(value: Any) -> list[_Part]:
    found: list[_Part] = []
    _mapped(lambda leaf: found.append(leaf) if isinstance(leaf, _Part) else None, value)
    return found


def _reads_values(func: Any, args: Any) -> bool:
    """Is its result a number or a size in Python, that another value would change?"""
    if func is torch.ops.aten.index.Tensor:  # by places it has the size of these; by a mask, that of what is true
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _check_reads(steps: list[_Step], around: bool, after: str) -> None:
    """What was read before the value came in is of state and inputs alone, and matters only where inputs go around it."""
    begun = False
    for step in steps:
        begun = begun or "value" in step.hangs
        if step.reads and (step.hangs if begun else around and "input" in step.hangs):
            raise CamError(
                f"what comes after {after} hangs on values that are read in Python ({step.target}): a record of it would hold "
                "for these alone; choose a later layer"
            )


# --------------------------------------------------------------------------------------------------------- two graphs


def _live(steps: list[_Step], results: Iterable[Any]) -> list[_Step]:
    """The steps that a result hangs on."""
    wanted = {part.step for part in results if isinstance(part, _Part)}
    for step in reversed(steps):
        if step in wanted:
            wanted.update(part.step for part in _parts((step.args, step.kwargs)))
    return [step for step in steps if step in wanted]


def _two_graphs(
    given: list[_Step], live: list[_Step], results: list[Any], constants: dict[str, Tensor]
) -> tuple[GraphModule, GraphModule]:
    """What hangs on the value, and the rest, which hands on what is wanted of it."""
    *fixed, value = given
    still, moving = ([step for step in live if ("value" in step.hangs) is hangs] for hangs in (False, True))
    wanted = _parts([results, *((step.args, step.kwargs) for step in moving)])
    handed = list(dict.fromkeys(part for part in wanted if "value" not in part.step.hangs))
    front = _written([_Part(step) for step in fixed], still, tuple(handed))
    rest = _written([_Part(value), *handed], moving, results)
    return GraphModule(constants, front), GraphModule({}, rest)


def _written(given: list[_Part], steps: list[_Step], results: Any) -> Graph:
    graph = Graph()
    nodes: dict[_Part, Node] = {part: graph.placeholder(f"t{i}") for i, part in enumerate(given)}

    def node_of(leaf: Any) -> Any:
        if not isinstance(leaf, _Part):
            return leaf
        if leaf not in nodes:
            step, at = leaf
            if at:
                nodes[leaf] = graph.call_function(operator.getitem, (node_of(_Part(step, at[:-1])), at[-1]))
            else:
                nodes[leaf] = graph.get_attr(step.target)
        return nodes[leaf]

    for step in steps:
        arguments = (_mapped(node_of, part) for part in (step.args, step.kwargs))
        nodes[_Part(step)] = graph.call_function(step.target, *arguments)
    graph.output(_mapped(node_of, results))
    return graph
