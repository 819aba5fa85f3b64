"""Errors of torch from dtypes, devices and custom autograd.Functions are one sentence; a model's own errors stay its own."""

import functools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import CamError
from tests.oracles.closeness import assert_close, close
from tests.oracles.networks import CHEAP

# A map of two channels on a small grid may be flat, and no complaint is about that.
pytestmark = pytest.mark.filterwarnings("ignore::camfn.CamWarning")


def net(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 4, 3), act(), nn.Conv2d(4, 4, 3), act()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def image(dtype: torch.dtype = torch.float32, n: int = 2) -> Tensor:
    return (50 * torch.randn(n, 3, 11, 11, generator=torch.Generator().manual_seed(1))).to(dtype)


ENTRIES = {
    "tap": lambda m, x: camfn.tap(m, "3")(camfn.state_of(m), x),
    "pure": lambda m, x: camfn.pure(m)(camfn.state_of(m), x),
    "head": lambda m, x: camfn.head(m, "0", x, torch.zeros(2, 4, 9, 9, dtype=m[0].weight.dtype)),
    "candidate_layers": lambda m, x: camfn.candidate_layers(m, x),
    "explain": lambda m, x: camfn.explain(m, "3", x, 1),
    "layer=None": lambda m, x: camfn.mean_cam(m, None, x),
    "grad_cam": lambda m, x: camfn.grad_cam(m, "3", x, 1),
    "score_cam": lambda m, x: camfn.score_cam(m, "3", x, 1),
    "full_grad": lambda m, x: camfn.full_grad(m, None, x, 1),
    "prepared": lambda m, x: camfn.grad_cam(camfn.prepare(m), "3", x, 1),
    "vmap": lambda m, x: torch.func.vmap(lambda one: camfn.grad_cam(m, "3", one[None], 1)[0])(x),
    "smooth": lambda m, x: camfn.smooth_grad_cam_pp(m, "3", x, 1, num_samples=2),
}
every_entry = pytest.mark.parametrize("entry", ENTRIES)


def complains(*parts: str):
    return pytest.raises(CamError, match="(?s)" + ".*".join(map(re.escape, parts)))


# ------------------------------------------------------------------------------------------------------------- dtypes


@every_entry
@pytest.mark.parametrize(("model", "given"), [("float32", "float64"), ("float16", "float32"), ("float64", "bfloat16")])
def test_two_dtypes_are_named_and_so_is_the_way_out(entry, model, given):
    m, x = net().to(getattr(torch, model)), image(getattr(torch, given))
    with complains(
        f"x is torch.{given}", f"the model is torch.{model}", f"pass x.to(torch.{model})", f"model.to(torch.{given})"
    ) as found:
        ENTRIES[entry](m, x)
    assert type(found.value.__cause__) is RuntimeError
    ENTRIES[entry](m, x.to(getattr(torch, model)))


def test_the_other_way_out():
    x = image(torch.float64)
    assert camfn.grad_cam(net().to(torch.float64), "3", x, 1).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
@every_entry
def test_an_image_that_is_no_floats(entry, dtype):
    with complains("x is " + str(dtype)):
        ENTRIES[entry](net(), image(dtype))


LAYERS = {
    "Conv2d": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 9, 9)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)),
    "Linear": (nn.Linear(3, 4), (2, 5, 3)),
    "Linear without bias": (nn.Linear(3, 4, bias=False), (2, 5, 3)),
    "BatchNorm2d": (nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "LayerNorm": (nn.LayerNorm(3), (2, 5, 3)),
    "GroupNorm": (nn.GroupNorm(1, 3), (2, 3, 4, 4)),
    "PReLU": (nn.PReLU(), (2, 3, 4)),
    "LSTM": (nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "MultiheadAttention": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 5, 4)),
    "Bilinear": (nn.Bilinear(3, 3, 4), None),
}


MIXES = ("BatchNorm2d", "LayerNorm", "GroupNorm")
"""Of float32, with an input in a narrow dtype, torch runs these."""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_whatever_layer_torch_stops_in(layer, dtype):
    module, shape = LAYERS[layer]
    x: object = torch.ones(2, 3).to(dtype) if shape is None else torch.ones(shape, dtype=dtype)
    x = (x, x) if shape is None else x
    module = module.eval()
    if dtype == torch.float16 and layer in MIXES:
        camfn.pure(module)(camfn.state_of(module), x)
        return
    with complains(f"is {dtype}", "the model is torch.float32", ".to(torch.float32)"):
        camfn.pure(module)(camfn.state_of(module), x)


