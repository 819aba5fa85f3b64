"""States of a model with other weights, for `state=`: a permuted or redrawn classifier, and weights redrawn layer by layer.

The caller's model is left as it is: a state is a new mapping, with new tensors where the weights differ.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Inputs, Layer, State
from camfn.model.capture import resolve_state, watch
from camfn.model.head import agree
from camfn.model.linear_head import is_auxiliary, sides
from camfn.model.ports import resolve_layers
from camfn.model.prepare import Call, Prepared, prepares
from camfn.targets import logits_of

See = Callable[[str, tuple[Any, ...], Any], None]


@prepares
def permuted_classifier(
    model: nn.Module | Prepared,
    x: Inputs,
    *,
    layer: Layer | Sequence[Layer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> State:
    """The state of the model whose classes are permuted: class c of it is another class of the model, for every c.

    A map of a class has to change with it. One that stays the same (`rank_correlation` of 1) explains no class.

    **Arguments**

    - `model`: a module, or a model prepared by `camfn.prepare`.
    - `x`: the inputs, on which the classifier is found: the layers whose permuted rows permute the logits.
    - `layer`: the linear layer that gives the logits, or several, instead of those that are found.
    - `state`: the state to begin with. `None` is the model's own.
    - `seed`: the seed of the permutation, which leaves no class in its place.

    **Returns** a new state, for `state=` of a method.

    **Raises** `CamError` if no layer is found, or there is one class only.

    >>> import camfn
    >>> from camfn import demo
    >>> model, x = demo.network(), demo.preprocess(demo.scene(0).image)[None]
    >>> state = permuted_classifier(model, x)
    >>> [name for name, tensor in camfn.state_of(model).items() if tensor is not state[name] and (tensor != state[name]).any()]
    ['classify.weight', 'classify.bias']
    """
    call: Any = model
    full = _full(call, state)
    names = _classifier(call, full, x) if layer is None else resolve_layers(call.borrow(), layer)
    classes = _outputs(call, names)
    if classes < 2:
        raise CamError("the model has one class, which has no other to be permuted with; see random_classifier")
    return _permuted(call, full, names, _derangement(classes, seed))


@prepares
def random_classifier(
    model: nn.Module | Prepared,
    x: Inputs,
    *,
    layer: Layer | Sequence[Layer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> State:
    """The state of the model whose classifier has new random weights, with the mean and the deviation of its own.

    **Arguments**, **Returns** and **Raises** as in `permuted_classifier`; `seed` is that of the weights.

    >>> from camfn import demo
    >>> model, x = demo.network(), demo.preprocess(demo.scene(0).image)[None]
    >>> bool((random_classifier(model, x)["classify.weight"] == model.classify.weight).any())
    False
    """
    call: Any = model
    full = _full(call, state)
    names = _classifier(call, full, x) if layer is None else resolve_layers(call.borrow(), layer)
    return {**full, **_redrawn(full, _tensors_of(call, names), seed)}


def _full(call: Call, state: Mapping[str, Tensor] | None) -> State:
    return {name: tensor.detach() for name, tensor in resolve_state(call.borrow(), state).items()}


def _logits(call: Call, state: State, x: Inputs, see: See = lambda name, args, out: None) -> Tensor:
    with torch.no_grad():
        return logits_of(watch(call, state, x, see))


def _outputs(call: Call, names: Sequence[str]) -> int:
    """Return the number of outputs of linear layers, which must be one."""
    modules = call.borrow().modules
    found = {name: sides(modules.get(name)) for name in names}
    counts = {taken[1] for taken in found.values() if taken is not None}
    if None in found.values() or len(counts) != 1:
        raise CamError(f"layer={', '.join(map(repr, names))} must be linear layers or 1x1 convolutions with as many outputs")
    return counts.pop()


def _classifier(call: Call, state: State, x: Inputs) -> list[str]:
    """Find the layers whose permuted rows permute the logits, along one of their axes: the last that does, or several together.

    Two heads whose logits are averaged, as those of a distilled transformer, only do so together.
    """
    ran: list[str] = []
    logits = _logits(call, state, x, lambda name, args, out: ran.append(name))
    outputs = {name: taken[1] for name, module in call.borrow().distinct().items() if (taken := sides(module)) is not None}
    heads = [name for name in reversed(ran) if outputs.get(name) in logits.shape[1:] and not is_auxiliary(name)]
    heads = list(dict.fromkeys(heads))
    if logits.shape[1:].numel() == 1 and len(heads) > 1:
        raise CamError(f"several layers could give the single logit: {', '.join(map(repr, heads))}; name it with layer=")
    together = [[name for name in heads if outputs[name] == count] for count in dict.fromkeys(map(outputs.get, heads))]
    for names in [*([name] for name in heads), *together]:
        if _permutes(call, state, x, names, logits):
            return names
    tried = ", ".join(map(repr, heads)) or "none has as many outputs"
    raise CamError(
        f"no linear layer gives the logits {tuple(logits.shape)}: none whose permuted rows permute them (tried: {tried}); "
        "name it with layer="
    )


def _permutes(call: Call, state: State, x: Inputs, names: list[str], logits: Tensor) -> bool:
    order = _derangement(_outputs(call, names), 0)
    try:
        changed = _permuted(call, state, names, order)
    except CamError:  # a layer without tensors of its own
        return False
    found = _logits(call, changed, x)
    axes = [axis for axis in range(1, logits.ndim) if logits.shape[axis] == len(order)]
    return any(agree(found, logits.index_select(axis, order.to(logits.device))) for axis in axes)


def _derangement(count: int, seed: int) -> Tensor:
    """Return a permutation that leaves nothing in its place: a random cycle through all."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def _tensors_of(call: Call, names: Sequence[str]) -> list[str]:
    """Return the names, in the state, of the parameters that lie in these layers."""
    private = call.borrow()
    slots = [name for slot, name in private.slots.items() if any(slot.startswith(f"{layer}.") or not layer for layer in names)]
    found = [name for name in dict.fromkeys(slots) if name not in private.buffers]
    if not found:
        raise CamError(f"{', '.join(map(repr, names))} has no parameters in the state (a quantized layer?)")
    return found


