"""Metrics of confidence: how the score changes when the input is multiplied by its map.

They reward wide maps: a map of ones leaves the input as it is, drops nothing, and is perfectly coherent. They are circular for
methods that look for a mask with a high score (`CIRCULAR`). Report them with their values for controls.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError
from camfn.formulas.resampling import resize_with_ties
from camfn.metrics.faithfulness import correlation
from camfn.metrics.imputation import road
from camfn.metrics.scoring import Scores, by_target, clean_of, like, scored

Explain: TypeAlias = Callable[[Tensor], Tensor]
"""A function from inputs `(n, channels, *size)` to their maps, for the classes of the original inputs."""


def average_drop(maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"], score: Scores) -> Float[Tensor, "n ..."]:
    """Average drop: the share of the score that is lost when the input is multiplied by its map.

        max(0, s(x) - s(x * L)) / s(x)

    From 0 to 1; lower is better. The mean over inputs, in percent, is the published number. A map of ones drops 0.

    **Arguments**

    - `maps`: `(n, *grid)`, or `(n, t, *grid)`, from 0 to 1, resized to x (multilinear). They are taken as they are: min-max
      normalization, as `normalize=True` does, is for the method to apply.
    - `x`: the inputs `(n, channels, *size)`.
    - `score`: from inputs `(k * n, ...)` to scores `(k * n, t)`, which must be probabilities: give `score_function` the target
      `camfn.targets.probability()`.

    **Returns** `(n,)`, or `(n, t)`. A score of 0 drops 0. A score that is NaN makes the value of its map NaN.

    **Raises** `CamError` if the shapes do not fit, if a map is not finite, if x is not floating-point, or if maps or scores
    are not from 0 to 1.

    >>> import torch
    >>> x = torch.tensor([[[0.5, 0.5]]])
    >>> half = lambda inputs: inputs.sum(2) / 2
    >>> average_drop(torch.tensor([[1.0, 0.5]]), x, half), average_drop(torch.ones(1, 2), x, half)
    (tensor([0.2500]), tensor([0.]))

    Chattopadhyay et al., Grad-CAM++, WACV 2018 (arXiv 1710.11063), section 4.1.
    """
    before, after = _scores(maps, x, score)
    return like((before - after).clamp(min=0) / torch.where(before > 0, before, 1), maps, x)


def increase_in_confidence(
    maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"], score: Scores
) -> Float[Tensor, "n ..."]:
    """Increase in confidence: 1 if the score is higher when the input is multiplied by its map, else 0.

        1[s(x * L) > s(x)]

    Higher is better. The mean over inputs, in percent, is the published number. A map of ones has 0.

    The arguments, the returned values and the errors are those of `average_drop`.

    >>> import torch
    >>> x = torch.tensor([[[0.5, 0.5]]])
    >>> increase_in_confidence(torch.tensor([[1.0, 0.0]]), x, lambda inputs: inputs[..., 0] * (1 - inputs[..., 1]))
    tensor([1.])

    Chattopadhyay et al., Grad-CAM++, WACV 2018 (arXiv 1710.11063), section 4.1.
    """
    before, after = _scores(maps, x, score)
    increased = torch.where((before + after).isnan(), torch.nan, (after > before).to(before.dtype))
    return like(increased, maps, x)


def average_gain(maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"], score: Scores) -> Float[Tensor, "n ..."]:
    """Average gain: the share of the missing probability that is gained when the input is multiplied by its map.

        max(0, s(x * L) - s(x)) / (1 - s(x))

    From 0 to 1; higher is better. A score of 1 gains 0.

    The arguments, the returned values and the errors are those of `average_drop`.

    >>> import torch
    >>> x = torch.tensor([[[0.5, 0.5]]])
    >>> average_gain(torch.tensor([[1.0, 0.0]]), x, lambda inputs: inputs[..., 0] * (1 - inputs[..., 1]))
    tensor([0.3333])

    Zhang et al., Opti-CAM: Optimizing saliency maps for interpretability, 2023 (arXiv 2301.07002), section 4.
    """
    before, after = _scores(maps, x, score)
    return like((after - before).clamp(min=0) / torch.where(before < 1, 1 - before, 1), maps, x)


def l1_complexity(maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n ..."]:
    """Complexity as ADCC has it: the mean of the map, which is its L1 norm divided by the number of its pixels.

    From 0 to 1; lower is better. The maps are resized to x first, as in `average_drop`, whose errors it has.

    >>> import torch
    >>> l1_complexity(torch.tensor([[1.0, 0.5]]), torch.zeros(1, 1, 2))
    tensor([0.7500])

    Poppi et al., Revisiting The Evaluation of Class Activation Mapping for Explainability, CVPR workshops 2021
    (arXiv 2104.10252).
    """
    return like(_masks(maps, x).flatten(2).mean(-1), maps, x)


def coherency(maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"], explain: Explain) -> Float[Tensor, "n ..."]:
    """Coherency: the correlation of the map with that of the input multiplied by it.

        (corr(L(x), L(x * L(x))) + 1) / 2

    From 0 to 1; higher is better.

    **Arguments**

    - `maps`, `x`: as for `average_drop`.
    - `explain`: a function from inputs `(n, channels, *size)` to maps of the same shape as `maps`, made by the same method for
      the same classes: those of the original inputs. It is called once for each target, with each input multiplied by its map.

    **Returns** `(n,)`, or `(n, t)`. If one of both maps is flat, they do not correlate, and the value is 0.5.

    **Raises** `CamError` as `average_drop` does.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 1.0, 2.0]]])
    >>> coherency(x[:, 0] / 3, x, lambda inputs: inputs[:, 0]) > 0.98
    tensor([True])

    Poppi et al., Revisiting The Evaluation of Class Activation Mapping for Explainability, CVPR workshops 2021
    (arXiv 2104.10252).
    """
    masks = _masks(maps, x)
    again = []
    for target in range(masks.shape[1]):
        found = explain(x * masks[:, target, None].to(x.dtype)).detach()
        if found.shape != maps.shape:
            raise CamError(
                f"explain gives maps of shape {tuple(found.shape)}, and maps have shape {tuple(maps.shape)}: "
                "the same method must make both"
            )
        again.append(by_target(found, x)[:, target])
    # The correlation is that of the maps on their own grid: resizing would weigh its cells by their place.
    return like((correlation(by_target(maps, x).flatten(2), torch.stack(again, 1).flatten(2)) + 1) / 2, maps, x)


class Parts(NamedTuple):
    """Values from 0 to 1 for each map, of which a harmonic mean is made. Higher is better for each."""

    values: tuple[Tensor, ...]

    def mean(self, *, means_first: bool = False) -> Tensor:
        """The harmonic mean for each map, or with `means_first` that of the parts' means over the inputs."""
        parts = torch.stack([value.mean(0) if means_first else value for value in self.values])
        least = parts.amin(0)
        return torch.where(least <= 0, 0, len(parts) / (1 / torch.where(parts <= 0, 1, parts)).sum(0))  # NaN stays NaN


