"""Sweeps that leave something out: what they cost, that they keep what they say, and that they are as pure as others."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import Sweep
from camfn.formulas import masks, noise
from camfn.model.forward import look_with_gradients
from camfn.model.gradients import each_target
from camfn.targets import resolve
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import real_networks
from tests.oracles.networks import inputs, small_net

T = camfn.targets
SWEPT = {"score_cam": {}, "ss_cam": {"num_samples": 6, "std": 0.5}, "is_cam": {"num_samples": 4}}
DRAWS = {"score_cam": 1, "ss_cam": 6, "is_cam": 4}
ROWS: list[Tensor] = []
"""What models of this file were shown. Not in the model: a list of the model's is copied, so that its calls are not counted."""


def card(net: nn.Module, layer, x, target=3, method: str = "score_cam", **options):
    return camfn.explain(net, layer, x, target, method=method, **{**SWEPT[method], **options})


def full_scores(net: nn.Module, layer: str, x: Tensor, target=3, method: str = "score_cam", **options) -> Tensor:
    """Logs of the weights of the plain sweep: the scores, up to a constant of the image."""
    return card(net, layer, x, target, method, **options).weights[0].log()


class Lamps(nn.Module):
    """Each channel sees one colour of three, so that an image without a colour has a third of its channels flat."""

    def __init__(self, channels: int = 24, classes: int = 5, tanh: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.eye = nn.Conv2d(3, channels, 1, bias=False)
        self.act = nn.ReLU()
        self.head = nn.Linear(channels, classes)
        self.bend = nn.Tanh() if tanh else nn.Identity()
        colour = F.one_hot(torch.arange(channels) % 3, 3)
        with torch.no_grad():
            self.eye.weight.copy_((torch.rand(channels, 3, generator=generator) * colour + 0.1 * colour)[..., None, None])
            self.head.weight.copy_(torch.randn(classes, channels, generator=generator))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            ROWS.extend(x.detach().clone())
        return 3 * self.head(self.bend(self.act(self.eye(x))).mean((2, 3)))


def lit(*colours: str) -> Tensor:
    """Images with some of red, green and blue: `"rg"`, `""`."""
    x = torch.rand(len(colours), 3, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x * torch.tensor([[float(c in of) for c in "rgb"] for of in colours], dtype=torch.float64)[..., None, None]


def shown_masked(x: Tensor, run) -> list[int]:
    """How many masked inputs of each image the model was shown, and how many of zeros."""
    ROWS.clear()
    run()
    second = 0.5 * x[0].flip((1, 2))  # by which a sweep finds out how the model may be run
    rows = [row for row in ROWS if not any(torch.equal(row, image) for image in (*x, second))]
    counts = [0] * (len(x) + 1)
    for row in rows:
        mine = [i for i, image in enumerate(x) if bool((row[image == 0] == 0).all()) and row.any()]
        counts[mine[-1] if mine else len(x)] += 1  # images are in the order of fewer colours
    return counts


# ------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("order", ["predicted", "std", "max", "gradient"])
def test_the_budget_is_kept_for_each_image_by_the_models_own_count(budget, order):
    net, x = Lamps(), lit("rgb", "rg", "r")  # 0, 8 and 16 of 24 channels are flat
    run = functools.partial(card, net, "act", x, 3, budget=budget, order=order, sweep=Sweep(fold=True, chunk=7))
    found = run()
    counts = shown_masked(x, run)
    assert sum(counts) + 3 == found.forwards
    allowed = [max(2 if flat else 1, budget * live) for live, flat in ((24, 0), (16, 8), (8, 16))]
    assert counts[3] == 2  # zeros, of the two images that have flat channels
    assert counts[0] <= allowed[0]
    assert all(count + 1 <= most for count, most in zip(counts[1:3], allowed[1:]))
    assert sum(counts) >= 0.5 * budget * 48  # and it is used


@pytest.mark.parametrize("method", ["ss_cam", "is_cam"])
@pytest.mark.parametrize("order", ["predicted", "std"])
@pytest.mark.parametrize("budget", [0.34, 0.5])
def test_the_budget_counts_draws(method, order, budget):
    net, x = Lamps(), lit("rgb", "rg", "r")
    run = functools.partial(card, net, "act", x, 3, method, budget=budget, order=order, sweep=Sweep(fold=True, chunk=7))
    counts = shown_masked(x, run)
    assert sum(counts) + 3 == run().forwards
    assert 0 < sum(counts) <= budget * DRAWS[method] * 48


def test_several_layers_and_targets_cost_what_one_costs():
    net, x = Lamps(), lit("rgb", "rg")
    one = card(net, "act", x, 3, budget=0.5).forwards
    assert card(net, "act", x, T.top(3), budget=0.5).forwards == one
    assert card(net, ("act", "act", "bend"), x, T.top(3), budget=0.5).forwards == 3 * (one - 2) + 2


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("limits", [{"budget": 0.5}, {"tolerance": 0.2}, {"budget": 0.5, "order": "std"}])
def test_progress_rises_and_ends_at_the_total(method, limits):
    net, x, told = Lamps(), lit("rgb", "rg", ""), []
    sweep = Sweep(chunk=5, progress=lambda done, total: told.append((done, total)))
    card(net, ("act", "bend"), x, T.top(2), method, sweep=sweep, **limits)
    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]


# ------------------------------------------------------------------------------------------- exact where it says exact


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("order", ["predicted", "std", "gradient"])
def test_the_whole_budget_is_the_plain_call(method, order):
    net, x = small_net(channels=12), inputs(2)
    plain = card(net, "features", x, T.top(2), method)
    for options in ({"budget": 1.0}, {"budget": 1}, {"budget": 1.0, "order": order}):
        found = card(net, "features", x, T.top(2), method, **options)
        assert torch.equal(found.maps, plain.maps)
        assert torch.equal(found.weights[0], plain.weights[0])
        assert found.forwards == plain.forwards
        assert found.errors == (None,)


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("layer", ["act", "bend"])
def test_a_tolerance_that_allows_nothing_sweeps_everything(method, layer):
    net, x = Lamps(), lit("rgb", "rg", "")
    plain = card(net, layer, x, T.top(2), method)
    found = card(net, layer, x, T.top(2), method, tolerance=1e-9)
    assert_close(found.maps, plain.maps, 1e-9, method)
    if method != "ss_cam":  # noise on a black image changes nothing: no need to draw it again
        assert found.forwards == plain.forwards
    assert found.errors[0].shape == (len(x), 2)
    assert found.errors[0].max() <= 1e-9


def test_flat_channels_of_a_noisy_sweep_are_not_taken_for_one():
    """Noise gives each flat channel a score of its own, and a constant below 0 moves what the ReLU leaves."""
    net, x = Lamps(), lit("r", "g")
    net.eye.bias = nn.Parameter(torch.full((24,), -0.1, dtype=torch.float64))
    for seed in range(3):
        plain, some = (card(net, "eye", x, 3, "ss_cam", std=1.0, seed=seed, **o) for o in ({}, {"tolerance": 1e-6}))
        assert ((some.maps - plain.maps).abs().amax((1, 2)) <= some.errors[0][:, 0] + 1e-9).all()


@pytest.mark.parametrize("method", ["score_cam", "is_cam"])
@pytest.mark.parametrize("target", [3, T.top(3)])
def test_swept_channels_have_the_scores_of_the_full_sweep(method, target):
    """As many as were paid for differ from the plain log-weights by one constant, exactly."""
    net, x = small_net(channels=24), inputs(2)
    off = full_scores(net, "features", x, target, method) - full_scores(net, "features", x, target, method, budget=0.5)
    for of_image in off:
        for row in of_image:
            shared = max(int(((row - pivot).abs() < 1e-9).sum()) for pivot in row)
            assert 12 <= shared < 24


def test_flat_channels_have_the_scores_of_the_full_sweep():
    net, x = Lamps(), lit("rg", "r")
    full, some = full_scores(net, "act", x), full_scores(net, "act", x, budget=0.5)
    for image, flat in enumerate(([2], [1, 2])):
        of_flat = [k for k in range(24) if k % 3 in flat]
        off = (full - some)[image, 0]
        swept = (off - off[of_flat[0]]).abs() < 1e-9
        assert swept[of_flat].all()
        assert int(swept.sum()) >= len(of_flat) + (7 if image == 0 else 3)  # half of those that are not, less the zeros


def test_where_the_head_predicts_the_scores_a_few_channels_give_the_map():
    """Pooled linear, ReLU of what is not negative: `s(x * M_k)` is `<G, A * m_k>` plus the bias."""
    net, x = Lamps(tanh=False), lit("rgb", "rgb")
    activation = net.act(net.eye(x))
    unit = (activation - activation.amin((2, 3), True)) / (activation.amax((2, 3), True) - activation.amin((2, 3), True))
    scores = torch.einsum("j,njhw,nkhw->nk", 3 * net.head.weight[3] / 36, activation, unit)
    assert_close(full_scores(net, "act", x)[:, 0].softmax(1), scores.softmax(1), 1e-6)
    plain, some = card(net, "act", x), card(net, "act", x, budget=0.25)
    assert (some.maps - plain.maps).abs().max() < 0.1


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_the_predicted_order_is_better_than_the_published_ones():
    off = {order: [] for order in ("predicted", "std", "max", "gradient")}
    for seed in range(12):
        net, x = small_net(seed, channels=64, dtype=torch.float32), inputs(1, seed=seed, dtype=torch.float32)
        plain = card(net, "act", x)
        for order, found in off.items():
            found.append(float((card(net, "act", x, budget=0.25, order=order).maps - plain.maps).abs().max()))
    mean = {order: sum(found) / len(found) for order, found in off.items()}
    assert all(mean["predicted"] < 0.75 * mean[order] for order in ("std", "max", "gradient")), mean


@pytest.mark.parametrize("limits", [{"tolerance": 0.3}, {"tolerance": 0.1}, {"budget": 0.3}])
def test_the_stated_error_bounds_the_true_one(limits):
    held, within, stopped = [], [], 0
    for seed in range(24):
        net, x = small_net(seed, channels=48, dtype=torch.float32), inputs(1, seed=seed, dtype=torch.float32)
        plain, some = card(net, "act", x), card(net, "act", x, seed=seed, **limits)
        true = float((some.maps - plain.maps).abs().max())
        held.append(true <= float(some.errors[0]) + 1e-5)
        within.append(true <= limits.get("tolerance", 1))
        stopped += some.forwards < plain.forwards
        assert 0 <= float(some.errors[0]) <= 1 + 1e-9
    assert sum(held) >= 21  # 95 % is promised, on photos and trained networks
    assert sum(within) >= 22
    assert stopped >= 8


@pytest.mark.parametrize("method", ["ss_cam", "is_cam"])
def test_the_stated_error_of_sweeps_with_draws_bounds_the_true_one(method):
    options = {"ss_cam": {"num_samples": 16, "std": 0.3}, "is_cam": {"num_samples": 4, "path": "linear"}}[method]
    held, stopped = [], 0
    for seed in range(16):
        net, x = small_net(seed, channels=24, dtype=torch.float32), inputs(1, seed=seed, dtype=torch.float32)
        plain, some = (card(net, "act", x, 3, method, **options, **limits) for limits in ({}, {"tolerance": 0.2}))
        held.append(float((some.maps - plain.maps).abs().max()) <= float(some.errors[0]) + 1e-5)
        stopped += some.forwards < plain.forwards
    assert sum(held) >= 14
    assert stopped >= 2


def test_a_stop_is_below_the_tolerance_or_at_the_budget():
    for seed in range(12):
        net, x = small_net(seed, channels=64), inputs(1, seed=seed)
        plain = card(net, "features", x).forwards
        some = card(net, "features", x, tolerance=0.3, seed=seed)
        assert float(some.errors[0]) <= 0.3 * 1.25  # its quantile is drawn anew
        both = card(net, "features", x, tolerance=1e-6, budget=0.25, seed=seed)
        assert both.forwards <= 1 + 0.25 * (plain - 1)
        assert float(both.errors[0]) > 1e-6


# ----------------------------------------------------------------------------------------------------- published orders


@pytest.mark.parametrize("order", ["std", "max", "gradient"])
def test_a_published_order_takes_the_first_channels_and_gives_the_others_no_weight(order):
    net, x = small_net(channels=20), inputs(2)
    tap = camfn.tap(net, "features")
    state = camfn.state_of(net)
    activation = tap(state, x).seen
    slope = torch.func.grad(lambda nudge: tap(state, x, nudge=nudge).output[:, 3].sum())(torch.zeros_like(activation))
    ranks = {"std": activation.flatten(2).std(-1), "max": activation.flatten(2).amax(-1), "gradient": slope.mean((2, 3))}
    full = full_scores(net, "features", x)
    for budget, count in ((0.2, 4), (0.5, 10)):
        found = card(net, "features", x, budget=budget, order=order)
        assert found.errors[0] is None or bool(found.errors[0].isnan().all())  # nothing is known of it
        for image in range(2):
            first = sorted(range(20), key=lambda k: -float(ranks[order][image, k]))[:count]
            expected = torch.zeros(20, dtype=torch.float64)
            expected[first] = torch.softmax(full[image, 0, first], 0)
            close(found.weights[0][image, 0], expected, order)


def test_gradient_order_is_of_all_targets():
    net, x = small_net(channels=20), inputs(1)
    found = card(net, "features", x, torch.tensor([[0, 1, 2]]), budget=0.3, order="gradient").weights[0][0]
    assert ((found > 0).sum(1) == 6).all()
    assert (found[:1] > 0).eq(found > 0).all()


# ------------------------------------------------------------------------------------------------------------- slopes


class Branches(nn.Module):
    """Layers behind each other, with a shortcut round one, and one in a branch of its own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 2, 1)
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = torch.tanh(self.act(self.second(y)) + y)
        return self.fc(torch.cat([y, torch.sigmoid(self.side(x))], 1).mean((2, 3))) ** 3


LAYERS = ("second", "side", "first", "act")


def slopes(net, layers, x, target):
    forward, pullback = look_with_gradients(net, layers, x, None, masks=True)
    with torch.no_grad():
        score = resolve(target, forward.output, forward.n, x.device)
        found = each_target(pullback.gradients, forward.output, score)
    return [[of[name] for of in found] for name in layers]


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[::-1], ("first", "first"), ("side",)])
def test_slopes_are_those_of_the_tap(layers):
    net, x = Branches(), inputs(2, side=5)
    state, targets = camfn.state_of(net), torch.tensor([[0, 2], [3, 1]])
    for name, of_targets in zip(layers, slopes(net, layers, x, targets)):
        tap = camfn.tap(net, name)
        zero = torch.zeros_like(tap(state, x).seen)

        def total(nudge, chosen, tap=tap):
            return tap(state, x, nudge=nudge).output.gather(1, chosen).sum()

        for slope, chosen in zip(of_targets, targets.T[..., None]):
            close(slope, torch.func.grad(total)(zero, chosen), name)


def test_slopes_are_finite_differences():
    net, x, step = Branches(), inputs(1, side=4), 1e-6
    state = camfn.state_of(net)
    for name, (slope,) in zip(LAYERS, slopes(net, LAYERS, x, lambda y: (y * torch.arange(4.0)).sum())):
        tap = camfn.tap(net, name)
        zero, weights = torch.zeros_like(tap(state, x).seen), torch.arange(4.0, dtype=torch.float64)
        for place in range(0, zero.numel(), 7):
            nudge = zero.flatten().index_fill(0, torch.tensor(place), step).reshape(zero.shape)
            up, down = ((tap(state, x, nudge=n).output * weights).sum() for n in (nudge, -nudge))
            assert float(slope.flatten()[place]) == pytest.approx(float(up - down) / (2 * step), rel=1e-4, abs=1e-6)


def test_a_target_without_any_slope_has_zeros():
    net, x = Branches(), inputs(1, side=4)
    assert all(not slope.any() for (slope,) in slopes(net, LAYERS, x, lambda y: (y > 0).sum()))
    assert all(not slope.any() for (slope,) in slopes(net, LAYERS, x, lambda y: torch.round(y[0])))


# ------------------------------------------------------------------------------------------------------------- targets


TARGETS = {
    "none": None,
    "one each": [3, 1],
    "all": "all",
    "probability": T.probability(3),
    "contrast": T.contrast(3),
    "contrast against": T.contrast(3, [0, 1]),
    "callable": lambda y: y[3] - y[1],
    "several by callable": lambda y: y[:3],
    "callables": [lambda y: y[3], lambda y: 2 * y[1]],
    "no slope": lambda y: torch.round(y[3]),
    "a count": lambda y: (y > 0).sum(),
    "half of it": lambda y: y.half()[3],
}


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("name", TARGETS)
def test_every_kind_of_target(name, method):
    net, x, target = small_net(channels=12), inputs(2), TARGETS[name]
    plain = card(net, "features", x, target, method)
    exact = card(net, "features", x, target, method, tolerance=1e-9)
    assert_close(exact.maps, plain.maps, 1e-6 if name == "half of it" else 1e-9, name)
    for limits in ({"budget": 0.5}, {"budget": 0.5, "order": "std"}):
        some = card(net, "features", x, target, method, **limits)
        assert some.maps.shape == plain.maps.shape
        assert some.weights[0].shape == plain.weights[0].shape
        assert torch.isfinite(some.maps).all()
        assert some.forwards < plain.forwards
    assert exact.errors[0].shape == exact.scores.shape


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
@pytest.mark.parametrize("limits", [{"budget": 0.3}, {"tolerance": 0.2}])
def test_a_score_far_from_zero_is_like_any_other(shift, limits):
    net, x = small_net(channels=24), inputs(2)
    near, far = (card(net, "features", x, lambda y, s=s: y[3] + s, **limits) for s in (0.0, shift))
    assert_close(far.maps, near.maps, 1e-6)
    assert far.forwards == near.forwards
    assert_close(far.errors[0], near.errors[0], 1e-4)


def test_scores_that_the_head_does_not_foresee_are_doubted():
    """A target with no slope: the prediction says nothing, and a sweep must not stop since two scores were equal."""
    held = 0
    for seed in range(12):
        net, x = small_net(seed, channels=24), inputs(1, seed=seed)
        plain, some = (card(net, "features", x, lambda y: torch.round(y[3]), seed=seed, **o) for o in ({}, {"tolerance": 0.1}))
        held += float((some.maps - plain.maps).abs().max()) <= float(some.errors[0]) + 1e-6
    assert held >= 10


# ----------------------------------------------------------------------------------------------- inputs, layers, layouts


@pytest.mark.parametrize("limits", [{"budget": 0.4}, {"budget": 0.4, "order": "max"}, {"tolerance": 0.3}])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_any_number_of_axes(dims, limits):
    net, x = small_net(dims=dims, side=6, channels=16), inputs(2, dims=dims, side=6)
    some = card(net, "features", x, **limits)
    assert some.maps.shape == (2, *(3,) * dims)
    assert torch.isfinite(some.maps).all()
    assert_close(card(net, "features", x, tolerance=1e-9).maps, card(net, "features", x).maps, 1e-9)


class Last(nn.Module):
    """Its layer has the channels last."""

    def __init__(self):
        super().__init__()
        self.net = small_net(channels=16)
        self.last = nn.Identity()

    def forward(self, x):
        y = self.last(self.net.features(self.net.stem(x)).movedim(1, -1)).movedim(-1, 1)
        return self.net.fc(torch.relu(y).mean((2, 3)))


def test_channels_last_and_callable_layouts():
    net, x = Last(), inputs(2)
    first = card(net, "net.features", x, budget=0.4)
    for layout in ("channels_last", lambda a: a.movedim(-1, 1)):
        some = card(net, "last", x, budget=0.4, layout=layout)
        assert_close(some.maps, first.maps, 1e-9)
        assert_close(some.errors[0], first.errors[0], 1e-6)


class Both(nn.Module):
    """An image, numbers beside it, and how much of them."""

    def __init__(self):
        super().__init__()
        self.net, self.beside = small_net(channels=16), nn.Linear(3, 5).double()

    def forward(self, image, numbers, share=1.0):
        return self.net(image) + share * self.beside(numbers)


def test_models_of_several_inputs():
    net, image, numbers = Both(), inputs(2), torch.ones(2, 3, dtype=torch.float64)
    plain = card(net, "net.features", (image, numbers), tolerance=0.2)
    named = card(net, "net.features", {"image": image, "numbers": numbers, "share": 1.0}, tolerance=0.2)
    chosen = card(net, "net.features", (image, numbers), tolerance=0.2, masked=0)
    assert_close(named.maps, plain.maps, 1e-9)
    assert_close(chosen.maps, plain.maps, 1e-9)
    assert named.forwards == plain.forwards == chosen.forwards


@pytest.mark.filterwarnings("ignore:.*maps at layer")
@pytest.mark.parametrize(
    "limits", [{"budget": 0.3}, {"tolerance": 0.2}, *({"budget": 0.3, "order": o} for o in ("std", "max", "gradient"))]
)
@pytest.mark.parametrize("method", SWEPT)
def test_one_channel_and_flat_images(limits, method):
    one = Lamps(channels=1)
    for net, x in (
        (one, lit("rgb", "")),
        (Lamps(), lit("", "")),
        (Lamps(), lit("rgb", "")),
        (Lamps(), lit("rgb", "r")[..., :1, :1]),
    ):
        plain, some = card(net, "act", x, T.top(2), method), card(net, "act", x, T.top(2), method, **limits)
        assert some.maps.shape == plain.maps.shape
        assert torch.isfinite(some.maps).all()
        assert torch.isfinite(some.weights[0]).all()
        black = [i for i, image in enumerate(x) if not image.any()]
        close(some.maps[black], plain.maps[black])
        if net is one:
            close(some.maps, plain.maps)


# ------------------------------------------------------------------------------------------------------------- purity


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("limits", [{"budget": 0.4}, {"tolerance": 0.3}])
def test_the_same_arguments_give_the_same_and_nothing_is_changed(method, limits):
    net, x = small_net(channels=16).train(), inputs(2)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random, kept = torch.get_rng_state(), x.detach().clone()
    first, second = (card(net, "features", x, T.top(2), method, **limits) for _ in range(2))
    assert torch.equal(first.maps, second.maps)
    assert torch.equal(first.errors[0], second.errors[0])
    assert not first.maps.requires_grad
    assert not first.errors[0].requires_grad
    assert all(not w.requires_grad for w in first.weights)
    assert not first.scores.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "fc.weight")
    assert x.grad is None
    assert torch.equal(x.detach(), kept)
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("limits", [{"budget": 0.4}, {"tolerance": 0.3}, {"budget": 0.4, "order": "gradient"}])
def test_the_callers_grad_mode_makes_no_difference(method, limits):
    net, x, targets = small_net(channels=16), inputs(2), (T.top(2), [3, 1], lambda y: y[3] - y[1])
    for target in targets:
        plain = card(net, "features", x, target, method, **limits)
        with torch.no_grad():
            assert torch.equal(card(net, "features", x, target, method, **limits).maps, plain.maps)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert torch.equal(card(net, "features", x, target, method, **limits).maps, plain.maps)
            made = x * 1  # an inference tensor
            assert torch.equal(card(net, "features", made, target, method, **limits).maps, plain.maps)
            state = {name: tensor * 1 for name, tensor in camfn.state_of(net).items()}
            assert torch.equal(card(net, "features", made, target, method, state=state, **limits).maps, plain.maps)
            assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("limits", [{"budget": 0.4}, {"tolerance": 0.3}])
@pytest.mark.parametrize("method", SWEPT)
def test_batch_neighbours_and_chunks_change_nothing(method, limits):
    net, x = small_net(channels=24), inputs(3)
    together = card(net, "features", x, T.top(2), method, **limits)
    for i in range(3):
        alone = card(net, "features", x[i : i + 1], T.top(2), method, **limits)
        assert_close(together.maps[i : i + 1], alone.maps, 1e-7)
        assert_close(together.errors[0][i : i + 1], alone.errors[0], 1e-5)
    for sweep in (Sweep(chunk=1), Sweep(chunk=7), Sweep(fold=False)):
        again = card(net, "features", x, T.top(2), method, sweep=sweep, **limits)
        assert_close(again.maps, together.maps, 1e-7, str(sweep))
        assert again.forwards == together.forwards


@pytest.mark.parametrize("limits", [{"budget": 0.5}, {"tolerance": 0.2}, {"budget": 0.5, "order": "std"}])
@pytest.mark.parametrize("method", SWEPT)
def test_neighbours_with_other_numbers_of_flat_channels_change_nothing(method, limits):
    net, x = Lamps(), lit("rgb", "rg", "r", "")
    together = card(net, "act", x, 3, method, **limits)
    parts = [card(net, "act", x[i : i + 1], 3, method, **limits) for i in range(4)]
    for i, alone in enumerate(parts):
        assert_close(together.maps[i : i + 1], alone.maps, 1e-7, str(i))
    assert together.forwards == sum(alone.forwards for alone in parts)


def test_threads_get_what_one_after_the_other_gets():
    net, xs = small_net(channels=24), [inputs(2, seed=seed) for seed in range(6)]
    work = [functools.partial(card, net, ("features", "act"), x, T.top(2), budget=0.4) for x in xs]
    alone, found = [job().maps for job in work], [None] * len(work)

    def run(i: int) -> None:
        found[i] = work[i]().maps

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, alone):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_seed_draws_the_sample_of_a_tolerance_only():
    net, x = small_net(channels=48), inputs(2)
    weights = [card(net, "features", x, budget=0.3, seed=seed, order="std").weights[0] for seed in (0, 1)]
    assert torch.equal(*weights)
    with_budget = [swept_of(net, x, budget=0.3, seed=seed) for seed in (0, 1)]
    assert with_budget[0] == with_budget[1]  # the estimate may differ, the channels do not
    with_tolerance = [swept_of(net, x, tolerance=0.3, seed=seed) for seed in range(3)]
    assert len({str(swept) for swept in with_tolerance}) > 1


def swept_of(net: nn.Module, x: Tensor, **limits) -> list[list[int]]:
    """Which channels were swept: those whose log-weights differ from the plain ones by the commonest constant."""
    off = (full_scores(net, "features", x) - full_scores(net, "features", x, **limits))[:, 0]
    pivots = [max(row, key=lambda p, row=row: int(((row - p).abs() < 1e-9).sum())) for row in off]
    return [((row - pivot).abs() < 1e-9).nonzero()[:, 0].tolist() for row, pivot in zip(off, pivots)]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"budget": bad}, "budget=") for bad in (0, 0.0, -1, 1.5, "x", float("nan"), float("inf"), None, True)),
        *(({"tolerance": bad}, "tolerance=") for bad in (0, 1, -1, 1.5, float("nan"), "x")),
        *(({"order": bad, "budget": 0.5}, "order=") for bad in ("random", None, ["std"])),
        ({"tolerance": 0.1, "order": "std"}, "tolerance= needs order="),
        ({"budget": 0.5, "recipe": "authors"}, "budget= and tolerance= need a recipe"),
        ({"tolerance": 0.5, "recipe": "authors"}, "budget= and tolerance= need a recipe"),
        ({"budget": 0.5, "seed": 1.5}, "seed must be"),
        ({"budget": 0.5, "seed": 1 << 70}, "seed must be"),
    ],
)
def test_what_is_wrong_is_named_before_any_forward(method, options, words):
    ROWS.clear()
    with pytest.raises(camfn.CamError, match=words):
        card(Lamps(), "act", lit("rgb"), 3, method, **options)
    assert not ROWS


@pytest.mark.parametrize("method", SWEPT)
@pytest.mark.parametrize("limits", [{"budget": 0.5}, {"tolerance": 0.5}])
def test_under_a_transform_it_is_an_error(method, limits):
    net, x = small_net(), inputs(2)
    run = functools.partial(camfn.METHODS[method].function, **SWEPT[method], **limits)
    with pytest.raises(camfn.CamError, match=r"budget= and tolerance= read values.*transform"):
        torch.func.vmap(lambda one: run(net, "features", one[None], 3))(x)
    with pytest.raises(camfn.CamError, match=r"budget= and tolerance= read values.*transform"):
        torch.func.grad(lambda one: run(net, "features", one, 3).sum())(x)
    with pytest.raises(camfn.CamError, match=r"budget= and tolerance= read values.*transform"):
        torch.func.jvp(lambda one: run(net, "features", one, 3), (x,), (x,))


def test_under_a_compiler_it_is_what_it_is_without():
    net, x = small_net(), inputs(1)
    compiled = torch.compile(lambda one: camfn.score_cam(net, "features", one, 3, budget=0.5) + 1, backend="eager")
    assert torch.equal(compiled(x), camfn.score_cam(net, "features", x, 3, budget=0.5) + 1)
    torch._dynamo.reset()


def test_the_whole_budget_is_no_error_under_a_transform():
    net, x = small_net(), inputs(2)
    mapped = torch.func.vmap(lambda one: camfn.score_cam(net, "features", one[None], 3, budget=1.0)[0])(x)
    assert_close(mapped, camfn.score_cam(net, "features", x, 3), 1e-9)


# ------------------------------------------------------------------------------------------------------ noise, again


@pytest.mark.parametrize("shape", [(3,), (4, 4), (17,)])
def test_noise_is_the_same_in_whatever_order_it_is_asked_for(shape):
    draws, channels, cpu = 5, 9, torch.device("cpu")
    variation = masks.Variation((1.0,) * draws, "mask", 1.5, seed=7)
    pairs = torch.cartesian_prod(torch.arange(draws), torch.arange(channels))
    generator = torch.Generator().manual_seed(7)
    once = torch.stack([torch.randn(*shape, generator=generator) * 1.5 for _ in range(draws * channels)])
    assert torch.equal(noise.noise_stream(variation, channels, shape, cpu)(pairs), once)
    stream = noise.noise_stream(variation, channels, shape, cpu)
    for seed in range(6):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[: 5 + 8 * seed]
        assert torch.equal(stream(pairs[order]), once[order])
    for place in (44, 0, 16, 15, 17, 16, 16, 31, 32, 30):
        assert torch.equal(stream(pairs[place : place + 1]), once[place : place + 1])


# ------------------------------------------------------------------------------------------------- trained networks


def photo(name: str, side: int):
    from PIL import Image

    from tests.oracles.libraries import REAL

    model, preprocess, _ = real_networks()[name]()
    folder = "cifar10_png" if name.startswith("cifar") else "imagenet_foolbox"
    path = sorted((REAL / "images" / folder).iterdir())[0]
    return model, F.interpolate(preprocess(Image.open(path))[None], (side, side), mode="bilinear", antialias=True)


@pytest.mark.parametrize(
    ("name", "layer", "side", "budget"),
    [("cifar10_resnet20", "layer3", 32, 0.2), ("darknet_tiny", "features", 96, 0.5), ("mobilenet_v2", "features.18", 64, 0.1)],
)
def test_on_trained_networks(name, layer, side, budget):
    model, x = photo(name, side)
    plain, some = card(model, layer, x, None), card(model, layer, x, None, budget=budget)
    true = float((some.maps - plain.maps).abs().max())
    assert correlation(some.maps, plain.maps) > 0.95
    assert true <= float(some.errors[0]) + 1e-6
    assert some.forwards - 1 <= budget * (plain.forwards - 1) + 1
    kept = card(model, layer, x, None, tolerance=0.3)
    assert float((kept.maps - plain.maps).abs().max()) <= 0.3
    assert kept.forwards < plain.forwards
