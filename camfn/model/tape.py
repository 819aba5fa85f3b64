"""Tapes: straight-line sequences of operations, compiled to one Python function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Value(int):
    """The number of a value on a tape: first the arguments, then the result of each operation."""


class Operation(NamedTuple):
    """A call of a function. Each `Value` among the arguments, at any depth, stands for the value of that number."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Tape(NamedTuple):
    """A function of `takes` values. It runs the operations and returns `results` with each `Value` filled in.

    Use `tape` to make one.
    """

    takes: int
    operations: tuple[Operation, ...]
    results: Any
    run: Callable[..., Any]

    def __call__(self, *given: Any) -> Any:
        return self.run(*given)


def tape(takes: int, operations: Sequence[Operation], results: Any) -> Tape:
    """Compile the operations into one Python function that frees each value after its last use.

    `torch.fx.GraphModule` compiles the same function, but keeps every source in `linecache` forever.
    """
    scope: dict[str, Any] = {}
    lines = [f"def run({', '.join(f'v{i}' for i in range(takes))}):"]
    over = _last_uses(takes, operations, results)
    for number, (target, args, kwargs) in enumerate(operations, takes):
        given = [*(_text(arg, scope) for arg in args), *(f"{key}={_text(arg, scope)}" for key, arg in kwargs.items())]
        lines.append(f" v{number} = {_constant(target, scope)}({', '.join(given)})")
        lines.extend(f" del v{value}" for value in over[number])
    lines.append(f" return {_text(results, scope)}")
    exec(compile("\n".join(lines), "<a camfn record>", "exec"), scope)
    return Tape(takes, tuple(operations), results, scope.pop("run"))


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply `function` to every leaf of nested lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, item) for item in value])
    return {key: mapped(function, item) for key, item in value.items()} if isinstance(value, dict) else function(value)


def leaves(value: Any, kind: Any) -> list[Any]:
    """Return the leaves of a type."""
    found: list[Any] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None, value)
    return found


def _last_uses(takes: int, operations: Sequence[Operation], results: Any) -> dict[int, list[Value]]:
    """Return, by the number of an operation, the values that no later operation needs."""
    over: dict[int, list[Value]] = {}
    wanted = set(leaves(results, Value))
    for number, operation in reversed(list(enumerate(operations, takes))):
        used = {*leaves(operation[1:], Value), Value(number)}
        over[number] = sorted(used - wanted)
        wanted |= used
    return over


def _text(value: Any, scope: dict[str, Any]) -> str:
    """Return a value as a Python expression. Objects that it names are added to `scope`."""
    if isinstance(value, Value):
        return f"v{int(value)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item, scope) for item in value)}]"
    return repr(value) if type(value) in (bool, int, type(None)) else _constant(value, scope)


def _constant(value: Any, scope: dict[str, Any]) -> str:
    name = f"c{len(scope)}"
    scope[name] = value
    return name
