"""The private copy is the model where a forward asks for identity, class or hooks."""

import collections
import functools
import gc
import inspect
import os
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn import CamError
from tests.oracles.closeness import assert_close

X = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)))


class Mode:
    def __init__(self):
        self.name = "fast"


class Closing:
    """Counts how often one of its kind died."""

    died = 0

    def __init__(self, module: nn.Module | None = None):
        self.number, self.module = os.getpid(), module

    def __del__(self):
        Closing.died += 1


FAST = Mode()


class KnowsItsObject(Net):
    def __init__(self):
        super().__init__()
        self.mode = FAST

    def forward(self, x):
        return super().forward(x) if self.mode is FAST else -x


class KnowsItsFunction(Net):
    def __init__(self):
        super().__init__()
        self.function = F.relu
        self.pair = (F.relu, {"a": F.gelu})

    def forward(self, x):
        same = self.function is F.relu and self.pair[0] is F.relu and self.pair[1]["a"] is F.gelu
        return super().forward(x) if same else -x


class KnowsTheClass(Net):
    def forward(self, x):
        return super().forward(x) if type(self.act) is nn.ReLU else -x


class KnowsItsOwnClass(Net):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class ByModule(Net):
    def __init__(self):
        super().__init__()
        self.gain = {self.conv: 2.0}

    def forward(self, x):
        return super().forward(x) * self.gain[self.conv]


class Slotted(Net):
    __slots__ = ("__hidden", "gain")

    def __init__(self):
        super().__init__()
        self.gain, self.__hidden = 2.0, 3.0

    def forward(self, x):
        return super().forward(x) * self.gain * self.__hidden


class Sliced(Net):
    def forward(self, x):
        return self.head[1:](self.head[:1](self.act(self.conv(x))))


class CallsForward(Net):
    def forward(self, x):
        return self.head.forward(self.act.forward(self.conv.forward(x)))


class Recursive(nn.ReLU):
    def forward(self, x, again=True):
        return self.forward(x, False) if again else super().forward(x)


class CallsItself(Net):
    def __init__(self):
        super().__init__()
        self.act = Recursive()


class Doubled(nn.MultiheadAttention):
    def forward(self, x):
        found = super().forward(x, x, x)[0]
        return 2 * found if self.training else found


class Attentive(Net):
    def __init__(self):
        super().__init__()
        self.attend = Doubled(6, 2, batch_first=True).double()
        self.eval()

    def forward(self, x):
        found = self.act(self.conv(x))
        return self.head(self.attend(found.flatten(2).mT).mT.unflatten(2, found.shape[2:]))


class Signed(Net):
    def forward(self, x):
        return super().forward(x) if [*inspect.signature(self.conv.forward).parameters] == ["input"] else -x


MODELS = [
    KnowsItsObject,
    KnowsItsFunction,
    KnowsTheClass,
    KnowsItsOwnClass,
    ByModule,
    Slotted,
    Sliced,
    CallsForward,
    CallsItself,
    Attentive,
    Signed,
]


