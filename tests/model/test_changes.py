"""What is changed between calls counts: code, settings, inputs, batches, caches.

A plain call sees all of it, and a prepared one what is not of the model's structure, as `camfn.pure` of it shows.
"""

import argparse
import enum
import fractions
import functools
import gc
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import camfn
from camfn import Sweep
from tests.oracles.loops import grad_cam_loop, score_cam_loop
from tests.oracles.tiny import BOTH, NEAR, Net, agree, filled, off, prepared, raw
from tests.oracles.tiny import images as images_of

# A value that is read of a whole batch depends on the others of it; that is not what is asked here.
pytestmark = pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")

RECORDED = ("ablation_cam", "recipro_cam", "lift_cam")
both = pytest.mark.parametrize("of", BOTH)
images = functools.partial(images_of, side=8)  # nine positions at the layer


# ------------------------------------------------------------------------------- code and settings, changed between calls


class Mode(enum.Enum):
    ONE, FIVE = 1, 2


GLOBAL = {"k": 1.0}
NUMBER = 1.0


class Knob(Net):
    """What is after the layer is times a number that is read in some way."""

    k = 1.0

    def knob(self):
        return 1.0

    def forward(self, x):
        return self.head(torch.sigmoid(self.feats(x) * self.knob()))


def put(value):
    return lambda model, cls: setattr(model, "a", value)


def inside(model, cls):
    model.a.k = 5.0


def deep(model, cls):
    model.a["of"][0].k = 5.0


def global_number(value):
    return lambda model, cls: globals().update(NUMBER=value)


KNOBS = {
    "a method is replaced": (lambda self: 1.0, put(0), lambda model, cls: setattr(cls, "knob", lambda self: 5.0)),
    "a class attribute": (
        lambda self: self.k,
        lambda model, cls: setattr(cls, "k", 1.0),
        lambda m, cls: setattr(cls, "k", 5.0),
    ),
    "a dictionary of the module": (
        lambda self: GLOBAL["k"],
        lambda model, cls: GLOBAL.update(k=1.0),
        lambda model, cls: GLOBAL.update(k=5.0),
    ),
    "a number of the module": (lambda self: NUMBER, global_number(1.0), global_number(5.0)),
    "an enum": (lambda self: {Mode.ONE: 1.0, Mode.FIVE: 5.0}[self.a], put(Mode.ONE), put(Mode.FIVE)),
    "a namespace": (lambda self: self.a.k, put(argparse.Namespace(k=1.0)), put(argparse.Namespace(k=5.0))),
    "inside a namespace": (lambda self: self.a.k, lambda m, cls: setattr(m, "a", argparse.Namespace(k=1.0)), inside),
    "inside a simple namespace": (lambda self: self.a.k, lambda m, cls: setattr(m, "a", types.SimpleNamespace(k=1.0)), inside),
    "deep inside": (
        lambda self: self.a["of"][0].k,
        lambda model, cls: setattr(model, "a", {"of": [types.SimpleNamespace(k=1.0)]}),
        deep,
    ),
    "a NumPy scalar": (lambda self: float(self.a), put(np.float64(1)), put(np.float64(5))),
    "a NumPy array": (lambda self: torch.tensor(self.a), put(np.array([1.0])), put(np.array([5.0]))),
    "inside a NumPy array": (
        lambda self: torch.tensor(self.a),
        lambda model, cls: setattr(model, "a", np.array([1.0])),
        lambda model, cls: model.a.fill(5.0),
    ),
    "a fraction": (lambda self: float(self.a), put(fractions.Fraction(1)), put(fractions.Fraction(5))),
    "a range": (lambda self: float(len(self.a)), put(range(1)), put(range(5))),
    "a function": (lambda self: self.a(), put(lambda: 1.0), put(lambda: 5.0)),
    "a partial": (lambda self: self.a(), put(functools.partial(float, 1)), put(functools.partial(float, 5))),
    "a plain tensor": (lambda self: self.a, put(torch.tensor(1.0)), put(torch.tensor(5.0))),
    "inside a plain tensor": (
        lambda self: self.a,
        lambda model, cls: setattr(model, "a", torch.tensor(1.0)),
        lambda model, cls: model.a.fill_(5.0),
    ),
    "a float": (lambda self: self.a, put(1.0), put(5.0)),
    "torch's default": (
        lambda self: 1.0 if torch.get_default_dtype() == torch.float32 else 5.0,
        lambda model, cls: torch.set_default_dtype(torch.float32),
        lambda model, cls: torch.set_default_dtype(torch.float64),
    ),
}


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_default_dtype(torch.float32)
    globals().update(NUMBER=1.0)
    GLOBAL.update(k=1.0)


