"""Score-CAM on a budget: sweep the channels that matter most, predict the others' scores, and state the error of the map."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Scores
from camfn.formulas.masks import Variation, min_max
from camfn.formulas.scaling import magnitude
from camfn.sweep import gaussian_process as gp
from camfn.sweep.low_precision import in_dtype, quietly, refine
from camfn.sweep.scoring import Plan, Scoring, Swept, scorer, scores_of
from camfn.sweep.search import search

Order = Literal["predicted", "std", "max", "gradient"]


class Limits(NamedTuple):
    """The budget, and the accuracy that ends a sweep early."""

    budget: float = 1.0  # share of the channels to sweep, in (0, 1]; with noise, share of the draws
    tolerance: float | None = None  # error of the min-max normalized map at which to stop, in (0, 1)
    order: Order = "predicted"
    seed: int = 0

    @property
    def any(self) -> bool:
        """Whether anything may be left out."""
        return self.budget < 1 or self.tolerance is not None


def checked_limits(limits: Limits, weighting: str) -> Limits:
    """Return `limits`, or raise `CamError` if one is invalid."""
    budget, tolerance, order, seed = limits
    if isinstance(budget, bool) or not (isinstance(budget, (int, float)) and 0 < budget <= 1):
        raise CamError(f"budget={budget!r} must be in (0, 1]: the share of the channels to sweep")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < 1):
        raise CamError(f"tolerance={tolerance!r} must be None, or in (0, 1): the error of the normalized map at which to stop")
    if order not in ("predicted", "std", "max", "gradient"):
        raise CamError(f'order={order!r} must be "predicted", "std", "max" or "gradient"')
    if not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        raise CamError(f"seed must be an int of 64 bits, found {seed!r}")
    if not limits.any:
        return limits
    if _compat.transformed():
        raise CamError("budget= and tolerance= read values, which is impossible under a transform (vmap, grad, jvp)")
    if weighting != "softmax":
        raise CamError("budget= and tolerance= need a recipe whose weights are a softmax of the scores")
    if tolerance is not None and order != "predicted":
        raise CamError(f'tolerance= needs order="predicted": order={order!r} does not predict the scores of other channels')
    return limits


def rows_within(todo: Plan, variation: Variation, limits: Limits) -> int:
    """The maximum number of masked inputs to sweep."""
    if not limits.any:
        return todo.rows_in_all
    draws = len(variation.scales)
    shared = len(todo.zeros) or draws * int(_stand_ins(todo).sum())
    if _stops_draws(variation, limits):
        each = zip(_draws_within(todo, draws, limits), _apart(todo).sum(1).tolist())
        return shared + sum(most * channels for most, channels in each)
    return shared + draws * sum(_most(todo, limits))


def _stops_draws(variation: Variation, limits: Limits) -> bool:
    """Whether the budget saves draws instead of channels: the noise exceeds what similar channels tell about a score."""
    return variation.noise is not None and limits.order == "predicted"


def _most(todo: Plan, limits: Limits) -> list[int]:
    """The number of channels to sweep, for each image. The row that all flat channels share counts towards the budget."""
    live, shared = (~todo.flat).sum(1).tolist(), todo.flat.any(1).tolist()
    if limits.budget == 1:
        return live
    return [min(c, max(1, math.floor(limits.budget * c + 1e-9) - paid)) if c else 0 for c, paid in zip(live, shared)]


def _draws_within(todo: Plan, total: int, limits: Limits) -> list[int]:
    """The number of draws to sweep, for each image. The rows that its dead channels share count towards the budget."""
    shared = total * _stand_ins(todo).sum(1) + torch.bincount(todo.zeros[:, 2], minlength=len(todo.flat)).to(todo.flat.device)
    paid = (shared / _apart(todo).sum(1).clamp(min=1)).tolist()
    if limits.budget == 1:
        return [total] * len(paid)
    return [min(total, max(1, math.floor(limits.budget * total - share + 1e-9))) for share in paid]


def _apart(todo: Plan) -> Tensor:
    """The channels `(n, c)` that are swept individually."""
    return todo.swept() & ~_dead(todo)


def _dead(todo: Plan) -> Tensor:
    """The channels `(n, c)` that are zero at all positions: no weight brings them into the map."""
    return (todo.read.values == 0).all(-1)


def _stand_ins(todo: Plan) -> Tensor:
    """The first dead channel of each image, which stands for all its dead channels if noise makes their masks differ."""
    dead = _dead(todo)
    return torch.zeros_like(dead).scatter(1, dead.int().argmax(1, keepdim=True), True) & dead & todo.swept()


def sweep_some(scoring: Scoring, slopes: Tensor, limits: Limits) -> Swept:
    """Sweep the channels that matter most. `slopes (n, t, c, p)` are the scores' gradients at the activation."""
    todo, variation = scoring.plan, scoring.variation
    if _stops_draws(variation, limits):
        return _by_draws(scoring, limits)
    full = scorer(scoring)
    fast = full if scoring.options.dtype is None else in_dtype(scoring)
    shared, forwards = _shared_scores(todo, full, variation)
    way = _believed if limits.order == "predicted" else _ranked
    chosen, scores, error = way(todo, slopes, shared, limits, partial(scores_of, fast, todo, variation))
    if scoring.options.dtype is not None:
        exact = partial(scores_of, scorer(quietly(scoring)), todo, variation)
        scores, again, rounding = refine(scores, todo.read.values, chosen, exact, "softmax")
        error = None if error is None else (error + rounding).clamp(max=1)
        forwards += len(variation.scales) * again
    return Swept(scores, forwards + len(variation.scales) * int(chosen.sum()), error)


