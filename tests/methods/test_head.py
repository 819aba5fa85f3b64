"""Ablation-, Recipro- and LIFT-CAM against closed forms, loops with a plain hook, and peers where these are right."""

import collections
import copy
import dataclasses
import functools
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from camfn.model import head as heads
from camfn.model import memory
from camfn.sweep import changes
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.loops import ablation_loop, output_with, recipro_loop, seen_at
from tests.oracles.networks import inputs, small_net

AT_LAYER = ("ablation_cam", "recipro_cam", "lift_cam")


def seeded(net: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return net.double().eval()


def pooled() -> nn.Module:
    """The layer is `1`: what comes out of a ReLU, and goes through the mean and a linear layer."""
    return seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))


def two_layers() -> nn.Module:
    """Two hidden layers after `1`, with ReLU: a convolution, and a linear layer behind a max-pooling."""
    after = [nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 7), nn.ReLU()]
    return seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *after, nn.Linear(7, 5)), 2)


class Residual(nn.Module):
    """Adds in place what went around, as ResNets do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv, self.bn, self.down = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        out = self.bn(self.conv(h))
        out += self.down(h)
        return self.fc(self.act(out).mean((2, 3)))


class Dense(nn.Module):
    """Concatenates what went around."""

    def __init__(self):
        super().__init__()
        self.stem, self.grow, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = torch.cat([h, F.relu(self.grow(h))], 1)
        return self.fc(F.relu(self.last(h)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer with a class token, of torch's own parts."""

    def __init__(self):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        return self.fc(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))[:, 0])


NETS = {
    "pooled": (pooled, "1"),
    "two layers": (two_layers, "1"),
    "residual, block": (lambda: seeded(Residual()), "stem"),
    "residual, inside": (lambda: seeded(Residual()), "conv"),
    "residual, the way around": (lambda: seeded(Residual()), "down"),
    "dense": (lambda: seeded(Dense()), "stem"),
    "dense, inside": (lambda: seeded(Dense()), "grow"),
    "tokens": (lambda: seeded(Tokens()), "blocks.0"),
    "tokens, the way around": (lambda: seeded(Tokens()), "blocks.1.norm1"),
}
SIZES = {"two layers": 8, "tokens": 8, "tokens, the way around": 8}


def given(name: str, n: int = 2) -> tuple[nn.Module, str, Tensor]:
    make, layer = NETS[name]
    return make(), layer, inputs(n)


# -------------------------------------------------------------------------------------------------- plain hook loops


@pytest.mark.parametrize("name", NETS)
def test_ablation_is_the_loop_over_channels(name):
    net, layer, x = given(name)
    weights, maps = ablation_loop(net, layer, x)
    card = camfn.explain(net, layer, x, "all", method="ablation_cam", relu=False, normalize=False)
    close(card.weights[0], weights, "weights")
    close(card.maps, maps, "maps")
    assert weights.abs().amax() > 1e-2


@pytest.mark.parametrize("window", [None, "gaussian"])
@pytest.mark.parametrize("name", NETS)
def test_recipro_is_the_loop_over_positions(name, window):
    net, layer, x = given(name)
    expected = recipro_loop(net, layer, x, window is not None)
    card = camfn.explain(net, layer, x, "all", method="recipro_cam", window=window, normalize=False)
    close(card.maps, expected)
    assert float(expected.flatten(2).std(-1).min()) > 1e-4
    assert card.weights == ()


@pytest.mark.parametrize("way", ["mapped", "batch"])
@pytest.mark.parametrize("name", NETS)
def test_every_way_of_running_the_model_scores_the_same(name, way, monkeypatch):
    """Where no head can be recorded the model is mapped over what is swapped in, and else gets it as a batch."""
    net, layer, x = given(name)
    expected = [camfn.explain(net, layer, x, "all", method=m, normalize=False) for m in ("ablation_cam", "recipro_cam")]
    monkeypatch.setattr(changes, "_recorded", lambda *args: None)
    if way == "batch":
        monkeypatch.setattr(changes, "vmap", refuses)
    elif name.startswith("tokens"):
        pytest.skip("torch warns of attention that it does not map")
    for method, before in zip(("ablation_cam", "recipro_cam"), expected):
        card = camfn.explain(net, layer, x, "all", method=method, normalize=False)
        close(card.maps, before.maps, method)
        assert card.heads == before.heads