def knobbed(row):
    knob, before, after = KNOBS[row]

    class Own(Knob):
        pass

    Own.knob = knob
    model = filled(Own())
    before(model, Own)
    return model, functools.partial(after, model, Own)


def fixed(k):
    """The same network with a number in the place of the knob."""

    class Fixed(Knob):
        def knob(self):
            return k

    return filled(Fixed())


@pytest.mark.parametrize("method", ["lift_cam"])
@pytest.mark.parametrize("row", KNOBS)
def test_a_plain_call_sees_what_was_changed(row, method):
    model, change = knobbed(row)
    agree(method, model, fixed(1.0), images())
    change()
    agree(method, model, fixed(5.0), images())


@pytest.mark.parametrize("method", ["recipro_cam"])
@pytest.mark.parametrize("row", KNOBS)
def test_a_prepared_model_agrees_with_itself_after_a_change(row, method):
    model, change = knobbed(row)
    subject = prepared(model)
    agree(method, subject, fixed(1.0), images())
    change()
    output = camfn.pure(subject)(camfn.state_of(subject), images())
    near = [k for k in (1.0, 5.0) if off(output, fixed(k)(images())) <= NEAR]
    assert len(near) == 1
    agree(method, subject, fixed(near[0]), images())


def test_the_knob_counts():
    assert off(raw("recipro_cam", fixed(1.0), "act", images()), raw("recipro_cam", fixed(5.0), "act", images())) > 1e-3


CODE = ["a method is replaced", "a class attribute", "a dictionary of the module", "a number of the module", "torch's default"]


@pytest.mark.parametrize("method", ["score_cam", "recipro_cam"])
@pytest.mark.parametrize("row", CODE)
def test_a_prepared_model_sees_what_is_not_of_its_structure(row, method):
    model, change = knobbed(row)
    subject = prepared(model)
    for _ in range(2):
        agree(method, subject, fixed(1.0), images())
    change()
    for _ in range(2):
        agree(method, subject, fixed(5.0), images())


@pytest.mark.parametrize("method", ["grad_cam", "score_cam", *RECORDED])
def test_the_forward_of_a_prepared_class_is_edited(method):
    class Edited(Net):
        pass

    class New(Net):
        def forward(self, x):
            h = self.feats(x)
            return self.head(h * torch.linspace(0, 3, h.shape[-1], dtype=h.dtype))

    subject = prepared(filled(Edited()))
    agree(method, subject, filled(Net()), images())
    Edited.forward = New.forward
    for _ in range(2):
        agree(method, subject, filled(New()), images())


def test_the_layer_of_a_class_is_edited_while_prepared():
    class Act(nn.Module):
        def forward(self, x):
            return x.relu()

    def net():
        model = filled(Net())
        model.act = Act()
        return model

    subject = prepared(net())
    first = raw("recipro_cam", subject, "act", images())
    Act.forward = lambda self, x: x.tanh()
    want = raw("recipro_cam", net(), "act", images())
    assert off(first, want) > 1e-3
    assert off(raw("recipro_cam", subject, "act", images()), want) <= NEAR


# --------------------------------------------------------------------------------------------------- companion inputs


class Proto(Net):
    """Few-shot: how near an image is to the mean of its support set, of any size. The twin takes the mean."""

    def mean(self, support):
        return support.sum(0) / len(support)

    def forward(self, x, support):
        d = (self.feats(x).mean((2, 3)) - self.mean(support)).pow(2)
        return torch.stack([-d.sum(1), d[:, 0]], 1)


class Mean(Proto):
    def mean(self, support):
        return support.mean(0)


class Normed(Proto):
    def mean(self, support):
        return nn.functional.normalize(support, dim=1).mean(0)


def rows(n, seed=2):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@both
@pytest.mark.parametrize("method", ["recipro_cam"])
@pytest.mark.parametrize("made", [Proto, Normed], ids=lambda made: made.__name__)
def test_a_companion_input_of_another_number_of_rows(made, method, of):
    subject = of(filled(made()))
    for n in (1, 5, 2, 1, 5):
        twin = filled(Mean() if made is Proto else Normed())
        agree(method, subject, twin, (images(), rows(n)))


class NumPySide(Net):
    """One number of a long array is read."""

    def forward(self, x, a):
        return self.head(torch.sigmoid(self.feats(x) * torch.as_tensor(a[2000], dtype=x.dtype)))


class TensorSide(Net):
    def forward(self, x, a):
        return self.head(torch.sigmoid(self.feats(x) * a))


