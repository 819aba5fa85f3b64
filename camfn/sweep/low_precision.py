"""A sweep in a narrow dtype, and the channels that carry the map scored again in full.

A logit of 16 has a step of 0.125 in bfloat16, whatever is added up in float32 afterwards, and the softmax over channels
multiplies that. But the map hangs on few channels. Those are scored again, and tell how far off the others are: the rounded
weights are a function of the input, too, so channels that look at the same place are off alike.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from camfn._types import Activations, Scores
from camfn.formulas import maps
from camfn.sweep import gaussian_process
from camfn.sweep.runner import narrowed
from camfn.sweep.scoring import Scoring, Swept, gather, scorer, scores_of

GOAL = 0.02  # three standard errors of the normalised map, beyond which more channels are scored again
MOST = 0.25  # of the channels are scored again: more, and the time saved is spent
_STEP = 40  # a fortieth of the channels at a time for each target, or half of those scored again so far

# The process, in units of its smooth part. These are likely on all three networks tried; each would have its own.
_NEAR = 3.0  # weight of the squared distance between masks, in units of its mean
_LINEAR = 1.0  # variance of the part that is linear in the mask
_SLOPE = 1.0  # variance of the slope along the narrow scores
_NOISE = 0.3  # variance of what a channel is off by for itself
_BROAD = 1e3  # variance of what all are off by


def sweep_narrow(scoring: Scoring) -> Swept:
    """A sweep in `options.dtype`, refined in full precision."""
    todo, variation = scoring.plan, scoring.variation
    exact = partial(scores_of, scorer(quietly(scoring)), todo, variation)
    zeros = scorer(scoring)(todo.zeros)  # one row for each image, which stands for many channels
    scores = gather(torch.cat([in_dtype(scoring)(todo.rows), zeros]), todo, variation)
    scores, again, error = refine(scores, todo.read.values, todo.swept(), exact, variation.recipe.weights)
    return Swept(scores, todo.rows_in_all + again * len(variation.scales), error)


def quietly(scoring: Scoring) -> Scoring:
    """What is scored again is no progress."""
    return scoring._replace(tick=lambda used: None)


def in_dtype(scoring: Scoring) -> Callable[[Tensor], Tensor]:
    """The scorer in the narrow dtype that is asked for."""
    assert scoring.options.dtype is not None
    return scorer(scoring._replace(runner=narrowed(scoring.forward, scoring.runner, scoring.options.dtype)))


def refine(
    scores: Scores, values: Activations, alive: Tensor, exact: Callable[[Tensor], Scores], weighting: str
) -> tuple[Scores, int, Tensor]:
    """Score the channels with the most influence again, until the others' rounding moves the map by less than `GOAL`.

    `alive (n, c)` are the channels that were swept, one by one; `exact(chosen)` scores those of a mask `(n, c)` in full. At
    most `MOST` of the channels are scored again, and what is then left of the error is stated.

    Returns the scores, how many channels were scored again, and three standard errors `(n, t)` of the normalised map, at the
    position where they are largest.
    """
    parts = zip(scores.cpu(), values.cpu(), alive.cpu())
    images = [_Rounding(narrow, activation, live, weighting) for narrow, activation, live in parts]
    while bool((chosen := torch.stack([image.choose() for image in images])).any()):
        for image, found, mask in zip(images, exact(chosen.to(alive.device)).cpu(), chosen):
            image.learn(found, mask)
    found, error = (torch.stack(part).to(scores) for part in zip(*((image.scores, image.error) for image in images)))
    return found, sum(int(image.done.sum()) for image in images), error


class _Rounding:
    """What is believed of the rounding of one image's scores: a Gaussian process over its channels, for each target.

    It is a constant, a slope along the narrow scores (the largest of which were rounded up more often than down), a linear
    function of the mask, a Matern-3/2 of the distance between masks, and noise; its scale is that of the differences seen.
    """

    def __init__(self, narrow: Tensor, values: Tensor, alive: Tensor, weighting: str) -> None:
        self.values, self.weighting, self.channels = values.double(), weighting, alive.nonzero()[:, 0]
        self.kernel = _kernel(maps.normalize(values[self.channels]).double())
        self.scores, self.narrow = narrow.double(), narrow.double()[self.channels]
        self.done = torch.zeros_like(alive)
        self._believe()

    def choose(self) -> Tensor:
        """The channels that are scored again next, as a mask; none when it is enough."""
        again, chosen = int(self.done.sum()), torch.zeros_like(self.done)
        left = min(len(self.channels), max(8, math.ceil(MOST * len(self.channels)))) - again
        if left > 0 and bool((self.error > GOAL).any()):
            step = min(left, max(8, len(self.done) * self.scores.shape[1] // _STEP, again // 2))
            chosen[self.channels[self.influence.topk(step).indices]] = True
        return chosen

    def learn(self, exact: Tensor, mask: Tensor) -> None:
        """Take the full scores `(c, t)` of some channels in."""
        self.done = self.done | mask
        self.scores = torch.where(mask[:, None], exact.double(), self.scores)
        self._believe()

    def _believe(self) -> None:
        """The scores of the channels not done, the map's error `(t,)`, and how far the map may move with each channel."""
        done, errors, influence = self.done[self.channels], [], []
        for t, slope in enumerate(gaussian_process.standard(self.narrow).T * _SLOPE**0.5):
            seen = (self.scores[self.channels] - self.narrow)[done, t]
            mean, gain, three = _conditioned(self.kernel[done] + torch.outer(slope[done], slope), seen, done)
            self.scores[self.channels[~done], t] = (self.narrow[:, t] + mean)[~done]
            level, moves = _moves(self.scores[:, t], self.values, self.weighting)
            moves = torch.where(done[:, None], 0, moves[self.channels])
            variance = (moves * (self.kernel @ moves)).sum(0) + (slope @ moves).square() - (gain @ moves).square().sum(0)
            spread = variance.clamp(min=0).sqrt()
            errors.append(_error(level, torch.where(spread > 0, three * spread, 0)))
            scale = level.abs().amax().clamp(min=torch.finfo(level.dtype).tiny)
            influence.append(torch.where(done, -1, moves.abs().amax(1) / scale))
        self.error, self.influence = torch.stack(errors), torch.stack(influence).amax(0)


