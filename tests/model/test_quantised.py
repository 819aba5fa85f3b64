"""Models that compute in integers, throughout or in part: maps by the methods that can, one sentence by the others.

The oracles are plain hooks, and the same model with a layer's tensor made floats, which are quantised again right behind it:
with the same scale, that gives the very integers back.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import CamError
from tests.oracles.closeness import close
from tests.oracles.networks import CHEAP

quantization = pytest.importorskip("torch.ao.quantization")
fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
pytestmark = [
    pytest.mark.filterwarnings("ignore::camfn.CamWarning"),
    pytest.mark.filterwarnings("ignore:.*quantiz.*"),
    pytest.mark.filterwarnings("ignore:.*reduce_range.*"),
]

ENGINE = next((name for name in ("fbgemm", "x86", "qnnpack") if name in torch.backends.quantized.supported_engines), None)


@pytest.fixture(autouse=True, scope="module")
def engine():
    """torch's choice of kernels is one for the process."""
    if ENGINE is None:
        pytest.skip("torch has no quantised kernels here")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, ENGINE
    yield
    torch.backends.quantized.engine = before


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A stem in floats, a block with a sum in integers, a head that is a convolution; the output is not made floats."""

    def __init__(self):
        super().__init__()
        self.stem, self.quant = nn.Conv2d(3, 8, 3), quantization.QuantStub()
        self.conv, self.act, self.sum = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), torch.ao.nn.quantized.FloatFunctional()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(self.stem(x))
        x = self.sum.add_relu(x, self.act(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)


def floats() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(quantization.QuantStub(), *body, quantization.DeQuantStub()).eval()


def static() -> nn.Module:
    return converted(floats())


def converted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qconfig(ENGINE)
        if isinstance(model, Residual):
            model.stem.qconfig = None
        quantization.prepare(model, inplace=True)
        model(image(8))
        return quantization.convert(model, inplace=True)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return converted(Residual().eval())


def by_fx() -> nn.Module:
    """Converted as a graph: the convolution and its ReLU are one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = fx.prepare_fx(model, quantization.get_default_qconfig_mapping(ENGINE), (image(),))
        prepared(image(8))
        return fx.convert_fx(prepared)


MODELS = {"static": (static, "2", "5"), "residual": (residual, "act", "head"), "fx": (by_fx, "0", "4")}
"""The model, a layer that gives integers, and the linear layer."""
every_model = pytest.mark.parametrize("kind", MODELS)


