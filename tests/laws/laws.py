"""What must hold of every map, as plain functions of a variant (a method and its options) and a case.

`LAWS` is the table of them: those of any method, which are in `camfn.testing.laws`, and here those of camfn's own variants,
options and formulas. `VARIANTS` is what they are tried on; `oracles/exceptions.py` says why one does not hold for another.
Unless a law is about ReLU or min-max, signed and unscaled maps are compared: min-max makes much of rounding where a map is
nearly flat.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn.formulas.masks import Recipe, recipe_of
from camfn.targets import resolve, score_rows
from camfn.testing import Case, Spec, TinyNet
from camfn.testing import laws as of_any
from camfn.testing.changes import Do, activation, rescored, retapped, with_columns
from camfn.testing.laws import UNITS
from tests.oracles import closeness
from tests.oracles.networks import CHEAP, LAYERED

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
    def asked(self) -> Callable[..., Any]:
        """The method with its options, as the laws of any method take it."""
        return functools.partial(self.function, **self.given)

    @property
    def units(self) -> int:
        return ADAM_UNITS if self.method == "opti_cam" else UNITS

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


def _of_variant(name: str) -> Law:
    def asked(variant: Variant, case: Case) -> None:
        of_any.LAWS[name](variant.asked, case, units=variant.units)

    return asked


LAWS: dict[str, Law] = {name: _of_variant(name) for name in of_any.LAWS}
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
    if name in of_any.LAWS:
        return of_any.speaks_of(name, variant.asked, fixed_case(Spec(), "features", 0))
    return ABOUT.get(name) in (None, *variant.has)


# --------------------------------------------------------------------------------------------------------- helpers


def close(variant: Variant, ours: Tensor, theirs: Tensor) -> None:
    closeness.close(ours, theirs, variant.method, units=variant.units)


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


def score(model: nn.Module, case: Case, recipe: Recipe, x: Tensor) -> Tensor:
    """The target's score `(n, t)` at `x`, the target being the one of the case's own input."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        found = resolve(case.target, model(case.x), len(case.x), device=case.x.device, scale=recipe.score)
        return score_rows(found.of, model(x), found.rows)


def dice(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.model.spec.seed)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


def rechanneled(variant: Variant, case: Case, change: Any, undo: Any, columns: Callable[[Tensor], Tensor]) -> Case:
    """`retapped` for a change of which channels there are.

    A method that reads the linear layer's rows needs them in the order of the channels that it sees: there the linear
    layer undoes the change, by its columns.
    """
    if not variant.linear_head:
        return retapped(case, change, undo)
    return with_columns(case, retapped(case, change, lambda z: z), columns)


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
