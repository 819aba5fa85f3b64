"""The Gaussian process over channels that saves forward passes, and its constants. Tensors only, one image at a time, float64.

The unknown of a channel is its score (with a budget), or the rounding of its score (in low precision). Both have a process with
the same covariance:

    k(i, j) = linear * f_i . f_j + smooth * matern32(near * |m_i - m_j|^2 + apart * |f_i - f_j|^2) + broad,

with features f and masks m of the channels, and noise on the diagonal. Scores are in units of the standard deviation of the
head's prediction `<G, A * m_k>`. Their features are this prediction, the log standard deviation of `A_k` and the mean of its
mask. After some channels were swept,

    S ~ Student-t(mean, covariance),    w_k = exp(S_k),    L = relu(sum_k w_k A_k), min-max normalized.

The weights of the map are the mean softmax of joint samples of the unknown scores. The stated error is the 95 % quantile of the
largest difference between that map and the maps of the samples. `docs/budgeted-scoring.md` has the figures.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from camfn._types import Activations, Scores
from camfn.formulas import maps
from camfn.formulas.scaling import magnitude


class Constants(NamedTuple):
    """The constants of a process."""

    linear: float  # variance of the coefficient of each feature
    smooth: float  # variance of the Matern part
    near: float  # weight of the squared distance between masks, in units of its mean
    apart: float  # weight of the squared distance between features
    noise: float  # independent variance of each channel
    broad: float  # variance of the constant term; so large that the first values determine it


SCORES = Constants(linear=0.05, smooth=2.0, near=0.9, apart=0.06, noise=0.015, broad=1e3)
SLOPES = (1.0, -0.15, 0.4)  # coefficients of the three features in the prior mean of a score
DOF = 6.0  # degrees of freedom of the prior scale
LEAST = 0.5  # the smallest unit of a score: scores may differ even where the head predicts that they do not
"""These constants maximize the marginal likelihood of the swept scores of three networks (`benchmarks/budget.py`). Fits to
either half of the photos, and to each network alone, agree with them."""

ROUNDING = Constants(linear=1.0, smooth=1.0, near=3.0, apart=0.0, noise=0.3, broad=1e3)
ALONG = 1.0  # variance of the coefficient of the scores in their rounding: large scores are rounded up more often than down
"""These constants are likely on all three networks of `benchmarks/precision.py`; fits to each network alone differ. Their unit
is that of the observed differences."""

GOAL = 0.02  # three standard errors of the normalized map: above it, more channels are scored again in full precision
MOST = 0.25  # largest share of the channels to score again: more would cost the time that low precision saves
STEP = 1 / 40  # share of the channels to score again in a round, for each target; at least half of those scored again so far
ROUND = 1 / 32  # share of the channels to sweep in a round; at least a quarter of those swept so far
TWICE = 2  # number of consecutive rounds whose stated error must be below the tolerance
SAMPLES, QUANTILE = 200, 0.95  # number of joint samples of the unknown scores; quantile of their errors that is stated


# -------------------------------------------------------------------------------------------------------- the process


def covariance(constants: Constants, features: Tensor, masks: Tensor) -> Tensor:
    """The covariance `(c, c)` of channels with `features (c, f)` and `masks (c, p)`, without noise."""
    distance = constants.near * apart(masks)
    if constants.apart:
        distance = distance + constants.apart * torch.cdist(features, features).square()
    return constants.linear * features @ features.T + constants.smooth * matern(distance) + constants.broad


def apart(masks: Tensor) -> Tensor:
    """Squared distances between `masks (c, p)`, in units of their mean."""
    distance = torch.cdist(masks, masks).square()
    return distance / distance.mean().clamp(min=1e-12)


def matern(squared: Tensor) -> Tensor:
    """The Matern-3/2 covariance as a function of the squared distance; 1 at distance 0."""
    root = (3 * squared).sqrt()
    return (1 + root) * torch.exp(-root)


def standard(values: Tensor) -> Tensor:
    """Standardize columns to mean 0 and standard deviation 1."""
    centered = values - values.mean(0)
    return centered / centered.square().mean(0).sqrt().clamp(min=1e-12)


class Posterior(NamedTuple):
    """A Gaussian process conditioned on the values of some channels."""

    mean: Tensor  # (c,): the posterior mean
    gain: Tensor  # (d, c): conditioning subtracts `gain.T @ gain` from the covariance
    white: Tensor  # (d,): the whitened observations


def conditioned(rows: Tensor, noise: float, seen: Tensor, values: Tensor) -> Posterior:
    """Condition a process on the `values (d,)` of the channels `seen`. `rows (d, c)` are their rows of the covariance."""
    center = values.mean() if len(values) else values.sum()
    factor = torch.linalg.cholesky(rows[:, seen] + noise * torch.eye(len(values), dtype=rows.dtype))
    gain = torch.linalg.solve_triangular(factor, rows, upper=False)
    white = torch.linalg.solve_triangular(factor, (values - center)[:, None], upper=False)[:, 0]
    return Posterior(center + gain.T @ white, gain, white)


# --------------------------------------------------------------------------------------------------- scores not swept


class Prior(NamedTuple):
    """The prior of the scores of the channels that are not flat, and the flat channels with their common score."""

    activation: Tensor  # (c, p), of the channels that are not flat
    mean: Tensor  # (c,), in units of `unit`
    covariance: Tensor  # (c, c), without noise, in units of `unit` squared
    unit: Tensor  # (): the standard deviation of the head's prediction, at least `LEAST`
    flat: Tensor  # (m, p), the activation of the flat channels
    zero: Tensor  # (): the score of the flat channels; minus infinity if there are none


class Belief(NamedTuple):
    """The posterior of the scores: exact for the swept channels, Student-t for the others."""

    mean: Tensor  # (c,)
    covariance: Tensor  # (c, c)
    dof: float
    unswept: Tensor  # (u,): the channels that were not swept

    @property
    def variance(self) -> Tensor:
        """The variance `(c,)` of the scores."""
        return self.covariance.diagonal().clamp(min=0)


def prior_of(activation: Tensor, mask: Tensor, prediction: Tensor, flat: Tensor, zero: Tensor) -> Prior:
    """Make the prior. `activation` and `mask` `(c, p)` and `prediction (c,)`, in units of the score, omit flat channels."""
    features = standard(torch.stack([prediction, activation.std(1).log(), mask.mean(1)], 1))
    mean = features @ features.new_tensor(SLOPES)
    unit = prediction.std(unbiased=False).clamp(min=LEAST)
    return Prior(activation, mean, covariance(SCORES, features, mask), unit, flat, zero)


def believe(prior: Prior, swept: Tensor, scores: Tensor) -> Belief:
    """The posterior given the `scores` of the channels `swept`. The prior of its scale is inverse-gamma."""
    n = len(swept)
    noise = SCORES.noise * torch.eye(len(prior.mean), dtype=prior.mean.dtype)
    found = conditioned(prior.covariance[swept], SCORES.noise, swept, scores / prior.unit - prior.mean[swept])
    scale = (DOF + found.white @ found.white) / (DOF + n) * prior.unit**2
    mean = (prior.mean + found.mean) * prior.unit
    # Before any sweep the constant term is unknown, but it is a common factor of the weights, which cancels.
    left = (prior.covariance - (found.gain.T @ found.gain if n else SCORES.broad) + noise) * scale
    mean[swept], left[swept], left[:, swept] = scores, 0, 0
    unswept = torch.ones(len(mean), dtype=torch.bool).index_fill(0, swept, False).nonzero()[:, 0]
    return Belief(mean, left, DOF + n, unswept)


def drawn(prior: Prior, scores: Tensor) -> Tensor:
    """The min-max normalized maps `(b, p)` of scores `(b, c)`."""
    top = torch.maximum(scores.amax(1, keepdim=True), prior.zero)
    raw = torch.relu(torch.exp(scores - top) @ prior.activation + torch.exp(prior.zero - top) * prior.flat.sum(0))
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    return (raw - low) / (high - low).clamp(min=1e-300)


def stakes(prior: Prior, belief: Belief) -> Tensor:
    """The log stake of each channel: its expected weight, times the part of `A_k` that the current map does not explain."""
    now = drawn(prior, (belief.mean + belief.variance.clamp(max=9.0) / 4)[None])[0]
    along = (prior.activation @ now) / (now @ now).clamp(min=1e-300)
    other = (prior.activation - along[:, None] * now).abs().amax(1)
    return belief.mean + belief.variance.clamp(max=16.0) / 2 + other.clamp(min=1e-12).log()


def settled(prior: Prior, belief: Belief, widen: float, fair: bool, generator: torch.Generator) -> tuple[Tensor, float]:
    """Estimate one score for each channel, whose softmax is the mean softmax of joint samples; and the error of its map.

    The error is the 95 % quantile of the largest difference to the maps of Student-t samples, `widen` times as wide as the
    posterior. If the swept channels are a `fair` (random) sample, the scores come from these samples too. A greedy sweep has
    seen only the largest scores: then the scores come from Gaussian samples of the posterior, not widened.
    """
    u = belief.unswept
    if not len(u):
        return belief.mean, 0.0
    normal = torch.randn(SAMPLES, len(u), generator=generator, dtype=torch.float64) @ _root(belief.covariance[u][:, u]).T
    # Chi-squared samples as sums of squares: torch's own sampler takes no generator.
    chi = torch.randn(SAMPLES, int(belief.dof), generator=generator, dtype=torch.float64).square().mean(1, keepdim=True)
    close, wide = (belief.mean.repeat(SAMPLES, 1).index_add(1, u, part) for part in (normal, widen * normal / chi.sqrt()))
    of_all = torch.cat([wide if fair else close, prior.zero.expand(SAMPLES, len(prior.flat))], 1)
    scores = torch.softmax(of_all, 1).mean(0)[: len(belief.mean)].clamp(min=1e-300).log()
    swept = torch.ones(len(scores), dtype=torch.bool).index_fill(0, u, False)
    # Swept channels have the same score in all samples. One constant, which cancels in the softmax, makes them exact again.
    if bool(swept.any()):
        top = torch.where(swept, belief.mean, -torch.inf).argmax()
        scores = scores + belief.mean[top] - scores[top]
    scores[swept] = belief.mean[swept]
    difference = (drawn(prior, wide) - drawn(prior, scores[None])).abs().amax(1)
    return scores, difference.quantile(QUANTILE).item()


def _root(covariance: Tensor) -> Tensor:
    """A Cholesky factor of a covariance that rounding may have made indefinite."""
    size, one = covariance.diagonal().mean(), torch.eye(len(covariance), dtype=covariance.dtype)
    for jitter in (1e-9, 1e-7, 1e-5, 1e-3):
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * size * one)
        if not failed:
            return factor
    return covariance.diagonal().clamp(min=0).sqrt().diag()


def widening(surprises: Tensor) -> float:
    """The factor, at least 1, by which the posterior was too narrow for the later half of the swept channels.

    `surprises` are the squared errors of its predictions, in units of its variance.
    """
    late = surprises[-max(4, len(surprises) // 2) :]
    return max(1.0, float((8 + late.sum()) / (8 + len(late)))) ** 0.5


def shrunk(drawn: Tensor, swept: Tensor, values: Activations, total: int, seed: int) -> tuple[Scores, Tensor]:
    """Estimate the mean scores over `total` draws of noise from those of the first draws, `drawn (d, n, c, t)`.

    With variance s2 between draws, v between channels, and mean m over channels, the estimate is

        E = m + (v + s2 / total) / (v + s2 / d) (mean - m).

    v and s2 are estimated over the channels of `swept (n, c)`. The error is 1.6 times the 95 % quantile of the largest
    difference to the maps of scores sampled with the remaining variance. The factor is for similar channels, whose errors are
    correlated, while the samples are independent.

    Returns:
        The estimates `(n, c, t)`, and the error of the map `(n, t)`.
    """
    count, done = swept.sum(1).clamp(min=1)[:, None, None], len(drawn)
    size = magnitude(drawn, (0, 1, 2, 3))[0]  # the unit of the variances, which could underflow or overflow
    drawn = drawn / size
    mean = drawn.mean(0)

    def average(of: Tensor) -> Tensor:
        return torch.where(swept[..., None], of, 0).sum(1, keepdim=True) / count

    center = average(mean)
    between = average((mean - center).square())
    noise = average(drawn.var(0)) if done > 1 else between  # with a single draw, all of the variance may be noise
    signal = (between - noise / done).clamp(min=0)
    wanted, seen = signal + noise / total, signal + noise / done
    factor = torch.where(seen > 0, wanted / seen, 1)
    scores = (center + factor * (mean - center)) * size
    left = (wanted * (1 - factor)).clamp(min=0).sqrt() * swept[..., None] * size
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(SAMPLES, mean.shape[1], generator=generator, dtype=torch.float64).to(mean)
    error = torch.stack([_spread_of(s, d, a, normal) for s, d, a in zip(scores, left, values.to(mean.dtype))])
    return scores, (1.6 * error).clamp(max=1)


def _spread_of(scores: Tensor, deviation: Tensor, values: Tensor, normal: Tensor) -> Tensor:
    """The error `(t,)` of one image's maps, if the scores have this standard deviation `(c, t)`."""

    def normalized(of: Tensor) -> Tensor:
        return maps.normalize(torch.relu(torch.softmax(of, -1) @ values))

    pairs = zip(scores.T, deviation.T)
    found = [(normalized(s + d * normal) - normalized(s)).abs().amax(1).quantile(QUANTILE) for s, d in pairs]
    return torch.stack(found)