class Two(nn.Module):
    """An image, and an index beside it."""

    def __init__(self):
        super().__init__()
        self.net, self.names = net(), nn.Embedding(7, 5)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        return self.net(image) + self.names(ids)


def test_of_several_inputs_the_one_is_named():
    two, x, ids = Two().eval(), image(), torch.tensor([1, 2])
    with complains("x[0] is torch.float64", "x[1] is torch.int64", "pass x[0].to(torch.float32)"):
        camfn.grad_cam(two, "net.3", (x.double(), ids), 1)
    with complains("x['image'] is torch.uint8", "pass x['image'].to(torch.float32)", "255"):
        camfn.tap(two, "net.3")(camfn.state_of(two), {"image": x.to(torch.uint8), "ids": ids})
    with complains("x[1] is torch.float32", "indices", ".long()"):
        camfn.grad_cam(two, "net.3", (x, ids.float()), 1)
    with complains("x['image']", "torch.float16"):
        camfn.score_cam(two, "net.3", {"image": x.half(), "ids": ids}, 1)


def test_of_a_list():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.net(torch.stack(images))

    with complains("x[0] is torch.float64", "pass x[0].to(torch.float32)"):
        camfn.grad_cam(Detector(), "net.3", list(image().double()), 1)


def test_a_state_of_another_dtype():
    m, x = net(), image()
    state = {name: tensor.double() for name, tensor in camfn.state_of(m).items()}
    with complains("x is torch.float32", "state= is torch.float64", "pass x.to(torch.float64)"):
        camfn.grad_cam(m, "3", x, 1, state=state)
    close(camfn.grad_cam(m, "3", x.double(), 1, state=state), camfn.grad_cam(net().double(), "3", x.double(), 1))


def test_a_model_of_two_dtypes():
    m = net()
    m[6].half()
    with complains(
        "'0.weight' of the model is torch.float32", "'6.weight' of the model is torch.float16", "model.to(torch.float32)"
    ):
        camfn.grad_cam(m, "3", image(), 1)


@pytest.mark.parametrize("port", ["nudge", "swap"])
def test_what_goes_into_a_port(port):
    m, x = net(), image()
    value = torch.zeros(2, 4, 9, 9, dtype=torch.float64)
    with complains(f"{port} is torch.float64", "the model is torch.float32", f"pass {port}.to(torch.float32)"):
        camfn.tap(m, "0")(camfn.state_of(m), x, **{port: value})
    camfn.tap(m, "0")(camfn.state_of(m), x, **{port: value.float()})


def test_what_goes_into_a_head():
    m, x, value = net(), image(), torch.zeros(2, 4, 9, 9)
    head, state = camfn.head(m, "0", x, value), camfn.state_of(m)
    with complains("value is torch.float64", "pass value.to(torch.float32)"):
        head(state, x, value.double())
    with complains("swap is torch.float64", "pass swap.to(torch.float32)"):
        camfn.head(m, "0", x, value.double())


def test_a_dtype_that_torch_does_not_compute_in():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.centres = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return -torch.cdist(self.conv(x).mean((2, 3)), self.centres)

    m = Distances().half()
    with complains("x is torch.float16", "the model is torch.float16", "model.float() and x.float()"):
        camfn.grad_cam(m, "conv", image(torch.float16), 1)
    camfn.grad_cam(m.float(), "conv", image(), 1)


# ----------------------------------------------------------------------------------------------------- its own errors


class Own(nn.Module):
    """Raises what it is told to, in words of torch's."""

    def __init__(self, error: Exception):
        super().__init__()
        self.net, self.error = net(), error

    def forward(self, x: Tensor) -> Tensor:
        self.net(x.to(torch.float32))
        raise self.error


OWN = [
    RuntimeError("expected scalar type Float but found Double"),
    TypeError("my dtype is float32"),
    RuntimeError("Expected all tensors to be on the same device"),
    RuntimeError("You tried to vmap over F, but it does not have vmap support."),
    NotImplementedError("You must implement either the backward or vjp method"),
    KeyError("dtype"),
]


