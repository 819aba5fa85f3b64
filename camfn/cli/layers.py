"""`camfn layers`: the layers that can be explained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import camfn
from camfn import images, zoo
from camfn._errors import CamError
from camfn.cli import models
from camfn.cli.tables import Row, Table
from camfn.model.layers import none_on_a_grid


def table(image: Path | None, model: str, weights: Path | None, no_pretrained: bool, device: str | None) -> Table:
    """Return the table of the layers that can be explained, in the order of execution."""
    place = models.device_of(device)
    picture = _noise() if image is None else images.read(image)
    with models.opened(model, weights, no_pretrained, place) as loaded:
        x = models.input_of(loaded, picture, place)
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
