"""What is recorded of a model after a layer: it leaves nothing behind, and holds for no call but those it was made for."""

import functools
import gc
import linecache
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import camfn
from camfn import CamError, _compat
from camfn.model import recording
from camfn.model.memory import Ledger
from tests.oracles.tiny import BOTH, NEAR, Net, agree, filled, off, prepared, raw
from tests.oracles.tiny import images as images_of

# A value that is read of a whole batch depends on the others of it; that is not what is asked here.
pytestmark = pytest.mark.filterwarnings("ignore:.*depends on the others of its batch:camfn.CamWarning")

RECORDED = ("ablation_cam", "recipro_cam", "lift_cam")
both = pytest.mark.parametrize("of", BOTH)
images = functools.partial(images_of, side=8)  # nine positions at the layer


def with_act(model, x: Tensor, change) -> Tensor:
    """The output where `change` is done to what `act` returns, by a plain hook."""
    handle = model.act.register_forward_hook(lambda module, args, out: change(out.detach()))
    output = model(x).detach()
    handle.remove()
    return output


def recipro_loop(model, x: Tensor) -> Tensor:
    """The logit of class 1 with all but one of nine positions at zero, one forward for each."""
    masks = torch.eye(9, dtype=x.dtype).reshape(9, 3, 3)
    scores = [[with_act(model, one, mask.mul)[0, 1] for mask in masks] for one in x.split(1)]
    return torch.tensor(scores, dtype=x.dtype).reshape(-1, 3, 3)


# ------------------------------------------------------------------------------------------------ what is left behind


def left() -> tuple[int, int]:
    """How many lines of source Python keeps for tracebacks, by file, and how many objects there are."""
    gc.collect()
    return len(linecache.cache), len(gc.get_objects())


@pytest.mark.parametrize("method", [*RECORDED, "head"])
def test_plain_calls_leave_no_source_and_no_objects_behind(method):
    model, x, value = filled(Net()), images(), torch.ones(2, 6, 3, 3, dtype=torch.float64)

    def call():
        camfn.head(model, "act", x, value) if method == "head" else raw(method, model, "act", x)

    for _ in range(2):
        call()
    lines, objects = left()
    for _ in range(6):
        call()
    later, more = left()
    assert later == lines
    assert more - objects < 6  # calls


# ---------------------------------------------------------------------------------------------- what a record computes


class After(Net):
    """Results of several tensors, a list of tensors as an argument, a constant, and a value that is taken twice."""

    def forward(self, x):
        f = self.feats(x)
        values, places = torch.nn.functional.max_pool2d(f, 2, return_indices=True)
        first, *_, last = f.split([2, 3, 1], 1)
        pair = torch.cat([first, first * last, values.mean((2, 3), keepdim=True).expand_as(f)], 1)
        table = torch.linspace(float("-inf"), 1, 3)[1:].nan_to_num(neginf=-2.0).to(f)
        return {"a": self.head(f * table[1]), "b": (pair.clamp(-3, float("inf")), places), "c": f}


def test_a_record_computes_what_the_model_does():
    model, x, state = filled(After()), images(), camfn.state_of(filled(After(), seed=4))
    f = camfn.tap(model, "act")
    head = camfn.head(model, "act", x, f(state, x).seen)
    for seed in (2, 3):
        value = f(state, images(seed=seed)).seen
        want = f(state, x, None, value).output
        found = head(state, x, value)
        assert off(found, want) <= NEAR
        assert torch.equal(found["b"][1], want["b"][1])
        assert torch.equal(found["c"], value)


