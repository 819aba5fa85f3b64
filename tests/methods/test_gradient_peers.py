"""Installed peers give the same maps of gradients, wherever they are right: torchcam 0.5.0 and captum 0.9.0 in float64,
pytorch-grad-cam 1.5.7 in float32. Where they are not, a test says why, and sees that they differ."""

import copy

import pytest
import torch
from torch import Tensor, nn

import camfn
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import grad_cam, peer, torchvision_models
from tests.oracles.networks import headed, inputs, livened, small_net
from tests.oracles.scores import averaged, entropy, margin, norm

# On random networks many a map is nowhere positive.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")

CLASSES = [4, 0, 2]
NETS = {"pooled": lambda dims: calm(small_net(dims=dims)), "two layers": lambda dims: calm(headed(dims=dims))}


def calm(net: nn.Module) -> nn.Module:
    """With logits of which a softmax leaves some of each."""
    with torch.no_grad():
        net.fc.weight.mul_(0.2)
    return net


# ---------------------------------------------------------------------------------------------- torchcam, in float64

THEIRS = {"grad_cam": "GradCAM", "xgrad_cam": "XGradCAM", "layer_cam": "LayerCAM"}


def theirs(name: str, model: nn.Module, layer, x: Tensor, classes=None, *, targets=None, normalize=False, seed=0, **options):
    """torchcam's maps, on a copy of the model; its noise comes from the global generator."""
    model, state = copy.deepcopy(model).eval(), torch.get_rng_state()
    layer = list(layer) if isinstance(layer, tuple) else layer
    try:
        torch.manual_seed(seed)
        with getattr(peer(), name)(model, layer, input_shape=tuple(x.shape[1:]), **options) as extractor:
            return [m.detach() for m in extractor(classes, model(x), normalized=normalize, targets=targets)]
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("layer", ["stem", "features", "act", ("stem", "act")], ids=str)
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", THEIRS)
def test_maps_equal_torchcams_for_classes_and_callables(method, dims, kind, layer):
    """To 1e-9, and XGrad-CAM to the 1e-8 that torchcam adds to what it divides by, where no channel sums to little."""
    if method == "xgrad_cam" and layer == "features":
        pytest.skip("its channels have both signs: the next test")
    model, x = NETS[kind](dims), inputs(3, dims)
    full = 0
    for given in ({"classes": 3}, {"classes": CLASSES}, {"targets": entropy}, {"targets": [margin, norm, entropy]}):
        expected = theirs(THEIRS[method], model, layer, x, **given)
        (target,) = given.values()
        ours = getattr(camfn, method)(model, layer, x, target, normalize=False, layout="channels_first")
        for one, other in zip(ours if isinstance(layer, tuple) else (ours,), expected, strict=True):
            size = float(other.max())
            full += size > 1e-4
            assert_close(one, other, (1e-6 if method == "xgrad_cam" else 1e-9) * max(1.0, size), f"{method} {given}")
    assert full >= 3 * len(expected), "maps with nothing in them compare nothing"


def test_xgrad_cam_equals_torchcams_up_to_the_number_in_its_denominator():
    """The weights differ by a share of `1e-8 / S_k`."""
    model, x = small_net(), inputs(3)
    seen = camfn.tap(model, "features")(camfn.state_of(model), x).seen
    ours = camfn.METHODS["xgrad_cam"].run(model, "features", x, CLASSES, relu=False, normalize=False)
    (other,) = theirs("XGradCAM", model, "features", x, CLASSES)
    scaled = ours.weights[0][:, 0] / (1 + 1e-8 / seen.flatten(2).sum(2))
    close(torch.einsum("nk,nkhw->nhw", scaled, seen).relu(), other)


@pytest.mark.parametrize("dims", [2, 3])
def test_fused_layer_cam_equals_torchcams(dims):
    model, x, layers = headed(dims=dims), inputs(3, dims), ("stem", "act", "between")
    for size in (None, (5, 7, 6)[:dims]):
        maps = theirs("LayerCAM", model, layers, x, CLASSES, normalize=True)
        expected = peer().LayerCAM.fuse_cams(maps, size)
        ours = camfn.layer_cam(model, layers, x, CLASSES, fuse="torchcam", size=size, normalize=False)
        assert_close(ours, expected, 1e-6, f"size={size}")
        paper = camfn.layer_cam(model, layers, x, CLASSES, fuse="paper", size=size, normalize=False)
        assert float((paper - expected).abs().max()) > 1e-2  # which leaves the deepest as it is


LIKE_TORCHCAM = {"std": 0.3, "units": "input"}


