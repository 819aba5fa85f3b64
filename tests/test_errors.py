"""Every error says what was asked, what was found and what to do: the words are tested, since the words are the feature.

`says` takes the parts of a message that carry information, in their order; what stands between them is free.
"""

import functools
import itertools
import re
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camfn
from tests.oracles.closeness import close
from tests.oracles.networks import LAYERED, inputs, small_net

T = camfn.targets


def says(*parts: str):
    """The one exception of camfn, with these words in this order."""
    return pytest.raises(camfn.CamError, match="(?s)" + ".*".join(map(re.escape, parts)))


def explain(net=None, layer="features", x=None, target=1, method="score_cam", **options):
    net, x = small_net() if net is None else net, inputs() if x is None else x
    row = camfn.METHODS[method]
    return row.function(net, layer if row.of_layer else None, x, target, **options)


def test_the_exception_is_a_value_error():
    assert issubclass(camfn.CamError, ValueError)
    with pytest.raises(ValueError, match="no layer named"):
        explain(layer="nowhere")


# ------------------------------------------------------------------------------------------------------------ layers


def test_the_model_itself_is_not_a_layer_without_a_name():
    net = small_net()
    for layer in (net, ""):
        with pytest.raises(camfn.CamError, match=r"(?s)(the model itself|SmallNet).*\(2, 5\)"):
            explain(net, layer=layer)


class Parts(nn.Module):
    """A layer that returns what it is told to."""

    def __init__(self, pack):
        super().__init__()
        self.conv, self.pack = nn.Conv2d(3, 3, 3), pack

    def forward(self, x):
        return self.pack(self.conv(x))


class OfParts(nn.Module):
    def __init__(self, pack, unpack=lambda out: out[0]):
        super().__init__()
        self.layer, self.unpack, self.fc = Parts(pack), unpack, nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(self.unpack(self.layer(x)).mean((2, 3)))


class Named(tuple):
    _fields = ("hidden", "mask")
    hidden = property(lambda self: self[0])


def test_a_layer_of_which_one_part_is_a_tensor_needs_no_choice():
    for one in (lambda h: (h,), lambda h: (h, 1), lambda h: Named((h, None))):
        assert explain(OfParts(one).double(), layer="layer").shape == (2, 6, 6)
    assert explain(OfParts(lambda h: (h, 1)).double(), layer="layer.conv").shape == (2, 6, 6)


class Wiring(nn.Module):
    """A layer that runs twice, one that never runs, and one that is not registered."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        self.once, self.hidden = nn.Sequential(self.twice), [nn.Conv2d(3, 3, 1)]

    def forward(self, x):
        return self.fc(self.hidden[0](self.once(self.twice(x))).mean((2, 3)))


def wiring():
    net = Wiring().double()
    net.hidden[0].double()
    return net


def test_a_module_around_a_call_of_a_layer_that_runs_twice():
    assert explain(wiring(), layer="once", relu=False).shape == (2, 8, 8)


# ------------------------------------------------------------------------------------------------ arguments swapped


# ------------------------------------------------------------------------------------------------------------ inputs


class AddsTheChannel(nn.Module):
    """Takes `(n, h, w)`."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x[:, None]).mean((2, 3)))


def test_a_model_that_brings_its_input_to_rank_itself_is_not_refused():
    net, x = AddsTheChannel().double(), inputs()[:, 0]
    expected = torch.einsum("c,nchw->nhw", net.fc.weight[1], net.conv(x[:, None])).detach()
    close(camfn.cam(net, "conv", x, 1, fc="fc", normalize=False), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite(value):
    x = inputs()
    x[1, 2, 3, :3] = value
    with says("x is not finite", "3", "NaN or infinite"):
        explain(x=x)
    with says("x['image'] is not finite", "3"):
        explain(x={"image": x})


class Between(nn.Module):
    """The values that pass it are not finite where `bad` says."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, h):
        return torch.where(self.bad(h), torch.nan, h)


def with_between(bad) -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Identity(), Between(bad)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4, 5)).double()


def test_a_score_that_is_finite_on_the_clean_input_and_not_under_a_mask():
    """The pooled value of a masked image is smaller: the layer turns NaN there and only there."""
    net, x = with_between(lambda h: torch.zeros_like(h, dtype=torch.bool)), inputs()
    rows = []
    net[2][1].bad = lambda h: (rows.append(len(h)), torch.zeros_like(h, dtype=torch.bool))[1]
    clean = net[:3](x).sum((1, 2, 3)).detach()
    net[2][1].bad = lambda h: (h.sum((1, 2, 3), keepdim=True) < float(clean.min()) - 1e-9).expand_as(h)
    with torch.no_grad():
        assert torch.isfinite(net(x)).all()
    with says("the score of image", "masked by channel", "not finite", "first appears", "'2.1'"):
        explain(net, layer="0", x=x)


def test_the_image_and_channel_of_a_bad_mask_are_named():
    """Image 1 has a pixel of its own, that the mask of channel 2 alone lets through."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0, 0, 0], x[:, 1, 1, 1], x[:, 2, 2, 2] = 1, 1, 1
    net[1] = Between(lambda h: (h[:, :2].sum((1, 2, 3), keepdim=True) == 0) & (h[:, 2:3, 3:, 3:] > 0).expand_as(h))
    x[1, 2, 3, 3] = 1
    with says("image 1", "channel 2", "'1'"):
        explain(net, layer="0", x=x)


# -------------------------------------------------------------------------------------------------- several inputs


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, left, right, note=None):
        return self.fc((self.left(left) + self.right(right)).mean((2, 3)))


