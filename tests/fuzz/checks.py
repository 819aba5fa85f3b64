"""A case tried: its map is its twin's and a loop's, or a refusal that is allowed, and nothing else has changed."""

import traceback
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camfn import CamError
from tests.fuzz.models import CLASSES, Case, Script, script
from tests.fuzz.refusals import allowed, known
from tests.fuzz.snapshot import changed, facts_of, process
from tests.laws.laws import ADAM_UNITS, UNITS
from tests.oracles.closeness import close
from tests.oracles.loops import LOOPS


class Verdict(NamedTuple):
    """What came of a case."""

    kind: str  # "equal", "refused", "known" (a fault) or "failed"
    words: str = ""  # of the refusal, or of the failure


def tried(case: Case) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _tried(case, script(case))
        except AssertionError as error:
            return Verdict("known" if known(case, str(error)) else "failed", str(error))


def failing(case: Case) -> Case:
    """The smallest part of a case that fails too."""
    smaller = next((part for part in case.smaller() if tried(part).kind == "failed"), None)
    return case if smaller is None else failing(smaller)


def report(case: Case) -> str:
    """The source of the model and of the call, to be pasted and run, and what came of them."""
    case = failing(case)
    return f"{script(case)}\n# {case}\n# {tried(case).words}\n"


def _tried(case: Case, text: Script) -> Verdict:
    space: dict[str, Any] = {"__name__": "fuzz"}
    exec(compile(text.setup, "<model>", "exec"), space)
    found = _outcome(text.found, space, "found", watched=True)
    wanted = _outcome(text.wanted, space, "wanted", watched=False)
    for who, made in (("the twin is refused", wanted), ("refused", found)):
        assert isinstance(made, Tensor) or allowed(case, str(made)), f"{who}: {made}"
    if isinstance(found, CamError):
        return Verdict("refused", str(found))
    assert isinstance(wanted, Tensor), f"a map, and the twin is refused: {wanted}"
    _compare(case, text, space, found, wanted)
    return Verdict("equal")


def _outcome(statement: str, space: dict[str, Any], name: str, watched: bool) -> Tensor | CamError:
    """The map that a statement makes, or its CamError."""
    roots = {key: space[key] for key in ("model", "x", "IMAGES", "OTHER", "HELD", "CLOSED")} if watched else {}
    before = facts_of(roots), process()
    try:
        exec(compile(statement, "<call>", "exec"), space)
        made = space[name]
    except CamError as error:
        made = error
    except Exception as error:
        raise AssertionError(f"another error: {''.join(traceback.format_exception(error)[-12:])}") from error
    moved = changed(before[0], facts_of(roots)) + changed(before[1], process())
    assert not moved, f"changed: {', '.join(moved[:5])}"
    return made


def _compare(case: Case, text: Script, space: dict[str, Any], found: Tensor, wanted: Tensor) -> None:
    units = ADAM_UNITS if case.method == "opti_cam" else UNITS
    assert found.dtype == wanted.dtype, f"{found.dtype}, and the twin's map is {wanted.dtype}"
    close(found, wanted, "the twin", units=units)
    if case.method in LOOPS and text.target in CLASSES and not case.transformer:
        every = LOOPS[case.method](space["twin"], text.layer, space["twin_x"])
        close(found, _of_classes(every, CLASSES[text.target], space), "the loop", units=units)


def _of_classes(maps: Tensor, target: Any, space: dict[str, Any]) -> Tensor:
    """Of the maps of all classes those of the target."""
    if target == "all":
        return maps
    n = len(maps)
    classes = (
        space["twin"](space["twin_x"]).argmax(1)
        if target is None
        else torch.tensor([target] * n if isinstance(target, int) else target[:n])
    )
    return maps[range(n), classes]