IN_PLACE = {
    "as_strided_": ((3, 1), (1, 1)),
    "squeeze_": (),
    "squeeze_.dim": (1,),
    "squeeze_.dims": ([1],),
    "swapaxes_": (0, 1),
    "swapdims_": (0, 1),
    "t_": (),
    "transpose_": (0, 1),
    "unsqueeze_": (1,),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_of_shape_in_place_is_recorded_as_the_view(name):
    """As where a kernel of torch makes it: `functionalize` does not see that."""
    packet, _, overload = name.partition(".")
    change = getattr(getattr(torch.ops.aten, packet), overload or "default")
    value, recorder = torch.arange(3.0)[:, None], recording._Recorder(())
    with recorder:
        changed = change(value * 2, *IN_PLACE[name])
    step = recorder.parts[id(changed)].step
    assert not step.target.overloadpacket.__name__.endswith("_")
    assert torch.equal(step.target(value * 2, *IN_PLACE[name]), changed)


def test_a_record_frees_each_value_after_its_last_use():
    """Of a chain of layers two values are there at once, however long it is."""

    class Chain(Net):
        def forward(self, x):
            f = self.feats(x)
            for _ in range(20):
                f = torch.tanh(f)
            return self.head(f)

    model, x = filled(Chain()), images()
    value = camfn.tap(model, "act")(camfn.state_of(model), x).seen.detach()
    onward = camfn.head(model, "act", x, value).at(camfn.state_of(model), x)
    with Ledger() as ledger, torch.no_grad():
        onward(value)
    size = value.numel() * value.element_size()
    assert 2 * size <= ledger.peak < 3 * size


def test_a_record_is_differentiated_mapped_and_compiled():
    model, x = filled(Net()), images()
    state = camfn.state_of(model)
    value = camfn.tap(model, "act")(state, x).seen.detach()
    head = camfn.head(model, "act", x, value)

    def onward(value):
        return head(state, x, value)

    def by_hand(value):
        return model.head(value)

    many = torch.stack([value, 2 * value])
    assert off(torch.func.vmap(onward)(many), torch.stack([by_hand(one) for one in many])) <= NEAR
    slope, right = (torch.func.grad(lambda v, f=f: f(v).square().sum())(value) for f in (onward, by_hand))
    assert off(slope, right) <= NEAR
    if _compat.can_compile() == "":
        compiled = torch.compile(onward, backend="eager", fullgraph=True)
        assert off(compiled(value), by_hand(value)) <= NEAR


# ------------------------------------------------------------------------------- what goes by a way that nothing sees


def thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def level(t: Tensor) -> Tensor:
    """A gain for each image."""
    return 1 + torch.sigmoid(t.detach().mean((1, 2, 3), keepdim=True))


def in_numpy(t: Tensor) -> np.ndarray:
    return 1 + 1 / (1 + np.exp(-t.detach().numpy().mean((1, 2, 3), keepdims=True)))


def in_python(t: Tensor) -> list[float]:
    return [1 + 1 / (1 + float(np.exp(-mean))) for mean in t.detach().mean((1, 2, 3)).tolist()]


def of_floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


GAINS = {
    "floats read in a thread": lambda t: of_floats(thread(lambda: [float(level(one[None])) for one in t])),
    "a tensor made in a thread": lambda t: thread(lambda: level(t)),
    "NumPy in a thread": lambda t: torch.from_numpy(thread(lambda: in_numpy(t))),
    "from_numpy": lambda t: torch.from_numpy(in_numpy(t)),
    "tensor of an array": lambda t: torch.tensor(in_numpy(t)),
    "as_tensor of an array": lambda t: torch.as_tensor(in_numpy(t)),
    "frombuffer": lambda t: torch.frombuffer(bytearray(in_numpy(t)), dtype=torch.float64)[:, None, None, None],
    "from_dlpack": lambda t: torch.from_numpy(1 + 1 / (1 + np.exp(-np.from_dlpack(t.detach()).mean((1, 2, 3), keepdims=True)))),
    "tolist": lambda t: of_floats(in_python(t)),
    "item": lambda t: of_floats([level(one[None]).item() for one in t]),
}


def gained(gain, of: str, when: str):
    """A network with a gain at its layer, of the input or of the features, found before the layer or after it."""

    class Gained(Net):
        def forward(self, x):
            before = gain(x) if when == "before" else None
            f = self.feats(x)
            return self.head(f * (gain(f if of == "features" else x) if before is None else before))

    return filled(Gained())


PLACES = [("features", "after"), ("input", "after"), ("input", "before")]
places = pytest.mark.parametrize("place", PLACES, ids=" ".join)
gains = pytest.mark.parametrize("gain", GAINS)


@both
@places
@gains
def test_a_gain_by_a_hidden_way_is_that_of_each_activation(gain, place, of):
    model = gained(GAINS[gain], *place)
    subject = of(model)
    for size in (1.0, 3.0):
        x = size * images(seed=int(size))
        assert off(raw("recipro_cam", subject, "act", x), recipro_loop(model, x)) <= NEAR


@places
@gains
def test_lift_cam_has_a_rule_for_what_does_not_hang_on_the_activation_or_says_so(gain, place):
    """Of the features' own gain it has none, seen or not; of the input's, the map is that of the twin in plain torch."""
    subject, twin = prepared(gained(GAINS[gain], *place)), gained(level, *place)
    for size in (1.0, 3.0):
        x = size * images(seed=int(size))
        if place[0] == "features" or gain == "NumPy in a thread":
            with pytest.raises(CamError, match="after layer 'act'"):
                raw("lift_cam", subject, "act", x)
        else:
            assert off(raw("lift_cam", subject, "act", x), raw("lift_cam", twin, "act", x)) <= NEAR


@places
@gains
def test_a_head_of_a_hidden_way_is_refused(gain, place):
    subject, x = gained(GAINS[gain], *place), images()
    value = camfn.tap(subject, "act")(camfn.state_of(subject), x).seen
    with pytest.raises(CamError, match="after layer 'act'"):
        camfn.head(subject, "act", x, value)


def test_a_record_is_not_made_of_what_a_transform_does_not_show():
    """Under `grad` it is made on blanks, of which a forward would read other values than of the input."""
    model = gained(GAINS["item"], "input", "before")
    with pytest.raises(CamError, match="read in Python"):
        torch.func.grad(lambda x: raw("lift_cam", model, "act", x).sum())(images())


def test_a_head_is_made_under_a_transform():
    model, x = filled(Net()), images()
    state, values = camfn.state_of(model), torch.linspace(-1, 1, 216, dtype=torch.float64).reshape(2, 2, 6, 3, 3)
    found = torch.func.vmap(lambda value: camfn.head(model, "act", x, value)(state, x, value))(values)
    assert off(found, torch.stack([model.head(value) for value in values])) <= NEAR


def test_an_error_of_recording_names_the_layer():
    class Adds(Net):
        """Writes the features' mean to a plain tensor, which a record cannot."""

        def __init__(self):
            super().__init__()
            self.table = torch.zeros(6, dtype=torch.float64)

        def forward(self, x):
            f = self.feats(x)
            self.table.zero_().add_(f.mean((0, 2, 3)))
            return self.head(f * self.table[:, None, None])

    with pytest.raises(CamError, match="what comes after layer 'act' cannot be recorded"):
        raw("lift_cam", filled(Adds()), "act", images())


# ---------------------------------------------------------------------------- tensors that are neither seen nor held


TABLES = {
    "a tensor": (torch.linspace, lambda table: table),
    "a tensor, by as_tensor": (torch.linspace, torch.as_tensor),
    "an array, by from_numpy": (np.linspace, torch.from_numpy),
    "an array, by as_tensor": (np.linspace, torch.as_tensor),
    "an array, by tensor": (np.linspace, torch.tensor),
}


@both
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("method", RECORDED)
def test_a_table_that_is_not_of_the_model_is_that_of_now(method, kind, of):
    make, get = TABLES[kind]
    table = make(0.5, 2, 6, dtype=torch.float64 if make is torch.linspace else np.float64)[:, None, None]

    class Outside(Net):
        def forward(self, x):
            return self.head(torch.tanh(0.1 * self.feats(x) * get(table)))

    class Inside(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.as_tensor(table).clone())

        def forward(self, x):
            return self.head(torch.tanh(0.1 * self.feats(x) * self.table))

    def now():
        model = filled(Inside())
        model.table.copy_(torch.as_tensor(table))
        return model

    subject, old = of(filled(Outside())), None
    for _ in range(2):
        found = raw(method, subject, "act", images())
        assert off(found, raw(method, now(), "act", images())) <= NEAR
        assert old is None or off(found, old) > 1e-3, "the table counts"
        table *= 3.0
        old = found


def test_what_is_cached_in_the_first_call_is_a_constant_of_lift_cam():
    grid = functools.cache(lambda n: torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None, None])

    class Cached(Net):
        def forward(self, x):
            return self.head(self.feats(x) * grid(6))

    class Anew(Net):
        def forward(self, x):
            return self.head(self.feats(x) * torch.linspace(0.5, 2, 6, dtype=x.dtype)[:, None, None])

    for _ in range(2):
        found = raw("lift_cam", filled(Cached()), "act", images())
        assert off(found, raw("lift_cam", filled(Anew()), "act", images())) <= NEAR


