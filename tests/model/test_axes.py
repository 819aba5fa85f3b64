"""`axes=`: a model of turned inputs against the same weights on `(n, c, *size)`, and what each operation covers."""

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from camfn import CamError
from tests.oracles.closeness import close
from tests.oracles.loops import min_max, upsampled
from tests.oracles.networks import CHEAP, LAYERED, SmallNet, inputs, seeded, small_net

# On a small grid, a map may be flat.
pytestmark = pytest.mark.filterwarnings(r"ignore:.* maps? at layer .*:camfn.CamWarning")

UNITS = 2**20
"""Units of rounding: maps of scores are small differences of large terms, and the orders of sums differ."""


class Turned(nn.Module):
    """A model of inputs in another order: it brings them to `(n, c, *size)`."""

    def __init__(self, net: nn.Module, order: tuple[int, ...], channel: bool = True):
        super().__init__()
        self.net, self.order, self.channel = net, order, channel

    def forward(self, x: Tensor, scale: Tensor | None = None):
        usual = x.permute(self.order)
        usual = usual if self.channel else usual[:, None]
        return self.net(usual if scale is None else usual * scale.reshape(-1, *[1] * (usual.ndim - 1)))


def turned(x: Tensor, letters: str, usual: str) -> Tensor:
    """`x` with the axes `usual` in the order `letters`."""
    return x.permute([usual.index(letter) for letter in letters]).contiguous()


class Gray(SmallNet):
    """A `SmallNet` of inputs with one channel."""

    def __init__(self, dims: int = 2):
        super().__init__(dims)
        self.stem[0] = nn.Conv2d(1, 4, 3, padding=1)


class Frames(nn.Module):
    """A recurrent layer on the features of frames; the twin of `(n, c, t, h, w)` has the layers of three axes."""

    def __init__(self):
        super().__init__()
        self.features, self.over = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.LSTM(6, 4, batch_first=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor):
        n, t = x.shape[:2]
        found = self.features(x.flatten(0, 1)).relu().mean((2, 3)).unflatten(0, (n, t))
        return self.fc(self.over(found)[0][:, -1])


