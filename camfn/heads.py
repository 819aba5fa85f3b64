"""What comes after a layer, as a function of its own: traced with the layer's output swapped in, all that is dead dropped."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from camfn import _compat
from camfn._types import Inputs, Layer, State
from camfn.capture import resolve_state, tap_from
from camfn.draws import refusing_draws
from camfn.keep import kept, structure
from camfn.ports import resolve_layers
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
    key = "head", name, shapes, structure(shell), _compat.narrowing()
    # The trace is made from a shell of its own: what is kept must not hold on to the model, which its key holds weakly.
    graph, unflatten = kept(model, key, lambda: _trace(shell_of(model), name, x, value))
    return Head(graph, unflatten, shell)


def _trace(shell: Shell, name: str, x: Inputs, value: Tensor) -> tuple[GraphModule, Callable[[Any], Any]]:
    run = tap_from(shell, [name])
    leaves, tree = tree_flatten((shell.tensors, x, value))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    recorder = _Recorder()
    spec: Any = None

    def flat(*tensors: Tensor) -> list[Any]:
        nonlocal spec
        given = list(leaves)
        for place, tensor in zip(places, tensors):
            given[place] = tensor
        state, inputs, swap = tree_unflatten(given, tree)
        out, spec = tree_flatten(run(state, inputs, None, (swap,)).output)
        return out

    arguments = [leaves[i].detach() for i in places]
    for argument in arguments:
        recorder.bind(argument, recorder.graph.placeholder(f"t{len(recorder.nodes)}"))
    with torch.no_grad(), refusing_draws(), recorder:
        # Mutations only: with views too, a view of a weight becomes a copy of it on every call.
        out = functionalize(flat, remove="mutations")(*arguments)
    return recorder.finish(out), functools.partial(_unflatten, spec)


class _Recorder(TorchDispatchMode):
    """Writes down every operation that this thread runs, as a graph.

    `make_fx` would do, but it patches `nn.Module` for the whole process while it traces, under the feet of other threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Any] = {}  # id of a tensor -> its node
        self.alive: list[Tensor] = []  # so that no id comes twice
        self.constants: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = tree_map(self.node_of, (tuple(args), kwargs or {}))
        self.bind(out, self.graph.call_function(func, *given))
        return out

    def bind(self, out: Any, node: Any) -> None:
        """From now on `node` stands for `out`."""
        if isinstance(out, Tensor):
            self.nodes[id(out)] = node
            self.alive.append(out)
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                self.bind(part, self.graph.call_function(operator.getitem, (node, i)))

    def node_of(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.nodes:  # made by no operation that was seen: a constant of the model
            name = f"constant{len(self.constants)}"
            self.constants[name] = leaf
            self.bind(leaf, self.graph.get_attr(name))
        return self.nodes[id(leaf)]

    def finish(self, out: Any) -> GraphModule:
        self.graph.output(tree_map(self.node_of, out))
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        return GraphModule(self.constants, self.graph)


def _unflatten(spec: Any, out: Any) -> Any:
    return tree_unflatten(out, spec)
