"""A prepared model is a value that the caller keeps. It gives what a plain call gives of the model as it is now, but for its
structure, which is that of when it was made; and nothing is kept anywhere else."""

import collections
import contextlib
import copy
import functools
import gc
import inspect
import re
import weakref

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap

import camfn
from camfn import CamError, Sweep, _compat
from camfn.testing.threads import at_once
from tests.oracles.networks import LAYERED
from tests.oracles.tiny import BOTH, NEAR, Net, filled, images, off, plain, prepared, raw
from tests.oracles.vits import Patches

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps at layer '.*' are flat:camfn.CamWarning"),
    pytest.mark.filterwarnings("ignore:layer=None:camfn.CamWarning"),
]

FEW = ("grad_cam", "score_cam", "recipro_cam", "lift_cam")
RECORDED = ("ablation_cam", "recipro_cam", "lift_cam")
both = pytest.mark.parametrize("of", BOTH)
few = pytest.mark.parametrize("method", FEW)
can_compile = pytest.mark.skipif(bool(_compat.can_compile()), reason=_compat.can_compile() or "-")


def fresh(model: nn.Module) -> nn.Module:
    """The same model as it is now, of which no call knows anything."""
    return copy.deepcopy(model)


# -------------------------------------------------------------------------------------------------------- the value


def test_what_is_prepared_is_prepared_already():
    once = camfn.prepare(filled(Net()))
    assert isinstance(once, camfn.Prepared)
    assert camfn.prepare(once) is once
    assert not isinstance(once, nn.Module)
    assert {"prepare", "Prepared"} <= set(camfn.__all__)


@pytest.mark.parametrize("model", ["resnet18", None, torch.ones(3), Net])
def test_what_is_no_model_cannot_be_prepared(model):
    with pytest.raises(CamError, match=r"model must be a torch.nn.Module, found"):
        camfn.prepare(model)


@pytest.mark.parametrize("limit", [-1, 1.5, "many", True])
def test_a_limit_is_a_number_of_things(limit):
    with pytest.raises(CamError, match="limit"):
        camfn.prepare(filled(Net()), limit=limit)


def test_it_says_of_what_model_and_how_many_bytes():
    subject = camfn.prepare(filled(Net()))
    for _ in range(2):
        assert "Net" in repr(subject)
        assert re.search(r"\d[\d.,_]* ?([kKMGT]i?)?(B|bytes?)\b", repr(subject)), repr(subject)
        assert len(repr(subject)) < 300
        raw("recipro_cam", subject, "act", images())


def test_its_first_lines_say_that_it_is_a_snapshot():
    told = " ".join((camfn.Prepared.__doc__ or "").split())[:600]
    for word in ("snapshot", "submodule", "attribute", "parameter"):
        assert word in told


def test_making_one_leaves_the_model_alone():
    model = filled(Net()).train()
    before = [(id(t), t._version) for t in (*model.parameters(), *model.buffers())], list(vars(model))
    subject = camfn.prepare(model)
    raw("score_cam", subject, "act", images())
    assert model.training
    assert before == ([(id(t), t._version) for t in (*model.parameters(), *model.buffers())], list(vars(model)))


# ---------------------------------------------------------------------------------------- it goes where a model goes


@pytest.mark.parametrize("method", LAYERED)
def test_every_method_takes_it(method):
    model, x = filled(Net()), images()
    subject, want = camfn.prepare(model), raw(method, fresh(model), "act", x)
    for _ in range(3):
        assert off(raw(method, subject, "act", x), want) <= NEAR
    assert off(raw(method, subject, "act", images(seed=3)), raw(method, fresh(model), "act", images(seed=3))) <= NEAR


@pytest.mark.parametrize("method", [name for name in camfn.METHODS if name not in LAYERED])
def test_methods_of_attention_take_it(method):
    torch.manual_seed(0)
    model = filled(Patches())
    x, subject = torch.randn(2, 3, 8, 8).double(), camfn.prepare(model)
    want = raw(method, fresh(model), None, x)
    for _ in range(2):
        assert off(raw(method, subject, None, x), want) <= NEAR


def of_head(model, x):
    state, value = camfn.state_of(model), torch.linspace(0, 1, 300, dtype=torch.float64).reshape(2, 6, 5, 5)
    return camfn.head(model, "act", x, value)(state, x, value)


