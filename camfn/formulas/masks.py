"""From an activation to masks, and from a mask to a masked input. One channel of one image; `vmap` makes the rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError, closest
from camfn.formulas.maps import is_flat, resize


class Recipe(NamedTuple):
    """Where the papers and the libraries differ about Score-CAM, as knobs. See `camfn.RECIPES`."""

    masks: Literal["normalize_first", "upsample_first"] = "normalize_first"
    align_corners: bool = False
    eps: float = 1e-8  # added to the range that a mask is divided by
    score: Literal["logit", "probability"] = "logit"  # what an integer target stands for
    weights: Literal["softmax", "score"] = "softmax"
    flat: Literal["zero", "skip"] = "zero"  # a flat channel has a mask of zeros, or no part


RECIPES = {
    "torchcam": Recipe(),
    "pytorch-grad-cam": Recipe("upsample_first", align_corners=True),
    "authors": Recipe("upsample_first", eps=0.0, score="probability", weights="score", flat="skip"),
    "paper": Recipe("upsample_first", eps=0.0),
}


_CHOICES = {
    "masks": ("normalize_first", "upsample_first"),
    "score": ("logit", "probability"),
    "weights": ("softmax", "score"),
    "flat": ("zero", "skip"),
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or itself."""
    if isinstance(recipe, Recipe):
        for name, choices in _CHOICES.items():
            if getattr(recipe, name) not in choices:
                known = " or ".join(f'"{choice}"' for choice in choices)
                raise CamError(f"a recipe's {name} must be {known}, found {getattr(recipe, name)!r}")
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise CamError(f"recipe {recipe!r} is not known; closest: {closest(str(recipe), RECIPES)}; all: {', '.join(RECIPES)}")
    return RECIPES[recipe]


Noise = Literal["mask", "activation", "input"]
Form = Literal["recipe", "given", "tanh", "shifted"]


class Variation(NamedTuple):
    """How masks are made, how often each is scored, and what differs between the times."""

    scales: tuple[float, ...] = (1.0,)  # the masked input is multiplied by them, in turn
    noise: Noise | None = None
    std: float = 0.0
    seed: int | torch.Generator = 0
    recipe: Recipe = Recipe()
    form: Form = "recipe"  # min-max as the recipe has it; or, upsampled, what is given; or its tanh; or a window of it
    shifts: Tensor | None = None  # (c, axes), on the CPU: where the windows begin

    @property
    def zeros_are_equal(self) -> bool:
        """Is a masked input of zeros the same at all times? Noise on the mask makes each its own."""
        return self.noise in (None, "input")

    def blank(self, channels: Tensor) -> Tensor:
        """Which channels of `(n, c, p)` have masks of zeros: `(n, c)`."""
        return flat_channels(channels) if self.form == "recipe" else (channels == 0).all(-1)


def path_scales(num_samples: int, path: str) -> tuple[float, ...]:
    """IS-CAM's coefficients: `"cumulative"` is `c_i = sum_{j<=i} j/N`, `"linear"` is `c_i = i/N`, for i = 1..N."""
    steps = range(1, num_samples + 1)
    if path == "cumulative":
        return tuple(i * (i + 1) / (2 * num_samples) for i in steps)
    if path == "linear":
        return tuple(i / num_samples for i in steps)
    raise CamError(f'path must be "cumulative" or "linear", found {path!r}')


class Rule(NamedTuple):
    """How a row's masked input is made: what all rows share."""

    size: tuple[int, ...]
    dtype: torch.dtype  # of the activation: what "flat up to rounding" is relative to
    recipe: Recipe = Recipe()
    noise: Noise | None = None
    form: Form = "recipe"
    under: Tensor | None = None  # (n, k, *size): what is seen where the mask is not; nothing, where it is None

    def static(self) -> tuple[Any, ...]:
        """All but the values, which differ from call to call."""
        return *self[:-1], self.under is None


