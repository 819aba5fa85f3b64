"""A method of the user is a method like any other: the formula of one of camfn's gives that method's maps, to the bit."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import camfn
from camfn.testing.threads import at_once
from tests.oracles.closeness import close
from tests.oracles.networks import inputs, small_net

# A class against which all channels speak has a map that is nowhere positive.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")


def gradient_means(a, g):
    """The weights of Grad-CAM."""
    return g.mean(-1)


ours = camfn.method(gradient_means, name="ours", needs="gradients")
plus = camfn.method(lambda a, g: camfn.weights.grad_cam_pp(g, a), name="plus", needs="gradients")
mean = camfn.method(lambda a: torch.ones_like(a[..., 0]) / a.shape[1], name="mean", needs="activations")
mean_of_three_axes = camfn.method(lambda a: torch.ones_like(a[:, None, :, 0]) / a.shape[1], name="mean", needs="activations")
PAIRS = {
    "grad_cam": (ours, camfn.grad_cam),
    "grad_cam_pp": (plus, camfn.grad_cam_pp),
    "mean_cam": (mean, functools.partial(camfn.mean_cam, relu=True)),
    "mean_cam of three axes": (mean_of_three_axes, functools.partial(camfn.mean_cam, relu=True)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
OPTIONS = {
    "none": {},
    "eigen": {"combine": "eigen"},
    "size": {"size": "input", "relu": False},
    "layout": {"normalize": False, "layout": "channels_first"},
    "state": {"axes": "nchw", "state": camfn.state_of(small_net(3))},
}


ASKED = [
    *((options, "all") for options in OPTIONS),
    *(("none", target) for target in (None, [4, 0], camfn.targets.probability(2))),
]


@pytest.mark.parametrize(("options", "target"), ASKED, ids=str)
@every_pair
def test_the_formula_of_a_method_gives_its_maps(pair, options, target):
    own, known = PAIRS[pair]
    net, x = small_net(), inputs()
    given = OPTIONS[options]
    assert torch.equal(own(net, "act", x, target, **given), known(net, "act", x, target, **given))


@every_pair
def test_several_layers_have_the_maps_of_each(pair):
    own, known = PAIRS[pair]
    net, x = small_net(), inputs()
    for found, expected in zip(own(net, ("stem", "act"), x), known(net, ("stem", "act"), x), strict=True):
        assert torch.equal(found, expected)


@every_pair
def test_it_is_mapped_over_inputs_and_states(pair):
    own, known = PAIRS[pair]
    nets, x = [small_net(0), small_net(1)], inputs(3)
    mapped = vmap(lambda one: own(nets[0], "act", one[None], 1, normalize=False)[0])(x)
    close(mapped, known(nets[0], "act", x, 1, normalize=False))
    states = [camfn.state_of(net) for net in nets]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    found = vmap(lambda state: own(nets[0], "act", x, 1, normalize=False, state=state))(stacked)
    for one, net in zip(found, nets):
        close(one, known(net, "act", x, 1, normalize=False))


@every_pair
def test_its_derivatives_are_those_of_the_method(pair):
    own, known = PAIRS[pair]
    net, x = small_net(), inputs()

    def total(method, x):
        return method(net, "act", x, 1, normalize=False).square().sum()

    expected = grad(functools.partial(total, known))(x)
    assert expected.abs().max() > 0
    assert torch.equal(grad(functools.partial(total, own))(x), expected)
    along = inputs(seed=5)
    assert torch.equal(*(jvp(functools.partial(total, method), (x,), (along,))[1] for method in (own, known)))


def test_its_card_is_that_of_the_method_and_shares_its_gradients():
    net, x = small_net(), inputs()
    card, known = camfn.explain(net, "act", x, "all", method=[ours, "grad_cam"], relu=False)
    assert (card.method, known.method) == ("ours", "grad_cam")
    for name in ("maps", "weights", "scores", "classes"):
        for found, expected in zip(getattr(card, name), getattr(known, name)):
            assert torch.equal(found, expected), name
    for name in ("layers", "grids", "settings", "forwards", "backwards", "findings"):
        assert getattr(card, name) == getattr(known, name), name
    (alone,) = camfn.explain(net, "act", x, "all", method=(ours,), relu=False)
    assert torch.equal(alone.maps, card.maps)


@pytest.mark.parametrize(
    "compose",
    [
        functools.partial(camfn.smooth, num_samples=2),
        camfn.augment,
        camfn.integrate,
        lambda method: camfn.ensemble([method, camfn.score_cam]),
        lambda method: camfn.fuse_layers(method, ["stem", "act"]),
        lambda method: functools.partial(method, combine="eigen"),
    ],
    ids=["smooth", "augment", "integrate", "ensemble", "fuse_layers", "partial"],
)
def test_it_is_composed_and_the_composition_is_explained(compose):
    net, x = small_net(), inputs()
    found, expected = compose(ours), compose(camfn.grad_cam)
    layer = None if getattr(found, "of_layer", True) is False else "act"
    assert torch.equal(found(net, layer, x), expected(net, layer, x))
    card = camfn.explain(net, "act", x, method=found)
    assert torch.equal(card.maps, found(net, layer, x))
    assert "ours" in card.method


def test_a_partial_tells_its_options_and_others_can_be_given():
    net, x = small_net(), inputs()
    card = camfn.explain(net, "act", x, method=functools.partial(ours, combine="eigen"), relu=False)
    assert (card.settings["combine"], card.settings["relu"]) == ("eigen", False)
    smoothed = camfn.explain(net, "act", x, method=camfn.smooth(ours), combine="eigen")
    assert smoothed.settings["combine"] == "eigen"
    assert torch.equal(smoothed.maps, camfn.smooth(functools.partial(ours, combine="eigen"))(net, "act", x))


def test_two_methods_of_one_name_have_a_card_each():
    net, x = small_net(), inputs()
    few, many = camfn.smooth(ours, num_samples=1), camfn.smooth(ours, num_samples=3)
    cards = camfn.explain(net, "act", x, method=[few, many])
    assert [card.method for card in cards] == ["smooth(ours)"] * 2
    for card, method in zip(cards, (few, many)):
        assert torch.equal(card.maps, method(net, "act", x))


def test_the_table_of_methods_is_what_it_was():
    before = dict(camfn.METHODS)
    camfn.method(gradient_means, name="grad_cam", needs="gradients")
    assert dict(camfn.METHODS) == before
    with pytest.raises(camfn.CamError, match="no method named 'ours'"):
        camfn.explain(small_net(), "act", inputs(), method="ours")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_gets_float32_or_wider_of_the_stated_shapes(dtype):
    seen = []

    def formula(a: Tensor, g: Tensor) -> Tensor:
        seen.append((a.shape, g.shape, a.dtype, g.dtype))
        return g.mean(-1)

    method = camfn.method(formula, name="sees", needs="gradients")
    method(small_net(dtype=dtype), "act", inputs(dtype=dtype), "all", relu=False)
    assert seen == [((2, 6, 16), (2, 5, 6, 16), torch.float32, torch.float32)]


def test_what_the_formula_writes_to_its_arguments_is_lost():
    def greedy(a: Tensor, g: Tensor) -> Tensor:
        means = g.mean(-1)
        a.zero_()
        g.zero_()
        return means

    net, x = small_net(), inputs()
    writes = camfn.method(greedy, name="greedy", needs="gradients")
    mine, known = camfn.explain(net, "act", x, method=[writes, "grad_cam"])
    assert torch.equal(mine.maps, camfn.grad_cam(net, "act", x))
    assert torch.equal(known.maps, mine.maps)


def test_threads_share_one_method():
    net = small_net()
    jobs = [functools.partial(ours, net, "act", inputs(seed=i), i % 5) for i in range(8)]
    for found, job in zip(at_once(jobs), jobs):
        assert torch.equal(found, job())


def test_it_has_the_name_and_the_words_of_the_formula():
    assert (ours.__name__, ours.__doc__) == ("ours", "The weights of Grad-CAM.")
    assert "camfn.method" in mean.__doc__


@pytest.mark.parametrize(
    ("weights", "needs", "words"),
    [
        (
            lambda a, g: g,
            "gradients",
            r"of own must have shape \(n, t, c\) = \(2, 5, 6\) for A of \(2, 6, 16\) and G of \(2, 5,",
        ),
        (lambda a, g: g[:, 0].mean(-1), "gradients", r"= \(2, 5, 6\) .*; found \(2, 6\)"),
        (lambda a, g: g.sum(), "gradients", r"found \(\)"),
        (lambda a, g: g.mean(-1)[:1], "gradients", r"found \(1, 5, 6\)"),
        (lambda a, g: 0.5, "gradients", r"must be a tensor \(n, t, c\) = \(2, 5, 6\) .*; found float"),
        (lambda a, g: g.mean(-1) > 0, "gradients", r"must be floating-point numbers on cpu.*; found torch.bool"),
        (lambda a, g: g.mean(-1).to("meta"), "gradients", "found torch.float64 on meta"),
        (lambda a: a, "activations", r"shape \(n, c\) = \(2, 6\) for A of \(2, 6, 16\); found \(2, 6, 16\)"),
        (lambda a: a.mean(1), "activations", r"found \(2, 16\)"),
        (lambda a: None, "activations", "found NoneType"),
    ],
)
def test_weights_of_another_shape_are_an_error(weights, needs, words):
    method = camfn.method(weights, name="own", needs=needs)
    with pytest.raises(camfn.CamError, match=words):
        method(small_net(), "act", inputs(), "all")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": "grad_cam"}, "weights must be a function .* found 'grad_cam'"),
        ({"name": ""}, "name must be a text"),
        ({"name": 3}, "name must be a text"),
        ({"needs": "attention"}, "needs must be \"gradients\".*found 'attention'"),
        ({"needs": None}, "needs must be"),
    ],
)
def test_an_argument_that_is_none_of_these_is_an_error(arguments, words):
    with pytest.raises(camfn.CamError, match=words):
        camfn.method(**{"weights": gradient_means, "name": "own", "needs": "gradients", **arguments})


def test_an_error_of_the_formula_passes_through():
    def broken(a: Tensor, g: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        camfn.method(broken, name="broken", needs="gradients")(small_net(), "act", inputs())


def test_a_function_that_is_no_method_cannot_be_explained():
    with pytest.raises(camfn.CamError, match=r"is no method: give one of camfn .* a method of your own \(camfn.method\)"):
        camfn.explain(nn.Identity(), "", inputs(), method=gradient_means)