def hooked(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What a layer gives, by a plain hook."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    model(x)
    handle.remove()
    return kept[0]


def seen_by_a_hook(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    found = hooked(model, layer, x)
    assert found.is_quantized
    return found.dequantize()


class Opened(nn.Module):
    """A layer that gives integers, and the floats that these stand for in between."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.floats = layer, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return torch.quantize_per_tensor(self.floats(out.dequantize()), out.q_scale(), out.q_zero_point(), out.dtype)


def opened(model: nn.Module, layer: str) -> nn.Module:
    twin = copy.deepcopy(model)
    parent, _, name = layer.rpartition(".")
    setattr(twin.get_submodule(parent), name, Opened(twin.get_submodule(layer)))
    return twin


def run(method: str, model: nn.Module, layer: str | None, x: Tensor, **options) -> Tensor:
    row = camfn.METHODS[method]
    options = {"relu": False, "normalize": False, **CHEAP.get(method, {}), **options}
    return row.function(model, layer if row.of_layer else None, x, 1, **options)


NEEDS = {name: row.needs for name, row in camfn.METHODS.items()}
GRADIENT = {name for name, needs in NEEDS.items() if needs & {"gradients", "attention", "biases"}} | {"lift_cam", "opti_cam"}
CHANGES = {"ablation_cam", "recipro_cam"}
"""They put something in the layer's place."""
READ = sorted(set(NEEDS) - GRADIENT - CHANGES)


# ------------------------------------------------------------------------------------------------------------- static


@every_model
def test_the_output_is_the_models(kind):
    make, layer, _ = MODELS[kind]
    model, x = make(), image()
    expected = model(x)
    found = camfn.pure(model)(camfn.state_of(model), x)
    assert found.dtype == expected.dtype
    assert torch.equal(found.dequantize(), expected.dequantize())
    tapped = camfn.tap(model, layer)(camfn.state_of(model), x)
    assert torch.equal(tapped.output.dequantize(), expected.dequantize())
    assert tapped.seen.dtype == torch.float32
    assert torch.equal(tapped.seen, seen_by_a_hook(model, layer, x))


@every_model
def test_what_reads_the_layer_is_what_hooks_give(kind):
    make, layer, fc = MODELS[kind]
    model, x = make(), image()
    a = seen_by_a_hook(model, layer, x)
    close(run("mean_cam", model, layer, x), a.mean(1))
    weight = model.get_submodule(fc).weight().dequantize().flatten(1)
    close(run("cam", model, layer, x, fc=fc), torch.einsum("c,nchw->nhw", weight[1], a))
    found = run("eigen_cam", model, layer, x)
    for rows, one in zip(a.flatten(2).mT, found.flatten(1)):
        expected = rows @ torch.linalg.svd(rows)[2][0]
        close(one.abs(), expected.abs())


@every_model
def test_score_cam_is_a_loop(kind):
    make, layer, _ = MODELS[kind]
    model, x = make(), image()
    maps = []
    for one, a in zip(x, seen_by_a_hook(model, layer, x)):
        masks = ((a - a.amin((1, 2), True)) / (a.amax((1, 2), True) - a.amin((1, 2), True) + 1e-8))[:, None]
        masked = one * F.interpolate(masks, one.shape[1:], mode="bilinear")
        scores = torch.stack([model(row[None]).dequantize()[0, 1] for row in masked])
        maps.append(torch.einsum("c,chw->hw", scores.softmax(0), a))
    for options in ({}, {"sweep": camfn.Sweep(chunk=3)}, {"sweep": camfn.Sweep(fold=False)}):
        close(run("score_cam", model, layer, x, **options), torch.stack(maps))


@pytest.mark.parametrize("method", camfn.METHODS)
@every_model
def test_every_method(kind, method):
    make, layer, fc = MODELS[kind]
    model, x = make(), image()
    options = {"fc": fc} if method == "cam" else {}
    if method in READ:
        twin = opened(model, layer)
        assert torch.equal(twin(x).dequantize(), model(x).dequantize())
        close(run(method, model, layer, x, **options), run(method, twin, f"{layer}.floats", x, **options))
        return
    said = r"the model is quanti[sz]ed \('" if method in GRADIENT else rf"layer '{layer}' is quanti[sz]ed \(it returns"
    with pytest.raises(CamError, match=rf"(?s){said}.*camfn\.(score_cam|mean_cam)"):
        run(method, model, layer, x, **options)


@every_model
@pytest.mark.parametrize("method", sorted(CHANGES))
def test_what_changes_a_layer_does_so_where_it_gives_floats(kind, method):
    """The way out of the sentence: and then the change is what a hook makes."""
    make, layer, _ = MODELS[kind]
    model, x = opened(make(), layer), image()
    if method == "recipro_cam":
        assert run(method, model, f"{layer}.floats", x).isfinite().all()
        return
    a = hooked(model, f"{layer}.floats", x)
    clean = model(x).dequantize()[:, 1]
    weights = []
    for channel in range(a.shape[1]):

        def zeroed(module: nn.Module, args: tuple[Tensor], out: Tensor, channel: int = channel) -> Tensor:
            return out.index_fill(1, torch.tensor([channel]), 0)

        handle = model.get_submodule(f"{layer}.floats").register_forward_hook(zeroed)
        weights.append((clean - model(x).dequantize()[:, 1]) / clean.abs())
        handle.remove()
    close(run(method, model, f"{layer}.floats", x), torch.einsum("cn,nchw->nhw", torch.stack(weights), a))


@every_model
@pytest.mark.parametrize("port", ["nudge", "swap"])
def test_nothing_is_put_in_a_quantised_layers_place(kind, port):
    make, layer, _ = MODELS[kind]
    model, x = make(), image()
    state, value = camfn.state_of(model), torch.zeros_like(seen_by_a_hook(model, layer, x))
    said = rf"layer '{layer}' is quantized .*camfn.mean_cam"
    with pytest.raises(CamError, match=said):
        camfn.tap(model, layer)(state, x, **{port: value})
    with pytest.raises(CamError, match=said):
        camfn.head(model, layer, x, value)


def test_a_float_layer_before_the_quantised_ones():
    model, x = residual(), image()
    assert camfn.tap(model, "stem")(camfn.state_of(model), x).seen.shape == (2, 8, 10, 10)
    for method in CHANGES:  # as a loop, since no record can be made
        assert run(method, model, "stem", x).isfinite().all()
    with pytest.raises(CamError, match=r"the model is quanti[sz]ed"):
        camfn.grad_cam(model, "stem", x, 1)


def test_the_layer_is_chosen_as_in_floats():
    x = image()
    for before, after in ((floats(), static()), (Residual().eval(), residual())):
        chosen = [[(c.name, c.grid) for c in camfn.candidate_layers(m, x) if c.chosen] for m in (before, after)]
        assert chosen[0] == chosen[1] != []
        camfn.mean_cam(after, None, x)


def test_of_a_target_of_every_kind():
    x, T = image(), camfn.targets
    model = residual()  # its output is quantised
    wrapped = nn.Sequential(model, torch.ao.nn.quantized.DeQuantize())
    for target in (None, 2, "all", T.probability(1), T.top(2), T.logit(1) - T.logit(0), torch.tensor([0, 3])):
        close(camfn.score_cam(model, "act", x, target), camfn.score_cam(wrapped, "0.act", x, target))


def test_transforms():
    model, x = static(), image()
    mapped = torch.func.vmap(lambda one: camfn.mean_cam(model, "2", one[None])[0])(x)
    close(mapped, camfn.mean_cam(model, "2", x))
    for transform in (lambda f: torch.func.grad(lambda x: f(x).sum())(x), lambda f: torch.func.jvp(f, (x,), (x,))):
        for method in ("mean_cam", "score_cam"):  # a gradient of the map: torch would give zeros
            with pytest.raises(CamError, match=r"is quanti[sz]ed .*(no gradient|differentiated)"):
                transform(lambda x, method=method: getattr(camfn, method)(model, "2", x))


def test_explain_and_prepare():
    model, x = static(), image()
    prepared = camfn.prepare(model)
    close(camfn.explain(prepared, "2", x, 1, method="score_cam").maps, camfn.score_cam(model, "2", x, 1))
    assert camfn.explain(model, "2", x, 1, method="eigen_cam").maps.shape == (2, 5, 5)


def test_a_float_that_meets_integers_is_a_sentence():
    """As where QuantStub was forgotten."""
    model = static()
    model[0] = nn.Identity()
    for call in (lambda: camfn.mean_cam(model, "2", image()), lambda: camfn.pure(model)({}, image())):
        with pytest.raises(CamError, match=r"the model is quantized \('1', '5', '6'\).*QuantStub"):
            call()


def test_another_dtype():
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(CamError, match=rf"x is {dtype}.*x\.to\(torch\.float32\)"):
            camfn.mean_cam(static(), "2", image().to(dtype))


def test_a_missing_batch_axis():
    with pytest.raises(CamError, match="is the batch axis missing"):
        camfn.mean_cam(static(), "2", image()[0])


# ------------------------------------------------------------------------------------------------------------ dynamic


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(model, {nn.Linear})


def narrow() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return dynamic(nn.Sequential(*body).eval())


@pytest.mark.parametrize("method", camfn.METHODS)
def test_every_method_on_dynamic_layers(method):
    model, x = narrow(), image(1)
    if method in GRADIENT:
        with pytest.raises(CamError, match=r"the model is quanti[sz]ed \('4'\), and no gradient comes.*camfn\.score_cam"):
            run(method, model, "1", x)
        return
    # The scale is one for the whole batch: inputs go one by one.
    options = {"sweep": camfn.Sweep(chunk=1)} if "masked inputs" in NEEDS[method] else {}
    options |= {"fc": "4"} if method == "cam" else {}
    found = run(method, model, "1", x, **options)

    class Float(nn.Module):
        """The same function, one row at a time, without a quantised layer in the tree."""

        def __init__(self):
            super().__init__()
            self.body, self.held = model[:4], [Hidden(model[4])]
            self.fc = nn.Linear(8, 4)
            self.fc.weight.data = model[4].weight().dequantize()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.held[0](row) for row in self.body(x).split(1)])

    options |= {"fc": "fc"} if method == "cam" else {}
    close(found, run(method, Float(), "body.1", x, **options))


