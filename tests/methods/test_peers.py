"""Installed peers give the same maps: torchcam 0.5.0 and pytorch-grad-cam 1.5.7, second implementations of the formulas."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn.formulas.masks import Variation
from camfn.formulas.noise import noise_stream
from tests.oracles.closeness import assert_close
from tests.oracles.libraries import grad_cam, peer, torchvision_models
from tests.oracles.networks import CONVS, POOLS, inputs, livened, small_net
from tests.oracles.scores import averaged, entropy, margin, norm

THEIRS = {"cam": "CAM", "score_cam": "ScoreCAM", "ss_cam": "SSCAM", "is_cam": "ISCAM"}
OPTIONS = {"cam": {"fc": "fc"}, "score_cam": {}, "ss_cam": {"num_samples": 3, "seed": 11}, "is_cam": {"num_samples": 4}}
LAYERS = ("stem", "features")  # 4 channels on a grid of 8, 6 on a grid of 4; no in-place operation after either


def their_options(**options) -> dict:
    return {"fc_layer" if key == "fc" else key: value for key, value in options.items() if key != "seed"}


def theirs(method: str, model, layer, x: Tensor, classes=None, *, targets=None, normalize=False, **options) -> list[Tensor]:
    """torchcam's maps, on a copy of the model; its noise comes from the global generator, seeded with ours."""
    model = copy.deepcopy(model).eval()
    layer = list(layer) if isinstance(layer, tuple) else layer
    state = torch.get_rng_state()
    shape = tuple(x.shape[1:])
    try:
        torch.manual_seed(options.get("seed", 0))
        extractor_class = getattr(peer(), THEIRS[method])
        with extractor_class(model, layer, input_shape=shape, **their_options(**options)) as extractor, torch.no_grad():
            model(x)
            return extractor(classes, normalized=normalize, targets=targets)
    finally:
        torch.set_rng_state(state)


def compare(method: str, model, layer, x: Tensor, classes=None, *, targets=None, raw=1e-9, scaled=1e-6, **options) -> None:
    """Raw and normalised maps of both, for one layer or a tuple of them."""
    options = {**OPTIONS[method], **options}
    ours = partial(getattr(camfn, method), model, layer, x, classes if targets is None else targets, **options)
    for normalize, atol in ((False, raw), (True, scaled)):
        expected = theirs(method, model, layer, x, classes, targets=targets, normalize=normalize, **options)
        found = ours(normalize=normalize)
        found = found if isinstance(layer, tuple) else (found,)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert float(other.max() - other.min()) > 1e-3, "a map with nothing in it compares nothing"
            assert_close(one, other, atol, f"{method} {layer} normalize={normalize}")


# ---------------------------------------------------------------------------------------------- torchcam, in float64


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layer", [*LAYERS, LAYERS], ids=str)
@pytest.mark.parametrize("method", ["score_cam", "is_cam"])
def test_sweeps_equal_torchcam_for_classes_and_callables(method, layer, dims, n):
    model, x = small_net(dims=dims), inputs(n, dims)
    compare(method, model, layer, x, 3)
    compare(method, model, layer, x, [4, 0, 2][:n])
    compare(method, model, layer, x, targets=entropy)
    compare(method, model, layer, x, targets=[margin, norm, entropy][:n])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_cam_equals_torchcam(dims, n):
    model, x = small_net(dims=dims), inputs(n, dims)
    for layer in ("features", "act"):
        compare("cam", model, layer, x, 3)
        compare("cam", model, layer, x, [4, 0, 2][:n])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kind", "target"), [("classes", 1), ("classes", [2]), ("targets", entropy), ("targets", [margin])])
def test_ss_cam_draws_the_very_noise_of_torchcam(kind, target, dims, dtype):
    """One image, one layer, a mask of a multiple of 16 pixels (8 x 8 and 8 x 8 x 8): then `seed=s` is `manual_seed(s)`."""
    model, x = small_net(dims=dims, dtype=dtype), inputs(1, dims, dtype=dtype)
    # In float32 each is off from float64 by what rounding makes of logits of 15: up to 4e-5, depending on the processor.
    exact = {} if dtype == torch.float64 else {"raw": 5e-5, "scaled": 5e-5}
    for layer in LAYERS:
        compare("ss_cam", model, layer, x, **{kind: target}, **exact)
    compare("ss_cam", model, "features", x, **{kind: target}, **exact, std=0.5, num_samples=2, seed=2**40 + 1)