def pictures(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def put(function, model, layer, x, target=1, **options):
    """A map that is not scaled."""
    return function(model, layer, x, target, normalize=False, **options)


def options_of(method: str) -> dict:
    return {**CHEAP.get(method, {}), **({"fc": "net.fc"} if method == "cam" else {})}


COMPOSED = {
    "smooth": camfn.smooth(camfn.grad_cam, 2),
    "integrate": camfn.integrate(camfn.score_cam, 2),
    "augment": camfn.augment(camfn.grad_cam),
    "multi_scale": camfn.multi_scale(camfn.grad_cam, [8, 12]),
    "ensemble": camfn.ensemble([camfn.grad_cam, camfn.score_cam]),
    "fuse_layers": camfn.fuse_layers(camfn.grad_cam, ["net.stem", "net.features"], "mean"),
}
LETTERS = ("nhwc", "nwhc", "nhcw")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("method", LAYERED)
def test_every_method_gives_the_map_of_the_usual_order(method, told):
    row, net, x = camfn.METHODS[method], small_net().eval(), pictures()
    plain = Turned(net, (0, 1, 2, 3))
    layer = "net.features" if row.of_layer else None
    expected = put(row.function, plain, layer, x, axes="nchw", **options_of(method))
    assert float(expected.abs().max()) > 0
    for letters in LETTERS[: 1 if told else 2]:
        subject = Turned(net, tuple(letters.index(letter) for letter in "nchw"))
        given = {"axes": letters} if told else {}
        found = put(row.function, subject, layer, turned(x, letters, "nchw"), **given, **options_of(method))
        close(found, expected, f"{method} {letters}", units=UNITS)


@pytest.mark.parametrize("name", COMPOSED)
def test_every_composition_gives_the_map_of_the_usual_order(name):
    net, x = small_net().eval(), pictures()
    layer = None if name == "fuse_layers" else "net.features"
    expected = put(COMPOSED[name], Turned(net, (0, 1, 2, 3)), layer, x, size="input", axes="nchw")
    for letters in LETTERS:
        subject = Turned(net, tuple(letters.index(letter) for letter in "nchw"))
        for given in ({"axes": letters}, {}):
            found = put(COMPOSED[name], subject, layer, turned(x, letters, "nchw"), size="input", **given)
            close(found, expected, f"{name} {letters}", units=UNITS)


@pytest.mark.parametrize("letters", ["nhw", "nwh"])
@pytest.mark.parametrize("method", ["score_cam", "rise", "smooth_grad_cam_pp", "cameras", "group_cam"])
def test_images_without_a_channel_axis(method, letters):
    torch.manual_seed(0)
    row, net, x = camfn.METHODS[method], seeded(Gray()).eval(), pictures()[:, :1]
    layer = "net.features" if row.of_layer else None
    expected = put(row.function, Turned(net, (0, 1, 2, 3)), layer, x, axes="nchw", **options_of(method))
    subject = Turned(net, tuple(letters.index(letter) for letter in "nhw"), channel=False)
    for given in ({"axes": letters}, {}):
        found = put(row.function, subject, layer, turned(x[:, 0], letters, "nhw"), **given, **options_of(method))
        close(found, expected, letters, units=UNITS)


@pytest.mark.parametrize("method", ["score_cam", "grad_cam"])
def test_axes_hold_under_vmap_and_grad(method):
    net, x = small_net().eval(), pictures(3)
    subject, last = Turned(net, (0, 3, 1, 2)), x.permute(0, 2, 3, 1).contiguous()
    function = camfn.METHODS[method].function
    expected = function(subject, "net.features", last, 1, axes="nhwc")
    for given in ({"axes": "nhwc"}, {}):
        one = functools.partial(function, subject, "net.features", target=1, **given)
        close(vmap(lambda image, one=one: one(image[None])[0])(last), expected, units=UNITS)

    def total(model, layer, image, **given):
        return function(model, layer, image, 1, normalize=False, relu=False, **given).square().sum()

    slope = grad(functools.partial(total, net, "features"))(x)
    for given in ({"axes": "nhwc"}, {}):
        ours = grad(functools.partial(total, subject, "net.features", **given))(last)
        close(ours.permute(0, 3, 1, 2), slope, units=UNITS)


def test_companion_inputs_and_masked():
    net, x, scale = small_net().eval(), pictures(), torch.tensor([1.0, 0.5], dtype=torch.float64)
    subject, last = Turned(net, (0, 3, 1, 2)), x.permute(0, 2, 3, 1).contiguous()
    expected = put(camfn.score_cam, Turned(net, (0, 1, 2, 3)), "net.features", (x, scale))
    for given in ({"axes": "nhwc"}, {}):
        for options in ({}, {"masked": 0}):
            close(put(camfn.score_cam, subject, "net.features", (last, scale), **options, **given), expected, units=UNITS)
        by_name = {"x": last, "scale": scale}
        close(put(camfn.score_cam, subject, "net.features", by_name, masked="x", **given), expected, units=UNITS)
        ask = functools.partial(put, camfn.score_cam, subject, "net.features", **given)
        under = vmap(lambda image, one, ask=ask: ask((image[None], one[None]))[0])
        close(under(last, scale), expected, units=UNITS)

    def total(image, order, subject, **given):
        image = image.permute(order)
        return put(camfn.grad_cam, subject, "net.features", (image, scale), relu=False, **given).square().sum()

    slope = grad(total)(x, (0, 1, 2, 3), Turned(net, (0, 1, 2, 3)))
    close(grad(total)(x, (0, 2, 3, 1), subject), slope, units=UNITS)


def test_a_list_of_images_with_channels_last():
    class Listed(Turned):
        def forward(self, x: list[Tensor]):
            return super().forward(torch.stack(x))

    net, x = small_net().eval(), pictures()
    last = [image.permute(1, 2, 0).contiguous() for image in x]
    found = put(camfn.score_cam, Listed(net, (0, 3, 1, 2)), "net.features", last, axes="nhwc", size="input")
    close(found, put(camfn.score_cam, net, "features", x, size="input"), units=UNITS)


@pytest.mark.parametrize("letters", ["nt", "nw"])
def test_raw_sound_is_masked_if_its_axis_is_named(letters):
    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.fc = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x: Tensor):
            return self.fc(self.features(x.reshape(len(x), 1, -1)).relu().mean(2))

    model, x = seeded(Sound()).eval(), inputs(2, 1, 16)[:, 0]
    expected = put(camfn.score_cam, model, "features", x[:, None])
    close(put(camfn.score_cam, model, "features", x, axes=letters), expected)
    with pytest.raises(CamError, match=r'masking needs .*axes="nt"'):
        camfn.score_cam(model, "features", x)


# ------------------------------------------------------------------------------------------ what each operation covers


