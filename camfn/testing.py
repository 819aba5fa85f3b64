"""Hypothesis strategies for property-based tests of maps: small models, with inputs, layers and targets that fit them.

Every example is valid by construction; nothing is filtered. The fields of a case are in the order of a method's arguments:

>>> import camfn
>>> from camfn.testing import cases
>>> from hypothesis import given, settings
>>> @settings(max_examples=5, deadline=None)
... @given(cases("score_cam"))
... def maps_are_in_the_unit_interval(case):
...     maps = camfn.explain(*case, method="score_cam").maps
...     assert 0 <= maps.min() and maps.max() <= 1
>>> maps_are_in_the_unit_interval()

(`camfn.explain` reports a flat map in its findings, where `camfn.score_cam` warns.) No other file of camfn needs hypothesis.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from camfn import targets
from camfn._errors import CamError
from camfn._types import Target
from camfn.formulas.masks import Recipe, recipe_of
from camfn.methods import METHODS

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Spec(NamedTuple):
    """The parameters of a `TinyNet`. A failing test prints them."""

    sides: tuple[int, ...] = (6, 5)  # sides of the input, with one to three spatial axes
    block: Literal["plain", "residual", "dense"] = "plain"  # the block's output is plain, added (in place) or concatenated
    pooled: bool = True  # whether the linear layer follows global average pooling, or takes all positions
    colors: int = 2  # channels of the input
    width: int = 2  # channels of the stem
    channels: int = 3  # channels of `features`
    classes: int = 3
    stride: int = 2  # stride of `features`
    dead: int = 0  # number of constant channels of `features` (at least one channel is not)
    inplace: bool = False  # whether the activation functions work in place
    training: bool = False  # whether the model is in train mode
    seed: int = 0  # seed of the weights


class Block(nn.Module):
    """A convolution whose output may be joined with its input."""

    def __init__(self, conv: type[nn.Module], spec: Spec) -> None:
        super().__init__()
        self.join = spec.block
        self.conv = conv(spec.width, spec.width, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        out = self.conv(z)
        if self.join == "residual":
            out += z
        return torch.cat([z, out], 1) if self.join == "dense" else out


class TinyNet(nn.Module):
    """A small float64 classifier.

    It consists of `stem` (convolution, batch norm, SiLU), `block`, `features` (a convolution), `act` (ReLU), pooling, dropout
    and `fc`. Every kernel covers its input symmetrically, strided or not. The network with flipped kernels and head therefore
    computes the same scores from the flipped input.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        conv, norm = _CONV[len(spec.sides)], _NORM[len(spec.sides)]
        width = spec.width * (2 if spec.block == "dense" else 1)
        self.stem = nn.Sequential(conv(spec.colors, spec.width, 3, padding=1), norm(spec.width), nn.SiLU(inplace=spec.inplace))
        self.block = Block(conv, spec)
        # A stride of 2 covers an even side symmetrically with a kernel of 2, an odd side with a padded kernel of 3.
        kernel = tuple(2 if spec.stride == 2 and side % 2 == 0 else 3 for side in spec.sides)
        self.features = conv(width, spec.channels, kernel, spec.stride, tuple(k - 2 for k in kernel))
        self.act = nn.ReLU(inplace=spec.inplace)
        self.drop = nn.Dropout(0.5)
        self.grid = tuple((side - 1) // spec.stride + 1 for side in spec.sides)  # of `features`
        positions = 1 if spec.pooled else torch.Size(self.grid).numel()
        self.fc = nn.Linear(spec.channels * positions, spec.classes)
        self._fill(torch.Generator().manual_seed(spec.seed))
        self.train(spec.training)

    def _fill(self, generator: torch.Generator) -> None:
        self.double()
        for name, tensor in self.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(2 * drawn / max(tensor[0].numel(), 4) ** 0.5)
        with torch.no_grad():
            self.features.weight[: min(self.spec.dead, self.spec.channels - 1)] = 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.features(self.block(self.stem(x)))).flatten(2)
        return self.fc(self.drop(z.mean(-1) if self.spec.pooled else z.flatten(1)))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with spatial axes, in the order of execution."""
        return ("stem.0", "stem.1", "stem", "block.conv", "block", "features", "act")

    def __repr__(self) -> str:
        return f"TinyNet({self.spec})"


class Case(NamedTuple):
    """The arguments of a method, in order: `camfn.score_cam(*case)`."""

    model: TinyNet
    layer: str
    x: Tensor
    target: Target


_FIELDS: dict[str, SearchStrategy[Any]] = {
    "sides": st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    "block": st.sampled_from(["plain", "residual", "dense"]),
    "pooled": st.booleans(),
    "colors": st.integers(1, 3),
    "width": st.integers(1, 3),
    "channels": st.integers(1, 4),
    "classes": st.integers(2, 4),
    "stride": st.sampled_from([2, 1]),
    "dead": st.integers(0, 2),
    "inplace": st.booleans(),
    "training": st.booleans(),
    "seed": st.integers(0, 9999),
}


def models(**fields: Any) -> SearchStrategy[TinyNet]:
    """Networks of every `Spec`.

    Fields can be fixed, or given a strategy: `models(block="residual", classes=st.integers(2, 9))`.
    """
    given = {name: value if isinstance(value, SearchStrategy) else st.just(value) for name, value in fields.items()}
    return st.builds(Spec, **{**_FIELDS, **given}).map(TinyNet)


def inputs_of(model: TinyNet, n: int | SearchStrategy[int] = st.integers(1, 3)) -> SearchStrategy[Tensor]:
    """Input batches `(n, colors, *sides)` of normal random numbers."""

    def make(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, model.spec.colors, *model.spec.sides, generator=generator, dtype=torch.float64)

    # Disjoint from the models' seeds: an input with a kernel's numbers gives a symmetric activation, which may be flat.
    return st.builds(make, st.just(n) if isinstance(n, int) else n, st.integers(10_000, 19_999))


def layers_of(model: TinyNet, *, linear_head: bool = False, varied: bool = False) -> SearchStrategy[str]:
    """Names of layers with spatial axes.

    - `linear_head`: only the layers whose channels the last linear layer reads.
    - `varied`: only layers with a channel that is not flat, for any input, if the grid has more than one position. This
      excludes the ReLU, whose output may be zero.
    """
    names = model.layers[-2:] if linear_head else model.layers
    return st.sampled_from([name for name in names if not (varied and name == "act")])


def targets_of(model: TinyNet, n: int, *, plain: bool = False) -> SearchStrategy[Target]:
    """Targets of every kind for classifiers, for a batch of `n`.

    - `plain`: only classes by number, which every method and recipe accepts.
    """
    one, count = st.integers(0, model.spec.classes - 1), model.spec.classes
    each = st.lists(one, min_size=n, max_size=n)
    several = st.lists(st.tuples(*[one] * n), min_size=1, max_size=3).map(lambda columns: torch.tensor(columns).T)
    some = st.one_of(st.none(), one, each)
    classes = st.one_of(some, each.map(torch.tensor), several, st.just("all"), st.integers(1, count).map(targets.top))
    if plain:
        return classes
    scales = st.sampled_from([targets.logit, targets.probability, targets.log_probability, targets.rest])
    scaled = st.one_of(st.builds(lambda scale, c: scale(c), scales, some), st.one_of(one, each).map(targets.regression))
    contrasts = st.builds(lambda c, k: targets.contrast(c, top=k), some, st.integers(1, count - 1))
    alone = st.builds(lambda scale, c: scale(c), scales, one)
    return st.one_of(
        classes,
        scaled,
        contrasts,
        st.builds(lambda a, b, weight: a - weight * b, contrasts, scaled, st.sampled_from([-1, 0.5, 2])),
        one.map(_margin),
        st.lists(st.one_of(one.map(_margin), alone), min_size=n, max_size=n),
    )


def _margin(c: int) -> Callable[[Tensor], Tensor]:
    """Return a target function: the logit of class `c` minus half the mean logit."""

    def margin(y: Tensor) -> Tensor:
        return y[c] - 0.5 * y.mean()

    return margin


@st.composite
def cases(
    draw: st.DrawFn, method: str | None = None, *, recipe: str | Recipe = "torchcam", varied: bool = False, **fields: Any
) -> Case:
    """Arguments (model, layer, x, target) for `camfn.METHODS[method]` with this recipe.

    - `method`: `None` gives arguments that every method accepts, except those that need attention.
    - `varied`: in every image, some channel of the layer is not flat.
    - `fields`: fields of `Spec`, as in `models`.
    """
    if method is not None and "attention" in METHODS[method].needs:
        raise CamError(f"{method} needs attention, and the models of camfn.testing are convolutional")
    linear_head = method is None or "linear head" in METHODS[method].needs
    knobs = recipe_of(recipe)
    varied = varied or knobs.flat == "skip"  # a recipe that skips flat channels needs one that is not
    if linear_head or (method is not None and "any size" in METHODS[method].needs):
        fields = {"pooled": True, **fields}  # else the model takes inputs of one size only
    if varied:
        fields = {"sides": st.lists(st.integers(3, 6), min_size=1, max_size=3).map(tuple), **fields}
    model = draw(models(**fields))
    x = draw(inputs_of(model))
    layer = draw(layers_of(model, linear_head=linear_head, varied=varied))
    target = draw(targets_of(model, len(x), plain=linear_head or knobs.score == "probability"))
    return Case(model, layer, x, target)
