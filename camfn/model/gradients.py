"""Gradients of a score at the layers: by an autograd graph that begins there, or, under a transform, by `torch.func.vjp`."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from camfn import _compat
from camfn._types import Inputs, State
from camfn.model.capture import Captured
from camfn.model.graph_ends import GraphEnds, Reason, end_of
from camfn.model.torch_errors import about_gradient, is_reentrant, refuse_once
from camfn.targets import Score, flatten, score_rows

Of = Callable[[Any], Tensor]
"""A function from the model's output to a scalar."""


class Pullback(NamedTuple):
    """Functions from an `Of` to its derivatives at the layers, in the shapes of the layers' outputs."""

    gradients: Callable[[Of], dict[Any, Tensor]]
    """The gradient G at each layer."""
    last: Callable[[Of], Tensor]
    """The gradient at the last layer only."""
    curvatures: Callable[[Of], dict[Any, tuple[Tensor, Tensor]]]
    """G, and the Hessian-vector product H A with the layer's own output A: the gradient of `<G, A>` at this layer. `jvp` is not
    used: torch's forward mode has one level for all threads of a process, so two threads at once fail, or silently get wrong
    values."""

    def through(self, wrap: Callable[[Any], Any]) -> "Pullback":
        """The pullback with each function wrapped."""
        return Pullback(wrap(self.gradients), wrap(self.last), wrap(self.curvatures))


Run = Callable[..., Captured]
"""The tapped model, `(state, x, nudge)`. A nudge is a tensor for each layer, or a function from the layer's output to one."""

Lost = Callable[[Sequence[Any], Callable[[Any, str], Reason]], None]
"""What to do where no gradient reaches some layers: it is called with their names, and with a function that says why.

`why(name, what)` is the reason for one layer, which it calls `what`. It runs the model once or twice."""


def with_pullback(
    run: Run, state: State, x: Inputs, names: Sequence[str] | None, lost: Lost, *, graphed: bool, constants: bool = False
) -> tuple[Captured, Pullback]:
    """Run the clean forward pass, and return its pullback to the layers.

    If `names` is `None`, the forward pass determines the number of layers. They are named 0, 1, ... in order, and `run` gets
    one nudge for all of them. The gradient at a layer that no gradient reaches is zeros, unless `lost` raises.

    If `graphed`, output, activations and gradients have a graph; otherwise they have one only under a transform. `constants`
    says that `run` holds tensors constant (`_compat.constant`): for the gradients here, and not for the graph of the map.
    """
    if _compat.transformed() or (graphed and constants):
        captured, pullback = _by_vjp(run, state, x, names, lost)
    else:
        captured, pullback = _by_graph(run, *((state, x) if graphed else _ungraphed(state, x)), names, lost, graphed)
    return captured, pullback.through(about_gradient())


def _ungraphed(state: State, x: Inputs) -> tuple[State, Inputs]:
    """State and inputs without a graph, so that the layers before the first nudge record none."""
    with torch.inference_mode(False):
        return {name: ungraphed(tensor) for name, tensor in state.items()}, tree_map(ungraphed, x)


