"""The table of exceptions: each row is of a method and has a reason, and some test reads it."""

from pathlib import Path

import pytest

import camfn
from tests.oracles.exceptions import EXCEPT, ROWS, unless, why

TEXT = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.asked}, {row.method}")
def test_a_row_is_of_a_method_has_a_reason_and_is_read(row):
    assert row.method in camfn.METHODS
    assert row.why
    assert why(row.asked, row.method) == row.why
    asked = row.asked.replace("1e", "{").partition("{")[0]  # up to what a test puts in
    assert f'"{asked}' in TEXT, f"no test asks for {row.asked!r}"


def test_no_row_is_there_twice():
    pairs = [(row.asked, row.method) for row in ROWS]
    assert len(pairs) == len(set(pairs))
    assert all(EXCEPT.values())


def test_what_has_a_row_must_fail_and_what_has_none_must_not():
    with unless("no gradient of a flat map", "rise"):
        raise AssertionError
    with unless("no gradient of a flat map", "rise"):
        raise camfn.CamError
    said = "holds of rise after all; the row says: its map"
    with pytest.raises(pytest.fail.Exception, match=said), unless("no gradient of a flat map", "rise"):
        pass
    for method, when in (("rise", False), ("grad_cam", True)):
        with pytest.raises(AssertionError), unless("no gradient of a flat map", method, when):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), unless("no gradient of a flat map", "rise"):
        raise ZeroDivisionError
    with pytest.raises(pytest.skip.Exception), unless("the derivative with a flat channel", "opti_cam"):
        raise AssertionError
