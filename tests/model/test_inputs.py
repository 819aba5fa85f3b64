"""What `x` may be: lists of images of several sizes, several inputs, keyword inputs, what processors of libraries give."""

import collections
import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import camfn
from camfn import CamError
from tests.oracles.closeness import assert_close, close
from tests.oracles.exceptions import unless
from tests.oracles.libraries import detectors, torchvision_models
from tests.oracles.networks import CHEAP, inputs

# Where no group of channels adds to the blurred input, Group-CAM's map is flat.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning")

AT_A_LAYER = [name for name, row in camfn.METHODS.items() if row.needs <= {"activations", "gradients"}]
SWEPT = [name for name, row in camfn.METHODS.items() if "masked inputs" in row.needs]


# ------------------------------------------------------------------------------------- images of several sizes, in a list


class Detector(nn.Module):
    """As torchvision's: it takes a list of images, fills them up to one size, and gives a list of dictionaries."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh())
        self.boxes, self.scores = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 3, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert isinstance(images, list)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = torch.stack(
            [nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        )
        h = self.body(batch)
        found = []
        for boxes, scores in zip(self.boxes(h), self.scores(h)):
            best = scores.sigmoid().flatten(1).amax(0).topk(4).indices  # some of all, by their values
            found.append({"boxes": boxes.flatten(1)[:, best].mT, "scores": scores.sigmoid().flatten(1)[:, best].amax(0)})
        return found


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().double()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *side, dtype=torch.float64, generator=generator) for side in ((10, 8), (6, 12), (4, 4))]


def certain(sample: dict[str, Tensor]) -> Tensor:
    return sample["scores"].sum()


def test_grad_cam_of_a_list_is_that_of_a_hook():
    model, x = detector(), images()
    twin, kept = copy.deepcopy(model), []
    twin.body.register_forward_hook(lambda module, args, out: kept.append(out))
    scores = [certain(sample) for sample in twin(x)]
    expected = []
    for i, score in enumerate(scores):
        gradient = torch.autograd.grad(score, kept[0], retain_graph=True)[0][i]
        expected.append((gradient.mean((1, 2))[:, None, None] * kept[0][i]).sum(0))
    ours = camfn.grad_cam(model, "body", x, certain, relu=False, normalize=False)
    close(ours, torch.stack(expected).detach())
    assert ours.shape == (3, 5, 6)  # of the batch that the model made of them


@pytest.mark.parametrize("method", AT_A_LAYER)
def test_methods_without_masks_take_a_list(method):
    with unless("a list of images and no classes", method):
        takes_a_list(method)


def takes_a_list(method):
    function, x = functools.partial(camfn.METHODS[method].function, relu=False, **CHEAP.get(method, {})), images()
    kept = [image.clone() for image in x]
    maps = function(detector(), "body", x, certain)
    assert maps.shape == (3, 5, 6)
    for image, before in zip(x, kept):
        assert torch.equal(image, before)
    # A list of one size is a batch of it.
    one_size, batched = [image[:, :4, :4] for image in x], Batched(detector())
    ours = function(detector(), "body", one_size, certain, size="input")
    close(ours, function(batched, "detector.body", torch.stack(one_size), certain, size="input"))


class Batched(nn.Module):
    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor):
        return self.detector(list(x.unbind(0)))


@pytest.mark.parametrize("method", ["smooth_grad_cam_pp", *SWEPT])
def test_methods_with_masks_take_a_list_of_one_size(method):
    function, x, options = camfn.METHODS[method].function, [image[:, :4, :4] for image in images()], CHEAP.get(method, {})
    options = {**options, "relu": False}
    of_layer = camfn.METHODS[method].of_layer
    body, inner = ("body", "detector.body") if of_layer else (None, None)
    expected = function(Batched(detector()), inner, torch.stack(x), certain, normalize=False, **options)
    close(function(detector(), body, x, certain, normalize=False, **options), expected)
    assert float(expected.abs().max()) > 0
    with pytest.raises(
        CamError, match=r"masks them all at once .* several sizes, \(3, 10, 8\), \(3, 6, 12\), .* one at a time"
    ):
        function(detector(), body, images(), certain, **options)
    for image in images():
        assert function(detector(), body, [image], certain, size="input", **options).shape == (1, *image.shape[1:])


def test_the_ports_take_a_list():
    model, x = detector(), images()
    state = camfn.state_of(model)
    output, seen = camfn.tap(model, "body")(state, x)
    for ours, theirs in zip(output, model(x)):
        assert_close(ours["boxes"], theirs["boxes"].detach(), 0)
    assert_close(camfn.pure(model)(state, x)[1]["scores"], output[1]["scores"], 0)
    doubled = camfn.tap(model, "body")(state, x, None, 2 * seen).output
    close(camfn.head(model, "body", x, seen)(state, x, 2 * seen)[2]["scores"], doubled[2]["scores"])


def test_what_is_wrong_with_a_list():
    model, x = detector(), images()
    with pytest.raises(CamError, match="x is an empty list"):
        camfn.grad_cam(model, "body", [], certain)
    with pytest.raises(
        CamError, match=r"x is a list, which is one argument of the model.*x\[1\] is a str \(a tuple is several"
    ):
        camfn.grad_cam(model, "body", [x[0], "picture.png"], certain)
    with pytest.raises(CamError, match=r"x\[2\] is torch.uint8 of shape \(3, 4, 4\)"):
        camfn.grad_cam(model, "body", [*x[:2], x[2].byte()], certain)
    hole = x[1].clone()
    hole[0, 0, 0] = torch.nan
    with pytest.raises(CamError, match=r"x\[1\] is not finite: it has 1 NaN"):
        camfn.grad_cam(model, "body", [x[0], hole, x[2]], certain)
    with pytest.raises(CamError, match="masked=0 names one of several inputs, and x is a list of images"):
        camfn.score_cam(model, "body", images()[:1], certain, masked=0)
    with pytest.raises(
        CamError, match='size="input" needs spatial axes in the input, of one size, and x has images of several sizes'
    ):
        camfn.grad_cam(model, "body", images(), certain, size="input")
    with pytest.raises(
        CamError, match="x is a list, as a detector's images are, and the model does not take one; pass a tensor"
    ):
        camfn.grad_cam(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), "0", images(), lambda y: y.sum())


def test_a_detector_of_torchvision():
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "min_size": 64, "max_size": 96}
    model = detectors().retinanet_resnet50_fpn(**options, score_thresh=0.0, detections_per_img=10, topk_candidates=20).eval()
    x = [torch.rand(3, 60, 80), torch.rand(3, 64, 64)]
    (chosen,) = [layer for layer in camfn.candidate_layers(model, x) if layer.chosen]
    assert (chosen.name, chosen.shape, chosen.grid) == ("backbone.body.layer4", (2, 2048, 2, 3), (2, 3))
    layers = ("backbone.body.layer4", "backbone.fpn:0", "head.classification_head.conv.0@1")
    maps = camfn.grad_cam(model, layers, x, certain, relu=False, normalize=False)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 3), (2, 8, 12), (2, 8, 12)]
    assert all(float(m.abs().max()) > 0 for m in maps)
    # By a hook: the first level of the pyramid, of the first image's detections.
    twin, kept = copy.deepcopy(model), []
    twin.backbone.fpn.register_forward_hook(lambda module, args, out: kept.append(out["0"]))
    gradient = torch.autograd.grad(certain(twin(x)[0]), kept[0])[0][0]
    expected = (gradient.mean((1, 2))[:, None, None] * kept[0][0]).sum(0).detach()
    assert_close(maps[1][0], expected, 1e-4 * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------- several inputs, by place or name


class Two(nn.Module):
    """A picture, a table of numbers, and a switch."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.table = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(2, 5)

    def forward(self, numbers, picture, scale=1.0, extra=None):
        h = self.conv(picture).tanh()
        y = self.fc(h.mean((2, 3))) + self.table(numbers)
        return y * scale + (0 if extra is None else extra.sum())