# --------------------------------------------------------------------------- what the clean output does not depend on


class AboveOne(nn.Module):
    def forward(self, x):
        return x.relu() + 1


FLOOR = {}


class Floored(Net):
    """The features are above 1, the floor is below: it counts only where features are set to zero."""

    def __init__(self, floor):
        super().__init__()
        self.act, self.floor = AboveOne(), floor

    def forward(self, x):
        before = x.detach().abs().mean((1, 2, 3), keepdim=True) / 4
        f = self.feats(x)
        return self.head(torch.maximum(f, self.floor(before, f)))


def in_thread(before, f):
    return thread(lambda: torch.where(f.detach().amin((1, 2, 3), keepdim=True) > 0, 0.5, 0.75).double())


FLOORS = {
    "a value read of the input": lambda before, f: of_floats(before.flatten().tolist()),
    "a tensor made in a thread": in_thread,
    "a tensor of the user's": lambda before, f: FLOOR["tensor"],
    "an array of the user's": lambda before, f: torch.from_numpy(FLOOR["array"]),
}


@both
@pytest.mark.parametrize("floor", FLOORS)
def test_a_record_that_fits_the_clean_output_may_still_not_hold(floor, of):
    """For the other image, another call, or another activation."""
    model = filled(Floored(FLOORS[floor]))
    subject, found = of(model), []
    for value in (0.25, 0.5):
        FLOOR.update(tensor=torch.full((1,), value, dtype=torch.float64), array=np.array([value]))
        x = torch.cat([images(1), 2 * images(1, seed=3)]) * (value + 0.5)
        found.append(raw("recipro_cam", subject, "act", x))
        assert off(found[-1], recipro_loop(model, x)) <= NEAR
    if of is prepared:
        assert len(subject) == 0


