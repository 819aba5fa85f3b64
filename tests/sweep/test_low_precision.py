"""Sweeps in a narrow dtype: what is scored again, that the map is as near as stated, and what does not run in it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from torch import Tensor, nn

import camfn
from camfn import Sweep, _compat
from camfn.sweep import gaussian_process as gp
from camfn.sweep import low_precision
from tests.oracles.closeness import assert_close
from tests.oracles.libraries import real_networks
from tests.oracles.networks import inputs, small_net

T = camfn.targets
BF16, FP16 = Sweep(dtype=torch.bfloat16), Sweep(dtype=torch.float16)
SWEPT = {"score_cam": {}, "ss_cam": {"num_samples": 3, "std": 0.5}, "is_cam": {"num_samples": 3}}
ROWS: list[torch.dtype] = []
"""The dtypes of the rows that `Told` was shown; not in the model, whose lists are copied."""


@pytest.fixture
def fast(monkeypatch):
    """A device that has instructions for every narrow dtype: the values are the same without them."""
    monkeypatch.setattr(_compat, "is_fast", lambda dtype, device: True)


def net_and_x(seed: int = 0, channels: int = 40, n: int = 2, **options) -> tuple[nn.Module, Tensor]:
    single = {"dtype": torch.float32, **options}
    return small_net(seed, channels=channels, **single), inputs(n, seed=seed + 1, dtype=single["dtype"])


def card(net: nn.Module, x, target=3, method: str = "score_cam", layer="features", **options):
    return camfn.explain(net, layer, x, target, method=method, **{**SWEPT[method], **options})


# ------------------------------------------------------------------------------------------ where it would be no faster


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("sweep", [BF16, FP16])
def test_without_instructions_for_it_a_warning_says_so_and_the_sweep_is_the_plain_one(monkeypatch, method, sweep):
    monkeypatch.setattr(_compat, "is_fast", lambda dtype, device: False)
    net, x = net_and_x()
    plain = card(net, x, T.top(2), method)
    with pytest.warns(camfn.CamWarning, match=rf"dtype={sweep.dtype}.*cpu has no instructions.*left out") as told:
        found = card(net, x, T.top(2), method, sweep=sweep)
    assert len(told) == 1
    assert torch.equal(found.maps, plain.maps)
    assert torch.equal(found.weights[0], plain.weights[0])
    assert found.forwards == plain.forwards
    assert found.errors == (None,)


def test_what_a_device_has_is_asked_of_it_and_never_said_of_an_unknown_one():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
        assert isinstance(_compat.is_fast(dtype, torch.device("cpu")), bool)
        assert not _compat.is_fast(dtype, torch.device("meta"))
    assert not _compat.is_fast(torch.int8, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_input_itself_is_the_plain_sweep(fast, dtype):
    net, x = net_and_x(dtype=dtype)
    plain, found = card(net, x), card(net, x, sweep=Sweep(dtype=dtype))
    assert torch.equal(found.maps, plain.maps)
    assert found.errors == (None,)


def test_under_a_transform_it_is_left_out_without_a_word(monkeypatch):
    net, x = net_and_x(channels=6)
    for is_fast in (True, False):
        monkeypatch.setattr(_compat, "is_fast", lambda dtype, device, found=is_fast: found)
        for make in (torch.func.vmap, torch.func.grad):
            results = []
            for sweep in (Sweep(), BF16):

                def maps(x, sweep=sweep, make=make):
                    found = camfn.score_cam(net, "features", x[None] if x.ndim == 3 else x, 3, sweep=sweep)
                    return found if make is torch.func.vmap else found.square().sum()

                results.append(make(maps)(x))
            assert torch.equal(*results)


# -------------------------------------------------------------------------------------------- scored again, by a plain loop


class Made:
    """Scores that are known, and the same with an offset and noise, as a narrow dtype has them: each channel's own, or `alike`
    where masks are."""

    def __init__(
        self,
        seed: int = 0,
        n: int = 2,
        c: int = 30,
        t: int = 2,
        p: int = 9,
        noise: float = 0.05,
        sharp: float = 1.5,
        alike: bool = False,
    ):
        rng = default_rng(seed)
        self.full = rng.normal(size=(n, c, t)) * sharp + 10
        self.values = np.maximum(rng.normal(size=(n, c, p)), -0.2)
        off = rng.normal(size=(n, c, t)) * noise
        if alike:
            off = noise * masks_of(self.values) @ rng.normal(size=(n, p, t))
        self.narrow = self.full - 0.3 + off
        self.alive = rng.random((n, c)) > 0.15
        self.narrow[~self.alive] = self.full[~self.alive]  # what flat channels share is scored in full
        self.asked: list[np.ndarray] = []

    def exact(self, chosen: Tensor) -> Tensor:
        self.asked.append(chosen.numpy().copy())
        return torch.where(chosen[..., None], torch.from_numpy(self.full), torch.nan)

    def refined(self, weighting: str = "softmax") -> tuple[np.ndarray, int, np.ndarray]:
        tensors = map(torch.from_numpy, (self.narrow, self.values, self.alive))
        scores, again, error = low_precision.refine(*tensors, self.exact, weighting)
        return scores.numpy(), again, error.numpy()

    def true(self, scores: np.ndarray) -> float:
        """The error of the first map of the first image."""
        maps = [map_of(s[0, :, 0], self.values[0], "softmax") for s in (scores, self.full)]
        ours, theirs = ((np.maximum(raw, 0) - np.maximum(raw, 0).min()) / (span or 1) for _, raw, span in maps)
        return np.abs(ours - theirs).max()


def masks_of(values: np.ndarray) -> np.ndarray:
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1)


def map_of(scores: np.ndarray, values: np.ndarray, weighting: str) -> tuple[np.ndarray, np.ndarray, float]:
    """For one image and target: the weights, the raw map, and what its min-max divides by."""
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() if weighting == "softmax" else scores
    raw = weights @ values
    return weights, raw, np.ptp(np.maximum(raw, 0))


def slopes(scores: np.ndarray, values: np.ndarray, weighting: str) -> np.ndarray:
    """How the raw map moves with each score, `(c, p)`, by differences."""
    step, found = 1e-6, []
    for k in range(len(scores)):
        moved = [map_of(scores + sign * step * (np.arange(len(scores)) == k), values, weighting)[1] for sign in (1, -1)]
        found.append((moved[0] - moved[1]) / (2 * step))
    return np.array(found)


def covariance_by_hand(values: np.ndarray, narrow: np.ndarray) -> np.ndarray:
    """What the rounding of the channels is believed to have in common, entry by entry."""
    masks, c = masks_of(values), len(values)
    square = [[((masks[k] - masks[j]) ** 2).sum() for j in range(c)] for k in range(c)]
    mean, size = np.mean(square), np.mean([((mask - masks.mean(0)) ** 2).sum() for mask in masks])
    found, slope, centred = np.zeros((c, c)), (narrow - narrow.mean()) / narrow.std(), masks - masks.mean(0)
    for k in range(c):
        for j in range(c):
            root = math.sqrt(3 * gp.ROUNDING.near * square[k][j] / mean)
            linear = centred[k] @ centred[j] / size
            smooth = (1 + root) * math.exp(-root) + gp.ROUNDING.linear * linear + gp.ALONG * slope[k] * slope[j]
            found[k, j] = smooth + gp.ROUNDING.broad + gp.ROUNDING.noise * (k == j)
    return found


def refine_by_hand(narrow, full, values, alive, weighting: str):
    """One image `(c, t)`: score those with the most influence again, until the rest is below the goal or it is too many."""
    (c, t), done, order = narrow.shape, [], []
    scores, live = narrow.copy(), np.flatnonzero(alive)
    kernels = [covariance_by_hand(values[live], narrow[live, j]) for j in range(t)]
    while True:
        others = [k for k in live if k not in done]
        error, influence = np.zeros(t), np.zeros(c)
        for j in range(t):
            a, b = (np.searchsorted(live, part).astype(int) for part in (done, others))
            kernel, seen = kernels[j], full[done, j] - narrow[done, j]
            centre, sigma, left = 0.0, math.inf, kernel[np.ix_(b, b)]
            if done:
                centre, inverse = seen.mean(), np.linalg.inv(kernel[np.ix_(a, a)])
                across = kernel[np.ix_(b, a)]
                scores[others, j] = narrow[others, j] + centre + across @ inverse @ (seen - centre)
                free = len(done) - 1
                sigma = math.sqrt((seen - centre) @ inverse @ (seen - centre) / free) * (1 + 2.5 / free)
                left = left - across @ inverse @ across.T
            raw, span = map_of(scores[:, j], values, weighting)[1:]
            moved = slopes(scores[:, j], values, weighting)[others]
            influence[others] = np.maximum(influence[others], np.abs(moved).max(1) / np.abs(raw).max())
            error[j] = min(1, 3 * sigma * math.sqrt(max(np.diag(moved.T @ left @ moved))) / span)
        step = min(max(8, math.ceil(len(live) / 4)) - len(done), max(8, c * t // 40, len(done) // 2))
        if error.max() <= gp.GOAL or step <= 0:
            return scores, order, error
        first = sorted(others, key=lambda k: -influence[k])[:step]
        order.append(sorted(first))
        done = sorted(done + first)
        scores[first] = full[first]


@pytest.mark.parametrize("weighting", ["softmax", "score"])
@pytest.mark.parametrize(("seed", "noise", "c"), [(0, 0.05, 30), (1, 0.2, 60), (2, 0.005, 60), (3, 3.0, 40)])
def test_refining_is_the_plain_loop(seed, noise, c, weighting):
    made = Made(seed, c=c, noise=noise if weighting == "softmax" else 10 * noise)
    scores, again, error = made.refined(weighting)
    hands = [
        refine_by_hand(*(part[i] for part in (made.narrow, made.full, made.values, made.alive)), weighting) for i in range(2)
    ]
    for i, (by_hand, order, its) in enumerate(hands):
        np.testing.assert_allclose(scores[i], by_hand, atol=1e-9)
        np.testing.assert_allclose(error[i], its, rtol=1e-4, atol=1e-7)
        asked = [np.flatnonzero(chosen[i]).tolist() for chosen in made.asked if chosen[i].any()]
        assert asked == order
    assert again == sum(len(part) for _, order, _ in hands for part in order)


@pytest.mark.parametrize(("t", "counts"), [(1, [10, 10, 10, 15]), (3, [30, 30, 30, 10])])
def test_how_many_are_scored_again_at_a_time(t, counts):
    made = Made(4, n=1, c=400, t=t, noise=0.5, sharp=0.3)
    made.alive[:] = True
    made.refined()
    assert [int(chosen.sum()) for chosen in made.asked[: len(counts)]] == counts


@pytest.mark.parametrize(("c", "most"), [(400, 100), (10, 8), (5, 5)])
def test_a_quarter_of_the_channels_at_most_and_the_error_is_stated(c, most):
    made = Made(5, n=1, c=c, noise=1.0, sharp=0.3)
    made.alive[:], made.narrow = True, made.full + default_rng(0).normal(size=made.full.shape)
    scores, again, error = made.refined()
    assert again == most
    if most < c:
        assert gp.GOAL < made.true(scores) <= error[0, 0] <= 1
    else:
        np.testing.assert_array_equal(scores, made.full)
        assert not error.any()


def test_an_offset_alone_is_taken_off():
    made = Made(6, noise=0.0)
    scores, again, error = made.refined()
    np.testing.assert_allclose(scores[made.alive], made.full[made.alive], atol=1e-9)
    assert again == 16  # the first eight of each image tell
    assert error.max() < 1e-6


def test_what_masks_that_are_alike_are_off_by_is_taken_off():
    """The mean alone would leave all of it."""
    left = []
    for seed in range(10):
        made = Made(seed, n=1, t=1, c=200, noise=0.3, alike=True)
        scores, _, _ = made.refined()
        rest = made.alive & (scores != made.full)[..., 0]
        left.append(np.std((scores - made.full)[rest]) / np.std((made.narrow - made.full)[rest]))
    assert np.mean(left) < 0.6


def test_an_image_that_is_good_enough_is_left_alone():
    made = Made(7, c=80, noise=0.5)
    made.narrow[0] = made.full[0] - 0.3
    made.refined()
    assert sum(chosen[0].any() for chosen in made.asked) == 1
    assert sum(chosen[1].any() for chosen in made.asked) > 1


def test_none_alive_or_one_is_no_trouble():
    made = Made(8)
    made.alive[0], made.alive[1] = False, np.arange(30) == 4
    made.narrow[~made.alive] = made.full[~made.alive]
    scores, again, error = made.refined()
    assert again == 1
    assert not error.any()
    np.testing.assert_array_equal(scores, made.full)


def test_the_scores_that_are_given_are_left_as_they_are():
    made = Made(9)
    before = made.narrow.copy()
    made.refined()
    np.testing.assert_array_equal(made.narrow, before)


@pytest.mark.parametrize(("depth", "stated"), [(0.01, 1.0), (5.0, 0.0)])
def test_where_nothing_of_the_map_is_positive(depth, stated):
    """Then its error is all or nothing: may some of it be positive in truth?"""
    made = Made(10, n=1, t=1, c=100, noise=0.2)
    _, raw, _ = map_of(made.narrow[0, :, 0], made.values[0], "softmax")
    made.values -= raw.max() + depth
    _, again, error = made.refined()
    assert error.item() == stated
    assert again == (math.ceil(made.alive.sum() / 4) if stated else 8)


@pytest.mark.parametrize(("noise", "sharp"), [(0.05, 1.5), (0.2, 0.5), (0.02, 3.0)])
@pytest.mark.parametrize("alike", [False, True])
def test_the_stated_error_bounds_the_true_one_of_made_up_scores(noise, sharp, alike):
    held = []
    for seed in range(60):
        made = Made(seed, n=1, t=1, c=60, noise=noise, sharp=sharp, alike=alike)
        scores, _, error = made.refined()
        held.append(made.true(scores) <= error.max() + 1e-9)
    assert np.mean(held) >= 0.93


# -------------------------------------------------------------------------------------------------------- in a sweep


class Told(nn.Module):
    """Says in what dtype it was run, for each row."""

    def __init__(self, seed: int = 0, channels: int = 40):
        super().__init__()
        self.net = small_net(seed, channels=channels, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        ROWS.extend([x.dtype] * len(x))
        return self.net(x)


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("sweep", [BF16, FP16])
@pytest.mark.parametrize("recipe", ["torchcam", "authors"])
def test_the_map_is_within_the_stated_error(fast, method, sweep, recipe):
    held, again, draws = [], [], SWEPT[method].get("num_samples", 1)
    for seed in range(8):
        net, x = net_and_x(seed, n=1)
        plain, found = (card(net, x, 3, method, recipe=recipe, **options) for options in ({}, {"sweep": sweep}))
        assert found.errors[0].shape == (1, 1)
        true, stated = float((found.maps - plain.maps).abs().max()), float(found.errors[0])
        held.append(true <= stated + 1e-5)
        again.append((found.forwards - plain.forwards) / draws)
        assert again[-1] <= 10
        assert stated <= gp.GOAL or again[-1] == 10  # good enough, or a quarter of the channels
    assert sum(held) >= 7
    assert sum(again)  # it is the refinement that was tested


def test_bfloat16_without_scoring_again_is_farther_off(fast, monkeypatch):
    """Logits of 30 and more have a step of 0.125 in it: the map moves by more than the goal, also after a quarter."""
    off = {}
    for goal in ("as it is", math.inf):
        if goal == math.inf:
            monkeypatch.setattr(gp, "GOAL", goal)
        off[goal] = []
        for seed in range(6):
            net, x = net_and_x(seed, channels=96, n=1)
            with torch.no_grad():
                net.fc.bias += 30
            off[goal].append(float((card(net, x, sweep=BF16).maps - card(net, x).maps).abs().max()))
    assert sum(off["as it is"]) < 0.6 * sum(off[math.inf])
    assert max(off["as it is"]) < 0.08 < max(off[math.inf])


@pytest.mark.parametrize("method", SWEPT)
def test_the_sweep_runs_in_it_and_the_rest_in_full(fast, method):
    net, x = Told(), inputs(2, dtype=torch.float32)
    sweep, draws = BF16._replace(fold=True, chunk=7), SWEPT[method].get("num_samples", 1)
    card(net, x, 3, method, "net.features", sweep=sweep)
    ROWS.clear()
    found = card(net, x, 3, method, "net.features", sweep=sweep)
    narrow, full = ROWS.count(torch.bfloat16), ROWS.count(torch.float32)
    assert narrow - 1 <= 80 * draws <= narrow  # and one row to see that it runs
    assert found.forwards - 2 - 80 * draws == draws * round((found.forwards - 2 - 80 * draws) / draws)
    assert 0 < found.forwards - 80 * draws <= full <= found.forwards - 80 * draws + 2


def test_the_row_of_the_flat_channels_is_scored_in_full(fast):
    """It stands for many channels. Their scores and those scored again differ from the plain ones by one constant."""
    net, x = net_and_x(n=1)
    with torch.no_grad():
        net.features.weight[:12] = 0
        net.fc.bias += 30.17  # which bfloat16 rounds
    logs = [card(net, x, layer="act", sweep=sweep).weights[0][0, 0].log() for sweep in (Sweep(), BF16)]
    off = logs[1] - logs[0]
    again = (off - off[0]).abs() < 2e-5
    assert again[:12].all()
    assert 8 <= int(again[12:].sum()) < 28


def test_a_budget_in_a_narrow_dtype(fast):
    off = []
    for seed in range(4):
        net, x = net_and_x(seed, channels=64, n=1)
        plain, some, narrow = (card(net, x, **o) for o in ({}, {"budget": 0.4}, {"budget": 0.4, "sweep": BF16}))
        true = float((narrow.maps - plain.maps).abs().max())
        assert true <= float(narrow.errors[0]) + 1e-5
        assert float(some.errors[0]) / 2 < float(narrow.errors[0]) < 2 * float(some.errors[0]) + 0.02
        assert narrow.forwards <= plain.forwards
        for order in ("std", "max", "gradient"):
            wide, slim = (card(net, x, budget=0.4, order=order, sweep=s) for s in (Sweep(), BF16))
            off.append(float((slim.maps - wide.maps).abs().max()))
            assert slim.errors == wide.errors == (None,)  # nothing is known of what was left out
    assert sorted(off)[6] < 0.02  # of 25 channels 8 are scored again
    assert max(off) < 0.08


def test_errors_that_add_up_stay_within_the_map(fast):
    net, x = net_and_x(3, channels=150, n=1)
    with torch.no_grad():
        net.fc.bias += 30
    assert float(card(net, x, budget=0.1, sweep=BF16).errors[0]) == 1


@pytest.mark.parametrize("method", SWEPT)
def test_a_tolerance_in_a_narrow_dtype(fast, method):
    net, x = net_and_x(channels=32)
    plain, narrow = card(net, x, T.top(2), method), card(net, x, T.top(2), method, tolerance=0.1, sweep=BF16)
    assert narrow.errors[0].shape == (2, 2)
    assert ((narrow.maps - plain.maps).abs().amax((2, 3)) <= narrow.errors[0] + 1e-5).all()


@pytest.mark.parametrize("name", ["contrast", "callable", "several by callable", "callables", "all"])
@pytest.mark.parametrize("flat", [False, True])
def test_every_kind_of_target(fast, name, flat):
    target = {
        "contrast": T.contrast(3),
        "callable": lambda y: y[3] - y[1],
        "several by callable": lambda y: y[:3],
        "callables": [lambda y: y[3], lambda y: 2 * y[1]],
        "all": "all",
    }[name]
    net, x = net_and_x()
    if flat:
        with torch.no_grad():
            net.features.weight[:12] = 0
    plain, found = card(net, x, target), card(net, x, target, sweep=BF16)
    assert found.errors[0].shape == plain.scores.shape
    assert_close(found.maps, plain.maps, 0.03, name)


def test_several_inputs_and_layers(fast):
    class Both(nn.Module):
        """An image, numbers and an index beside it: only what is floating-point becomes narrow."""

        def __init__(self):
            super().__init__()
            self.net, self.beside, self.table = net_and_x()[0], nn.Linear(3, 5), nn.Embedding(4, 5)

        def forward(self, image, numbers, index):
            return self.net(image) + self.beside(numbers) + self.table(index)

    net, x = Both(), (inputs(2, dtype=torch.float32), torch.ones(2, 3), torch.tensor([1, 3]))
    layers = ("net.features", "net.act")
    plain, found = card(net, x, layer=layers), card(net, x, layer=layers, sweep=BF16)
    for ours, theirs, error in zip(found.maps, plain.maps, found.errors):
        assert_close(ours, theirs, 0.03)
        assert error.shape == (2, 1)


@pytest.mark.parametrize("method", SWEPT)
def test_the_same_arguments_give_the_same_and_nothing_is_changed(fast, method):
    net, x = net_and_x()
    net.train()
    before, random = {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    first, second = (card(net, x, T.top(2), method, sweep=BF16) for _ in range(2))
    assert torch.equal(first.maps, second.maps)
    assert first.maps.dtype == torch.float32
    assert not first.maps.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    with torch.inference_mode():
        assert torch.equal(card(net, x * 1, T.top(2), method, sweep=BF16).maps, first.maps)


def test_batch_neighbours_and_chunks_change_no_more_than_rounding_does(fast):
    net, x = net_and_x(n=3)
    together = card(net, x, T.top(2), sweep=BF16)
    for i in range(3):
        assert_close(card(net, x[i : i + 1], T.top(2), sweep=BF16).maps, together.maps[i : i + 1], 2 * gp.GOAL)
    for sweep in (BF16._replace(chunk=1), BF16._replace(chunk=7), BF16._replace(fold=False)):
        assert_close(card(net, x, T.top(2), sweep=sweep).maps, together.maps, 2 * gp.GOAL)


@pytest.mark.parametrize("method", SWEPT)
def test_progress_rises_and_ends_at_the_total(fast, method):
    net, x = net_and_x()
    for limits in ({}, {"budget": 0.4}, {"tolerance": 0.2}):
        told = []
        sweep = BF16._replace(chunk=5, progress=lambda done, total, told=told: told.append((done, total)))
        card(net, x, 3, method, sweep=sweep, **limits)
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert len({total for _, total in told}) == 1
        assert told[-1][0] == told[-1][1]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float64, torch.float32, "bf16", "bfloat16", 16, [torch.bfloat16], torch.complex64]
)
def test_other_dtypes_are_refused(dtype):
    net, x = net_and_x(channels=4)
    with pytest.raises(camfn.CamError, match=r"(?s)dtype=.*dtype must be None, torch.bfloat16 or torch.float16"):
        card(net, x, sweep=Sweep(dtype=dtype))


class Breaks(nn.Module):
    """A model that knows one dtype only, in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.net, self.how, self.plain = net_and_x()[0], how, torch.eye(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if self.how == "constant":
            return y @ torch.eye(5)
        if self.how == "assertion":
            assert x.dtype == torch.float32
        if self.how == "type" and x.dtype != torch.float32:
            raise TypeError("float32 only")
        return y


@pytest.mark.parametrize("limits", [{}, {"budget": 0.4}])
@pytest.mark.parametrize("how", ["constant", "assertion", "type"])
def test_a_model_that_breaks_in_it_is_told_by_name(fast, how, limits):
    net, x = Breaks(how), inputs(2, dtype=torch.float32)
    assert torch.isfinite(card(net, x, layer="net.features", **limits).maps).all()
    with pytest.raises(camfn.CamError, match=r"(?s)dtype=torch.float16.*does not run in it.*leave dtype= out"):
        card(net, x, layer="net.features", sweep=FP16, **limits)


@pytest.mark.parametrize("limits", [{}, {"budget": 0.4}])
def test_scores_that_float16_does_not_hold_are_told_by_its_name(fast, limits):
    net, x = net_and_x()
    with torch.no_grad():
        net.fc.bias += 1e5
    assert torch.isfinite(card(net, x, **limits).maps).all()
    with pytest.raises(camfn.CamError, match=r"(?s)not finite.*torch\.float16"):
        card(net, x, sweep=FP16, **limits)


def test_flat_channels_only(fast):
    net, x = net_and_x()
    with torch.no_grad():
        net.features.weight.zero_()
    with pytest.raises(camfn.CamError, match="every channel of the layer is flat"):
        card(net, x, sweep=BF16, recipe="authors")
    plain, found = card(net, x), card(net, x, sweep=BF16)
    assert torch.equal(found.maps, plain.maps)
    assert torch.equal(found.weights[0], plain.weights[0])
    assert not found.errors[0].any()


# -------------------------------------------------------------------------------------------------- trained networks


def photos(name: str, side: int, count: int) -> tuple[nn.Module, Tensor]:
    from PIL import Image

    from tests.oracles.libraries import REAL

    model, preprocess, _ = real_networks()[name]()
    folder = "cifar10_png" if name.startswith("cifar") else "imagenet_foolbox"
    paths = sorted((REAL / "images" / folder).iterdir())[:count]
    x = torch.stack([preprocess(Image.open(path)) for path in paths])
    return model, F.interpolate(x, (side, side), mode="bilinear", antialias=True)


@pytest.mark.parametrize(
    ("name", "layer", "side", "count"),
    [("cifar10_resnet20", "layer3", 32, 6), ("darknet_tiny", "features", 96, 3), ("mobilenet_v2", "features.17", 96, 1)],
)
def test_on_trained_networks(fast, name, layer, side, count):
    model, x = photos(name, side, count)
    plain, narrow = (card(model, x, T.top(3), layer=layer, sweep=sweep) for sweep in (Sweep(), BF16))
    true = (narrow.maps - plain.maps).abs().flatten(2).amax(-1)
    assert (true <= narrow.errors[0] + 1e-5).all()
    assert true.median() <= 0.03
    assert narrow.forwards <= 1.26 * plain.forwards
