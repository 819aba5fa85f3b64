"""Random numbers: noise, random masks, random weights. Each depends only on the seed and on its place (draw and channel).

A caller's `torch.Generator` is copied and does not advance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from camfn import _compat
from camfn._types import wide
from camfn.formulas.masks import Variation


def _generator_for(given: int | torch.Generator, device: torch.device) -> tuple[torch.Generator, int]:
    """Make a new generator on `device`, and a seed. The caller's generator is copied and does not advance."""
    generator = torch.Generator(device)
    if isinstance(given, int):
        return generator.manual_seed(given), given
    if given.device.type != device.type:
        return generator.manual_seed(given.initial_seed()), given.initial_seed()
    generator.set_state(given.get_state())
    return generator, 0 if device.type == "cpu" else int(torch.randint(1 << 62, (), generator=generator, device=device))


@_compat.eager
def uniform(seed: int | torch.Generator, count: int) -> Tensor:
    """Draw `count` float64 numbers in [0, 1) on the CPU: the same for all devices, and for all that `vmap` maps over."""
    with _compat.outside_transforms():
        generator, _ = _generator_for(seed, torch.device("cpu"))
        return torch.rand(count, generator=generator, device="cpu", dtype=torch.float64)


_EVERY = 256  # draws between two saved generator states of 5 kB each; going back redraws at most this many


def noise_stream(
    variation: Variation, channels: int, shape: Sequence[int], device: torch.device
) -> Callable[[Tensor], Tensor | None]:
    """Return a function from `(b, 2)` pairs (draw, channel) to their noise `(b, *shape)`, float32. Pairs in order are fastest.

    The noise of a pair depends only on the seed and the pair. On the CPU it is one stream with the draws outermost, as in
    torchcam; skipped channels are drawn and dropped. On other devices each pair has its own generator.
    """
    if (shifts := variation.shifts) is not None:
        return lambda pairs: shifts.index_select(0, pairs[:, 1]).to(device)
    if variation.noise is None:
        return lambda pairs: None
    on_cpu = device.type == "cpu"
    generator, seed = _generator_for(variation.seed, device)
    drawn, last = 0, torch.empty(0, device=device)
    marks = [generator.get_state()] if on_cpu else []  # the state at every `_EVERY`th piece, for requests out of order

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
        with _compat.outside_transforms():  # vmap forbids random numbers; this noise is the same for all of its rows
            asked = [(draw, channel) for draw, channel in _compat.unwrapped(pairs).tolist()]
            made = {pair: piece(*pair) for pair in dict.fromkeys(asked)}
            return torch.stack([made[pair] for pair in asked])

    return take


def noisy(image: Tensor, draws: int, seed: int | torch.Generator, deviation: Tensor) -> Iterator[Tensor]:
    """Iterate over draws of `image + deviation * e`, for images `(n, k, *size)` that share `e ~ N(0, 1)`, float32."""
    take: Any = noise_stream(Variation((1.0,) * draws, "input", 1.0, seed), 1, tuple(image.shape[1:]), image.device)
    drawn = (take(torch.tensor([(draw, 0)], device="cpu"))[0] for draw in range(draws))
    return (image + (deviation * noise).to(image.dtype) for noise in drawn)


Units = Literal["range", "input"]


def deviation(image: Tensor, std: float, units: Units) -> Tensor:
    """The standard deviation of each image's noise, `(n, 1, ...)`: `std` in units of the input, or as a share of its range.

    The range of an image is `max x - min x` over all of its values. A constant image gets no noise.

    Smilkov et al., SmoothGrad, 2017 (arXiv 1706.03825), section 3: the noise level is `sigma / (max x - min x)`.

    >>> image = torch.tensor([[[0.0, 1.0]], [[0.0, 255.0]]])
    >>> deviation(image, 0.2, "range").flatten().tolist(), deviation(image, 0.2, "input").flatten().tolist()
    ([0.20000000298023224, 51.0], [0.20000000298023224, 0.20000000298023224])
    """
    axes = tuple(range(1, image.ndim))
    low, high = (extreme(axes, keepdim=True).to(wide(image.dtype)) for extreme in (image.amin, image.amax))
    return std * (high - low if units == "range" else torch.ones_like(low))


@_compat.eager
def rise(seed: int | torch.Generator, count: int, cells: int, size: Sequence[int], probability: float) -> tuple[Tensor, Tensor]:
    """RISE's random cells `(count, cells, ...)`, true with `probability`, and the shifts `(count, axes)` of their windows.

    They are drawn on the CPU: equal for all devices, and the first masks do not depend on `count`.
    """
    with _compat.outside_transforms():
        generator, _ = _generator_for(seed, torch.device("cpu"))
        axes, number = len(size), cells ** len(size)
        drawn = torch.rand(count, number + axes, generator=generator, dtype=torch.float64, device="cpu")
        breadths = torch.tensor([math.ceil(side / cells) for side in size], dtype=torch.float64, device="cpu")
        return (drawn[:, :number] < probability).reshape(count, *(cells,) * axes), (drawn[:, number:] * breadths).long()
