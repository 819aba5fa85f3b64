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
from camfn.sweep import gaussian_process as gp
from camfn.sweep.runner import narrowed
from camfn.sweep.scoring import Scoring, Swept, gather, scorer, scores_of
from camfn.sweep.search import search


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
    search(images, lambda chosen: exact(chosen.to(alive.device)).cpu())
    found, error = (torch.stack(part).to(scores) for part in zip(*((image.scores, image.error) for image in images)))
    return found, sum(int(image.done.sum()) for image in images), error


class _Rounding:
    """The rounding of one image's scores: a Gaussian process over its channels, for each target.

    Its features are the masks and, for each target, the narrow scores.
    """

    def __init__(self, narrow: Tensor, values: Tensor, alive: Tensor, weighting: str) -> None:
        self.values, self.weighting, self.channels = values.double(), weighting, alive.nonzero()[:, 0]
        masks = maps.normalize(values[self.channels]).double()
        centred = masks - masks.mean(0)
        features = centred / centred.square().sum(1).mean().clamp(min=1e-12).sqrt()
        self.covariance = gp.covariance(gp.ROUNDING, features, masks)
        self.scores, self.narrow = narrow.double(), narrow.double()[self.channels]
        self.done = torch.zeros_like(alive)
        self._believe()

    def choose(self) -> Tensor:
        """The channels to score again next, as a mask; none when the error is small enough."""
        again, chosen = int(self.done.sum()), torch.zeros_like(self.done)
        left = min(len(self.channels), max(8, math.ceil(gp.MOST * len(self.channels)))) - again
        if left > 0 and bool((self.error > gp.GOAL).any()):
            step = min(left, max(8, int(len(self.done) * self.scores.shape[1] * gp.STEP), again // 2))
            chosen[self.channels[self.influence.topk(step).indices]] = True
        return chosen

    def learn(self, scores: Tensor, mask: Tensor) -> None:
        """Take in the full scores `(c, t)` of the channels of a mask."""
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
    """Three standard errors, in units of the process: more where few channels were seen (Student's t), infinite for one."""
    free = len(white) - 1
    return (3 + 7.5 / free) * (white @ white / free).sqrt() if free > 0 else white.new_full((), torch.inf)


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