def by_hand(model: nn.Module, layer: str, target: int) -> Tensor:
    """Grad-CAM without its ReLU, by a hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out))
    output = model(X)
    handle.remove()
    (slope,) = torch.autograd.grad(output[:, target].sum(), seen)
    return (slope.mean((2, 3), keepdim=True) * seen[0]).sum(1).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_the_copy_computes_what_the_model_computes(kind):
    model = kind()
    assert_close(camfn.pure(model)(camfn.state_of(model), X), model(X).detach(), 1e-12)
    assert_close(camfn.tap(model, "act")(camfn.state_of(model), X).output, model(X).detach(), 1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_its_map_is_that_of_plain_hooks(kind):
    model = kind()
    layer = "conv" if kind is CallsForward else "act"
    found = camfn.grad_cam(model, layer, X, 1, relu=False, normalize=False)
    if kind is not CallsForward:  # whose layers no hook sees
        assert_close(found, by_hand(model, layer, 1), 1e-12)
    else:
        assert_close(found, by_hand(Net(), layer, 1), 1e-12)


class Recorder:
    def __init__(self, kept):
        self.kept = kept

    def __call__(self, *given) -> None:
        put(self.kept)


COUNTED = {
    "object": Recorder,
    "bound method": lambda kept: Recorder(kept).__call__,
    "closure": lambda kept: lambda module, args, out: put(kept),
    "default": lambda kept: lambda module, args, out, kept=kept: put(kept),
    "partial": lambda kept: functools.partial(lambda kept, module, args, out: put(kept), kept),
    "function in a closure": lambda kept: (lambda inner: lambda module, args, out: inner())(lambda: put(kept)),
}


def put(kept) -> None:
    getattr(kept, "append", getattr(kept, "add", None) or (lambda one: kept.update({one: one})))(1)


@pytest.mark.parametrize("make", [list, dict, set, collections.deque, bytearray])
@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("method", ["grad_cam", "score_cam"])
def test_a_container_that_a_hook_fills_is_not_filled_by_a_call(kind, make, method):
    model, kept = Net(), make()
    model.act.register_forward_hook(COUNTED[kind](kept))
    for called in (model, camfn.prepare(model)):
        getattr(camfn, method)(called, "act", X, 1)
        assert not kept
    model(X)
    assert kept


class ByMethod(Net):
    def __init__(self):
        super().__init__()
        self.run = self.act.forward

    def forward(self, x):
        return self.head(self.run(self.conv(x)))


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
def test_a_port_lies_in_a_forward_that_is_kept_as_a_bound_method(method):
    for model in (ByMethod(), camfn.prepare(ByMethod())):
        assert_close(getattr(camfn, method)(model, "act", X, 1), getattr(camfn, method)(Net(), "act", X, 1), 1e-12)


class FromInferenceMode(Net):
    """What the state does not reach, made in inference mode: a layer in a list, a parameter, and a plain tensor."""

    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.held = [nn.Conv2d(6, 6, 1, dtype=torch.float64), nn.Parameter(torch.full((6, 1, 1), 2.0)), torch.ones(6, 1, 1)]

    def forward(self, x):
        conv, gain, shift = self.held
        return self.head(conv(self.act(self.conv(x))).tanh() * gain * (shift + 0.5))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", ["grad_cam", "shapley_cam", "lift_cam", "opti_cam"])
def test_unregistered_tensors_of_inference_mode_enter_a_graph(method, inside):
    model = FromInferenceMode()
    options = {"layout": "channels_first", "normalize": False}
    with torch.inference_mode(inside):
        found = getattr(camfn, method)(model, "conv", X, 1, **options)
    model.held = nn.ParameterList([nn.Parameter(t.clone()) for t in (*model.held[0].parameters(), *model.held[1:])])
    model.forward = types.MethodType(with_held_tensors, model)
    assert_close(found, getattr(camfn, method)(model, "conv", X, 1, **options), 1e-12)


def with_held_tensors(self, x):
    weight, bias, gain, shift = self.held
    return self.head(F.conv2d(self.act(self.conv(x)), weight, bias).tanh() * gain * (shift + 0.5))


def test_no_subclass_is_made():
    made = []

    class Registered(nn.Module):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            made.append(cls)

    class Act(Registered):
        def forward(self, x):
            return x.relu()

    model = Net()
    model.act = Act()
    for layer in ("act", None):
        camfn.grad_cam(model, layer, X, 1) if layer else camfn.candidate_layers(model, X)
    assert made == [Act]


@pytest.mark.parametrize("leads_to_a_module", [False, True])
def test_no_destructor_of_a_copied_object_runs(leads_to_a_module):
    model = Net()
    model.log = Closing(model.conv if leads_to_a_module else None)
    before = Closing.died
    camfn.grad_cam(model, "act", X, 1)
    assert Closing.died == before


# --------------------------------------------------------------------------------------------------------------- hooks


class Recorded(Net):
    """Reads its features from a forward hook, as transformers' hidden states are read."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.act.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.kept["act"] = out

    def forward(self, x):
        self.act(self.conv(x))
        return self.head(self.kept["act"])


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "ablation_cam", "recipro_cam", "lift_cam"])
def test_what_a_hook_records_is_what_goes_on(method):
    model, plain = Recorded(), Net()
    function = camfn.METHODS[method].function
    found, expected = (function(m, "act", X, 1, relu=False, normalize=False) for m in (model, plain))
    assert_close(found, expected, 1e-12)


def test_what_a_hook_records_is_nudged_and_swapped():
    model = Recorded()
    f, state = camfn.tap(model, "act"), camfn.state_of(model)
    seen = f(state, X).seen
    assert_close(f(state, X, swap=2 * seen).output, model.head(2 * seen).detach(), 1e-12)
    assert_close(f(state, X, seen).output, model.head(2 * seen).detach(), 1e-12)


def test_a_hook_that_returns_another_output_comes_after_the_port():
    model = Net()
    model.act.register_forward_hook(lambda module, args, out: 3 * out)
    output, seen = camfn.tap(model, "act")(camfn.state_of(model), X)
    assert_close(seen, model.conv(X).relu().detach(), 0)
    assert_close(output, model(X).detach(), 1e-12)


# ------------------------------------------------------------------------------------------- what cannot be read at


class Around(nn.ReLU):
    def __call__(self, x):
        return x.relu()


class ByProperty(nn.Module):
    @property
    def forward(self):
        return torch.relu


@pytest.mark.parametrize(
    ("kind", "said"), [(Around, "`__call__` of its class, Around"), (ByProperty, "`forward` is a property")]
)
def test_a_layer_whose_forward_is_not_reached_is_refused(kind, said):
    model = Net()
    model.act = kind()
    with pytest.raises(CamError, match=said):
        camfn.grad_cam(model, "act", X, 1)
    assert camfn.grad_cam(model, "conv", X, 1).shape == (2, 5, 5)
    assert camfn.candidate_layers(model, X)


@pytest.mark.parametrize("slotted", [False, True])
@pytest.mark.parametrize("of", [lambda model: model, camfn.prepare], ids=["plain", "prepared"])
def test_a_destructor_runs_for_the_caller_s_module_alone(of, slotted):
    closed = []

    class Owns(nn.Conv2d):
        def __del__(self):
            closed.append(type(self))

    class Slotted(Owns):
        __slots__ = ("handle",)

    torch.manual_seed(0)
    layer = (Slotted if slotted else Owns)(3, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    if slotted:
        with pytest.raises(camfn.CamError, match=r"destructor and __slots__"):
            camfn.score_cam(of(model), "1", torch.randn(1, 3, 8, 8), 1)
    else:
        held = of(model)
        for method in (camfn.score_cam, camfn.grad_cam, camfn.ablation_cam):
            method(held, "1", torch.randn(1, 3, 8, 8), 1)
        del held
    gc.collect()
    assert not closed
    del model, layer
    gc.collect()
    assert len(closed) == 1