def long(value):
    array = np.zeros(5000)
    array[2000] = value
    return array


@both
@pytest.mark.parametrize("method", ["recipro_cam", "lift_cam"])
def test_a_side_input_of_numpy(method, of):
    subject, twin, array = of(filled(NumPySide())), filled(TensorSide()), long(1)
    agree(method, subject, twin_with(twin, 1.0), (images(), array))
    agree(method, subject, twin_with(twin, 5.0), (images(), long(5)))
    array[2000] = 3
    agree(method, subject, twin_with(twin, 3.0), (images(), array))


def twin_with(twin, value):
    """The twin takes the image, and ignores what comes with it."""

    class Given(Net):
        def forward(self, x, a):
            return self.head(torch.sigmoid(self.feats(x) * value))

    given = filled(Given())
    given.load_state_dict(twin.state_dict())
    return given


@both
@pytest.mark.parametrize("method", ["recipro_cam"])
@pytest.mark.parametrize(
    "side", [{"k": 2.0}, [2.0], (2.0,), 2.0, argparse.Namespace(k=2.0)], ids=lambda side: type(side).__name__
)
def test_a_side_input_of_python(side, method, of):
    class Takes(Net):
        def forward(self, x, side):
            k = vars(side)["k"] if isinstance(side, argparse.Namespace) else side
            k = k if isinstance(k, float) else k["k"] if isinstance(k, dict) else k[0]
            return self.head(torch.sigmoid(self.feats(x) * k))

    def changed(side):
        if isinstance(side, float):
            return 5.0
        if isinstance(side, argparse.Namespace):
            return argparse.Namespace(k=5.0)
        return {"k": 5.0} if isinstance(side, dict) else type(side)([5.0])

    subject = of(filled(Takes()))
    for given, k in ((side, 2.0), (changed(side), 5.0), (side, 2.0)):
        agree(method, subject, twin_with(fixed(k), k), (images(), given))


# ------------------------------------------------------------------------------------------- what is found of a batch