def test_a_method_that_masks_nothing_does_not_speak_of_masked():
    with pytest.raises(camfn.CamError, match="floating-point") as caught:
        explain(Two().double(), layer="left", x=(inputs().long(), inputs().long()), method="cam")
    assert "masked=" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- devices and kinds


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_models():
    net = small_net().eval()
    with says("scripted or traced", "pass the model that was scripted"):
        explain(torch.jit.script(net))
    with says("scripted or traced", "pass the model that was scripted"):
        explain(torch.jit.trace(net, inputs()))
    net.stem = torch.jit.script(net.stem)
    with says("scripted or traced"):
        explain(net)


@pytest.mark.skipif(not hasattr(torch, "export") or not hasattr(torch.export, "export"), reason="torch.export came with 2.1")
def test_exported_models():
    program = torch.export.export(small_net().eval(), (inputs(),))
    with says("ExportedProgram", "pass the model that was exported"):
        explain(program)
    with says("exported", "pass the model that was exported"):
        explain(program.module())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_models_without_shapes():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))
    with says("LazyConv2d", "lazy", "run the model once"):
        explain(net, layer="0", x=inputs(dtype=torch.float32))
    net(inputs(dtype=torch.float32))
    assert explain(net, layer="0", x=inputs(dtype=torch.float32), relu=False).shape == (2, 6, 6)


def test_a_forward_that_was_replaced_on_the_instance():
    net = small_net()
    net.features.forward = types.MethodType(nn.Conv2d.forward, net.stem)
    with says("`forward` of Conv2d", "replaced on the instance", "accelerate", "in the class"):
        explain(net)


# ----------------------------------------------------------------------------------------------------------- wrapped


def wrapped(kind: str, net: nn.Module) -> nn.Module:
    compiled = functools.partial(torch.compile, backend="eager")
    wraps = {
        "DataParallel": [nn.DataParallel],
        "compiled": [compiled],
        "compiled DataParallel": [nn.DataParallel, compiled],
        "DataParallel of compiled": [compiled, nn.DataParallel],
    }
    for wrap in wraps[kind]:
        net = wrap(net)
    return net