def _by_graph(
    run: Run, state: State, x: Inputs, names: Sequence[str] | None, lost: Lost, graphed: bool
) -> tuple[Captured, Pullback]:
    """By an autograd graph from zero nudges to the output."""
    zeros: dict[Any, Tensor] = {}

    def zero(name: Any, value: Tensor) -> Tensor:
        made = _leaf_like(value)
        zeros.setdefault(name, made)  # a checkpointed block runs again in the backward pass, with new nudges
        return made

    def next_zero(value: Tensor) -> Tensor:
        return zero(len(zeros), value)

    nudge = next_zero if names is None else tuple(functools.partial(zero, name) for name in names)
    with torch.inference_mode(False), torch.enable_grad():
        output, seen = run(state, x, nudge)

    def gradients(of: Of, at: dict[Any, Tensor] = zeros) -> dict[Any, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            return found_at(of, of(output), at, graphed)

    def found_at(of: Of, total: Tensor, at: dict[Any, Tensor], graph: bool) -> dict[Any, Tensor]:
        found = _gradients(total, at, graph)
        if graph:
            refuse_once(total)
        missing = [name for name, slope in found.items() if slope is None]
        if missing:
            lost(missing, _reasons(run, (state, x), of, names or [*zeros]))
        return {name: torch.zeros_like(at[name]) if slope is None else slope for name, slope in found.items()}

    def last(of: Of) -> Tensor:
        return next(iter(gradients(of, dict([*zeros.items()][-1:])).values()))

    def curvatures(of: Of) -> dict[Any, tuple[Tensor, Tensor]]:
        with torch.inference_mode(False), torch.enable_grad():
            slopes = found_at(of, of(output), zeros, True)
            products = {name: (slope * values[name]).sum() for name, slope in slopes.items()}
            hvps = {name: _gradients(product, {name: zeros[name]}, graphed)[name] for name, product in products.items()}
        pairs = {name: (slope, torch.zeros_like(slope) if hvps[name] is None else hvps[name]) for name, slope in slopes.items()}
        return cast(Any, tree_map(bare, pairs))

    bare = (lambda leaf: leaf) if graphed else detached
    leaves, rebuilt = flatten(output)
    values = dict(zip(zeros if names is None else names, map(bare, seen)))
    return Captured(rebuilt(map(bare, leaves)), tuple(values.values())), Pullback(gradients, last, curvatures)


def detached(leaf: Any) -> Any:
    """A tensor without its graph; other leaves as they are."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _reasons(run: Run, given: tuple[State, Inputs], of: Of, names: Sequence[Any]) -> Callable[[Any, str], Reason]:
    """The function that says why no gradient of `of` reaches a layer."""
    state, x = _ungraphed(*given)
    return functools.partial(reason_at, lambda nudge: of(run(state, x, nudge).output), names)


def _leaf_like(value: Tensor) -> Tensor:
    """Zeros that a graph begins at, also where the model switched the graph off."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.zeros_like(value, requires_grad=True)


def reason_at(scored: Callable[[Any], Tensor], names: Sequence[Any], name: Any, what: str) -> Reason:
    """Say why no gradient of a score reaches one of the layers. `scored` is a function from nudges to the score."""

    def score(moved: Callable[[Tensor], Tensor]) -> Tensor:
        at = iter(names)

        def nudge(value: Tensor) -> Tensor:
            return moved(value) if next(at, None) == name else torch.zeros_like(value)

        each = tuple(moved if own == name else None for own in names)
        return scored(each if isinstance(name, str) else nudge)

    def follow(mode: GraphEnds) -> Tensor:
        def leaf(value: Tensor) -> Tensor:
            mode.leaf = _leaf_like(value)
            return mode.leaf

        return score(leaf)

    return end_of(what, follow, lambda: score(_ramp))


def _ramp(value: Tensor) -> Tensor:
    """Values that are visibly another activation, added to it."""
    steps = torch.linspace(0, 1, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    return steps * (1 + value.detach().abs().amax())


def _gradients(total: Tensor, leaves: dict[Any, Tensor], graph: bool) -> dict[Any, Tensor | None]:
    """Gradients of `total`; `None` at a leaf that it does not depend on differentiably."""
    found: Any = (None,) * len(leaves)
    if total.requires_grad:
        at = tuple(leaves.values())
        try:
            found = torch.autograd.grad(total, at, retain_graph=True, create_graph=graph, allow_unused=True)
        except RuntimeError as error:
            if graph or not is_reentrant(error):
                raise
            found = _by_backward(total, at)
    return dict(zip(leaves, found))


def _by_backward(total: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients by `backward`: checkpoints with `use_reentrant=True` support no other way. Only the leaves get a `.grad`."""
    total.backward(retain_graph=True)
    found = tuple(leaf.grad for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return found


def _by_vjp(run: Run, state: State, x: Inputs, names: Sequence[str] | None, lost: Lost) -> tuple[Captured, Pullback]:
    """By `vjp`: the gradient can be differentiated and mapped over. One more forward pass finds the layers' shapes."""
    with torch.no_grad() if not _compat.transformed() else nullcontext():
        zeros = tuple(map(torch.zeros_like, run(state, x, None).seen))
    captured, back = _pulled(run, state, x, zeros)
    named = range(len(zeros)) if names is None else names

    def told(of: Of, slopes: Sequence[Tensor], at: Sequence[Any]) -> Sequence[Tensor]:
        missing = [] if _compat.transformed() else [name for name, slope in zip(at, slopes) if not bool(slope.any())]
        if missing:  # or zeros, which the reason tells
            with torch.enable_grad():
                lost(missing, _reasons(run, (state, x), of, named))
        return slopes

    def along(of: Of, i: int, nudge: Tensor) -> Tensor:
        slopes = _pulled(run, state, x, (*zeros[:i], nudge, *zeros[i + 1 :]))[1](of)
        return (slopes[i] * captured.seen[i]).sum()

    def gradients(of: Of) -> dict[Any, Tensor]:
        return dict(zip(named, told(of, back(of), named)))

    def last(of: Of) -> Tensor:
        return told(of, back(of)[-1:], named[-1:])[0]

    def curvatures(of: Of) -> dict[Any, tuple[Tensor, Tensor]]:
        hvps = (grad(functools.partial(along, of, i))(zero) for i, zero in enumerate(zeros))
        return dict(zip(named, zip(told(of, back(of), named), hvps)))

    return captured, Pullback(gradients, last, curvatures)


def _pulled(
    run: Run, state: State, x: Inputs, nudges: tuple[Tensor, ...]
) -> tuple[Captured, Callable[..., tuple[Tensor, ...]]]:
    """Run the forward pass with these nudges, and return the function from an `Of` to its gradients at the nudges."""
    fixed: list[Any] = []  # for each leaf of the output: its value if not a tensor, is it one, does it have a gradient
    rebuilt: Any = None

    def forward(*nudges: Tensor) -> tuple[list[Tensor], tuple[Any, Any]]:
        nonlocal fixed, rebuilt
        output, seen = run(state, x, nudges)
        leaves, rebuilt = flatten(output)
        fixed = [(None if isinstance(leaf, Tensor) else leaf, isinstance(leaf, Tensor), _has_slope(leaf)) for leaf in leaves]
        return [leaf for leaf in leaves if _has_slope(leaf)], ([leaf for leaf in leaves if isinstance(leaf, Tensor)], seen)

    pulled: Any = vjp(forward, *nudges, has_aux=True)
    floats, back, (tensors, seen) = pulled
    rest = iter(tensors)
    leaves = [next(rest) if is_tensor else leaf for leaf, is_tensor, _ in fixed]

    def slopes(of: Callable[[Any], Tensor]) -> tuple[Tensor, ...]:
        def of_floats(given: list[Tensor]) -> Tensor:
            those = iter(given)
            return of(rebuilt(next(those) if slope else leaf for leaf, (*_, slope) in zip(leaves, fixed)))

        return back(grad(of_floats)(floats))

    return Captured(rebuilt(leaves), seen), slopes


def _has_slope(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def each_target(way: Callable[[Of], Any], output: Any, score: Score) -> list[Any]:
    """Apply a function of a pullback to each target's score, one target after the other."""
    return [way(of) for of in _sums(output, score)]


def last_gradient(pullback: Pullback, output: Any, score: Score) -> Tensor:
    """The gradient of the first target's score at the last layer."""
    return pullback.last(_sums(output, score)[0])


def gradient_of(function: Callable[[Tensor], Tensor], lost: Lost) -> Callable[[Tensor], Tensor]:
    """The gradient of a scalar function: by a graph that begins at its argument, or, where it needs one itself, by `grad`.

    Where no gradient reaches the argument, it is zeros, unless `lost` raises. Its name there is "".
    """
    if _compat.transformed() or torch.is_grad_enabled():
        return about_gradient()(grad(function))

    def why(at: Tensor, name: str, what: str) -> Reason:
        def follow(mode: GraphEnds) -> Tensor:
            mode.leaf = at
            return function(at)

        return end_of(what, follow, lambda: function(at.detach() + _ramp(at)))

    def slope(at: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            at = at.detach().clone().requires_grad_()
            found = _gradients(function(at), {"": at}, False)[""]
            if found is None:
                lost([""], functools.partial(why, at))
            return torch.zeros_like(at) if found is None else found

    return about_gradient()(slope)


def _sums(output: Any, score: Score) -> list[Of]:
    """For each target, the function from an output to the target's score, summed over images."""
    with torch.inference_mode(False):
        rows = tree_map(torch.clone, score.rows)  # inference tensors cannot enter a graph
    targets = score_rows(score.of, output, rows).shape[1]
    return [lambda output, t=t: score_rows(score.of, output, rows)[:, t].sum() for t in range(targets)]


def total_of(output: Any, score: Score) -> Of:
    """The function from an output to the sum of all targets' scores."""
    each = _sums(output, score)
    return lambda output: torch.stack([of(output) for of in each]).sum()


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, whose graph holds the arguments alone: the function runs again in the backward pass.

    The arguments are pytrees. The function must take every tensor with a graph from them. torch's own checkpoints do not work
    here, since they have no `vmap` inside.
    """
    leaves, tree = tree_flatten(arguments)
    graphed = torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    if _compat.transformed() or not graphed:
        return function(*arguments)

    def run(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return function(*tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree))

    return _Recomputed.apply(run, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps no graph of its own. Its backward has a derivative too."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: torch gives `*slopes`
        further, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # Views, so that the gradient at one argument leaves out what another has to do with it.
            own = [tensor.view_as(tensor) if needs else tensor for tensor, needs in zip(ctx.saved_tensors, needed)]
            at = [tensor for tensor, needs in zip(own, needed) if needs]
            found = iter(torch.autograd.grad(ctx.run(*own), at, slope, create_graph=further, allow_unused=True))
        return None, *(next(found) if needs else None for needs in needed)


def ungraphed(leaf: Any) -> Any:
    """A tensor without a graph that may enter a new one; other leaves as they are."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_inference():
        return leaf.clone()
    return leaf.detach() if leaf.requires_grad else leaf