def video() -> tuple[nn.Module, Tensor]:
    return seeded(Frames()).eval(), torch.randn(2, 3, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def per_frame(activation: Tensor) -> Tensor:
    return activation.unflatten(0, (-1, 3)).transpose(1, 2)


@pytest.mark.parametrize("given", [{"axes": "ntchw"}, {}])
def test_masks_cover_the_frames_of_a_recurrent_network(given):
    """Against a loop of masked inputs."""
    model, x = video()
    found = put(camfn.score_cam, model, "features", x, layout=per_frame, relu=False, **given)
    activation = per_frame(model.features(x.flatten(0, 1)).detach())
    assert found.shape == (2, 3, 3, 4)
    for i in range(2):
        scores = []
        for channel in activation[i]:
            mask = upsampled(min_max(channel, 1e-8), (3, 6, 8), False)
            scores.append(model(x[i : i + 1] * mask[None, :, None])[0, 1])
        weights = torch.stack(scores).detach().softmax(0)
        close(found[i], torch.einsum("k,k...->...", weights, activation[i]), units=UNITS)


def fed_by(method, model: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """The inputs that a method feeds the model."""
    fed: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor):
            fed.append(x.detach().clone())
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method(nn.Sequential(Watch(), model), "1.features", x, 1, **options)
    return fed


def has(fed: list[Tensor], wanted: Tensor) -> bool:
    return any(some.shape == wanted.shape and torch.allclose(some, wanted) for some in fed)


def test_flips_turn_the_width_alone():
    model, x = video()
    flips = camfn.augment(camfn.mean_cam, factors=(1.0,))
    fed = fed_by(flips, model, x, axes="ntchw", layout=per_frame)
    assert has(fed, x.flip(-1))
    assert not any(has(fed, x.flip(axis)) for axis in (1, 2, 3))
    series = seeded(nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)))
    line, found = inputs(2, 1, 16), {}
    for letters in ("nct", "ncw"):
        found[letters] = put(flips, series, "0", line, axes=letters)
    assert torch.equal(found["nct"], camfn.augment(camfn.mean_cam, (), (1.0,))(series, "0", line, 1, normalize=False))
    assert not torch.equal(found["nct"], found["ncw"])


def test_multi_scale_leaves_time():
    model, x = video()
    fed = fed_by(camfn.multi_scale(camfn.mean_cam, [9]), model, x, axes="ntchw", layout=per_frame)
    large = torch.nn.functional.interpolate(x.flatten(0, 1), (9, 12), mode="bilinear").unflatten(0, (2, 3))
    assert has(fed, large[..., :6, :8])
    assert {some.shape[1] for some in fed} == {3}
    series = seeded(nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)))
    with pytest.raises(CamError, match=r"the input has time alone"):
        camfn.multi_scale(camfn.mean_cam, [9])(series, "0", inputs(2, 1, 8), 1, axes="nct")


@pytest.mark.parametrize(("letters", "kept"), [("ncdhw", ()), ("ncthw", (2,))])
def test_group_cam_blurs_depth_but_not_time(letters, kept):
    """The blurred input is fed where a mask is 0: along an axis that is not blurred, each slice is blurred alone."""
    model, x = small_net(dims=3).eval(), inputs(1, 3, 6)
    fed = fed_by(functools.partial(camfn.group_cam, blur=(3, 1.0), groups=2), model, x, axes=letters)
    blurred = camfn.maps.blur(x, 3, 1.0, 3 - len(kept))
    assert not torch.allclose(camfn.maps.blur(x, 3, 1.0, 3), camfn.maps.blur(x, 3, 1.0, 2))
    chunk = fed[-1]
    share = (chunk - blurred) / (x - blurred)  # the mask, the same for all channels
    assert float((share - share[:, :1]).abs().median()) < 1e-6


