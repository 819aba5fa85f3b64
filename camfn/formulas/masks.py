"""Masks and masked inputs. Most functions take one channel of one image; `vmap` maps them over the rows of a sweep."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from camfn._errors import CamError, suggested
from camfn._types import Activations, wide
from camfn.formulas.resampling import resize
from camfn.formulas.scaling import is_flat, percentile

_AT_ONCE = 64  # masks at the input's size


Noise = Literal["mask", "activation", "input"]


class Recipe(NamedTuple):
    """The choices of Score-CAM that differ between papers and libraries. `camfn.RECIPES` holds the named ones."""

    masks: Literal["normalize_first", "upsample_first"] = "normalize_first"  # the order of min-max and upsampling
    align_corners: bool = False  # of the upsampling
    eps: float = 1e-8  # added to the denominator of the min-max normalization
    score: Literal["logit", "probability"] = "logit"  # the meaning of an integer target
    weights: Literal["softmax", "score"] = "softmax"
    flat: Literal["zero", "skip"] = "zero"  # a flat channel has a mask of zeros, or is left out


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
    """Look up a recipe by name, or validate a `Recipe`."""
    if isinstance(recipe, Recipe):
        for name, choices in _CHOICES.items():
            if getattr(recipe, name) not in choices:
                known = " or ".join(f'"{choice}"' for choice in choices)
                raise CamError(f"a recipe's {name} must be {known}, found {getattr(recipe, name)!r}")
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise CamError(f"recipe {recipe!r} is not known{suggested(str(recipe), RECIPES)}; all: {', '.join(RECIPES)}")
    return RECIPES[recipe]


MaskForm = Literal["recipe", "given", "tanh", "shifted"]


class Variation(NamedTuple):
    """A recipe for masks, with the number of draws of each mask and the differences between the draws."""

    scales: tuple[float, ...] = (1.0,)  # one factor of the masked input for each draw
    noise: Noise | None = None  # where the noise of each draw is added
    std: float = 0.0  # of the noise
    seed: int | torch.Generator = 0
    recipe: Recipe = Recipe()
    form: MaskForm = "recipe"  # the recipe's min-max mask; or the channel as given, its tanh, or a shifted window of it
    shifts: Tensor | None = None  # (c, axes), on the CPU: where each window begins
    under: Tensor | None = None  # (n, k, *size): the image that shows where the mask is 0

    @property
    def zeros_are_equal(self) -> bool:
        """Whether all draws of a mask of zeros give the same masked input. Noise on the mask makes them differ."""
        return self.noise in (None, "input")

    def blank(self, channels: Tensor) -> Tensor:
        """Mark the channels of `(n, c, p)` that have a mask of zeros: bools `(n, c)`."""
        return flat_channels(channels) if self.form == "recipe" else (channels == 0).all(-1)


def is_cam(num_samples: int, path: str) -> tuple[float, ...]:
    """IS-CAM's factors of the masked input, for i = 1..N with N `num_samples` (Naidu et al., 2020).

    `path="cumulative"` is the authors' and torchcam's code: `c_i = sum_{j<=i} j/N`. `path="linear"` is `c_i = i/N`.

    >>> is_cam(4, "linear"), is_cam(4, "cumulative")
    ((0.25, 0.5, 0.75, 1.0), (0.25, 0.75, 1.5, 2.5))
    """
    steps = range(1, num_samples + 1)
    if path == "cumulative":
        return tuple(i * (i + 1) / (2 * num_samples) for i in steps)
    if path == "linear":
        return tuple(i / num_samples for i in steps)
    raise CamError(f'path must be "cumulative" or "linear", found {path!r}')


class Rule(NamedTuple):
    """The part of the masking that all rows of a sweep share."""

    size: tuple[int, ...]  # the spatial size of the input
    dtype: torch.dtype  # of the activation: "flat up to rounding" is relative to it
    recipe: Recipe = Recipe()
    noise: Noise | None = None
    form: MaskForm = "recipe"
    under: Tensor | None = None  # (n, k, *size): the image that shows where the mask is 0; None for zeros

    def static(self) -> tuple[Any, ...]:
        """Return the fields without the values of `under`, which differ from call to call: a key for compiled kernels."""
        return *self[:-1], self.under is None


def min_max(values: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Min-max normalization of one channel: `(A - min A) / (max A - min A + eps)`; zeros for a flat channel."""
    low, high = values.amin(), values.amax()
    flat = is_flat(low, high, dtype)
    return torch.where(flat, 0, (values - low) / torch.where(flat, 1, high - low + eps))


