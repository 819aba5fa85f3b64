"""Models that are wrapped, frozen, parametrised, narrow or quantised are explained as what they compute."""

import copy
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import Dataset

import camfn
from camfn import CamError, _compat
from tests.oracles.closeness import assert_close, close
from tests.oracles.exceptions import unless, why
from tests.oracles.networks import CHEAP, SmallNet, inputs, small_net

# Where no group of channels adds to the blurred input, Group-CAM's map is flat.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning")

AT_A_LAYER = [name for name, row in camfn.METHODS.items() if "activations" in row.needs]
GRADIENT = [name for name in AT_A_LAYER if "gradients" in camfn.METHODS[name].needs]
every_method = pytest.mark.parametrize("method", AT_A_LAYER)


def raw(method: str, model: nn.Module, layer, x, target=1, **options) -> Tensor:
    options = {"relu": False, "normalize": False, **CHEAP.get(method, {}), **options}
    return camfn.METHODS[method].function(model, layer, x, target, **options)


# ---------------------------------------------------------------------------------------------------------- wrappers


class Samples(Dataset):
    """A list that may be long."""

    def __init__(self):
        self.samples = [Entry()]

    def __len__(self):
        return len(self.samples)


class Entry:
    def __init__(self):
        self.image = "1.png"


class Trained(SmallNet):
    """As a Lightning module after its training: attached to a trainer, which leads back to it and to its data."""

    def __init__(self, base: SmallNet):
        nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in base.__dict__.items() if key != "training"})
        self.training = True
        trainer = type("Trainer", (), {"__module__": "lightning.pytorch.trainer.trainer"})()
        trainer.model, trainer.lock, trainer.data, trainer.logged = self, threading.Lock(), Samples(), []
        self._trainer, self.loop = trainer, Loop(trainer, Samples())
        self.save_for_later = {"lr": 0.1, "trainer": trainer}

    @property
    def trainer(self):
        return self._trainer

    def forward(self, x):
        assert self.loop.data.samples[0] is ENTRIES[0], "data were copied"
        assert self.trainer is ENTRIES[1]
        return super().forward(x)


class Loop:
    """An object of the user's own, which is copied, with what is not."""

    def __init__(self, trainer, data):
        self.trainer, self.data = trainer, data


ENTRIES: list = []


def trained(base: SmallNet) -> Trained:
    model = Trained(base)
    ENTRIES[:] = [model.loop.data.samples[0], model._trainer]
    return model


@pytest.fixture
def group():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no process groups on the CPU")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    if _compat.can_compile():
        pytest.skip("this torch has no compiled modules to wrap")
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    compiled(model)
    model.compile(backend="eager")
    return model


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def inner_compiled(model: SmallNet) -> SmallNet:
    model.stem = compiled(model.stem)
    return model


WRAPS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "a part compiled": inner_compiled,
    "parallel": nn.DataParallel,
    "parallel, compiled": lambda model: compiled(nn.DataParallel(model)),
    "frozen": frozen,
    "lightning": trained,
}


@every_method
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_has_the_maps_of_what_is_inside(method, wrap):
    x, model = inputs(), small_net()
    expected = raw(method, small_net(), ("stem.0", "features") if method != "cam" else "features", x)
    outer = WRAPS[wrap](model)
    ours = raw(method, outer, ("stem.0", "features") if method != "cam" else "features", x)
    for one, other in zip(ours, expected):
        assert_close(one, other, 0)
    inner = model.features if wrap != "lightning" else outer.features
    for layer in (inner, "module.features", "_orig_mod.module.features"):
        assert_close(raw(method, outer, layer, x), raw(method, small_net(), "features", x), 0)
    assert float(raw(method, outer, inner, x).abs().max()) > 0


def test_a_distributed_model(group):
    x, model = inputs(), small_net().train()
    outer = nn.parallel.DistributedDataParallel(model)
    for method in AT_A_LAYER:
        assert_close(raw(method, outer, "features", x), raw(method, small_net(), "features", x), 0)
    assert all(p.grad is None for p in outer.parameters())


def test_a_frozen_model_where_no_gradients_are_recorded():
    x = inputs()
    for method in AT_A_LAYER:
        expected = raw(method, small_net(), "features", x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                close(raw(method, frozen(small_net()), "features", x.clone()), expected)


def test_scripted_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(small_net().eval()), torch.jit.trace(small_net().eval(), inputs())
    for model in (scripted, traced):
        with pytest.raises(CamError, match="is scripted or traced: camfn needs Python modules"):
            camfn.grad_cam(model, "features", inputs(), 1)


# ---------------------------------------------------------------------------------------------------- parametrisations


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)