class Alone(nn.Module):
    """The same, of a picture alone: the numbers are its own, image by image."""

    def __init__(self, two: Two, numbers: Tensor):
        super().__init__()
        self.two, self.numbers = two, numbers

    def forward(self, x):
        return self.two(self.numbers[:1].expand(len(x), -1), x, scale=2.0)


@pytest.mark.parametrize("method", [*AT_A_LAYER, *SWEPT])
def test_several_inputs_are_one_of_which_the_others_are_a_part(method):
    torch.manual_seed(0)
    two, x, numbers = Two().double(), inputs(1), torch.randn(1, 2, dtype=torch.float64)
    function, options = camfn.METHODS[method].function, CHEAP.get(method, {})
    layer, inner = ("conv", "two.conv") if camfn.METHODS[method].of_layer else (None, None)
    theirs = {**options, "fc": "two.fc"} if method == "cam" else options
    expected = function(Alone(two, numbers), inner, x, 1, relu=False, normalize=False, **theirs)
    for given in (
        (numbers, x, 2.0),
        {"picture": x, "numbers": numbers, "scale": 2.0, "extra": None},
        collections.UserDict(numbers=numbers, picture=x, scale=2.0),
    ):
        ours = function(two, layer, given, 1, relu=False, normalize=False, **options)
        close(ours, expected, str(type(given)))
        assert function(two, layer, given, 1, relu=False, size="input", **options).shape == (1, 8, 8)


