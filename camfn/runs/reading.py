"""Read the maps of a run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camfn._errors import CamError, suggested
from camfn.runs import manifest, shards
from camfn.runs.rows import Row


def read(
    run: str | os.PathLike[str],
    *,
    method: str | None = None,
    layer: str | None = None,
    target: str | int | None = None,
    id: str | None = None,
) -> Iterator[Row]:
    """Read the rows of a run, one after the other: `row.id`, `row.target`, `row.score`, `row.map` and more.

    - `run`: the folder of the run.
    - `method`, `layer`, `target`, `id`: give only rows with this value. A target is the index of a class, or a name.

    A map is raw, a tensor of float32 on the layer's own grid. A shard that is cut off is left out, with a warning.

    **Raises** `CamError` if the folder holds no run, or the run has no such method or layer.
    """
    settings = manifest.read(Path(run))["settings"]
    for what, value in (("method", method), ("layer", layer)):
        known = [str(each) for each in settings.get(f"{what}s", [])]
        if value is not None and value not in known:
            raise CamError(f"the run has no {what} {value!r}{suggested(value, known)}; all: {', '.join(known)}")
    asked = {"method": method, "layer": layer, "target": None if target is None else str(target), "id": id}
    given = {name: value for name, value in asked.items() if value is not None}

    def wanted(columns: dict[str, Any]) -> bool:
        return all(columns[name] == value for name, value in given.items())

    return shards.rows_in(Path(run) / shards.MAPS, wanted)


def failures(run: str | os.PathLike[str]) -> list[Row]:
    """The images of a run that failed, each with its reason in `row.error`. One that a later run has made is none."""
    manifest.read(Path(run))
    made = shards.ids_in(Path(run) / shards.MAPS)
    found = {row.id: row for row in shards.rows_in(Path(run) / shards.FAILURES)}
    return [row for id, row in found.items() if id not in made]