PARAMETRISED = {
    "symmetric": lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
    **({"weight norm": parametrizations.weight_norm} if hasattr(parametrizations, "weight_norm") else {}),  # torch 2.1
    "spectral norm": parametrizations.spectral_norm,
}


def parametrised(kind: str) -> SmallNet:
    torch.manual_seed(0)  # a spectral norm begins anywhere
    model = small_net()
    for module in (model.stem[0], model.features, model.fc):
        PARAMETRISED[kind](module)
    return model.eval()


@every_method
@pytest.mark.parametrize("kind", PARAMETRISED)
def test_parametrised_weights_are_what_they_make(method, kind):
    model, plain = parametrised(kind), parametrised(kind)
    for module in (plain.stem[0], plain.features, plain.fc):
        parametrize.remove_parametrizations(module, "weight")
    x = inputs()
    expected = raw(method, plain, "features", x)
    model.train()  # where a spectral norm would move
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    close(raw(method, model, "features", x), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_cam_reads_the_rows_of_a_weight_norm_of_old_torch_and_of_a_convolution():
    model, x = small_net(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.fc)
    close(raw("cam", model, "features", x), raw("cam", small_net(), "features", x))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()).double()
    expected = raw("cam", net, "0", x, fc="2")
    PARAMETRISED.get("weight norm", nn.utils.weight_norm)(net[2])
    close(raw("cam", net, "0", x, fc="2"), expected)


# -------------------------------------------------------------------------------------------------- narrow and autocast


def narrow(dtype: torch.dtype) -> SmallNet:
    try:
        small_net(dtype=dtype)(inputs(dtype=dtype))
    except RuntimeError:  # older torch has no float16 convolution on the CPU
        pytest.skip(f"this torch does not run {dtype} here")
    return small_net(dtype=dtype)


def one_channel_flat(model: SmallNet) -> SmallNet:
    with torch.no_grad():
        model.features.weight[0] = 0
        model.features.bias[0] = 0.5
    return model


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", ["features", "act"])
def test_narrow_models_have_the_map_of_the_wide_one_to_their_rounding(method, dtype, layer):
    with unless("a narrow dtype before the ReLU", method, layer == "features"):
        the_map_of_the_wide_one(method, dtype, layer)


def the_map_of_the_wide_one(method, dtype, layer):
    x = inputs(dtype=dtype)
    model = one_channel_flat(narrow(dtype))
    wide = copy.deepcopy(model).double()
    expected, ours = raw(method, wide, layer, x.double()), raw(method, model, layer, x)
    assert (expected.dtype, ours.dtype) == (torch.float64, torch.float32)
    assert float(expected.abs().max()) > 0
    # Opti-CAM divides slopes by their size, and rounds small ones as large ones; Group-CAM's weights are small differences.
    steps = 30 if method in ("opti_cam", "group_cam") else 10
    close(ours, expected, units=steps, dtype=dtype)