def _permuted(call: Call, state: State, names: list[str], order: Tensor) -> State:
    """Permute the rows of all parameters of these layers: those of a weight, of a bias, and of what a weight is made of."""
    own = {name: state[name] for name in _tensors_of(call, names)}
    return {
        **state,
        **{name: tensor[order.to(tensor.device)] for name, tensor in own.items() if tensor.shape[:1] == order.shape},
    }


def _redrawn(state: State, names: Sequence[str], seed: int) -> State:
    """Draw normal numbers with the mean and the deviation of each tensor, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        own = state[name]
        if own.is_floating_point():
            drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64, device="cpu").to(own.device)
            found[name] = (own.double().mean() + own.double().std(unbiased=False) * drawn).to(own.dtype)
    return found


def randomized_states(
    model: nn.Module | Prepared,
    x: Inputs,
    *,
    cascading: bool = True,
    layers: Sequence[Layer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, State]]:
    """States with random weights, from the output downwards: one for each layer, with the layer's name.

    **Arguments**

    - `model`, `x`, `state`: as in `permuted_classifier`. The order of layers is that in which they run on `x`.
    - `cascading`: redraw a layer and all above it. If False, redraw it alone.
    - `layers`: the layers or blocks to redraw, in this order, instead of all with parameters.
    - `seed`: the seed of the weights: normal numbers with the mean and the deviation of each parameter. Buffers, such as the
      statistics of batch norms, stay. A layer has the same weights in both orders.

    **Returns** an iterator over pairs. The empty name is the model itself, for parameters that it reads without a layer.

    **Raises** `CamError` if a layer has no parameters.

    >>> from camfn import demo
    >>> model, x = demo.network(), demo.preprocess(demo.scene(0).image)[None]
    >>> [name for name, state in randomized_states(model, x, layers=["classify", "features"])]
    ['classify', 'features']
    """
    full, owned = _layers_downwards(model, x, layers, state)
    now = full
    for number, (name, tensors) in enumerate(owned.items()):
        now = {**(now if cascading else full), **_redrawn(full, tensors, seed + 1_000_003 * number)}
        yield name, now


@prepares
def _layers_downwards(
    model: Any, x: Inputs, layers: Sequence[Layer] | None, state: Mapping[str, Tensor] | None
) -> tuple[State, dict[str, list[str]]]:
    """Return the complete state, and the parameters of each layer, from the last that ran to the first."""
    full = _full(model, state)
    if layers is not None:
        names = resolve_layers(model.borrow(), layers)
        return full, {name: _tensors_of(model, [name]) for name in names}
    ran: list[str] = []
    with torch.no_grad():
        watch(model, full, x, lambda name, args, out: ran.append(name))
    private, owned = model.borrow(), {}
    for slot, name in private.slots.items():
        if name not in private.buffers:
            owned.setdefault(_owner(slot, set(ran)), []).append(name)
    order = sorted(owned, key=lambda name: _time_of(name, ran), reverse=True)
    return full, {name: list(dict.fromkeys(owned[name])) for name in order}


def _owner(slot: str, ran: set[str]) -> str:
    """Return the innermost module around a tensor that ran. Some are never called: their parent reads their tensors."""
    name = slot.rpartition(".")[0]
    while name and name not in ran:
        name = name.rpartition(".")[0]
    return name


def _time_of(name: str, ran: list[str]) -> float:
    """Return when a layer ran. A module with parameters of its own around others uses them first, as class tokens are."""
    inside = [time for time, other in enumerate(ran) if other != name and (not name or other.startswith(f"{name}."))]
    own = [time for time, other in enumerate(ran) if other == name]
    return inside[0] - 0.5 if inside else own[-1]