def test_a_floor_of_the_model_is_recorded_and_kept():
    subject = prepared(filled(Floored(lambda before, f: before)))
    raw("recipro_cam", subject, "act", images())
    assert len(subject) == 1


# ----------------------------------------------------------------------------------------------- values read in Python


class Gained(Net):
    """Features times a gain for each image, or for all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gate", torch.tensor(1.0))

    def gain(self, x, f):
        raise NotImplementedError

    def forward(self, x):
        f = self.feats(x)
        return self.head(torch.tanh(0.1 * f * self.gain(x, f)))


def each_of(values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def row(read, twin):
    class Reads(Gained):
        gain = read

    class Twin(Gained):
        gain = twin

    return Reads, Twin


class First(Net):
    """Reads before the layer runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gate", torch.tensor(1.0))

    def read(self, x):
        raise NotImplementedError

    def forward(self, x):
        gain = self.read(x)
        return self.head(torch.tanh(0.1 * self.feats(x) * gain))


def first(read, twin):
    class Reads(First):
        pass

    class Twin(First):
        pass

    Reads.read, Twin.read = read, twin
    return Reads, Twin


def whether(x):
    return x.new_tensor(3.0) if bool(x.detach().sum() > 0) else x.new_tensor(0.5)


def branch(self, x):
    return whether(x)


def branched(self, x):
    return torch.where(x.detach().sum() > 0, 3.0, 0.5)