PREFIXES = {
    "DataParallel": "module.",
    "compiled": "_orig_mod.",
    "compiled DataParallel": "_orig_mod.module.",
    "DataParallel of compiled": "module._orig_mod.",
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_wrapped_models_are_unwrapped(kind):
    net, x = small_net(), inputs()
    expected = explain(net, x=x)
    outer = wrapped(kind, net)
    for layer in ("features", net.features):
        assert torch.equal(explain(outer, layer=layer, x=x), expected)
    card = camfn.explain(outer, "features", x, 1)
    assert card.layers == ("features",)
    assert set(camfn.state_of(outer)) == set(camfn.state_of(net))


@pytest.mark.parametrize("kind", PREFIXES)
def test_names_and_keys_with_the_prefixes_of_wrappers_are_understood(kind):
    net, other, x = small_net(), small_net(5), inputs()
    outer = wrapped(kind, net)
    prefix = PREFIXES[kind]
    assert next(iter(outer.state_dict())).startswith(prefix)
    expected = explain(net, x=x)
    for model in (outer, net):
        assert torch.equal(explain(model, layer=f"{prefix}features", x=x), expected)
    expected = explain(other, x=x)
    theirs = wrapped(kind, other).state_dict()
    for model in (outer, net):
        assert torch.equal(explain(model, x=x, state=theirs), expected)
    assert torch.equal(explain(outer, x=x, state=camfn.state_of(other)), expected)


def test_distributed_data_parallel_is_unwrapped():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("no process group of our own to be had")
    net, x = small_net(), inputs()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        outer = nn.parallel.DistributedDataParallel(net)
        expected = explain(net, x=x)
        for layer in ("features", "module.features", net.features):
            assert torch.equal(explain(outer, layer=layer, x=x), expected)
        assert torch.equal(explain(outer, x=x, state=outer.state_dict()), expected)
    finally:
        distributed.destroy_process_group()


def test_a_compiled_submodule_is_unwrapped():
    plain, net, x = small_net(), small_net(), inputs()
    net.stem = torch.compile(net.stem, backend="eager")
    net.features = torch.compile(net.features, backend="eager")
    expected = explain(plain, x=x)
    for layer in ("features", "features._orig_mod", net.features, net.features._orig_mod):
        assert torch.equal(explain(net, layer=layer, x=x), expected)
    assert torch.equal(explain(net, layer="stem._orig_mod.0", x=x), explain(plain, layer="stem.0", x=x))
    assert torch.equal(explain(net, x=x, state=net.state_dict()), expected)
    assert torch.equal(explain(net, x=x, state=plain.state_dict()), expected)


def test_a_module_compiled_in_place_runs_as_a_copy():
    plain, net, x = small_net(), small_net(), inputs()
    if not hasattr(net, "compile"):
        pytest.skip("nn.Module.compile came later")
    net.compile(backend="eager")
    assert torch.equal(explain(net, x=x), explain(plain, x=x))


class NamedModule(nn.Module):
    """Has a submodule whose name is that of the wrapper's."""

    def __init__(self):
        super().__init__()
        self.module = small_net()

    def forward(self, x):
        return self.module(x)


def test_a_submodule_that_is_called_module_keeps_its_name():
    net, x = NamedModule(), inputs()
    expected = explain(net.module, x=x)
    assert torch.equal(explain(net, layer="module.features", x=x), expected)
    assert torch.equal(explain(nn.DataParallel(net), layer="module.module.features", x=x), expected)


# ----------------------------------------------------------------------------------------------------------- targets


WRONG_TARGETS = {
    "too high": (5, ("target 5", "not a class", "0 to 4")),
    "negative": (-1, ("target -1", "not a class", "0 to 4")),
    "one too high": ([1, 7], ("target 7", "0 to 4")),
    "one negative in a tensor": (torch.tensor([1, -2]), ("target -2", "0 to 4")),
    "one too high in a table": (torch.tensor([[1, 9], [0, 1]]), ("target 9", "0 to 4")),
    "probability too high": (T.probability(7), ("target 7", "0 to 4")),
    "rest negative": (T.rest([0, -3]), ("target -3", "0 to 4")),
    "too few": ([1], ("1 entries", "batch of 2", "one int for all")),
    "too many": ((1, 2, 3), ("3 entries", "batch of 2", "one entry each")),
    "none": ([], ("0 entries", "batch of 2")),
    "too many in a tensor": (torch.tensor([1, 2, 3]), ("3 entries", "batch of 2")),
    "too many in a table": (torch.zeros(3, 2, dtype=torch.long), ("3 entries", "batch of 2")),
    "no column": (torch.zeros(2, 0, dtype=torch.long), ("(2, 0)",)),
    "float": (1.0, ("target 1.0", "not a class", "an int")),
    "floats": ([1.5, 2], ("target 1.5", "not a class")),
    "bool": (True, ("target True", "not a class")),
    "bools": ([True, False], ("target True", "not a class")),
    "word": ("cat", ("target 'cat'", '"all"')),
    "words": (["cat", "dog"], ("target 'cat'", "not a class")),
    "dict": ({}, ("target {}", "not a class", "callables")),
    "float tensor": (torch.tensor([1.0, 2.0]), ("integer tensor", "(n,) or (n, t)", "torch.float32", "(2,)")),
    "bool tensor": (torch.tensor([True, False]), ("integer tensor", "torch.bool")),
    "three axes": (torch.zeros(2, 1, 1, dtype=torch.long), ("integer tensor", "(2, 1, 1)")),
    "top too many": (T.top(6), ("top(6)", "5 classes")),
    "against too high": (T.contrast(1, [9]), ("against=[9]", "0 to 4")),
    "against negative": (T.contrast(1, [-1]), ("against=[-1]", "0 to 4")),
    "against none": (T.contrast(1, []), ("against=[]",)),
    "contrast of all others": (T.contrast(1, top=5), ("top=5", "5 classes")),
    "contrast with none": (T.contrast(1, top=0), ("top=0", "5 classes")),
    "contrast too high": (T.contrast(8), ("target 8", "0 to 4")),
    "against an int": (T.contrast(1, 3), ("against=3",)),
    "mixed, and one is wrong": ([lambda y: y[0], 7], ("the target of image 1", "target 7", "0 to 4")),
    "one callable": ([lambda y: y[0]], ("1 entries", "batch of 2")),
    "callable of two axes": (lambda y: y[None], ("scalar tensor", "(t,)", "(1, 5)")),
    "callable of a float": (lambda y: 1.0, ("scalar tensor", "found float")),
    "callable of an item": (lambda y: y[0].item(), ("the target failed", ".item()", "found float", "ONE sample")),
    "callable beyond the classes": (lambda y: y[99], ("the target failed", "99")),
    "callable of a key": (lambda y: y["logits"], ("the target failed", "ONE sample")),
    "callable of an attribute": (lambda y: y.logits[0], ("the target failed", "logits", "ONE sample")),
    "callable of a missing key": (lambda y: {"a": y}["logits"][0], ("the target failed", "logits", "ONE sample")),
}


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return {"out": self.conv(x)}


class Boxes(Segments):
    def forward(self, x):
        return {"boxes": super().forward(x)["out"]}


def test_a_callable_of_a_model_whose_output_has_no_class_for_each_sample():
    assert explain(Segments().double(), layer="conv", target=lambda out: out["out"][1].mean(), relu=False).shape == (2, 6, 6)


# ------------------------------------------------------------------------------------------------------------- state


def states():
    return camfn.state_of(small_net())


class Tied(nn.Module):
    """Two linear layers of one weight, and a buffer that a state_dict does not hold."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 4, 3), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("gain", torch.full((), 3.0, dtype=torch.float64), persistent=False)

    def forward(self, x):
        return self.other(torch.tanh(self.one(self.conv(x).mean((2, 3)) * self.gain)))


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied().double()


def test_both_names_of_a_tied_weight_are_accepted_if_they_hold_one_tensor():
    net, other, x = tied(), tied(1), inputs()
    expected = explain(other, layer="conv", x=x)
    state = camfn.state_of(other)
    assert "one.weight" in state
    assert "other.weight" not in state
    full = other.state_dict()
    assert {"one.weight", "other.weight"} <= set(full)
    assert "gain" not in full
    by_the_second = {name.replace("one", "other"): t for name, t in state.items()}
    both = {**state, "other.weight": state["one.weight"]}
    views = {**state, "other.weight": state["one.weight"].view(4, 4)}
    for given in (state, full, by_the_second, both, views):
        assert torch.equal(explain(net, layer="conv", x=x, state=given), expected)


def test_two_tensors_for_one_weight_are_refused():
    state = camfn.state_of(tied())
    for second in (state["one.weight"] + 1, state["one.weight"].clone(), state["one.weight"].T):
        with says("state=", "'one.weight'", "'other.weight'", "tied", "once"):
            explain(tied(), layer="conv", state={**state, "other.weight": second})


def test_a_tensor_under_a_prefixed_and_a_bare_name_is_refused_if_they_differ():
    state = states()
    with says("state=", "'fc.bias'", "once"):
        explain(state={**state, "module.fc.bias": state["fc.bias"] + 1})
    expected = explain()
    assert torch.equal(explain(state={**state, "module.fc.bias": state["fc.bias"]}), expected)


def test_both_names_of_a_tied_weight_are_accepted_under_vmap():
    nets, x = [tied(seed) for seed in range(3)], inputs()
    stacked = {name: torch.stack([net.state_dict()[name] for net in nets]) for name in nets[0].state_dict()}
    stacked["other.weight"], net = stacked["one.weight"], tied(9)
    found = torch.func.vmap(lambda state: explain(net, layer="conv", x=x, state=state))(stacked)
    for one, net in zip(found, nets):
        close(one, explain(net, layer="conv", x=x))
    stacked["other.weight"] = stacked["one.weight"] + 1
    with says("'one.weight'", "'other.weight'", "tied"):
        torch.func.vmap(lambda state: explain(net, layer="conv", x=x, state=state))(stacked)


@pytest.mark.skipif(bool(camfn._compat.can_compile()), reason=camfn._compat.can_compile() or "-")
def test_both_names_of_a_tied_weight_are_accepted_while_compiling():
    net, x = tied(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, state: explain(net, layer="conv", x=x, state=state), backend="eager")
    close(compiled(x, tied(1).state_dict()), explain(tied(1), layer="conv", x=x))
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- randomness


class Applies(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function, self.fc = nn.Conv2d(3, 4, 3), function, nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


DRAWS = {
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "dropout2d": lambda h: F.dropout2d(h, 0.5, training=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "rand": lambda h: h * torch.rand(h.shape),
    "rand_like": lambda h: h * torch.rand_like(h),
    "randn": lambda h: h + torch.randn(h.shape),
    "randint": lambda h: h + torch.randint(0, 3, h.shape),
    "randperm": lambda h: h[:, torch.randperm(4)],
    "normal": lambda h: h + torch.normal(0.0, 1.0, h.shape),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "uniform_": lambda h: h * torch.empty_like(h).uniform_(),
    "multinomial": lambda h: h[:, torch.multinomial(torch.ones(4), 4)],
    "poisson": lambda h: torch.poisson(h.abs()),
    "gumbel": lambda h: F.gumbel_softmax(h, dim=1),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.1),
    "a generator of its own": lambda h, g=torch.Generator(): h * torch.rand(h.shape, generator=g),
}


def draws_nothing(net, call, words=("the model draws random numbers in eval mode", "obey self.training")):
    before = torch.get_rng_state()
    with says(*words):
        call(net)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", DRAWS)
def test_a_model_that_draws_in_eval_mode_is_refused_before_it_draws(kind):
    net = Applies(DRAWS[kind]).double().eval()
    assert not torch.equal(net(inputs()), net(inputs()))
    draws_nothing(net, lambda net: explain(net, layer="conv"))


@pytest.mark.filterwarnings("ignore:layer=None")
@pytest.mark.parametrize("layer", ["conv", None])
@pytest.mark.parametrize("method", sorted(LAYERED))
def test_every_method_refuses_a_model_that_draws(method, layer):
    draws_nothing(Applies(DRAWS["dropout"]).double(), lambda net: explain(net, layer=layer, method=method))


@pytest.mark.parametrize("function", ["explain", "pure", "tap", "head"])
def test_the_other_public_functions_refuse_a_model_that_draws(function):
    net, x = Applies(DRAWS["dropout"]).double(), inputs()
    calls = {
        "explain": lambda net: camfn.explain(net, "conv", x, 1),
        "pure": lambda net: camfn.pure(net)(camfn.state_of(net), x),
        "tap": lambda net: camfn.tap(net, "conv")(camfn.state_of(net), x),
        "head": lambda net: camfn.head(net, "conv", x, torch.zeros(2, 4, 6, 6).double()),
    }
    draws_nothing(net, calls[function])


class MayDraw(Applies):
    """Draws if its switch says so, and on inputs of some size."""

    def __init__(self):
        super().__init__(lambda h: h * torch.rand_like(h) if self.switch or h.shape[-1] > 6 else h)
        self.switch = False


def test_that_a_model_draws_nothing_is_found_out_again_for_another_structure_or_shape():
    """It is found out in the first call of all, and remembered."""
    net = MayDraw().double()
    for _ in range(2):
        explain(net, layer="conv")
    draws_nothing(net, lambda net: explain(net, layer="conv", x=inputs(side=9)))
    net.switch = True
    draws_nothing(net, lambda net: explain(net, layer="conv"))
    net.switch = False
    explain(net, layer="conv")


def test_a_model_that_draws_is_refused_under_grad_too():
    """torch's vmap refuses draws by itself; its grad lets them pass, and the map would differ from call to call."""
    net = Applies(DRAWS["rand_like"]).double()
    draws_nothing(net, lambda net: torch.func.grad(lambda x: explain(net, layer="conv", x=x).sum())(inputs()))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.rnn, self.fc = nn.Conv1d(3, 4, 3), kind(4, 4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.rnn(self.conv(x).mT)[0][:, -1])


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.dropout(h, 0.5, training=False),
        lambda h: F.dropout(h, 0.0, training=True),
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        nn.RReLU(),
        lambda h: F.rrelu(h, training=False),
        lambda h: F.scaled_dot_product_attention(h, h, h),
    ],
    ids=["dropout off", "dropout of nothing", "Dropout", "AlphaDropout", "RReLU", "rrelu off", "attention"],
)
def test_what_only_looks_random_is_not_refused(function):
    net, x = Applies(function).double(), inputs()
    before = torch.get_rng_state()
    assert torch.equal(explain(net, layer="conv", x=x), explain(net, layer="conv", x=x))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
