"""What is recorded of a model after a layer: it leaves nothing behind, and holds for no call but those it was made for."""

import gc
import linecache

import pytest
import torch
from tiny import NEAR, Net, filled, images, off, raw

import camfn
from camfn import _compat
from camfn.memory import Ledger

RECORDED = ("ablation_cam", "recipro_cam", "lift_cam")


# ------------------------------------------------------------------------------------------------ what is left behind


def left() -> tuple[int, int]:
    """How many lines of source Python keeps for tracebacks, by file, and how many objects there are."""
    gc.collect()
    return len(linecache.cache), len(gc.get_objects())


@pytest.mark.parametrize("method", [*RECORDED, "head"])
def test_plain_calls_leave_no_source_and_no_objects_behind(method):
    model, x, value = filled(Net()), images(), torch.ones(2, 6, 5, 5, dtype=torch.float64)

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