def test_what_a_processor_gives_is_what_a_model_takes():
    torchvision_models()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=32, patch_size=8)).eval()
    features = transformers.BatchFeature({"pixel_values": torch.randn(2, 3, 48, 32)})
    given = {**features, "interpolate_pos_encoding": True}
    grids = [camfn.grad_cam(model, "vit.layers.1", x, 1, relu=False).shape for x in (given, transformers.BatchFeature(given))]
    assert grids == [(2, 6, 4), (2, 6, 4)]
    masked = camfn.score_cam(model, "vit.layers.1", given, 1, normalize=False)
    # By a plain loop, with the output of the library's own object read by hand.
    assert_close(masked, by_a_loop(model, given, 1), 1e-5 * float(masked.max()))


def by_a_loop(model, given: dict, target: int) -> Tensor:
    seen = []
    handle = model.vit.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(**given)
        handle.remove()
        a = seen[0][:, 1:].mT.unflatten(-1, (6, 4))
        maps = []
        for i in range(2):
            scores = []
            for channel in a[i]:
                mask = (channel - channel.min()) / (channel.max() - channel.min() + 1e-8)
                mask = nn.functional.interpolate(mask[None, None], (48, 32), mode="bilinear", align_corners=False)[0, 0]
                x = {**given, "pixel_values": given["pixel_values"][i : i + 1] * mask}
                scores.append(model(**x).logits[0, target])
            maps.append(torch.einsum("c,chw->hw", torch.stack(scores).softmax(0), a[i]).relu())
    return torch.stack(maps)


def test_inputs_in_a_mapping_are_mapped_over():
    torch.manual_seed(0)
    two, x, numbers = Two().double(), inputs(3), torch.randn(3, 2, dtype=torch.float64)

    def one(picture, row):
        return camfn.grad_cam(two, "conv", {"numbers": row[None], "picture": picture[None]}, 1, normalize=False)[0]

    batch = camfn.grad_cam(two, "conv", {"numbers": numbers, "picture": x}, 1, normalize=False)
    close(vmap(one)(x, numbers), batch)


class OfFrames(nn.Module):
    """Takes `(n, frames, channels, h, w)`."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = nn.Conv3d(3, 5, 2, stride=2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x.transpose(1, 2)).relu().flatten(2).mean(2))


def test_frames_before_channels_are_told_from_a_volume():
    net, x = OfFrames().double(), torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    assert camfn.score_cam(net, "features", x, 1).shape == (2, 2, 4, 4)
    assert camfn.rise(net, None, x, 1, num_samples=3).shape == (2, 4, 8, 8)
    assert camfn.grad_cam(net, "features", x, 1, layout="channels_first", relu=False).shape == (2, 2, 4, 4)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.transpose(1, 2))

    assert camfn.score_cam(Turned(), "net.features", x.transpose(1, 2), 1).shape == (2, 2, 4, 4)
