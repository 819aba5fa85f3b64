"""Masks, and masked inputs. A function takes one channel of one image; `vmap` maps it over the rows of a sweep."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from camfn._errors import CamError, closest
from camfn._types import Activations, wide
from camfn.formulas.resampling import resize
from camfn.formulas.scaling import is_flat, percentile

_AT_ONCE = 64  # masks at the input's size


Noise = Literal["mask", "activation", "input"]


class Recipe(NamedTuple):
    """The choices of Score-CAM in which papers and libraries differ. See `camfn.RECIPES`."""

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


MaskForm = Literal["recipe", "given", "tanh", "shifted"]


class Variation(NamedTuple):
    """How masks are made, how often each is scored, and what differs between the times."""

    scales: tuple[float, ...] = (1.0,)  # the masked input is multiplied by them, in turn
    noise: Noise | None = None
    std: float = 0.0
    seed: int | torch.Generator = 0
    recipe: Recipe = Recipe()
    form: MaskForm = "recipe"  # min-max as the recipe has it; or, upsampled, what is given; or its tanh; or a window of it
    shifts: Tensor | None = None  # (c, axes), on the CPU: where the windows begin
    under: Tensor | None = None  # (n, k, *size): what shows where the mask does not

    @property
    def zeros_are_equal(self) -> bool:
        """Is a masked input of zeros the same at all times? Noise on the mask makes each its own."""
        return self.noise in (None, "input")

    def blank(self, channels: Tensor) -> Tensor:
        """Which channels of `(n, c, p)` have masks of zeros: `(n, c)`."""
        return flat_channels(channels) if self.form == "recipe" else (channels == 0).all(-1)


def is_cam(num_samples: int, path: str) -> tuple[float, ...]:
    """IS-CAM's coefficients of the masked input, for i = 1..N, N being `num_samples` (Naidu et al., 2020).

    `path="cumulative"`: `c_i = sum_{j<=i} j/N`, as the authors and torchcam have it. `path="linear"`: `c_i = i/N`.

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
    """How to make the masked input of a row: what all rows share."""

    size: tuple[int, ...]
    dtype: torch.dtype  # of the activation: what "flat up to rounding" is relative to
    recipe: Recipe = Recipe()
    noise: Noise | None = None
    form: MaskForm = "recipe"
    under: Tensor | None = None  # (n, k, *size): what is seen where the mask is not; nothing, where it is None

    def static(self) -> tuple[Any, ...]:
        """All but the values, which differ from call to call."""
        return *self[:-1], self.under is None