def test_a_baseline_has_the_order_of_the_input():
    net, x = small_net().eval(), pictures()
    baseline = torch.randn(8, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    subject, last = Turned(net, (0, 3, 1, 2)), x.permute(0, 2, 3, 1).contiguous()
    found = put(camfn.integrate(camfn.grad_cam, 3, baseline), subject, "net.features", last, axes="nhwc")
    expected = put(camfn.integrate(camfn.grad_cam, 3, baseline.permute(2, 0, 1)), net, "features", x)
    close(found, expected, units=UNITS)
    with pytest.raises(CamError, match=r"baseline has shape \(3, 8, 12\), .* the input's \(2, 8, 12, 3\)"):
        camfn.integrate(camfn.grad_cam, 3, baseline.permute(2, 0, 1))(subject, "net.features", last, axes="nhwc")


def test_sizes_have_the_order_of_maps():
    net, x = small_net().eval(), pictures()
    found = camfn.grad_cam(Turned(net, (0, 3, 2, 1)), "net.features", x.permute(0, 3, 2, 1), 1, axes="nwhc", size="input")
    assert found.shape == (2, 8, 12)
    listed = camfn.candidate_layers(Turned(net, (0, 3, 2, 1)), x.permute(0, 3, 2, 1), axes="nwhc")
    assert [layer.grid for layer in listed if layer.chosen] == [(4, 6)]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("axes", ["", "nchx", "chwn", "nnhw", "ncchw", "nc", "n", "NCHW", "n c h w", ("n", "c", "h", "w"), 4])
def test_invalid_axes_are_one_sentence(axes):
    with pytest.raises(CamError) as error:
        camfn.score_cam(small_net(), "features", pictures(), axes=axes)
    assert str(error.value).startswith(f"axes={axes!r} must have one letter for each axis of x: ")
    assert "\n" not in str(error.value)


def test_axes_of_another_number_are_an_error_that_names_the_input():
    with pytest.raises(CamError, match=r"axes='nhw' names 3 axes, and x has 4"):
        camfn.score_cam(small_net(), "features", pictures(), axes="nhw")
    with pytest.raises(CamError, match=r"axes='nhw' names 3 axes, and x\[0\] has 4"):
        camfn.score_cam(Turned(small_net(), (0, 1, 2, 3)), "net.features", (pictures(),), axes="nhw")


@pytest.mark.parametrize("method", camfn.METHODS)
def test_every_method_checks_axes(method):
    row = camfn.METHODS[method]
    with pytest.raises(CamError, match=r"names 3 axes, and x has 4"):
        row.function(small_net(), "features" if row.of_layer else None, pictures(), axes="nhw", **CHEAP.get(method, {}))


@pytest.mark.parametrize("name", COMPOSED)
def test_every_composition_checks_axes(name):
    layer = None if name == "fuse_layers" else "net.features"
    with pytest.raises(CamError, match=r"names 3 axes, and x has 4"):
        COMPOSED[name](Turned(small_net(), (0, 1, 2, 3)), layer, pictures(), axes="nhw")


# ------------------------------------------------------------------------------------------------------------ targets


class Dense(nn.Module):
    """A segmentation; the classes are first, or where `order` puts them."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__()
        self.features, self.fc, self.order = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), order

    def forward(self, x: Tensor):
        return self.fc(self.features(x).relu()).permute(self.order)


@pytest.mark.parametrize("letters", ["nhwc", "nwhc", "nchw"])
@pytest.mark.parametrize("given", ["mask", "class", "neither"])
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "cameras"])
def test_a_segmentation_whose_classes_are_last(method, letters, given):
    mask = torch.zeros(8, 12)
    mask[2:5, 3:7] = 1
    said = {"mask": (mask, 2), "class": (None, None), "neither": ()}[given]
    x, function = pictures(), camfn.METHODS[method].function
    subject = seeded(Dense(tuple("nchw".index(letter) for letter in letters))).eval()
    expected = function(seeded(Dense()).eval(), "features", x, camfn.targets.segmentation(*said), **CHEAP.get(method, {}))
    found = function(subject, "features", x, camfn.targets.segmentation(*said, axes=letters), **CHEAP.get(method, {}))
    close(found, expected, units=UNITS)


def test_a_segmentation_without_an_axis_of_classes():
    class One(Dense):
        def forward(self, x: Tensor):
            return super().forward(x)[:, 0]

    target = camfn.targets.segmentation(torch.ones(8, 12), 0, axes="nhw")
    found = camfn.grad_cam(seeded(One()).eval(), "features", pictures(), target)
    close(
        found, camfn.grad_cam(seeded(Dense()).eval(), "features", pictures(), camfn.targets.segmentation(torch.ones(8, 12), 0))
    )


def test_invalid_axes_of_a_segmentation():
    with pytest.raises(CamError, match=r"axes='hwc' must have one letter for each axis of the output"):
        camfn.targets.segmentation(axes="hwc")
    with pytest.raises(CamError, match=r"axes='ndhwc' names 5 axes, and the output has 4"):
        camfn.grad_cam(Dense().double(), "features", pictures(), camfn.targets.segmentation(axes="ndhwc"))
