"""`camfn layers` and `camfn methods`: tables of layers and methods."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import camfn
from camfn import images, zoo
from camfn._errors import CamError, escaped
from camfn.cli import options
from camfn.model.layers import none_on_a_grid

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
    rows = [
        {"method": name, "needs": sorted(map(str, row.needs)), "cost": str(row.cost), "summary": _first_line(row.function)}
        for name, row in camfn.METHODS.items()
    ]
    heads = ("method", "needs", "forwards", "summary")
    return Table(rows, heads, lambda row: (row["method"], ", ".join(row["needs"]), row["cost"], row["summary"]))


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def layers(image: Path | None, model: str, weights: Path | None, no_pretrained: bool, device: str | None) -> Table:
    """Return the table of the layers that can be explained, in the order of execution."""
    place = options.device_of(device)
    picture = _noise() if image is None else images.read(image)
    with options.opened(model, weights, no_pretrained, place) as loaded:
        x = options.input_of(loaded, picture, place)
        with zoo.told(f"the model, on an input of shape {tuple(x.shape)},", loaded.file):
            found = camfn.candidate_layers(loaded.model, x)
            if not found:
                raise CamError(none_on_a_grid(loaded.model, tuple(x.shape[2:])))
    rows = [
        {"layer": layer.name, "class": layer.kind, "shape": list(layer.shape[1:]), "chosen": layer.chosen} for layer in found
    ]
    return Table(rows, ("layer", "class", "output", ""), _layer_cells)


def _layer_cells(row: Row) -> Sequence[str]:
    shape = " x ".join(map(str, row["shape"]))
    return row["layer"], row["class"], shape, "<- the default layer" if row["chosen"] else ""


def _noise() -> Any:
    """Return a noise picture, the same in every run."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
