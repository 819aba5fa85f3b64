"""Models built of habits, against twins that lack them: the same cases in each run. More: `python -m tests.fuzz`."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import camfn
from tests.fuzz.checks import report, tried
from tests.fuzz.habits import HABITS
from tests.fuzz.models import alone, drawn, firsts, some
from tests.fuzz.refusals import DROWNED, KNOWN, REFUSALS, Row

GROUPS, CASES = 10, 270
MOST_DROWNED = 2
"""The most cases of a group in which random attention drowns the places of a layer."""
FIXED = some(CASES, random.Random(0).choice)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_map_is_that_of_the_twin(group):
    found = [(case, tried(case)) for case in FIXED[group::GROUPS]]
    failed = [case for case, verdict in found if verdict.kind == "failed"]
    assert not failed, "\n".join(map(report, failed[:2]))
    drowned = [verdict for _, verdict in found if DROWNED in verdict.words]
    assert len(drowned) <= MOST_DROWNED, f"{len(drowned)} of {len(found)} layers show no places: {drowned[0].words}"


@settings(max_examples=int(os.environ.get("CAMFN_EXAMPLES", "30")))
@given(st.data())
def test_a_map_of_any_habits_is_that_of_the_twin(data):
    def pick(options):
        return data.draw(st.sampled_from(options))

    method = pick([*camfn.METHODS])
    case = drawn(pick, method, pick(firsts(method)))
    assert tried(case).kind != "failed", report(case)


def test_every_habit_and_every_method_is_tried():
    assert {case.method for case in FIXED} == set(camfn.METHODS)
    assert {name for case in FIXED for name in case.habits.values()} == set(HABITS)
    assert {len(case.habits) for case in FIXED} == {1, 2, 3}


def comes_to(row: Row, kind: str) -> bool:
    """Whether the row is true of a method: of one habit and nothing else."""
    for method in sorted(row.methods):
        for case in alone(row.habit, method):
            verdict = tried(case)
            if verdict.kind == kind and row.words in verdict.words:
                return True
    return False


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row.habit}: {row.words[:20]}")
def test_what_may_be_refused_is_refused(row):
    assert comes_to(row, "refused"), f"{row} is refused no more: take the row out"


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: f"{row.habit}: {row.words[:20]}")
def test_what_is_known_is_a_fault(row):
    assert comes_to(row, "known"), f"{row} is mended: take the row out"