FUNCTIONS = {
    "tap": lambda model, x: camfn.tap(model, ("conv", "act"))(camfn.state_of(model), x),
    "pure": lambda model, x: camfn.pure(model)(camfn.state_of(model), x),
    "state_of": lambda model, x: camfn.state_of(model),
    "head": of_head,
    "explain": lambda model, x: camfn.explain(model, "act", x, 1).maps,
    "explain, several": lambda model, x: [c.maps for c in camfn.explain(model, "act", x, 1, method=FEW, relu=False)],
    "no layer": lambda model, x: raw("grad_cam", model, None, x),
    "several layers": lambda model, x: raw("score_cam", model, ("conv", "act"), x),
    "factorize": lambda model, x: camfn.factorize(model, "act", x, 1, concepts=2, steps=3).maps,
    "smooth": lambda model, x: camfn.smooth(camfn.grad_cam)(model, "act", x, 1, relu=False),
    "integrate": lambda model, x: camfn.integrate(camfn.grad_cam, steps=3)(model, "act", x, 1, relu=False),
    "augment": lambda model, x: camfn.augment(camfn.score_cam)(model, "act", x, 1),
    "multi_scale": lambda model, x: camfn.multi_scale(camfn.grad_cam, [12, 16])(model, "act", x, 1, relu=False),
    "fuse_layers": lambda model, x: camfn.fuse_layers(camfn.grad_cam, ("conv", "act"))(model, None, x, 1, relu=False),
    "ensemble": lambda model, x: camfn.ensemble([camfn.recipro_cam, camfn.mean_cam])(model, "act", x, 1),
    "of two": lambda model, x: camfn.smooth(camfn.augment(camfn.grad_cam))(model, "act", x, 1, relu=False),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_takes_it(function):
    model, x = filled(Net()), images()
    subject, want = camfn.prepare(model), FUNCTIONS[function](fresh(model), x)
    for _ in range(2):
        assert off(FUNCTIONS[function](subject, x), want) <= NEAR


def test_candidate_layers_of_it():
    model, x = filled(Net()), images()
    assert str(camfn.candidate_layers(camfn.prepare(model), x)) == str(camfn.candidate_layers(fresh(model), x))


def test_a_tap_and_a_head_and_a_pure_function_of_it_by_plain_torch():
    model, x = filled(Net()), images()
    subject, state = camfn.prepare(model), camfn.state_of(model)
    with torch.no_grad():
        features, output = model.feats(x), model(x)
        twice = model.head(2 * features)
    found, seen = camfn.tap(subject, "act")(state, x)
    assert off((found, seen), (output, features)) <= NEAR
    assert off(camfn.pure(subject)(state, x), output) <= NEAR
    assert off(camfn.tap(subject, "act")(state, x, None, 2 * features).output, twice) <= NEAR
    assert off(camfn.head(subject, "act", x, features)(state, x, 2 * features), twice) <= NEAR


@few
def test_layers_are_named_by_the_modules_of_the_original(method):
    model, x = filled(Net()), images()
    subject = camfn.prepare(model)
    assert off(raw(method, subject, model.act, x), raw(method, fresh(model), "act", x)) <= NEAR
    assert camfn.explain(subject, model.act, x, 1, method=method, relu=False).layers == ("act",)
    both_layers = raw("grad_cam", subject, (model.conv, "act"), x)
    assert off(both_layers, raw("grad_cam", fresh(model), ("conv", "act"), x)) <= NEAR
    with pytest.raises(CamError):
        raw(method, subject, filled(Net()).act, x)


def test_mistakes_are_told_as_of_a_plain_model():
    model, x = filled(Net()), images()
    calls = [
        lambda m: camfn.grad_cam(m, "acts", x, 1),
        lambda m: camfn.grad_cam(m, "act", x, 99),
        lambda m: camfn.grad_cam(m, "act", x, 1, state={"conv.weight": model.conv.weight}),
        lambda m: camfn.grad_cam(m, "act", x[0, 0], 1),
    ]
    subject = camfn.prepare(model)
    for call in calls:
        told = []
        for one in (model, subject):
            with pytest.raises(CamError) as caught:
                call(one)
            told.append(str(caught.value))
        assert told[0] == told[1]


def test_it_stands_for_the_module_inside_what_torch_wraps_around_one():
    model, x = filled(Net()), images()
    subject = camfn.prepare(nn.DataParallel(model))
    assert off(raw("score_cam", subject, "act", x), raw("score_cam", fresh(model), "act", x)) <= NEAR


def test_a_model_in_train_mode_is_explained_in_eval_mode():
    model, x = filled(Net()).train(), images()
    subject, want = camfn.prepare(model), raw("score_cam", filled(Net()), "act", x)
    for _ in range(2):
        assert off(raw("score_cam", subject, "act", x), want) <= NEAR
    assert model.training
    assert int(model.bn.num_batches_tracked) == 0


# -------------------------------------------------------------------------------------------- what of the model is seen


def trained(model):
    for _ in range(2):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
        model(images(seed=7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def with_data(model):
    for p in model.parameters():
        p.data = p.data * 1.7


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)


def by_numpy(model):
    for p in model.parameters():
        array = p.detach().numpy()
        array *= 1.7


def statistics(model):
    model.bn.running_mean.add_(1.0)
    model.bn.running_var.mul_(3.0)


def in_train_mode(model):
    model.train()
    model(images(seed=5))
    model.eval()


UPDATES = {
    "in place": in_place,
    "data =": with_data,
    "a fused optimizer": trained,
    "load_state_dict": lambda model: model.load_state_dict(filled(Net(), seed=9).state_dict()),
    "NumPy": by_numpy,
    "statistics": statistics,
    "a forward in train mode": in_train_mode,
    "nn.init": lambda model: nn.init.uniform_(model.head[2].weight),
    "float": lambda model: model.float(),
    "float and back": lambda model: model.float().double(),
    "to": lambda model: model.to(dtype=torch.float32, memory_format=torch.channels_last),
}


@few
@pytest.mark.parametrize("update", UPDATES)
def test_updates_of_tensors_are_seen(update, method):
    model = filled(Net())
    subject = camfn.prepare(model)
    old = raw(method, subject, "act", images())
    UPDATES[update](model)
    x = images().to(model.conv.weight.dtype)
    want = raw(method, fresh(model), "act", x)
    near = NEAR if x.dtype == torch.float64 else 1e-4
    for _ in range(2):
        assert off(raw(method, subject, "act", x), want) <= near
    assert raw(method, subject, "act", x).dtype == x.dtype
    if x.dtype == torch.float64 and "float" not in update:
        assert off(old, want) > 1e-3, "the update moves nothing"


@pytest.mark.parametrize("update", UPDATES)
def test_the_state_of_it_is_of_now(update):
    model = filled(Net())
    subject = camfn.prepare(model)
    UPDATES[update](model)
    state = camfn.state_of(subject)
    assert list(state) == list(camfn.state_of(model))
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
        assert not state[name].requires_grad
    x = images().to(model.conv.weight.dtype)
    assert off(camfn.pure(subject)(state, x), model(x)) <= 1e-5


@few
def test_another_state_is_used_for_one_call(method):
    model, x = filled(Net()), images()
    subject, other = camfn.prepare(model), filled(Net(), seed=4)
    for _ in range(2):
        found = raw(method, subject, "act", x, state=camfn.state_of(other))
        assert off(found, raw(method, other, "act", x)) <= NEAR
        assert off(raw(method, subject, "act", x), raw(method, fresh(model), "act", x)) <= NEAR


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.k, self.table = 1.0, [1.0, 2.0]

    def forward(self, x):
        return super().forward(x) * self.k + self.table[0]


def another_layer(model):
    model.act = nn.Tanh()


def a_deeper_layer(model):
    model.head[2] = filled(nn.Linear(6, 5), seed=8)


def another_parameter(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)


CHANGES = {
    "a submodule": another_layer,
    "one deeper": a_deeper_layer,
    "a number": lambda model: setattr(model, "k", 5.0),
    "an item of a list": lambda model: model.table.__setitem__(0, 9.0),
    "a parameter": another_parameter,
    "an option of a layer": lambda model: setattr(model.conv, "padding", (1, 1)),
    "a hook": lambda model: model.act.register_forward_hook(lambda module, args, out: -out),
    "a layer is gone": lambda model: delattr(model, "bn"),
}


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_structure_are_not_seen(change, before):
    model, x = filled(Scaled()), images()
    twin = fresh(model)
    subject = camfn.prepare(model)
    for _ in range(before):
        raw("recipro_cam", subject, "act", x)
    CHANGES[change](model)
    for method in FEW:
        assert off(raw(method, subject, "act", x), raw(method, twin, "act", x)) <= NEAR
    with torch.no_grad():
        assert off(camfn.pure(subject)(camfn.state_of(subject), x), twin(x)) <= NEAR


@pytest.mark.parametrize("change", ["a submodule", "a number", "a parameter", "an option of a layer"])
def test_changes_of_structure_are_seen_by_a_plain_call(change):
    model, x = filled(Scaled()), images()
    for method in FEW:
        raw(method, model, "act", x)
    CHANGES[change](model)
    for method in FEW:
        assert off(raw(method, model, "act", x), raw(method, fresh(model), "act", x)) <= NEAR


def test_it_lives_on_when_the_model_is_gone():
    model, x = filled(Net()), images()
    want = raw("score_cam", fresh(model), "act", x)
    subject = camfn.prepare(model)
    del model
    gc.collect()
    for _ in range(2):
        assert off(raw("score_cam", subject, "act", x), want) <= NEAR


# --------------------------------------------------------------------------------- what a forward changes is put back


class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class CountsInDict(Net):
    def __init__(self):
        super().__init__()
        self.seen = {"calls": 0}

    def forward(self, x):
        self.seen["calls"] += 1
        return super().forward(x) + self.seen["calls"] * x.mean((1, 2, 3))[:, None]


class CountsInLayer(Net):
    def __init__(self):
        super().__init__()
        self.head[0].calls = 0

    def forward(self, x):
        self.head[0].calls += 1
        return super().forward(x).pow(self.head[0].calls)


class Appends(Net):
    def __init__(self):
        super().__init__()
        self.cache = []

    def forward(self, x):
        self.cache.append(1.0)
        return super().forward(x) * sum(self.cache)


class AppendsInside(Net):
    def __init__(self):
        super().__init__()
        self.deep = {"of": [collections.deque([1.0]), {2.0}]}

    def forward(self, x):
        queue, numbers = self.deep["of"]
        queue.append(2.0)
        numbers.add(len(queue))
        return super().forward(x) * (sum(queue) + sum(numbers))


class KeepsFirst(Net):
    """As a cache of what was computed for the first input."""

    kept = None

    def forward(self, x):
        f = self.feats(x)
        if self.kept is None:
            self.kept = f.mean((0, 2, 3)).detach()
        return self.head(f * self.kept[:, None, None])


class Moves(Net):
    def __init__(self):
        super().__init__()
        self.table = torch.ones(6, dtype=torch.float64)

    def forward(self, x):
        self.table.add_(1)
        return self.head(self.feats(x) * self.table[:, None, None])


class Replaces(Net):
    def forward(self, x):
        y = super().forward(x)
        self.act = nn.Tanh()
        return y


class Deletes(Net):
    def __init__(self):
        super().__init__()
        self.first = True

    def forward(self, x):
        first = vars(self).pop("first", False)
        return super().forward(x) * (2.0 if first else 1.0)


class Registers(Net):
    def forward(self, x):
        if not hasattr(self, "late"):
            self.register_buffer("late", x.detach().mean())
        return super().forward(x) * self.late


class Adds(Net):
    def forward(self, x):
        y = super().forward(x)
        for name in (f"extra{i}" for i in range(9)):
            if not hasattr(self, name):
                setattr(self, name, nn.Identity())
                break
        return y * len(self._modules)


class Toggles(Net):
    def forward(self, x):
        y = super().forward(x)
        self.bn.train(not self.bn.training)
        return y


KEEPERS = [Counts, CountsInDict, CountsInLayer, Appends, AppendsInside, KeepsFirst, Moves, Replaces, Deletes, Registers, Adds]


def everything(value, seen=None):
    """What a model holds, as text; tensors by their values."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, nn.Module) or type(value).__module__ == __name__:
        if id(value) in seen:
            return "again"
        seen.add(id(value))
        return type(value).__name__, everything(vars(value), seen)
    if isinstance(value, dict):
        return {str(key): everything(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [everything(item, seen) for item in value]
    return repr(value)


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
@pytest.mark.parametrize("made", [*KEEPERS, Toggles], ids=lambda made: made.__name__)
def test_later_calls_give_what_the_first_gave(made, method):
    model = filled(made())
    before, subject = everything(model), camfn.prepare(model)
    first = raw(method, subject, "act", images(1))
    raw(method, subject, "act", images(1, seed=2))
    for _ in range(8 if method == "grad_cam" else 2):
        assert off(raw(method, subject, "act", images(1)), first) <= NEAR
    assert off(first, raw(method, fresh(model), "act", images(1))) <= NEAR
    assert everything(model) == before


@both
@pytest.mark.parametrize("made", KEEPERS, ids=lambda made: made.__name__)
def test_a_forward_begins_where_the_model_is(made, of):
    model = filled(made())
    subject, state = of(model), camfn.state_of(model)
    with torch.no_grad():
        want = fresh(model)(images())
    for _ in range(3):
        assert off(camfn.pure(subject)(state, images()), want) <= NEAR
        assert off(camfn.tap(subject, "act")(state, images()).output, want) <= NEAR


def test_a_copy_is_put_back_after_an_error():
    class Trips(Counts):
        def forward(self, x):
            y = super().forward(x)
            if float(x.detach().flatten()[0]) > 100:
                raise RuntimeError("too bright")
            return y

    model, subject = filled(Trips()), None
    subject = camfn.prepare(model)
    first = raw("grad_cam", subject, "act", images())
    for _ in range(3):
        with pytest.raises((RuntimeError, CamError), match="too bright"):
            raw("grad_cam", subject, "act", images() + 1000)
        assert off(raw("grad_cam", subject, "act", images()), first) <= NEAR
    assert model.calls == 0


def test_what_the_ports_did_in_one_call_is_gone_in_the_next():
    model, x = filled(Net()), images()
    subject, state = camfn.prepare(model), camfn.state_of(model)
    with torch.no_grad():
        want, features = model(x), model.feats(x)
    camfn.tap(subject, "act")(state, x, None, torch.zeros_like(features))
    for layer in ("conv", "act", "head", "bn"):
        raw("grad_cam", subject, "act", x)
        camfn.tap(subject, layer)(state, x)
        assert off(camfn.pure(subject)(state, x), want) <= NEAR
    first, second = camfn.tap(subject, "act"), camfn.tap(subject, "conv")
    second(state, x)
    assert off(first(state, x).seen, features) <= NEAR


# ------------------------------------------------------------------------------------------------- how much is kept


def test_it_keeps_what_is_recorded_and_as_much_as_it_is_allowed():
    model = filled(Net())
    subject = camfn.prepare(model, limit=2)
    assert len(subject) == 0
    raw("grad_cam", subject, "act", images())
    assert len(subject) == 0
    raw("recipro_cam", subject, "act", images())
    one = len(subject)
    assert 1 <= one <= 2
    raw("recipro_cam", subject, "act", images(seed=3))
    assert len(subject) == one
    for side in (12, 14, 16, 12, 14):
        for layer in ("conv", "bn", "act"):
            found = raw("recipro_cam", subject, layer, images(side=side))
            assert len(subject) <= 2
            assert off(found, raw("recipro_cam", fresh(model), layer, images(side=side))) <= NEAR


def test_a_limit_of_64_unless_another_is_named():
    assert inspect.signature(camfn.prepare).parameters["limit"].default == 64


def test_the_oldest_goes():
    calls = []

    class Tells(Net):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    def forwards(side):
        calls.clear()
        raw("recipro_cam", subject, "act", images(1, side=side))
        return len(calls)

    model = filled(Tells())
    subject = camfn.prepare(model)
    raw("recipro_cam", subject, "act", images(1, side=12))
    a_call_keeps = len(subject)
    subject = camfn.prepare(model, limit=2 * a_call_keeps)
    new, known = forwards(12), forwards(12)
    assert known < new
    assert forwards(14) == new
    assert forwards(16) == new
    assert forwards(16) == forwards(14) == known
    assert forwards(12) == new


class Reads(Net):
    """Of a forward that reads values there is no record for other inputs."""

    def forward(self, x):
        f = self.feats(x)
        gains = torch.tensor([1.0 + abs(v) for v in x.detach().mean((1, 2, 3)).tolist()], dtype=x.dtype)
        return self.head(f * gains[:, None, None, None])


def test_no_record_is_kept_of_a_forward_that_reads_values():
    subject = camfn.prepare(filled(Reads()))
    for seed in range(3):
        raw("recipro_cam", subject, "act", images(seed=seed))
        assert len(subject) == 0


class Tabled(Net):
    """A plain tensor, large enough that nobody compares its values."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(0, 1, 10_000, dtype=torch.float64).reshape(5, 2000)

    def forward(self, x):
        return super().forward(x) + self.table.sum(1)


def alive():
    """How many objects there are, and the bytes of all tensors."""
    gc.collect()
    found = gc.get_objects()
    sizes = {}
    for tensor in found:
        if type(tensor) in (torch.Tensor, nn.Parameter):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # what transforms left of other tests has no memory
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return len(found), sum(sizes.values())


@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")
@pytest.mark.parametrize(
    ("made", "of"),
    [(Net, plain), (Tabled, plain), *((made, prepared) for made in (Net, Reads, Tabled, CountsInDict, KeepsFirst))],
)
def test_later_calls_leave_no_more_than_the_third(made, of):
    subject = of(filled(made()))

    def call(seed):
        for method in ("grad_cam", "score_cam", "recipro_cam"):
            raw(method, subject, "act", images(1, seed=seed))

    for seed in range(3):
        call(seed)
    objects, memory = alive()
    for seed in range(6):
        call(seed)
    later, more = alive()
    assert later - objects < 18  # calls
    assert more - memory <= 1000


def test_it_dies_like_any_object_with_all_that_it_kept():
    model, x = filled(Net()), images()
    subject = camfn.prepare(model)
    for method in FEW:
        raw(method, subject, "act", x)
    f, h = camfn.pure(subject), camfn.head(subject, "act", x, torch.ones(2, 6, 5, 5).double())
    gone = weakref.ref(subject)
    del f, h, subject
    gc.collect()
    assert gone() is None
    assert sum(type(o) is Net for o in gc.get_objects()) == 1
    model_gone = weakref.ref(model)
    del model
    gc.collect()
    assert model_gone() is None


def test_plain_calls_leave_nothing_behind():
    class Own(Net):
        pass

    model, x = filled(Own()), images()

    def call():
        for method in ("grad_cam", "score_cam", "recipro_cam", "ablation_cam", "lift_cam"):
            raw(method, model, "act", x)
        camfn.explain(model, "act", x, 1, method=["grad_cam", "recipro_cam"], relu=False)
        camfn.head(model, "act", x, torch.ones(2, 6, 5, 5).double())
        FUNCTIONS["smooth"](model, x)

    call()
    objects, memory = alive()
    for _ in range(5):
        call()
    later, more = alive()
    assert sum(type(o) is Own for o in gc.get_objects()) == 1
    assert later - objects < 50
    assert more <= memory
    assert not [o for o in gc.get_objects() if type(o) is camfn.Prepared and type(o.model) is Own]  # others are other tests'


# ---------------------------------------------------------------------------------------------------- what it costs


def counted(made=Net):
    """A model, and a list of how many images each of its forwards had."""
    shown = []

    class Tells(made):
        def forward(self, x):
            shown.append(len(x))
            return super().forward(x)

    return filled(Tells()), shown


@both
def test_at_most_three_images_beside_the_clean_forward(of):
    model, shown = counted()
    subject = of(model)
    for _ in range(2):
        shown.clear()
        raw("grad_cam", subject, "act", images())
        assert 2 <= sum(shown) <= 2 + 3
        shown.clear()
        raw("score_cam", subject, "act", images(), sweep=Sweep(compile=False))
        assert 2 + 12 <= sum(shown) <= 2 + 3 + 12


def test_a_record_costs_eight_forwards_at_most_and_once():
    model, shown = counted()
    subject, costs = camfn.prepare(model), []
    for seed in range(6):
        shown.clear()
        raw("recipro_cam", subject, "act", images(seed=seed))
        costs.append(len(shown))
    assert costs[1] < costs[0] <= costs[1] + 8
    assert len(set(costs[1:])) == 1


@few
@pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")  # it reads a value
def test_a_later_call_runs_the_model_as_often_as_the_third(method):
    model, shown = counted(Reads) if method != "lift_cam" else counted()
    subject, costs = camfn.prepare(model), []
    for seed in range(8):
        shown.clear()
        raw(method, subject, "act", images(seed=seed))
        costs.append(list(shown))
    assert all(cost == costs[2] for cost in costs[3:])


def test_several_methods_share_one_clean_forward_and_one_record():
    model, shown = counted()
    alone = 0
    for method in ("grad_cam", "recipro_cam", "ablation_cam"):
        shown.clear()
        raw(method, model, "act", images())
        alone += sum(shown)
    shown.clear()
    cards = camfn.explain(model, "act", images(), 1, method=["grad_cam", "recipro_cam", "ablation_cam"], relu=False)
    assert sum(shown) < alone
    assert len(cards) == 3


# ------------------------------------------------------------------------------------------------ threads, transforms


class Written(CountsInDict):
    """Writes to its input, a parameter, a buffer and a dictionary, which count: no thread may see another's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(6))

    def feats(self, x):
        x.sub_(0.1)
        with torch.no_grad():
            self.gain.add_(1)
        self.last.copy_(self.last + 1)
        return super().feats(x) * self.gain[:, None, None] + self.last


@pytest.mark.filterwarnings("ignore::camfn.CamWarning")
@pytest.mark.parametrize("made", [Net, Reads, Written], ids=lambda made: made.__name__)
def test_eight_threads_share_one(made):
    model, methods = filled(made()), ("grad_cam", "score_cam", "recipro_cam", "layer_cam")
    subject = camfn.prepare(model, limit=3)
    states = [camfn.state_of(filled(made(), seed=i)) for i in range(3)]
    layers, rows = ("conv", "bn", "act"), range(16)

    def job(of, i):
        return raw(methods[i % 4], of, layers[i % 3], images(1, seed=i), i % 5, state=states[i % 3])

    want = [job(fresh(model), i) for i in rows]

    def work(first):
        return max(off(job(subject, i), want[i]) for i in [*rows[first:], *rows[:first]])

    assert max(at_once([functools.partial(work, 2 * i) for i in range(8)])) <= NEAR
    assert len(subject) <= 3


def test_eight_threads_share_the_functions_of_one():
    model = filled(Counts())
    subject, state = camfn.prepare(model), camfn.state_of(model)
    with torch.no_grad():
        want = [fresh(model)(images(seed=i)) for i in range(8)]
    pure, tap = camfn.pure(subject), camfn.tap(subject, "act")

    def work(i):
        for _ in range(10):
            assert off(pure(state, images(seed=i)), want[i]) <= NEAR
            assert off(tap(state, images(seed=i)).output, want[i]) <= NEAR
            assert off(camfn.pure(subject)(state, images(seed=i)), want[i]) <= NEAR

    at_once([functools.partial(work, i) for i in range(8)])


@few
def test_it_works_under_transforms(method):
    model, x, step = filled(Net()), images(), images(seed=6)
    subject = camfn.prepare(model)

    def total(of):
        return lambda x: raw(method, of, "act", x).square().sum()

    def each(of):
        return lambda image: raw(method, of, "act", image[None])[0]

    want = raw(method, fresh(model), "act", x)
    for _ in range(2):
        assert off(vmap(each(subject))(x), want) <= 1e-8
        slope = grad(total(subject))(x)
        assert off(slope, grad(total(fresh(model)))(x)) <= 1e-8
        value, along = jvp(total(subject), (x,), (step,))
        assert off(value, want.square().sum()) <= 1e-8
        assert off(along, (slope * step).sum()) <= 1e-7
    numeric = (total(fresh(model))(x + 1e-6 * step) - total(fresh(model))(x - 1e-6 * step)) / 2e-6
    assert off(along, numeric) <= 1e-3
    assert off(raw(method, subject, "act", x), want) <= NEAR


def test_an_ensemble_of_states_under_vmap():
    model, x, members = filled(Net()), images(), [filled(Net(), seed=i) for i in range(3)]
    stacked = {k: torch.stack([camfn.state_of(m)[k] for m in members]) for k in camfn.state_of(model)}
    subject = camfn.prepare(model)
    for method in ("grad_cam", "score_cam"):
        found = vmap(lambda state, method=method: raw(method, subject, "act", x, state=state))(stacked)
        assert off(found, torch.stack([raw(method, m, "act", x) for m in members])) <= 1e-8


def test_what_a_transform_left_does_not_come_back():
    model, x = filled(KeepsFirst()), images()
    subject, want = camfn.prepare(model), raw("grad_cam", fresh(model), "act", x)
    grad(lambda x: raw("grad_cam", subject, "act", x).sum())(images(seed=2))
    vmap(lambda image: raw("grad_cam", subject, "act", image[None])[0])(images(seed=3))
    assert off(raw("grad_cam", subject, "act", x), want) <= NEAR


def test_inference_mode_and_no_grad_and_back():
    model, x = filled(Net()), images()
    subject, want = camfn.prepare(model), {method: raw(method, fresh(model), "act", x) for method in FEW}
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode):
        for method in FEW:
            with mode():
                found = raw(method, subject, "act", x)
            assert off(found.clone(), want[method]) <= NEAR


# -------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def graphs(monkeypatch):
    """Whatever is compiled runs as it is; the graphs are counted."""
    found, real = [], torch.compile

    def backend(graph, example_inputs):
        found.append(graph)
        return graph.forward

    def compiled(*args, **kwargs):
        return real(*args, **{**kwargs, "backend": backend, "mode": None, "options": None})

    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@can_compile
def test_a_prepared_model_compiles_once_for_images_targets_and_weights(graphs):
    model, x = filled(Net()), images()
    subject, sweep = camfn.prepare(model), Sweep(compile=True, chunk=5)
    calls = [
        {"x": x, "target": 3},
        {"x": x, "target": 1},
        {"x": images(seed=5), "target": [2, 4]},
        {"x": x, "target": None},
        {"x": x, "target": 3, "state": camfn.state_of(filled(Net(), seed=2))},
    ]
    for options in calls:
        want = raw("score_cam", fresh(model), "act", sweep=Sweep(compile=False), **options)
        assert off(raw("score_cam", subject, "act", sweep=sweep, **options), want) <= NEAR
    in_place(model)
    want = raw("score_cam", fresh(model), "act", x, 3, sweep=Sweep(compile=False))
    assert off(raw("score_cam", subject, "act", x, 3, sweep=sweep), want) <= NEAR
    assert len(graphs) == 1
    assert len(subject) >= 1
    raw("score_cam", subject, "act", images(side=14), 3, sweep=sweep)
    assert len(graphs) == 2


@can_compile
def test_a_plain_call_compiles_for_that_call_and_says_how_to_keep_it(graphs):
    model, x = filled(Net()), images()
    want = raw("score_cam", fresh(model), "act", x, sweep=Sweep(compile=False))
    for call in (1, 2):
        with pytest.warns(camfn.CamWarning, match=r"prepare"):
            assert off(raw("score_cam", model, "act", x, sweep=Sweep(compile=True)), want) <= NEAR
        assert len(graphs) == call


@can_compile
def test_eight_threads_that_compile_at_once_compile_once(graphs):
    model = filled(Net())
    subject, sweep = camfn.prepare(model), Sweep(compile=True, chunk=4)
    want = [raw("score_cam", fresh(model), "act", images(seed=i)) for i in range(8)]
    for _ in range(2):
        found = at_once([functools.partial(raw, "score_cam", subject, "act", images(seed=i), sweep=sweep) for i in range(8)])
        assert off(found, want) <= NEAR
        assert len(graphs) == 1


@can_compile
def test_a_compiled_kernel_dies_with_what_kept_it(graphs):
    model, x = filled(Net()), images()
    subject = camfn.prepare(model)
    raw("score_cam", subject, "act", x, sweep=Sweep(compile=True))
    gone = weakref.ref(subject), weakref.ref(model)
    del subject, model
    graphs.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
