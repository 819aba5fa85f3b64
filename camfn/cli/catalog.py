"""The methods for the command line, without torch: `methods.jsonl` is `camfn.METHODS`, as a test verifies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from camfn._errors import CamError, suggested

ALL = "all"
DEFAULT = "grad_cam"
"""The method that docs/methods.md says to start with."""


class Row(NamedTuple):
    """The facts about a method that the command line needs."""

    method: str
    needs: Sequence[str]
    cost: str
    summary: str
    seed: bool  # whether a plain call draws random numbers
    chunk: bool  # whether it sweeps over masked inputs


_FILE = Path(__file__).with_name("methods.jsonl")
ROWS = {(row := Row(**json.loads(line))).method: row for line in _FILE.read_text(encoding="utf-8").splitlines()}
"""Every method, by name."""


def methods_of(named: Sequence[str]) -> tuple[str, ...]:
    """Return the named methods without duplicates. `all` means every method."""
    for method in named:
        if method not in (*ROWS, ALL):
            raise CamError(f"--method {method!r} is not known{suggested(method, ROWS)}; `camfn methods` lists all")
    return tuple(ROWS) if ALL in named else tuple(dict.fromkeys(named))


def check_options(methods: Sequence[str], seed: int | None, chunk: int | None) -> None:
    """Raise CamError if the seed is out of range, or if no method uses the seed or the chunk."""
    some, one = ", ".join(methods), len(methods) == 1
    if seed is not None and not 0 <= seed < 2**63:
        raise CamError(f"--seed {seed}: a seed is an integer from 0 to 2**63 - 1")
    if seed is not None and not any(ROWS[method].seed for method in methods):
        verb = "draws" if one else "draw"
        other = _examples([row.method for row in ROWS.values() if row.seed])
        raise CamError(f"--seed {seed}: {some} {verb} no random numbers; omit it, or use {other}")
    if chunk is not None and not any(ROWS[method].chunk for method in methods):
        has = "has" if one else "have"
        other = _examples([row.method for row in ROWS.values() if row.chunk])
        raise CamError(f"--chunk {chunk}: {some} {has} no sweep to split; omit it, or use {other}")


def _examples(names: Sequence[str]) -> str:
    """Return the first three names, for a message."""
    *first, last = names[:3]
    return f"another method, such as {', '.join(first)} or {last}"


# -------------------------------------------------------------------------------------------------- of `camfn demo`


SHOWN = ("mean_cam", "grad_cam", "layer_cam", "recipro_cam", "score_cam", "group_cam")
"""The default methods of the demo."""
FITTING = tuple(name for name, row in ROWS.items() if "attention" not in row.needs)
"""The methods that work on the demo network, which is convolutional."""


def fitting_of(named: Sequence[str]) -> tuple[str, ...]:
    """Return the named methods. `all` means those that work on the demo network. Raise CamError for others."""
    found = FITTING if ALL in named else methods_of(named)
    for method in found:
        if method not in FITTING:
            raise CamError(f"--method {method} needs attention, and the demo network has none: choose another, or {ALL}")
    return found
