"""Which layers can be explained and which is chosen; one network expressed in several layouts has one map."""

import collections
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import camfn
from camfn import CamError, _compat, layouts
from camfn.methods._common import read_layer
from camfn.model.forward import look
from camfn.model.layers import _length_matters
from camfn.model.layers import _outputs as layers_of_model
from camfn.model.task import begin
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import CHEAP, inputs, small_net
from tests.oracles.vits import Patches, randomised, vit

# ----------------------------------------------------------------------------- one network in several layouts


class Positions(nn.Module):
    """Patches, a norm, a linear layer and a ReLU at each position, pooled: by convolutions, or with the channels last.

    `layer` gives `(n, c, *grid)`, `(n, *grid, c)`, `(n, prefix + positions, c)` or that with the tokens first.
    """

    def __init__(self, layout: str, size: tuple[int, ...], prefix: int = 0):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
        self.patches, self.layer, self.fc = conv(3, 6, 4, stride=4), Position(layout), nn.Linear(5, 4)
        self.layout = layout
        self.tokens = nn.Parameter(torch.randn(prefix, 6))

    def forward(self, x):
        h = self.patches(x)
        if self.layout == "channels_last":
            h = h.movedim(1, -1)
        elif self.layout != "channels_first":
            h = torch.cat([self.tokens.expand(len(h), -1, -1), h.flatten(2).mT], 1)
            h = h.transpose(0, 1) if self.layout == "sequence" else h
        h = self.layer(h)
        if self.layout == "sequence":
            h = h.transpose(0, 1)
        if self.layout in ("tokens", "sequence"):
            y, rest = self.fc(h[:, len(self.tokens) :].mean(1)), h[:, : len(self.tokens)].sum((1, 2))[:, None]
        else:
            y, rest = self.fc(h.flatten(1, -2).mean(1) if self.layout == "channels_last" else h.flatten(2).mean(2)), 0
        return y + y.relu() + rest


class Position(nn.Module):
    def __init__(self, layout: str):
        super().__init__()
        self.norm, self.linear, self.first = nn.LayerNorm(6), nn.Linear(6, 5), layout == "channels_first"
        self.out = nn.LayerNorm(5)

    def forward(self, h):
        h = h.movedim(1, -1) if self.first else h
        h = self.out(self.linear(self.norm(h))).relu()
        return h.movedim(-1, 1) if self.first else h


def alike(layout: str, size: tuple[int, ...], prefix: int = 0) -> Positions:
    """The same weights for every layout."""
    torch.manual_seed(0)
    model = Positions(layout, size).double()
    model.tokens = nn.Parameter(torch.randn(prefix, 6, dtype=torch.float64))
    return model


SIZES = {"line": (32,), "picture": (16, 24), "volume": (8, 12, 16)}
OPTIONS = CHEAP | {"ss_cam": {"num_samples": 3, "std": 0.5}}
AT_A_LAYER = [name for name, row in camfn.METHODS.items() if "activations" in row.needs]


