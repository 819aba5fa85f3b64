"""The strategies: every example is what it says, and examples reach what goes wrong easily."""

import functools
import random

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import camfn
from camfn.testing import (
    activations,
    assert_close,
    cases,
    gradients,
    inputs_of,
    maps,
    models,
    outputs,
    token_cases,
    transformers,
)
from camfn.testing.changes import activation, evaluated
from tests.oracles.closeness import close
from tests.oracles.networks import LAYERED

FEW = settings(max_examples=20)
CHEAP = {"is_cam": {"num_samples": 2}, "opti_cam": {"steps": 1}, "ss_cam": {"num_samples": 1}}
TOKENS = [name for name in LAYERED if not {"linear head", "any size"} & camfn.METHODS[name].needs]


@pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")
@pytest.mark.parametrize("method", [name for name in TOKENS if name not in ("lift_cam",)])
@settings(max_examples=3)
@given(case=token_cases())
def test_cases_of_tokens_are_valid_for_methods(method, case):
    layer = case.layer if camfn.METHODS[method].of_layer else None
    options = {"layout": case.model.layout} if layer else {}
    run = functools.partial(camfn.METHODS[method].function, **CHEAP.get(method, {}))
    found = run(case.model, layer, case.x, case.target, **options)
    assert found.isfinite().all()
    assert found.shape[0] == len(case.x)
    if layer and method != "cameras":
        assert found.shape[-2:] == case.model.grid


@FEW
@given(transformers(), st.data())
def test_layers_of_a_transformer_are_tokens(model, data):
    x = data.draw(inputs_of(model))
    for layer in model.layers:
        seen = activation(camfn.testing.Case(model, layer, x, None))
        assert seen.shape[:2] == (len(x), model.prefix + torch.Size(model.grid).numel())
        assert camfn.layouts.read(seen, model.layout, None, layer, len(x)).grid == model.grid


@FEW
@given(st.one_of(models(), transformers()), st.data())
def test_a_flipped_network_has_the_scores_of_the_flipped_input(model, data):
    x = data.draw(inputs_of(model))
    axis = data.draw(st.integers(2, x.ndim - 1))
    close(evaluated(model.flipped(axis), x.flip(axis)), evaluated(model, x), units=2**12)


@FEW
@given(activations(), st.data())
def test_activations_and_gradients_have_their_shapes(values, data):
    n, c, p = values.shape
    slopes = data.draw(gradients(values))
    assert slopes.shape == (n, slopes.shape[1], c, p)
    assert values.dtype == slopes.dtype == torch.float64
    assert camfn.maps.combine(camfn.weights.grad_cam(slopes), values).shape == (n, slopes.shape[1], p)
    pooled = data.draw(gradients(values, pooled=True))
    assert torch.equal(pooled, pooled[..., :1].expand_as(pooled))


@FEW
@given(maps())
def test_maps_are_finite_and_can_be_normalized(found):
    assert found.isfinite().all()
    unit = camfn.maps.normalize(found, tuple(range(1, found.ndim)))
    assert 0 <= unit.min() <= unit.max() <= 1


@FEW
@given(outputs())
def test_outputs_are_read_by_targets(output):
    logits = camfn.targets.logits_of(output)
    score = camfn.targets.resolve(None, output, len(logits), logits.device)
    assert_close(camfn.targets.score_rows(score.of, output, score.rows)[:, 0], logits.amax(1), 0)


def is_flat(values):
    return (values == values[..., :1]).all(-1)


REACHED = {
    "a flat channel and one that is not": (activations(), lambda a: len(is_flat(a[0]).unique()) == 2),
    "a channel of zeros": (activations(), lambda a: bool((a[0] == 0).all(-1).any())),
    "both signs": (activations(), lambda a: bool((a < 0).any() and (a > 0).any())),
    "a large activation": (activations(), lambda a: a.abs().max() > 1e5),
    "a flat map": (maps(), lambda m: m.numel() > len(m) and bool(is_flat(m.flatten(1)).all())),
    "ties": (maps(), lambda m: 2 < len(m[0].unique()) < m[0].numel()),
    "three axes": (maps(), lambda m: m.ndim == 4),
    "a mapping": (outputs(), lambda y: isinstance(y, dict)),
    "equal logits": (outputs(), lambda y: isinstance(y, torch.Tensor) and y.shape[1] > 1 and len(y[0].unique()) < y.shape[1]),
    "a class token": (token_cases(), lambda case: case.model.prefix == 1),
    "two heads and two blocks": (token_cases(), lambda case: case.model.spec.heads == case.model.spec.depth == 2),
    "one sweep of several targets": (
        token_cases(),
        lambda case: isinstance(case.target, torch.Tensor) and case.target.ndim == 2,
    ),
}


@pytest.mark.parametrize("what", REACHED)
def test_examples_reach(what):
    strategy, reached = REACHED[what]
    enough = settings(max_examples=2000, database=None, phases=[Phase.generate])
    find(strategy, reached, settings=enough, random=random.Random(0))


def test_a_method_is_given_by_name_or_as_a_function():
    own = camfn.method(lambda a, g: g.mean(-1), name="own", needs="gradients")
    for method in ("grad_cam", camfn.grad_cam, own, camfn.smooth(own), functools.partial(camfn.cam, fc="fc")):

        @settings(max_examples=2)
        @given(cases(method))
        def drawn(case):
            assert case.x.ndim >= 3

        drawn()
    with pytest.raises(camfn.CamError, match=r"use camfn.testing.token_cases"):
        find(cases("attention_rollout"), lambda case: True)


WRONG = {
    "classes=0": (lambda: cases("grad_cam", classes=0), r"Spec: classes=0 must be a positive int"),
    "classes, drawn": (lambda: cases(classes=st.just(-1)), r"Spec: classes=-1 must be a positive int"),
    "channels=True": (lambda: models(channels=True), r"Spec: channels=True must be a positive int"),
    "heads": (lambda: transformers(heads=0), r"TokenSpec: heads=0 must be a positive int"),
    "block": (lambda: models(block="denser"), r"Spec: block='denser' must be one of 'plain', 'residual', 'dense'"),
    "stride": (lambda: models(stride=3), r"Spec: stride=3 must be one of 1, 2"),
    "sides": (lambda: models(sides=(4, 0)), r"Spec: sides=\(4, 0\) must be one to three positive ints"),
    "odd sides": (lambda: token_cases(sides=(4, 3)), r"TokenSpec: sides=\(4, 3\) must be two even, positive ints"),
    "a misspelled field": (lambda: cases(clases=3), r"no field named 'clases'; closest: 'classes'.*; all: sides, block"),
    "a field of the others": (lambda: transformers(block="dense"), r"no field named 'block'; all: sides, pool"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_field_that_no_network_has_is_an_error(what):
    strategy, said = WRONG[what]
    with pytest.raises(camfn.CamError, match=said):
        find(strategy(), lambda drawn: True)


@pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")
@settings(max_examples=30)
@given(cases("grad_cam", classes=1))
def test_a_network_may_have_one_class(case):
    assert camfn.grad_cam(*case, layout="channels_first", relu=False, normalize=False).isfinite().all()