def in_autocast(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and gradient by a plain hook, of a forward under autocast."""
    kept: list[Tensor] = []
    handle = model.features.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)[:, 1]
    handle.remove()
    (gradient,) = torch.autograd.grad(scores.float().sum(), kept[0])
    return kept[0].detach().float(), gradient.float()


def test_under_autocast_the_model_is_narrow_and_the_map_is_not():
    model, x = small_net(dtype=torch.float32).eval(), inputs(dtype=torch.float32)
    a, g = in_autocast(model, x)
    expected = torch.einsum("nc,nchw->nhw", g.mean((2, 3)), a)
    wide = raw("grad_cam", model, "features", x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = raw("grad_cam", model, "features", x)
        assert _compat.narrowing() == (("cpu", torch.bfloat16),)
        assert model(x).dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    assert_close(ours, expected, 1e-6 * float(expected.abs().max()))
    assert float((ours - wide).abs().max()) > 1e-4 * float(wide.abs().max()), "the model did not run under autocast"


@every_method
def test_every_method_under_autocast(method):
    model, x = small_net(dtype=torch.float32), inputs(dtype=torch.float32)
    layer = "act" if why("a narrow dtype before the ReLU", method) else "features"
    expected = raw(method, model, layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = raw(method, model, layer, x)
        card = camfn.explain(model, layer, x, 1, method=method, **CHEAP.get(method, {}))
    assert ours.dtype == card.maps.dtype == torch.float32
    difference = float((ours - expected).abs().max()) / float(expected.abs().max())
    assert 1e-5 < difference < 0.1
    assert_close(raw(method, model, layer, x), expected, 0, "nothing narrow is kept")


def test_a_head_of_an_autocast_is_another():
    model, x = small_net(dtype=torch.float32), inputs(dtype=torch.float32)
    state = camfn.state_of(model)
    seen = camfn.tap(model, "features")(state, x).seen
    with torch.autocast("cpu", torch.bfloat16):
        narrow = camfn.head(model, "features", x, seen)(state, x, seen)
        assert_close(narrow, camfn.tap(model, "features")(state, x, None, seen).output, 0)
    wide = camfn.head(model, "features", x, seen)(state, x, seen)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert_close(wide, model.eval()(x).detach(), 0)


def test_a_model_that_narrows_itself():
    class Itself(SmallNet):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model, x = small_net(dtype=torch.float32), inputs(dtype=torch.float32)
    itself = copy.deepcopy(model)
    itself.__class__ = Itself
    with torch.autocast("cpu", torch.bfloat16):
        expected = raw("grad_cam", model, "features", x)
    assert_close(raw("grad_cam", itself, "features", x), expected, 0)


# ----------------------------------------------------------------------------------------------------------- quantised


def quantised(dtype: torch.dtype = torch.qint8) -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(small_net(dtype=torch.float32).eval(), {nn.Linear}, dtype=dtype)


def by_a_loop(model: nn.Module, x: Tensor, target: int) -> Tensor:
    model, seen = copy.deepcopy(model), []
    handle = model.features.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(x)
        handle.remove()
        maps = []
        for image, a in zip(x, seen[0]):
            masks = [(m - m.min()) / (m.max() - m.min() + 1e-8) for m in a]
            masks = [nn.functional.interpolate(m[None, None], image.shape[1:], mode="bilinear")[0, 0] for m in masks]
            # One by one: the integers' scale is one for all of a batch.
            scores = torch.stack([model((image * mask)[None])[0, target] for mask in masks])
            maps.append(torch.einsum("c,chw->hw", scores.softmax(0), a))
    return torch.stack(maps)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_score_cam_of_a_quantised_model_is_that_of_a_loop(dtype):
    model, x = quantised(dtype), inputs(1, dtype=torch.float32)
    expected = by_a_loop(model, x, 1)
    alone = camfn.Sweep(fold=False) if dtype == torch.qint8 else camfn.Sweep()
    assert_close(raw("score_cam", model, "features", x, sweep=alone), expected, 1e-5 * float(expected.abs().max()))
    if dtype == torch.qint8:
        with pytest.warns(camfn.CamWarning, match="depends on the others of its batch"):
            assert_close(raw("score_cam", model, "features", x), expected, 1e-5 * float(expected.abs().max()))


def test_cam_of_a_quantised_model_weighs_by_its_rows():
    model, x = quantised(), inputs(dtype=torch.float32)
    a = camfn.tap(model, "features")(camfn.state_of(model), x).seen
    expected = torch.einsum("c,nchw->nhw", model.fc.weight().dequantize()[1], a)
    assert_close(raw("cam", model, "features", x), expected, 1e-5 * float(expected.abs().max()))
    float_rows = torch.einsum("c,nchw->nhw", small_net(dtype=torch.float32).fc.weight[1].detach(), a)
    assert float((expected - float_rows).abs().max()) > 1e-3 * float(expected.abs().max())


@every_method
def test_a_quantised_model_has_maps_but_no_gradients(method):
    model, x = quantised(), inputs(dtype=torch.float32)
    if method in GRADIENT:
        with pytest.raises(CamError, match=r"the model is quanti[sz]ed \('fc'.*no gradient .* a method without gradients"):
            raw(method, model, "features", x)
        return
    expected = raw(method, small_net(dtype=torch.float32), "features", x)
    alone = {"sweep": camfn.Sweep(fold=False)} if "masked inputs" in camfn.METHODS[method].needs else {}
    assert_close(raw(method, model, "features", x, **alone), expected, 0.05 * float(expected.abs().max()))
    assert [layer.name for layer in camfn.candidate_layers(model, x) if layer.chosen] == ["act"]
