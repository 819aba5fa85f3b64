"""`camfn layers`: the layers that can be explained."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import camfn
from camfn import zoo
from camfn._errors import CamError
from camfn.cli import models
from camfn.cli.files import Source
from camfn.cli.tables import Row, Table
from camfn.model.layers import EARLIER, Candidate, none_on_a_grid

SHOWN = 20
"""The number of layers that are listed, at most."""


def table(source: Source | None, every: bool, model: str, device: str | None, **given: Any) -> Table:
    """Return the table of the layers that can be explained, in the order of execution: of every layer, or the most useful."""
    place = models.device_of(device)
    picture = _noise() if source is None else source.read()
    with models.opened(model, device=place, **given) as loaded:
        x = models.input_of(loaded, picture, place)
        with zoo.told(f"the model, on an input of shape {tuple(x.shape)},", loaded.file):
            found = camfn.candidate_layers(loaded.model, x)
            if not found:
                raise CamError(none_on_a_grid(loaded.model, tuple(x.shape[2:])))
    kept = found if every else useful(found)
    if len(kept) < len(found):
        sys.stderr.write(
            f"note: {len(found) - len(kept)} layers are left out, which lie deeper or run earlier: --all lists them\n"
        )
    return Table(list(map(_row, kept)), ("layer", "class", "output", ""), _cells)


def useful(found: Sequence[Candidate]) -> list[Candidate]:
    """Return at most `SHOWN` layers: the default layer, then those that lie in the fewest modules, and of these the last.

    Those are the stages and blocks of a network: what lies deeper is a part of them, and what runs later knows more.
    """
    ranked = sorted(enumerate(found), key=lambda each: (not each[1].chosen, each[1].name.count("."), -each[0]))
    return [layer for _, layer in sorted(ranked[:SHOWN], key=lambda each: each[0])]


def _row(layer: Candidate) -> Row:
    shape = list(layer.shape[1:])
    return {"layer": layer.name, "class": layer.kind, "shape": shape, "chosen": layer.chosen, "why": layer.why}


def _cells(row: Row) -> Sequence[str]:
    why = "" if row["why"] == EARLIER else row["why"]
    said = f"<- the default layer: {why}" if row["chosen"] else why
    return row["layer"], row["class"], " x ".join(map(str, row["shape"])), said


def _noise() -> Any:
    """Return a noise picture, the same in every run."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