@pytest.mark.filterwarnings(r"ignore:1 of 2 maps at layer 'layer' are flat:camfn.CamWarning")  # of Group-CAM
@pytest.mark.parametrize("method", AT_A_LAYER)
@pytest.mark.parametrize("size", SIZES)
def test_one_network_has_one_map_in_every_layout(method, size):
    sides = SIZES[size]
    x = torch.randn(2, 3, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # The other tokens add to the score. Ablation-CAM's weights are shares of it, and of scores are Recipro-CAM's maps.
    function, scored = camfn.METHODS[method].function, method in ("ablation_cam", "recipro_cam")
    options = {**OPTIONS.get(method, {}), "normalize": scored}
    grid = tuple(side // 4 for side in sides)
    expected = function(alike("channels_first", sides), "layer", x, [1, 2], **options)
    assert expected.shape == (2, *(sides if method == "cameras" else grid))
    assert float(expected.abs().max()) > 0
    for layout, prefix in (("channels_last", 0), ("tokens", 0), ("tokens", 1), ("tokens", 5), ("sequence", 2)):
        if len(sides) == 1 and layout == "tokens" and not prefix:
            continue  # which is channels last
        model = alike(layout, sides, prefix)
        ours = function(model, "layer", x, [1, 2], **options)
        assert_close(ours, expected, 1e-9 * float(expected.abs().max()), f"{layout} {prefix}")
        by_hand = "channels_last" if layout == "channels_last" else layouts.tokens(grid, prefix)
        assert_close(function(model, "layer", x, [1, 2], layout=by_hand, **options), ours, 0)


@pytest.mark.parametrize(("layout", "prefix"), [("channels_last", 0), ("tokens", 3), ("sequence", 1)])
def test_what_is_written_back_goes_through_the_rest_of_the_network(layout, prefix):
    """Half the channels are zeroed: by `restore` and `swap` in one layout, by hand in the other."""
    sides = SIZES["picture"]
    x = torch.randn(2, 3, *sides, dtype=torch.float64)
    first, other = alike("channels_first", sides), alike(layout, sides, prefix)
    seen = first.layer(first.patches(x))
    seen[:, ::2] = 0
    y = first.fc(seen.mean((2, 3)))
    expected = y + y.relu()
    f, state = camfn.tap(other, "layer"), camfn.state_of(other)
    output, activation = f(state, x)
    read = read_layer(look(other, "layer", x, None), "layer", activation, "auto")
    values = read.values.clone()
    values[:, ::2] = 0
    swapped = f(state, x, None, read.restore(values)).output
    before = (output - first(x)).detach()  # the prefix's part, which stays
    close(swapped - before, expected.detach())


def test_the_gradient_is_read_as_the_activation_is():
    sides, x = SIZES["picture"], torch.randn(2, 3, *SIZES["picture"], dtype=torch.float64)
    slopes = []
    for model in (alike("channels_first", sides), alike("tokens", sides, 2)):
        f, state = camfn.tap(model, "layer"), camfn.state_of(model)
        seen = f(state, x).seen
        read = read_layer(look(model, "layer", x, None), "layer", seen, "auto")
        slopes.append(
            read.view(grad(lambda nudge, f=f, state=state: f(state, x, nudge).output[:, 1].sum())(torch.zeros_like(seen)))
        )
    close(*slopes)


@pytest.mark.parametrize("layout", ["channels_last", "tokens", "sequence"])
def test_layouts_are_read_under_transforms(layout):
    sides, x = SIZES["picture"], torch.randn(3, 3, *SIZES["picture"], dtype=torch.float64)
    model = alike(layout, sides, 0 if layout == "channels_last" else 2)

    def function(x):
        return camfn.grad_cam(model, "layer", x, 1, relu=False, normalize=False)

    expected = camfn.grad_cam(alike("channels_first", sides), "layer", x, 1, relu=False, normalize=False)
    close(vmap(lambda image: function(image[None])[0])(x), expected, "vmap")
    if layout == "tokens" and not _compat.can_compile():  # a trace goes the same way for all
        close(torch.compile(function, backend="eager")(x), expected, "compile")
    # A directional derivative against a finite difference.
    along = torch.randn_like(x)
    slope = jvp(function, (x,), (along,))[1]
    assert_close(
        slope, (function(x + 1e-5 * along) - function(x - 1e-5 * along)) / 2e-5, 1e-8 * float(slope.abs().max()), "jvp"
    )
    assert float(slope.abs().max()) > 0


# --------------------------------------------------------------------------------------------------- the candidates


class FullyConvolutional(nn.Module):
    """Ends in a map for each of 3 classes, averaged; the activation runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes, self.again = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.classes(self.again(self.features(x)))).mean((2, 3))


def names(found) -> list[str]:
    return [layer.name for layer in found]


def chosen(found) -> str:
    (name,) = [layer.name for layer in found if layer.chosen]
    return name


def test_candidates_say_what_they_are():
    found = camfn.candidate_layers(FullyConvolutional(), torch.randn(2, 2, 5, 6))
    assert found == (
        camfn.Candidate("features", "Conv2d", (2, 4, 5, 6), (5, 6), True, "last layer on a grid"),
        camfn.Candidate("again@1", "Tanh", (2, 4, 5, 6), (5, 6), False, "it runs several times, or returns several tensors"),
        camfn.Candidate("classes", "Conv2d", (2, 3, 5, 6), (5, 6), False, "it is an output, with a channel for each class"),
        camfn.Candidate("again@2", "Tanh", (2, 3, 5, 6), (5, 6), False, "it runs several times, or returns several tensors"),
    )


def test_class_maps_are_chosen_only_where_there_is_nothing_else():
    only = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert chosen(camfn.candidate_layers(only, torch.randn(2, 2, 5, 6))) == "0"


class Pyramid(nn.Module):
    """A trunk, three levels as a dict, a layer on the first, and a head on each that is one layer run three times."""

    def __init__(self):
        super().__init__()
        self.trunk, self.top = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.levels, self.first, self.head = Levels(), nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        found = self.levels(self.top(self.trunk(x).relu()).relu())
        found["0"] = self.first(found["0"])
        return torch.stack([self.head(level).amax((2, 3)) for level in found.values()]).sum(0)


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.lateral = nn.Conv2d(6, 5, 1)

    def forward(self, h):
        level = self.lateral(h)
        return collections.OrderedDict((str(i), nn.functional.max_pool2d(level, 2**i)) for i in range(3))


def test_a_tensor_in_a_tuple_in_a_tuple_is_named_by_its_place():
    class Nested(nn.Conv2d):
        def forward(self, x):
            return (super().forward(x),), 4, 4

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.nested, self.fc = Nested(3, 6, 3, stride=2), nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(self.nested(x)[0][0].relu().mean((2, 3)))

    (layer,) = camfn.candidate_layers(Net(), inputs(dtype=torch.float32))
    assert layer.name == "nested:0:0"
    assert camfn.grad_cam(Net(), layer.name, inputs(dtype=torch.float32), 1, relu=False).shape == (2, 3, 3)


class Joined(nn.Module):
    """Levels that a convolution joins again, and a linear head behind it: a classifier."""

    def __init__(self):
        super().__init__()
        self.trunk, self.levels = nn.Conv2d(3, 6, 3, stride=2, padding=1), Levels()
        self.join, self.side, self.fc = nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(7, 5, 1), nn.Linear(7, 2)

    def forward(self, x):
        joined = self.join(sum(nn.functional.interpolate(level, (4, 4)) for level in self.levels(self.trunk(x)).values()))
        return self.fc((joined + self.side(joined).mean(1, keepdim=True)).mean((2, 3)))


def test_behind_a_pyramid_the_layer_is_chosen_that_a_linear_head_takes():
    assert chosen(camfn.candidate_layers(Joined(), inputs(side=16, dtype=torch.float32))) == "join"


def blocks(*widths: int) -> nn.Sequential:
    """Convolutions with norms, each of half the size of the one before."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
    )


def test_an_embedding_network_is_no_segmentation():
    """Its output has the width of its last layers, as a class map has that of the classes."""
    body, pooled = blocks(3, 4, 6), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for head in ([], [nn.Linear(6, 5)]):
        found = camfn.candidate_layers(nn.Sequential(body, *pooled, *head).eval(), torch.randn(2, 3, 16, 16))
        assert chosen(found) == "0"
    classes = nn.Sequential(body, nn.Conv2d(6, 5, 1), *pooled).eval()
    found = camfn.candidate_layers(classes, torch.randn(2, 3, 16, 16))
    assert chosen(found) == "0"
    assert {layer.name: layer.why for layer in found}["1"] == "it is an output, with a channel for each class"


class Detector(nn.Module):
    """A backbone, a neck of three stages, and a head that takes their grids and gives boxes, scores and prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = blocks(3, 4), nn.ModuleList(blocks(4, 4, 5, 6)), Head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, levels = self.backbone(x), []
        for stage in self.neck:
            levels.append(z := stage(z))
        return self.head(levels)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = (nn.ModuleList(nn.Conv2d(c, k, 1) for c in (4, 5, 6)) for k in (7, 4))
        self.prototypes = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        found = [torch.cat([score(z), box(z)], 1).flatten(2) for z, score, box in zip(levels, self.scores, self.boxes)]
        return torch.cat(found, 2), self.prototypes(levels[0])


def test_of_a_detector_the_last_stage_of_the_neck_is_chosen():
    found = camfn.candidate_layers(Detector().eval(), torch.randn(2, 3, 64, 64))
    why = {layer.name: layer.why for layer in found}
    assert chosen(found) == "neck.2"
    assert {name for name, reason in why.items() if reason.startswith("it belongs to a head")} == {
        *(f"head.{part}.{i}" for part in ("scores", "boxes") for i in range(3)),
        "head.prototypes",
    }
    assert why["neck.1"] == "earlier layer"


def test_of_branches_what_joins_them_is_chosen():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())

        def forward(self, x):
            return torch.cat([self.one(x), self.other(x)], 1)

    model = nn.Sequential(Branches(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    assert chosen(camfn.candidate_layers(model, inputs(dtype=torch.float32))) == "0"


def test_every_candidate_can_be_explained_as_it_is_named():
    torch.manual_seed(0)
    model, x = Pyramid().double(), inputs(side=16)
    found = camfn.candidate_layers(model, x)
    assert names(found) == [
        "trunk",
        "top",
        "levels.lateral",
        *(f"levels:{i}" for i in range(3)),
        "first",
        *(f"head@{i}" for i in (1, 2, 3)),
    ]
    for layer in found:
        assert camfn.grad_cam(model, layer.name, x, 1, relu=False).shape == (2, *layer.grid)
    # The last before the pyramid: no single level has the whole picture.
    assert chosen(found) == "levels.lateral"
    with pytest.warns(camfn.CamWarning, match="layer=None: 'levels.lateral' was chosen, the last layer on a grid"):
        ours = camfn.grad_cam(model, None, x, 1, relu=False)
    assert_close(ours, camfn.grad_cam(model, "levels.lateral", x, 1, relu=False), 0)


def test_candidates_of_other_inputs():
    net, x = small_net(), inputs()
    expected = camfn.candidate_layers(net, x)
    assert chosen(expected) == "act"
    assert camfn.candidate_layers(net, (x,)) == camfn.candidate_layers(net, {"x": x}) == expected
    state = {name: tensor * 2 for name, tensor in camfn.state_of(net).items()}
    assert camfn.candidate_layers(net, x, state=state) == expected
    assert camfn.candidate_layers(nn.Flatten(), x) == ()
    with pytest.raises(CamError, match="no layer of Flatten has 2 spatial axes of more than one position"):
        camfn.grad_cam(nn.Flatten(), None, x)


class Auxiliary(nn.Module):
    """A segmentation network whose auxiliary head runs last, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.trunk, self.aux = nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.classifier = nn.Sequential(nn.Conv2d(6, 7, 1), nn.ReLU(), nn.Conv2d(7, 3, 1))

    def forward(self, x):
        h = self.trunk(x)
        return {"out": self.classifier(h), "aux": self.aux(h)}


def test_neither_the_output_of_a_segmentation_nor_its_auxiliary_head_is_chosen():
    torch.manual_seed(0)
    found = camfn.candidate_layers(Auxiliary(), torch.randn(1, 3, 8, 8))
    assert chosen(found) == "classifier.1"
    assert {"classifier", "classifier.2", "aux", "aux.2"} <= set(names(found))


def test_nor_is_another_output_that_lies_on_the_grid():
    class Flow(nn.Sequential):
        def forward(self, x):
            return {"flow": super().forward(x), "scale": 2.0}

    assert (
        chosen(camfn.candidate_layers(Flow(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), torch.randn(2, 3, 8, 8))) == "1"
    )


# -------------------------------------------------------------------------------------------- networks of libraries


def pictures(*sides: int, n: int = 1) -> Tensor:
    return torch.randn(n, 3, *sides, generator=torch.Generator().manual_seed(2))


def timm_net(name: str, **options):
    torchvision_models()
    return pytest.importorskip("timm").create_model(name, num_classes=7, **options)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def hugging(kind: str, task: str = "ForImageClassification", **options):
    torchvision_models()
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind + task)(getattr(transformers, f"{kind}Config")(**options))


