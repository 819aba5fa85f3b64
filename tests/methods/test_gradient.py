"""The methods of gradients against closed forms, and against plain loops written from the papers.

Nothing of camfn computes an expected value here: activations and gradients come from a plain hook and `autograd.grad`, and
channels and positions are loops. Closed forms are of a pooled linear head; loops are tried on a head of two layers too, where a
test sees that the methods differ.
"""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.networks import CONVS, POOLS, SmallNet, headed, inputs, seeded, small_net

# On random networks many a map is nowhere positive.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")

DIMS = (1, 2, 3)
CLASSES = [3, 0, 4]
FORMULAS = ("grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "grad_cam_elementwise", "layer_cam", "shapley_cam")


def raw(method: str, net: nn.Module, layer, x: Tensor, target=CLASSES, **options) -> Tensor:
    """The signed map, unscaled."""
    return unscaled(method, net, layer, x, target, relu=False, **options)


def unscaled(method: str, net: nn.Module, layer, x: Tensor, target=CLASSES, **options) -> Tensor:
    # On a line, what a stride of 2 makes of the input leaves open which axis is which: the layout has to be said.
    return getattr(camfn, method)(net, layer, x, target, normalize=False, layout="channels_first", **options)


def hooked(net: nn.Module, layer: str, x: Tensor, score) -> tuple[Tensor, Tensor]:
    """Activation and gradient of the sum of `score(output, i)` over images, by a plain hook."""
    net, kept = copy.deepcopy(net).eval(), []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    output = net(x)
    total = sum(score(output[i], i) for i in range(len(x)))
    (gradient,) = torch.autograd.grad(total, kept[0], create_graph=True)
    return kept[0], gradient


def logit(output: Tensor, i: int) -> Tensor:
    return output[CLASSES[i]]


# ---------------------------------------------------------------------------------------------- the papers, in loops


def weight_grad_cam(a: Tensor, g: Tensor) -> float:
    return sum(g.flatten().tolist()) / g.numel()


def weight_grad_cam_pp(a: Tensor, g: Tensor, authors: bool = False) -> float:
    """Equation 19 as it is printed, position by position."""
    total, alphas = float(a.sum()), []
    for v in g.flatten().tolist():
        below = 2 * v**2 + total * v**3
        alphas.append(v**2 / below if below > 0 else 0.0)
    positive = [max(v, 0.0) for v in g.flatten().tolist()]
    constant = sum(alpha for alpha, v in zip(alphas, positive) if v > 0) if authors else 1.0
    return sum(alpha * v for alpha, v in zip(alphas, positive)) / (constant or 1.0)


def weight_xgrad_cam(a: Tensor, g: Tensor) -> float:
    total = float(a.sum())
    return sum(x * y / total for x, y in zip(a.flatten().tolist(), g.flatten().tolist())) if total else 0.0


def term_hires_cam(a: float, g: float) -> float:
    return a * g


def term_layer_cam(a: float, g: float) -> float:
    return a * max(g, 0.0)


def term_grad_cam_elementwise(a: float, g: float) -> float:
    return max(a * g, 0.0)


def of_weights(weight, activation: Tensor, gradient: Tensor) -> Tensor:
    """`sum_k w_k A_k`, channel by channel."""
    maps = []
    for a, g in zip(activation.detach(), gradient.detach()):
        maps.append(sum(weight(a[k], g[k]) * a[k] for k in range(len(a))))
    return torch.stack(maps)


def of_terms(term, activation: Tensor, gradient: Tensor) -> Tensor:
    found = [term(a, g) for a, g in zip(activation.flatten().tolist(), gradient.flatten().tolist())]
    return torch.tensor(found, dtype=torch.float64).reshape(activation.shape).sum(1)


def by_paper(method: str, activation: Tensor, gradient: Tensor) -> Tensor:
    weight, term = globals().get(f"weight_{method}"), globals().get(f"term_{method}")
    return of_weights(weight, activation, gradient) if weight else of_terms(term, activation, gradient)


NETS = {
    "a pooled linear head": lambda dims: small_net(dims=dims),
    "a head of two layers": lambda dims: headed(dims=dims),
    "all positions read": lambda dims: small_net(dims=dims, dense=True),
    "activations of both signs": lambda dims: headed(dims=dims, act=nn.Tanh()),
}


@pytest.mark.parametrize("layer", ["features", "act", "stem"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("method", FORMULAS[:-1])
def test_maps_are_those_of_a_loop_written_from_the_paper(method, dims, kind, layer):
    """`features` has both signs, and so may have the sums of its channels."""
    net, x = NETS[kind](dims), inputs(3, dims)
    expected = by_paper(method, *hooked(net, layer, x, logit))
    size = float(expected.abs().max())
    assert size > 1e-3
    close(raw(method, net, layer, x), expected, method)
    default = unscaled(method, net, layer, x)
    close(default, expected if method == "hires_cam" else expected.clamp(min=0), "by default")


def test_the_loops_differ_so_that_a_wrong_method_would_show():
    net, x = NETS["activations of both signs"](2), inputs(3)
    maps = {method: by_paper(method, *hooked(net, "act", x, logit)) for method in FORMULAS[:-1]}
    for one, other in itertools.combinations(maps, 2):
        assert float((maps[one] - maps[other]).abs().max()) > 1e-3, f"{one} and {other}"


@pytest.mark.parametrize("layer", ["features", "act"])
@pytest.mark.parametrize("alphas", ["paper", "authors"])
def test_the_alphas_of_the_paper_and_of_the_authors_code(alphas, layer):
    net, x = headed(), inputs(3)
    activation, gradient = hooked(net, layer, x, logit)
    expected = of_weights(lambda a, g: weight_grad_cam_pp(a, g, alphas == "authors"), activation, gradient)
    close(raw("grad_cam_pp", net, layer, x, alphas=alphas), expected)
    other = of_weights(lambda a, g: weight_grad_cam_pp(a, g, alphas == "paper"), activation, gradient)
    assert float((expected - other).abs().max()) > 1e-3


def test_an_alpha_whose_denominator_is_not_positive_is_zero():
    """Only where activations sum to something negative; there the plain quotient has the other sign."""
    net, x = small_net(dense=True), inputs(3)
    with torch.no_grad():
        net.fc.weight.mul_(2)
        net.features.bias.sub_(1)
    activation, gradient = hooked(net, "features", x, logit)
    below = 2 + activation.flatten(2).sum(2)[..., None, None] * gradient.relu()
    assert bool(((below < 0) & (gradient > 0)).any())
    close(raw("grad_cam_pp", net, "features", x), by_paper("grad_cam_pp", activation, gradient))


def test_small_gradients_keep_their_alphas():
    """In float32 a gradient of 1e-15 has a cube of 0: the map is the one of the same gradients, larger."""
    net, x = headed().float(), inputs(3, dtype=torch.float32)
    tiny = camfn.grad_cam_pp(net, "act", x, lambda y: y[3] * 2.0**-60)
    assert_close(tiny, camfn.grad_cam_pp(net, "act", x, lambda y: y[3] * 2.0**-30), 1e-6)


def test_a_channel_that_sums_to_nothing_has_no_weight_in_xgrad_cam():
    net, x = small_net(dense=True), inputs(3)
    with torch.no_grad():
        net.features.weight[2:4] = 0
        net.features.bias[2:4] = torch.tensor([0.0, 1.0])
    for layer in ("features", "act"):
        weights = camfn.METHODS["xgrad_cam"].run(net, layer, x, 3).weights[0]
        assert bool(torch.isfinite(weights).all())
        assert [k for k in range(6) if not weights[..., k].any()] == [2]
    cancels = torch.tensor([[[0.1, 0.2, -0.3]]], dtype=torch.float64)
    assert float(cancels.sum()) != 0  # but for rounding
    assert camfn.weights.xgrad_cam(torch.rand(1, 1, 1, 3).double(), cancels).tolist() == [[[0.0]]]


# -------------------------------------------------------------------------------------- closed forms, a pooled linear head


def pooled(dims: int = 2, act: nn.Module | None = None) -> tuple[SmallNet, Tensor, Tensor, Tensor, int]:
    """A net, its input, the activation there, the rows of the linear layer, and the number of positions."""
    net, x = small_net(dims=dims), inputs(3, dims)
    net.act = net.act if act is None else act
    activation, _ = hooked(net, "act", x, logit)
    return net, x, activation.detach(), net.fc.weight.detach()[CLASSES], activation[0, 0].numel()


def weighed(w: Tensor, activation: Tensor) -> Tensor:
    return torch.einsum("nk,nk...->n...", w, activation)


@pytest.mark.parametrize("dims", DIMS)
def test_on_a_pooled_linear_head_all_of_them_are_cam(dims):
    net, x, activation, rows, z = pooled(dims)
    cam = weighed(rows, activation).relu()
    assert float(cam.max()) > 0.1
    for method in ("grad_cam", "xgrad_cam", "hires_cam", "shapley_cam"):
        found = z * getattr(camfn, method)(net, "act", x, CLASSES, relu=True, normalize=False)
        close(found, cam, method)
    close(camfn.cam(net, "act", x, CLASSES, fc="fc", normalize=False).relu(), cam)


@pytest.mark.parametrize("dims", DIMS)
def test_on_a_pooled_linear_head_layer_cam_and_the_elementwise_one_take_the_positive_rows(dims):
    net, x, activation, rows, z = pooled(dims)
    expected = weighed(rows.relu(), activation) / z
    for method in ("layer_cam", "grad_cam_elementwise"):
        close(raw(method, net, "act", x), expected, method)


@pytest.mark.parametrize("dims", DIMS)
def test_on_a_pooled_linear_head_the_weights_of_grad_cam_pp_have_a_closed_form(dims):
    """`Z relu(g) / (2 + g S_k)`; and with the authors' alphas, which are even, `relu(g)`."""
    net, x, activation, rows, z = pooled(dims)
    g, total = rows / z, activation.flatten(2).sum(2)
    found = camfn.METHODS["grad_cam_pp"].run(net, "act", x, CLASSES).weights[0][:, 0]
    close(found, z * g.relu() / (2 + g * total))
    authors = camfn.METHODS["grad_cam_pp"].run(net, "act", x, CLASSES, alphas="authors").weights[0][:, 0]
    close(authors, g.relu())


def test_a_leaky_relu_breaks_those_that_read_the_sign_of_the_activation():
    """Grad-CAM, HiResCAM and ShapleyCAM stay CAM, and XGrad-CAM too, where no channel sums to zero. LayerCAM and the
    element-wise Grad-CAM part, and Grad-CAM++'s form holds only while `2 + g S_k` is positive."""
    net, x, activation, rows, z = pooled(act=nn.LeakyReLU(0.4))
    assert float(activation.min()) < 0
    cam = weighed(rows, activation)
    for method in ("grad_cam", "hires_cam", "shapley_cam", "xgrad_cam"):
        close(z * raw(method, net, "act", x), cam, method)
    close(z * raw("layer_cam", net, "act", x), weighed(rows.relu(), activation))
    elementwise = raw("grad_cam_elementwise", net, "act", x)
    assert float((elementwise - raw("layer_cam", net, "act", x)).abs().max()) > 1e-3
    by_hand = weighed(rows.relu(), activation.relu()) + weighed((-rows).relu(), (-activation).relu())
    close(z * elementwise, by_hand)
    with torch.no_grad():
        net.fc.weight.mul_(20)
        net.features.bias.sub_(2)
    activation, _ = hooked(net, "act", x, logit)
    g, total = 20 * rows / z, activation.detach().flatten(2).sum(2)
    formula, found = z * g.relu() / (2 + g * total), camfn.METHODS["grad_cam_pp"].run(net, "act", x, CLASSES).weights[0][:, 0]
    holds = 2 + g * total > 0
    assert bool((~holds & (g > 0)).any())
    close(found, torch.where(holds, formula, 0))


@pytest.mark.parametrize("dims", DIMS)
def test_on_a_head_of_two_layers_the_methods_differ(dims):
    """But for the two pairs that cannot: where nothing is negative, LayerCAM is the element-wise Grad-CAM, and a logit of a
    piecewise linear head has no curvature. Another layer, and another activation, tell these apart."""
    net, x = headed(dims=dims), inputs(3, dims)
    maps = {method: raw(method, net, "act", x) for method in FORMULAS}
    equal = [{"layer_cam", "grad_cam_elementwise"}, {"grad_cam", "shapley_cam"}]
    for one, other in itertools.combinations(maps, 2):
        difference = float((maps[one] - maps[other]).abs().max())
        if {one, other} in equal:
            close(maps[one], maps[other], f"{one} and {other}")
        else:
            assert difference > 1e-3, f"{one} and {other}"
    both = headed(dims=dims, act=nn.Tanh())
    signed = [raw(method, both, "act", x) for method in ("layer_cam", "grad_cam_elementwise")]
    assert float((signed[0] - signed[1]).abs().max()) > 1e-3
    bent = [raw(method, headed(nn.GELU(), dims=dims), "act", x) for method in ("grad_cam", "shapley_cam")]
    assert float((bent[0] - bent[1]).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------- ShapleyCAM


def hessian_weights(net: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """`mean_p (G - 1/2 H A)`, with the whole Hessian of each image, row by row."""
    activation, gradient = hooked(net, layer, x, score)
    weights = []
    for i in range(len(x)):
        rows = [torch.autograd.grad(v, activation, retain_graph=True)[0][i].flatten() for v in gradient[i].flatten()]
        bend = torch.stack(rows) @ activation[i].detach().flatten()
        weights.append((gradient[i].detach() - bend.reshape(gradient[i].shape) / 2).flatten(1).mean(1))
    return torch.stack(weights)


SCORES = {
    "logit": (lambda: CLASSES, logit),
    "rest": (lambda: camfn.targets.rest(CLASSES), lambda y, i: y[CLASSES[i]] + y.log_softmax(0)[CLASSES[i]]),
    "probability": (lambda: camfn.targets.probability(CLASSES), lambda y, i: y.softmax(0)[CLASSES[i]]),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("bend", [nn.GELU(), nn.Tanh(), nn.SiLU()], ids=str)
def test_shapley_cam_has_the_weights_of_the_whole_hessian(bend, kind):
    target, score = SCORES[kind]
    net, x = headed(bend), inputs(3)
    expected = hessian_weights(net, "act", x, score)
    found = camfn.METHODS["shapley_cam"].run(net, "act", x, target()).weights[0][:, 0]
    close(found, expected)
    plain = camfn.METHODS["grad_cam"].run(net, "act", x, target()).weights[0][:, 0]
    assert float((found - plain).abs().max()) > 0.01 * float(plain.abs().max())


def test_shapley_cam_of_several_layers_has_no_mixed_derivatives():
    net, x, target = headed(nn.GELU()), inputs(3), camfn.targets.rest(CLASSES)
    for layers in (("stem", "act"), ("act", "stem"), ("act", "act")):
        outcome = camfn.METHODS["shapley_cam"].run(net, layers, x, target)
        for layer, found in zip(layers, outcome.weights):
            close(found[:, 0], hessian_weights(net, layer, x, SCORES["rest"][1]), layer)
        assert outcome.backwards == 3 * (1 + len(set(layers)))


def test_what_shapley_cam_weighs_by_sums_to_the_score_where_that_is_a_quadratic_of_the_activation():
    """`<G, A> - 1/2 <A, H A>` is `s(A) - s(0)` to second order; and H A is what torch's forward mode makes it."""

    class Quadratic(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            z = self.act(self.features(self.stem(x))).flatten(1)
            return torch.stack([z[:, :5].square().sum(1), (z @ z.mT).diagonal() + z[:, 7], z.sum(1)], 1)

    net, x = Quadratic().double(), inputs(3)
    (slope, bend), seen = bent_of(net, "act", x, lambda y: y[1]), camfn.tap(net, "act")(camfn.state_of(net), x).seen
    without = camfn.tap(net, "act")(camfn.state_of(net), x, None, torch.zeros_like(seen)).output
    with_ = camfn.pure(net)(camfn.state_of(net), x)
    close(((slope - bend / 2) * seen).flatten(1).sum(1), with_[:, 1] - without[:, 1])
    found = camfn.METHODS["shapley_cam"].run(net, "act", x, 1).weights[0][:, 0]
    close(found, (slope - bend / 2).flatten(2).mean(2))


def bent_of(net: nn.Module, layer: str, x: Tensor, score) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian-vector product by the forward mode of torch, which camfn does not use."""
    run, state = camfn.tap(net, layer), camfn.state_of(net)
    seen = run(state, x).seen

    def slope(nudge: Tensor) -> Tensor:
        return torch.func.grad(lambda n: torch.vmap(score)(run(state, x, n).output).sum())(nudge)

    return jvp(slope, (torch.zeros_like(seen),), (seen,))


# --------------------------------------------------------------------------------------------------- Smooth Grad-CAM++


def smooth_weights(net: nn.Module, layer: str, x: Tensor, noise: Tensor) -> Tensor:
    """Means of G, G^2 and G^3 first; alpha and the ReLU from the means; the activation of the clean input."""
    activation = hooked(net, layer, x, logit)[0].detach()
    gradients = [hooked(net, layer, x + e, logit)[1].detach() for e in noise]
    weights = torch.zeros(activation.shape[:2], dtype=torch.float64)
    for i, k in itertools.product(*map(range, weights.shape)):
        total = float(activation[i, k].sum())
        for place in itertools.product(*map(range, activation.shape[2:])):
            drawn = [float(g[(i, k, *place)]) for g in gradients]
            d1, d2, d3 = (sum(v**power for v in drawn) / len(drawn) for power in (1, 2, 3))
            below = 2 * d2 + total * d3
            weights[i, k] += (d2 / below if below > 0 else 0.0) * max(d1, 0.0)
    return weights


@pytest.mark.parametrize("layer", ["features", "act"])
@pytest.mark.parametrize(("draws", "std", "seed"), [(4, 0.3, 0), (3, 1.0, 7), (1, 0.5, 1)])
def test_smooth_grad_cam_pp_is_a_loop_over_noisy_inputs(layer, draws, std, seed):
    net, x = headed(), inputs(3)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(3, 8, 8, generator=generator) for _ in range(draws)]).double() * std
    found = camfn.METHODS["smooth_grad_cam_pp"].run(
        net, layer, x, CLASSES, num_samples=draws, std=std, seed=seed, units="input"
    )
    assert_close(found.weights[0][:, 0], smooth_weights(net, layer, x, noise), 1e-7)  # float32 noise times std is rounded
    assert (found.forwards, found.backwards) == (3 * (1 + draws), 3 * draws)
    plain = camfn.METHODS["grad_cam_pp"].run(net, layer, x, CLASSES).weights[0]
    assert float((found.weights[0] - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("layer", ["features", "act"])
def test_smooth_grad_cam_pp_without_noise_is_grad_cam_pp(layer):
    net, x = headed(), inputs(3)
    for draws in (1, 3):
        still = raw("smooth_grad_cam_pp", net, layer, x, num_samples=draws, std=0.0)
        close(still, raw("grad_cam_pp", net, layer, x))


def test_the_defaults_of_smooth_grad_cam_pp():
    net, x = headed(), inputs(3)
    options = {"num_samples": 4, "std": 0.05, "units": "range", "seed": 0}
    found = camfn.smooth_grad_cam_pp(net, "act", x, 3)
    assert torch.equal(found, camfn.smooth_grad_cam_pp(net, "act", x, 3, **options))
    for i, image in enumerate(x):
        own = options | {"std": 0.05 * float(image.max() - image.min()), "units": "input"}
        close(found[i], camfn.smooth_grad_cam_pp(net, "act", image[None], 3, **own)[0])


# --------------------------------------------------------------------------------------------------- LayerCAM, fused


def scaled(maps: Tensor, deepest: bool) -> Tensor:
    """Equation 9 of the paper, image by image."""
    shares = torch.stack([m / m.max() if m.max() > 0 else torch.zeros_like(m) for m in maps])
    return shares if deepest else torch.tanh(2 * shares)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("size", [None, "input", "odd"])
def test_layer_cam_fused_as_in_the_paper(dims, size):
    net, x, layers = headed(dims=dims), inputs(3, dims), ("stem", "act", "between")
    maps = [unscaled("layer_cam", net, layer, x) for layer in layers]
    assert [m.shape[-1] for m in maps] == [8, 4, 3]
    sides = {None: (8,) * dims, "input": (8,) * dims, "odd": (7, 9, 5)[:dims]}[size]
    parts = [scaled(m, i == 2) for i, m in enumerate(maps)]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    expected = torch.stack([F.interpolate(p[:, None], sides, mode=mode, align_corners=False)[:, 0] for p in parts]).amax(0)
    asked = sides if size == "odd" else size
    close(unscaled("layer_cam", net, layers, x, fuse="paper", size=asked), expected)
    flat = expected.flatten(1)
    low, high = (edge.reshape(3, *[1] * dims) for edge in (flat.amin(1), flat.amax(1)))
    normal = camfn.layer_cam(net, layers, x, CLASSES, fuse="paper", size=asked, layout="channels_first")
    close(normal, (expected - low) / (high - low))


def test_a_fused_map_of_several_targets_has_one_for_each():
    net, x, layers = headed(), inputs(3), ("stem", "act")
    together = camfn.layer_cam(net, layers, x, torch.tensor([[0, 3], [1, 2], [4, 4]]), fuse="paper")
    assert together.shape == (3, 2, 8, 8)
    for t, classes in enumerate(([0, 1, 4], [3, 2, 4])):
        close(together[:, t], camfn.layer_cam(net, layers, x, classes, fuse="paper"))


def test_a_map_with_nothing_in_it_adds_nothing_to_a_fused_one():
    net, x = headed(), inputs(3)
    with torch.no_grad():
        net.between.weight.zero_()  # no gradient before it
    with pytest.warns(camfn.CamWarning, match="flat"):
        found = camfn.layer_cam(net, ("act", "bend"), x, CLASSES, fuse="paper", normalize=False)
    assert bool(torch.isfinite(found).all())


# ---------------------------------------------------------------------------------------------------------- CAMERAS


FACTORS = (1.5, 2.0)


def cameras_by_hand(net: nn.Module, layer: str, x: Tensor, kept=None) -> Tensor:
    """The authors' steps: bicubic inputs, bilinear activations and gradients, their means, the product."""
    maps = []
    for i in range(len(x)):
        parts = []
        for r, side in enumerate((8, 12, 16)):
            at = x[i : i + 1] if side == 8 else F.interpolate(x[i : i + 1], (side, side), mode="bicubic", align_corners=False)
            if kept is not None and r not in kept[i]:
                continue
            pair = hooked(net, layer, at, lambda y, _, i=i: y[CLASSES[i]])
            parts.append([F.interpolate(v.detach(), (8, 8), mode="bilinear", align_corners=False) for v in pair])
        activation, gradient = (torch.stack(side).mean(0) for side in zip(*parts))
        maps.append((activation * gradient).sum(1)[0])
    return torch.stack(maps)


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("layer", ["features", "act", "stem"])
def test_cameras_is_the_authors_steps(layer, at_once, monkeypatch):
    monkeypatch.setattr(camfn.formulas.maps, "_VALUES_AT_ONCE", at_once)
    net, x = headed(), inputs(3)
    expected = cameras_by_hand(net, layer, x)
    outcome = camfn.METHODS["cameras"].run(net, layer, x, CLASSES, factors=FACTORS, relu=False, normalize=False)
    close(outcome.maps, expected)
    assert (outcome.forwards, outcome.backwards) == (9, 9)
    assert float((expected - cameras_by_hand(net, layer, x, [[0]] * 3)).abs().max()) > 1e-4


def test_cameras_leaves_out_sizes_that_predict_another_class_where_none_is_given():
    net, x = headed(seed=4), inputs(6, seed=2)
    net.eval()
    with torch.no_grad():
        predicted = [net(x).argmax(1)]
        predicted += [net(F.interpolate(x, (side, side), mode="bicubic")).argmax(1) for side in (12, 16)]
    kept = [[r for r in range(3) if predicted[r][i] == predicted[0][i]] for i in range(6)]
    assert [0] in kept or [0, 1] in kept or [0, 2] in kept
    assert [0, 1, 2] in kept
    found = camfn.cameras(net, "act", x, factors=FACTORS, relu=False, normalize=False)
    for i in range(6):
        classes = [int(predicted[0][i])]
        parts = []
        for r in kept[i]:
            at = x[i : i + 1] if r == 0 else F.interpolate(x[i : i + 1], (8 + 4 * r,) * 2, mode="bicubic", align_corners=False)
            pair = hooked(net, "act", at, lambda y, _, c=classes: y[c[0]])
            parts.append([F.interpolate(v.detach(), (8, 8), mode="bilinear", align_corners=False) for v in pair])
        activation, gradient = (torch.stack(side).mean(0) for side in zip(*parts))
        close(found[i], (activation * gradient).sum(1)[0], f"image {i}")
    given = camfn.cameras(net, "act", x, predicted[0], factors=FACTORS, relu=False, normalize=False)
    assert float((given - found).abs().max()) > 1e-4


def test_the_sizes_of_cameras_are_the_authors():
    """224, 324 ... 924 of an input of 224."""
    assert [round(224 * factor) for factor in camfn.methods.averaged.SIZES] == list(range(324, 1000, 100))


@pytest.mark.parametrize("dims", DIMS)
def test_cubic_interpolation_is_torchs_in_two_axes_and_along_each_of_others(dims):
    x, size = inputs(2, dims, side=9), (13, 5, 20)[:dims]
    options = {"mode": "bicubic", "align_corners": False}
    if dims == 1:
        expected = F.interpolate(x[..., None].expand(-1, -1, -1, 3), (13, 3), **options)[..., 1]
    elif dims == 2:
        expected = F.interpolate(x, size, **options)
    else:
        planes = F.interpolate(x.flatten(1, 2), size[1:], **options).unflatten(1, (3, 9))
        expected = F.interpolate(planes.flatten(3), (13, 100), **options).unflatten(3, (5, 20))
    close(camfn.maps.cubic(x, size), expected)
    assert torch.equal(camfn.maps.cubic(x, x.shape[2:]), x)


# --------------------------------------------------------------------------------------------------------- FullGrad


def parts_of(net: nn.Module, x: Tensor, classes) -> list[Tensor]:
    """Input times gradient, and every bias times its gradient, with hooks as in the authors' code."""
    net, x, seen = copy.deepcopy(net).eval(), x.clone().requires_grad_(), []

    def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        seen.append((module, out))
        return out.clone()  # an in-place ReLU would put its own output in the place of this one

    for module in net.modules():
        if isinstance(module, (*CONVS.values(), nn.Linear, nn.modules.batchnorm._BatchNorm)):
            module.register_forward_hook(hook)
    score = net(x)[range(len(x)), classes].sum()
    slopes = torch.autograd.grad(score, [x, *(out for _, out in seen)])
    parts = [x.detach() * slopes[0]]
    for (module, _), slope in zip(seen, slopes[1:]):
        bias = module.bias
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scale = (1.0 if module.weight is None else module.weight) / torch.sqrt(module.running_var + module.eps)
            bias = (0.0 if bias is None else bias) - module.running_mean * scale
        if bias is not None:
            parts.append((bias.detach().reshape(-1, *[1] * (slope.ndim - 2)) * slope).detach())
    return parts


def psi(part: Tensor, size, each: bool, align_corners: bool) -> Tensor:
    """Absolute value, min-max of an image (or of each of its channels), linear upsampling, sum over channels."""
    maps = []
    for image in part.abs():
        groups = [channel[None] for channel in image] if each else [image]
        unit = [torch.zeros_like(g) if g.max() == g.min() else (g - g.min()) / (g.max() - g.min()) for g in groups]
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[image.ndim - 1]
        grown = F.interpolate(torch.cat(unit)[None], tuple(size), mode=mode, align_corners=align_corners)
        maps.append(grown[0].sum(0))
    return torch.stack(maps)


class Biased(nn.Module):
    """Everything that has a bias, or not: with and without, affine and not, one that runs twice, one that never does."""

    def __init__(self, dims: int = 2):
        super().__init__()
        conv, norm = CONVS[dims], {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.first, self.plain = conv(3, 4, 3, padding=1), norm(4, affine=False)
        self.second, self.norm = conv(4, 4, 3, padding=1, bias=False), norm(4)
        self.twice, self.never = conv(4, 4, 1), conv(4, 4, 1)
        self.act, self.pool = nn.ReLU(inplace=True), POOLS[dims](2)
        self.hidden, self.fc = nn.Linear(4 * 2**dims, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.plain(self.first(x)))
        z = self.act(self.norm(self.second(z)) + z)
        z = self.act(self.twice(self.act(self.twice(z))))
        return self.fc(torch.relu(self.hidden(self.pool(z).flatten(1))))


def biased(dims: int = 2) -> nn.Module:
    return seeded(Biased(dims), dims)


@pytest.mark.parametrize("form", ["authors", "pytorch-grad-cam"])
@pytest.mark.parametrize("dims", DIMS)
def test_full_grad_is_the_authors_steps(dims, form):
    net, x = biased(dims), inputs(3, dims)
    parts = [part for part in parts_of(net, x, CLASSES) if part.ndim == x.ndim]
    assert len(parts) == 1 + 5
    each = form == "pytorch-grad-cam"
    expected = sum(psi(part, x.shape[2:], each, not each) for part in parts)
    found = camfn.full_grad(net, None, x, CLASSES, form=form, normalize=False)
    close(found, expected)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("make", [biased, lambda dims: small_net(dims=dims), lambda dims: headed(dims=dims)])
def test_full_grad_is_complete(make, dims):
    """`s = sum x * ds/dx + sum_l sum b_l * ds/dz_l`, of each image; and camfn says nothing of parts that are left out."""
    net, x = make(dims), inputs(3, dims)
    parts = parts_of(net, x, CLASSES)
    total = sum(part.flatten(1).sum(1) for part in parts)
    with torch.no_grad():
        scores = copy.deepcopy(net).eval()(x)[range(3), CLASSES]
    close(total, scores, size=max(part.abs().max() for part in parts) * parts[0][0].numel())
    assert float((parts[0].flatten(1).sum(1) - scores).abs().min()) > 1e-2  # without biases it is not
    assert not any("full_grad" in note for note in camfn.explain(net, None, x, CLASSES, method="full_grad").notes)


class Holds:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module):
        self.layer = layer


LED_TO: dict[str, nn.Module] = {}


class Hidden(nn.Module):
    """A convolution and a batch norm in something that is no module."""

    def __init__(self, hold):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.all = [seeded(nn.Sequential(self.stem, conv, norm, self.fc)).double().eval()]
        self.parts = hold(conv), hold(norm)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.parts
        return self.fc(norm(conv(self.stem(x))).relu().mean((2, 3)))


HOLDS = {
    "list": lambda layer: _Called([layer], lambda held: held[0]),
    "dict": lambda layer: _Called({"layer": layer}, lambda held: held["layer"]),
    "slots": lambda layer: _Called(Holds(layer), lambda held: held.layer),
    "closure": lambda layer: lambda z: layer(z),
    "partial": lambda layer: functools.partial(lambda of, z: of(z), layer),
    "default": lambda layer: lambda z, of=layer: of(z),
    "bound method": lambda layer: layer.forward,
    "Sequential": lambda layer: _Called((nn.Sequential(layer),), lambda held: held[0]),
}


class _Called:
    def __init__(self, held, of):
        self.held, self.of = held, of

    def __call__(self, z: Tensor) -> Tensor:
        return self.of(self.held)(z)


@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("prepared", [False, True])
def test_full_grad_counts_the_biases_of_layers_that_are_not_registered(kind, prepared):
    net, x = Hidden(HOLDS[kind]), inputs(2)
    stem, conv, norm, fc = net.all.pop()
    plain = nn.Sequential(stem, conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    expected = camfn.full_grad(plain, None, x, [1, 2], normalize=False)
    for _ in range(2):
        close(camfn.full_grad(camfn.prepare(net) if prepared else net, None, x, [1, 2], normalize=False), expected)
    assert not any("full_grad" in note for note in camfn.explain(net, None, x, [1, 2], method="full_grad").notes)
    each = vmap(lambda image: camfn.full_grad(net, None, image[None], 1, normalize=False)[0])(x)
    close(each, camfn.full_grad(plain, None, x, 1, normalize=False))


@pytest.mark.parametrize("index", [0, 1])
def test_full_grad_refuses_a_layer_that_only_a_global_leads_to(index):
    def hold(layer: nn.Module):
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)[index]):
            LED_TO["layer"] = layer
            return lambda z: LED_TO["layer"](z)
        return layer.forward

    net = Hidden(hold)
    net.all.clear()
    with pytest.raises(camfn.CamError, match=f"reached a {'BatchNorm2d' if index else 'Conv2d'}, .*register the module"):
        camfn.full_grad(net, None, inputs(2), 1)


def test_full_grad_counts_the_bias_of_a_model_that_is_one_layer():
    conv, x = seeded(nn.Conv2d(3, 4, 1)).double(), inputs(2)
    score = lambda y: y[1].sum()  # noqa: E731
    close(camfn.full_grad(conv, None, x, score), camfn.full_grad(nn.Sequential(conv), None, x, score))


def test_full_grad_says_what_its_parts_leave_out():
    net, x = headed(nn.GELU()), inputs(3)
    total = sum(part.flatten(1).sum(1) for part in parts_of(net, x, CLASSES))
    with torch.no_grad():
        scores = copy.deepcopy(net).eval()(x)[range(3), CLASSES]
    worst = float(((total - scores).abs() / torch.maximum(total.abs(), scores.abs())).max())
    assert worst > 0.05
    (note,) = camfn.explain(net, None, x, CLASSES, method="full_grad").notes
    assert f"differ from the score by up to {worst:.0%}" in note
    probability = camfn.explain(net, None, x, camfn.targets.probability(CLASSES), method="full_grad")
    assert probability.notes == ()  # of which they are no decomposition


def test_full_grad_reads_linear_layers_with_the_channels_last():
    """A linear layer on `(n, *grid, c)` is one more part; pytorch-grad-cam leaves it out."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.mix(torch.relu(self.conv(x)).movedim(1, -1))).mean((1, 2)))

    torch.manual_seed(0)
    net, x = Last().double(), inputs(3)
    (_, mix), (_, conv) = (hooked(net, name, x, logit) for name in ("mix", "conv"))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf)[range(3), CLASSES].sum(), leaf)
    firsts = [x * slope, conv.detach() * net.conv.bias.detach()[:, None, None]]
    last = (mix * net.mix.bias).movedim(-1, 1).detach()
    expected = sum(psi(part, (8, 8), False, True) for part in (*firsts, last))
    close(camfn.full_grad(net, None, x, CLASSES, normalize=False), expected)
    peer = camfn.full_grad(net, None, x, CLASSES, form="pytorch-grad-cam", normalize=False)
    close(peer, sum(psi(part, (8, 8), True, False) for part in firsts))


def test_full_grad_at_another_size_is_the_map_resized():
    net, x = biased(), inputs(3)
    raw = camfn.full_grad(net, None, x, CLASSES, normalize=False)
    assert torch.equal(camfn.full_grad(net, None, x, CLASSES, normalize=False, size="input"), raw)
    expected = F.interpolate(raw[:, None], (5, 11), mode="bilinear", align_corners=False)[:, 0]
    close(camfn.full_grad(net, None, x, CLASSES, normalize=False, size=(5, 11)), expected)


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(words: str, method: str, *args, **options) -> None:
    with pytest.raises(camfn.CamError, match=words):
        getattr(camfn, method)(*args, **options)


def test_wrong_options_are_refused():
    net, x = small_net(), inputs()
    refused(r'alphas must be "paper" or "authors", found \'both\'', "grad_cam_pp", net, "act", x, alphas="both")
    refused(r'fuse must be None, "paper" or "torchcam", found \'max\'', "layer_cam", net, ("stem", "act"), x, fuse="max")
    refused("fuse='paper' joins the maps of several layers", "layer_cam", net, "act", x, fuse="paper")
    refused("fuse='paper' joins the maps of several layers", "layer_cam", net, ("stem", "act"), x, fuse="paper", relu=False)
    refused("from shallow to deep; found grids", "layer_cam", net, ("act", "stem"), x, fuse="torchcam")
    refused(r"size=\(1, 2, 3\)", "layer_cam", net, ("stem", "act"), x, fuse="torchcam", size=(1, 2, 3))
    refused('form must be "authors" or "pytorch-grad-cam"', "full_grad", net, None, x, form="idiap")
    refused("full_grad takes no layer: pass layer=None, found 'act'", "full_grad", net, "act", x)
    refused('layout must be "auto" in full_grad', "full_grad", net, None, x, layout="channels_last")
    for factors in ((0.0,), (math.inf,), "12", 2.0, (1.5, None)):
        refused("factors must be positive numbers", "cameras", net, "act", x, factors=factors)
    for draws in (0, 1.5, None):
        refused("smooth_grad_cam_pp needs a whole num_samples >= 1", "smooth_grad_cam_pp", net, "act", x, num_samples=draws)
    for std in (-1.0, math.inf, None):
        refused("smooth_grad_cam_pp needs a finite std >= 0", "smooth_grad_cam_pp", net, "act", x, std=std)
    refused("seed must be an int or a torch.Generator", "smooth_grad_cam_pp", net, "act", x, seed="1")


def test_a_model_of_one_size_is_refused_by_cameras_in_a_sentence():
    net, x = small_net(dense=True), inputs()
    refused(r"does not accept \(12, 12\).*factors=\(\) for none", "cameras", net, "act", x, factors=(1.5,))
    assert camfn.cameras(net, "act", x, 1, factors=(), relu=False).shape == (2, 8, 8)


def test_an_input_without_positions_is_refused_by_full_grad():
    net = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5))
    refused(r"full_grad needs spatial axes in the input, and x has shape \(2, 8\)", "full_grad", net, None, torch.rand(2, 8))


class Views(nn.Module):
    """Two pictures, of which each goes through half of the network."""

    def __init__(self):
        super().__init__()
        self.left, self.right = small_net(1), small_net(2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


@pytest.mark.parametrize(("method", "options"), [("smooth_grad_cam_pp", {"std": 1.0}), ("cameras", {"factors": (1.5,)})])
def test_which_of_several_pictures_is_changed_has_to_be_said(method, options):
    net, x = Views(), (inputs(seed=1), inputs(seed=2))
    refused("masked= must say which input", method, net, "left.features", x, 1, **options)
    alone = raw(method, net.left, "features", x[0], 1, **options)
    for given, key in ((x, 0), ({"left": x[0], "right": x[1]}, "left")):
        close(raw(method, net, "left.features", given, 1, masked=key, **options), alone)
    if method == "smooth_grad_cam_pp":
        other = raw(method, net, "left.features", x, 1, masked=1, **options)
        close(other, raw("grad_cam_pp", net.left, "features", x[0], 1))  # the noise does not reach the layer
        assert float((other - alone).abs().max()) > 1e-6
