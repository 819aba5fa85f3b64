"""What is believed of scores that were not swept, against textbook formulas written with NumPy and plain loops."""

import math

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from camfn.sweep import gaussian_process as gp
from tests.oracles.closeness import close

CONSTANTS = {**gp.SCORES._asdict(), "slope": gp.SLOPES, "dof": gp.DOF, "least": gp.LEAST}


class World:
    """Channels at `p` positions, their masks, what the head predicts of their scores, and their scores."""

    def __init__(self, seed: int = 0, c: int = 14, p: int = 9, zero: float = -math.inf):
        rng = default_rng(seed)
        self.activation = np.maximum(rng.normal(size=(c, p)) + 0.3, 0) * rng.uniform(0.3, 3, size=(c, 1)) + 1e-3 * rng.random(
            (c, p)
        )
        low, high = self.activation.min(1, keepdims=True), self.activation.max(1, keepdims=True)
        self.mask = (self.activation - low) / (high - low)
        self.prediction = rng.normal(size=c) * 2 + 5
        self.scores = self.prediction + rng.normal(size=c) + 1
        self.flat, self.zero = np.full((0 if zero == -math.inf else 3, p), 0.7), zero

    def prior(self, order=slice(None), times: float = 1.0, more: float = 0.0) -> gp.Prior:
        """With the channels in another order, the activation `times` larger, and the scores of flat channels `more`."""
        arrays = times * self.activation[order], self.mask[order], self.prediction[order], times * self.flat
        return gp.prior_of(*map(torch.from_numpy, arrays), torch.tensor(self.zero + more, dtype=torch.float64))

    def believe(self, swept, order=slice(None), more: float = 0.0, **options) -> tuple[gp.Prior, gp.Belief]:
        """The prior, and the belief after `swept`, which are places in the order."""
        prior, swept = self.prior(order, more=more, **options), torch.tensor(swept, dtype=torch.long)
        return prior, gp.believe(prior, swept, torch.from_numpy(self.scores[order])[swept] + more)


def covariance_of(world: World, linear, smooth, near, apart, **_) -> tuple[np.ndarray, np.ndarray]:
    """The features, and linear plus Matern-3/2, pair by pair."""
    columns = world.prediction, np.log(world.activation.std(1, ddof=1)), world.mask.mean(1)
    features = np.stack([(column - column.mean()) / column.std() for column in columns], 1)
    c = len(features)
    distance = np.array([[((a - b) ** 2).sum() for b in world.mask] for a in world.mask])
    square = near * distance / distance.mean() + apart * np.array([[((a - b) ** 2).sum() for b in features] for a in features])
    matern = [[(1 + math.sqrt(3 * square[i, j])) * math.exp(-math.sqrt(3 * square[i, j])) for j in range(c)] for i in range(c)]
    return features, linear * features @ features.T + smooth * np.array(matern)