def noisy_inputs(x: Tensor, draws: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [x + torch.randn(x.shape, generator=generator) * 0.3 for _ in range(draws)]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weights_of_smooth_grad_cam_pp_equal_torchcams_where_the_gradient_does_not_depend_on_the_input(dims):
    """On a pooled linear head two of its faults come to nothing; the third is undone here. One image has torchcam's noise."""
    model, x = small_net(dims=dims), inputs(1, dims)
    run, state, last = camfn.tap(model, "act"), camfn.state_of(model), noisy_inputs(x, 4, 5)[-1]
    for c in (0, 3):
        score = lambda y, c=c: 1000 * y[c]  # noqa: E731 - so that 2 g^2 is large beside the 1e-8 that it adds
        (expected,) = theirs("SmoothGradCAMpp", model, "act", x, targets=score, seed=5)
        weights = camfn.METHODS["smooth_grad_cam_pp"].run(model, "act", x, score, seed=5, **LIKE_TORCHCAM).weights[0][:, 0]
        assert float(expected.max()) > 1e-2
        assert_close(torch.einsum("nk,nk...->n...", weights, run(state, last).seen).relu(), expected, 1e-6)


def test_fault_torchcams_smooth_grad_cam_pp():
    """It takes the ReLU of the last noisy input's gradient, sums `D3 A` where the paper has `S D3`, and weighs the activation
    of the last noisy input: a loop with these faults is it, to the bit of its noise; and so it is not Grad-CAM++ without
    noise."""
    model, x, draws = headed(), inputs(1), 3
    (expected,) = theirs("SmoothGradCAMpp", model, "act", x, 3, seed=11, num_samples=draws)
    run, state = camfn.tap(model, "act"), camfn.state_of(model)
    seen, slopes = run(state, x).seen, []
    for noisy in noisy_inputs(x, draws, 11):
        slope = torch.func.grad(lambda nudge, noisy=noisy: run(state, noisy, nudge).output[:, 3].sum())
        slopes.append(slope(torch.zeros_like(seen)))
    second, third = (torch.stack([g**power for g in slopes]).mean(0) for power in (2, 3))
    below = 2 * second + (third * seen).sum((2, 3), keepdim=True) + 1e-8
    weights, last = (second / below * slopes[-1].relu()).sum((2, 3)), run(state, noisy).seen
    close(torch.einsum("nk,nkhw->nhw", weights, last).relu(), expected)
    (scaled,) = theirs("SmoothGradCAMpp", model, "act", x, 3, normalize=True, seed=11, num_samples=draws)
    assert differ(camfn.smooth_grad_cam_pp(model, "act", x, 3, seed=11, num_samples=draws, **LIKE_TORCHCAM), scaled) > 1e-2
    (still,) = theirs("SmoothGradCAMpp", model, "act", x, 3, normalize=True, num_samples=1, std=1e-12)
    assert differ(camfn.grad_cam_pp(model, "act", x, 3), still) > 1e-2


def differ(one: Tensor, other: Tensor) -> float:
    """How far normalised maps are apart."""
    return float((one - other).abs().max())


def test_fault_torchcams_grad_cam_pp_is_the_cube_of_the_gradient():
    """It divides alphas in a copy that indexing made: what remains is `w_k = sum_p relu(G_kp)^3`."""
    model, x = headed(), inputs(3)
    (expected,) = theirs("GradCAMpp", model, "act", x, CLASSES, normalize=False)
    run, state = camfn.tap(model, "act"), camfn.state_of(model)
    seen = run(state, x).seen
    slope = torch.func.grad(lambda nudge: run(state, x, nudge).output[range(3), CLASSES].sum())(torch.zeros_like(seen))
    cubes = slope.relu().pow(3).sum((2, 3))
    assert_close(torch.einsum("nk,nkhw->nhw", cubes, seen).relu(), expected, 1e-9)
    (scaled,) = theirs("GradCAMpp", model, "act", x, CLASSES, normalize=True)
    assert differ(camfn.grad_cam_pp(model, "act", x, CLASSES), scaled) > 1e-2


# ------------------------------------------------------------------------------------------------ captum, in float64


@pytest.mark.parametrize("layer", ["stem", "features", "act"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_grad_cam_equals_captums(dims, kind, layer):
    attr = pytest.importorskip("captum.attr")
    model, x = NETS[kind](dims), inputs(3, dims)
    own = copy.deepcopy(model).eval()
    for target in (3, CLASSES):
        for relu in (False, True):
            extractor = attr.LayerGradCam(own, own.get_submodule(layer))
            expected = extractor.attribute(x, target=target, relu_attributions=relu)[:, 0].detach()
            close(
                camfn.grad_cam(model, layer, x, target, relu=relu, normalize=False, layout="channels_first"),
                expected,
                str(target),
            )
    assert float(expected.max()) > 1e-3


# ---------------------------------------------------------------------------------------- pytorch-grad-cam, in float32

PEERS = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "xgrad_cam": "XGradCAM",
    "hires_cam": "HiResCAM",
    "grad_cam_elementwise": "GradCAMElementWise",
    "layer_cam": "LayerCAM",
    "shapley_cam": "ShapleyCAM",
}


def pgc(name: str, model: nn.Module, layers: tuple[str, ...], x: Tensor, targets) -> tuple[list[Tensor], Tensor]:
    """Its channel weights at each layer, where it has such, and its one map, at the input's size."""
    model, found = copy.deepcopy(model).eval(), []
    with getattr(grad_cam(), name)(model, [model.get_submodule(layer) for layer in layers]) as extractor:
        inner = extractor.get_cam_weights

        def kept(*args):
            found.append(torch.as_tensor(inner(*args)))
            return torch.as_tensor(found[-1]).numpy()

        extractor.get_cam_weights = kept
        return found, torch.from_numpy(extractor(x, targets))


def scaled_targets(score, method: str, model, layers, x) -> list:
    """The targets times what makes the raw maximum of every map at least .01: it adds 1e-7 to it. A map that is nowhere
    positive compares nothing, and the target's opposite is taken."""

    def highest(sign: float) -> Tensor:
        signed = [lambda y, one=one: sign * one(y) for one in score]
        raw = camfn.METHODS[method].run(model, layers, x, signed, normalize=False, relu=False).maps
        return torch.stack([m.flatten(1).amax(1) for m in raw]).amin(0)

    both = torch.stack([highest(1.0), highest(-1.0)])
    assert float(both.amax(0).min()) > 1e-5, "nowhere positive, either way"
    # Its Grad-CAM++ adds 1e-6 to what it divides by, 2 g^2 and more: there gradients have to be large.
    wanted = 1e4 if method == "grad_cam_pp" else 0.02
    factors = (wanted / both.amax(0)).clamp(min=1.0) * (1 - 2.0 * (both[1] > both[0]))
    return [lambda y, one=one, factor=float(factor): factor * one(y) for one, factor in zip(score, factors)]


SCORES = {
    "logits": [lambda y, c=c: y[c] for c in CLASSES],
    "others": [margin, norm, entropy],
}


@pytest.mark.parametrize("layers", [("stem",), ("act",), ("stem", "act")], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", PEERS)
def test_weights_and_maps_equal_those_of_pytorch_grad_cam(method, kind, score, layers):
    """Weights to 1e-5, maps to 1e-4."""
    model, x = NETS[kind](2).float(), inputs(3, dtype=torch.float32)
    if method == "shapley_cam" and len(layers) > 1:
        pytest.skip("it frees the graph after the first layer, and fails at the second")
    targets = scaled_targets(SCORES[score], method, model, layers, x)
    ours = camfn.METHODS[method].run(model, layers, x, targets, relu=True, normalize=False)
    weights, map_ = pgc(PEERS[method], model, layers, x, targets)
    assert bool(weights) == (ours.weights[0].ndim == 3)  # it has none that are of positions
    for one, other in zip(ours.weights, weights):
        size = float(other.abs().max())
        assert_close(one[:, 0] / size, other / size, 1e-5, f"weights {layers}")
    placed = camfn.METHODS[method].run(model, layers, x, targets, relu=True, size="input" if len(layers) == 1 else None).maps
    assert_close(averaged(placed, x.shape[2:]), map_, 1e-4, f"map {layers}")


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()], ids=str)
def test_shapley_cam_equals_pytorch_grad_cams_on_a_head_that_is_bent(act):
    model, x = headed(act).float(), inputs(3, dtype=torch.float32)
    rest = [lambda y, c=c: 10 * (y[c] + y.log_softmax(0)[c]) for c in CLASSES]
    ours = camfn.METHODS["shapley_cam"].run(model, ("act",), x, rest, size="input", relu=True)
    (weights,), map_ = pgc("ShapleyCAM", model, ("act",), x, rest)
    size = float(weights.abs().max())
    assert_close(ours.weights[0][:, 0] / size, weights / size, 1e-5)
    assert_close(ours.maps[0], map_, 1e-4)
    plain = camfn.METHODS["grad_cam"].run(model, ("act",), x, rest).weights[0][:, 0]
    assert float((plain - weights).abs().max()) > 1e-3 * size


@pytest.mark.parametrize("kind", NETS)
def test_full_grad_equals_pytorch_grad_cams_by_its_name(kind):
    model, x = NETS[kind](2).float(), inputs(3, dtype=torch.float32)
    targets = [lambda y, c=c: 10 * y[c] for c in CLASSES]
    own = copy.deepcopy(model).eval()
    with grad_cam().FullGrad(own, []) as extractor:
        expected = torch.from_numpy(extractor(x.clone(), targets))
    assert_close(camfn.full_grad(model, None, x, targets, form="pytorch-grad-cam"), expected, 1e-4)
    # Its fault: it brings each channel to [0, 1] by itself, so that one of rounding errors weighs as much as any other.
    assert differ(camfn.full_grad(model, None, x, targets), expected) > 1e-2


NETWORKS = [
    *((method, "resnet18", "layer3") for method in ("grad_cam", "hires_cam", "layer_cam", "grad_cam_elementwise", "xgrad_cam")),
    ("layer_cam", "alexnet", "features.9"),  # without batch norms and with a dense head, which the formulas do not see
]


@pytest.mark.parametrize(("method", "name", "layer"), NETWORKS)
def test_networks_of_torchvision_equal_pytorch_grad_cam_and_torchcam(networks, method, name, layer):
    model = networks(name)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    targets = scaled_targets([lambda y: y[7]], method, model, (layer,), x)
    _, map_ = pgc(PEERS[method], model, (layer,), x, targets)
    ours = getattr(camfn, method)(model, layer, x, targets, size="input", relu=True)
    assert_close(ours, map_, 1e-4)
    if method in THEIRS:
        (other,) = theirs(THEIRS[method], model, layer, x, targets=targets, normalize=True)
        assert_close(getattr(camfn, method)(model, layer, x, targets), other, 1e-4)


@pytest.fixture(scope="module")
def networks():
    made = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = livened(getattr(torchvision_models(), name)(num_classes=10))
        return made[name]

    return get


def test_fault_pytorch_grad_cams_hires_cam_is_clipped():
    """The paper's is signed; its maps below zero are lost, before they are scaled."""
    model, x = headed().float(), inputs(3, dtype=torch.float32)
    targets = [lambda y, c=c: 10 * y[c] for c in CLASSES]
    _, map_ = pgc("HiResCAM", model, ("act",), x, targets)
    assert_close(camfn.hires_cam(model, "act", x, targets, relu=True, size="input"), map_, 1e-4)
    assert differ(camfn.hires_cam(model, "act", x, targets, size="input"), map_) > 1e-2


def test_fault_pytorch_grad_cams_grad_cam_pp_has_alphas_of_the_wrong_sign():
    """Where `2 + S g` is negative its alpha is, and takes a positive gradient off the weight; here it is 0."""
    model, x = small_net(dense=True).float(), inputs(3, dtype=torch.float32)
    with torch.no_grad():
        model.features.bias.sub_(1)
        model.fc.weight.mul_(10)
    targets = [lambda y, c=c: y[c] for c in CLASSES]
    (weights,), _ = pgc("GradCAMPlusPlus", model, ("features",), x, targets)
    ours = camfn.METHODS["grad_cam_pp"].run(model, "features", x, targets).weights[0][:, 0]
    assert float(weights.min()) < -1e-2
    assert float(ours.min()) >= 0


def test_fault_pytorch_grad_cams_shapley_cam_takes_one_layer():
    model, x = headed(nn.GELU()).float(), inputs(3, dtype=torch.float32)
    targets = [lambda y, c=c: y[c] for c in CLASSES]
    with pytest.raises(RuntimeError, match="a second time"):
        pgc("ShapleyCAM", model, ("stem", "act"), x, targets)
    assert len(camfn.shapley_cam(model, ("stem", "act"), x, targets)) == 2


def test_fault_pytorch_grad_cam_averages_the_layers_of_layer_cam():
    """The paper scales shallow maps by `tanh(2 L / max L)` and takes the maximum."""
    model, x, layers = headed().float(), inputs(3, dtype=torch.float32), ("stem", "act")
    targets = scaled_targets(SCORES["logits"], "layer_cam", model, layers, x)
    _, map_ = pgc("LayerCAM", model, layers, x, targets)
    assert differ(camfn.layer_cam(model, layers, x, targets, fuse="paper", size="input"), map_) > 1e-2
    ours = camfn.METHODS["layer_cam"].run(model, layers, x, targets).maps
    assert_close(averaged(ours, x.shape[2:]), map_, 1e-4)


def test_the_maps_of_peers_differ_from_method_to_method():
    """So that a test of parity with the wrong one would fail."""
    model, x = headed().float(), inputs(3, dtype=torch.float32)
    targets = [lambda y, c=c: 10 * y[c] for c in CLASSES]
    maps = {name: pgc(name, model, ("act",), x, targets)[1] for name in PEERS.values()}
    same = [{"GradCAM", "ShapleyCAM"}, {"LayerCAM", "GradCAMElementWise"}]
    for one in maps:
        for other in maps:
            if one < other and {one, other} not in same:
                assert differ(maps[one], maps[other]) > 1e-3, f"{one} and {other}"
