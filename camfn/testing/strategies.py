"""Hypothesis strategies for property-based tests: small networks, with inputs, layers and targets that fit them; and tensors as
formulas, targets and metrics read them: activations, gradients, maps and outputs.

Every example is valid by construction; nothing is filtered. Numbers are float64.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from camfn import layouts, targets
from camfn._errors import CamError, suggested
from camfn._types import Activations, Gradients, Layout, Maps, Target
from camfn.formulas.masks import Recipe, recipe_of
from camfn.methods.registry import Need, method_of

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


class Drawn(nn.Module):
    """A small float64 classifier of the strategies."""

    spec: Any
    layers: tuple[str, ...]
    """The layers with spatial axes, in the order of execution."""
    grid: tuple[int, ...]
    """The grid of the last of them."""
    layout: Layout
    """How each of them is read."""

    def flipped(self, axis: int) -> "Drawn":
        """The network that computes the same scores from the input flipped along `axis`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec})"


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


class TinyNet(Drawn):
    """A small convolutional classifier.

    It consists of `stem` (convolution, batch norm, SiLU), `block`, `features` (a convolution), `act` (ReLU), pooling, dropout
    and `fc`. Every kernel covers its input symmetrically, strided or not. The network with flipped kernels and head therefore
    computes the same scores from the flipped input.
    """

    layers = ("stem.0", "stem.1", "stem", "block.conv", "block", "features", "act")
    layout = "channels_first"

    def __init__(self, spec: Spec = Spec()) -> None:
        super().__init__()
        self.spec = _checked(spec)
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
        _fill(self.double(), torch.Generator().manual_seed(spec.seed))
        self.train(spec.training)
        with torch.no_grad():
            self.features.weight[: min(self.spec.dead, self.spec.channels - 1)] = 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.features(self.block(self.stem(x)))).flatten(2)
        return self.fc(self.drop(z.mean(-1) if self.spec.pooled else z.flatten(1)))

    def flipped(self, axis: int) -> "TinyNet":
        model = copy.deepcopy(self)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 2:
                    weight.copy_(weight.flip(axis))
                elif name == "fc.weight" and not self.spec.pooled:
                    placed = weight.unflatten(1, (self.spec.channels, *self.grid))
                    weight.copy_(placed.flip(axis).flatten(1))
        return model


class TokenSpec(NamedTuple):
    """The parameters of a `TinyViT`. A failing test prints them."""

    sides: tuple[int, ...] = (6, 4)  # sides of the input: even, since patches have a side of 2
    pool: Literal["mean", "class"] = "mean"  # whether the head reads the mean of the tokens, or a class token
    colors: int = 2  # channels of the input
    heads: int = 1
    depth: int = 2  # blocks
    classes: int = 3
    seed: int = 0  # seed of the weights


