"""A sweep in a narrow dtype, and the channels that carry the map scored again in full.

A logit of 16 has a step of 0.125 in bfloat16, whatever is added up in float32 afterwards, and the softmax over channels
multiplies that. But the map hangs on few channels: those are scored again, and tell how far off the others are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from camfn import maps, weights
from camfn._types import Activations, Scores
from camfn.runner import narrowed
from camfn.scoring import Scoring, Swept, gather, scorer, scores_of

GOAL = 0.015  # three standard errors of the normalised map, beyond which more channels are scored again
_STEP = 40  # a fortieth of the channels at a time


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
    return scorer(scoring._replace(runner=narrowed(scoring.subject, scoring.runner, scoring.options.dtype)))


def refine(
    scores: Scores, values: Activations, alive: Tensor, exact: Callable[[Tensor], Scores], weighting: str
) -> tuple[Scores, int, Tensor]:
    """Score the channels with the most influence again until the others' rounding moves the map by less than `GOAL`.

    `alive (n, c)` are the channels that were swept, one by one; `exact(chosen)` scores those of a mask `(n, c)` in full. Their
    differences from `scores` have a mean, which is taken off the others, and a deviation sigma, by which the map may be off:
    `sigma sqrt(sum_k (dL / dS_k)^2 + (sum_k dL / dS_k)^2 / m)` over the others, m being how many were scored again.

    Returns the scores, how many channels were scored again, and three standard errors `(n, t)` of the normalised map, at the
    position where they are largest.
    """
    narrow, done = scores, torch.zeros_like(alive)
    step = max(8, values.shape[1] // _STEP)
    while True:
        others = alive & ~done
        influence, error = _uncertainty(scores, narrow, values.to(scores.dtype), others, done, weighting)
        others &= (error.amax(1) > GOAL)[:, None]
        if not bool(others.any()):
            return scores, int(done.sum()), error
        chosen = _most(influence, others, step)
        done = done | chosen
        known = torch.where(chosen[..., None], exact(chosen), scores)
        mean, _ = _moments(known - narrow, done)
        scores = torch.where((alive & ~done)[..., None], narrow + mean[:, None], known)


def _moments(difference: Scores, done: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the channels that are done, `(n, t)` each; the deviation is infinite while there are none."""
    count = done.sum(1)[:, None]
    mean = torch.where(done[..., None], difference, 0).sum(1) / count.clamp(min=1)
    square = torch.where(done[..., None], difference - mean[:, None], 0).square().sum(1) / (count - 1).clamp(min=1)
    return mean, torch.where(count > 1, square.sqrt(), torch.inf)


def _uncertainty(
    scores: Scores, narrow: Scores, values: Activations, others: Tensor, done: Tensor, weighting: str
) -> tuple[Tensor, Tensor]:
    """How much each channel can move the normalised map, `(n, c)`, and how far the map may be off, `(n, t)`."""
    soft = weighting == "softmax"
    level = maps.combine(weights.softmax(scores) if soft else weights.score(scores), values)
    span = torch.relu(level).amax(-1) - torch.relu(level).amin(-1)
    span = span.clamp(min=torch.finfo(span.dtype).tiny)
    # dL / dS_k is w_k (A_k - L) under a softmax, and A_k where the score itself is the weight.
    gain, level = (weights.softmax(scores), level) if soft else (torch.ones_like(scores.mT), torch.zeros_like(level))
    influence = (gain / span[..., None]).amax(1) * (values.amax(-1) - values.amin(-1))
    gain = torch.where(others[:, None], gain, 0)
    square, total = gain.square(), gain.sum(-1, keepdim=True)
    # sum_k g_k^2 (A_k - L)^2, without a tensor of channels, positions and targets; and the mean's own error, which moves all
    apart = square @ values.square() - 2 * level * (square @ values) + level.square() * square.sum(-1, keepdim=True)
    together = (gain @ values - level * total).square() / done.sum(1).clamp(min=1)[:, None, None]
    spread = (apart.clamp(min=0) + together).amax(-1).sqrt()
    _, sigma = _moments(scores - narrow, done)
    return influence, torch.where(spread > 0, 3 * sigma * spread / span, 0)


def _most(influence: Tensor, among: Tensor, step: int) -> Tensor:
    """The `step` channels of each image with the largest influence, as a mask."""
    order = torch.where(among, influence, -1).topk(min(step, among.shape[1]), 1).indices
    return torch.zeros_like(among).scatter(1, order, True) & among