def unit(values: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Min-max of one channel, `(A - min A) / (max A - min A + eps)`; zeros where it is flat."""
    low, high = values.amin(), values.amax()
    flat = is_flat(low, high, dtype)
    return torch.where(flat, 0, (values - low) / torch.where(flat, 1, high - low + eps))


def mask_of(rule: Rule, channel: Tensor, noise: Any) -> Tensor:
    """The mask of one channel `(*grid)` at the input's size. `noise` is what was drawn for it: of a window, where it begins."""
    recipe = rule.recipe
    if rule.form == "shifted":
        return window(channel, noise, rule.size)
    if rule.form != "recipe":
        return gate(rule.form, resize(channel, rule.size))
    if rule.noise == "activation":  # SS-CAM's first form: the noise goes on before the min-max, whatever the recipe's order
        return unit(resize(channel, rule.size, align_corners=recipe.align_corners) + noise, recipe.eps, rule.dtype)
    if recipe.masks == "normalize_first":
        mask = resize(unit(channel, recipe.eps, rule.dtype), rule.size, align_corners=recipe.align_corners)
    else:
        mask = unit(resize(channel, rule.size, align_corners=recipe.align_corners), recipe.eps, rule.dtype)
    return mask + noise if rule.noise == "mask" else mask


def gate(form: Form, values: Tensor) -> Tensor:
    """What an upsampled activation lets through: itself, or its tanh."""
    return torch.tanh(values) if form == "tanh" else values


def window(cells: Tensor, shift: Tensor, size: Sequence[int]) -> Tensor:
    """RISE's mask: cells `(*s)`, stretched to cover one cell's breadth more than `size`, cut to `size` at `shift (axes,)`."""
    breadths = [math.ceil(side / count) for side, count in zip(size, cells.shape)]
    # At the border a cell goes on, where the authors' scikit-image mirrors.
    stretched = resize(cells, [(count + 1) * breadth for count, breadth in zip(cells.shape, breadths)])
    for axis, side in enumerate(size):
        stretched = stretched.index_select(axis, shift[axis] + torch.arange(side, device=cells.device))
    return stretched


@_compat.eager
def random_cells(
    seed: int | torch.Generator, count: int, cells: int, size: Sequence[int], probability: float
) -> tuple[Tensor, Tensor]:
    """RISE's cells `(count, cells, ...)`, true with this probability, and the shifts `(count, axes)` of their windows.

    However many there are, the first are the same, on every device: they are drawn on the CPU, and are small.
    """
    with _compat.outside_transforms():
        generator, _ = _generator_for(seed, torch.device("cpu"))
        axes, number = len(size), cells ** len(size)
        drawn = torch.rand(count, number + axes, generator=generator, dtype=torch.float64, device="cpu")
        breadths = torch.tensor([math.ceil(side / cells) for side in size], dtype=torch.float64, device="cpu")
        return (drawn[:, :number] < probability).reshape(count, *(cells,) * axes), (drawn[:, number:] * breadths).long()


def masked_input(rule: Rule, image: Tensor, under: Tensor | None, channel: Tensor, scale: Tensor, noise: Any) -> Tensor:
    """`scale * image * mask`, for one image `(k, *size)` and one channel of its activation `(*grid)`.

    With what is seen under the mask, `image * mask + under * (1 - mask)`.
    """
    mask = mask_of(rule, channel, noise).to(image.dtype)
    scale = scale.to(image.dtype)
    if under is not None:
        return image * mask + under * (1 - mask)
    if rule.noise != "input":
        return image * (mask * scale)  # a mask has fewer values than an image
    masked = image * mask
    # SS-CAM's second form. The authors' code passes std/(max - min) squared as the deviation; the paper says deviation.
    span = masked.amax() - masked.amin()
    flat = is_flat(masked.amin(), masked.amax(), image.dtype)
    # To the image's dtype before the division: a float64 scalar does not make a float32 tensor wider.
    return (masked + torch.where(flat, 0, noise.to(image.dtype) / torch.where(flat, 1, span))) * scale


def flat_channels(channels: Tensor) -> Tensor:
    """Which channels of `(n, c, p)` are one value up to rounding: `(n, c)`."""
    return is_flat(channels.amin(-1), channels.amax(-1), channels.dtype)


def check_noise(method: str, num_samples: Any, std: Any, seed: Any) -> None:
    """A sentence about what is wrong with how a method draws."""
    check_samples(method, num_samples)
    if not (isinstance(std, (int, float)) and 0 <= std < math.inf):
        raise CamError(f"{method} needs a finite std >= 0, found {std!r}")
    if not isinstance(seed, (int, torch.Generator)):
        raise CamError(f"seed must be an int or a torch.Generator, found {seed!r}")


def check_samples(method: str, num_samples: Any) -> None:
    """How often it draws, or steps."""
    if not isinstance(num_samples, int) or num_samples < 1:
        raise CamError(f"{method} needs a whole num_samples >= 1, found {num_samples!r}")


def _generator_for(given: int | torch.Generator, device: torch.device) -> tuple[torch.Generator, int]:
    """A generator of our own on `device`, and a seed; the caller's generator is copied and does not advance."""
    generator = torch.Generator(device)
    if isinstance(given, int):
        return generator.manual_seed(given), given
    if given.device.type != device.type:
        return generator.manual_seed(given.initial_seed()), given.initial_seed()
    generator.set_state(given.get_state())
    return generator, 0 if device.type == "cpu" else int(torch.randint(1 << 62, (), generator=generator, device=device))


@_compat.eager
def uniform(seed: int | torch.Generator, count: int) -> Tensor:
    """So many numbers in [0, 1), on the CPU: the same for every device, and for all that `vmap` maps over."""
    with _compat.outside_transforms():
        generator, _ = _generator_for(seed, torch.device("cpu"))
        return torch.rand(count, generator=generator, device="cpu", dtype=torch.float64)


_EVERY = 256  # 5 kB each: who goes back draws up to so many pieces again


def noise_stream(
    variation: Variation, channels: int, shape: Sequence[int], device: torch.device
) -> Callable[[Tensor], Tensor | None]:
    """A function from `(b, 2)` pairs (draw, channel), at best in order, to their noise `(b, *shape)`, float32.

    A pair's noise depends on nothing but the seed and the pair. On the CPU that is one stream with the draws outermost, as
    torchcam draws it, so channels that are left out are drawn and dropped; elsewhere each pair has its own generator.
    """
    if (shifts := variation.shifts) is not None:
        return lambda pairs: shifts.index_select(0, pairs[:, 1]).to(device)
    if variation.noise is None:
        return lambda pairs: None
    on_cpu = device.type == "cpu"
    generator, seed = _generator_for(variation.seed, device)
    drawn, last = 0, torch.empty(0, device=device)
    marks = [generator.get_state()] if on_cpu else []  # of every `_EVERY`th piece: the way back, for who asks out of order

    def fresh() -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * variation.std

    def piece(draw: int, channel: int) -> Tensor:
        nonlocal drawn, last
        if not on_cpu:
            generator.manual_seed(((seed * 1_000_003 + draw) * 1_000_003 + channel) % (1 << 62))
            return fresh()
        wanted = draw * channels + channel
        if drawn > wanted + 1:
            drawn = wanted // _EVERY * _EVERY
            generator.set_state(marks[drawn // _EVERY])
        while drawn <= wanted:
            last = fresh()
            drawn += 1
            if drawn == len(marks) * _EVERY:
                marks.append(generator.get_state())
        return last

    @_compat.eager
    def take(pairs: Tensor) -> Tensor:
        with _compat.outside_transforms():  # vmap forbids drawing inside it; this noise is the same for all that it maps
            asked = [(draw, channel) for draw, channel in _compat.unwrapped(pairs).tolist()]
            made = {pair: piece(*pair) for pair in dict.fromkeys(asked)}
            return torch.stack([made[pair] for pair in asked])

    return take


def noises(draws: int, std: float, seed: int | torch.Generator, like: Tensor) -> Iterator[Tensor]:
    """Noise like one image `(k, *size)`, float32, one draw after the other."""
    take: Any = noise_stream(Variation((1.0,) * draws, "input", std, seed), 1, tuple(like.shape), like.device)
    return (take(torch.tensor([(draw, 0)], device="cpu"))[0] for draw in range(draws))
