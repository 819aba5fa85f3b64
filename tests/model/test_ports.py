"""Layers that return several tensors, and layers that run more than once: all three ports, against plain hooks."""

import collections
import copy
import dataclasses
import typing

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

import camfn
from camfn import CamError
from camfn.model.ports import place_of
from tests.oracles.closeness import assert_close, close
from tests.oracles.networks import inputs


class Pair(typing.NamedTuple):
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Record:
    a: Tensor
    b: Tensor
    note: str = "no tensor"


class Fields(collections.UserDict):
    """A mapping that is no dict."""


class Unpacked(nn.Module):
    """Two convolutions, packed by a layer of their own into one value, from which the rest of the network reads."""

    def __init__(self, pack, unpack):
        super().__init__()
        self.pack, self.unpack = Packing(pack), unpack
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.unpack(self.pack(x))
        return self.fc(torch.cat([a.relu() * 2, torch.tanh(b)], 1).mean((2, 3)))


class Packing(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.one, self.two, self.pack = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3, stride=2), pack
        self.wide = nn.Identity()

    def forward(self, x):
        return self.pack(self.one(x), nn.functional.interpolate(self.two(x), size=(6, 6)))


KINDS = {
    "tuple": (lambda a, b: (a, b), lambda out: out, "0", "1"),
    "list": (lambda a, b: [a, b, "no tensor"], lambda out: out[:2], "0", "1"),
    "named tuple": (Pair, lambda out: (out.a, out.b), "a", "b"),
    "dict": (lambda a, b: {"a": a, 7: b}, lambda out: (out["a"], out[7]), "a", "7"),
    "ordered": (lambda a, b: collections.OrderedDict(a=a, b=b), lambda out: out.values(), "a", "b"),
    "mapping": (lambda a, b: Fields(a=a, b=b), lambda out: (out["a"], out["b"]), "a", "b"),
    "dataclass": (Record, lambda out: (out.a, out.b), "a", "b"),
    "nested": (lambda a, b: ({"x": [a]}, (b, None)), lambda out: (out[0]["x"][0], out[1][0]), "0:x:0", "1:0"),
}


def packed(kind: str) -> Unpacked:
    torch.manual_seed(0)
    pack, unpack, *_ = KINDS[kind]
    return Unpacked(pack, unpack).double()


def by_hand(model: Unpacked, x: Tensor, which: int, nudge=0.0, swap: Tensor | None = None):
    """The oracle: the same network without the packing; its output and the value at one of the two."""
    values = [model.pack.one(x), nn.functional.interpolate(model.pack.two(x), size=(6, 6))]
    values[which] = values[which] if swap is None else swap
    seen = values[which].detach()
    values[which] = values[which] + nudge
    return model.fc(torch.cat([values[0].relu() * 2, torch.tanh(values[1])], 1).mean((2, 3))), seen


def check_ports(model: nn.Module, layer: str, x: Tensor, oracle) -> None:
    """The value seen, the gradient at a zero nudge, the output after a swap, and the head."""
    f, state = camfn.tap(model, layer), camfn.state_of(model)
    expected, value = oracle()
    output, seen = f(state, x)
    close(output, expected.detach(), "output")
    assert_close(seen, value, 0, "seen")
    zero = torch.zeros_like(seen)
    ours = grad(lambda nudge: f(state, x, nudge).output.square().sum())(zero)
    nudge = zero.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(oracle(nudge=nudge)[0].square().sum(), nudge)
    close(ours, theirs, "gradient")
    assert float(theirs.abs().max()) > 0
    other = seen * 2 + 1
    swapped = oracle(swap=other)[0].detach()
    close(f(state, x, None, other).output, swapped, "swap")
    assert float((swapped - expected.detach()).abs().max()) > 1e-3
    close(camfn.head(model, layer, x, seen)(state, x, other), swapped, "head")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_part_of_what_a_layer_returns(kind, which):
    model, x = packed(kind), inputs()
    check_ports(model, f"pack:{KINDS[kind][2 + which]}", x, lambda **ports: by_hand(model, x, which, **ports))


def test_a_part_of_a_models_own_output_class():
    from_transformers = pytest.importorskip("transformers.modeling_outputs").BaseModelOutput

    def pack(a, b):
        return from_transformers(last_hidden_state=a, hidden_states=(a, b))

    def unpack(out):
        assert out["last_hidden_state"] is out.last_hidden_state
        return out.last_hidden_state, out.hidden_states[1]

    torch.manual_seed(0)
    model, x = Unpacked(pack, unpack).double(), inputs()
    for which, part in enumerate(["last_hidden_state", "hidden_states:1"]):
        check_ports(model, f"pack:{part}", x, lambda which=which, **ports: by_hand(model, x, which, **ports))