class Hidden:
    """Not a module, and not looked into."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_head_with_dynamic_layers():
    model, x = narrow(), image()
    output, seen = camfn.tap(model, "1")(camfn.state_of(model), x)
    head = camfn.head(model, "1", x, torch.zeros_like(seen))
    close(head(camfn.state_of(model), x, seen), output)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Block(), Block()), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


def test_a_transformer_of_dynamic_layers():
    model, x = dynamic(Transformer().eval()), image()
    for method in (name for name, needs in NEEDS.items() if "attention" in needs):
        with pytest.raises(CamError, match=r"the model is quanti[sz]ed \('blocks\.0\.qkv'"):
            run(method, model, None, x)
    rows = torch.eye(9).expand(2, 9, 9)
    for layer in ("blocks.0.qkv", "blocks.1.qkv"):
        q, k, _ = hooked(model, layer, x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / 2).softmax(-1).mean(1) + torch.eye(9)
        rows = mixed / mixed.sum(-1, keepdim=True) @ rows
    found = run("attention_rollout", model, None, x, query=4)  # which token is read has to be said: no gradient tells
    close(found.flatten(1), rows[:, 4])


# --------------------------------------------------------------------------------------------------------- by functions


class Rounded(nn.Module):
    """Quantises in its forward: no layer tells."""

    def __init__(self, straight: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.straight = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), straight

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        rounded = torch.quantize_per_tensor(y, 0.05, 0, torch.quint8).dequantize()
        return self.fc((y + (rounded - y).detach() if self.straight else rounded).mean((2, 3)))


@pytest.mark.parametrize("method", ["grad_cam", "full_grad", "opti_cam", "layer_cam", "shapley_cam"])
def test_a_gradient_that_rounding_cuts_is_no_map_of_zeros(method):
    with pytest.raises(CamError, match=r"no gradient reaches .*quantizes \(quantize_per_tensor\).*camfn\.score_cam"):
        run(method, Rounded(), "conv", image())


def test_a_straight_through_estimator_has_a_gradient():
    model, x = Rounded(straight=True), image()
    kept: list[Tensor] = []
    handle = model.conv.register_forward_hook(lambda module, args, out: kept.append(out))
    score = model(x)[:, 1].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(score, kept)
    expected = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach()
    close(camfn.grad_cam(model, "conv", x, 1, relu=False, normalize=False), expected)


def test_a_score_without_a_slope_does_not_blame_the_model():
    model, x = floats()[1:6], image()
    with pytest.raises(CamError, match=r"the graph ends in the target, where gt gives torch\.bool"):
        camfn.grad_cam(model, "1", x, lambda y: (y > 0).sum().float())
