"""What must hold of every map, as plain functions of a variant (a method and its options) and a case.

`LAWS` is the table of them, `VARIANTS` what they are tried on; `oracles/exceptions.py` says why one does not hold for another.
Unless a law is about ReLU or min-max, signed and unscaled maps are compared: min-max makes much of rounding where a map is
nearly flat.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn.formulas.masks import Recipe, recipe_of
from camfn.targets import Contrast, OfClasses, Output, Sum, is_plain, resolve, score_rows
from camfn.testing import Case, Spec, TinyNet
from tests.oracles import closeness
from tests.oracles.networks import CHEAP, LAYERED

UNITS = 2**16
"""Units of rounding (see `closeness.close`) that a law allows: a map may be a small difference of large terms. Of nine thousand
random examples the worst was at 4,500 units, and examples get ten times as rare where they get ten times as bad."""

ADAM_UNITS = 2**25
"""The same for Opti-CAM. Adam divides a slope by its size plus 1e-8, and so multiplies the rounding of a small slope by 1e8;
2.6e6 units are seen."""


COMPOSED = {
    "augment(smooth(grad_cam))": camfn.augment(camfn.smooth(camfn.grad_cam, 2), factors=(0.9,)),
    "integrate(score_cam)": camfn.integrate(camfn.score_cam, 2),
    "ensemble(grad_cam, score_cam)": camfn.ensemble([camfn.grad_cam, camfn.score_cam]),
}
"""Methods made of methods, which laws must hold for too."""


class Variant(NamedTuple):
    """A method with options."""

    method: str
    options: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        return COMPOSED[self.method] if self.method in COMPOSED else camfn.METHODS[self.method].function

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.options.get("recipe", "torchcam"))

    @property
    def has(self) -> set[str]:
        """What its method needs (as METHODS has it), and its options by name; and whether it is of a layer."""
        needs = () if self.method in COMPOSED else camfn.METHODS[self.method].needs
        layer = ["a layer"] if vars(self.function)["of_layer"] else []
        graded = ["a layer's gradient"] if layer and "gradients" in needs else []
        return {*needs, *inspect.signature(self.function).parameters, *layer, *graded}

    @property
    def given(self) -> dict[str, Any]:
        """Its options, and how a layer is read: on tiny grids, with as few channels, that can be open."""
        return {"layout": "channels_first", **self.options} if "a layer" in self.has else self.options

    @property
    def linear_head(self) -> bool:
        return "linear head" in self.has

    def but(self, **options: Any) -> "Variant":
        """The variant with other options, where its method has them."""
        return self._replace(options={**self.options, **{name: options[name] for name in options if name in self.has}})


OPTIONS = CHEAP | {"cameras": {"factors": (1.5,)}, "rise": {"num_samples": 6, "cells": 2}}
VARIANTS = {name: Variant(name, OPTIONS.get(name, {})) for name in (*LAYERED, *COMPOSED)} | {
    "cam, eigen": Variant("cam", {"fc": "fc", "combine": "eigen"}),
    "eigen_cam, centered": Variant("eigen_cam", {"center": True}),
    "fem, share": Variant("fem", {"form": "share", "k": 1.0}),
    "kpca_cam, rbf": Variant("kpca_cam", {"kernel": "rbf", "gamma": 0.3}),
    "score_cam, eigen": Variant("score_cam", {"combine": "eigen"}),
    "score_cam, pytorch-grad-cam": Variant("score_cam", {"recipe": "pytorch-grad-cam"}),
    "score_cam, authors": Variant("score_cam", {"recipe": "authors"}),
    "score_cam, paper": Variant("score_cam", {"recipe": "paper"}),
    "score_cam, scores": Variant("score_cam", {"recipe": Recipe(weights="score")}),
    "ss_cam, activation": Variant("ss_cam", {"num_samples": 2, "noise": "activation", "std": 0.3}),
    "ss_cam, input": Variant("ss_cam", {"num_samples": 2, "noise": "input"}),
    "is_cam, linear": Variant("is_cam", {"num_samples": 2, "path": "linear", "recipe": "paper"}),
    "group_cam, two groups": Variant("group_cam", {"groups": 2, "percentile": 70}),
    "poly_cam, +": Variant("poly_cam", {"variant": "+", "percentile": 0}),
    "poly_cam, -": Variant("poly_cam", {"variant": "-", "percentile": 5}),
    "grad_cam, eigen": Variant("grad_cam", {"combine": "eigen"}),
    "hires_cam, eigen": Variant("hires_cam", {"combine": "eigen"}),
    "grad_cam_pp, authors": Variant("grad_cam_pp", {"alphas": "authors"}),
    "full_grad, pytorch-grad-cam": Variant("full_grad", {"form": "pytorch-grad-cam"}),
}

Law = Callable[[Variant, Case], None]
LAWS: dict[str, Law] = {}
ABOUT: dict[str, str] = {}  # what a variant must have for a law to say anything about it; of all where it is not here


def law(function: Law) -> Law:
    LAWS[function.__name__] = function
    return function


def law_about(need: str) -> Callable[[Law], Law]:
    def register(function: Law) -> Law:
        ABOUT[function.__name__] = need
        return law(function)

    return register


def speaks_of(name: str, variant: Variant) -> bool:
    return ABOUT.get(name) in (None, *variant.has)


# --------------------------------------------------------------------------------------------------------- helpers


def close(variant: Variant, ours: Tensor, theirs: Tensor) -> None:
    closeness.close(ours, theirs, variant.method, units=ADAM_UNITS if variant.method == "opti_cam" else UNITS)


def maps(variant: Variant, case: Case, **options: Any) -> Any:
    return variant.function(*asked(variant, case), **{**variant.given, **options})


def told(variant: Variant, case: Case) -> Any:
    """All that the method tells, not its maps alone."""
    return vars(variant.function)["run"](*asked(variant, case), **variant.given)


def asked(variant: Variant, case: Case) -> Case:
    """The case, without its layer for a method that has none."""
    return case if "a layer" in variant.has else case._replace(layer=None)


def grid_of(variant: Variant, case: Case) -> tuple[int, ...]:
    """Of a map of no other size."""
    own = "a layer" in variant.has and "any size" not in variant.has
    return activation(case).shape[2:] if own else case.x.shape[2:]


def raw(variant: Variant, case: Case, **options: Any) -> Any:
    """The signed map, unscaled."""
    return maps(variant, case, relu=False, normalize=False, **options)


def weights_of(variant: Variant, case: Case) -> Tensor:
    """`(n, t, c)`, or `(n, t, c, p)` of a method with a weight for each position."""
    found = told(variant, case).weights
    assert found, "it has no weight for a channel as a whole"
    return found[0]


def activation(case: Case) -> Tensor:
    """What the layer gives, `(n, c, *grid)`, the plain way."""
    model, seen = copy.deepcopy(case.model).eval(), []
    model.get_submodule(case.layer).register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    model(case.x)
    return seen[0]


def score(model: nn.Module, case: Case, recipe: Recipe, x: Tensor) -> Tensor:
    """The target's score `(n, t)` at `x`, the target being the one of the case's own input."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        found = resolve(case.target, model(case.x), len(case.x), device=case.x.device, scale=recipe.score)
        return score_rows(found.of, model(x), found.rows)