def mask_of(rule: Rule, channel: Tensor, noise: Any) -> Tensor:
    """The mask of one channel `(*grid)`, at the input's size. `noise` is the draw's noise, or the shift of its window."""
    if rule.form == "shifted":
        return window(channel, noise, rule.size)
    if rule.form == "tanh":
        return torch.tanh(resize(channel, rule.size))
    if rule.form == "given":
        return resize(channel, rule.size)
    if rule.noise in ("mask", "activation"):
        return ss_cam(rule, channel, noise)
    return score_cam(rule, channel)


def score_cam(rule: Rule, channel: Tensor) -> Tensor:
    """Score-CAM's mask: `M = U(norm(A))`, or `norm(U(A))` if the recipe upsamples first (Wang et al., 2020)."""
    recipe = rule.recipe
    if recipe.masks == "normalize_first":
        return resize(min_max(channel, recipe.eps, rule.dtype), rule.size, align_corners=recipe.align_corners)
    return min_max(resize(channel, rule.size, align_corners=recipe.align_corners), recipe.eps, rule.dtype)


def ss_cam(rule: Rule, channel: Tensor, noise: Tensor) -> Tensor:
    """SS-CAM's mask: `M + e`, or `norm(U(A) + e)` for noise on the activation (Wang et al., 2020, arXiv 2006.14255).

    Noise on the activation is added before the min-max normalization, in every recipe. For noise on the input the mask is
    Score-CAM's, and `with_input_noise` adds the noise.
    """
    if rule.noise == "activation":
        upsampled = resize(channel, rule.size, align_corners=rule.recipe.align_corners)
        return min_max(upsampled + noise, rule.recipe.eps, rule.dtype)
    return score_cam(rule, channel) + noise


def window(cells: Tensor, shift: Tensor, size: Sequence[int]) -> Tensor:
    """RISE's mask: random cells `(*s)`, upsampled to one cell more than `size` and cropped to `size` at `shift (axes,)`."""
    breadths = [math.ceil(side / count) for side, count in zip(size, cells.shape)]
    # Departure from the authors' code: beyond the border the outermost cell is repeated; their scikit-image mirrors.
    stretched = resize(cells, [(count + 1) * breadth for count, breadth in zip(cells.shape, breadths)])
    for axis, side in enumerate(size):
        stretched = stretched.index_select(axis, shift[axis] + torch.arange(side, device=cells.device))
    return stretched


def masked_input(rule: Rule, image: Tensor, under: Tensor | None, channel: Tensor, scale: Tensor, noise: Any) -> Tensor:
    """The masked input of one image `(k, *size)`, by one channel of its activation `(*grid)`: `scale * image * mask`.

    With an `under` image: `image * mask + under * (1 - mask)`.
    """
    mask = mask_of(rule, channel, noise).to(image.dtype)
    scale = scale.to(image.dtype)
    if under is not None:
        return image * mask + under * (1 - mask)
    if rule.noise != "input":
        return image * (mask * scale)  # this order is cheaper: a mask has fewer values than an image
    return with_input_noise(image * mask, noise) * scale


def with_input_noise(masked: Tensor, noise: Tensor) -> Tensor:
    """SS-CAM's noise on the input: `x * M + e / (max(x * M) - min(x * M))`.

    The authors' code has the square, `(std / (max - min))^2`, as the standard deviation; this is the paper's.
    """
    span = masked.amax() - masked.amin()
    flat = is_flat(masked.amin(), masked.amax(), masked.dtype)
    # Cast before the division: a float64 span is a scalar tensor, which would not promote float32 noise.
    return masked + torch.where(flat, 0, noise.to(masked.dtype) / torch.where(flat, 1, span))