def adcc(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    explain: Explain,
    *,
    means_first: bool = False,
) -> Float[Tensor, "n ..."]:
    """ADCC: the harmonic mean of coherency, 1 - complexity and 1 - average drop.

        3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))

    From 0 to 1; higher is better. A map of ones has 0, since its complexity is 1.

    **Arguments**

    - `maps`, `x`, `score`: as for `average_drop`.
    - `explain`: as for `coherency`.
    - `means_first`: the harmonic mean of the three means over the inputs, one number, as in the published tables. If `False`,
      each input has its own. For inputs in several batches, gather `adcc_parts` of each.

    **Returns** `(n,)`, or `(n, t)`; with `means_first`, `()` or `(t,)`. It is 0 where a part is 0.

    **Raises** `CamError` as `average_drop` does.

    >>> import torch
    >>> x = torch.tensor([[[0.9, 0.3, 0.6]]])
    >>> adcc(x[:, 0], x, lambda inputs: inputs.sum(2) / 3, lambda inputs: inputs[:, 0])
    tensor([0.6...])

    Poppi et al., Revisiting The Evaluation of Class Activation Mapping for Explainability, CVPR workshops 2021
    (arXiv 2104.10252).
    """
    return adcc_parts(maps, x, score, explain).mean(means_first=means_first)


