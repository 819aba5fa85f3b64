"""The fuzzer, tested: mistakes put into camfn, each of which makes a case fail, for the reason that is said."""

import importlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import camfn
from tests.fuzz.checks import tried
from tests.fuzz.models import Case


class Break(NamedTuple):
    place: str  # module:attribute
    make: Callable[[Any], Any]  # from what is there to the mistaken one
    case: Case
    words: str  # of the failure


def after(do: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A method that does something to the model and to its input when it is done."""

    def make(method: Any) -> Any:
        def run(model: Any, layer: Any, x: Any, *args: Any, **options: Any) -> Any:
            found = method(model, layer, x, *args, **options)
            do(model, x)
            return found

        return run

    return make


def raises(model: Any, x: Any) -> None:
    raise RuntimeError("size of tensor a")


def seen_handed_on(through: Any) -> Any:
    def spoiled(port: Any, out: Any) -> Any:
        port.seen = through(port, out)
        return port.seen

    return spoiled


PLAIN = Case("grad_cam", {})
BREAKS = {
    "a hook is left": Break(
        ":grad_cam", after(lambda m, x: m.feat.register_forward_hook(lambda *a: None)), PLAIN, "_forward_hooks"
    ),
    "the mode is left": Break(":grad_cam", after(lambda m, x: m.train()), PLAIN, "training"),
    "an attribute is left": Break(":grad_cam", after(lambda m, x: setattr(m, "seen", 1)), PLAIN, "model.seen"),
    "a weight is written to": Break(":grad_cam", after(lambda m, x: m.fc.weight.data.mul_(2)), PLAIN, "['weight']"),
    "the model runs once more": Break(
        ":mean_cam", after(lambda m, x: m(x)), Case("mean_cam", {"late": "buffer that counts calls"}), "_buffers"
    ),
    "the input is written to": Break(":grad_cam", after(lambda m, x: x.clamp_(max=1)), PLAIN, "IMAGES"),
    "torch draws": Break(":grad_cam", after(lambda m, x: torch.rand(1)), PLAIN, "torch's generator"),
    "Python draws": Break(":grad_cam", after(lambda m, x: random.random()), PLAIN, "Python's generator"),
    "NumPy draws": Break(":grad_cam", after(lambda m, x: np.random.rand()), PLAIN, "NumPy's generator"),  # noqa: NPY002
    "gradients stay off": Break(
        ":mean_cam", after(lambda m, x: torch.set_grad_enabled(False)), Case("mean_cam", {}), "grad mode"
    ),
    "another error": Break(":grad_cam", after(raises), PLAIN, "another error"),
    "writes are not seen": Break(
        "model.guard:Guard._write", lambda of: lambda *args: None, Case("score_cam", {"input": "input written to"}), "changed: "
    ),
    "containers are shared": Break(
        "model.private_copy:_copier_of",
        lambda of: lambda cls: (lambda value, twins: value) if cls is dict else of(cls),
        Case("mean_cam", {"early": "table kept by size"}),
        "changed: ",
    ),
    "what was seen is handed on": Break(
        "model.ports:_apply", seen_handed_on, Case("grad_cam", {"layer": "layer then written to by a ReLU"}), "the twin"
    ),
    "channels last are read as first": Break(
        "layouts:_grid_form",
        lambda of: lambda shape, last: of(shape, False),
        Case("mean_cam", {"layer": "NHWC activation, told"}),
        "the twin",
    ),
    "gradients lose their sign": Break(
        "formulas.weights:grad_cam", lambda of: lambda *args: of(*args).abs(), PLAIN, "the loop"
    ),
    "scores without a softmax": Break(
        "formulas.weights:score_cam", lambda of: lambda scores, *a: scores.mT, Case("score_cam", {}), "the loop"
    ),
    "all is refused": Break(
        "model.forward:begin", lambda of: lambda *args, **options: refuse(), PLAIN, "the twin is refused: no reason"
    ),
}


def refuse() -> None:
    raise camfn.CamError("no reason")


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_seen(name, monkeypatch):
    place, make, case, words = BREAKS[name]
    assert tried(case).kind == "equal"
    module, _, attributes = place.partition(":")
    owner: Any = importlib.import_module(f"camfn.{module}".rstrip("."))
    *path, attribute = attributes.split(".")
    for step in path:
        owner = getattr(owner, step)
    grad = torch.is_grad_enabled()
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    verdict = tried(case)
    torch.set_grad_enabled(grad)
    assert verdict.kind == "failed"
    assert words in verdict.words