def test_every_layer_of_ss_cam_has_the_noise_of_torchcam_at_that_layer_alone():
    """torchcam's second layer goes on in the stream; ours starts again from the seed."""
    model, x, options = small_net(), inputs(1), OPTIONS["ss_cam"]
    together = camfn.ss_cam(model, LAYERS, x, 3, normalize=False, **options)
    for layer, ours in zip(LAYERS, together):
        assert_close(ours, theirs("ss_cam", model, layer, x, 3, **options)[0], 1e-9, layer)


@pytest.mark.parametrize("shape", [(8, 8), (2, 8), (4, 4, 4), (16,)], ids=str)
def test_noise_is_the_stream_of_torchs_normal_distribution(shape):
    draws, channels, std, seed = 3, 5, 2.0, 7
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    expected = torch.stack([torch.distributions.Normal(0.0, std).sample((channels, *shape)) for _ in range(draws)])
    torch.set_rng_state(state)
    take = noise_stream(Variation((1.0,) * draws, "mask", std, seed), channels, shape, torch.device("cpu"))
    pairs = torch.cartesian_prod(torch.arange(draws), torch.arange(channels))
    found = take(pairs)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.flatten(0, 1))


def test_noise_on_masks_of_other_sizes_has_the_distribution_of_torchcams():
    """Not one stream there, but normal with the right deviation, and new for every draw and channel."""
    draws, channels, shape, std = 400, 10, (5, 5), 2.0
    take = noise_stream(Variation((1.0,) * draws, "mask", std, 3), channels, shape, torch.device("cpu"))
    noise = take(torch.cartesian_prod(torch.arange(draws), torch.arange(channels))).double().flatten(1) / std
    count = noise.numel()
    # The bounds are five standard errors of each statistic of `count` independent normal numbers.
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(noise.pow(3).mean())) < 5 * math.sqrt(15 / count)
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * math.sqrt(96 / count)
    for first, second in ((noise[1:], noise[:-1]), (noise[channels:], noise[:-channels]), (noise[:, 1:], noise[:, :-1])):
        assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel())
    assert len(noise.unique(dim=0)) == len(noise)


@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_a_flat_channel_counts_as_in_torchcam(method):
    """A constant channel has a mask of zeros, and its share of the softmax."""
    model, x = small_net(), inputs(1)
    with torch.no_grad():
        model.features.weight[2:4] = 0.0
    compare(method, model, "features", x, 1)


@pytest.mark.parametrize("sides", [(8, 5), (9, 6, 7)], ids=str)
def test_sides_that_are_not_multiples_of_the_grid_equal_torchcam(sides):
    x = inputs(2, len(sides), side=9)[(..., *map(slice, sides))]
    model = small_net(dims=len(sides))
    compare("score_cam", model, LAYERS, x, [1, 3])
    compare("is_cam", model, LAYERS, x, [1, 3])


@pytest.mark.parametrize("method", ["score_cam", "is_cam"])
@pytest.mark.parametrize("dims", [2, 3])
def test_fused_maps_equal_torchcams(method, dims):
    model, x = small_net(dims=dims), inputs(3, dims)
    for size in (None, (5, 7, 6)[:dims]):
        for normalize, atol in ((False, 1e-9), (True, 1e-6)):
            ours = getattr(camfn, method)(model, LAYERS, x, [4, 0, 2], normalize=normalize, **OPTIONS[method])
            other = theirs(method, model, LAYERS, x, [4, 0, 2], normalize=normalize, **OPTIONS[method])
            fused = getattr(peer(), THEIRS[method]).fuse_cams(other, size)
            assert_close(camfn.maps.fuse(ours, size), fused, atol, f"{method} size={size}")
    assert torch.equal(camfn.maps.fuse(ours[:1]), ours[0])


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"num_samples": 10}], ids=str)
def test_is_cam_equals_torchcam_for_other_numbers_of_samples(options):
    compare("is_cam", small_net(), "features", inputs(2), [1, 3], **options)