def dice(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.model.spec.seed)


def shuffled(count: int, case: Case) -> Tensor:
    return torch.randperm(count, generator=dice(case))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


class Do(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def retapped(case: Case, change: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> Case:
    """The tapped layer, with `change` behind it, tapped in its place, and `undo` behind that: the network is the same."""
    model = copy.deepcopy(case.model)
    parent, _, leaf = case.layer.rpartition(".")
    owner = model.get_submodule(parent)
    parts = OrderedDict(own=owner.get_submodule(leaf), seen=Do(change), back=Do(undo))
    setattr(owner, leaf, nn.Sequential(parts))
    return case._replace(model=model, layer=f"{case.layer}.seen")


def rechanneled(variant: Variant, case: Case, change: Any, undo: Any, columns: Callable[[Tensor], Tensor]) -> Case:
    """`retapped` for a change of which channels there are.

    A method that reads the linear layer's rows needs them in the order of the channels that it sees: there the linear
    layer undoes the change, by its columns.
    """
    if not variant.linear_head:
        return retapped(case, change, undo)
    changed = retapped(case, change, lambda z: z)
    fc = changed.model.fc
    fc.weight = nn.Parameter(columns(fc.weight.detach()))
    fc.in_features = fc.weight.shape[1]
    return changed


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


def unit(values: Tensor, axes: int) -> Tensor:
    """Min-max over the last axes, one map after the other; zeros where there is one value up to rounding."""
    flat = values.flatten(0, -axes - 1)
    for i, one in enumerate(flat):
        low, high = one.min(), one.max()
        constant = high - low <= 4 * torch.finfo(one.dtype).eps * one.abs().max()
        flat[i] = torch.zeros_like(one) if constant else (one - low) / (high - low)
    return flat.reshape(values.shape)


# ----------------------------------------------------------------------------------------- the form, and the last steps


@law
def form(variant: Variant, case: Case) -> None:
    """A map per image (and target) on the layer's grid, or at the size asked for, in [0, 1] with both ends reached, unless
    it is flat: zeros then. In the dtype of the model."""
    grid, n = grid_of(variant, case), len(case.x)
    outcome = told(variant, case)
    for size, shape in ((None, grid), ("input", case.x.shape[2:]), ([2] * len(grid), (2,) * len(grid))):
        found = maps(variant, case, size=size)
        t = () if found.ndim == 1 + len(grid) else (outcome.scores.shape[1],)
        assert found.shape == (n, *t, *shape)
        assert found.dtype == torch.float64
        low, high = (edge(found.flatten(-len(grid)), -1) for edge in (torch.amin, torch.amax))
        assert bool(((low == 0) & ((high == 1) | (high == 0))).all()), f"from {low} to {high}"
    half = case._replace(model=copy.deepcopy(case.model).float(), x=case.x.float())
    assert maps(variant, half).dtype == torch.float32
    if "a layer" in variant.has:
        (alone,) = maps(variant, case._replace(layer=[case.layer]))
        assert torch.equal(alone, maps(variant, case))


@law
def last_steps(variant: Variant, case: Case) -> None:
    """ReLU, then resize, then min-max of each map by itself."""
    axes = case.x.ndim - 2
    signed = raw(variant, case)
    for relu in (False, True):
        mine = signed.clamp(min=0) if relu else signed
        close(variant, maps(variant, case, relu=relu, normalize=False), mine)
        close(variant, maps(variant, case, relu=relu), unit(mine.clone(), axes))
        mine = _linear(mine, case.x.shape[2:])
        close(variant, maps(variant, case, relu=relu, size="input", normalize=False), mine)


def _linear(values: Tensor, size: Any, **options: Any) -> Tensor:
    axes = len(size)
    flat = values.reshape(-1, 1, *values.shape[-axes:])
    mode = ("linear", "bilinear", "trilinear")[axes - 1]
    return F.interpolate(flat, tuple(size), mode=mode, align_corners=False).reshape(*values.shape[:-axes], *size)


@law
def same_size(variant: Variant, case: Case) -> None:
    """A map resized to the size that it has is the same, to the bit."""
    assert torch.equal(maps(variant, case, size=grid_of(variant, case)), maps(variant, case))
    assert torch.equal(camfn.maps.resize(case.x, case.x.shape[2:]), case.x)


@law
def scale_of_the_map(variant: Variant, case: Case) -> None:
    """However small or large the values of a map are, it is the same in [0, 1]."""
    axes = tuple(range(2 - case.x.ndim, 0))
    signed, normal = raw(variant, case), maps(variant, case, relu=False)
    for k in (2.0**-40, 2.0**40):  # powers of two: the same to the bit
        assert torch.equal(camfn.maps.normalize(k * signed, axes), normal)


@law_about("a layer")
def flat_map(variant: Variant, case: Case) -> None:
    """Where no channel varies over positions, the map is flat, and zeros once it is scaled."""

    def level(z: Tensor) -> Tensor:
        return z.flatten(2).mean(-1).reshape(*z.shape[:2], *[1] * (z.ndim - 2)).expand_as(z).clone()

    flat = retapped(case, level, lambda z: z)
    signed = raw(variant, flat).flatten(2 - case.x.ndim)
    close(variant, signed, signed[..., :1].expand_as(signed))
    assert int(maps(variant, flat, relu=False).count_nonzero()) == 0


# ------------------------------------------------------------------------------------------------------- symmetries


@law
def images_permuted(variant: Variant, case: Case) -> None:
    """The maps of the same images in another order are the same maps in that order."""
    order = shuffled(len(case.x), case)
    other = case._replace(x=case.x[order], target=for_images(case.target, order))
    close(variant, raw(variant, other), raw(variant, case)[order])


@law
def neighbours(variant: Variant, case: Case) -> None:
    """An image has the map that it has without the others of its batch."""
    together = raw(variant, case)
    for i in range(len(case.x)):
        only = torch.tensor([i])
        close(variant, raw(variant, case._replace(x=case.x[only], target=for_images(case.target, only))), together[only])


@law_about("activations")
def channels_permuted(variant: Variant, case: Case) -> None:
    """The order of the layer's channels, and of what reads them, does not matter."""
    order = shuffled(activation(case).shape[1], case)
    back = order.argsort()
    other = rechanneled(variant, case, lambda z: z[:, order], lambda z: z[:, back], lambda w: w[:, order])
    close(variant, raw(variant, other), raw(variant, case))
    if told(variant, case).weights:
        close(variant, weights_of(variant, other), weights_of(variant, case)[:, :, order])


@law
def classes_permuted(variant: Variant, case: Case) -> None:
    """The order of the classes, in the last layer and in the target, does not matter."""
    order = shuffled(case.model.spec.classes, case)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.fc.weight.copy_(model.fc.weight[order])
        model.fc.bias.copy_(model.fc.bias[order])
    before = raw(variant, case)
    if isinstance(case.target, str):  # "all": the maps come in the order of the classes
        before = before[:, order]
    close(variant, raw(variant, case._replace(model=model, target=renamed(case.target, order.argsort()))), before)


@law
def flipped(variant: Variant, case: Case) -> None:
    """The flipped network's map of the flipped input is the map, flipped; along one axis alone, the first or the last."""
    axis = 2 if case.model.spec.seed % 2 else case.x.ndim - 1
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 2:
                weight.copy_(weight.flip(axis))
            elif name == "fc.weight" and not model.spec.pooled:
                placed = weight.unflatten(1, (model.spec.channels, *model.grid))
                weight.copy_(placed.flip(axis).flatten(1))
    other = case._replace(model=model, x=case.x.flip(axis))
    close(variant, raw(variant, other), raw(variant, case).flip(axis - case.x.ndim))


# ------------------------------------------------------------------------------- the activation, the masks, the scores


@law_about("recipe")
def activation_scaled(variant: Variant, case: Case) -> None:
    """An activation k times as large, which the next layer divides by k, gives a map k times as large.

    The masks are the same: up to the recipe's eps, which is scaled here too, so that they are the same to rounding.
    """
    eps = variant.recipe.eps
    before = raw(variant, case)
    for k in (1e-3, 0.3, 50.0):
        other = retapped(case, lambda z, k=k: z * k, lambda z, k=k: z / k)
        close(variant, raw(variant.but(recipe=variant.recipe._replace(eps=k * eps)), other), k * before)


@law_about("activations")
def activation_moved(variant: Variant, case: Case) -> None:
    """A constant b_k added to each channel, flat ones too, and taken off by the next layer, changes no mask: no weight, and
    the map by `sum_k w_k b_k`."""
    like = activation(case)
    b = torch.randn(like.shape[1], generator=dice(case), dtype=torch.float64)
    other = retapped(case, lambda z: z + per_channel(b, z), lambda z: z - per_channel(b, z))
    w = weights_of(variant, case)
    close(variant, weights_of(variant, other), w)
    before, axes = raw(variant, case), like.ndim - 2
    shift = torch.einsum("ntc...,c->nt...", w, b)  # one number, or one for each position
    moved = shift.reshape(before.shape) if w.ndim > 3 else shift.reshape(*before.shape[:-axes], *[1] * axes)
    close(variant, raw(variant, other), before + moved)


@law_about("activations")
def zero_channel(variant: Variant, case: Case) -> None:
    """One more channel, of zeros, adds nothing to the map, but takes its share of the softmax from the others:
    `e^S_0 / (e^S_0 + sum_k e^S_k)`, where `S_0` is the score of an input of zeros."""

    def grow(z: Tensor) -> Tensor:
        return torch.cat([z, torch.zeros_like(z[:, :1])], 1)

    c = activation(case).shape[1]
    other = rechanneled(variant, case, grow, lambda z: z[:, :c], lambda w: torch.cat([w, torch.ones_like(w[:, :1])], 1))
    before, axes = raw(variant, case), case.x.ndim - 2
    if "recipe" in variant.has and variant.recipe.weights == "softmax":
        scores = weights_of(variant.but(recipe=variant.recipe._replace(weights="score")), case)
        zero = score(case.model, case, variant.recipe, torch.zeros_like(case.x))
        share = torch.softmax(torch.cat([scores, zero[..., None]], -1), -1)[..., -1]
        before = before * (1 - share).reshape(*before.shape[:-axes], *[1] * axes)
    close(variant, raw(variant, other), before)


# --------------------------------------------------------------------------------------------------- the gradients


def rescored(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The model with outputs that are a function of its own, and logits for targets."""
    model = copy.deepcopy(case.model)
    return case._replace(model=Changed(model, change), layer=f"model.{case.layer}")


class Changed(nn.Module):
    """A network, and a function of its output."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


CLASSES = torch.tensor([[0, 1]])


@law_about("a layer's gradient")
def activation_rescaled(variant: Variant, case: Case) -> None:
    """An activation k times as large, which the next layer divides by k, has gradients k times as small, and the same map."""
    before = raw(variant, case)
    for k in (1e-2, 0.3, 50.0):
        close(variant, raw(variant, retapped(case, lambda z, k=k: z * k, lambda z, k=k: z / k)), before)


@law_about("a layer's gradient")
def score_scaled(variant: Variant, case: Case) -> None:
    """A score k times as large gives a map k times as large."""
    case = case._replace(target=CLASSES.expand(len(case.x), -1))
    before = raw(variant, case)
    for k in (1e-3, 0.3, 50.0):
        close(variant, raw(variant, rescored(case, lambda y, k=k: y * k)), k * before)


@law_about("a layer's gradient")
def scores_added(variant: Variant, case: Case) -> None:
    """The map of a difference of two scores is the difference of their maps."""
    first, second = raw(variant, case._replace(target=CLASSES.expand(len(case.x), -1))).unbind(1)
    both = rescored(case, lambda y: y[:, :1] - 3 * y[:, 1:2])
    close(variant, raw(variant, both._replace(target=0)), first - 3 * second)


@law_about("a layer's gradient")
def unread_channel(variant: Variant, case: Case) -> None:
    """One more channel, of whatever values, that nothing reads adds nothing."""

    def grow(z: Tensor) -> Tensor:
        return torch.cat([z, z[:, :1].sin() + 0.3], 1)

    c = activation(case).shape[1]
    other = retapped(case, grow, lambda z: z[:, :c])
    close(variant, raw(variant, other), raw(variant, case))


@law_about("recipe")
def between_the_channels(variant: Variant, case: Case) -> None:
    """Weights that are a softmax are positive and sum to one: at no position is the map outside of the channels' values."""
    seen, signed = activation(case), raw(variant, case)
    if signed.ndim == seen.ndim:  # several targets
        seen = seen[:, None]
    low, high = seen.amin(1 - case.x.ndim), seen.amax(1 - case.x.ndim)
    room = UNITS * torch.finfo(seen.dtype).eps * seen.abs().max()
    assert bool(((low - room <= signed) & (signed <= high + room)).all())


@law
def logits_shifted(variant: Variant, case: Case) -> None:
    """A constant added to every logit does not change the map; but of a target that is a logit and the weight itself."""
    if variant.method in ("score_cam_pp", "rise", "poly_cam") and not is_plain(case.target):
        return
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.fc.bias += 3
    close(variant, raw(variant, case._replace(model=model)), raw(variant, case))


@law_about("a layer")
def upsampled_layer(variant: Variant, case: Case) -> None:
    """A layer that is the upsampled activation has the upsampled map: its masks are the same, as they are upsampled first."""

    def coarse(z: Tensor) -> Tensor:
        return z[(..., *(slice(None, None, 2 if side > 2 else 1) for side in z.shape[2:]))].clone()

    fine = beside(case, lambda z: _linear(coarse(z), case.x.shape[2:]))
    close(variant, raw(variant, fine), raw(variant, beside(case, coarse), size="input"))


def beside(case: Case, show: Callable[[Tensor], Tensor]) -> Case:
    """What `show` makes of the layer's output, tapped; the network's output does not change with it."""
    model = copy.deepcopy(case.model)
    parent, _, leaf = case.layer.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, Beside(owner.get_submodule(leaf), show))
    return case._replace(model=model, layer=f"{case.layer}.shown")


class Beside(nn.Module):
    """A layer, and something made from its output that adds nothing to the result: a gradient of zero reaches it."""

    def __init__(self, own: nn.Module, show: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.shown = own, Do(show)

    def forward(self, z: Tensor) -> Tensor:
        out = self.own(z)
        return out + 0 * self.shown(out).sum()


KIN = {
    "score_cam": ("ss_cam", {}, {"num_samples": 2, "std": 0.0}),
    "ss_cam": ("is_cam", {"std": 0.0}, {"num_samples": 1}),
    "is_cam": ("ss_cam", {"num_samples": 1}, {"num_samples": 2, "std": 0.0}),
}


@law_about("recipe")
def kin(variant: Variant, case: Case) -> None:
    """Score-CAM is SS-CAM without noise, however many draws, and IS-CAM of one step."""
    other, still, options = KIN.get(variant.method, ("score_cam", {}, {}))
    recipe = variant.recipe
    if variant.options.get("noise") == "activation":  # it goes on the upsampled activation, and the min-max comes after
        recipe = recipe._replace(masks="upsample_first")
    options = {"combine": variant.options.get("combine", "sum"), **options}
    close(variant, raw(variant.but(**still), case), raw(Variant(other, {"recipe": recipe, **options}), case))


class Front(nn.Module):
    """A network that takes `k` times its input, and a layer that shows the input itself."""

    def __init__(self, model: nn.Module, k: float) -> None:
        super().__init__()
        self.model, self.shown, self.k = model, Do(torch.clone), k

    def forward(self, x: Tensor) -> Tensor:
        self.shown(x)
        return self.model(x * self.k)


@law_about("recipe")
def path_of_inputs(variant: Variant, case: Case) -> None:
    """The scores are the mean of Score-CAM's scores of networks that take 1/N, 2/N, ... N/N times the masked input; of the
    cumulative path, the sums of these up to each."""
    steps = torch.arange(1, variant.options.get("num_samples", 1) + 1, dtype=torch.float64)
    path = steps / len(steps) if variant.options.get("path") == "linear" else steps.cumsum(0) / len(steps)
    recipe = variant.recipe._replace(weights="score")
    plain, seen = Variant("score_cam", {"recipe": recipe}), case._replace(layer="shown", target=0)
    found = [weights_of(plain, seen._replace(model=Front(case.model, float(k)))) for k in path]
    close(
        variant, weights_of(variant.but(recipe=recipe), seen._replace(model=Front(case.model, 1.0))), torch.stack(found).mean(0)
    )


# -------------------------------------------------------------------------------------------------------- execution


@law
def repeated(variant: Variant, case: Case) -> None:
    """The same call gives the same map to the bit, whatever was drawn in between, and draws nothing from the global state."""
    first = raw(variant, case)
    torch.rand(1)
    state = torch.get_rng_state()
    assert torch.equal(raw(variant, case), first)
    assert torch.equal(torch.get_rng_state(), state)


@law_about("sweep")
def chunk_size(variant: Variant, case: Case) -> None:
    """How many masked inputs go through the model at once does not matter."""
    default = raw(variant, case)
    for chunk in (1, 2, 5, 1000):
        close(variant, raw(variant, case, sweep=camfn.Sweep(chunk=chunk)), default)


@law_about("sweep")
def folded(variant: Variant, case: Case) -> None:
    """The model sees a chunk as its batch, or one row at a time: the map is the same."""
    expected = raw(variant, case)
    for chunk in (None, 1, 3):
        close(variant, raw(variant, case, sweep=camfn.Sweep(fold=False, chunk=chunk)), expected)


@law
def stacked_states(variant: Variant, case: Case) -> None:
    """`vmap` over stacked states gives the maps of the models one after the other."""
    spec = case.model.spec
    models = [case.model, TinyNet(spec._replace(seed=spec.seed + 1))]
    names = camfn.state_of(case.model)
    stacked = {name: torch.stack([camfn.state_of(model)[name] for model in models]) for name in names}
    together = torch.func.vmap(lambda state: raw(variant, case, state=state))(stacked)
    for i, model in enumerate(models):
        close(variant, together[i], raw(variant, case._replace(model=model)))


@law
def many_targets(variant: Variant, case: Case) -> None:
    """Several targets of one sweep have the maps that each has of a sweep of its own."""
    n, classes = len(case.x), torch.arange(case.model.spec.classes)
    rows = torch.stack([classes.roll(i) for i in range(n)])  # every image has its own order
    together = raw(variant, case._replace(target=rows))
    for t in range(len(classes)):
        close(variant, together[:, t], raw(variant, case._replace(target=rows[:, t])))
    every = raw(variant, case._replace(target="all"))
    close(variant, torch.stack([maps[row] for maps, row in zip(every, rows)]), together)


@law_about("a layer")
def several_layers(variant: Variant, case: Case) -> None:
    """Several layers have the maps that each has of a call of its own."""
    other = "stem.0" if case.layer != "stem.0" else "features"
    for layers in ((other, case.layer), (case.layer, other)):
        together = raw(variant, case._replace(layer=layers))
        for layer, found in zip(layers, together):
            close(variant, found, raw(variant, case._replace(layer=layer)))


# ------------------------------------------------------------------------------------------------------ fixed cases


def fixed_case(spec: Spec, layer: str, target: Any, n: int = 3) -> Case:
    """A case without a draw."""
    generator = torch.Generator().manual_seed(100 + spec.seed)
    x = torch.randn(n, spec.colors, *spec.sides, generator=generator, dtype=torch.float64)
    return Case(TinyNet(spec), layer, x, target)


def every_position() -> Case:
    """One whose head tells positions apart: no method that needs pooling takes it."""
    return fixed_case(Spec(sides=(5, 4), pooled=False, channels=3, stride=1, seed=5), "features", 1)


def fixed_cases(variant: Variant) -> list[Case]:
    """A few cases that every variant takes, with what goes wrong easily: uneven sides, per-image targets, dead channels; and,
    where gradients count, one with a layer that is not the last, and a score that is not linear behind it."""
    square = Spec(sides=(6, 6), channels=4, classes=4, dead=1, inplace=True, training=True, seed=1)
    oblong = Spec(sides=(5, 6), block="residual", channels=4, classes=4, inplace=True, seed=2)
    curved = [fixed_case(oblong, "block", camfn.targets.rest([3, 0, 1]))] if "a layer's gradient" in variant.has else []
    return [
        *curved,
        fixed_case(square, "features", [2, 0, 1]),
        fixed_case(oblong, "features", torch.tensor([[0, 3], [1, 2], [3, 0]])),
        fixed_case(Spec(sides=(9,), block="dense", channels=3, stride=1, dead=1, seed=3), "features", None),
        fixed_case(Spec(sides=(4, 3, 5), channels=3, colors=1, seed=4), "features", "all", n=2),
    ]