def flat_channels(channels: Tensor) -> Tensor:
    """Mark the channels of `(n, c, p)` that are constant up to rounding: bools `(n, c)`."""
    return is_flat(channels.amin(-1), channels.amax(-1), channels.dtype)


# ------------------------------------------------------------------------------ masks of other methods, on the layer's grid


def group_cam(levels: Tensor, grid: Sequence[int], size: Sequence[int], percent: float | None, dtype: torch.dtype) -> Tensor:
    """Group-CAM's masks `(n, t, g, p)` from each group's positive sum `levels (n, t, g, p)` (Zhang et al., 2021).

    `M_g = norm(U(L_g))`, before the upsampling. Upsampling is linear, so the sum is scaled on the grid by the minimum and
    maximum of the upsampled sum; upsampled, the mask is then in [0, 1]. Values up to the percentile `percent` become 0 first.
    Sums that are flat up to the rounding of `dtype`, the activation's, give zeros.
    """
    if percent is not None:
        levels = torch.where(levels > percentile(levels, percent), levels, 0)
    pieces = levels.flatten(0, 2).unflatten(-1, tuple(grid)).split(_AT_ONCE)
    upsampled = (resize(some, size).flatten(1) for some in pieces)
    extremes = torch.cat([torch.stack([each.amin(-1), each.amax(-1)], -1) for each in upsampled])
    low, high = extremes.reshape(*levels.shape[:3], 2).split(1, -1)
    flat = is_flat(low, high, dtype)
    return torch.where(flat, 0, (levels - low) / torch.where(flat, 1, high - low))


def poly_cam(values: Activations, flat: Tensor, variant: str, percent: float) -> Activations:
    """Poly-CAM's masks `M_k`, and their complements `1 - M_k`, on the layer's grid (Englebert et al., 2022).

    `M_k` is 0 at the percentile `percent` of its channel, 1 at `100 - percent`, and linear in between. `variant="+"` returns
    the masks, `"-"` the complements, `"+-"` both, one after the other. A flat channel has zeros for both.
    """
    values = values.to(wide(values.dtype))
    low, high = percentile(values, percent), percentile(values, 100 - percent)
    # Departure from the authors, who divide by `high` alone. If nearly all values of a channel are equal, the percentiles
    # coincide: the mask is then 1 at the values above them.
    steep = is_flat(low, high, values.dtype)
    levels = torch.where(steep, (values > high).to(values.dtype), (values - low) / torch.where(steep, 1, high - low))
    kept = torch.where(flat[..., None], 0, levels.clamp(0, 1))
    # The complement may be taken before the upsampling, which is linear with weights that sum to one.
    left = torch.where(flat[..., None], 0, 1 - kept)
    return torch.cat({"+": [kept], "-": [left], "+-": [kept, left]}[variant], 1)


def recipro_cam(grid: Sequence[int], numbers: Tensor, steps: Tensor) -> Tensor:
    """Recipro-CAM's masks `(r, p)` around the positions `numbers (r,)` of the flattened grid (Byun and Lee, 2024).

    `steps` are the weights at distance 0, 1, ... along an axis; the last one holds beyond. `(1, 0)` keeps one position,
    `(1/2, 1/4, 0)` is a Gaussian window, cut off at the border. The mask is the product over the axes.
    """
    axes = [torch.arange(side, device=numbers.device) for side in grid]
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
    away = (places[:, None] - places.index_select(1, numbers)[..., None]).abs()
    return steps[away.clamp(max=len(steps) - 1)].prod(0)


def opti_cam(level: Tensor, grid: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Opti-CAM's mask `norm(U(L))` from one map `L (p,)` (Zhang et al., 2023). `dtype` is the activation's."""
    return min_max(resize(level.unflatten(0, tuple(grid)), size), 0.0, dtype)
