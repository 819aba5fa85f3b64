"""Nothing of one call is left for another: not a head, not a fact, not a tensor that a forward wrote to."""

import copy
import enum
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError
from tests.oracles.closeness import assert_close

X = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
HEADS = pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam", "lift_cam"])
MAPS = ["grad_cam", "score_cam", "ablation_cam", "recipro_cam", "lift_cam"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        self.double().eval()

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def raw(method: str, model: nn.Module, x=X, **options) -> Tensor:
    return camfn.METHODS[method].function(model, "act", x, 1, normalize=False, relu=False, **options)


class Mode(enum.Enum):
    WEAK, STRONG = 1.0, 5.0


class Knob(Net):
    setting = 1.0

    def strength(self) -> float:
        return self.setting.value if isinstance(self.setting, Mode) else float(self.setting)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.features(x) * self.strength()))


@HEADS
@pytest.mark.parametrize("values", [(Mode.WEAK, Mode.STRONG), (np.float64(1), np.float64(5)), (1.0, 5.0)])
@pytest.mark.parametrize("of_class", [False, True])
def test_a_setting_that_changed_counts(method, values, of_class):
    class Own(Knob):
        pass

    method = "recipro_cam" if method == "lift_cam" else method  # which has no rule for tanh of two slopes
    model, fresh = Own(), Own()
    owner = Own if of_class else model
    owner.setting = values[0]
    before = raw(method, model)
    owner.setting = fresh.setting = values[1]
    assert_close(raw(method, model), raw(method, fresh), 1e-12)
    assert (raw(method, model) - before).abs().max() > 1e-3


@HEADS
def test_a_forward_that_was_edited_counts(method, monkeypatch):
    model = Net()
    raw(method, model)
    monkeypatch.setattr(Net, "forward", lambda self, x: self.head(3 * self.features(x)))
    assert_close(raw(method, model), raw(method, Net()), 1e-12)


class FromInput(Net):
    def forward(self, x):
        largest = x.abs().amax().item()
        return self.head(self.features(x) * largest)


class FromBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("gate", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        gate = self.gate.item()
        return self.head(self.features(x) * gate)


@HEADS
def test_a_value_that_is_read_in_python_is_that_of_this_call(method):
    model, fresh = FromInput(), FromInput()
    raw(method, model)
    assert_close(raw(method, model, 3 * X), raw(method, fresh, 3 * X), 1e-12)
    model, fresh = FromBuffer(), FromBuffer()
    fresh.gate.fill_(5.0)
    raw(method, model)
    state = {**camfn.state_of(model), "gate": torch.tensor(5.0, dtype=torch.float64)}
    assert_close(raw(method, model, state=state), raw(method, fresh), 1e-12)
    model.gate.fill_(5.0)
    assert_close(raw(method, model), raw(method, fresh), 1e-12)


class ReZero(Net):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        found = self.features(x)
        return self.head(found + self.alpha * found.mean(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:the model's output for an input depends:camfn.CamWarning")
def test_whether_samples_depend_on_their_batch_is_found_in_each_call():
    model = ReZero()
    raw("score_cam", model)
    model.alpha.data.fill_(5.0)
    assert_close(raw("score_cam", model), raw("score_cam", model, sweep=camfn.Sweep(chunk=1)), 1e-12)


class Texts(Net):
    def forward(self, x, texts):
        return self.head[:2](self.features(x)) @ texts.T


@pytest.mark.filterwarnings("ignore:the model's output for an input depends:camfn.CamWarning")  # of equal texts
def test_whether_an_input_has_a_row_for_each_image_is_found_in_each_call():
    model, texts = Texts(), 20 * torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    camfn.score_cam(model, "act", (X, torch.ones_like(texts)), 0)
    found, fresh = (camfn.score_cam(m, "act", (X, texts), 0, normalize=False) for m in (model, copy.deepcopy(model)))
    assert_close(found, fresh, 1e-12)


def test_companion_inputs_of_another_length():
    class Support(Net):
        def forward(self, x, support):
            away = (self.head[:2](self.features(x)) - support.sum(0) / len(support)).square()
            return torch.stack([-away.sum(1), away[:, 0]], 1)

    model, one, five = Support(), torch.randn(1, 6).double(), torch.randn(5, 6).double()
    raw("recipro_cam", model, (X, one))
    assert_close(raw("recipro_cam", model, (X, five)), raw("recipro_cam", Support(), (X, five)), 1e-12)


@pytest.mark.parametrize("method", MAPS)
def test_calls_leave_nothing_behind(method):
    model = Net()
    raw(method, model)
    gc.collect()
    before = sum(type(thing) is Net for thing in gc.get_objects())
    for _ in range(5):
        raw(method, model)
    gc.collect()
    assert sum(type(thing) is Net for thing in gc.get_objects()) <= before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# -------------------------------------------------------------------------------------------------- what is written to


class Writes(Net):
    def forward(self, x, texts):
        x.sub_(0.5)
        texts += 1.0
        return self.head[:2](self.features(x)) @ texts.T


class Same(Net):
    def forward(self, x, texts):
        return self.head[:2](self.features(x - 0.5)) @ (texts + 1.0).T


@pytest.mark.parametrize("method", [*MAPS, "is_cam", "opti_cam", "cameras", "poly_cam", "smooth_grad_cam_pp"])
def test_inputs_that_the_model_writes_to_are_copies(method):
    x, texts = X.clone(), torch.linspace(-1, 1, 24).double().reshape(4, 6)
    kept = texts.clone()
    options = {"opti_cam": {"steps": 2}, "cameras": {"factors": (1.5,)}}.get(method, {})
    found = raw(method, Writes(), (x, texts), **options)
    assert torch.equal(x, X)
    assert torch.equal(texts, kept)
    assert_close(found, raw(method, Same(), (X, kept), **options), 1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: camfn.pure(model)(camfn.state_of(model), x),
        lambda model, x: camfn.tap(model, "act")(camfn.state_of(model), x),
        lambda model, x: camfn.candidate_layers(model, x),
        lambda model, x: camfn.explain(model, "act", x, 1, method=["grad_cam", "score_cam"]),
    ],
)
def test_every_forward_works_on_copies(call):
    x = X.clone(), torch.ones(4, 6).double()
    call(Writes(), x)
    assert torch.equal(x[0], X)
    assert torch.equal(x[1], torch.ones(4, 6).double())


def test_a_score_that_is_not_finite_leaves_the_input_alone():
    class Bad(Writes):
        def forward(self, x, texts):
            return super().forward(x, texts) / 0

    x = X.clone(), torch.ones(4, 6).double()
    with pytest.raises(CamError, match="the score is not finite"):
        raw("grad_cam", Bad(), x)
    assert torch.equal(x[0], X)


# -------------------------------------------------------------------------------------------------- order, recipes


def test_what_explain_checks_does_not_hang_on_the_order_of_methods():
    class Two(Net):
        def forward(self, x, y):
            return self.head(self.features(x) + self.conv(y))

    for order in (["grad_cam", "score_cam"], ["score_cam", "grad_cam"]):
        with pytest.raises(CamError, match="masked= must say which input to mask"):
            camfn.explain(Two(), "act", (X, X), 1, method=order)


@pytest.mark.parametrize("field", ["masks", "score", "weights", "flat"])
def test_a_recipe_with_a_wrong_word(field):
    recipe = camfn.RECIPES["torchcam"]._replace(**{field: "sofmax"})
    with pytest.raises(CamError, match=f"a recipe's {field} must be .*found 'sofmax'"):
        camfn.score_cam(Net(), "act", X, 1, recipe=recipe)