def refuses(function):
    def call(*args):
        raise RuntimeError("cannot be mapped")

    return call


# ------------------------------------------------------------------------------------------------------ closed forms


def test_closed_forms_on_a_pooled_linear_head():
    net, x, layer = pooled(), inputs(3), "1"
    a, y = seen_at(net, layer, x)
    weight, bias = net[4].weight.detach(), net[4].bias.detach()
    share = weight[None] * a.mean((2, 3))[:, None]  # W_ck mean(A_k)
    of = functools.partial(camfn.explain, net, layer, x, "all", relu=False, normalize=False)
    close(of(method="ablation_cam").weights[0], share / y.abs()[..., None])
    close(of(method="lift_cam").weights[0], share)
    cam = torch.einsum("ck,nkhw->nchw", weight, a)
    close(of(method="recipro_cam").maps, cam / a[0, 0].numel() + bias[:, None, None])
    assert (y < 0).any()
    assert (y > 0).any()


def test_where_the_score_is_negative_a_channel_that_speaks_for_the_class_still_counts():
    """The paper's division by y would turn the map about."""
    net, x, c = pooled(), inputs(2), 1
    with torch.no_grad():
        net[4].bias[c] = -5
    a, y = seen_at(net, "1", x)
    assert y[0, c] < 0
    weights = camfn.explain(net, "1", x[:1], c, method="ablation_cam").weights[0][0, 0]
    for k in range(4):
        without = a[:1].clone()
        without[:, k] = 0
        falls = output_with(net, "1", x[:1], without)[0, c] < y[0, c]
        assert (weights[k] > 0) == falls
    assert not torch.equal(weights.sign(), weights.sign()[:1].expand(4)), "some speak for it, some against"
    maps = [camfn.ablation_cam(net, "1", x[:1], c, relu=relu, normalize=False) for relu in (False, True)]
    assert torch.equal(maps[0].relu(), maps[1])


def test_a_score_of_zero_gives_the_drops_themselves():
    net, x = pooled(), inputs(2)
    with torch.no_grad():
        net[4].bias.zero_()
        net[4].weight[0] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    net[0].weight.data[1] = net[0].weight.data[0]
    net[0].bias.data[1] = net[0].bias.data[0]  # equal channels: the score of class 0 is exactly 0
    a, y = seen_at(net, "1", x)
    assert (y[:, 0] == 0).all()
    weights = camfn.explain(net, "1", x, 0, method="ablation_cam").weights[0][:, 0]
    close(weights, net[4].weight[0].detach() * a.mean((2, 3)))


def raw(method: str, net: nn.Module, layer: str, x: Tensor, **options) -> Tensor:
    return camfn.METHODS[method].function(net, layer, x, 1, relu=False, normalize=False, **options)


def test_on_a_head_with_two_hidden_layers_the_methods_differ():
    net, x = two_layers(), inputs(2)
    maps = {name: raw(name, net, "1", x) for name in (*AT_LAYER, "grad_cam")}
    maps["recipro_cam, gaussian"] = raw("recipro_cam", net, "1", x, window="gaussian")
    units = {name: camfn.maps.normalize(m, (1, 2)) for name, m in maps.items()}
    for (a, one), (b, other) in itertools.combinations(units.items(), 2):
        assert (one - other).abs().amax() > 0.02, f"{a} and {b} are alike"


# ------------------------------------------------------------------------------------------------------------- peers


def grad_cam_package():
    torchvision_models()
    return pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)