@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_default_options_are_torchcams(method):
    """Number of samples and deviation: nothing is passed to either."""
    model, x = small_net(channels=2), inputs(1)
    expected = theirs(method, model, "features", x, 1)[0]
    assert_close(getattr(camfn, method)(model, "features", x, 1, normalize=False), expected, 1e-9, method)


def test_a_model_that_returns_a_list_per_sample_equals_torchcam():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return [{"scores": scores, "best": scores.max()} for scores in self.net(x)]

    model, x = Detector(), inputs(3)
    compare("score_cam", model, "net.features", x, targets=lambda sample: sample["scores"][1])
    compare("is_cam", model, "net.features", x, targets=[lambda sample: sample["best"]] * 3)


def test_a_layer_before_an_in_place_relu_equals_torchcam_without_it():
    """torchcam's hook keeps the tensor that the ReLU overwrites; ours is what the layer gave."""
    x, plain, spoilt = inputs(2), small_net(), small_net(inplace=True)
    seen = camfn.tap(spoilt, "features")(camfn.state_of(spoilt), x).seen
    assert float(seen.min()) < 0  # so the two differ
    for method in ("cam", "score_cam", "is_cam"):
        expected = theirs(method, plain, "features", x, 3, **OPTIONS[method])[0]
        for model in (plain, spoilt):
            ours = getattr(camfn, method)(model, "features", x, 3, normalize=False, **OPTIONS[method])
            assert_close(ours, expected, 1e-9, method)


# ---------------------------------------------------------------------------------------------- torchcam's options


def test_layers_by_name_module_and_list_are_torchcams():
    model, x = small_net().eval(), inputs(2)
    extractor_class = peer().ScoreCAM
    one, two = [["features"], [model.features]], [[model.stem, "features"], ["stem", "features"], ["stem", model.features]]
    for layer in ("features", model.features, *one, *two):
        with extractor_class(model, layer, input_shape=(3, 8, 8)) as extractor, torch.no_grad():
            model(x)
            expected = extractor([1, 2], normalized=False)
        ours = camfn.score_cam(model, layer, x, [1, 2], normalize=False)
        assert isinstance(ours, tuple) == isinstance(layer, list)
        for one, other in zip(ours if isinstance(layer, list) else (ours,), expected, strict=True):
            assert_close(one, other, 1e-9, str(layer))


def test_a_layer_that_is_named_twice_gives_its_map_twice_as_in_torchcam():
    model, x = small_net(), inputs(2)
    expected = theirs("score_cam", model, ("features", "stem", "features"), x, 1)
    ours = camfn.score_cam(model, ("features", "stem", model.features), x, 1, normalize=False)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("fc", ["name", "module", None])
def test_the_linear_layer_of_cam_by_name_module_or_found_is_torchcams(fc):
    model, x = small_net().eval(), inputs(2)
    given = {"name": "fc", "module": model.fc, None: None}[fc]
    with peer().CAM(model, "features", given, input_shape=(3, 8, 8)) as extractor, torch.no_grad():
        model(x)
        expected = extractor([1, 2], normalized=False)[0]
    if fc is None:
        with pytest.warns(camfn.CamWarning, match="'fc' was found"):
            ours = camfn.cam(model, "features", x, [1, 2], normalize=False)
    else:
        ours = camfn.cam(model, "features", x, [1, 2], fc=given, normalize=False)
    assert_close(ours, expected, 1e-9)