def test_two_parts_of_one_layer_at_once():
    model, x = packed("dict"), inputs()
    f, state = camfn.tap(model, ("pack:a", "pack:7", "pack.one")), camfn.state_of(model)
    seen = f(state, x).seen
    assert_close(seen[0], by_hand(model, x, 0)[1], 0)
    assert_close(seen[1], by_hand(model, x, 1)[1], 0)
    assert_close(seen[2], seen[0], 0)
    swapped = f(state, x, None, (seen[0] * 2, seen[1] * 3, None)).output
    expected = model.fc(torch.cat([(seen[0] * 2).relu() * 2, torch.tanh(seen[1] * 3)], 1).mean((2, 3)))
    close(swapped, expected.detach())


class Keeps(nn.Module):
    """Its layer returns a dict and keeps it; the rest of the network reads both."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 2, 3), {}

    def forward(self, x):
        self.last = {"a": self.conv(x)}
        return self.last


class ReadsBoth(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Keeps()

    def forward(self, x):
        return self.layer(x)["a"].mean((2, 3)) + 10 * self.layer.last["a"].mean((2, 3))


def test_what_a_model_keeps_of_a_layer_is_not_written_to():
    torch.manual_seed(0)
    model, x = ReadsBoth().double(), inputs()
    f, state = camfn.tap(model, "layer:a"), camfn.state_of(model)
    seen = f(state, x).seen
    close(f(state, x, None, seen * 5).output, (5 + 10) * seen.mean((2, 3)))


def test_a_part_that_has_to_be_chosen():
    x = inputs()
    for kind, layer, message in (
        (
            "tuple",
            "pack",
            r"returns a tuple of 0: Tensor\(2, 2, 6, 6\), 1: Tensor.*, not one tensor; choose .* 'pack:0', 'pack:1'",
        ),
        ("dict", "pack:c", r"layer 'pack:c' has no part 'c'; choose one of its parts: 'pack:a', 'pack:7'"),
        ("list", "pack:2", r"returns a str, not one tensor; choose a layer inside it"),
        (
            "nested",
            "pack",
            r"returns a tuple of 0: dict, 1: tuple, not one tensor; choose one of its parts: 'pack:0', 'pack:1'",
        ),
        ("nested", "pack:0:y", r"has no part 'y'; choose one of its parts: 'pack:0:x'"),
        ("tuple", "pack:0:1", r"layer 'pack:0:1' has no part '1'; choose a layer inside it"),
    ):
        model = packed(kind)
        with pytest.raises(CamError, match=message):
            camfn.tap(model, layer)(camfn.state_of(model), x)


# --------------------------------------------------------------------------------------------------- several calls


class Recurrent(nn.Module):
    """One convolution that is run three times, with something else between; it returns a pair if `pairs`."""

    def __init__(self, pairs: bool = False):
        super().__init__()
        self.step, self.fc = (Both() if pairs else nn.Conv2d(3, 3, 3, padding=1)), nn.Linear(3, 4)
        self.pairs = pairs

    def forward(self, x):
        for _ in range(3):
            out = self.step(x)
            x = torch.tanh(out[0] + out[1] if self.pairs else out) + x
        return self.fc(x.mean((2, 3)))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.one(x), self.two(x)


def hooked(model: Recurrent, x: Tensor, call: int, part: int | None = None, nudge=0.0, swap: Tensor | None = None):
    """The oracle: a forward hook that counts."""
    twin, seen, count = copy.deepcopy(model), [], iter(range(1, 4))

    def hook(module, args, out):
        if next(count) != call:
            return None
        value = out if part is None else out[part]
        value = value if swap is None else swap
        seen.append(value.detach())
        value = value + nudge
        return value if part is None else tuple(value if i == part else item for i, item in enumerate(out))

    twin.step.register_forward_hook(hook)
    return twin(x), seen[0]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_one_of_a_layers_calls(call):
    torch.manual_seed(0)
    model, x = Recurrent().double(), inputs(side=5)
    check_ports(model, f"step@{call}", x, lambda **ports: hooked(model, x, call, **ports))


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_one_of_a_layers_calls(part):
    torch.manual_seed(0)
    model, x = Recurrent(pairs=True).double(), inputs(side=5)
    check_ports(model, f"step@2:{part}", x, lambda **ports: hooked(model, x, 2, part, **ports))


def test_several_calls_of_one_layer_at_once():
    torch.manual_seed(0)
    model, x = Recurrent().double(), inputs(side=5)
    f, state = camfn.tap(model, ("step@3", "step@1")), camfn.state_of(model)
    for _ in range(2):  # a tap counts the calls of each forward anew
        seen = f(state, x).seen
        assert_close(seen[0], hooked(model, x, 3)[1], 0)
        assert_close(seen[1], hooked(model, x, 1)[1], 0)
    swapped = f(state, x, None, (None, seen[1] * 2)).output
    close(swapped, hooked(model, x, 1, swap=seen[1] * 2)[0].detach())


def test_a_call_that_has_to_be_chosen():
    torch.manual_seed(0)
    model, x = Recurrent(pairs=True).double(), inputs(side=5)
    state = camfn.state_of(model)
    with pytest.raises(CamError, match=r"runs more than once .* counted from 1: 'step@1', 'step@2', \.\.\."):
        camfn.tap(model, "step:0")(state, x)
    with pytest.raises(CamError, match=r"layer 'step@4:0' ran 3 times in this forward"):
        camfn.tap(model, "step@4:0")(state, x)
    with pytest.raises(CamError, match=r"layer 'step@1' returns a tuple .* choose one of its parts: 'step@1:0', 'step@1:1'"):
        camfn.tap(model, "step@1")(state, x)
    assert_close(camfn.tap(model, "fc@1")(state, x).seen, model(x).detach(), 0)
    with pytest.raises(CamError, match=r"layer 'fc@2' ran 1 time in this forward"):
        camfn.tap(model, "fc@2")(state, x)


# -------------------------------------------------------------------------------------------------------- the names


def test_a_name_is_read_as_a_modules_name_first():
    known = dict.fromkeys(["", "a.b", "a.b:0", "a.b@2"])
    assert place_of("a.b", known) == ("a.b", None, ())
    assert place_of("a.b:0", known) == ("a.b:0", None, ())
    assert place_of("a.b@2", known) == ("a.b@2", None, ())
    assert place_of("a.b:0:1", known) == ("a.b", None, ("0", "1"))
    assert place_of("a.b@3:x.y", known) == ("a.b", 3, ("x.y",))
    assert place_of("module.a.b@1", known) == ("a.b", 1, ())
    assert place_of("a.b@0", known) is None
    assert place_of("a.c:0", known) is None
    assert place_of(":logits", known) == ("", None, ("logits",))


def test_a_module_whose_name_looks_like_a_part():
    torch.manual_seed(0)
    model, x = nn.Sequential(collections.OrderedDict({"a:0": nn.Linear(3, 3), "b@2": nn.Linear(3, 2)})), torch.randn(2, 3)
    assert_close(camfn.tap(model, "a:0")(camfn.state_of(model), x).seen, model[0](x).detach(), 0)
    assert_close(camfn.tap(model, "b@2")(camfn.state_of(model), x).seen, model(x).detach(), 0)


@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_maps_at_parts_and_calls(method):
    """The map at a part is the map at the layer that the part comes from; at a call, the one of the network unrolled."""
    function = camfn.METHODS[method].function
    model, x = packed("tuple"), inputs()
    ours = function(model, ("pack:0", "pack:1"), x, 1, normalize=False)
    close(ours[0], function(model, "pack.one", x, 1, normalize=False))
    assert float(ours[1].max()) > 0
    torch.manual_seed(0)
    shared = Recurrent().double()
    unrolled = Unrolled(shared)
    for call in (1, 2, 3):
        ours = function(shared, f"step@{call}", x, 1, normalize=False)
        close(ours, function(unrolled, f"steps.{call - 1}", x, 1, normalize=False))
    card = camfn.explain(shared, "step@2", x, 1, method=method)
    assert card.layers == ("step@2",)


class Unrolled(nn.Module):
    """A copy for each call."""

    def __init__(self, shared: Recurrent):
        super().__init__()
        self.steps, self.fc = nn.ModuleList(copy.deepcopy(shared.step) for _ in range(3)), shared.fc

    def forward(self, x):
        for step in self.steps:
            x = torch.tanh(step(x)) + x
        return self.fc(x.mean((2, 3)))


def test_a_linear_layer_is_no_part():
    model, x = packed("tuple"), inputs()
    with pytest.raises(CamError, match=r"fc='fc:0'.*must name a layer, without a part or a call"):
        camfn.cam(model, "pack:0", x, 0, fc="fc:0")