BEFORE = {
    "item": first(lambda s, x: x.detach().abs().amax().item(), lambda s, x: x.abs().amax()),
    "float": first(lambda s, x: float(x.detach().abs().mean()), lambda s, x: x.abs().mean()),
    "int": first(lambda s, x: int(x.detach().abs().sum()), lambda s, x: x.abs().sum().trunc()),
    "bool": first(branch, branched),
    "tolist": first(lambda s, x: sum(x.detach().flatten().abs().tolist()), lambda s, x: x.abs().sum()),
    "numpy": first(lambda s, x: float(x.detach().numpy().max()), lambda s, x: x.max()),
    "np.asarray": first(lambda s, x: float(np.asarray(x.detach()).max()), lambda s, x: x.max()),
    "a mask": first(lambda s, x: len(x[x.detach() > 0]) / 10, lambda s, x: (x > 0).sum().double() / 10),
    "nonzero": first(lambda s, x: (x.detach() > 0).nonzero().shape[0] / 10, lambda s, x: (x > 0).sum().double() / 10),
    "a size": first(
        lambda s, x: x.new_ones((x.detach().abs().sum() / 9).long()).shape[0], lambda s, x: (x.abs().sum() / 9).trunc()
    ),
    "a format": first(lambda s, x: float(f"{x.detach().abs().sum():.12f}"), lambda s, x: x.abs().sum()),
}


@pytest.mark.parametrize(
    ("read", "method"),
    [*((read, m) for read in BEFORE for m in ("recipro_cam",)), ("item", "lift_cam"), ("bool", "lift_cam")],
)
def test_a_value_read_of_the_input_before_the_layer(read, method):
    made, made_twin = BEFORE[read]
    subject = prepared(filled(made()))
    for seed, size in ((1, 1.0), (3, 3.0), (1, 1.0)):
        x = size * images(1, seed=seed) + 0.2 * (size - 1)
        agree(method, subject, filled(made_twin()), x, may_refuse=method == "lift_cam")


AFTER = {
    "item": row(lambda s, x, f: each_of([float(v) for v in f.detach().amax((1, 2, 3))]), lambda s, x, f: _largest(f)),
    "tolist": row(lambda s, x, f: each_of(f.detach().amax((1, 2, 3)).tolist()), lambda s, x, f: _largest(f)),
    "numpy": row(lambda s, x, f: each_of(f.detach().numpy().max((1, 2, 3)).tolist()), lambda s, x, f: _largest(f)),
    "NumPy's own": row(
        lambda s, x, f: torch.from_numpy(np.max(f.detach().numpy(), (1, 2, 3)))[:, None, None, None],
        lambda s, x, f: _largest(f),
    ),
    "bool": row(
        lambda s, x, f: each_of([3.0 if v > 1 else 0.5 for v in f.detach().mean((1, 2, 3))]),
        lambda s, x, f: torch.where(f.detach().mean((1, 2, 3), keepdim=True) > 1, 3.0, 0.5),
    ),
}


