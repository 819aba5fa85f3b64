"""What comes after a layer, as a function of its own: recorded with the layer's output swapped in, all that is dead dropped."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn import _compat
from camfn._errors import layer_called
from camfn._types import Inputs, Layer, State
from camfn.capture import resolve_state, tap_from
from camfn.complaints import Given, about_forward, about_record
from camfn.ports import resolve_layers
from camfn.prepare import Prepared, opened, prepares, shapes
from camfn.recording import Record, record
from camfn.rewrite import is_close
from camfn.shell import Shell
from camfn.subject import Subject
from camfn.targets.scores import fields_of, is_record


class Head(NamedTuple):
    """What comes after a layer, as a function `(state, x, value) -> output`."""

    record: Record
    unflatten: Callable[[Any], Any]
    shell: Shell

    def __call__(self, state: State, x: Inputs, value: Tensor) -> Any:
        full = resolve_state(self.shell, state)
        with about_forward(Given(x, full, self.shell.tensors, {"value": (value,)}, self.shell.modules)):
            return self.at(full, x)(value)

    def at(self, state: State, x: Inputs) -> Callable[[Tensor], Any]:
        """The head as a function of the value alone, for a state that is complete: the front has run, once."""
        handed = self.handed(state, x)
        return lambda value: self.unflatten(self.record.rest(value, *handed))

    def handed(self, state: State, x: Inputs) -> list[Tensor]:
        """What the front hands on to the rest."""
        return self.record.front(*_tensors((state, x)))


Made = tuple[Record, Callable[[Any], Any]]
"""What is recorded of a head: all but the shell."""


@prepares
def head(model: nn.Module | Prepared, layer: Layer, x: Inputs, value: Tensor) -> Head:
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
    call = opened(model)
    shell = call.shell()
    (name,) = resolve_layers(shell, layer)
    key = "record", name, _form(shell.tensors, x, value)

    def fits(made: Made) -> bool:
        state = shell.tensors
        return agree(Head(*made, shell)(state, x, value), tap_from(call.shell(), [name])(state, x, None, (value,)).output)

    def make() -> Made:
        return _record(call.shell(), shell.tensors, name, x, value)

    return Head(*_lasting(call.prepared, key, make, fits), shell)


def head_of(subject: Subject, name: str, x: Inputs, value: Tensor, fits: Callable[[Head], bool]) -> Head:
    """`head` for a subject. One that is kept has to fit. What a transform hands us cannot be recorded, but blanks of its shapes
    can."""
    call = subject.model
    if not _compat.transformed():
        key = "record", name, _form(subject.state, x, value)

        def make() -> Made:
            return _record(call.shell(), subject.state, name, x, value)

        return Head(*_lasting(call.prepared, key, make, lambda made: fits(Head(*made, subject.shell))), subject.shell)
    leaves, tree = tree_flatten((x, value))
    forms = [(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def on_blanks() -> Made:
        blanks = [torch.zeros(f[0], dtype=f[1], device=f[2]) if isinstance(f, tuple) else f for f in forms]
        made = call.shell()
        return _record(made, made.tensors, name, *tree_unflatten(blanks, tree))

    return Head(*_compat.apart(on_blanks), subject.shell)


def _form(state: State, x: Inputs, value: Tensor) -> Hashable:
    """What a record holds for, beside the model; `None` where an input is neither a tensor nor a plain value: what an object
    holds may change."""
    leaves = tree_flatten(x)[0]
    if not all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves):
        return None
    kinds = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in state.items())
    return shapes((x, value)), kinds, _compat.narrowing()


def _lasting(
    prepared: Prepared, key: tuple[str, str, Hashable], make: Callable[[], Made], fits: Callable[[Made], bool]
) -> Made:
    """A record that is kept and fits, or a new one, which is kept if it holds for other inputs."""
    if key[-1] is None:
        return make()
    slot = prepared.slot(key)
    if slot.made is not None and fits(slot.made):
        return slot.made
    made = make()
    if not made[0].reads:
        slot.made = made
    return made


def agree(found: Any, expected: Any) -> bool:
    """Are two outputs equal, to rounding?"""
    pairs = zip(_tensors(found), _tensors(expected))
    return all(is_close(a, b, 1000) if b.is_floating_point() else torch.equal(a, b) for a, b in pairs)


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

    hidden = [t for _, twin in shell.twins.modules for t in (*twin._parameters.values(), *twin._buffers.values())]
    known = [twin for twin in (*shell.twins.values(), *hidden) if isinstance(twin, Tensor)]
    with about_record(shell.modules):
        made = record(flat, _tensors(state), _tensors(x), value, layer_called(name), known)
    return made, functools.partial(_unflatten, spec, whole)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _unflatten(spec: Any, whole: Any, out: Any) -> Any:
    output = tree_unflatten(out, spec)
    return output if whole is None else dataclasses.replace(whole, **output)