@pytest.mark.parametrize("error", OWN, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_what_the_model_raises_is_its_own(method, error):
    with pytest.raises(type(error)) as found:
        getattr(camfn, method)(Own(error), "net.3", image(torch.float64), 1)
    assert found.value is error


def test_what_the_model_makes_of_an_error_is_its_own():
    class Caught(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.net(x)
            except RuntimeError as error:
                raise LookupError(f"no luck: {error}") from error

    with pytest.raises(LookupError, match="no luck"):
        camfn.grad_cam(Caught(), "net.3", image(torch.float64), 1)


def test_a_fault_inside_the_model_is_torchs():
    """The arguments go together, and explain nothing."""

    class Faulty(nn.Module):
        def __init__(self, other: torch.dtype):
            super().__init__()
            self.net, self.other = net(), other

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ torch.ones(5, 5, dtype=self.other)

    with pytest.raises(RuntimeError, match="same dtype") as found:
        camfn.grad_cam(Faulty(torch.float64), "net.3", image(), 1)
    assert not isinstance(found.value, CamError)


def test_of_another_fault_nothing_is_said_about_dtypes():
    m = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError, match="unflatten") as found:
        camfn.pure(m)(camfn.state_of(m), image(torch.float64))
    assert not isinstance(found.value, CamError)


# ------------------------------------------------------------------------------------------------------------ devices


def test_devices():
    m, x, away = net(), image(), image().to("meta")
    state = camfn.state_of(m)
    for call in (
        lambda: camfn.tap(m, "3")(state, away),
        lambda: camfn.pure(m)(state, away),
        lambda: camfn.pure(m)({name: tensor.to("meta") for name, tensor in state.items()}, x),
        lambda: camfn.tap(m, "0")(state, x, swap=torch.zeros(2, 4, 9, 9, device="meta")),
        lambda: camfn.head(m, "0", x, torch.zeros(2, 4, 9, 9))(state, x, torch.zeros(2, 4, 9, 9, device="meta")),
    ):
        with complains("move all of them to one") as found:
            call()
        assert {"on meta", "on cpu"} <= set(re.findall(r"on (?:meta|cpu)\b", str(found.value)))


@every_entry
def test_a_model_of_shapes_alone(entry):
    m, x = net().to("meta"), image().to("meta")
    if entry in ("tap", "pure"):  # shapes are all that these need
        ENTRIES[entry](m, x)
    elif entry == "head":
        pass  # a record of shapes is one, too
    else:
        with complains("x is on the meta device", "no values"):
            ENTRIES[entry](m, x)


def test_an_input_beside_the_image_on_another_device():
    with complains("meta"):
        camfn.grad_cam(Two().eval(), "net.3", (image(), torch.tensor([1, 2], device="meta")), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_entry
def test_a_model_on_a_gpu(entry):
    m, x = net().cuda(), image()
    if entry != "head":
        with complains("cuda:0", "cpu", "move"):
            ENTRIES[entry](m, x)
        ENTRIES[entry](m, x.cuda())


# ----------------------------------------------------------------------------------------------------------- Functions


class Old(torch.autograd.Function):
    """A ReLU, as autograd.Functions were written before torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


class New(torch.autograd.Function):
    """As they are written now, but without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


class Mapped(New):
    generate_vmap_rule = True


class Forward(torch.autograd.Function):
    """Without a backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)


class Once(torch.autograd.Function):
    """A sigmoid whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        y = torch.sigmoid(ctx.saved_tensors[0])
        return g * y * (1 - y)


class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = Act(act)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Block(act), Block(act))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x[..., :8, :8]).flatten(2).mT).mean(1))