class Logit:
    def __init__(self, c: int):
        self.c = c

    def __call__(self, output: Tensor) -> Tensor:
        return output[self.c]


def test_weights_are_those_of_pytorch_grad_cam_where_it_is_right():
    """On an activation without negative values, and a positive score: it writes min - 1e7 where the minimum is negative, and
    divides by the score. A class with a positive score is taken; float32, as its weights are."""
    package = grad_cam_package()
    net, x = two_layers().float(), inputs(1, dtype=torch.float32)
    a, y = seen_at(net, "1", x)
    c = int(y.argmax())
    assert y[0, c] > 0
    with package.AblationCAM(model=copy.deepcopy(net), target_layers=[]) as cam:
        twin = cam.model
        cam.target_layers = [twin[1]]
        theirs = cam.get_cam_weights(x, twin[1], [Logit(c)], a.numpy(), None)
    ours = camfn.explain(net, "1", x, c, method="ablation_cam").weights[0][0, 0]
    assert_close(ours, torch.as_tensor(theirs).reshape(-1), 1e-5)


def test_pytorch_grad_cam_ablates_to_minus_ten_million_where_an_activation_is_negative():
    """Its fault, for the day that it is mended. A ReLU behind the layer would hide it."""
    package = grad_cam_package()
    net = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))).float()
    x = inputs(1, dtype=torch.float32)
    a, y = seen_at(net, "0", x)
    assert a.min() < 0
    c = int(y.argmax())
    with package.AblationCAM(model=copy.deepcopy(net), target_layers=[]) as cam:
        theirs = cam.get_cam_weights(x, cam.model[0], [Logit(c)], a.numpy(), None)
    ours = camfn.explain(net, "0", x, c, method="ablation_cam").weights[0][0, 0]
    assert_close(ours, ablation_loop(net, "0", x)[0][0, c], 1e-5)
    assert (torch.as_tensor(theirs).reshape(-1) - ours).abs().max() > 0.1


def deep_lift(head: nn.Module, activation: Tensor, c: int) -> Tensor:
    """captum's contributions `(n, c, h, w)` of the activation, with a baseline of zeros."""
    attr = pytest.importorskip("captum.attr", exc_type=ImportError)
    return attr.DeepLift(head).attribute(activation.clone().requires_grad_(), torch.zeros_like(activation), target=c).detach()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize("c", range(5))
def test_lift_is_captums_deep_lift_of_the_head(c):
    net, x = two_layers(), inputs(2)
    activation, _ = seen_at(net, "1", x)
    expected = deep_lift(copy.deepcopy(net[2:]), activation, c).sum((2, 3))
    weights = camfn.explain(net, "1", x, c, method="lift_cam").weights[0][:, 0]
    assert_close(weights, expected, 1e-8)
    gradient = grad(lambda a: net[2:](a)[:, c].sum())(activation)
    assert ((gradient * activation).sum((2, 3)) - weights).abs().amax() > 1e-2, "sum(G * A) is another thing"


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus()], ids=lambda act: type(act).__name__
)
def test_functions_of_single_values_are_followed_as_captum_follows_them(act):
    after = [nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), act, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    net = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), *after), 3)
    x = inputs(2)
    activation, _ = seen_at(net, "0", x)
    expected = deep_lift(copy.deepcopy(net[1:]), activation, 1).sum((2, 3))
    assert_close(camfn.explain(net, "0", x, 1, method="lift_cam").weights[0][:, 0], expected, 1e-8)


# ----------------------------------------------------------------------------------------- the rules of what is followed


class After(nn.Module):
    """A convolution, then what is given."""

    def __init__(self, function, dims: int = 2):
        super().__init__()
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](3, 4, 3, padding=1)
        self.function = function
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.conv(x))
        return self.fc(h.flatten(2).mean(-1))