def adcc_parts(maps: Float[Tensor, "n ..."], x: Float[Tensor, "n c *size"], score: Scores, explain: Explain) -> Parts:
    """The parts of ADCC: coherency, 1 - complexity, 1 - average drop. The arguments are those of `adcc`."""
    return Parts((coherency(maps, x, explain), 1 - l1_complexity(maps, x), 1 - average_drop(maps, x, score)))


def arcc(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    explain: Explain,
    *,
    means_first: bool = False,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    noise: float = 0.01,
    seed: int = 0,
) -> Float[Tensor, "n ..."]:
    """ARCC: the harmonic mean of coherency, 1 - complexity and ROAD.

        3 / (1 / coherency + 1 / (1 - complexity) + 1 / clip(2 road, 0, 1))

    From 0 to 1; higher is better. ROAD is that of both orders (`road`), of probabilities.

    **Arguments**: those of `adcc`, and `percentiles`, `noise` and `seed` of `road`.

    **Returns** and **raises** as `adcc` does. It is 0 where a part is 0.

    >>> import torch
    >>> x = torch.tensor([[[0.9, 0.1, 0.2, 0.1, 0.2, 0.1]]])
    >>> bool(arcc(x[:, 0], x, lambda inputs: inputs[..., 0], lambda inputs: inputs[:, 0]) > 0.5)
    True

    arXiv 2605.14641; the percentiles are those of its implementation in pytorch-grad-cam.
    """
    return arcc_parts(maps, x, score, explain, percentiles=percentiles, noise=noise, seed=seed).mean(means_first=means_first)


def arcc_parts(
    maps: Float[Tensor, "n ..."],
    x: Float[Tensor, "n c *size"],
    score: Scores,
    explain: Explain,
    *,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    noise: float = 0.01,
    seed: int = 0,
) -> Parts:
    """The parts of ARCC: coherency, 1 - complexity, and twice ROAD, clipped. The arguments are those of `arcc`."""
    removed = road(maps, x, score, percentiles=percentiles, noise=noise, seed=seed)
    return Parts((coherency(maps, x, explain), 1 - l1_complexity(maps, x), (2 * removed).clamp(0, 1)))


def _masks(maps: Tensor, x: Tensor) -> Tensor:
    """Maps as masks at the size of x, `(n, t, *size)`. Maps of ones stay ones."""
    given = by_target(maps, x)
    slack = 16 * torch.finfo(maps.dtype if maps.is_floating_point() else given.dtype).eps
    if bool((given < -slack).any()) or bool((given > 1 + slack).any()):
        raise CamError(
            f"maps have values from {float(given.min()):.3g} to {float(given.max()):.3g}: the input is multiplied by them, and "
            "they must lie in [0, 1], as those of a method with normalize=True"
        )
    return resize_with_ties(given, x.shape[2:])  # in which ones stay ones


def _scores(maps: Tensor, x: Tensor, score: Scores) -> tuple[Tensor, Tensor]:
    """The scores `(n, t)` of the inputs, and of the inputs multiplied by their maps."""
    masks = _masks(maps, x)
    t = masks.shape[1]
    before = clean_of(score, x, t)
    after = scored(score, 1, lambda numbers: (x[:, None] * masks[:, :, None].to(x.dtype))[None], x, t)[..., 0]
    for found in (before, after):
        if bool((found < 0).any()) or bool((found > 1 + 1e-5).any()):
            raise CamError(
                f"scores go from {float(found.min()):.3g} to {float(found.max()):.3g}: this metric wants probabilities; give "
                "score_function the target camfn.targets.probability()"
            )
    return before, after
