"""Every law, tried on every method; and every exception, to see that it is one."""

import math
import os
import random
import zlib

import pytest
import torch
from hypothesis import Phase, assume, find, given, seed, settings
from hypothesis import strategies as st

import camfn
from camfn.formulas.masks import flat_channels
from camfn.testing import cases, layers_of, models
from camfn.testing.changes import activation
from tests.laws.laws import LAWS, VARIANTS, every_position, fixed_cases, maps, speaks_of
from tests.oracles.exceptions import EXCEPT
from tests.oracles.networks import LAYERED

# Tiny networks often have maps that are flat or nowhere positive; the laws hold for these too.
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ of \d+ maps:camfn.CamWarning")

PAIRS = [(law, name) for law in LAWS for name, variant in VARIANTS.items() if speaks_of(law, variant)]
SOMEWHERE = "knows_the_class"
"""Two classes of a small network may have one map: one case in which they have not is enough."""
HOLDING = [pair for pair in PAIRS if pair not in EXCEPT and pair[0] != SOMEWHERE]

UNSTEADY = ("opti_cam",)
"""Adam divides a slope by its size: of one that is rounding alone it makes a whole step. Such cases are drawn, not fixed."""
STEADY = [pair for pair in HOLDING if pair[1] not in UNSTEADY]
EXAMPLES = int(os.environ.get("CAMFN_EXAMPLES", "0"))
"""For each pair, the same in each run. To search for more: CAMFN_ANEW=1 CAMFN_EXAMPLES=200."""
ELSEWHERE = ("pure", "thread_safe", "gradcheck", "same_size", "scale_of_the_map")
"""What the contract asks of harder models, and what is one piece of code for all methods: one case is tried."""
EXECUTION = ("batch_independent", "image_permutation", "class_permutation", "deterministic", "shape", "range")
EXECUTION += ("chunk_independent", "target_independent", "layer_independent", "vmap_equals_loop")
"""What options of a method have little to do with: of its variants one case is tried."""


def examples_of(law: str, name: str) -> int:
    return EXAMPLES or (1 if law in ELSEWHERE or ("," in name and law in EXECUTION) else 2)


@pytest.mark.kernels
@pytest.mark.parametrize(("law", "name"), STEADY)
def test_law_holds(law, name):
    """Each pair has cases of its own. One channel at one position, the simplest case, says little and is not counted."""
    variant = VARIANTS[name]
    method = variant.method if variant.method in camfn.METHODS else "score_cam"

    @settings(max_examples=examples_of(law, name))
    @given(data=st.data())
    def holds(data):
        case = data.draw(cases(method, recipe=variant.recipe), label="case")
        assume(case.model.spec.channels > 1 or math.prod(case.model.grid) > 1)
        LAWS[law](variant, case)

    own = holds if os.environ.get("CAMFN_ANEW") else seed(zlib.crc32(f"{law}, {name}".encode()))(holds)
    own()


@pytest.mark.parametrize("name", [name for law, name in PAIRS if law == SOMEWHERE])
def test_the_map_knows_the_class_somewhere(name):
    def holds(case):
        try:
            LAWS[SOMEWHERE](VARIANTS[name], case)
        except AssertionError:
            return False
        return True

    assert any(map(holds, fixed_cases(VARIANTS[name])))


@pytest.mark.kernels
@pytest.mark.parametrize(("law", "name"), sorted({*HOLDING} - {*STEADY}))
def test_law_holds_of_what_is_fixed(law, name):
    for case in fixed_cases(VARIANTS[name]):
        LAWS[law](VARIANTS[name], case)


@pytest.mark.parametrize(("law", "name"), EXCEPT)
def test_exception_is_one(law, name):
    def holds(case):
        try:
            LAWS[law](VARIANTS[name], case)
        except (AssertionError, TypeError, camfn.CamError):  # a wrong map, no such argument, a refusal
            return False
        return True

    tried = fixed_cases(VARIANTS[name])
    if not VARIANTS[name].linear_head:
        tried.append(every_position())
    assert not all(map(holds, tried)), f"{law} holds for {name} after all; in EXCEPT: {EXCEPT[law, name]}"


def test_exceptions_are_of_known_laws_and_variants():
    assert set(EXCEPT) <= set(PAIRS)


# --------------------------------------------------------------------------------------------------- the strategies


@settings(max_examples=30)
@given(cases())
def test_case_of_no_method_is_valid_for_all(case):
    for name in LAYERED:
        assert maps(VARIANTS[name], case).isfinite().all()


@settings(max_examples=60)
@given(cases("score_cam", varied=True))
def test_varied_case_has_a_channel_that_is_not_flat_in_every_image(case):
    assert not flat_channels(activation(case).flatten(2)).all(1).any()


@settings(max_examples=30)
@given(models(), st.data())
def test_layers_exist_and_have_spatial_axes(model, data):
    layer = data.draw(layers_of(model))
    x = torch.zeros(1, model.spec.colors, *model.spec.sides, dtype=torch.float64)
    grid = activation(camfn.testing.Case(model, layer, x, None)).shape[2:]
    assert len(grid) == len(model.spec.sides)
    if layer in ("features", "act"):
        assert grid == model.grid


REACHED = {
    "one axis": lambda case: len(case.model.spec.sides) == 1,
    "three axes": lambda case: len(case.model.spec.sides) == 3,
    "residual, in place": lambda case: case.model.spec.block == "residual" and case.model.spec.inplace,
    "dense": lambda case: case.model.spec.block == "dense",
    "tapped inside the block": lambda case: case.layer == "block.conv",
    "every position read": lambda case: not case.model.spec.pooled,
    "left in train mode": lambda case: case.model.training,
    "one position": lambda case: activation(case)[0, 0].numel() == 1,
    "a flat channel and one that is not": lambda case: len(flat_channels(activation(case).flatten(2))[0].unique()) == 2,
    "several images with targets of their own": lambda case: isinstance(case.target, list) and len(set(case.target)) > 1,
    "kinds of their own": lambda case: isinstance(case.target, list) and len({type(one) for one in case.target}) > 1,
    "a sum": lambda case: isinstance(case.target, camfn.targets.Sum),
    "several targets": lambda case: isinstance(case.target, torch.Tensor) and case.target.ndim == 2,
    "a function": lambda case: callable(case.target),
    "a contrast": lambda case: isinstance(case.target, camfn.targets.Contrast),
}


@pytest.mark.parametrize("what", REACHED)
def test_cases_reach(what):
    """The rarest kind is one case in a hundred: among 5,000 there is one, whatever the seed."""
    enough = settings(max_examples=5000, database=None, phases=[Phase.generate])
    find(cases("score_cam"), REACHED[what], settings=enough, random=random.Random(0))


def test_fields_of_a_model_can_be_fixed_or_drawn():
    @settings(max_examples=20)
    @given(models(block="residual", classes=st.integers(7, 9)))
    def fixed(model):
        assert model.spec.block == "residual"
        assert model.fc.out_features in (7, 8, 9)

    fixed()