class Convolutional(nn.Module):
    """A head of one 1x1 convolution, before the pooling or after it."""

    def __init__(self, dims: int, pool_first: bool):
        super().__init__()
        self.features = CONVS[dims](3, 6, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.fc = CONVS[dims](6, 5, 1)
        self.pool = POOLS[dims](1)
        self.pool_first = pool_first

    def forward(self, x):
        x = self.act(self.features(x))
        return (self.fc(self.pool(x)) if self.pool_first else self.pool(self.fc(x))).flatten(1)


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_1x1_convolution_as_linear_layer_of_cam_is_torchcams(dims, pool_first):
    torch.manual_seed(0)
    model, x = Convolutional(dims, pool_first).double(), inputs(3, dims)
    compare("cam", model, "act", x, 3)
    compare("cam", model, "act", x, [4, 0, 2])


class ChannelsLast(nn.Module):
    """Its layer gives `(n, *grid, c)`."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.blocks = nn.Linear(6, 7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        return self.fc(torch.tanh(self.blocks(self.features(x).movedim(1, -1))).mean((1, 2)))


@pytest.mark.parametrize("layout", ["channels_last", lambda activation: activation.movedim(-1, 1)], ids=["name", "callable"])
def test_a_layout_is_torchcams_reshape_transform(layout):
    torch.manual_seed(0)
    model, x = ChannelsLast().double().eval(), inputs(2)
    for method in ("cam", "score_cam", "is_cam"):
        options = {"reshape_transform": lambda activation: activation.movedim(-1, 1), **OPTIONS[method]}
        expected = theirs(method, model, "blocks", x, [1, 2], **options)[0]
        ours = getattr(camfn, method)(model, "blocks", x, [1, 2], layout=layout, normalize=False, **OPTIONS[method])
        assert_close(ours, expected, 1e-9, method)


def chosen(model, x) -> str:
    with pytest.warns(camfn.CamWarning, match="layer=None"):
        return camfn.explain(model, None, x, lambda output: output.sum()).layers[0]


def their_choice(model, shape) -> str:
    from torchcam.methods._utils import locate_candidate_layer

    return locate_candidate_layer(model, tuple(shape))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_the_layer_chosen_for_a_small_network_is_torchcams(dims, dense):
    peer()
    model, x = small_net(dims=dims, dense=dense, dtype=torch.float32), inputs(1, dims, dtype=torch.float32)
    assert chosen(model, x) == their_choice(model, x.shape[1:]) == ("pool" if dense else "act")


def test_the_chosen_layer_gives_the_map_of_torchcams_choice():
    model, x = small_net(dtype=torch.float32), inputs(2, dtype=torch.float32)
    expected = theirs("score_cam", model, None, x, 1)[0]
    with pytest.warns(camfn.CamWarning, match="layer=None: 'act' was chosen"):
        ours = camfn.score_cam(model, None, x, 1, normalize=False)
    assert_close(ours, expected, 1e-5)


def test_the_model_itself_is_never_chosen_though_torchcam_does():
    """First exception: the output of a segmentation model is no layer."""
    peer()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    x = inputs(1, dtype=torch.float32)
    assert their_choice(model, x.shape[1:]) == ""
    assert chosen(model, x) == "1"  # nor is the layer that ends in the classes


def test_class_maps_of_a_convolutional_head_are_not_chosen_though_torchcam_does():
    """Second exception: a channel for each class is an output, not a feature."""
    peer()
    torch.manual_seed(0)
    model, x = Convolutional(2, pool_first=False), inputs(1, dtype=torch.float32)
    assert their_choice(model, x.shape[1:]) == "fc"
    assert chosen(model, x) == "act"
    only = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert chosen(only, x) == their_choice(only, x.shape[1:]) == "0"  # nothing else is left


# ---------------------------------------------------------------------------------- torchvision's networks, in float32


@pytest.fixture(scope="module")
def torchvision_net():
    """A network by name, in eval mode, with seeded random weights that make scores differ between masks."""
    models, made = torchvision_models(), {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = livened(getattr(models, name)(num_classes=10))
        return made[name]

    return get


@pytest.mark.parametrize(
    ("method", "name", "layer", "side"),
    [
        ("score_cam", "resnet18", "layer4", 64),
        ("score_cam", "mobilenet_v2", "features.18", 64),
        ("score_cam", "resnet18", "layer1", 96),
        ("score_cam", "mobilenet_v2", ("features.3", "features.6"), 96),
        ("score_cam", "alexnet", "features.4", 64),
        ("is_cam", "resnet18", "layer1", 64),
        ("is_cam", "mobilenet_v2", "features.3", 64),
        ("ss_cam", "resnet18", "layer1", 64),
        ("ss_cam", "mobilenet_v2", "features.3", 80),
        ("cam", "resnet18", "layer4", 96),
        ("cam", "mobilenet_v2", "features.18", 96),
    ],
)
def test_networks_of_torchvision_equal_torchcam_in_float32(torchvision_net, method, name, layer, side):
    model = torchvision_net(name)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    fc = {"fc": "classifier.1" if name == "mobilenet_v2" else "fc"} if method == "cam" else {"num_samples": 2}
    options = {} if method == "score_cam" else fc | ({"seed": 1} if method == "ss_cam" else {})
    outcome = camfn.METHODS[method].run(model, layer, x, 7, **options)
    expected = theirs(method, model, layer, x, 7, normalize=True, **options)
    for ours, other, w in zip(
        outcome.maps if isinstance(layer, tuple) else (outcome.maps,), expected, outcome.weights, strict=True
    ):
        assert float(w.max() - w.min()) > 0.2 * float(w.abs().mean()), "equal weights compare no score"
        assert_close(ours, other, 1e-4, f"{method} {name} {layer}")


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("mobilenet_v2", "features"), ("alexnet", "avgpool")])
def test_the_layer_chosen_for_a_network_of_torchvision_is_torchcams(torchvision_net, name, layer):
    peer()
    model = torchvision_net(name)
    (ours,) = [layer.name for layer in camfn.candidate_layers(model, torch.zeros(1, 3, 64, 64)) if layer.chosen]
    assert ours == their_choice(model, (3, 64, 64)) == layer


# --------------------------------------------------------------------------------------------------- pytorch-grad-cam


def class_targets(classes):
    grad_cam()
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    return None if classes is None else [ClassifierOutputTarget(c) for c in classes]


def their_score_cam(model, layers: tuple[str, ...], x: Tensor, targets) -> tuple[list[Tensor], Tensor]:
    """Its channel weights at each layer, and its one map, at the input's size."""
    model = copy.deepcopy(model).eval()
    modules = [model.get_submodule(name) for name in layers]
    with grad_cam().ScoreCAM(model, modules) as extractor, torch.no_grad():
        output = extractor.activations_and_grads(x)
        seen = [activation.numpy() for activation in extractor.activations_and_grads.activations]
        given = targets or class_targets(output.argmax(1).tolist())
        found = [extractor.get_cam_weights(x, None, given, activation, None) for activation in seen]
        return [torch.from_numpy(w) for w in found], torch.from_numpy(extractor(x, targets))


def compare_with_grad_cam(model, layers: tuple[str, ...], x: Tensor, classes=None, targets=None) -> None:
    target = classes if targets is None else targets
    options = {"recipe": "pytorch-grad-cam", "size": "input" if len(layers) == 1 else None}
    ours = camfn.METHODS["score_cam"].run(model, layers, x, target, **options)
    weights, theirs = their_score_cam(model, layers, x, targets or class_targets(classes))
    for one, other in zip(ours.weights, weights, strict=True):
        assert float(other.max() - other.min()) > 0.2 * float(other.mean()), "equal weights compare no score"
        assert_close(one[:, 0], other, 1e-6, f"weights {layers}")
    assert_close(averaged(ours.maps, x.shape[2:]), theirs, 1e-4, f"map {layers}")


@pytest.mark.parametrize("layers", [("stem",), ("features",), LAYERS], ids=str)
@pytest.mark.parametrize("sides", [(8, 8), (9, 6)], ids=str)
def test_weights_and_map_equal_those_of_pytorch_grad_cam(layers, sides):
    model = small_net(dtype=torch.float32)
    for n in (1, 3):
        x = inputs(n, side=9, dtype=torch.float32)[..., : sides[0], : sides[1]]
        compare_with_grad_cam(model, layers, x)
        compare_with_grad_cam(model, layers, x, [4, 0, 2][:n])
        compare_with_grad_cam(model, layers, x, targets=[margin, norm, entropy][:n])


def test_a_dead_channel_counts_as_in_pytorch_grad_cam():
    """Constant but not 0, it is not flat to the peer: it stretches what the upsampling rounds off to a mask in [0, 1]."""
    model = small_net(dtype=torch.float32)
    with torch.no_grad():
        model.features.weight[2:4] = 0.0
        model.features.bias[2:4] = 0.0
    compare_with_grad_cam(model, ("features",), inputs(2, dtype=torch.float32), [1, 3])


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer1"), ("mobilenet_v2", "features.3")])
def test_networks_of_torchvision_equal_pytorch_grad_cam(torchvision_net, name, layer):
    """In float64: through as many layers float32 rounds the weights by more than 1e-6."""
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compare_with_grad_cam(copy.deepcopy(torchvision_net(name)).double(), (layer,), x, [7])
