"""Networks and targets, changed so that what must follow for the map is known."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camfn.model.private_copy import copy_of
from camfn.targets import Contrast, Named, OfClasses, Output, Sum, Top, flatten, logits_of
from camfn.testing.strategies import Case


class Do(nn.Module):
    """A function, as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


class Changed(nn.Module):
    """A network, and a function of its output."""

    def __init__(self, model: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.model(*args, **kwargs))


def retapped(case: Case, change: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> Case:
    """The tapped layer, with `change` behind it, tapped in its place, and `undo` behind that: the network is the same."""
    model = copied(case.model)
    parent, _, leaf = case.layer.rpartition(".")
    owner = model.get_submodule(parent)
    parts = OrderedDict(own=owner.get_submodule(leaf), seen=Do(change), back=Do(undo))
    setattr(owner, leaf, nn.Sequential(parts))
    return case._replace(model=model, layer=f"{case.layer}.seen")


def rescored(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The network whose logits are a function of its own."""
    layer = f"model.{case.layer}" if case.layer else "model"
    return case._replace(model=Changed(copied(case.model), lambda output: with_logits(output, change)), layer=layer)


def with_logits(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of a batch or of an image, with other logits in the place where camfn reads them."""
    logits, (leaves, rebuilt) = logits_of(output), flatten(output)
    return rebuilt([change(leaf) if leaf is logits else leaf for leaf in leaves])


def has_logits(output: Any) -> bool:
    """Whether the logits are a tensor of the output, and not computed from several."""
    logits = logits_of(output)
    return any(leaf is logits for leaf in flatten(output)[0])


def with_classes_permuted(case: Case, order: Tensor) -> Case:
    """The network whose class `i` is class `order[i]` of the case's."""
    head = head_of(case)
    if head is None:
        return rescored(case, lambda y: y[:, order])
    model = copied(case.model)
    last: Any = model.get_submodule(head)
    # New parameters: another layer may share the old ones.
    last.weight = nn.Parameter(last.weight.detach()[order])
    if last.bias is not None:
        last.bias = nn.Parameter(last.bias.detach()[order])
    return case._replace(model=model)


def with_logits_shifted(case: Case, by: float) -> Case:
    """The network with a constant added to every logit."""
    head = head_of(case)
    if head is None:
        return rescored(case, lambda y: y + by)
    model = copied(case.model)
    last: Any = model.get_submodule(head)
    bias = last.weight.new_zeros(last.out_features) if last.bias is None else last.bias
    last.bias = nn.Parameter(bias.detach() + by)
    return case._replace(model=model)


def with_columns(case: Case, changed: Case, columns: Callable[[Tensor], Tensor]) -> Case:
    """The changed network, whose last linear layer reads other columns."""
    last: Any = changed.model.get_submodule(head_of(case) or "")
    last.weight = nn.Parameter(columns(last.weight.detach()))
    last.in_features = last.weight.shape[1]
    return changed


def head_of(case: Case) -> str | None:
    """The name of the linear layer whose output is the network's logits, if there is one.

    The last step can be written into it. Methods that read it, or follow the operations after the layer, take that.
    """
    model, found = copied(case.model), {}
    for name, module in model.named_modules():
        # A layer whose weight is computed in each call, as `weight_norm` does, has no such parameter.
        if type(module) is nn.Linear and "weight" in module._parameters:
            module.register_forward_hook(lambda own, args, out, name=name: found.update({name: out}))
    logits = logits_of(evaluated(model, case.x))
    return next((name for name, own in found.items() if own is logits), None)


def copied(model: Any) -> Any:
    """A copy of the model in eval mode, to change.

    It is camfn's private copy, with parameters of its own. `copy.deepcopy` fails for some models that camfn explains: those
    that hold a tensor of a graph, as the old `torch.nn.utils.weight_norm` does, or a lock.
    """
    private = copy_of(model)
    own = {name: tensor.clone() for name, tensor in private.tensors.items()}
    private.put({name: own[name] if name in private.buffers else _parameter(own[name]) for name in own})
    return private.module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, tensor.is_floating_point() or tensor.is_complex())


def evaluated(model: nn.Module, x: Any) -> Any:
    """The network's output in eval mode, without a graph."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            return model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, Mapping) else model(x)
    finally:
        for module, training in modes.items():
            module.training = training


def activation(case: Case) -> Tensor:
    """What the layer gives, the plain way."""
    model, seen = copied(case.model), []
    model.get_submodule(case.layer).register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    evaluated(model, case.x)
    return seen[0]


# ---------------------------------------------------------------------------------------------------------- the target


def for_images(target: Any, index: Tensor) -> Any:
    """The target of a batch made of the images `index` of this one."""
    if isinstance(target, (OfClasses, Contrast)):
        return replace(target, classes=for_images(target.classes, index))
    if isinstance(target, Output):
        return replace(target, index=for_images(target.index, index))
    if isinstance(target, Sum):
        return Sum(tuple((weight, for_images(term, index)) for weight, term in target.terms))
    if isinstance(target, list):
        return [target[i] for i in index]
    return target[index] if isinstance(target, Tensor) else target


def can_be_renamed(target: Any) -> bool:
    """Whether `renamed` knows where the target names its classes. A similarity has none."""
    if isinstance(target, Sum):
        return all(can_be_renamed(term) for _, term in target.terms)
    return isinstance(target, (OfClasses, Contrast, Output, Top)) or not isinstance(target, Named)


def renamed(target: Any, names: Tensor) -> Any:
    """The target where class `c` is now called `names[c]`."""
    if isinstance(target, OfClasses):
        return replace(target, classes=renamed(target.classes, names))
    if isinstance(target, Contrast):
        return replace(target, classes=renamed(target.classes, names), against=renamed(target.against, names))
    if isinstance(target, Output):
        return replace(target, index=renamed(target.index, names))
    if isinstance(target, Sum):
        return Sum(tuple((weight, renamed(term, names)) for weight, term in target.terms))
    if isinstance(target, list):
        return [renamed(one, names) for one in target]
    if callable(target):
        return lambda y: target(with_logits(y, lambda logits: logits[names]))
    if isinstance(target, Tensor):
        return names[target]
    return int(names[target]) if isinstance(target, int) else target  # None, "all" and top(k) name no class