def hugging_vit(kind: str):
    return hugging(kind, **SMALL, image_size=64, patch_size=16, num_labels=5)


def seen_by(name: str, **options):
    return getattr(torchvision_models(), name)(num_classes=7, **options)


def pixels(*sides: int, n: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": pictures(*sides, n=n)}


LIBRARIES = {
    # Convolutions.
    "resnet18": (lambda: seen_by("resnet18"), pictures(64, 96), "layer4", (2, 3)),
    "densenet121": (lambda: timm_net("densenet121"), pictures(64, 64), "features", (2, 2)),
    "video": (lambda: torchvision_models().video.r3d_18(num_classes=7), pictures(8, 32, 32), "layer4", (1, 2, 2)),
    "segmentation": (
        lambda: torchvision_models().segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        ),
        pictures(32, 32),
        "classifier.3",
        (4, 4),
    ),
    # Channels last.
    "swin": (
        lambda: torchvision_models().SwinTransformer([4, 4], 16, [1, 2], [2, 2], [4, 4], num_classes=7),
        pictures(64, 96),
        "norm",
        (8, 12),
    ),
    "timm convnext": (lambda: timm_net("convnext_atto"), pictures(64, 64), "norm_pre", (2, 2)),
    "swin of a video": (
        lambda: torchvision_models().video.SwinTransformer3d([2, 4, 4], 16, [1, 2], [2, 2], [2, 4, 4], num_classes=7),
        pictures(4, 32, 48),
        "norm",
        (2, 4, 6),
    ),
    # Tokens with a class token: the last block but one.
    "vit": (lambda: timm_net("vit_tiny_patch16_224", img_size=64), pictures(64, 64), "blocks.10", (4, 4)),
    "vit, not square": (lambda: timm_net("vit_tiny_patch16_224", img_size=(64, 96)), pictures(64, 96), "blocks.10", (4, 6)),
    "distilled": (lambda: timm_net("deit_tiny_distilled_patch16_224", img_size=64), pictures(64, 64), "blocks.10", (4, 4)),
    "registers": (lambda: timm_net("vit_small_patch14_reg4_dinov2", img_size=56), pictures(56, 56), "blocks.10", (4, 4)),
    "eva": (lambda: timm_net("eva02_tiny_patch14_224", img_size=56), pictures(56, 56), "blocks.10", (4, 4)),
    "torchvision vit": (
        lambda: torchvision_models().VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=7),
        pictures(64, 64),
        "encoder.layers.encoder_layer_1",
        (4, 4),
    ),
    "hugging face vit": (lambda: hugging_vit("ViT"), pixels(64, 64), "vit.layers.1", (4, 4)),
    "hugging face registers": (
        lambda: hugging_vit("Dinov2WithRegisters"),
        pixels(64, 64),
        "dinov2_with_registers.encoder.layer.1",
        (4, 4),
    ),
    # Tokens without.
    "mixer": (lambda: timm_net("mixer_s32_224", img_size=64), pictures(64, 64), "norm", (2, 2)),
    "class attention": (lambda: timm_net("xcit_nano_12_p16_224"), pictures(64, 64), "cls_attn_blocks.0", (4, 4)),
    "pyramid of tokens": (lambda: timm_net("pvt_v2_b0"), pictures(64, 64), "stages", (2, 2)),
    # Its last stage attends to all positions alike before it is trained, so its tokens have no place there.
    "batch norms of tokens": (
        lambda: timm_net("levit_128s"),
        pictures(224, 224),
        "stages.1.downsample.attn_downsample.q",
        (7, 7),
    ),
    "hugging face swin": (
        lambda: hugging("Swin", image_size=64, embed_dim=16, depths=[1, 1, 2], num_heads=[2, 2, 2], window_size=4),
        pixels(64, 64),
        "swin.layernorm",
        (4, 4),
    ),
    # Attention weights with the axes of a picture.
    "attention as modules": (
        lambda: timm_net("tnt_s_legacy_patch16_224", img_size=64),
        pictures(64, 64),
        "blocks.11.proj",
        (4, 4),
    ),
}