def regression(
    world: World, swept: list[int], slope, noise, dof, broad, least, **constants
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gaussian-process regression with an unknown constant and an inverse-gamma scale (Rasmussen and Williams, 2.25 to 2.26;
    Shah et al., 2014): mean, covariance of the scores as they would be observed, and scale, of all channels."""
    features, kernel = covariance_of(world, **constants)
    unit, c = max(least, world.prediction.std()), len(features)
    mean, rest = features @ np.array(slope), [k for k in range(c) if k not in swept]
    residual = world.scores[swept] / unit - mean[swept]
    centre = residual.mean()
    kernel = kernel + broad
    inverse = np.linalg.inv(kernel[np.ix_(swept, swept)] + noise * np.eye(len(swept)))
    scale = (dof + (residual - centre) @ inverse @ (residual - centre)) / (dof + len(swept)) * unit**2
    found, covariance = world.scores.copy(), np.zeros((c, c))
    across = kernel[np.ix_(rest, swept)]
    found[rest] = unit * (mean[rest] + centre + across @ inverse @ (residual - centre))
    left = kernel[np.ix_(rest, rest)] - across @ inverse @ across.T + noise * np.eye(len(rest))
    covariance[np.ix_(rest, rest)] = scale * left
    return found, covariance, scale


@pytest.mark.parametrize("swept", [[3], [0, 5], [9, 2, 7, 1, 12, 4], [*range(1, 14)]])
@pytest.mark.parametrize("seed", range(3))
def test_the_posterior_is_that_of_the_textbook(seed, swept):
    world = World(seed)
    _, now = world.believe(swept)
    mean, covariance, _ = regression(world, swept, **CONSTANTS)
    # The constant's variance is 1000 beside terms of 0.05, so some digits go.
    np.testing.assert_allclose(now.mean.numpy(), mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(now.covariance.numpy(), covariance, rtol=0, atol=1e-7 * covariance.max())
    assert now.unswept.tolist() == [k for k in range(14) if k not in swept]
    assert now.dof == CONSTANTS["dof"] + len(swept)


def test_the_predictions_alone_are_believed_before_the_first_score():
    world = World(1)
    _, now = world.believe([])
    features, kernel = covariance_of(world, **CONSTANTS)
    unit = world.prediction.std()
    close(now.mean, torch.as_tensor(unit * features @ np.array(CONSTANTS["slope"])))
    expected = unit**2 * (kernel + CONSTANTS["noise"] * np.eye(14))  # the unknown constant cancels in the weights
    np.testing.assert_allclose(now.covariance.numpy(), expected, atol=1e-9)
    assert now.unswept.tolist() == list(range(14))


def test_a_prediction_that_tells_nothing_does_not_make_the_belief_narrow():
    """A target without a slope: all predictions are 0, and the scores may differ all the same."""
    world = World(1)
    world.prediction[:] = 0
    world.scores[:] = 7.0
    for swept in ([], [3], [3, 5]):
        assert (world.believe(swept)[1].variance[[1, 2]] > 0.2**2).all()


@pytest.mark.parametrize("swept", [[4], [1, 8, 3], list(range(14))])
def test_what_was_swept_is_known_exactly(swept):
    world = World(2)
    prior, now = world.believe(swept)
    assert now.mean[swept].tolist() == world.scores[swept].tolist()
    assert not now.covariance[swept].any()
    assert not now.covariance[:, swept].any()
    assert not now.variance[swept].any()
    scores, _ = gp.settled(prior, now, 1.0, True, torch.Generator().manual_seed(0))
    assert scores[swept].tolist() == world.scores[swept].tolist()


def test_nothing_is_left_to_doubt_once_all_are_swept():
    world = World(3)
    prior, now = world.believe(list(range(14))[::-1])
    scores, error = gp.settled(prior, now, 5.0, True, torch.Generator().manual_seed(0))
    assert error == 0
    assert scores.tolist() == world.scores.tolist()
    assert not len(now.unswept)


def test_the_more_is_swept_the_less_is_doubted():
    """Where the scores are what the prior mean says there is no surprise, and the variance falls for every channel."""
    world = World(4)
    prior = world.prior()
    world.scores = (prior.mean * prior.unit + 3).numpy()
    before = torch.full((14,), math.inf, dtype=torch.float64)
    for n in range(1, 15):
        _, now = world.believe(list(range(n)))
        assert (now.variance <= before + 1e-10).all()
        assert torch.linalg.eigvalsh(now.covariance).min() > -1e-8
        before = now.variance


def test_surprise_widens_the_belief():
    world = World(4)
    world.scores = (world.prior().mean * world.prior().unit).numpy()
    calm = world.believe([0, 3, 6])[1].variance
    world.scores[[0, 6]] += [9.0, -9.0]
    assert (world.believe([0, 3, 6])[1].variance[1] > 2 * calm[1]).item()


@pytest.mark.parametrize("more", [1000.0, -1000.0])
@pytest.mark.parametrize("zero", [-math.inf, 4.0])
def test_a_constant_added_to_all_scores_moves_no_map(zero, more):
    world, swept = World(5, zero=zero), [1, 4, 9]
    (prior, now), (prior2, now2) = world.believe(swept), world.believe(swept, more=more)
    assert torch.allclose(now2.mean, now.mean + more, atol=1e-8)
    assert torch.allclose(now2.covariance, now.covariance, atol=1e-8)
    assert torch.allclose(gp.drawn(prior2, now2.mean[None]), gp.drawn(prior, now.mean[None]), atol=1e-9)
    ends = [gp.settled(*pair, 1.0, True, torch.Generator().manual_seed(0)) for pair in ((prior, now), (prior2, now2))]
    assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-7)
    assert torch.allclose(ends[1][0], ends[0][0] + more, atol=1e-6)


@pytest.mark.parametrize("times", [1e-6, 8.0, 1e6])
def test_a_larger_activation_gives_the_same_belief(times):
    world, swept = World(6, zero=4.0), [1, 4, 9]
    (prior, now), (prior2, now2) = world.believe(swept), world.believe(swept, times=times)
    assert torch.allclose(now2.mean, now.mean, atol=1e-8)
    assert torch.allclose(now2.covariance, now.covariance, atol=1e-8)
    (_, error), (_, error2) = (
        gp.settled(*pair, 1.0, False, torch.Generator().manual_seed(0)) for pair in ((prior, now), (prior2, now2))
    )
    assert error2 == pytest.approx(error, abs=1e-7)
    moved = gp.stakes(prior2, now2) - gp.stakes(prior, now)
    assert torch.allclose(moved, moved.new_tensor(math.log(times)), atol=1e-6)


def test_the_order_of_channels_is_of_no_account():
    world, order = World(7), default_rng(0).permutation(14)
    place = [list(order).index(k) for k in (1, 4, 9)]
    (prior, now), (prior2, now2) = world.believe([1, 4, 9]), world.believe(place, order=order)
    assert torch.allclose(now2.mean, now.mean[order], atol=1e-8)
    assert torch.allclose(now2.covariance, now.covariance[order][:, order], atol=1e-8)
    assert torch.allclose(gp.stakes(prior2, now2), gp.stakes(prior, now)[order], atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- maps


def map_of(world: World, scores: np.ndarray) -> np.ndarray:
    """`relu(sum_k exp(S_k) A_k)`, min-max, one position at a time; flat channels count with the score of zeros."""
    top = max([*scores, world.zero])
    raw = []
    for p in range(world.activation.shape[1]):
        total = sum(math.exp(world.zero - top) * value for value in world.flat[:, p])
        for k, score in enumerate(scores):
            total += math.exp(score - top) * world.activation[k, p]
        raw.append(max(total, 0.0))
    low, high = min(raw), max(raw)
    return np.array([(value - low) / (high - low) if high > low else 0.0 for value in raw])


@pytest.mark.parametrize("zero", [-math.inf, 6.0, 1e4])
@pytest.mark.parametrize("away", [0.0, 5000.0, -5000.0])
def test_maps_are_drawn_as_defined(zero, away):
    world = World(8, zero=zero if zero == -math.inf else zero + away)
    rng = default_rng(1)
    world.activation -= 0.5  # so that the ReLU has work
    world.flat[:, 0] -= 1  # no rounding would leave it flat, but which position is which then shows
    scores = rng.normal(size=(5, 14)) * [[0.0], [1.0], [3.0], [30.0], [300.0]] + away
    found = gp.drawn(world.prior(), torch.from_numpy(scores)).numpy()
    for ours, theirs in zip(found, (map_of(world, row) for row in scores)):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_a_map_that_is_nowhere_positive_is_zeros():
    world = World(8)
    prior = world.prior()._replace(activation=-torch.from_numpy(world.activation))
    assert not gp.drawn(prior, torch.from_numpy(world.scores)[None]).any()


def test_a_channel_that_is_the_map_has_nothing_at_stake():
    world = World(9)
    world.activation -= world.activation.min(1, keepdims=True)
    prior, now = world.believe([0, 1, 2])
    alone = now._replace(mean=now.mean.index_fill(0, torch.tensor(5), 40.0))  # it carries the map alone
    assert gp.stakes(prior, alone)[5] < 40 - 20
    more = alone._replace(mean=alone.mean.index_add(0, torch.tensor([6, 7]), torch.tensor([2.0, -3.0]).double()))
    moved = gp.stakes(prior, more) - gp.stakes(prior, alone)
    assert moved[[6, 7]].tolist() == pytest.approx([2, -3], abs=1e-6)  # the others count by their weight


# ------------------------------------------------------------------------------------------- scores settled, and the error


def draws(now: gp.Belief, widen: float, count: int, student: bool, seed: int = 0) -> np.ndarray:
    """Independent joint draws of all scores, by NumPy's samplers and an eigendecomposition."""
    rng = default_rng(seed)
    level, vectors = np.linalg.eigh(now.covariance.numpy())
    normal = rng.normal(size=(count, len(level))) * np.sqrt(np.maximum(level, 0)) @ vectors.T
    if student:
        normal *= widen * np.sqrt(now.dof / rng.chisquare(now.dof, size=(count, 1)))
    return now.mean.numpy() + normal


@pytest.mark.parametrize("widen", [1.0, 2.5])
@pytest.mark.parametrize("swept", [[3], [0, 5, 8, 11, 2, 6]])
def test_the_error_is_the_quantile_that_brute_force_finds(swept, widen):
    world = World(10)
    world.scores, world.prediction = world.scores / 2, world.prediction / 2
    prior, now = world.believe(swept)
    drawn = np.stack([map_of(world, row) for row in draws(now, widen, 4000, student=True)])
    stated, true = [], []
    for seed in range(40):
        scores, error = gp.settled(prior, now, widen, True, torch.Generator().manual_seed(seed))
        stated.append(error)
        true.append(np.quantile(np.abs(drawn - map_of(world, scores.numpy())).max(1), 0.95))
    assert 0.05 < np.mean(true) < 0.999  # there is something to tell apart
    assert np.mean(stated) == pytest.approx(np.mean(true), abs=0.02)


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("zero", [-math.inf, 3.0])
def test_scores_are_settled_at_the_mean_of_the_softmaxes(zero, fair):
    """After a fair sample with the doubt that was seen; after a greedy one with that of the belief alone."""
    world, swept = World(11, zero=zero), [0, 5, 8]
    world.scores, world.prediction = world.scores / 2, world.prediction / 2
    prior, now = world.believe(swept)
    sampled = np.exp(draws(now, 2.0, 40000, student=fair))
    share = (sampled / (sampled.sum(1, keepdims=True) + len(world.flat) * math.exp(zero))).mean(0)
    found = torch.stack([gp.settled(prior, now, 2.0, fair, torch.Generator().manual_seed(s))[0] for s in range(60)])
    relative = found - found[:, swept[:1]]
    expected = np.log(share / share[swept[0]])
    np.testing.assert_allclose(relative.exp().mean(0).log().numpy(), expected, atol=0.05)


def test_a_swept_score_far_below_the_others_spoils_none():
    """Its softmax underflows; the constant that makes the swept scores exact again must not come from there."""
    world = World(12)
    prior, now = world.believe([0, 5, 8])
    now_far = now._replace(mean=now.mean.index_fill(0, torch.tensor(5), -3000.0))
    ends = [gp.settled(prior, b, 1.0, True, torch.Generator().manual_seed(0))[0] for b in (now, now_far)]
    assert ends[1][5] == -3000
    rest = [k for k in range(14) if k != 5]
    assert torch.allclose(ends[1][rest] - ends[1][0], ends[0][rest] - ends[0][0], atol=0.5)


def test_the_same_generator_gives_the_same_error():
    world = World(13)
    prior, now = world.believe([2, 6])
    first, second, other = (gp.settled(prior, now, 1.0, True, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first[1] == second[1]
    assert torch.equal(first[0], second[0])
    assert first[1] != other[1]


@pytest.mark.parametrize(
    ("surprises", "expected"),
    [
        ([], 1.0),
        ([1.0] * 20, 1.0),
        ([0.0] * 20, 1.0),
        ([25.0] * 4, 3.0),
        ([25.0] * 16 + [1.0] * 16, 1.0),
        ([1.0] * 8 + [3.0] * 8, 2**0.5),
    ],
)
def test_late_surprises_widen_and_a_calm_end_does_not_narrow(surprises, expected):
    assert gp.widening(torch.tensor(surprises, dtype=torch.float64)) == pytest.approx(expected)


def test_one_channel_and_equal_channels_are_no_trouble():
    for world in (World(14, c=1), World(14, c=5)):
        world.activation[:], world.mask[:], world.prediction[:] = world.activation[0], world.mask[0], 2.0
        for swept in ([], [0]):
            prior, now = world.believe(swept)
            scores, error = gp.settled(prior, now, 1.0, True, torch.Generator().manual_seed(0))
            assert torch.isfinite(scores).all()
            assert torch.isfinite(gp.stakes(prior, now)).all()
            assert error == pytest.approx(0, abs=1e-9)  # whatever the weights are, the map is the one channel


# ------------------------------------------------------------------------------------------------- fewer draws of noise


def noisy(rng, images: int, c: int, total: int, between: float, spread: float) -> torch.Tensor:
    """Scores `(draws, images, c, 1)` around each channel's own mean."""
    own = rng.normal(size=(1, images, c, 1)) * between + 4
    return torch.from_numpy(own + rng.normal(size=(total, images, c, 1)) * spread)


def shrunk_by(scores: torch.Tensor, done: int, values: torch.Tensor, swept: torch.Tensor | None = None):
    """What is made of the first so many draws."""
    swept = torch.ones(scores.shape[1:3], dtype=torch.bool) if swept is None else swept
    return gp.shrunk(scores[:done], swept, values, len(scores), 0)


def shrunk_by_hand(draws: np.ndarray, total: int) -> np.ndarray:
    """The expected mean over `total` draws of each channel `(d, c)`, by analysis of variance with one factor."""
    done, c = draws.shape
    mean = [sum(draws[:, k]) / done for k in range(c)]
    centre = sum(mean) / c
    noise = sum(sum((draws[i, k] - mean[k]) ** 2 for i in range(done)) / (done - 1) for k in range(c)) / c
    signal = max(0.0, sum((m - centre) ** 2 for m in mean) / c - noise / done)
    # Cov(mean of d, mean of all) = v + s2 / total, since the first d are among all.
    return np.array([centre + (signal + noise / total) / (signal + noise / done) * (m - centre) for m in mean])


@pytest.mark.parametrize(("between", "spread"), [(1.0, 0.3), (0.5, 2.0), (0.0, 2.0)])
def test_fewer_draws_are_shrunk_as_the_analysis_of_variance_says(between, spread):
    rng = default_rng(5)
    scores, values = noisy(rng, 2, 12, 20, between, spread), torch.from_numpy(rng.random((2, 12, 9)))
    for done in (2, 5, 20):
        ours, _ = shrunk_by(scores, done, values)
        for i in range(2):
            np.testing.assert_allclose(ours[i, :, 0].numpy(), shrunk_by_hand(scores[:done, i, :, 0].numpy(), 20), atol=1e-10)


def test_shrunk_scores_are_nearer_to_the_mean_of_all_draws():
    rng = default_rng(0)
    for between, spread in ((1.0, 0.3), (0.5, 2.0), (0.05, 2.0)):
        scores, values = noisy(rng, 60, 30, 20, between, spread), torch.from_numpy(rng.random((60, 30, 9)))
        mean, truth = scores[:4].mean(0), scores.mean(0)
        off = [float((guess - truth).square().mean()) for guess in (shrunk_by(scores, 4, values)[0], mean, mean.mean(1, True))]
        assert off[0] <= 1.05 * min(off[1:])  # no worse than either of what it lies between


@pytest.mark.parametrize(("between", "spread"), [(1.0, 0.3), (0.5, 2.0), (0.5, 0.5)])
def test_the_error_of_fewer_draws_covers_the_true_one(between, spread):
    rng = default_rng(1)
    scores, values = noisy(rng, 120, 30, 20, between, spread), torch.from_numpy(rng.random((120, 30, 9)))
    ours, error = shrunk_by(scores, 5, values)

    def maps(of):
        raw = torch.einsum("nc,ncp->np", torch.softmax(of[..., 0], 1), values)
        return (raw - raw.amin(1, keepdim=True)) / (raw.amax(1, keepdim=True) - raw.amin(1, keepdim=True))

    true = (maps(ours) - maps(scores.mean(0))).abs().amax(1)
    assert (true <= error[:, 0]).double().mean() >= 0.9
    assert error.median() < 5 * true.median()  # and is of use


def test_all_draws_or_no_noise_leave_nothing_open():
    rng = default_rng(2)
    scores, values = noisy(rng, 2, 10, 8, 1.0, 1.0), torch.from_numpy(rng.random((2, 10, 9)))
    ours, error = shrunk_by(scores, 8, values)
    close(ours, scores.mean(0))
    close(error, torch.zeros_like(error), size=scores.abs().max())
    ours, error = shrunk_by(scores[:1].expand(8, -1, -1, -1), 3, values)
    assert torch.allclose(ours, scores[0], atol=1e-9)
    assert error.abs().max() < 1e-6


def test_one_draw_tells_no_noise_from_signal_and_says_so():
    rng = default_rng(4)
    scores, values = noisy(rng, 40, 30, 20, 0.0, 1.0), torch.from_numpy(rng.random((40, 30, 9)))
    ours, error = shrunk_by(scores, 1, values)
    assert ours.std(1).mean() < 0.5  # of a standard deviation of 1, all of it noise
    assert (error > 0.05).all()


def test_large_scores_with_little_noise_do_not_cancel():
    """Logits of 10000 in float32 have a step of 0.001: the variance is that of differences, not of squares."""
    rng = default_rng(6)
    scores, values = noisy(rng, 2, 12, 10, 1.0, 0.1), torch.from_numpy(rng.random((2, 12, 9)))
    found = [shrunk_by((scores + more).to(dtype), 4, values) for more, dtype in ((0, torch.float64), (1e4, torch.float32))]
    assert torch.allclose(found[1][0].double() - 1e4, found[0][0], atol=5e-3)
    assert torch.allclose(found[1][1].double(), found[0][1], atol=5e-3)


def test_fewer_draws_judge_each_image_by_the_channels_that_were_swept():
    rng = default_rng(3)
    scores, values = noisy(rng, 3, 10, 8, 0.5, 1.0), torch.from_numpy(rng.random((3, 10, 9)))
    swept = torch.from_numpy(rng.random((3, 10)) > 0.3)
    ours, error = shrunk_by(scores, 3, values, swept)
    other, _ = shrunk_by(torch.where(swept[..., None], scores, 50.0), 3, values, swept)
    assert torch.equal(other[swept], ours[swept])
    for i in range(3):
        one, its = shrunk_by(scores[:, i : i + 1], 3, values[i : i + 1], swept[i : i + 1])
        close(one[0][swept[i]], ours[i][swept[i]])
        assert torch.allclose(its[0], error[i], atol=1e-9)
        expected = shrunk_by_hand(scores[:3, i, swept[i], 0].numpy(), 8)
        np.testing.assert_allclose(ours[i, swept[i], 0].numpy(), expected, atol=1e-10)