def _largest(f):
    return f.detach().amax((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("read", "method"),
    [*((read, m) for read in AFTER for m in ("recipro_cam",)), ("item", "lift_cam"), ("bool", "lift_cam")],
)
def test_a_value_read_of_the_features_after_the_layer(read, method):
    made, made_twin = AFTER[read]
    subject = prepared(filled(made()))
    for seed, size in ((1, 1.0), (3, 3.0), (1, 1.0)):
        x = size * images(seed=seed)
        agree(method, subject, filled(made_twin()), x, may_refuse=method == "lift_cam")


BUFFERS = {
    "before": first(lambda s, x: s.gate.item(), lambda s, x: s.gate),
    "before, a bool": first(lambda s, x: 3.0 if s.gate > 2 else 1.0, lambda s, x: torch.where(s.gate > 2, 3.0, 1.0)),
    "after": row(lambda s, x, f: s.gate.item(), lambda s, x, f: s.gate),
    "after, a parameter": row(
        lambda s, x, f: float(s.conv.weight.detach()[0, 0, 0, 0]), lambda s, x, f: s.conv.weight[0, 0, 0, 0]
    ),
}


@pytest.mark.parametrize("method", ["recipro_cam", "lift_cam"])
@pytest.mark.parametrize("read", BUFFERS)
def test_a_value_read_of_a_buffer_or_a_state(read, method):
    made, made_twin = BUFFERS[read]
    model, twin = filled(made()), filled(made_twin())
    subject, refuse = prepared(model), method == "lift_cam"
    other = filled(made_twin(), seed=5)
    agree(method, subject, twin, images(), may_refuse=refuse)
    state = {**camfn.state_of(other), "gate": torch.tensor(5.0, dtype=torch.float64)}
    agree(method, subject, twin, images(), may_refuse=refuse, state=state)
    agree(method, subject, twin, images(), may_refuse=refuse)
    for net in (model, twin):
        net.gate.fill_(5.0)
        net.conv.weight.data.mul_(2.0)
    agree(method, subject, twin, images(), may_refuse=refuse)
    for net in (model, twin):
        net.gate.numpy().fill(7.0)
    agree(method, subject, twin, images(), may_refuse=refuse)


@pytest.mark.parametrize("method", ["recipro_cam"])
def test_a_number_of_positions_that_the_input_chooses(method):
    """The features are cut where the picture ends: sizes made of tensors."""

    class Cuts(Net):
        def forward(self, x):
            f = self.feats(x)
            end = int((x.detach()[0, 0].abs().sum(0) > 0).sum() // 3) + 1
            return self.head(f[..., :end])

    class Masks(Net):
        def forward(self, x):
            f = self.feats(x)
            end = (x.detach()[0, 0].abs().sum(0) > 0).sum() // 3 + 1
            kept = (torch.arange(f.shape[-1]) < end).to(f)
            return self.head[2]((f * kept).sum((2, 3)) / (kept.sum().clamp_min(1) * f.shape[-2]))

    subject = prepared(filled(Cuts()))
    for width in (12, 6, 9):
        x = images(1)
        x[..., width:] = 0
        agree(method, subject, filled(Masks()), x, may_refuse=method == "lift_cam")


# --------------------------------------------------------------------------------------- what torch keeps by a module


CALLS = {
    **{method: functools.partial(raw, method) for method in ("grad_cam", "score_cam", "recipro_cam", "lift_cam")},
    "head": lambda model, layer, x: camfn.head(model, layer, x, torch.ones(2, 6, 3, 3, dtype=torch.float64)),
    "pure": lambda model, layer, x: camfn.pure(model)(camfn.state_of(model), x),
    "tap": lambda model, layer, x: camfn.tap(model, layer)(camfn.state_of(model), x),
    "candidate_layers": lambda model, layer, x: camfn.candidate_layers(model, x),
}


@both
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("at", ["conv", "head.2"])
def test_what_torch_caches_of_parametrizations_is_neither_taken_nor_changed(at, call, of):
    """torch keeps the weight by the caller's module: a call would get it with another state, and leave it without a graph."""
    model = filled(Net())
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule(at))
    subject, parameter = of(model), model.get_submodule(at).parametrizations.weight.original0
    with torch.nn.utils.parametrize.cached():
        with pytest.raises(CamError, match=rf"cached\(\) is on, and layer '{at}' is parametrized.*outside of it"):
            CALLS[call](subject, "act", images())
        model(images()).sum().backward()
    assert parameter.grad is not None
    CALLS[call](subject, "act", images())


def test_other_models_run_where_torch_caches_parametrizations():
    want = raw("grad_cam", filled(Net()), "act", images())
    with torch.nn.utils.parametrize.cached():
        assert torch.equal(raw("grad_cam", filled(Net()), "act", images()), want)


@both
@pytest.mark.parametrize("method", ["grad_cam", "recipro_cam"])
def test_weight_norm_with_another_state(method, of):
    model, plain = filled(Net()), filled(Net())
    torch.nn.utils.parametrizations.weight_norm(model.conv)
    subject, state = of(model), camfn.state_of(model)
    three = {name: 3 * tensor if name.endswith("original0") else tensor for name, tensor in state.items()}
    with torch.no_grad():
        plain.conv.weight.mul_(3)
    for _ in range(2):
        assert off(raw(method, subject, "act", images(), state=state), raw(method, filled(Net()), "act", images())) <= NEAR
        assert off(raw(method, subject, "act", images(), state=three), raw(method, plain, "act", images())) <= NEAR
