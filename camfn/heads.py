"""What comes after a layer, as a function of its own: recorded with the layer's output swapped in, all that is dead dropped."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn import _compat
from camfn._errors import layer_called
from camfn._types import Inputs, Layer, State
from camfn.capture import resolve_state, tap_from
from camfn.ports import resolve_layers
from camfn.recording import Record, record
from camfn.shell import Shell, shell_of
from camfn.subject import Subject
from camfn.targets.scores import fields_of, is_record


class Head(NamedTuple):
    """What comes after a layer, as a function `(state, x, value) -> output`."""

    record: Record
    unflatten: Callable[[Any], Any]
    shell: Shell

    def __call__(self, state: State, x: Inputs, value: Tensor) -> Any:
        return self.at(resolve_state(self.shell, state), x)(value)

    def at(self, state: State, x: Inputs) -> Callable[[Tensor], Any]:
        """The head as a function of the value alone, for a state that is complete: the front has run, once."""
        handed = self.handed(state, x)
        return lambda value: self.unflatten(self.record.rest(value, *handed))

    def handed(self, state: State, x: Inputs) -> tuple[Tensor, ...]:
        """What the front hands on to the rest."""
        return self.record.front(*_tensors((state, x)))


def head(model: nn.Module, layer: Layer, x: Inputs, value: Tensor) -> Head:
    """The model with `value` in the place of the layer's output, and all that came before the layer gone.

    It is recorded for the shapes of `x` and `value` (its batch included: pad). `x` still counts where it reaches the output by
    a way around the layer.

    Raises `CamError` where what comes after the layer reads values in Python: a record of it would hold for them alone.

    >>> import camfn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> state, x = camfn.state_of(model), torch.ones(1, 3)
    >>> output, seen = camfn.tap(model, "1")(state, x)
    >>> h = camfn.head(model, "1", x, seen)
    >>> torch.equal(h(state, x, seen), output)
    True
    """
    shell = shell_of(model)
    (name,) = resolve_layers(shell, model, layer)
    made = shell_of(model)
    return Head(*_record(made, made.tensors, name, x, value), shell)


def head_of(subject: Subject, name: str, x: Inputs, value: Tensor) -> Head:
    """`head` for a subject. What a transform hands us cannot be recorded, but blanks of its shapes can."""
    if subject.known is not None:
        return Head(*_record(shell_of(subject.model), subject.state, name, x, value), subject.shell)
    leaves, tree = tree_flatten((x, value))
    forms = [(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def on_blanks() -> Made:
        blanks = [torch.zeros(f[0], dtype=f[1], device=f[2]) if isinstance(f, tuple) else f for f in forms]
        made = shell_of(subject.model)
        return _record(made, made.tensors, name, *tree_unflatten(blanks, tree))

    return Head(*_compat.apart(on_blanks), subject.shell)


Made = tuple[Record, Callable[[Any], Any]]
"""What is recorded of a head: all but the shell."""


def _record(shell: Shell, state: State, name: str, x: Inputs, value: Tensor) -> Made:
    run = tap_from(shell, [name])
    leaves, tree = tree_flatten((state, x, value))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    spec: Any = None
    whole: Any = None  # where the output is a dataclass: that, empty

    def flat(*tensors: Tensor) -> list[Any]:
        nonlocal spec, whole
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        own, inputs, swap = tree_unflatten(given, tree)
        output = run(own, inputs, None, (swap,)).output
        if is_record(output):
            output, whole = fields_of(output), dataclasses.replace(output, **dict.fromkeys(fields_of(output)))
        out, spec = tree_flatten(output)
        return out

    made = record(flat, _tensors(state), _tensors(x), value, layer_called(name))
    return made, functools.partial(_unflatten, spec, whole)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _unflatten(spec: Any, whole: Any, out: Any) -> Any:
    output = tree_unflatten(out, spec)
    return output if whole is None else dataclasses.replace(whole, **output)
