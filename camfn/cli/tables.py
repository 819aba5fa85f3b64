"""Tables on stdout: in columns, or one JSON object per row. `camfn methods` is one."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from camfn._errors import escaped
from camfn.cli import catalog

Row = dict[str, Any]


class Table(NamedTuple):
    """Rows for JSON output, and their headers and cells for a terminal."""

    rows: list[Row]
    heads: Sequence[str]
    cells: Callable[[Row], Sequence[str]]


def lines(table: Table, as_json: bool) -> Iterator[str]:
    """Yield one JSON object per row, or aligned columns with a header."""
    if as_json:
        yield from map(json.dumps, table.rows)
        return
    cells = [[*map(escaped, row)] for row in (table.heads, *map(table.cells, table.rows))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def methods() -> Table:
    """Return the table of all methods: needs, cost and summary."""
    heads = ("method", "needs", "forwards", "summary")
    rows = [row._asdict() for row in catalog.ROWS.values()]
    return Table(rows, heads, lambda row: (row["method"], ", ".join(row["needs"]), row["cost"], row["summary"]))
