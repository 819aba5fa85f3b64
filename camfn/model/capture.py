"""From a module to a pure function.

A layer of the shell gets three *ports* (seen, nudge, swap), and `functional_call` feeds the shell its state: nothing of the
caller's is hooked, switched or written to.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from camfn import _compat
from camfn._errors import CamError, closest
from camfn._types import Inputs, Layer, State
from camfn.model.guard import Allowed, Guard, input_called
from camfn.model.ports import Ports, check_recording, is_several, resolve_layers, watched
from camfn.model.prepare import Call, Prepared, opened, prepare, prepares, restarted
from camfn.model.private_copy import Shell, refuse_cached, without_wrappers
from camfn.model.torch_errors import Given, about_forward


class Captured(NamedTuple):
    """What one run of a tapped model gives."""

    output: Any
    seen: Tensor | tuple[Tensor, ...]


# ------------------------------------------------------------------------------------------------------- the state


@prepares
def state_of(model: nn.Module | Prepared) -> State:
    """The model as a value: every parameter and buffer by name, detached, sharing memory with the model.

    A tensor that has several names (tied weights, a module registered twice) stands under its first.

    >>> import camfn, torch
    >>> {name: tuple(t.shape) for name, t in camfn.state_of(torch.nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return dict(opened(model).shell().tensors)


def resolve_state(shell: Shell, state: Mapping[str, Tensor] | None) -> State:
    """`state` with one entry for each tensor of the model, under its first name; the model's own where it is `None`."""
    if state is None:
        return dict(shell.tensors)
    if not isinstance(state, Mapping):
        raise CamError(
            f"state= must be a mapping from names to tensors, found {type(state).__name__}; see camfn.state_of(model)"
        )
    found: State = {}
    for key, tensor in state.items():
        name = next((shell.aliases[known] for known in without_wrappers(key) if known in shell.aliases), None)
        if name is None:
            raise CamError(f"state= has an entry {key!r} that the model does not; closest: {closest(key, shell.aliases)}")
        if not isinstance(tensor, Tensor):
            raise CamError(f"state= holds for {key!r} a {type(tensor).__name__}, not a tensor")
        if tuple(tensor.shape) != tuple(shell.tensors[name].shape):
            raise CamError(
                f"state= holds {key!r} of shape {tuple(tensor.shape)}, the model's is {tuple(shell.tensors[name].shape)}"
            )
        if name in found and not _is_one(found[name], tensor):
            raise CamError(f"state= holds two different tensors for one: {name!r} and {key!r} are tied; give it once")
        found.setdefault(name, tensor)
    missing = [name for name in shell.tensors if name not in found and name not in shell.optional]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CamError(f"state= lacks {', '.join(map(repr, missing[:3]))}{more}; start from camfn.state_of(model)")
    return {name: found.get(name, own) for name, own in shell.tensors.items()}


def _is_one(a: Tensor, b: Tensor) -> bool:
    """Are they one tensor, or views of one? While compiling nobody can tell."""
    return a is b or _compat.compiling() or _compat.storage_of(a) == _compat.storage_of(b)


# ---------------------------------------------------------------------------------------------------------- a run


class _Run(nn.Module):
    """One forward of the shell with its ports set; what they saw leaves with the output, while the state is still in."""

    def __init__(self, model: nn.Module, ports: Ports) -> None:
        super().__init__()
        self.model = model
        self.ports = ports
        self.narrowed = _compat.narrowed_as_called()

    def forward(self, x: Inputs, nudges: Sequence[Tensor | None], swaps: Sequence[Tensor | None]) -> Any:
        self.ports.set(nudges, swaps)
        with self.narrowed():
            output = self._call(x)
        return output, self.ports.take()

    def _call(self, x: Inputs) -> Any:
        if isinstance(x, (Tensor, list)):
            return self.model(x)
        return self.model(**x) if isinstance(x, Mapping) else self.model(*x)


def _run(
    run: _Run,
    shell: Shell,
    state: State,
    x: Inputs,
    nudges: Any = (),
    swaps: Any = (),
    *,
    guarded: bool = True,
    fresh: bool = False,
) -> tuple[Any, Any]:
    # Copies are made here, since what is written under a transform has to be as new as that. A forward may write to buffers
    # even in eval mode. What else it writes to the guard tells; without one, inputs are copied unless they are `fresh`, made
    # for this run alone.
    if _compat.compiling():
        return _compiled_run(run, shell, state, x, (nudges, swaps), fresh)
    refuse_cached(shell)
    copies = frozenset(shell.buffers | shell.written)
    own = {name: t.clone() if name in copies else t for name, t in state.items()}
    leaves, tree = tree_flatten(x)
    careful = not guarded and not fresh
    given = [copied(leaf) if careful or input_called(i) in copies else leaf for i, leaf in enumerate(leaves)]
    guard = Guard(Allowed(own, copies, given, shell.twins, shell.foreign)) if guarded else nullcontext()
    if torch.is_grad_enabled() and any(map(_is_graphed, (*own.values(), *given, *nudges, *swaps))):
        shell.twins.in_graph = True
    shell.put(own)  # it stays in until the shell is put back: a checkpointed block runs again when gradients are taken
    with about_forward(Given(x, state, shell.tensors, {"nudge": nudges, "swap": swaps}, shell.modules)), guard:
        return run.forward(tree_unflatten(given, tree), nudges, swaps)


def _compiled_run(run: _Run, shell: Shell, state: State, x: Inputs, ports: tuple[Any, Any], fresh: bool) -> tuple[Any, Any]:
    """The same where a compiler traces it: without a guard, which it cannot trace, and by `functional_call`, which it can."""
    copies = shell.buffers | shell.written
    own = {name: t.clone() if name in copies else t for name, t in state.items()}
    tensors = {f"model.{slot}": own[name] for slot, name in shell.slots.items()}
    given = x if fresh else tree_map(copied, x)
    # Every place is named once: `tie_weights` would name a place that has two paths twice, and restore it wrongly.
    return functional_call(run, tensors, (given, *ports), tie_weights=False)


def _is_graphed(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def copied(leaf: Any) -> Any:
    """What the model writes to is not the caller's."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def pure_from(shell: Shell, *, guarded: bool = True, fresh: bool = False) -> Callable[[State, Inputs], Any]:
    """`pure` for a shell at hand and a state that is complete. `fresh`: the inputs are made for one run, and not copied."""
    run = _Run(shell.module, Ports(shell, ()))

    def call(state: State, x: Inputs) -> Any:
        return _run(run, shell, state, x, guarded=guarded, fresh=fresh)[0]

    return call


def pure(model: nn.Module | Prepared) -> Callable[[State, Inputs], Any]:
    """The model in eval mode as a function `(state, x) -> output` that reads nothing else and writes nothing.

    `x` is a tensor (`model(x)`), a tuple (`model(*x)`) or a mapping (`model(**x)`). The function holds a copy of the module
    tree as it is now: make a new one after the model was changed.

    >>> import camfn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    >>> f, state, x = camfn.pure(model), camfn.state_of(model), torch.ones(1, 3)
    >>> torch.equal(f(state, x), f(state, x)), model.training
    (True, True)
    """
    prepared = prepare(model)
    shell = Call(prepared).shell()
    compiled = pure_from(shell)

    def call(state: State, x: Inputs) -> Any:
        full = resolve_state(shell, state)
        if _compat.compiling():
            return compiled(full, x)
        with Call(prepared) as own:
            return restarted(prepared, lambda: pure_from(own.shell())(full, x))

    return call


@_compat.eager
def tap_from(shell: Shell, names: Sequence[str], *, guarded: bool = True) -> Callable[..., Captured]:
    """`tap` for a shell at hand and a state that is complete. The shell's layers get ports: use it for this tap only."""
    ports = Ports(shell, names)
    run = _Run(shell.module, ports)

    def call(state: State, x: Inputs, nudge: Any = None, swap: Any = None) -> Captured:
        nothing = (None,) * len(names)
        output, seen = _run(run, shell, state, x, nudge or nothing, swap or nothing, guarded=guarded)
        ports.check(seen)
        return Captured(output, seen)

    return call


def tap(model: nn.Module | Prepared, layer: Layer | Sequence[Layer]) -> Callable[..., Captured]:
    """The model as a function `(state, x, nudge=None, swap=None) -> (output, seen)`, with ports at a layer.

    `seen` is the layer's output; `nudge` is added to it before it goes on (the gradient with respect to a zero nudge *is*
    the gradient at the layer); `swap` goes on in its place. For a sequence of layers all three are tuples.

    A layer that returns several tensors is named with one of its parts, `"layer:0"` or `"layer:key"`, and one that runs
    several times with the call to take, counted from 1: `"layer@2"`.

    Raises `CamError` where the layer is unknown or never runs, or where its call or its part has to be chosen.

    >>> import camfn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    >>> f, state, x = camfn.tap(model, "0"), camfn.state_of(model), torch.ones(1, 3)
    >>> output, seen = f(state, x)
    >>> zero = torch.zeros_like(seen)
    >>> gradient = torch.func.grad(lambda nudge: f(state, x, nudge).output.sum())(zero)
    >>> torch.equal(gradient, (seen > 0).float())
    True
    """
    prepared = prepare(model)
    shell = Call(prepared).shell()
    several, names = is_several(layer), resolve_layers(shell, layer)
    if len(set(names)) < len(names):
        raise CamError(f"a layer is named twice: {', '.join(map(repr, names))}; a tap has one port at a layer")
    compiled = tap_from(shell, names)

    def call(state: State, x: Inputs, nudge: Any = None, swap: Any = None) -> Captured:
        if not several:
            nudge, swap = (None if port is None else (port,) for port in (nudge, swap))
        full = resolve_state(shell, state)
        if _compat.compiling():
            output, seen = compiled(full, x, nudge, swap)
        else:
            with Call(prepared) as own:
                output, seen = restarted(prepared, lambda: tap_from(own.shell(), names)(full, x, nudge, swap))
        return Captured(output, seen if several else seen[0])

    return call


def watch(model: nn.Module | Prepared | Call, state: State, x: Inputs, see: Callable[[str, tuple[Any, ...], Any], None]) -> Any:
    """Run the model once and show every module to `see(name, arguments, output)`, innermost first. Returns the output."""
    shell = opened(model).shell()

    def passes(name: str) -> Callable[[tuple[Any, ...], Any], Any]:
        def show(args: tuple[Any, ...], out: Any) -> Any:
            see(name, args, out)
            return out

        return show

    for path, module in shell.distinct().items():
        if not isinstance(getattr(type(module), "forward", None), property):
            watched(module, passes(path))
    return pure_from(shell)(state, x)


@_compat.eager
def calls_from(shell: Shell, names: Sequence[str]) -> Callable[..., tuple[Captured, tuple[str, ...]]]:
    """`tap_from` for every call of these layers, in the order of execution: a layer may run several times, or not at all.

    A nudge is a tensor for each call, or a function from what the layer gave to one. With what was seen come the layers' names.
    """
    inner = pure_from(shell)
    seen: list[Tensor] = []
    called: list[str] = []
    nudges: Any = None
    over = False

    def passes(name: str) -> Callable[[tuple[Any, ...], Any], Any]:
        def nudged(args: tuple[Any, ...], out: Tensor) -> Tensor:
            if over:  # a checkpointed block runs again in the backward
                return out + torch.zeros_like(out, requires_grad=True) if callable(nudges) else out
            if callable(nudges):
                check_recording(name)
            nudge: Any = nudges(out) if callable(nudges) else nudges and nudges[len(seen)]
            called.append(name)
            seen.append(out.clone())
            return out if nudge is None else out + nudge

        return nudged

    for name in names:
        watched(shell.modules[name], passes(name))

    def call(state: State, x: Inputs, nudge: Any = None) -> tuple[Captured, tuple[str, ...]]:
        nonlocal nudges, over
        nudges, over = nudge, False
        seen.clear()
        called.clear()
        output, over = inner(state, x), True
        return Captured(output, tuple(seen)), tuple(called)

    return call
