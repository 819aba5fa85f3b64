"""The tap: read, nudge and swap at a layer of any model, against plain hooks on a copy of it."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import camfn
from camfn import CamError
from tests.oracles.closeness import assert_close, close
from tests.oracles.libraries import torchvision_models
from tests.oracles.networks import SmallNet, inputs, small_net


def hooked(model: nn.Module, layer: str, x, nudge: Tensor | None = None, swap: Tensor | None = None):
    """The oracle: output and activation by a forward hook on a deep copy in eval mode."""
    twin, seen = copy.deepcopy(model).eval(), []

    def hook(module, args, out):
        out = out if swap is None else swap
        seen.append(out.detach().clone())
        return (out + nudge) if nudge is not None else out.clone()

    twin.get_submodule(layer).register_forward_hook(hook)
    with torch.set_grad_enabled(nudge is not None):
        return twin(x), seen[0]


def check_tap(model: nn.Module, layer: str, x: Tensor, exact: bool = True) -> None:
    """All three ports agree with hooks: the value seen, the gradient at a zero nudge, the output after a swap."""
    f, state = camfn.tap(model, layer), camfn.state_of(model)
    with torch.no_grad():
        output, seen = f(state, x)
        expected, activation = hooked(model, layer, x)
        swapped = f(state, x, None, 2 * seen).output
        assert_close(swapped, hooked(model, layer, x, swap=2 * seen)[0], 0 if exact else 1e-6, "swap")
    assert_close(output, expected, 0 if exact else 1e-6, "output")
    assert_close(seen, activation, 0 if exact else 1e-6, "seen")
    zero = torch.zeros_like(seen)
    ours = grad(lambda nudge: f(state, x, nudge).output.square().sum())(zero)
    nudge = zero.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(hooked(model, layer, x, nudge)[0].square().sum(), nudge)
    assert_close(ours, theirs, 1e-10 * float(theirs.abs().max()) if exact else 1e-4 * float(theirs.abs().max()), "gradient")
    assert float(theirs.abs().max()) > 0


@pytest.mark.parametrize("layer", ["stem", "stem.0", "features", "act", "pool", "fc"])
@pytest.mark.parametrize("inplace", [False, True])
def test_ports_agree_with_hooks(layer, inplace):
    # In train mode, with batch norm and dropout: a tap explains the eval model.
    check_tap(small_net(inplace=inplace).train(), layer, inputs())


def test_value_is_safe_from_in_place_layer_after_it():
    model, x = small_net(inplace=True), inputs()
    seen = camfn.tap(model, "features")(camfn.state_of(model), x).seen
    assert_close(seen, camfn.tap(small_net(inplace=False), "features")(camfn.state_of(model), x).seen, 0)
    assert (seen < 0).any()


class Aliasing(nn.Module):
    """Its Identity returns the tensor that an in-place ReLU writes to afterwards."""

    def __init__(self):
        super().__init__()
        self.conv, self.same, self.act, self.fc = nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        z = self.conv(x)
        same = self.same(z)
        return self.fc((self.act(z) + same).mean((2, 3)))


def test_a_layer_that_returns_its_input_changes_nothing():
    torch.manual_seed(0)
    model, x = Aliasing().double(), inputs()
    output, seen = camfn.tap(model, "same")(camfn.state_of(model), x)
    assert_close(output, model(x).detach(), 0)
    assert_close(seen, model.conv(x).detach(), 0)


def test_several_layers_at_once():
    model, x = small_net(), inputs()
    f, state = camfn.tap(model, ("stem", "features")), camfn.state_of(model)
    seen = f(state, x).seen
    for layer, value in zip(("stem", "features"), seen):
        assert_close(value, hooked(model, layer, x)[1], 0)
    both = f(state, x, None, (seen[0] * 2, seen[1] * 3)).output
    assert_close(both, hooked(model, "features", x, swap=seen[1] * 3)[0], 0)


@pytest.mark.parametrize(
    ("name", "layer", "side", "share"),
    [
        ("resnet18", "layer4", 64, 0.05),
        ("resnet18", "layer2.0.downsample", 64, 1.0),  # the block's other branch still needs the front
        ("vgg11_bn", "features.27", 64, 0.3),
        ("densenet121", "features.denseblock2", 64, 0.7),
        ("mobilenet_v2", "features.18", 64, 0.05),
        ("mobilenet_v3_small", "features.12", 64, 0.1),
        ("vit_b_32", "encoder.layers.encoder_layer_10", 224, 0.15),
    ],
)
def test_torchvision(name, layer, side, share):
    models = torchvision_models()
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10).train()
    x = inputs(2, side=side, dtype=torch.float32)
    f, state = camfn.tap(model, layer), camfn.state_of(model)
    with torch.no_grad():
        output, seen = f(state, x)
        expected, activation = hooked(model, layer, x)
        h = camfn.head(model, layer, x, seen)
        # The oracle's attention is fused, ours is written out: rounding, relative to the size of the values.
        assert_close(output, expected, 1e-5 * float(expected.abs().max()), "output")
        assert_close(seen, activation, 1e-5 * float(activation.abs().max()), "seen")
        assert_close(h(state, x, seen), output, 0, "the head on the value as captured")
        other = seen + 0.5
        full = f(state, x, None, other).output
        assert_close(h(state, x, other), full, 1e-5 * float(full.abs().max()), "the head on another value")
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    whole = camfn.head(model, first, x, camfn.tap(model, first)(state, x).seen)
    left, of = operations(h), operations(whole)
    assert len(left) <= share * len(of), f"{len(left)} operations of {len(of)}: is the front gone?"


def operations(head) -> list[str]:
    return [str(operation.target) for part in head.record[:2] for operation in part.operations]


def test_head_of_a_pooled_network_is_its_last_operations():
    torch.manual_seed(0)
    model, x = torchvision_models().resnet18().eval(), inputs(2, side=64, dtype=torch.float32)
    state = camfn.state_of(model)
    seen = camfn.tap(model, "layer4")(state, x).seen
    names = operations(camfn.head(model, "layer4", x, seen))
    assert not any("convolution" in name or "batch_norm" in name for name in names), names
    assert len(names) <= 6


class TiedNet(nn.Module):
    """Two layers that hold one weight, and a module that is registered under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.again = self.out

    def forward(self, x):
        return self.again(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_weights_and_a_module_under_two_names():
    torch.manual_seed(0)
    model, x = TiedNet().double(), torch.randn(2, 4, dtype=torch.float64)
    state = camfn.state_of(model)
    assert set(state) == {"a.weight", "a.bias", "b.bias", "out.weight", "out.bias"}
    f = camfn.pure(model)
    changed = {name: tensor * 2 for name, tensor in state.items()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in {id(p): p for p in twin.parameters()}.values():
            tensor.mul_(2)
    for _ in range(2):  # functional_call restores a module of two names wrongly: the second call must be right, too
        assert_close(f(changed, x), twin(x), 0)
        assert_close(f(state, x), model(x), 0)
    check_tap(model, "a", x)
    for layer in ("out", "again"):
        check_tap(model, layer, x)
    gradient = grad(lambda s: f(s, x).sum())(state)["a.weight"]
    loss = model(x).sum()
    close(gradient, torch.autograd.grad(loss, model.a.weight)[0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.body(torch.relu(self.body(x)))


def test_a_tap_has_one_port_at_a_layer():
    model = small_net()
    with pytest.raises(CamError, match="a layer is named twice: 'features', 'features'"):
        camfn.tap(model, ("features", model.features))


def test_layer_that_runs_twice_or_never():
    model, x = Twice(), torch.randn(2, 3)
    state = camfn.state_of(model)
    with pytest.raises(CamError, match="'body' runs more than once"):
        camfn.tap(model, "body")(state, x)
    with pytest.raises(CamError, match="'unused' did not run"):
        camfn.tap(model, "unused")(state, x)


class Pair(nn.Module):
    def __init__(self, parts: int):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return tuple(x + i for i in range(self.parts))


def test_layer_that_returns_a_tuple():
    x = torch.randn(2, 3)
    two = nn.Sequential(nn.Linear(3, 3), Pair(2))
    with pytest.raises(CamError, match=r"'1' returns a tuple of 0: Tensor\(2, 3\), 1: Tensor\(2, 3\), not one tensor"):
        camfn.tap(two, "1")(camfn.state_of(two), x)
    one = nn.Sequential(nn.Linear(3, 3), Pair(1))  # `(hidden,)`, as transformers' blocks return it
    output, seen = camfn.tap(one, "1")(camfn.state_of(one), x)
    assert isinstance(output, tuple)
    assert_close(output[0], seen, 0)
    swapped = camfn.tap(one, "1")(camfn.state_of(one), x, None, seen * 2)
    assert_close(swapped.output[0], seen * 2, 0)


class Holder:
    """An object that is no module and holds one."""

    def __init__(self, module):
        self.module = module

    def run(self, x):
        return self.module(x)


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module

    def run(self, x):
        return self.module(x)


class Hidden(nn.Module):
    """Reaches a batch norm by a way that `modules()` does not know."""

    def __init__(self, way: str):
        super().__init__()
        self.features, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        ways = {
            "list": lambda: [norm],
            "dict": lambda: {"norm": norm},
            "tuple": lambda: (norm, 1),
            "object": lambda: Holder(norm).run,
            "slots": lambda: Slotted(norm),
            "method": lambda: norm.forward,
            "partial": lambda: functools.partial(nn.BatchNorm2d.__call__, norm),
            "closure": lambda: lambda x: norm(x),
            "default": lambda: lambda x, norm=norm: norm(x),
            "nested": lambda: {"deep": [Holder([norm])]},
            "weakref": lambda: weakref.ref(norm),
        }
        self.way, self.held, self.norm_of = way, ways[way](), [norm]
        if way != "list":
            self.norm_of = None
            object.__setattr__(self, "_keep", (norm,))

    def norm(self, x):
        if self.way in ("list", "tuple"):
            return self.held[0](x)
        if self.way == "dict":
            return self.held["norm"](x)
        if self.way == "slots":
            return self.held.run(x)
        if self.way == "nested":
            return self.held["deep"][0].module[0](x)
        if self.way == "weakref":
            return self.held()(x)
        return self.held(x)

    def forward(self, x):
        return self.norm(self.features(x)).mean((2, 3))


@pytest.mark.parametrize(
    "way", ["list", "dict", "tuple", "object", "slots", "method", "partial", "closure", "default", "nested", "weakref"]
)
def test_modules_that_only_an_object_reaches_are_copied_and_in_eval_mode(way):
    torch.manual_seed(0)
    model, x = Hidden(way).double().train(), inputs()
    norm = model._keep[0] if way != "list" else model.held[0]
    norm.double()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    output = camfn.pure(model)(camfn.state_of(model), x)
    assert norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items()), "the caller's batch norm moved"
    y = model.features(x)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    expected = (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    close(output, expected.mean((2, 3)))


def test_layer_that_is_not_registered():
    model = Hidden("list")
    with pytest.raises(CamError, match=r"a BatchNorm2d, is not a registered submodule of Hidden .*nn.ModuleList registers"):
        camfn.tap(model, model.held[0])


class Bumping(nn.Module):
    """Counts its calls in a buffer, an attribute, a list and a plain tensor, and adds the counts to its output."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 2, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)
        self.plain, self.count, self.log = torch.zeros(()), 0, []

    def forward(self, x):
        self.calls += 1
        self.hidden.add_(1)
        self.plain.add_(1)
        self.count += 1
        self.log.append(1)
        counted = self.calls + self.hidden + self.plain + self.count + len(self.log)
        return self.features(x).mean((2, 3)) + counted


def test_buffer_bumped_in_eval():
    model, x = Bumping(), inputs(dtype=torch.float32)
    state = camfn.state_of(model)
    f = camfn.tap(model, "features")
    first = f(state, x).output
    assert (float(model.calls), float(model.hidden), float(model.plain), model.count, model.log) == (0, 0, 0, 0, [])
    assert float(state["calls"]) == 0
    assert_close(first, model(x), 1e-6)
    assert_close(camfn.tap(model, "features")(camfn.state_of(model), x).output, model(x), 1e-6)


def test_state_dict_lacks_non_persistent_buffers_and_that_is_fine():
    model, x = Bumping(), inputs(dtype=torch.float32)
    assert "hidden" not in model.state_dict()
    assert_close(camfn.pure(model)(model.state_dict(), x), camfn.pure(model)(camfn.state_of(model), x), 0)


class Attending(nn.Module):
    def __init__(self, need_weights: bool = False):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(8, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("layer", ["layers.0.linear1", "layers.0.norm1", "layers.1.linear2", "layers.1"])
def test_inside_a_transformer_encoder(layer):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).double().train()
    x, direction = torch.randn(2, 2, 5, 8, dtype=torch.float64)  # the norm at the end makes a sum of squares constant
    f, state = camfn.tap(model, layer), camfn.state_of(model)
    output, seen = f(state, x)  # the fused path would call no child: nothing seen, a gradient of zero
    close(output, copy.deepcopy(model).eval()(x))

    def score(nudge: Tensor) -> Tensor:
        return (f(state, x, nudge).output * direction).sum()

    gradient = grad(score)(torch.zeros_like(seen))
    step = 1e-4 * gradient / gradient.norm()
    assert float((score(step) - score(-step)) / 2e-4) == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_at_multihead_attention():
    torch.manual_seed(0)
    model, x = Attending().train(), torch.randn(2, 5, 8)
    # It returns its output, and `None` for the weights.
    assert_close(
        camfn.tap(model, "attention")(camfn.state_of(model), x).seen, copy.deepcopy(model).eval().attention(x, x, x)[0], 1e-6
    )
    assert_close(camfn.pure(model)(camfn.state_of(model), x), copy.deepcopy(model).eval()(x), 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_on_the_instance_that_is_a_method_of_it_is_bound_to_the_copy(compiled):
    model, x = small_net(), inputs()
    expected = camfn.grad_cam(model, "features", x, 1)
    method = model.features.forward
    model.features.forward = torch.compile(method, backend="eager") if compiled else method
    moved = {name: 2 * tensor for name, tensor in camfn.state_of(model).items()}
    assert_close(camfn.grad_cam(model, "features", x, 1), expected, 0)
    other = small_net()
    other.load_state_dict(moved)
    assert_close(camfn.grad_cam(model, "features", x, 1, state=moved), camfn.grad_cam(other, "features", x, 1), 1e-12)


def test_forward_replaced_on_the_instance():
    model = small_net()
    method = model.features.forward
    model.features.forward = functools.update_wrapper(functools.partial(method), method)  # what accelerate does, in essence
    with pytest.raises(CamError, match=r"`forward` of Conv2d was replaced on the instance \(accelerate"):
        camfn.pure(model)


def test_hooks_of_the_caller_belong_to_the_model():
    model, x = small_net(), inputs()
    handles = [
        model.features.register_forward_hook(lambda module, args, out: out * 2),
        model.stem.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    ]
    twin = copy.deepcopy(model).eval()
    state = camfn.state_of(model)
    output, seen = camfn.tap(model, "features")(state, x)
    assert_close(output, twin(x), 0)
    assert_close(2 * seen, twin.features(twin.stem(x)), 0)  # what its `forward` returns: before its hook, which sees it
    for handle in handles:
        handle.remove()
    assert (camfn.pure(model)(state, x) - output).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm():
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x, state = inputs(), camfn.state_of(model)
    kept = model[0].weight
    f = camfn.tap(model, "0")
    close(f(state, x).output, model(x).detach())  # no batch norm in it: train mode is eval mode
    kept = model[0].weight
    close(f(state, x).output, model(x).detach())
    assert model[0].weight is not kept, "the caller's own forward makes the weight anew"
    kept = model[0].weight
    f(state, x)
    assert model[0].weight is kept, "ours must not"
    close(f({**state, "0.weight_g": state["0.weight_g"] * 3}, x).seen - model[0].bias[:, None, None],
                 3 * (f(state, x).seen - model[0].bias[:, None, None]))  # fmt: skip


def test_parametrised_weight():
    model = nn.Sequential(torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    check_tap(model, "0", torch.randn(3, 4, dtype=torch.float64))


def test_tap_under_transforms():
    model, x = small_net(), inputs(3)
    f, state = camfn.tap(model, "features"), camfn.state_of(model)
    output, seen = f(state, x)
    one_by_one = vmap(lambda image: f(state, image[None]).output[0])(x)
    close(one_by_one, output)
    zero = torch.zeros_like(seen[:1])
    per_image = vmap(lambda image: grad(lambda nudge: f(state, image[None], nudge).output.square().sum())(zero))(x)
    whole = grad(lambda nudge: f(state, x, nudge).output.square().sum())(torch.zeros_like(seen))
    close(per_image[:, 0], whole)
    with torch.inference_mode():
        assert_close(f(state, x).output, output, 0)
    with torch.no_grad():
        close(grad(lambda nudge: f(state, x, nudge).output.square().sum())(torch.zeros_like(seen)), whole)


def test_tap_compiles_as_one_graph():
    if not hasattr(torch, "compiler") or camfn._compat.can_compile():
        pytest.skip("this torch cannot compile functional_call")
    model, x = small_net(inplace=True), inputs()
    f, state = camfn.tap(model, "features"), camfn.state_of(model)
    output, seen = f(state, x)
    whole = torch.compile(f, fullgraph=True, backend="eager")(state, x)
    assert_close(whole.output, output, 0)
    assert_close(whole.seen, seen, 0)
    score = lambda nudge: f(state, x, nudge).output.square().sum()  # noqa: E731
    compiled = torch.compile(grad(score), fullgraph=True, backend="eager")(torch.zeros_like(seen))
    close(compiled, grad(score)(torch.zeros_like(seen)))


FRONT_CALLS = [0]


class CountedFront(SmallNet):
    def forward(self, x):
        FRONT_CALLS[0] += 1  # of this module's global: what a model holds itself is copied with it
        return super().forward(x)


class CountedStem(nn.Sequential):
    def forward(self, x):
        FRONT_CALLS.append(tuple(x.shape))
        return super().forward(x)


def test_vmap_over_swap_runs_the_front_once():
    model = small_net()
    model.stem = CountedStem(*model.stem)
    x, state = inputs(2), camfn.state_of(model)
    f = camfn.tap(model, "features")
    seen = f(state, x).seen
    swaps = torch.stack([seen, seen * 2, -seen, seen + 1])
    del FRONT_CALLS[1:]
    outputs = vmap(f, in_dims=(None, None, None, 0))(state, x, None, swaps).output
    assert FRONT_CALLS[1:] == [tuple(x.shape)]
    for swap, output in zip(swaps, outputs):
        close(output, hooked(model, "features", x, swap=swap)[0])


# ------------------------------------------------------------------------------- a tap lives for one call, a head longer


def head_output(model: nn.Module, x: Tensor) -> Tensor:
    state = camfn.state_of(model)
    seen = camfn.tap(model, "features")(state, x).seen
    return camfn.head(model, "features", x, seen)(state, x, seen)


def replace_act(model):
    model.act = nn.Tanh()


def reassign(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)


def load(model):
    model.load_state_dict(
        {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    )


def in_place(model):
    with torch.no_grad():
        model.fc.weight.mul_(2)


def retune(model):
    model.act = nn.LeakyReLU(0.5)
    head_output(model, inputs(dtype=model.fc.weight.dtype))
    model.act.negative_slope = 0.1  # the same class: only a setting differs


@pytest.mark.parametrize(
    "change", [replace_act, reassign, load, in_place, retune, lambda m: m.float(), lambda m: m.to(torch.float32)]
)
def test_a_changed_model_gives_the_new_result(change):
    model, x = small_net(), inputs()
    before = camfn.score_cam(model, "features", x, 1, normalize=False)
    assert_close(head_output(model, x), copy.deepcopy(model).eval()(x), 0)
    change(model)
    x = x.to(model.fc.weight.dtype)
    fresh = small_net()
    fresh.load_state_dict(model.state_dict())
    fresh.act = copy.deepcopy(model.act)
    fresh.to(model.fc.weight.dtype)
    assert_close(head_output(model, x), fresh.eval()(x), 0)
    after = camfn.score_cam(model, "features", x, 1, normalize=False)
    assert_close(after, camfn.score_cam(fresh, "features", x, 1, normalize=False), 0)
    assert not torch.equal(after.double(), before)


def test_a_head_is_recorded_anew_and_freed_with_the_model():
    model, x = small_net(), inputs()
    first = head_output(model, x)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert (head_output(model, x) - first).abs().max() > 1e-3
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_state_in_another_order_or_by_other_names_is_the_same_to_a_head():
    model, x = TiedNet().double(), torch.randn(2, 4, dtype=torch.float64)
    state = camfn.state_of(model)
    seen = camfn.tap(model, "a")(state, x).seen
    h = camfn.head(model, "a", x, seen)
    assert_close(h(dict(reversed(list(model.state_dict().items()))), x, seen), model(x).detach(), 0)


def test_head_composes():
    model, x = small_net(), inputs(2)
    state = camfn.state_of(model)
    seen = camfn.tap(model, "features")(state, x).seen
    h = camfn.head(model, "features", x, seen)
    full = lambda value: camfn.tap(model, "features")(state, x, None, value).output.square().sum()  # noqa: E731
    close(grad(lambda value: h(state, x, value).square().sum())(seen), grad(full)(seen))
    swaps = torch.stack([seen, seen * 2])
    close(vmap(lambda value: h(state, x, value))(swaps)[1], h(state, x, swaps[1]))


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "inner"])
def test_wrappers_are_looked_into(wrap):
    if wrap != "parallel" and camfn._compat.can_compile():
        pytest.skip("this torch has no compiled modules to wrap")
    model, x = small_net(), inputs()
    expected = camfn.tap(model, "features")(camfn.state_of(model), x)
    if wrap == "inner":
        outer = copy.deepcopy(model)
        outer.stem = torch.compile(outer.stem, backend="eager")
    else:
        outer = nn.DataParallel(model) if wrap == "parallel" else torch.compile(model, backend="eager")
    state = camfn.state_of(outer)
    assert set(state) == set(camfn.state_of(model))
    for layer in ("features", "module.features", "_orig_mod.features"):
        output, seen = camfn.tap(outer, layer)(outer.state_dict(), x)
        assert_close(output, expected.output, 0)
        assert_close(seen, expected.seen, 0)
    assert not any(name.startswith("_camfn") for module in model.modules() for name in vars(module))


def test_a_module_behind_a_weak_proxy_is_never_the_callers():
    class Inner(nn.Module):
        def forward(self, x):
            return self.up.norm(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm2d(3), Inner()
            object.__setattr__(self.inner, "up", weakref.proxy(self))

        def forward(self, x):
            return self.inner(x)

    model = Outer().train()
    before = model.norm.running_mean.clone()
    with contextlib.suppress(TypeError):  # such a model cannot be copied
        camfn.pure(model)(camfn.state_of(model), torch.randn(2, 3, 4, 4))
    assert torch.equal(model.norm.running_mean, before)