def lively(model: nn.Module) -> nn.Module:
    """Heads that begin at zero have no gradient to show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_layer_chosen_in_a_librarys_network(name):
    make, x, layer, grid = LIBRARIES[name]
    torch.manual_seed(0)
    model = lively(make())
    found = camfn.candidate_layers(model, x)
    assert (chosen(found), next(c.grid for c in found if c.chosen)) == (layer, grid)
    target = (lambda output: output["out"][1].mean()) if name == "segmentation" else None
    with pytest.warns(camfn.CamWarning, match=f"layer=None: '{layer}' was chosen"):
        card = camfn.explain(model, None, x, target, method="grad_cam", relu=False, normalize=False)
    assert card.maps.shape == (1, *grid)
    assert float(card.maps.abs().max()) > 0, "its positions have a gradient"


def test_after_the_last_block_only_the_class_token_has_a_gradient():
    """Why the last block but one is chosen, by a plain hook."""
    torch.manual_seed(0)
    model, x, gradients = lively(timm_net("vit_tiny_patch16_224", img_size=64)), pictures(64, 64), {}

    def keep(i):
        def hook(module, args, out):
            out.register_hook(lambda gradient: gradients.update({i: gradient}))

        return hook

    hooks = [model.blocks[i].register_forward_hook(keep(i)) for i in (10, 11)]
    model(x)[0, 1].backward()
    for hook in hooks:
        hook.remove()
    assert float(gradients[11][:, 1:].abs().max()) == 0
    assert float(gradients[10][:, 1:].abs().max()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(camfn.grad_cam(model, "blocks.11", x, 1, relu=False, normalize=False).abs().max()) == 0


def test_the_tokens_of_a_text_are_no_picture():
    """Nine tokens of a text would be a class and a grid of 2 x 2: those of the picture are on the convolution's grid."""
    text = {**SMALL, "vocab_size": 100, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1}
    torch.manual_seed(0)
    model = hugging("CLIP", "Model", text_config=text, vision_config={**SMALL, "image_size": 64, "patch_size": 16})
    x = {**pixels(64, 64, n=2), "input_ids": torch.randint(5, 99, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    assert chosen(camfn.candidate_layers(model, x)) == "vision_model.encoder.layers.1"
    assert not any("text" in name for name in names(camfn.candidate_layers(model, x)))


def test_a_spectrogram_of_which_the_model_makes_a_picture():
    """The model turns `(n, t, h)` into pictures `(n, 1, h, t)`, and two tokens stand before the grid of its patches."""
    torch.manual_seed(0)
    model = hugging("AST", "ForAudioClassification", max_length=64, num_mel_bins=32, **SMALL)
    model, x = lively(model), {"input_values": torch.randn(1, 64, 32)}
    layer = "audio_spectrogram_transformer.layers.0"
    maps = camfn.grad_cam(model, layer, x, 0, normalize=False, relu=False)
    assert torch.equal(maps, camfn.grad_cam(model, layer, x, 0, layout=layouts.tokens((2, 5), 2), normalize=False, relu=False))
    assert maps.shape == (1, 2, 5)
    assert float(maps.abs().max()) > 0


def test_a_transformer_on_the_samples_of_a_sound():
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    model = hugging("Wav2Vec2", "ForSequenceClassification", **SMALL, **convolutions, **position)
    x = {"input_values": torch.randn(1, 1000)}
    maps = camfn.grad_cam(model, "wav2vec2.encoder.layers.0", x, 0)
    assert maps.shape == (1, 50)


# -------------------------------------------------------------------------------------------- a layer for each method


BY_PRODUCTS = ("hires_cam", "layer_cam", "grad_cam_elementwise", "eigen_grad_cam", "kpca_cam")
"""Methods whose maps are rounding before a layer norm, or worse there than after it (`benchmarks/layers.py`)."""
NORMS = {
    "torchvision": ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2.ln_1"),
    "timm": ("blocks.1", "blocks.2.norm1"),
    "DeiT, distilled": ("blocks.1", "blocks.2.norm1"),
    "ViT, eager": ("vit.layers.1", "vit.layers.2.layernorm_before"),
}


def taken(method: str, model: nn.Module, x, target=1, **options) -> camfn.Explanation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", camfn.CamWarning)
        return camfn.explain(model, None, x, target, method=method, relu=False, **options)


@pytest.mark.parametrize("name", NORMS)
def test_a_method_of_products_is_at_the_norm_of_the_block_that_is_read(name):
    model, (block, norm) = vit(name), NORMS[name]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    given = {"pixel_values": x} if name.startswith("ViT") else x
    assert {taken(method, model, given).layers for method in BY_PRODUCTS} == {(norm,)}
    assert {taken(method, model, given).layers for method in ("grad_cam", "seg_eigen_cam", "mean_cam")} == {(block,)}
    assert "cancelled sum" not in {found.kind for found in taken("hires_cam", model, given).findings}
    with pytest.warns(camfn.CamWarning, match=f"layer=None: '{norm}' was chosen, the first layer after '{block}' whose"):
        camfn.hires_cam(model, None, given, 1, relu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", camfn.CamWarning)
        named = camfn.explain(model, block, given, 1, method="hires_cam", relu=False)
    assert named.layers == (block,)


@pytest.mark.parametrize("name", ["timm, registers, mean", "BEiT", "DINOv2, sdpa"])
def test_where_the_lengths_of_the_vectors_count_the_layer_is_that_of_grad_cam(name):
    """The patches are read themselves, not only by the norm of a last block."""
    model = vit(name)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    given = {"pixel_values": x} if name.startswith("DINOv2") else x
    assert taken("hires_cam", model, given).layers == taken("grad_cam", model, given).layers


def test_lengths_are_asked_for_only_if_layers_follow_and_only_by_methods_of_products():
    x = inputs(2)
    assert taken("hires_cam", small_net(), x).forwards == taken("grad_cam", small_net(), x).forwards == 4
    model = randomised(Patches(class_token=True))
    found, plain = taken("hires_cam", model, x), taken("grad_cam", model, x)
    assert (plain.layers, plain.forwards) == (("blocks.layers.0",), 4)
    assert (found.layers, found.forwards) == (("blocks.layers.1.norm1",), 16)


@pytest.mark.parametrize("method", ["xgrad_cam", "ablation_cam", "eigen_cam", "fem"])
def test_a_method_that_has_no_place_on_such_a_transformer_says_so(method):
    x, none = inputs(2), "but this method was no better than its controls at any layer of such a transformer that was tried"
    with pytest.warns(camfn.CamWarning, match=f"layer=None: 'blocks.layers.0' was chosen, .*; {none}"):
        camfn.METHODS[method].function(randomised(Patches(class_token=True)), None, x, 1, relu=False)
    with pytest.warns(camfn.CamWarning, match="layer=None") as told:
        camfn.METHODS[method].function(small_net(), None, x, 1, relu=False)
    assert not any(none in str(each.message) for each in told)


def test_methods_of_one_call_have_each_its_layer():
    model, x = randomised(Patches(class_token=True)), inputs(2)
    cards = taken(["grad_cam", "hires_cam", "layer_cam"], model, x)
    assert [card.layers[0] for card in cards] == ["blocks.layers.0", "blocks.layers.1.norm1", "blocks.layers.1.norm1"]
    for card in cards:
        close(card.maps, taken(card.method, model, x).maps)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of attention under vmap
def test_the_layer_is_the_same_under_a_transform():
    model, x = randomised(Patches(class_token=True)), inputs(2)
    each = vmap(lambda image: camfn.hires_cam(model, None, image[None], 1, relu=False)[0])(x)
    close(each, taken("hires_cam", model, x).maps)


class Loose(nn.Module):
    """A layer that is read through a norm, and, if asked, beside it."""

    def __init__(self, beside: float):
        super().__init__()
        self.layer, self.norm, self.fc, self.beside = Tokens(), nn.LayerNorm(8), nn.Linear(8, 5), beside

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(x)
        return self.fc((self.norm(tokens) + self.beside * tokens).relu().mean(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).mT


@pytest.mark.parametrize("beside", [0.0, 0.1, 1.0])
def test_whether_lengths_count_is_observed(beside):
    torch.manual_seed(0)
    task = begin(Loose(beside).double(), inputs(2), None)
    layers_found = {out.name: out for out in layers_of_model(task).all}
    assert _length_matters(task, layers_found["layer"]) == (beside > 0)
    assert _length_matters(task, layers_found["norm"])
