"""Networks and targets, changed so that what must follow for the map is known."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camfn.targets import Contrast, OfClasses, Output, Sum
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
    model = copy.deepcopy(case.model)
    parent, _, leaf = case.layer.rpartition(".")
    owner = model.get_submodule(parent)
    parts = OrderedDict(own=owner.get_submodule(leaf), seen=Do(change), back=Do(undo))
    setattr(owner, leaf, nn.Sequential(parts))
    return case._replace(model=model, layer=f"{case.layer}.seen")


def rescored(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The network with outputs that are a function of its own, and logits for targets."""
    return case._replace(model=Changed(copy.deepcopy(case.model), change), layer=f"model.{case.layer}")


def with_classes_permuted(case: Case, order: Tensor) -> Case:
    """The network whose class `i` is class `order[i]` of the case's."""
    head = head_of(case)
    if head is None:
        return rescored(case, lambda y: y[:, order])
    model = copy.deepcopy(case.model)
    last = model.get_submodule(head)
    with torch.no_grad():
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
    return case._replace(model=model)


def with_logits_shifted(case: Case, by: float) -> Case:
    """The network with a constant added to every logit."""
    head = head_of(case)
    if head is None:
        return rescored(case, lambda y: y + by)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.get_submodule(head).bias += by
    return case._replace(model=model)


def with_columns(case: Case, changed: Case, columns: Callable[[Tensor], Tensor]) -> Case:
    """The changed network, whose last linear layer reads other columns."""
    last: Any = changed.model.get_submodule(head_of(case) or "")
    last.weight = nn.Parameter(columns(last.weight.detach()))
    last.in_features = last.weight.shape[1]
    return changed


def head_of(case: Case) -> str | None:
    """The name of the linear layer with a bias whose output is the network's, if there is one.

    The last step can be written into it. Methods that read it, or follow the operations after the layer, take that.
    """
    model, found = copy.deepcopy(case.model), {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.bias is not None:
            module.register_forward_hook(lambda own, args, out, name=name: found.update({name: out}))
    out = evaluated(model, case.x)
    return next((name for name, own in found.items() if own is out), None)


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
    model, seen = copy.deepcopy(case.model), []
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
        return lambda y: target(y[names])
    if isinstance(target, Tensor):
        return names[target]
    return int(names[target]) if isinstance(target, int) else target  # None, "all" and top(k) name no class