class Attention(nn.Module):
    """A pre-norm block: attention, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, z: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(z)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # Written out: fused attention has no derivative in forward mode.
        attention = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
        z = z + self.proj((attention @ value).transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


class TinyViT(Drawn):
    """A small vision transformer. Its layers are `(n, tokens, channels)`.

    The last block's output is not among `layers`. If the head reads a class token, the others have no gradient there. And the
    norm behind it divides by its scale: products of activation and gradient cancel, and leave rounding.
    """

    def __init__(self, spec: TokenSpec = TokenSpec()) -> None:
        super().__init__()
        self.spec, self.prefix = _checked(spec), int(spec.pool == "class")
        width, self.grid = 4 * spec.heads, tuple(side // 2 for side in spec.sides)
        count = torch.Size(self.grid).numel()
        self.patches = nn.Conv2d(spec.colors, width, 2, 2)
        self.extra = nn.Parameter(torch.zeros(self.prefix, width))
        self.places = nn.Parameter(torch.zeros(count, width))
        self.blocks = nn.ModuleList(Attention(width, spec.heads) for _ in range(spec.depth))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, spec.classes)
        self.layers = tuple(f"blocks.{i}{part}" for i in range(spec.depth) for part in (".norm1", ""))[:-1]
        self.layout = layouts.tokens(self.grid, prefix=self.prefix)
        _fill(self.double(), torch.Generator().manual_seed(spec.seed))

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).mT + self.places
        z = torch.cat([self.extra.expand(len(x), -1, -1), z], 1)
        for block in self.blocks:
            z = block(z)
        z = self.norm(z)
        return self.fc(z[:, 0] if self.prefix else z.mean(1))

    def flipped(self, axis: int) -> "TinyViT":
        model = copy.deepcopy(self)
        with torch.no_grad():
            model.patches.weight.copy_(self.patches.weight.flip(axis))
            model.places.copy_(self.places.unflatten(0, self.grid).flip(axis - 2).flatten(0, 1))
        return model


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Fill all weights with normal random numbers, scaled to the number of inputs."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point() and tensor.numel():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(2 * drawn / max(tensor[0].numel(), 4) ** 0.5)


class Case(NamedTuple):
    """The arguments of a method, in order: `camfn.score_cam(*case)`."""

    model: Any
    layer: str
    x: Tensor
    target: Target


_COUNTS = ("colors", "width", "channels", "classes", "heads", "depth")
_CHOICES: dict[str, tuple[Any, ...]] = {"block": ("plain", "residual", "dense"), "pool": ("mean", "class"), "stride": (1, 2)}


def _checked(spec: Any) -> Any:
    """Return the spec of a network, or raise a `CamError` that names the field that no network has."""
    kind = type(spec).__name__
    for name, value in spec._asdict().items():
        if name in _COUNTS and not _is_count(value):
            raise CamError(f"{kind}: {name}={value!r} must be a positive int")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise CamError(f"{kind}: {name}={value!r} must be one of {', '.join(map(repr, _CHOICES[name]))}")
    sides, even = spec.sides, isinstance(spec, TokenSpec)
    axes, wanted = ((2,), "two even, positive ints") if even else ((1, 2, 3), "one to three positive ints")
    fine = isinstance(sides, (tuple, list)) and len(sides) in axes and all(map(_is_count, sides))
    if not fine or (even and any(side % 2 for side in sides)):
        raise CamError(f"{kind}: sides={sides!r} must be {wanted}")
    return spec


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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


_TOKEN_FIELDS: dict[str, SearchStrategy[Any]] = {
    "sides": st.tuples(st.sampled_from([4, 6]), st.sampled_from([2, 4, 6])),
    "pool": st.sampled_from(["mean", "class"]),
    "colors": st.integers(1, 3),
    "heads": st.integers(1, 2),
    "depth": st.integers(1, 2),
    "classes": st.integers(2, 4),
    "seed": st.integers(0, 9999),
}


def models(**fields: Any) -> SearchStrategy[TinyNet]:
    """Convolutional networks of every `Spec`.

    Fields can be fixed, or given a strategy: `models(block="residual", classes=st.integers(2, 9))`.
    """
    return st.builds(Spec, **{**_FIELDS, **_strategies(fields, _FIELDS)}).map(TinyNet)


def transformers(**fields: Any) -> SearchStrategy[TinyViT]:
    """Vision transformers of every `TokenSpec`. Fields are fixed or drawn as in `models`."""
    return st.builds(TokenSpec, **{**_TOKEN_FIELDS, **_strategies(fields, _TOKEN_FIELDS)}).map(TinyViT)


def _strategies(fields: dict[str, Any], known: dict[str, Any]) -> dict[str, SearchStrategy[Any]]:
    for name in fields:
        if name not in known:
            raise CamError(f"no field named {name!r}{suggested(name, known)}; all: {', '.join(known)}")
    return {name: value if isinstance(value, SearchStrategy) else st.just(value) for name, value in fields.items()}


def inputs_of(model: Drawn, n: int | SearchStrategy[int] = st.integers(1, 3)) -> SearchStrategy[Tensor]:
    """Input batches `(n, colors, *sides)` of normal random numbers."""

    def make(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, model.spec.colors, *model.spec.sides, generator=generator, dtype=torch.float64)

    # Disjoint from the models' seeds: an input with a kernel's numbers gives a symmetric activation, which may be flat.
    return st.builds(make, st.just(n) if isinstance(n, int) else n, st.integers(10_000, 19_999))


def layers_of(model: Drawn, *, linear_head: bool = False, varied: bool = False) -> SearchStrategy[str]:
    """Names of layers with spatial axes.

    - `linear_head`: only the layers whose channels the last linear layer reads.
    - `varied`: only layers with a channel that is not flat, for any input, if the grid has more than one position. This
      excludes the ReLU, whose output may be zero.
    """
    names = model.layers[-2:] if linear_head else model.layers
    return st.sampled_from([name for name in names if not (varied and name == "act")])


def targets_of(model: Drawn, n: int, *, plain: bool = False) -> SearchStrategy[Target]:
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
    others = st.integers(1, max(count - 1, 1))
    contrasts = scaled if count == 1 else st.builds(lambda c, k: targets.contrast(c, top=k), some, others)
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
    draw: st.DrawFn,
    method: str | Callable[..., Maps] | None = None,
    *,
    recipe: str | Recipe = "torchcam",
    varied: bool = False,
    **fields: Any,
) -> Case:
    """Arguments (model, layer, x, target) of a convolutional network for a method with this recipe.

    - `method`: a name in `camfn.METHODS`, or a method. `None` gives arguments that every method accepts, except those that
      need attention.
    - `varied`: in every image, some channel of the layer is not flat.
    - `fields`: fields of `Spec`, as in `models`.
    """
    needs = frozenset((Need.LINEAR_HEAD,)) if method is None else method_of(method).needs
    if Need.ATTENTION in needs:
        raise CamError("the method needs attention, and these networks have none: use camfn.testing.token_cases")
    linear_head = Need.LINEAR_HEAD in needs
    knobs = recipe_of(recipe)
    varied = varied or knobs.flat == "skip"  # a recipe that skips flat channels needs one that is not
    if linear_head or Need.ANY_SIZE in needs:
        fields = {"pooled": True, **fields}  # else the model takes inputs of one size only
    if varied:
        fields = {"sides": st.lists(st.integers(3, 6), min_size=1, max_size=3).map(tuple), **fields}
    model = draw(models(**fields))
    x = draw(inputs_of(model))
    layer = draw(layers_of(model, linear_head=linear_head, varied=varied))
    target = draw(targets_of(model, len(x), plain=linear_head or knobs.score == "probability"))
    return Case(model, layer, x, target)


@st.composite
def token_cases(draw: st.DrawFn, **fields: Any) -> Case:
    """Arguments (model, layer, x, target) of a vision transformer. Fields are those of `TokenSpec`, as in `transformers`.

    No method that needs inputs of any size, or a linear head after a pooled layer, accepts them.
    """
    model = draw(transformers(**fields))
    x = draw(inputs_of(model))
    return Case(model, draw(layers_of(model)), x, draw(targets_of(model, len(x))))


# ------------------------------------------------------------------------------------------- tensors without a network


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_SEEDS = st.integers(0, 9999)
_SCALES = st.sampled_from([1.0, 1e-6, 1e6])
_SIDES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def activations(
    draw: st.DrawFn,
    n: SearchStrategy[int] = st.integers(1, 3),
    channels: SearchStrategy[int] = st.integers(1, 5),
    positions: SearchStrategy[int] = st.integers(1, 9),
) -> Activations:
    """Activations `(n, c, p)`: of both signs or rectified, with flat channels and channels of zeros, of several scales."""
    values = _normal((draw(n), draw(channels), draw(positions)), draw(_SEEDS))
    kinds = draw(st.lists(st.sampled_from(["normal", "flat", "zero"]), min_size=values.shape[1], max_size=values.shape[1]))
    for k, kind in enumerate(kinds):
        values[:, k] = {"normal": values[:, k], "flat": values[:, k, :1].expand_as(values[:, k]), "zero": 0}[kind]
    return draw(_SCALES) * (values.relu() if draw(st.booleans()) else values)


@st.composite
def gradients(
    draw: st.DrawFn, like: Activations, count: SearchStrategy[int] = st.integers(1, 3), *, pooled: bool | None = None
) -> Gradients:
    """Gradients `(n, t, c, p)` of `count` targets at an activation `(n, c, p)`.

    - `pooled`: whether they are equal at all positions, as behind global average pooling. `None` draws it.
    """
    n, c, p = like.shape
    same = draw(st.booleans()) if pooled is None else pooled
    found = _normal((n, draw(count), c, 1 if same else p), draw(_SEEDS))
    return draw(_SCALES) * found.expand(-1, -1, -1, p).clone()


@st.composite
def maps(draw: st.DrawFn, grid: SearchStrategy[tuple[int, ...]] = _SIDES, n: SearchStrategy[int] = st.integers(1, 3)) -> Tensor:
    """Maps `(n, *grid)`: signed, rectified or in [0, 1], with ties, and flat ones among them."""
    found = _normal((draw(n), *draw(grid)), draw(_SEEDS))
    kind = draw(st.sampled_from(["signed", "rectified", "unit", "ties", "flat", "zero"]))
    if kind == "unit":
        low, high = (edge(found.flatten(1), 1).reshape(-1, *[1] * (found.ndim - 1)) for edge in (torch.amin, torch.amax))
        return torch.where(high > low, (found - low) / torch.where(high > low, high - low, 1), 0)
    flat = found.flatten(1)[:, :1].reshape(-1, *[1] * (found.ndim - 1)).expand_as(found).clone()
    return {"signed": found, "rectified": found.relu(), "ties": found.round(), "flat": flat, "zero": 0 * found}[kind]


@st.composite
def outputs(
    draw: st.DrawFn, n: SearchStrategy[int] = st.integers(1, 3), classes: SearchStrategy[int] = st.integers(1, 5)
) -> Any:
    """Outputs of a classifier, with logits `(n, classes)`: a tensor, or a tensor in what models wrap it in.

    Some logits are equal, and some are large. `camfn.targets` reads all of these.
    """
    logits = draw(st.sampled_from([1.0, 100.0])) * _normal((draw(n), draw(classes)), draw(_SEEDS))
    logits = logits.round() if draw(st.booleans()) else logits
    wrap = draw(st.sampled_from(["tensor", "tuple", "logits", "out"]))
    wrapped = {"tensor": logits, "tuple": (logits, logits.mean(1)), "logits": {"aux": 2 * logits, "logits": logits}}
    return {**wrapped, "out": {"out": logits, "aux": 2 * logits}}[wrap]
