"""A sweep in low precision, with the channels that carry the map scored again in full precision.

In bfloat16 a logit of 16 has a step of 0.125, even if sums are in float32, and the softmax over channels amplifies it. But the
map depends on few channels. Those are scored again, and their rounding predicts that of the others: the model with rounded
weights is a function of the input too, so channels with similar masks have similar errors.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from camfn._types import Activations, Scores
from camfn.formulas import maps
from camfn.sweep import gaussian_process as gp
from camfn.sweep.runner import narrowed
from camfn.sweep.scoring import Scoring, Swept, gather, scorer, scores_of
from camfn.sweep.search import search


def sweep_narrow(scoring: Scoring) -> Swept:
    """Sweep in `options.dtype`, and refine the scores in full precision."""
    todo, variation = scoring.plan, scoring.variation
    exact = partial(scores_of, scorer(quietly(scoring)), todo, variation)
    zeros = scorer(scoring)(todo.zeros)  # in full precision: each of these rows stands for many channels
    scores = gather(torch.cat([in_dtype(scoring)(todo.rows), zeros]), todo, variation)
    scores, again, error = refine(scores, todo.read.values, todo.swept(), exact, variation.recipe.weights)
    return Swept(scores, todo.rows_in_all + again * len(variation.scales), error)


def quietly(scoring: Scoring) -> Scoring:
    """Scoring without progress: rows that are scored again do not count."""
    return scoring._replace(tick=lambda used: None)


def in_dtype(scoring: Scoring) -> Callable[[Tensor], Tensor]:
    """The scorer in the narrow dtype of the options."""
    assert scoring.options.dtype is not None
    return scorer(scoring._replace(runner=narrowed(scoring.forward, scoring.runner, scoring.options.dtype)))


def refine(
    scores: Scores, values: Activations, alive: Tensor, exact: Callable[[Tensor], Scores], weighting: str
) -> tuple[Scores, int, Tensor]:
    """Score the most influential channels again in full precision, until the others' rounding moves the map less than `GOAL`.

    Args:
        scores: `(n, c, t)`, in low precision.
        values: the activation `(n, c, p)`.
        alive: `(n, c)`, the channels that were swept individually.
        exact: maps a mask `(n, c)` to the scores of its channels in full precision.
        weighting: how the scores become weights, as in `camfn.weights.score_cam`.

    Returns:
        The scores `(n, c, t)`, the number of channels scored again, and the error of the normalized map `(n, t)`: three
        standard errors, at the position where they are largest. At most `MOST` of the channels (or 8) are scored again; the
        error is stated even if it is above `GOAL`.
    """
    parts = zip(scores.cpu(), values.cpu(), alive.cpu())
    images = [_Rounding(narrow, activation, live, weighting) for narrow, activation, live in parts]
    search(images, lambda chosen: exact(chosen.to(alive.device)).cpu())
    found, error = (torch.stack(part).to(scores) for part in zip(*((image.scores, image.error) for image in images)))
    return found, sum(int(image.done.sum()) for image in images), error


class _Rounding:
    """The rounding of one image's scores: a Gaussian process over its channels, for each target.

    Its features are the masks and, for each target, the scores in low precision.
    """

    def __init__(self, narrow: Tensor, values: Tensor, alive: Tensor, weighting: str) -> None:
        self.values, self.weighting, self.channels = values.double(), weighting, alive.nonzero()[:, 0]
        masks = maps.normalize(values[self.channels]).double()
        centered = masks - masks.mean(0)
        features = centered / centered.square().sum(1).mean().clamp(min=1e-12).sqrt()
        self.covariance = gp.covariance(gp.ROUNDING, features, masks)
        self.scores, self.narrow = narrow.double(), narrow.double()[self.channels]
        self.done = torch.zeros_like(alive)
        self._believe()

    def choose(self) -> Tensor:
        """The channels to score again in the next round, as a mask. No channel ends the search."""
        again, chosen = int(self.done.sum()), torch.zeros_like(self.done)
        left = min(len(self.channels), max(8, math.ceil(gp.MOST * len(self.channels)))) - again
        if left > 0 and bool((self.error > gp.GOAL).any()):
            step = min(left, max(8, int(len(self.done) * self.scores.shape[1] * gp.STEP), again // 2))
            chosen[self.channels[self.influence.topk(step).indices]] = True
        return chosen

    def learn(self, scores: Tensor, mask: Tensor) -> None:
        """Update the posterior with the full-precision scores `(c, t)` of the channels in `mask`."""
        self.done = self.done | mask
        self.scores = torch.where(mask[:, None], scores.double(), self.scores)
        self._believe()

    def _believe(self) -> None:
        """Update the scores of the other channels, the map's error `(t,)`, and each channel's influence on the map."""
        done, errors, influence = self.done[self.channels], [], []
        for t, slope in enumerate(gp.standard(self.narrow).T * gp.ALONG**0.5):
            seen = (self.scores[self.channels] - self.narrow)[done, t]
            found = gp.conditioned(self.covariance[done] + torch.outer(slope[done], slope), gp.ROUNDING.noise, done, seen)
            self.scores[self.channels[~done], t] = (self.narrow[:, t] + found.mean)[~done]
            level, moves = _moves(self.scores[:, t], self.values, self.weighting)
            moves = torch.where(done[:, None], 0, moves[self.channels])
            known = (found.gain @ moves).square().sum(0)
            noise = gp.ROUNDING.noise * moves.square().sum(0)
            variance = (moves * (self.covariance @ moves)).sum(0) + noise + (slope @ moves).square() - known
            spread = variance.clamp(min=0).sqrt()
            errors.append(_error(level, torch.where(spread > 0, _three(found.white) * spread, 0)))
            scale = level.abs().amax().clamp(min=torch.finfo(level.dtype).tiny)
            influence.append(torch.where(done, -1, moves.abs().amax(1) / scale))
        self.error, self.influence = torch.stack(errors), torch.stack(influence).amax(0)


def _three(white: Tensor) -> Tensor:
    """The half-width of three standard errors, in units of the process.

    It is larger for few observed channels (Student's t), and infinite for one.
    """
    free = len(white) - 1
    return (3 + 7.5 / free) * (white @ white / free).sqrt() if free > 0 else white.new_full((), torch.inf)


def _moves(scores: Tensor, values: Tensor, weighting: str) -> tuple[Tensor, Tensor]:
    """The map `(p,)` before its ReLU, and its derivative with respect to each score, `(c, p)`."""
    soft = weighting == "softmax"
    weight = torch.softmax(scores, 0) if soft else scores
    level = weight @ values
    # dL / dS_k is w_k (A_k - L) under a softmax, and A_k where the score itself is the weight.
    return level, weight[:, None] * (values - level) if soft else values


def _error(level: Tensor, off: Tensor) -> Tensor:
    """The error of the normalized map, in [0, 1], if the map `level` has the error `off` at each position.

    It is 1 if no value of the map is positive, but one may be.
    """
    span = level.relu().amax() - level.relu().amin()
    return torch.where(span > 0, off.amax() / span, ((off > 0) & (level + off > 0)).any()).clamp(max=1)
