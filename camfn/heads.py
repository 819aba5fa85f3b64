"""What comes after a layer, as a function of its own: traced with the layer's output swapped in, all that is dead dropped."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn._types import Inputs, Layer, State
from camfn.capture import resolve_layers, resolve_state, tap_from
from camfn.keep import kept, structure
from camfn.shell import Shell, shell_of


class Head(NamedTuple):
    """What comes after a layer, as a function `(state, x, value) -> output`."""

    graph: GraphModule
    unflatten: Callable[[Any], Any]
    shell: Shell

    def __call__(self, state: State, x: Inputs, value: Tensor) -> Any:
        leaves = tree_flatten((resolve_state(self.shell, state), x, value))[0]
        return self.unflatten(self.graph(*(leaf for leaf in leaves if isinstance(leaf, Tensor))))


def head(model: nn.Module, layer: Layer, x: Inputs, value: Tensor) -> Head:
    """The model with `value` in the place of the layer's output, and all that came before the layer gone.

    Traced once for the shapes of `x` and `value` (its batch included: pad), then kept with the model for as long as its
    structure stays the same. `x` still counts where it reaches the output by a way around the layer.

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
    tensors = [t for t in tree_flatten((x, value))[0] if isinstance(t, Tensor)]
    shapes = tuple((t.shape, t.dtype, t.device) for t in tensors), str(tree_flatten(x)[1])
    key = "head", name, shapes, structure(shell)
    # The trace is made from a shell of its own: what is kept must not hold on to the model, which its key holds weakly.
    graph, unflatten = kept(model, key, lambda: _trace(shell_of(model), name, x, value))
    return Head(graph, unflatten, shell)


def _trace(shell: Shell, name: str, x: Inputs, value: Tensor) -> tuple[GraphModule, Callable[[Any], Any]]:
    run = tap_from(shell, [name])
    spec: Any = None
    leaves, tree = tree_flatten((shell.tensors, x, value))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def flat(*tensors: Tensor) -> list[Any]:
        nonlocal spec
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        state, inputs, swap = tree_unflatten(given, tree)
        out, spec = tree_flatten(run(state, inputs, None, (swap,)).output)
        return out

    with torch.no_grad():
        # Mutations only: with views too, a view of a weight becomes a copy of it on every call.
        graph = make_fx(functionalize(flat, remove="mutations"))(*(leaves[i].detach() for i in places))
    for node in reversed(graph.graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, functools.partial(_unflatten, spec)


def _unflatten(spec: Any, out: Any) -> Any:
    return tree_unflatten(out, spec)