def _kernel(masks: Tensor) -> Tensor:
    """The covariance of channels with these `masks (c, p)`, less what the scores have to do with it."""
    centred = masks - masks.mean(0)
    linear = centred @ centred.T / centred.square().sum(1).mean().clamp(min=1e-12)
    noise = _NOISE * torch.eye(len(masks), dtype=masks.dtype)
    return _LINEAR * linear + gaussian_process.matern(_NEAR * gaussian_process.apart(masks)) + noise + _BROAD


def _conditioned(kernel: Tensor, seen: Tensor, done: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian process over channels, given what was seen at those `done`, whose rows of the kernel `(d, c)` these are.

    Returns its mean `(c,)`; the gain `(d, c)`, of which `gain.T @ gain` is what the kernel loses; and three times what the
    kernel's deviations are to be multiplied by: more where few were seen (Student's t), infinite where none were.
    """
    centre = seen.mean() if len(seen) else seen.new_zeros(())
    factor = torch.linalg.cholesky(kernel[:, done])
    gain = torch.linalg.solve_triangular(factor, kernel, upper=False)
    white = torch.linalg.solve_triangular(factor, (seen - centre)[:, None], upper=False)[:, 0]
    free = len(seen) - 1
    three = (3 + 7.5 / free) * (white @ white / free).sqrt() if free > 0 else seen.new_full((), torch.inf)
    return centre + gain.T @ white, gain, three


def _moves(scores: Tensor, values: Tensor, weighting: str) -> tuple[Tensor, Tensor]:
    """The map `(p,)` before its ReLU, and how it moves with each score, `(c, p)`."""
    soft = weighting == "softmax"
    weight = torch.softmax(scores, 0) if soft else scores
    level = weight @ values
    # dL / dS_k is w_k (A_k - L) under a softmax, and A_k where the score itself is the weight.
    return level, weight[:, None] * (values - level) if soft else values


def _error(level: Tensor, off: Tensor) -> Tensor:
    """Of the normalised map, where the map is `off` by so much at each position: at most 1, and 1 where nothing of it is
    positive and something may be."""
    span = level.relu().amax() - level.relu().amin()
    return torch.where(span > 0, off.amax() / span, ((off > 0) & (level + off > 0)).any()).clamp(max=1)