def min_max(values: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Min-max of one channel, `(A - min A) / (max A - min A + eps)`; zeros where it is flat."""
    low, high = values.amin(), values.amax()
    flat = is_flat(low, high, dtype)
    return torch.where(flat, 0, (values - low) / torch.where(flat, 1, high - low + eps))


def mask_of(rule: Rule, channel: Tensor, noise: Any) -> Tensor:
    """The mask of one channel `(*grid)`, at the input's size. `noise` is the channel's sample, or the place of its window."""
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
    """Score-CAM's mask: `M = U(norm(A))`, or `norm(U(A))` where the recipe upsamples first (Wang et al., 2020)."""
    recipe = rule.recipe
    if recipe.masks == "normalize_first":
        return resize(min_max(channel, recipe.eps, rule.dtype), rule.size, align_corners=recipe.align_corners)
    return min_max(resize(channel, rule.size, align_corners=recipe.align_corners), recipe.eps, rule.dtype)


def ss_cam(rule: Rule, channel: Tensor, noise: Tensor) -> Tensor:
    """SS-CAM's mask: `M + e`, or `norm(U(A) + e)` for noise on the activation (Wang et al., 2020, arXiv 2006.14255).

    The noise on the activation is added before the min-max norm, whatever the recipe's order. With noise on the input the mask
    is Score-CAM's: see `with_input_noise`.
    """
    if rule.noise == "activation":
        upsampled = resize(channel, rule.size, align_corners=rule.recipe.align_corners)
        return min_max(upsampled + noise, rule.recipe.eps, rule.dtype)
    return score_cam(rule, channel) + noise


def window(cells: Tensor, shift: Tensor, size: Sequence[int]) -> Tensor:
    """RISE's mask: cells `(*s)`, stretched to cover one cell's breadth more than `size`, cut to `size` at `shift (axes,)`."""
    breadths = [math.ceil(side / count) for side, count in zip(size, cells.shape)]
    # At the border a cell goes on, where the authors' scikit-image mirrors.
    stretched = resize(cells, [(count + 1) * breadth for count, breadth in zip(cells.shape, breadths)])
    for axis, side in enumerate(size):
        stretched = stretched.index_select(axis, shift[axis] + torch.arange(side, device=cells.device))
    return stretched


def masked_input(rule: Rule, image: Tensor, under: Tensor | None, channel: Tensor, scale: Tensor, noise: Any) -> Tensor:
    """`scale * image * mask`, for one image `(k, *size)` and one channel of its activation `(*grid)`.

    With `under`, which shows where the mask does not: `image * mask + under * (1 - mask)`.
    """
    mask = mask_of(rule, channel, noise).to(image.dtype)
    scale = scale.to(image.dtype)
    if under is not None:
        return image * mask + under * (1 - mask)
    if rule.noise != "input":
        return image * (mask * scale)  # a mask has fewer values than an image
    return with_input_noise(image * mask, noise) * scale


def with_input_noise(masked: Tensor, noise: Tensor) -> Tensor:
    """SS-CAM's second form: `x * M + e / (max - min of x * M)`.

    The authors' code has `std / (max - min)` squared as the deviation; the paper has the deviation.
    """
    span = masked.amax() - masked.amin()
    flat = is_flat(masked.amin(), masked.amax(), masked.dtype)
    # To the image's dtype before the division: a float64 scalar does not make a float32 tensor wider.
    return masked + torch.where(flat, 0, noise.to(masked.dtype) / torch.where(flat, 1, span))


def flat_channels(channels: Tensor) -> Tensor:
    """Which channels of `(n, c, p)` are one value up to rounding: `(n, c)`."""
    return is_flat(channels.amin(-1), channels.amax(-1), channels.dtype)


# ------------------------------------------------------------------------------- masks of other methods, on the layer's grid


def group_cam(levels: Tensor, grid: Sequence[int], size: Sequence[int], percent: float | None, dtype: torch.dtype) -> Tensor:
    """Group-CAM's masks, of each group's positive sum `levels (n, t, g, p)` (Zhang et al., 2021).

    `M_g = norm(U(L_g))`, on the grid: upsampling is linear, so a sum that is scaled on the grid by the extremes of the
    upsampled one is upsampled to a mask from 0 to 1. `percent`: values up to this percentile become 0 before. `dtype` is the
    activation's, to whose rounding a sum may be flat.
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
    """Poly-CAM's masks `M_k` and what they leave, `1 - M_k`, on the grid (Englebert et al., 2022).

    `M_k` is 0 at the `percent` percentile of its channel and 1 at `100 - percent`, linear between. `variant="+"` has the masks,
    `"-"` what they leave, `"+-"` both. A flat channel has zeros for both: it masks nothing and leaves the input.
    """
    values = values.to(wide(values.dtype))
    low, high = percentile(values, percent), percentile(values, 100 - percent)
    # The authors divide by `high` alone. Hardly anything of a channel may be above its lowest value: then the mask is that.
    steep = is_flat(low, high, values.dtype)
    levels = torch.where(steep, (values > high).to(values.dtype), (values - low) / torch.where(steep, 1, high - low))
    kept = torch.where(flat[..., None], 0, levels.clamp(0, 1))
    # Upsampling is linear and its weights sum to one, so the complement can be taken on the grid.
    left = torch.where(flat[..., None], 0, 1 - kept)
    return torch.cat({"+": [kept], "-": [left], "+-": [kept, left]}[variant], 1)


def recipro_cam(grid: Sequence[int], numbers: Tensor, steps: Tensor) -> Tensor:
    """Recipro-CAM's masks `(r, p)` of the positions `numbers (r,)` (Byun and Lee, 2024).

    `steps` are the weights at distance 0, 1, ... along an axis, the last one beyond: `(1, 0)` leaves one position,
    `(1/2, 1/4, 0)` a Gaussian window, cut off at the border. Axes multiply.
    """
    axes = [torch.arange(side, device=numbers.device) for side in grid]
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
    away = (places[:, None] - places.index_select(1, numbers)[..., None]).abs()
    return steps[away.clamp(max=len(steps) - 1)].prod(0)


def opti_cam(level: Tensor, grid: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Opti-CAM's mask: `norm(U(L))`, of one map `(p,)` (Zhang et al., 2023). `dtype` is the activation's."""
    return min_max(resize(level.unflatten(0, tuple(grid)), size), 0.0, dtype)