def _shared_scores(todo: Plan, full: Callable[[Tensor], Tensor], variation: Variation) -> tuple[Tensor, int]:
    """Score the flat channels of each image. Returns the scores `(n, t)`, and the number of masked inputs."""
    n = len(todo.flat)
    if len(todo.zeros):
        found = full(todo.zeros)
        return found.new_zeros(n, found.shape[1]).index_copy(0, todo.zeros[:, 2].to(found.device), found), len(todo.zeros)
    first = _stand_ins(todo)
    return scores_of(full, todo, variation, first).sum(1), len(variation.scales) * int(first.sum())


def _by_draws(scoring: Scoring, limits: Limits) -> Swept:
    """Sweep all channels with fewer draws of the noise.

    The mean over the draws so far, shrunk towards the mean over channels, estimates the mean over all draws. The sweep is in
    full precision, since rounding would be one more unknown.
    """
    todo, total, score = scoring.plan, len(scoring.variation.scales), scorer(scoring)
    shared, at_zero = _shared_scores(todo, score, scoring.variation)
    apart, most = _apart(todo), torch.tensor(_draws_within(todo, total, limits))
    index = todo.of(apart).rows
    scores = error = None
    drawn, open_, done, forwards = [], torch.ones(len(apart), dtype=torch.bool), 0, at_zero
    while bool(open_.any()):
        upto = int(most[open_].min())
        upto = upto if limits.tolerance is None else min(upto, max(4, done + done // 2))
        rows = index[(index[:, 0] >= done) & (index[:, 0] < upto) & open_[index[:, 2]]]
        drawn.append(_each_draw(score(rows), rows, apart, done, upto))
        done, forwards = upto, forwards + len(rows)
        found = gp.shrunk(torch.cat(drawn), apart, todo.read.values, total, limits.seed)
        now = open_.to(apart.device)
        scores = found[0] if scores is None else torch.where(now[:, None, None], found[0], scores)
        error = found[1] if error is None else torch.where(now[:, None], found[1], error)
        enough = done >= most
        if limits.tolerance is not None:
            enough |= error.amax(1).cpu() <= limits.tolerance
        open_ &= ~enough
    assert scores is not None
    return Swept(torch.where(apart[..., None], scores, shared[:, None]), forwards, error)


def _each_draw(found: Tensor, rows: Tensor, channels: Tensor, first: int, end: int) -> Tensor:
    """Scatter the scores of rows into `(draws, n, c, t)`."""
    (n, c), (draw, channel, image) = channels.shape, rows.T.to(found.device)
    place = ((draw - first) * n + image) * c + channel
    return found.new_zeros((end - first) * n * c, found.shape[1]).index_copy(0, place, found).reshape(end - first, n, c, -1)


def _ranked(
    todo: Plan, slopes: Tensor, shared: Tensor, limits: Limits, score: Callable[[Tensor], Scores]
) -> tuple[Tensor, Scores, None]:
    """Sweep the first channels in a published order. As published, the others get no weight."""
    values = todo.read.values
    rank = {
        "std": (values / magnitude(values, (1, 2))).std(-1, unbiased=False),
        "max": values.amax(-1),
        "gradient": slopes.mean(-1).sum(1),
    }
    order = torch.where(todo.flat, -torch.inf, rank[limits.order]).argsort(1, descending=True)
    place = order.argsort(1)
    chosen = (place < torch.tensor(_most(todo, limits), device=place.device)[:, None]) & ~todo.flat
    left_out = torch.where(chosen.any(1), -torch.inf, 0.0)[:, None, None]  # an image of flat channels has equal weights
    return chosen, torch.where(chosen[..., None], score(chosen), left_out), None


def _believed(
    todo: Plan, slopes: Tensor, shared: Tensor, limits: Limits, score: Callable[[Tensor], Scores]
) -> tuple[Tensor, Scores, Tensor]:
    """Sweep the channels that can move the map most, in rounds, until the budget is spent or the error is small enough."""
    images = [_Search(todo, slopes, shared, image, most, limits) for image, most in enumerate(_most(todo, limits))]
    chosen = search(images, lambda channels: score(channels).double().cpu())
    ends = [image.end() for image in images]
    scores, error = (torch.stack(part).to(shared) for part in zip(*ends))
    return chosen.to(todo.flat.device), torch.where(todo.flat[..., None], shared[:, None], scores), error


class _Search:
    """The search on one image, for all its targets."""

    def __init__(self, todo: Plan, slopes: Tensor, shared: Tensor, image: int, most: int, limits: Limits) -> None:
        values, flat = todo.read.values[image].double().cpu(), todo.flat[image].cpu()
        self.live = (~flat).nonzero()[:, 0]
        self.most, self.limits, self.channels = most, limits, len(flat)
        self.generator = torch.Generator().manual_seed(limits.seed)
        zeros = shared[image].double().cpu() if bool(flat.any()) else torch.full((slopes.shape[1],), -torch.inf).double()
        self.priors = []
        if most:
            own = values[self.live]
            masks = torch.stack([min_max(channel, 0.0, todo.read.values.dtype) for channel in own])
            # The predicted score: the activation masked by each channel, through a linearized head, `<G, A * m_k>`.
            predictions = (slopes[image].double().cpu() * values).sum(1) @ masks.T
            pairs = zip(predictions, zeros)
            self.priors = [gp.prior_of(own, masks, predicted, values[flat], zero) for predicted, zero in pairs]
        self.swept, self.below = torch.empty(0, dtype=torch.long), 0
        self.known = torch.empty(0, len(zeros), dtype=torch.float64)
        self.surprises = torch.empty(0, dtype=torch.float64)
        self._believe()

    def _believe(self) -> None:
        self.beliefs = [gp.believe(prior, self.swept, known) for prior, known in zip(self.priors, self.known.T)]

    def choose(self) -> Tensor:
        """The channels of the next round, as a mask. No channel ends the search.

        With a tolerance, channels are drawn at random in proportion to their stake (Gumbel, without replacement). The errors
        of the posterior on them are then a fair sample of its errors on the others, and widen the stated error.
        """
        chosen = torch.zeros(self.channels, dtype=torch.bool)
        size = min(max(1, int(len(self.live) * gp.ROUND), len(self.swept) // 4), self.most - len(self.swept))
        if size <= 0 or self.below == gp.TWICE:
            return chosen
        each = torch.stack([gp.stakes(prior, now) for prior, now in zip(self.priors, self.beliefs)])
        stake = (each - each.logsumexp(1, keepdim=True)).logsumexp(0)
        if self.limits.tolerance is not None:
            uniform = torch.rand(len(stake), generator=self.generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
            stake = stake - torch.log(-torch.log(uniform))
        stake[self.swept] = -torch.inf
        chosen[self.live[stake.topk(size).indices]] = True
        return chosen

    def learn(self, scores: Tensor, mask: Tensor) -> None:
        """Update the posterior with the scores `(c, t)` of a round."""
        new = mask[self.live].nonzero()[:, 0]
        if not len(new):
            return
        found = scores[self.live[new]]
        off = [(found[:, t] - now.mean[new]).square() / now.variance[new] for t, now in enumerate(self.beliefs)]
        self.surprises = torch.cat([self.surprises, torch.stack(off).amax(0).clamp(max=25.0)])
        self.swept, self.known = torch.cat([self.swept, new]), torch.cat([self.known, found])
        self._believe()
        if self.limits.tolerance is not None:
            self.below = self.below + 1 if float(self.end()[1].amax()) <= self.limits.tolerance else 0

    def end(self) -> tuple[Tensor, Tensor]:
        """Return the swept and the estimated scores `(c, t)`, and the stated error of the map `(t,)`."""
        found, error = torch.zeros(self.channels, self.known.shape[1], dtype=torch.float64), torch.zeros(self.known.shape[1])
        widen, fair = gp.widening(self.surprises), self.limits.tolerance is not None
        for t, (prior, now) in enumerate(zip(self.priors, self.beliefs)):
            found[self.live, t], error[t] = gp.settled(prior, now, widen, fair, self.generator)
        return found, error