def net_of(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return net(functools.partial(Act, function))


def twins(function, method: str):
    """A model with a Function in it, and the same with the ReLU that it computes."""
    make = Transformer if "attention" in camfn.METHODS[method].needs else net_of
    return make(function.apply), make(torch.relu)


def run(method: str, model: nn.Module, layer: str = "2", **options) -> Tensor:
    row = camfn.METHODS[method]
    options = {**CHEAP.get(method, {}), **({"fc": "6"} if method == "cam" else {}), **options}
    return row.function(model, layer if row.of_layer else None, image(), 1, **options)


FUNCTIONS = {"Old": Old, "New": New, "Mapped": Mapped}


@pytest.mark.parametrize("layer", ["0", "3"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("method", camfn.METHODS)
def test_every_method_gives_the_map_or_says_why_not(method, function, layer):
    custom, plain = twins(FUNCTIONS[function], method)
    if method == "lift_cam":
        with complains(f"{function}, an autograd.Function of the model", "cannot be recorded", "camfn.grad_cam") as found:
            run(method, custom, layer)
        assert isinstance(found.value.__cause__, RuntimeError)
        return
    expected = run(method, plain, layer)
    assert_close(run(method, custom, layer), expected, 1e-4)


def by_hooks(model: nn.Module, layer: str, x: Tensor, target: int) -> Tensor:
    """Grad-CAM with plain hooks, not normalised."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    score = model(x)[:, target].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(score, kept)
    return (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()


@pytest.mark.parametrize("function", [Old, New, Once])
def test_grad_cam_is_that_of_plain_hooks(function):
    m, x = net_of(function.apply), image()
    for layer in ("0", "2"):
        close(camfn.grad_cam(m, layer, x, 1, normalize=False), by_hooks(m, layer, x, 1))


TRANSFORMED = {
    "vmap": lambda m, x: torch.func.vmap(lambda one: camfn.grad_cam(m, "2", one[None], 1)[0])(x),
    "grad": lambda m, x: torch.func.grad(lambda x: camfn.score_cam(m, "2", x, 1).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(lambda x: camfn.mean_cam(m, "2", x), (x,), (x,)),
    "fold=False": lambda m, x: camfn.score_cam(m, "2", x, 1, sweep=camfn.Sweep(fold=False)),
    "tap": lambda m, x: torch.func.vmap(lambda one: camfn.tap(m, "2")(camfn.state_of(m), one[None]).output)(x),
}


@pytest.mark.parametrize("how", TRANSFORMED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_under_a_transform(function, how):
    m = net_of(FUNCTIONS[function].apply)
    runs = {"Old": (), "New": ("grad",), "Mapped": ("vmap", "grad", "fold=False", "tap")}[function]
    if how in runs:
        expected = TRANSFORMED[how](net(), image())
        found = TRANSFORMED[how](m, image())
        assert_close(found, expected, 1e-4)
        return
    asked = {"Old": "setup_context", "New": "jvp" if how == "jvp" else "generate_vmap_rule", "Mapped": "jvp"}[function]
    with complains(f"{function}, an autograd.Function of the model", "transform", asked, "camfn.grad_cam"):
        TRANSFORMED[how](m, image())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_head_cannot_be_recorded(function):
    m = net_of(FUNCTIONS[function].apply)
    with complains(function, "cannot be recorded", "camfn.grad_cam"):
        camfn.head(m, "2", image(), torch.zeros(2, 4, 7, 7))


@pytest.mark.parametrize("method", [name for name, row in camfn.METHODS.items() if "attention" not in row.needs])
def test_without_a_backward(method):
    m, needs = net_of(Forward.apply), camfn.METHODS[method].needs
    if "gradients" in needs or method in ("lift_cam", "opti_cam", "group_cam"):
        with complains(
            "Forward, an autograd.Function of the model", "cannot" if method == "lift_cam" else "no backward", "use"
        ):
            run(method, m)
    else:
        assert_close(run(method, m), run(method, net()), 1e-4)


def test_a_second_derivative_that_torch_would_leave_out():
    x, m = image() / 50, net_of(Once.apply)
    with complains("second derivative", "Once", "once_differentiable", "camfn.grad_cam"):
        camfn.shapley_cam(m, "0", x, 1)
    expected = camfn.grad_cam(net(nn.Sigmoid), "0", x, 1)
    assert_close(camfn.grad_cam(m, "0", x, 1), expected, 1e-5)


def test_a_second_derivative_that_torch_has():
    class Twice(Once):
        backward = staticmethod(Once.backward.__wrapped__)

    x = image() / 50
    assert_close(camfn.shapley_cam(net_of(Twice.apply), "0", x, 1), camfn.shapley_cam(net(nn.Sigmoid), "0", x, 1), 1e-5)