@pytest.mark.parametrize("net", [Recurrent(nn.LSTM), Recurrent(nn.GRU)], ids=["LSTM", "GRU"])
def test_recurrent_layers_with_dropout_are_not_refused(net):
    before = torch.get_rng_state()
    assert explain(net, layer="conv", x=inputs(dims=1, dtype=torch.float32)).shape == (2, 6)
    assert torch.equal(before, torch.get_rng_state())


def test_another_thread_that_draws_meanwhile_does_not_count():
    stop, drawn = threading.Event(), itertools.count()

    def draw():
        while not stop.is_set():
            torch.rand(3)
            next(drawn)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        while next(drawn) < 10:
            pass
        maps = [explain() for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(m, maps[0]) for m in maps)


# --------------------------------------------------------------------------------------------------------------- cam


def pooled(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *tail).double()


def of_vectors() -> nn.Sequential:
    """Its input has no spatial axes."""
    return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5))


cam, FC = functools.partial(explain, method="cam"), {"cam": {"fc": "fc"}}


def test_cam_has_one_layer():
    with says("cam", "one layer", "found 2"):
        cam(layer=["features", "act"], fc="fc")
    (found,) = cam(layer=["features"], fc="fc")
    assert torch.equal(found, cam(layer="features", fc="fc"))


