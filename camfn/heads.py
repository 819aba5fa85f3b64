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
from camfn.keep import kept, shapes, structure
from camfn.ports import resolve_layers
from camfn.recording import Record, record
from camfn.shell import Shell, shell_of
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

    Recorded once for the shapes of `x` and `value` (its batch included: pad), then kept with the model for as long as its
    structure stays the same. `x` still counts where it reaches the output by a way around the layer.

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
    return Head(*_kept(model, name, x, value, _key(name, x, value, structure(model, shell))), shell)


def head_of(model: nn.Module, shell: Shell, known: Hashable, name: str, x: Inputs, value: Tensor) -> Head:
    """`head` for a name in a shell at hand and the model's structure, which is `None` under a transform: what that hands us
    cannot be recorded, but blanks of its shapes can."""
    if known is not None:
        return Head(*_kept(model, name, x, value, _key(name, x, value, known)), shell)
    leaves, tree = tree_flatten((x, value))
    forms = [(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def on_blanks() -> Made:
        blanks = [torch.zeros(f[0], dtype=f[1], device=f[2]) if isinstance(f, tuple) else f for f in forms]
        blank_x, blank = tree_unflatten(blanks, tree)
        return _kept(model, name, blank_x, blank, _key(name, blank_x, blank, structure(model, shell_of(model))))

    return Head(*_compat.apart(on_blanks), shell)


Made = tuple[Record, Callable[[Any], Any]]
"""What is kept of a head: all but the shell."""


def _key(name: str, x: Inputs, value: Tensor, known: Hashable) -> Hashable:
    return "head", name, shapes((x, value)), _compat.narrowing(), known


def _kept(model: nn.Module, name: str, x: Inputs, value: Tensor, key: Hashable) -> Made:
    # The record is made from a shell of its own: what is kept must not hold on to the model, which its key holds weakly.
    return kept(model, key, lambda: _record(shell_of(model), name, x, value))


def _record(shell: Shell, name: str, x: Inputs, value: Tensor) -> Made:
    run = tap_from(shell, [name])
    leaves, tree = tree_flatten((shell.tensors, x, value))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    spec: Any = None
    whole: Any = None  # where the output is a dataclass: that, empty

    def flat(*tensors: Tensor) -> list[Any]:
        nonlocal spec, whole
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        state, inputs, swap = tree_unflatten(given, tree)
        output = run(state, inputs, None, (swap,)).output
        if is_record(output):
            output, whole = fields_of(output), dataclasses.replace(output, **dict.fromkeys(fields_of(output)))
        out, spec = tree_flatten(output)
        return out

    state, inputs = (_tensors(part) for part in (shell.tensors, x))
    made = record(flat, state, inputs, value, layer_called(name))
    return made, functools.partial(_unflatten, spec, whole)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _unflatten(spec: Any, whole: Any, out: Any) -> Any:
    output = tree_unflatten(out, spec)
    return output if whole is None else dataclasses.replace(whole, **output)
