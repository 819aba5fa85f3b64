"""Pure functions from modules.

A layer of the private copy gets three *ports*: seen, nudge and swap. The state is put into the copy for a run. The
caller's model is not hooked, switched or written to.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from camfn import _compat
from camfn._errors import CamError, layer_called, suggested
from camfn._types import Inputs, Layer, State
from camfn.model.guard import Allowed, Followed, Guard, input_called
from camfn.model.ports import Ports, is_several, resolve_layers, unrecorded, watched
from camfn.model.prepare import Call, Prepared, opened, prepare, prepares, restarted
from camfn.model.private_copy import PrivateCopy, refuse_cached, without_wrappers
from camfn.model.torch_errors import Given, about_forward


class Captured(NamedTuple):
    """The output of a tapped model, and what its ports saw."""

    output: Any
    seen: Tensor | tuple[Tensor, ...]  # the layer's output; a tuple for a sequence of layers


# ------------------------------------------------------------------------------------------------------- the state


@prepares
def state_of(model: nn.Module | Prepared) -> State:
    """The model's state as a value: every parameter and buffer by name.

    The tensors are detached and share memory with the model. A tensor with several names (tied weights, a module registered
    twice) is listed under the first.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.

    Returns:
        A new dict from names to tensors, to be passed as `state=`.

    >>> import camfn, torch
    >>> {name: tuple(t.shape) for name, t in camfn.state_of(torch.nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return dict(opened(model).borrow().tensors)


@prepares
def parameters_of(model: nn.Module | Prepared) -> State:
    """The model's floating-point parameters by name: the model's own, which are trained.

    They are the part of `camfn.state_of` that has a derivative. The rest are buffers: running statistics, and counts, which are
    integers. A map whose `state=` holds these parameters has a graph, and `backward` adds to their `grad`.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.

    Returns:
        A new dict from names to the parameters themselves, not detached. The names are those of `camfn.state_of`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> state, parameters = camfn.state_of(model), camfn.parameters_of(model)
    >>> sorted(set(state) - set(parameters))
    ['1.num_batches_tracked', '1.running_mean', '1.running_var']
    >>> x = torch.randn(2, 3, 8, 8)
    >>> def total(parameters):
    ...     return camfn.grad_cam(model, "2", x, 3, state={**state, **parameters}).sum()
    >>> gradients = torch.func.grad(total)(parameters)
    >>> total(parameters).backward()
    >>> torch.allclose(model[0].weight.grad, gradients["0.weight"], atol=1e-6)
    True
    """
    private = opened(model).borrow()
    found: State = {}
    for key, parameter in private.original.named_parameters():
        name = next((private.aliases[known] for known in without_wrappers(key) if known in private.aliases), None)
        if name is not None and parameter.is_floating_point():
            found.setdefault(name, parameter)
    return found


def resolve_state(private: PrivateCopy, state: Mapping[str, Tensor] | None) -> State:
    """Complete `state`: one entry for each tensor of the model, under its first name. `None` is the model's own state."""
    if state is None:
        return dict(private.tensors)
    if not isinstance(state, Mapping):
        raise CamError(
            f"state= must be a mapping from names to tensors, found {type(state).__name__}; see camfn.state_of(model)"
        )
    found: State = {}
    for key, tensor in state.items():
        name = next((private.aliases[known] for known in without_wrappers(key) if known in private.aliases), None)
        if name is None:
            raise CamError(f"state= has an entry {key!r} that the model does not have{suggested(key, private.aliases)}")
        if not isinstance(tensor, Tensor):
            raise CamError(f"state= holds for {key!r} a {type(tensor).__name__}, not a tensor")
        if tuple(tensor.shape) != tuple(private.tensors[name].shape):
            raise CamError(
                f"state= holds {key!r} of shape {tuple(tensor.shape)}, the model's is {tuple(private.tensors[name].shape)}"
            )
        if name in found and not _is_one(found[name], tensor):
            raise CamError(f"state= holds different tensors for {name!r} and {key!r}, which are tied; give the tensor once")
        found.setdefault(name, tensor)
    missing = [name for name in private.tensors if name not in found and name not in private.optional]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CamError(f"state= lacks {', '.join(map(repr, missing[:3]))}{more}; start from camfn.state_of(model)")
    return {name: found.get(name, own) for name, own in private.tensors.items()}


def _is_one(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors share memory. Assumed while compiling, when it cannot be tested."""
    return a is b or _compat.compiling() or _compat.storage_of(a) == _compat.storage_of(b)


# -------------------------------------------------------------------------------------------------- one forward pass


class Tapped(nn.Module):
    """One forward pass of the private copy with its ports set. It returns the output and what the ports saw."""

    def __init__(self, model: nn.Module, ports: Ports) -> None:
        super().__init__()
        self.model = model
        self.ports = ports
        self.narrowed = _compat.narrowed_as_called()

    def name_of(self, module: nn.Module) -> str | None:
        """The name of a module of the private copy; empty for the model itself, `None` for one that is not registered."""
        return next((name for name, own in self.ports.modules.items() if own is module), None)

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
    run: Tapped,
    private: PrivateCopy,
    state: State,
    x: Inputs,
    nudges: Any = (),
    swaps: Any = (),
    *,
    guarded: bool = True,
    fresh: bool = False,
) -> tuple[Any, Any]:
    # Copies are made here, since tensors that are written under a transform must be created inside it. Buffers are copied,
    # since a forward may write to them even in eval mode. The guard detects all other writes. Without a guard, inputs are
    # copied too, unless they are `fresh`: made for this run alone.
    if _compat.compiling():
        return _compiled_run(run, private, state, x, (nudges, swaps), fresh)
    refuse_cached(private)
    copies = frozenset(private.buffers | private.written)
    own = {name: t.clone() if name in copies else t for name, t in state.items()}
    leaves, tree = tree_flatten(x)
    careful = not guarded and not fresh
    given = [copied(leaf) if careful or input_called(i) in copies else leaf for i, leaf in enumerate(leaves)]
    guard = Guard(Allowed(own, copies, given, private.twins, private.foreign)) if guarded else nullcontext()
    if torch.is_grad_enabled() and any(map(_is_graphed, (*own.values(), *given, *nudges, *swaps))):
        private.twins.in_graph = True
    private.put(own)  # the state stays in after the run: a checkpointed block runs again in the backward pass
    with about_forward(Given(x, state, private.tensors, {"nudge": nudges, "swap": swaps}, private.modules)), guard:
        return run.forward(tree_unflatten(given, tree), nudges, swaps)


def _compiled_run(
    run: Tapped, private: PrivateCopy, state: State, x: Inputs, ports: tuple[Any, Any], fresh: bool
) -> tuple[Any, Any]:
    """`_run` under a compiler: without the guard, which it cannot trace, and by `functional_call`, which it can."""
    copies = private.buffers | private.written
    own = {name: t.clone() if name in copies else t for name, t in state.items()}
    tensors = {f"model.{slot}": own[name] for slot, name in private.slots.items()}
    given = x if fresh else tree_map(copied, x)
    # Every slot is named once: `tie_weights` would name a slot with two paths twice, and restore it wrongly.
    return functional_call(run, tensors, (given, *ports), tie_weights=False)


def _is_graphed(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def copied(leaf: Any) -> Any:
    """Copy a tensor, so that the model cannot write to the caller's; other leaves as they are."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def pure_from(private: PrivateCopy, *, guarded: bool = True, fresh: bool = False) -> Callable[[State, Inputs], Any]:
    """`pure` for a given private copy and complete states. `fresh` inputs are made for one run, and are not copied."""
    run = Tapped(private.module, Ports(private, ()))

    def call(state: State, x: Inputs) -> Any:
        return _run(run, private, state, x, guarded=guarded, fresh=fresh)[0]

    return call


def pure(model: nn.Module | Prepared) -> Callable[[State, Inputs], Any]:
    """The model in eval mode as a pure function `(state, x) -> output`.

    The function reads nothing else and writes nothing. It holds a copy of the module tree as it is now: call `pure` again after
    a change of the model's structure.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.

    Returns:
        The function. `state` is a dict as from `camfn.state_of`. `x` is a tensor (`model(x)`), a tuple (`model(*x)`), a mapping
        (`model(**x)`), or a list, which is one argument.

    Raises:
        CamError: by the function, if `state` does not fit the model, or if the model cannot be run as a pure function, as one
            that draws random numbers in eval mode.

    >>> import camfn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    >>> f, state, x = camfn.pure(model), camfn.state_of(model), torch.ones(1, 3)
    >>> torch.equal(f(state, x), f(state, x)), model.training
    (True, True)
    """
    prepared = prepare(model)
    private = Call(prepared).borrow()
    compiled = pure_from(private)

    def call(state: State, x: Inputs) -> Any:
        full = resolve_state(private, state)
        if _compat.compiling():
            return compiled(full, x)
        with Call(prepared) as own:
            return restarted(prepared, lambda: pure_from(own.borrow())(full, x))

    return call


@_compat.eager
def tap_from(private: PrivateCopy, names: Sequence[str], *, guarded: bool = True) -> Callable[..., Captured]:
    """`tap` for a given private copy and complete states. Its layers get ports: do not use it for anything else."""
    ports = Ports(private, names)
    run = Tapped(private.module, ports)

    def call(state: State, x: Inputs, nudge: Any = None, swap: Any = None) -> Captured:
        nothing = (None,) * len(names)
        output, seen = _run(run, private, state, x, nudge or nothing, swap or nothing, guarded=guarded)
        ports.check(seen)
        return Captured(output, seen)

    return call


def tap(model: nn.Module | Prepared, layer: Layer | Sequence[Layer]) -> Callable[..., Captured]:
    """The model as a pure function with ports at a layer: `(state, x, nudge=None, swap=None) -> (output, seen)`.

    - `seen` is the layer's output.
    - `nudge` is added to it. The gradient with respect to a zero nudge is the gradient at the layer.
    - `swap` replaces it.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.
        layer: a name, a module, or a sequence of these; for a sequence, `seen`, `nudge` and `swap` are tuples. A part of an
            output with several tensors is named `"layer:0"` or `"layer:key"`. A call of a layer that runs several times is
            named `"layer@2"`, counted from 1.

    Returns:
        The function, which returns a `Captured`. `state` and `x` are as for `camfn.pure`.

    Raises:
        CamError: if a layer is unknown or named twice; by the function, if a layer does not run, or if a call or a part of it
            must be named.

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
    private = Call(prepared).borrow()
    several, names = is_several(layer), resolve_layers(private, layer)
    if len(set(names)) < len(names):
        raise CamError(f"a layer is named twice: {', '.join(map(repr, names))}; a tap has one port at a layer")
    compiled = tap_from(private, names)

    def call(state: State, x: Inputs, nudge: Any = None, swap: Any = None) -> Captured:
        if not several:
            nudge, swap = (None if port is None else (port,) for port in (nudge, swap))
        full = resolve_state(private, state)
        if _compat.compiling():
            output, seen = compiled(full, x, nudge, swap)
        else:
            with Call(prepared) as own:
                output, seen = restarted(prepared, lambda: tap_from(own.borrow(), names)(full, x, nudge, swap))
        return Captured(output, seen if several else seen[0])

    return call


def watch(model: nn.Module | Prepared | Call, state: State, x: Inputs, see: Callable[[str, tuple[Any, ...], Any], None]) -> Any:
    """Run the model once, and call `see(name, arguments, output)` for every module, innermost first. Returns the output."""
    return watch_from(opened(model).borrow(), state, x, see)


def watch_from(private: PrivateCopy, state: State, x: Inputs, see: Callable[[str, tuple[Any, ...], Any], None]) -> Any:
    """`watch` for a given private copy. Its modules are wrapped: do not use it for anything else."""

    def passes(name: str) -> Callable[[tuple[Any, ...], Any], Any]:
        def show(args: tuple[Any, ...], out: Any) -> Any:
            see(name, args, out)
            return out

        return show

    for path, module in private.distinct().items():
        if not isinstance(getattr(type(module), "forward", None), property):
            watched(module, passes(path))
    return pure_from(private)(state, x)


def layers_of(private: PrivateCopy) -> dict[str, nn.Module]:
    """Return each module once by its name, with those that are not registered."""
    return {**private.distinct(), **private.unregistered()}


@_compat.eager
def calls_from(
    private: PrivateCopy, names: Sequence[str], kinds: tuple[type, ...]
) -> Callable[..., tuple[Captured, tuple[str, ...]]]:
    """`tap_from` for every call of these layers, in the order of execution. A layer may run several times, or not at all.

    The names are those of `layers_of`, which has unregistered layers too. A layer of these kinds that the copy does not hold
    raises `CamError`.

    A nudge is a tensor for each call, or a function from a layer's output to one. The function also returns the name of the
    layer of each call.
    """
    inner = pure_from(private)
    seen: list[Tensor] = []
    called: list[str] = []
    nudges: Any = None
    over = False

    def passes(name: str) -> Callable[[tuple[Any, ...], Any], Any]:
        def nudged(args: tuple[Any, ...], out: Tensor) -> Tensor:
            if over:  # a checkpointed block runs again in the backward pass
                return out + torch.zeros_like(out, requires_grad=True) if callable(nudges) else out
            if callable(nudges) and (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
                raise CamError(unrecorded(layer_called(name)))
            nudge: Any = nudges(out) if callable(nudges) else nudges and nudges[len(seen)]
            called.append(name)
            seen.append(out.clone())
            return out if nudge is None else out + nudge

        return nudged

    layers = layers_of(private)
    for name in names:
        watched(layers[name], passes(name))

    def call(state: State, x: Inputs, nudge: Any = None) -> tuple[Captured, tuple[str, ...]]:
        nonlocal nudges, over
        nudges, over = nudge, False
        seen.clear()
        called.clear()
        with Followed(kinds, layers.values()):
            output, over = inner(state, x), True
        return Captured(output, tuple(seen)), tuple(called)

    return call