FOLLOWED = {  # each with something after it that is not affine, so that a wrong slope shows
    "max-pooling with overlap": lambda h: F.max_pool2d(h, 3, 2).tanh(),
    "adaptive max-pooling": lambda h: F.adaptive_max_pool2d(h, 2).tanh(),
    "maximum over positions": lambda h: h.amax((2, 3), keepdim=True).tanh(),
    "maximum over one axis": lambda h: h.max(3).values[..., None].tanh(),
    "one image at a time": lambda h: torch.stack(
        [F.avg_pool2d(F.conv2d(one, torch.ones(4, 4, 1, 1).to(h)), 2) for one in h]
    ).tanh(),
    "changes of shape in place": lambda h: h.mul(2).unsqueeze_(1).squeeze_(1).transpose_(2, 3).swapaxes_(2, 3).sigmoid(),
    "average pooling": lambda h: F.avg_pool2d(h, 2).tanh(),
    "pooling with the channels last": lambda h: F.adaptive_avg_pool2d(h.movedim(1, -1).contiguous().movedim(-1, 1), 1).tanh(),
    "adaptive average pooling": lambda h: F.adaptive_avg_pool2d(h, 3).tanh(),
    "reshaping and joining": lambda h: torch.cat([h.flip(2), h.mT, h * 0.5], 2).roll(1, 3)[:, :, ::2].tanh(),
    "addition to itself": lambda h: (h + F.relu(h - 0.1)).sigmoid(),
    "in place": lambda h: F.relu(h.add(0.1).mul_(2), inplace=True).mul(2).sub_(0.3).tanh_(),
    "padding and stretching": lambda h: F.interpolate(F.pad(h, (1, 2)), scale_factor=2, mode="bilinear").tanh(),
    "hard functions": lambda h: F.hardtanh(F.hardswish(h) + F.relu6(h) + F.leaky_relu(h, 0.2)),
    "smooth functions": lambda h: F.gelu(h) + F.silu(h) + F.softplus(h) + F.elu(h) + F.mish(h),
    "where": lambda h: torch.where(torch.arange(8) % 2 == 0, h, 0).sigmoid(),
}


class Fields(collections.OrderedDict):
    """An output whose entries are attributes, as that of transformers: a class that torch's pytree does not know."""

    def __getattr__(self, name: str):
        return self[name] if name in self else super().__getattribute__(name)


@dataclasses.dataclass
class Row:
    logits: Tensor
    others: list


class Plain:
    def __init__(self, logits: Tensor):
        self.logits = logits