class ReZero(Net):
    """At initialisation no image depends on the others."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        f = self.feats(x)
        return self.head(f + self.alpha * f.mean(0, keepdim=True))


@both
@pytest.mark.parametrize("how", ["data", "state", "load_state_dict"])
@pytest.mark.parametrize("method", ["score_cam", "rise"])
def test_whether_images_depend_on_each_other_is_found_in_each_call(method, how, of):
    model, twin = filled(ReZero()), filled(ReZero())
    model.alpha.data.zero_()
    twin.alpha.data.fill_(5.0)
    subject, state = of(model), camfn.state_of(twin)
    raw(method, subject, "act", images())
    if how == "data":
        model.alpha.data.fill_(5.0)
    if how == "load_state_dict":
        model.load_state_dict(twin.state_dict())
    with pytest.warns(camfn.CamWarning, match="depends on the others of its batch"):
        found = raw(method, subject, "act", images(), **({"state": state} if how == "state" else {}))
    assert off(found, raw(method, twin, "act", images())) <= NEAR
    assert off(found, raw(method, twin, "act", images(), sweep=Sweep(fold=False))) <= 1e-6


@both
def test_and_that_they_do_not_any_more(of):
    model = filled(ReZero())
    model.alpha.data.fill_(5.0)
    subject = of(model)
    with pytest.warns(camfn.CamWarning, match="depends on the others of its batch"):
        raw("score_cam", subject, "act", images())
    model.alpha.data.zero_()
    twin = filled(Net())
    want = score_cam_loop(twin, "act", images(), lambda y, i: y[1:2], raw=True)[:, 0]
    found = raw("score_cam", subject, "act", images(), relu=True)
    assert off(found, want) <= 1e-6


class Clip(Net):
    """Similarities to texts: two images and two texts, of which neither is for one image."""

    def forward(self, x, t):
        return self.feats(x).mean((2, 3)) @ t.T


class Rowed(Net):
    def forward(self, x, t):
        return self.head(self.feats(x) * t[:, :, None, None])


@both
@pytest.mark.parametrize("method", ["score_cam", "recipro_cam"])
@pytest.mark.parametrize("made", [Clip, Rowed], ids=lambda made: made.__name__)
def test_whether_a_companion_has_a_row_for_each_image_is_found_in_each_call(made, method, of):
    subject, twin = of(filled(made())), filled(made())
    equal, texts = torch.ones(2, 6, dtype=torch.float64), rows(2, seed=8)
    raw(method, subject, "act", (images(), equal), 0)
    want = raw(method, twin, "act", (images(), texts))
    found = raw(method, subject, "act", (images(), texts))
    assert off(found, want) <= NEAR
    if made is Clip:
        one_by_one = torch.cat([raw(method, filled(Clip()), "act", (images()[i : i + 1], texts)) for i in range(2)])
        assert off(found, one_by_one) <= 1e-8
    else:
        one_by_one = torch.cat([raw(method, filled(Rowed()), "act", (images()[i : i + 1], texts[i : i + 1])) for i in range(2)])
        assert off(found, one_by_one) <= 1e-8


@both
def test_a_norm_that_merges_is_looked_at_in_each_call(of):
    """With other statistics a rewritten model may not agree, or must be rewritten anew."""
    model = filled(Net())
    subject = of(model)
    raw("score_cam", subject, "act", images())
    for scale in (3.0, 1e-3, 1e3):
        model.bn.running_var.data.mul_(scale)
        model.bn.weight.data.mul_(-scale)
        twin = filled(Net())
        twin.load_state_dict(model.state_dict())
        want = score_cam_loop(twin, "act", images(), lambda y, i: y[1:2], raw=True)[:, 0]
        assert off(raw("score_cam", subject, "act", images(), relu=True), want) <= 1e-6


# --------------------------------------------------------------------------------------- threads, NumPy, other tensors


class InThread(Net):
    def forward(self, x):
        f = self.feats(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.head, f).result()


@both
@pytest.mark.parametrize("method", ["recipro_cam", "lift_cam"])
def test_all_that_is_after_the_layer_runs_in_a_thread(method, of):
    subject = of(filled(InThread()))
    for seed, size in ((1, 1.0), (3, 3.0)):
        agree(method, subject, filled(Net()), size * images(seed=seed), may_refuse=method == "lift_cam")


def test_a_forward_in_a_thread_by_plain_loops():
    twin = filled(Net())
    for method, loop in (("grad_cam", grad_cam_loop), ("score_cam", score_cam_loop)):
        options = {"raw": True} if method == "score_cam" else {}
        want = loop(twin, "act", images(), lambda y, i: y[1:2], **options)[:, 0]
        assert off(raw(method, filled(InThread()), "act", images(), relu=True), want) <= 1e-6


CACHE = {}


class Remembers(Net):
    """Keeps what it made for the first input of a shape, outside itself."""

    def forward(self, x):
        grid = CACHE.setdefault(tuple(x.shape[-2:]), torch.linspace(0, 1, x.shape[-1], dtype=x.dtype))
        return self.head(self.feats(x * grid))


class MakesAnew(Net):
    def forward(self, x):
        return self.head(self.feats(x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)))


@both
@pytest.mark.parametrize("method", ["recipro_cam"])
def test_a_cache_of_the_users_may_be_filled_and_changed(method, of):
    CACHE.clear()
    subject = of(filled(Remembers()))
    agree(method, subject, filled(MakesAnew()), images())
    agree(method, subject, filled(MakesAnew()), images(seed=2))
    CACHE[8, 8] = torch.ones(8, dtype=torch.float64)
    agree(method, subject, filled(Net()), images())
    CACHE[8, 8].zero_().add_(1.0).mul_(0.5)
    found = camfn.pure(subject)(camfn.state_of(subject), images())
    assert off(found, filled(Net())(0.5 * images())) <= NEAR
    CACHE.clear()


# ----------------------------------------------------------------------------------------------------- memory, order


class Tabled(Net):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(5, 20_000)

    def forward(self, x):
        return super().forward(x) + self.table.sum(1)


@both
@pytest.mark.parametrize("method", ["recipro_cam"])
def test_no_copy_of_a_plain_tensor_is_left_by_a_call(method, of):
    def large():
        gc.collect()
        return sum(t.numel() >= 100_000 for t in gc.get_objects() if type(t) is torch.Tensor)

    before, live = large(), []
    subject = of(filled(Tabled()))
    for seed in range(5):
        raw(method, subject, "act", images(seed=seed))
        live.append(large())
    assert len(set(live[2:])) == 1
    assert live[-1] - before <= 4


EACH = ("grad_cam", "score_cam", *RECORDED)


@both
def test_the_maps_of_explain_do_not_depend_on_the_order(of):
    subject = of(filled(Net()))
    alone = {method: raw(method, filled(Net()), "act", images()) for method in EACH}
    for methods in (EACH, EACH[::-1], EACH[2:] + EACH[:2]):
        cards = camfn.explain(subject, "act", images(), 1, method=list(methods), relu=False, normalize=False)
        for card in cards:
            assert off(card.maps, alone[card.method]) <= NEAR