def test_a_head_for_training_alone_is_not_cams():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aux1 = pooled(nn.Linear(4, 4)), nn.Linear(4, 4).double()

        def forward(self, x):
            return self.body(x)

    model = Trained()
    with pytest.warns(camfn.CamWarning, match="fc=None: 'body.4' was found"):
        cam(model, layer="body.1")


def test_cam_with_several_linear_layers_equally_likely():
    with says("several", "fc=", "'4', '5'", "name"):
        cam(pooled(nn.Linear(4, 4), nn.Linear(4, 4)), layer="1")
    assert cam(pooled(nn.Linear(4, 4), nn.Linear(4, 4)), layer="1", fc="4").shape == (2, 6, 6)


def test_cam_says_which_layer_it_found():
    with pytest.warns(camfn.CamWarning, match=r"fc=None.*'fc'.*6 channels.*5 classes"):
        cam()


# ----------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("target", "word"),
    [(lambda y: y[0], "callable"), ([lambda y: y[0]] * 2, "callable"), (T.contrast(1), "contrast"), (T.rest(1), "rest")],
    ids=["callable", "callables", "contrast", "rest"],
)
@pytest.mark.parametrize("method", ["score_cam", "ss_cam", "is_cam"])
def test_a_recipe_of_probabilities_with_a_target_that_has_none(method, target, word):
    with pytest.raises(camfn.CamError, match=rf"(?s)probabilities.*({word}|function|list)") as caught:
        explain(target=target, recipe="authors", method=method)
    assert "OfClasses" not in str(caught.value)
    assert "pass classes" in str(caught.value)
    assert explain(target=T.probability(1), recipe="authors", method=method).shape == (2, 4, 4)