WRAPPED = {
    "ordered dict": lambda y: Fields(logits=y, other={"y": y}),
    "dataclass": lambda y: Row(y, [y, None]),
    "frozen inside": lambda y: types.MappingProxyType({"logits": y}),
    "object": Plain,
    "namespace": lambda y: types.SimpleNamespace(logits=y),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = seeded(After(FOLLOWED["in place"])), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("method", AT_LAYER)
@pytest.mark.parametrize("kind", WRAPPED)
def test_an_output_of_any_class_is_opened(kind, method):
    net, x = Wrapped(WRAPPED[kind]), inputs(2)
    found = raw(method, net, "net.conv", x)
    close(found, raw(method, net.net, "conv", x))
    assert found.abs().amax() > 1e-3
    prepared = camfn.prepare(net)
    for _ in range(2):
        assert torch.equal(raw(method, prepared, "net.conv", x), found)


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_head_returns_an_output_of_the_model_s_class_and_keeps_no_tensor_of_it(kind):
    net, x = Wrapped(WRAPPED[kind]), inputs(2)
    _, seen = camfn.tap(net, "net.conv")(camfn.state_of(net), x)
    head = camfn.head(net, "net.conv", x, seen)
    found, expected = head(camfn.state_of(net), x, seen), net(x)
    assert type(found) is (dict if kind == "frozen inside" else type(expected))
    close(camfn.targets.logits_of(found), camfn.targets.logits_of(expected))
    kept = [leaf for leaf in camfn.targets.flatten(head.unflatten([None] * 9))[0] if isinstance(leaf, Tensor)]
    assert not kept


def difference(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    activation, y = seen_at(net, layer, x)
    return y - output_with(net, layer, x, torch.zeros_like(activation))


@pytest.mark.parametrize("kind", FOLLOWED)
def test_contributions_add_up_to_the_difference_of_the_scores(kind):
    net, x = seeded(After(FOLLOWED[kind])), inputs(2)
    card = camfn.explain(net, "conv", x, "all", method="lift_cam")
    close(card.weights[0].sum(-1), difference(net, "conv", x), kind)
    activation, _ = seen_at(net, "conv", x)
    gradients = torch.stack([grad(lambda a, c=c: after(net, a)[:, c].sum())(activation) for c in range(5)], 1)
    assert ((gradients * activation[:, None]).sum((3, 4)) - card.weights[0]).abs().amax() > 1e-3, "the gradient would do"


def after(net: nn.Module, a: Tensor) -> Tensor:
    return net.fc(net.function(a).flatten(2).mean(-1))


@pytest.mark.parametrize(("dims", "pool"), [(1, F.max_pool1d), (3, F.max_pool3d)])
def test_max_pooling_in_one_and_three_dimensions(dims, pool):
    net, x = seeded(After(lambda h: pool(h, 2).tanh(), dims)), inputs(2, dims=dims, side=6)
    card = camfn.explain(net, "conv", x, "all", method="lift_cam")
    close(card.weights[0].sum(-1), difference(net, "conv", x))


def test_a_maximum_is_shared_between_its_place_and_that_of_zeros():
    """By hand. Behind a bias of (3, 0) the maximum of (1, 5) - that is of (4, 5), at the second place - is 2 above the 3 that
    zeros have at the first: all of that is the second's, whose slope is 2/5."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.same(x) + torch.tensor([3.0, 0.0], dtype=x.dtype)
            return F.max_pool1d(h, 2)[:, 0]

    x = torch.tensor([[[1.0, 5.0]]], dtype=torch.float64)
    outcome = camfn.METHODS["lift_cam"].run(Two(), "same", x, 0, layout="channels_first", relu=False, normalize=False)
    close(outcome.weights[0], torch.tensor([[[2.0]]], dtype=torch.float64))
    x = torch.tensor([[[-2.0, 2.0]]], dtype=torch.float64)  # (1, 2) against (3, 0): the first lost 1 of its 2
    outcome = camfn.METHODS["lift_cam"].run(Two(), "same", x, 0, layout="channels_first", relu=False, normalize=False)
    close(outcome.weights[0], torch.tensor([[[-1.0]]], dtype=torch.float64))


UNKNOWN = {
    "aten.mul": lambda h: h * torch.sigmoid(h),
    "aten._softmax": lambda h: torch.softmax(h, 1),
    "aten.native_layer_norm": lambda h: F.layer_norm(h, h.shape[1:]),
    "aten.bmm": lambda h: (h.flatten(2) @ h.flatten(2).mT).reshape(len(h), 4, 4),
    "aten.div": lambda h: h / (h.abs() + 1),
    "aten.native_batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "aten.div.Tensor_mode": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "aten.sort": lambda h: h.sort(2).values,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_another_operation_is_an_error_that_names_it(kind):
    net = seeded(After(UNKNOWN[kind]))
    with pytest.raises(camfn.CamError, match=rf"lift_cam has no rule for {kind}.*layer 'conv'.*choose a later layer"):
        camfn.lift_cam(net, "conv", inputs(2), 1)


@pytest.mark.parametrize(
    ("target", "exact"),
    [(camfn.targets.probability("all"), False), (lambda y: y[:2] * y[2:4], True), (camfn.targets.contrast(1), True)],
    ids=["probability", "products", "contrast"],
)
def test_contributions_to_a_score_that_is_no_logit_add_up_too(target, exact):
    """To what the quadrature leaves: nothing of a polynomial."""
    net, x = two_layers(), inputs(2)
    card = camfn.explain(net, "1", x, target, method="lift_cam")
    activation, _ = seen_at(net, "1", x)
    zeros = camfn.explain(Replaced(net), "whole", activation * 0, target_like(target, card), method="lift_cam").scores
    if exact:
        close(card.weights[0].sum(-1), card.scores - zeros)
    else:
        assert_close(card.weights[0].sum(-1), card.scores - zeros, 1e-6)
    assert (card.scores - zeros).abs().amax() > 1e-3


class Replaced(nn.Module):
    """What comes after the layer, as a model of its own."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.whole, self.rest = nn.Identity(), net[2:]

    def forward(self, a: Tensor) -> Tensor:
        return self.rest(self.whole(a))


def target_like(target, card):
    """A contrast is with the classes nearest on the clean input, not on zeros."""
    if not isinstance(target, camfn.targets.Contrast):
        return target
    classes = card.classes
    away = (card_logits(card) - card_logits(card).gather(1, classes)).abs().scatter(1, classes, torch.inf)
    nearest = away.topk(3, 1, largest=False).indices
    return [functools.partial(contrast, int(c), row) for c, row in zip(classes[:, 0], nearest)]


def card_logits(card) -> Tensor:
    return seen_at(two_layers(), "1", inputs(2))[1]


def contrast(c: int, others: Tensor, y: Tensor) -> Tensor:
    return y[c] - y[others].mean()


def test_lift_under_a_transform_finds_its_record_without_what_the_transform_hands_it():
    net, x = two_layers(), inputs(3)
    expected = raw("lift_cam", net, "1", x)
    fresh = two_layers()
    found = vmap(lambda one: raw("lift_cam", fresh, "1", one[None])[0])(x)
    close(found, expected)
    close(vmap(lambda one: raw("lift_cam", net, "1", one[None])[0])(x), expected, "kept before")


# ---------------------------------------------------------------------------------------------------- how it is swept

RUNS = []
"""How many inputs went through, forward by forward. A global: camfn runs a copy of the model."""


def counted(net: nn.Module, layer: str) -> nn.Module:
    def count(module, args):
        RUNS.append(len(args[0]))

    net.get_submodule(layer).register_forward_pre_hook(count)
    return net


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_the_model_runs_on_the_clean_input_and_once_for_the_record(method):
    net, x = counted(two_layers(), "0"), inputs(2)
    first = camfn.explain(net, "1", x, 1, method=method)
    RUNS.clear()
    card = camfn.explain(net, "1", x, 1, method=method)
    assert RUNS == [2, 1]
    assert (card.forwards, card.heads) == (2, 2 * (5 if method == "ablation_cam" else 36))
    assert torch.equal(card.maps, first.maps)


def test_inputs_that_go_around_the_layer_run_once_for_each_image():
    net, x = counted(seeded(Residual()), "stem"), inputs(2)
    camfn.explain(net, "conv", x, 1, method="recipro_cam")
    RUNS.clear()
    card = camfn.explain(net, "conv", x, 1, method="recipro_cam", sweep=camfn.Sweep(chunk=16))
    camfn.explain(net, "conv", x, 1, method="recipro_cam", sweep=camfn.Sweep(chunk=16))
    assert card.forwards == 2 + 2
    assert card.heads == 2 * 64


def test_channels_that_are_zero_are_not_run_and_have_no_weight():
    net, x = pooled(), inputs(2)
    with torch.no_grad():
        net[0].bias[1] = -100  # dead behind the ReLU, in every image
    card = camfn.explain(net, "1", x, 1, method="ablation_cam")
    assert card.heads == 2 * 4  # three channels, and the whole activation
    assert (card.weights[0][..., 1] == 0).all()
    weights, _ = ablation_loop(net, "1", x)
    close(card.weights[0][:, 0], weights[:, 1])


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_progress_tells_every_activation(method):
    told = []
    sweep = camfn.Sweep(chunk=3, progress=lambda done, total: told.append((done, total)))
    card = camfn.explain(pooled(), "1", inputs(2), 1, method=method, sweep=sweep)
    assert told[-1] == (card.heads, card.heads)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert max(b - a for (a, _), (b, _) in itertools.pairwise([(0, 0), *told])) <= 3


class Couples(nn.Module):
    """What comes after the layer takes the mean over the batch off."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(torch.tanh(h - 0.5 * h.mean(0, keepdim=True)))


@pytest.mark.parametrize("way", ["mapped", "one at a time"])
def test_a_model_whose_samples_are_not_independent_is_not_given_several(way, monkeypatch):
    net, x = seeded(Couples()), inputs(1)
    if way == "one at a time":
        monkeypatch.setattr(changes, "vmap", refuses)
    close(raw("recipro_cam", net, "conv", x), recipro_loop(net, "conv", x)[:, 1])
    close(raw("ablation_cam", net, "conv", x), ablation_loop(net, "conv", x)[1][:, 1])


class Branches(nn.Module):
    """The layers after depend on a value that Python reads."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.fc, self.read = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5), read

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.read(self.conv(x), x).mean((2, 3)))


def strongest(h: Tensor, x: Tensor) -> Tensor:
    return h.tanh() if h.flatten(1).std(1).max() > 0.5 else h.exp()


def above(h: Tensor, x: Tensor) -> Tensor:
    return torch.stack([one[one > 0].sum() * torch.ones_like(one) for one in h])


def by_input(h: Tensor, x: Tensor) -> Tensor:
    return h.tanh() * float(x.sum())


@pytest.mark.parametrize("read", [strongest, above, by_input])
def test_what_reads_values_is_not_recorded_but_run(read):
    net, x = seeded(Branches(read)), inputs(1)
    value = seen_at(net, "conv", x)[0]
    with pytest.raises(camfn.CamError, match=r"layer 'conv' (may depend|depends) on values that are read in Python"):
        camfn.head(net, "conv", x, value)
    if read is by_input:  # a record for this input
        scaled = seeded(Branches(lambda h, x: h.tanh() * x.sum()))
        close(raw("lift_cam", net, "conv", x), raw("lift_cam", scaled, "conv", x))
    else:
        with pytest.raises(camfn.CamError, match=r"layer 'conv' (may depend|depends) on values that are read in Python"):
            camfn.lift_cam(net, "conv", x, 1)
    close(raw("recipro_cam", net, "conv", x), recipro_loop(net, "conv", x)[:, 1])


def test_what_is_read_before_the_layer_holds_for_its_image_alone():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = two_layers()

        def forward(self, x: Tensor) -> Tensor:
            found = self.net[1](self.net[0](x))
            return self.net[2:](found * float(x.abs().amax()))

    net, x = Reads(), torch.cat([inputs(1), 3 * inputs(1)])
    each = torch.cat([raw("recipro_cam", net, "net.1", one[None]) for one in x])
    expected = torch.cat([recipro_loop(net, "net.1", one[None])[:, 1] for one in x])
    close(each, expected)


def out_of_memory(count: int) -> RuntimeError:
    return RuntimeError(f"[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: {count}")


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_where_memory_runs_out_the_chunk_is_halved(method, monkeypatch):
    net, x = two_layers(), inputs(2)
    expected = raw(method, net, "1", x)
    largest = 5 if method == "recipro_cam" else 2
    inner = heads.Head.onward

    def hungry(head, handed):
        onward = inner(head, handed)

        def call(value):
            if len(value) > largest:
                raise out_of_memory(len(value))
            return onward(value)

        return call

    monkeypatch.setattr(heads.Head, "onward", hungry)
    monkeypatch.setattr(changes, "_holds", lambda *args: True)
    with pytest.warns(camfn.CamWarning, match="memory ran out at .* changed activations per forward"):
        found = raw(method, two_layers(), "1", x)
    close(found, expected)


def test_the_chunk_is_what_memory_allows(monkeypatch):
    seen = []
    kernel = changes._kernel
    monkeypatch.setattr(changes, "_kernel", lambda site, chunk: (seen.append(chunk), kernel(site, chunk))[1])
    net, x = two_layers(), inputs(1)
    camfn.recipro_cam(net, "1", x, 1)
    assert seen == [36]
    for sweep, chunk in ((camfn.Sweep(chunk=10), 9), (camfn.Sweep(chunk=100), 36), (camfn.Sweep(memory=1), 1)):
        seen.clear()
        camfn.recipro_cam(net, "1", x, 1, sweep=sweep)
        assert seen == [chunk], sweep
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    monkeypatch.setattr(changes, "free_share", lambda device: 1)
    monkeypatch.setattr(camfn.sweep.runner, "free_bytes", lambda device: 1)
    seen.clear()
    camfn.recipro_cam(net, "1", x, 1)
    assert seen == [1]


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_a_score_that_overflows_names_the_change(method):
    net, x = pooled(), inputs(1)
    value, _ = seen_at(net, "1", x)
    if method == "ablation_cam":
        value[:, 2], words = 0, "channel 2 set to zero"
    else:
        value, words = value * F.one_hot(torch.tensor(19), 36).reshape(6, 6), "all but position 19 set to zero"
    changed = output_with(net, "1", x, value)[0, 0]
    with pytest.raises(camfn.CamError, match=f"score of image 0 with {words} at layer '1' is not finite"):
        camfn.METHODS[method].function(net, "1", x, lambda y: torch.where((y[0] - changed).abs() < 1e-12, torch.inf, y[0]))


def test_another_window_is_an_error():
    with pytest.raises(camfn.CamError, match=r'window must be None or "gaussian", found .box.'):
        camfn.recipro_cam(pooled(), "1", inputs(1), 1, window="box")


@pytest.mark.parametrize("dims", [1, 3])
def test_the_window_in_one_and_three_dimensions(dims):
    net, x = small_net(dims=dims), inputs(1, dims=dims, side=6)
    net.eval()
    a, _ = seen_at(net, "features", x)
    found = raw("recipro_cam", net, "features", x, window="gaussian")
    line = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    for place in itertools.product(range(3), repeat=dims):
        mask = torch.ones(3, 3, 3, dtype=torch.float64)[(0,) * (3 - dims)]
        for axis, p in enumerate(place):
            row = torch.zeros(5, dtype=torch.float64)
            row[p : p + 3] = line
            mask = mask * row[1:4].reshape(*(-1 if i == axis else 1 for i in range(dims)))
        expected = output_with(net, "features", x, a * mask)[0, 1]
        close(found[(0, *place)], expected)


# ------------------------------------------------------------------------------------------------------- transformers


def test_the_token_form_keeps_the_class_token_and_any_prefix():
    models = torchvision_models()
    torch.manual_seed(0)
    net = models.VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=5).double().eval()
    seeded(net, 1)
    x = inputs(1, side=16)
    expected = recipro_loop(net, "encoder.layers.encoder_layer_0", x, gaussian=True)
    found = camfn.recipro_cam(net, "encoder.layers.encoder_layer_0", x, "all", window="gaussian", normalize=False)
    close(found, expected)
    assert float(expected.flatten(2).std(-1).min()) > 1e-6


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_channels_last_and_callables(method):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = two_layers(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.last(self.net[:2](x).movedim(1, -1))
            return self.net[2:](h.movedim(-1, 1))

    net, x = Last(), inputs(2)
    found = raw(method, net, "last", x, layout="channels_last")
    close(found, raw(method, net.net, "1", x))
    with pytest.raises(camfn.CamError, match="layout= is a function, which has no inverse"):
        raw(method, net, "last", x, layout=lambda a: a.movedim(-1, 1))
