"""The head: the part of the model after a layer as a function, recorded with the layer's output swapped in."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from camfn import _compat
from camfn._errors import CamError, layer_called
from camfn._types import Inputs, Layer, State
from camfn.model.agreement import is_close
from camfn.model.capture import resolve_state, tap_from
from camfn.model.ports import resolve_layers
from camfn.model.prepare import Call, Prepared, opened, prepares, shapes
from camfn.model.private_copy import PrivateCopy
from camfn.model.recording import Record, record
from camfn.model.tape import leaves
from camfn.model.task import Task
from camfn.model.torch_errors import Given, about_forward, about_record
from camfn.targets.outputs import flatten, form_of


class Head(NamedTuple):
    """The part of the model after a layer, as a function `(state, x, value) -> output`."""

    record: Record
    unflatten: Callable[[Any], Any]
    private: PrivateCopy

    def __call__(self, state: State, x: Inputs, value: Tensor) -> Any:
        full = resolve_state(self.private, state)
        with about_forward(Given(x, full, self.private.tensors, {"value": (value,)}, self.private.modules)):
            return self.at(full, x)(value)

    def at(self, state: State, x: Inputs) -> Callable[[Tensor], Any]:
        """The head as a function of the value alone, for a complete state. The front runs once, here."""
        return self.onward(self.handed(state, x))

    def onward(self, handed: list[Tensor]) -> Callable[[Tensor], Any]:
        """The head as a function of the value alone, for the other arguments of the rest."""
        return lambda value: self.unflatten(self.record.rest(value, *handed))

    def handed(self, state: State, x: Inputs) -> list[Tensor]:
        """Run the front, the part of the record without the value. Returns the other arguments of the rest."""
        return self.record.front(*_tensors((state, x)))


Made = tuple[Record, Callable[[Any], Any]]
"""A head without its private copy: the record, and the function that rebuilds the output."""


@prepares
def head(model: nn.Module | Prepared, layer: Layer, x: Inputs, value: Tensor) -> Head:
    """The part of the model after a layer, as a pure function `(state, x, value) -> output`.

    `value` replaces the layer's output; the part before the layer is dropped. The head is recorded for the shapes of `x` and
    `value`, including the batch: pad smaller batches. `x` still matters if it reaches the output around the layer, as by a skip
    connection.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.
        layer: a name or a module.
        x: the inputs of the model.
        value: a tensor in the shape of the layer's output.

    Returns:
        The head.

    Raises:
        CamError: if the forward reads values in Python, or uses tensors whose origin is unknown: a record would hold for these
            values only.

    >>> import camfn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> state, x = camfn.state_of(model), torch.ones(1, 3)
    >>> output, seen = camfn.tap(model, "1")(state, x)
    >>> h = camfn.head(model, "1", x, seen)
    >>> torch.equal(h(state, x, seen), output)
    True
    """
    call = opened(model)
    private = call.borrow()
    (name,) = resolve_layers(private, layer)
    made = _on_blanks if _compat.transformed() else _general
    return Head(*made(call, name, private.tensors, x, value), private)


def head_of(task: Task, name: str, x: Inputs, value: Tensor, fits: Callable[[Head], bool]) -> Head:
    """`head` for a task, recorded at `value`. `fits` tests it at another value, as `Record` requires.

    The head may hold for these inputs only.
    """
    call = task.model
    if not _compat.transformed():

        def make() -> Made:
            return _record(call.borrow(), task.state, name, x, value)

        key = _key(name, task.state, x, value)
        made = _lasting(call.prepared, key, make, lambda made: fits(Head(*made, task.private)), layer_called(name))
        return Head(*made, task.private)
    return Head(*_on_blanks(call, name, task.private.tensors, x, value), task.private)


def _on_blanks(call: Call, name: str, state: State, x: Inputs, value: Tensor) -> Made:
    """`_general` under a transform: its tensors cannot be recorded, so record blank tensors of the same shapes."""
    leaves, tree = tree_flatten((x, value))
    forms = [(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def on_blanks() -> Made:
        blanks = [torch.zeros(f[0], dtype=f[1], device=f[2]) if isinstance(f, tuple) else f for f in forms]
        inputs, zeros = tree_unflatten(blanks, tree)
        own = {key: _compat.unwrapped(tensor) for key, tensor in state.items()}
        return _general(call, name, own, inputs, torch.ones_like(zeros))

    return _compat.apart(on_blanks)


def _general(call: Call, name: str, state: State, x: Inputs, value: Tensor) -> Made:
    """Make a record that holds for any state, inputs and value of these shapes."""
    called = layer_called(name)

    def fits(made: Made) -> bool:
        with torch.no_grad():
            found = made[1](made[0].rest(value, *made[0].front(*_tensors((state, x)))))
            return agree(found, tap_from(call.borrow(), [name])(state, x, None, (value,)).output)

    def make() -> Made:
        made = _record(call.borrow(), state, name, tree_map(_halved, x), value / 2)
        if made[0].reads:
            raise CamError(
                f"what comes after {called} may depend on values that are read in Python ({made[0].reads}): a record of it "
                "would hold for these values only"
            )
        if made[0].unseen:
            raise CamError(
                f"what comes after {called} depends on a tensor that was not seen being made (by another thread, NumPy or a "
                "cache?): a record of it might hold for this call alone"
            )
        return made

    return _lasting(call.prepared, _key(name, state, x, value), make, fits, called)


def _halved(leaf: Any) -> Any:
    return leaf / 2 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _key(name: str, state: State, x: Inputs, value: Tensor) -> tuple[str, str, Hashable]:
    return "record", name, _form(state, x, value)


def _form(state: State, x: Inputs, value: Tensor) -> Hashable:
    """A cache key: all that a record depends on except the model. `None` if an input is an object, which may change."""
    leaves = tree_flatten(x)[0]
    if not all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves):
        return None
    kinds = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in state.items())
    return shapes((x, value)), kinds, _compat.narrowing()


def _lasting(
    prepared: Prepared, key: tuple[str, str, Hashable], make: Callable[[], Made], fits: Callable[[Made], bool], called: str
) -> Made:
    """Take a record from the cache if it fits. Otherwise make one, and cache it if it holds for other inputs."""
    slot = None if key[-1] is None else prepared.slot(key)
    if slot is not None and slot.made is not None and fits(slot.made):
        return slot.made
    made = make()
    if not fits(made):
        raise CamError(
            f"what comes after {called} cannot be recorded: the record does not reproduce the model's output, which may depend "
            "on values that another thread reads or that an earlier forward pass left; use a method that runs the whole model, "
            "such as camfn.grad_cam"
        )
    if slot is not None and not made[0].reads and not made[0].unseen:
        slot.made = made
        held = leaves([operation[1:] for tape in made[0][:2] for operation in tape.operations], Tensor)
        slot.size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return made


def agree(found: Any, expected: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    pairs = zip(*([leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)] for output in (found, expected)))
    return all(is_close(a, b, 1000) if b.is_floating_point() else torch.equal(a, b) for a, b in pairs)


def _record(private: PrivateCopy, state: State, name: str, x: Inputs, value: Tensor) -> Made:
    run = tap_from(private, [name])
    leaves, tree = tree_flatten((state, x, value))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    output: Any = None

    def flat(*tensors: Tensor) -> list[Any]:
        nonlocal output
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        own, inputs, swap = tree_unflatten(given, tree)
        output = run(own, inputs, None, (swap,)).output
        return flatten(output)[0]

    with about_record(private.modules, layer_called(name)):
        made = record(flat, _tensors(state), _tensors(x), value, layer_called(name), private.own_tensors())
    return made, form_of(output)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