def test_every_channel_is_flat_and_the_recipe_leaves_flat_channels_out():
    net = small_net()
    with torch.no_grad():
        net.features.weight.zero_()
    with says("every channel", "flat", "leaves flat channels out"):
        explain(net, recipe="authors")
    with pytest.warns(camfn.CamWarning, match="2 of 2 maps at layer 'features' are flat"):
        assert float(explain(net).abs().max()) == 0


def test_a_wrong_answer_to_whether_to_compile(monkeypatch):
    monkeypatch.setattr(
        camfn._compat, "compiled", lambda function: function
    )  # not for half a minute, where it is taken for a yes
    with says("compile", "'never'"):
        explain(sweep=camfn.Sweep(compile="never"))


# ------------------------------------------------------------------------------------- a call, and what it must say


def of_state(**changes):
    """A call with the state of another network of the same kind, changed."""
    return lambda: explain(state={**states(), **changes})


def flattened():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()


def two(x, **options):
    return lambda: explain(Two().double(), layer="left", x=x, **options)


def of_parts(*pack):
    return lambda: explain(OfParts(*pack).double(), layer="layer")


X, PICTURES = inputs(), {"left": inputs(), "right": inputs()}
HIDDEN = wiring()
ROWS = [
    (lambda: explain(layer="feature"), "no layer named 'feature' … SmallNet … closest … 'features' … named_modules()"),
    (lambda: explain(layer=["features", "stem.9"]), "no layer named 'stem.9' … 'stem. … named_modules()"),
    (lambda: explain(layer="qqqq"), "no layer named 'qqqq' in SmallNet (all of them: … named_modules()"),
    (lambda: explain(layer="fc"), "layer 'fc' … (2, 5) … no spatial axes … before pooling … layout="),
    (lambda: explain(layer=("features", "fc")), "layer 'fc' … (2, 5) … no spatial axes"),
    (lambda: explain(flattened(), layer=None), "no layer of Sequential … 2 spatial axes … name one … named_modules()"),
    (lambda: explain(layer=5), "layer must be a name or a module … found … int"),
    (lambda: explain(layer=["features", 5]), "layer must be a name or a module … found … int"),
    (lambda: explain(layer=["features", None]), "layer must be a name or a module … found … NoneType"),
    (lambda: explain(layer=[]), "layer is an empty sequence … name one … None"),
    (
        of_parts(lambda h: (h, h.sum((1, 2, 3)))),
        "layer 'layer' … tuple … 0: Tensor(2, 3, 6, 6) … 1: Tensor(2,) … choose one of its parts: 'layer:0', 'layer:1'",
    ),
    (
        of_parts(lambda h: {"hidden": "x", "note": "x"}, lambda out: None),
        "layer 'layer' … dict of hidden: str, note: str … choose a layer inside it",
    ),
    (
        of_parts(lambda h: Named((h, h.sum((1, 2, 3))))),
        "layer 'layer' … Named … hidden: Tensor(2, 3, 6, 6) … mask: Tensor(2,) … 'layer:hidden', 'layer:mask'",
    ),
    (
        lambda: explain(wiring(), layer="twice"),
        "layer 'twice' … more than once … choose one of its calls … 'twice@1', 'twice@2'",
    ),
    (lambda: explain(wiring(), layer="twice@3"), "layer 'twice@3' … ran 2 times in this forward"),
    (lambda: explain(wiring(), layer="never"), "layer 'never' … did not run … choose one that does"),
    (lambda: explain(HIDDEN, layer=HIDDEN.hidden[0]), "a Conv2d … not a registered submodule of Wiring … nn.ModuleList"),
    (lambda: explain(HIDDEN, layer=wiring().never), "a Conv2d … not a registered submodule of Wiring"),
    (lambda: camfn.score_cam("features", small_net(), X), "model must be … found str … after the model"),
    (lambda: camfn.score_cam(HIDDEN.twice, HIDDEN, X), "model and layer are swapped"),
    (lambda: camfn.score_cam(HIDDEN.fc, HIDDEN, X), "model and layer are swapped"),
    (lambda: camfn.tap(HIDDEN.twice, HIDDEN), "model and layer are swapped"),
    (lambda: camfn.tap("features", small_net()), "model must be … found str … after the model"),
    (lambda: camfn.pure("features"), "model must be … found str"),
    (lambda: camfn.score_cam(small_net(), X, "features"), "x must be a tensor … found str … layer"),
    (lambda: camfn.score_cam(X, small_net(), "features"), "model must be … found Tensor"),
    (lambda: explain(nn.Linear(3, 3).double(), layer="", x=X[:, :, 0, 0]), "x has shape (2, 3) … one spatial axis"),
    (lambda: explain(x=X[:0]), "x is an empty batch … (0, 3, 8, 8)"),
    *(
        (lambda dtype=dtype: explain(x=X.abs().to(dtype)), f"x is … {dtype} … floating-point … preprocess")
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64)
    ),
    *(
        (lambda dtype=dtype: explain(x=(X.abs().to(dtype),), masked=0), f"x[0] is … {dtype} … floating-point")
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64)
    ),
    *(
        (
            lambda x=x: camfn.score_cam(small_net(), "features", x),
            f"x must be a tensor, a tuple … mapping … found … {kind.__name__}",
        )
        for x, kind in ((X.numpy(), np.ndarray), (None, type(None)), ("picture.png", str))
    ),
    (lambda: explain(with_between(torch.isfinite), layer="0"), "the score is not finite … first appears … '2.1'"),
    (lambda: explain(target=lambda y: y[0] / 0), "the score is not finite … no layer's output shows it"),
    (two((X, X)), "masked= … which input … 0, 1 … floating-point … spatial axes"),
    (two({**PICTURES, "note": None}), "masked= … which input … 'left', 'right' … spatial axes"),
    (two((X.long(), X[:, :, 0, 0])), "masked= … which input … none … floating-point … spatial axes"),
    *((two((X, X), masked=key), f"masked={key!r} … 0, 1") for key in ("nothing", 2, -1)),
    *((two(PICTURES, masked=key), f"masked={key!r} … 'left', 'right'") for key in ("nothing", 2, -1)),
    (two((X, X, None), masked=2), "masked=2 … not a tensor"),
    (lambda: explain(x=X, masked=0), "masked=0 … x is a single tensor"),
    (lambda: explain(small_net().to("meta"), x=X), "the model is on meta … x is on cpu … move one"),
    (lambda: explain(x=X.to("meta")), "the model is on cpu … x is on meta … move one"),
    (lambda: explain(state={name: t.to("meta") for name, t in states().items()}), "meta … cpu … move one"),
    (of_state(**{"fc.bias": torch.zeros(5, device="meta")}), "'fc.bias' … meta"),
    (lambda: explain(NamedModule()), "no layer named 'features' … 'module.features'"),
    *((lambda given=given: explain(target=given), " … ".join(words)) for kind, (given, words) in WRONG_TARGETS.items()),
    *((lambda k=k: T.top(k), f"targets.top … positive number … {k!r}") for k in (0, -1, True, 2.0, "3", None)),
    *(
        (lambda method=method, target=target: explain(target=target, method=method), f"target {target} … 0 to 4")
        for method in sorted(LAYERED)
        for target in (5, -1)
    ),
    *((lambda method=method: explain(target=[1, 2, 3], method=method), "3 entries … batch of 2") for method in sorted(LAYERED)),
    (lambda: explain(Segments().double(), layer="conv"), "(2, 5, 6, 6) … (n=2, classes) … callable"),
    (lambda: explain(Boxes().double(), layer="conv"), "dict … without logits … callable"),
    (
        lambda: explain(state={name: t for name, t in states().items() if name != "fc.bias"}),
        "state= lacks 'fc.bias' … camfn.state_of",
    ),
    (lambda: explain(state={}), f"state= lacks 'stem.0.weight' … 'stem.0.bias' … and {len(states()) - 3} more"),
    (of_state(**{"fc.wieght": states()["fc.weight"]}), "state= … 'fc.wieght' … closest … 'fc.weight'"),
    (of_state(**{"fc.weight": states()["fc.weight"].T}), "state= … 'fc.weight' … (6, 5) … (5, 6)"),
    *((of_state(**{"fc.bias": value}), f"state= … 'fc.bias' … {type(value).__name__}") for value in (1.0, None, [0.0] * 5)),
    (lambda: explain(state=small_net()), "state= must be a mapping … SmallNet … camfn.state_of"),
    (lambda: cam(pooled(), layer="1"), "linear layer … 4 channels … 4 classes … no linear layer at all"),
    (lambda: cam(pooled(nn.Linear(4, 3), nn.Linear(3, 5)), layer="1"), "linear layer … found '5' (3, 5); name another layer"),
    (lambda: cam(small_net(dense=True)), "6 channels … 5 classes … 'fc' (96, 5)"),
    (lambda: cam(small_net(dense=True), fc="fc"), "fc='fc' … 96 inputs … 6 channels"),
    (lambda: cam(pooled(nn.Linear(4, 4), nn.Linear(4, 3)), layer="1", fc="4"), "fc='4' … 4 outputs … 3 classes"),
    *(
        (lambda fc=fc: cam(fc=fc), f"fc='{fc}' … {kind} … Linear or a 1x1 convolution")
        for fc, kind in (("act", "ReLU"), ("features", "Conv2d"), ("stem", "Sequential"))
    ),
    (lambda: cam(fc="classifier"), "fc … 'classifier' … SmallNet … (all of them"),
    (lambda: cam(fc=5), "fc … name or a module … found int"),
    *(
        (lambda given=given: cam(target=given, fc="fc"), "cam … linear layer … target … classes")
        for kind, given in {
            "a callable": lambda y: y[0],
            "a probability": T.probability(1),
            "a sum with what is none": T.logit(1) + T.rest(1),
            "callables": [lambda y: y[0]] * 2,
        }.items()
    ),
    (lambda: explain(recipe="torch-cam"), "recipe 'torch-cam' … closest … 'torchcam' … all … authors"),
    (lambda: explain(recipe=5), "recipe … 5"),
    (lambda: explain(recipe=["torchcam"]), "recipe … ['torchcam']"),
    *(
        (lambda path=path: explain(method="is_cam", path=path), f'path must be "cumulative" or "linear" … {path!r}')
        for path in ("cumulativ", None, 3)
    ),
    *(
        (
            lambda noise=noise: explain(method="ss_cam", noise=noise),
            f'noise must be "mask", "activation" or "input" … {noise!r}',
        )
        for noise in ("maks", None, 3)
    ),
    *(
        (lambda method=method, count=count: explain(method=method, num_samples=count), f"{method} … num_samples … {count!r}")
        for method in ("ss_cam", "is_cam")
        for count in (0, -3, 2.5)
    ),
    *(
        (lambda std=std: explain(method="ss_cam", num_samples=2, std=std), f"ss_cam … std … {std!r}")
        for std in (-1.0, float("nan"), float("inf"))
    ),
    *((lambda seed=seed: explain(method="ss_cam", num_samples=2, seed=seed), f"seed … {seed!r}") for seed in ("a", 1.5, None)),
    *(
        (lambda method=method, size=size: explain(method=method, size=size, **FC.get(method, {})), f"size … {size!r}")
        for method in sorted(LAYERED)
        for size in ("output", (8, 8, 8), (8,), 8, (0, 8), (-1, 8), (8.5, 8))
    ),
    (lambda: cam(of_vectors(), layer="1", x=torch.rand(2, 8), fc="4", size="input"), "size … spatial axes … input"),
    *(
        (
            lambda method=method, layout=layout: explain(method=method, layout=layout, **FC.get(method, {})),
            f'layout must be "auto", "channels_first", "channels_last", camfn.layouts.tokens() or a callable … {layout!r}',
        )
        for method in sorted(name for name in LAYERED if camfn.METHODS[name].of_layer)
        for layout in ("nchw", 5, None)
    ),
    (lambda: explain(layout=lambda a: a.flatten(1)), "layer 'features' … (2, 6, 4, 4) … no spatial axes"),
    (lambda: explain(layout=lambda a: a.flatten(0, 1)[:, None]), "layer 'features' … batch of 12 … batch of 2"),
    *((lambda chunk=chunk: explain(sweep=camfn.Sweep(chunk=chunk)), f"chunk … {chunk!r}") for chunk in (-1, 0, 2.5, "8")),
    (
        lambda: camfn.explain(small_net(), "features", X, method="scorecam"),
        "no method named 'scorecam' … closest … 'score_cam' … all … is_cam",
    ),
    *(
        (lambda given=given: camfn.maps.fuse(given), "maps must be a list or tuple")
        for kind, given in {
            "an empty list": [],
            "an empty tuple": (),
            "a tensor": torch.ones(2, 4, 4),
            "a list with None": [torch.ones(1, 4), None],
            "None": None,
        }.items()
    ),
    *(
        (
            lambda shape=shape: camfn.maps.fuse([torch.rand(2, 4, 4), torch.rand(*shape)]),
            f"maps to fuse differ … (2, 4, 4) … {shape}",
        )
        for shape in ((3, 4, 4), (2, 4), (2, 5, 4, 4))
    ),
    *(
        (lambda size=size: camfn.maps.resize(torch.rand(2, 4, 4), size), f"size has … {len(size)} … one to three")
        for size in ((2, 2, 2, 2), ())
    ),
    *(
        (
            lambda method=method, dims=dims, given=given: explain(
                small_net(dims=dims), x=given, method=method, **FC.get(method, {})
            ),
            " … ".join(words),
        )
        for method in ("score_cam", "cam")
        for said, dims, given, words in (
            ("three axes", 2, X[0], ("x has shape (3, 8, 8)", "Conv2d wants 4", "(n, channels, *size)", "batch", "x[None]")),
            ("five axes", 2, X[None], ("x has shape (1, 2, 3, 8, 8)", "4 axes")),
            ("two axes", 1, inputs(dims=1)[0], ("x has shape (3, 8)", "(n, channels, *size)")),
        )
    ),
    *(
        (
            lambda method=method: explain(nn.Sequential(nn.Linear(1, 3)), layer="0", x=torch.tensor(1.0), method=method),
            "x has shape ()",
        )
        for method in ("score_cam", "cam")
    ),
]
"""A call, and what it must say: what stands between the parts is free."""


def name_of(row) -> str:
    """The message, and what a row of several rows puts into its call."""
    call, message = row
    given = (repr(value) for value in call.__defaults__ or () if isinstance(value, (int, str, tuple)))
    return re.sub(" at 0x[0-9a-f]+", "", ", ".join([message, *given]))  # two processes collect the same names


@pytest.mark.parametrize(("call", "message"), ROWS, ids=map(name_of, ROWS))
def test_the_message_says(call, message):
    with says(*message.split(" … ")):
        call()
