"""The maps of a run in the files of others: pictures, arrays, the WSOL evaluator's maps, IRN's dictionaries, NIfTI."""

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camfn import images
from camfn._errors import CamError
from camfn.formulas.resampling import resize
from camfn.formulas.scaling import normalize
from camfn.images import View
from camfn.runs.decoding import opened
from camfn.runs.reading import read
from camfn.runs.rows import Row
from camfn.runs.shards import whole
from camfn.runs.sources import File, Item, items_of

SIDE = 224
"""The side of the WSOL evaluator's maps."""
STRIDE = 4
"""The pixels of the photo for each of IRN's `cam`."""

Write = Callable[[Path, list[Row]], None]


def convert(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    method: str | None = None,
    layer: str | None = None,
    images: Any = None,
) -> int:
    """Write the maps of a run to files, and return their number. Files of the same name are replaced.

    - `to`: `"png"`: overlays over the photos; `"npy"`: raw maps of the layer's grid; `"nifti"`: the same, with their place on
      the photo; `"wsol"`: a map of 224 x 224 over the whole image, with minimum 0 and maximum 1, for each image; `"irn"`: a
      dictionary of `keys`, `cam` and `high_res` for each image, its maps divided by their maxima.
    - `method`, `layer`: only rows of these.
    - `images`: the images of the run, for overlays where they are in a table or a tar file.

    **Raises** `CamError` if an image has several maps where the format has one, or a place on the photo is not known.
    """
    photos = {} if images is None else {item.id: item for item in items_of(images)}
    single: dict[str, tuple[str, Callable[[Row], bytes | Any]]] = {
        "png": (".png", lambda row: _overlay(row, photos)),
        "npy": (".npy", lambda row: None if row.map is None else row.map.numpy()),
        "nifti": (".nii", _nifti),
    }
    grouped: dict[str, Callable[[list[Row]], Any]] = {"wsol": _wsol, "irn": _irn}
    rows = read(run, method=method, layer=layer)
    if to in single:
        ending, make = single[to]
        found = ((_name(row) + ending, make(row)) for row in rows)
    elif to in grouped:
        found = ((_file(own[0].id, to) + ".npy", grouped[to](own)) for own in _by_image(rows))
    else:
        raise CamError(f"to={to!r} is none of {', '.join((*single, *grouped))}")
    return _written(Path(out), found)


def _written(out: Path, found: Iterator[tuple[str, Any]]) -> int:
    names: set[str] = set()
    for name, content in found:
        if name in names:
            raise CamError(f"two ids have the same file {name!r}")
        names.add(name)
        path = out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CamError(f"the folder {str(path.parent)!r} cannot be made: {error.strerror or error}") from error
        with whole(path) as file:
            if isinstance(content, bytes):
                file.write(content)
            elif hasattr(content, "save"):
                content.save(file, "PNG")
            else:
                np.save(file, content, allow_pickle=isinstance(content, dict))
    return len(names)


def _by_image(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return (list(own) for _, own in itertools.groupby(rows, key=lambda row: row.id))


def _file(id: str, to: str = "") -> str:
    """The file of an id, below the folder. The WSOL evaluator keeps the ending of the image, the others do not."""
    safe = "".join(letter if letter.isprintable() and letter not in '\\:*?"<>|' else "_" for letter in id)
    parts = [part for part in safe.split("/") if part not in ("", ".", "..")] or ["_"]
    name = "/".join(parts)
    return name if to == "wsol" else os.path.splitext(name)[0]


def _name(row: Row) -> str:
    parts = [part.replace("/", "_") for part in (row.layer, row.method, row.target) if part]
    return "-".join([_file(row.id), *parts])


# ------------------------------------------------------------------------------------------------------------- formats


def _overlay(row: Row, photos: dict[str, Item]) -> Any:
    map, view = _known(row)
    item = photos.get(row.id) or Item(row.id, File(row.source))
    most = float(map.abs().max())
    try:
        photo = opened(item)
    except CamError as error:
        raise CamError(f"{row.id}: {error}; pass the images of the run if they are in a table or a tar file") from error
    return images.overlay(photo, map / most if most else map, view=view)


def _known(row: Row) -> tuple[Tensor, View]:
    """A map and its place on the photo."""
    if row.map is None or row.map.ndim != 2:
        raise CamError(f"{row.id}: the map of a volume or a series has no place on a photo")
    if row.on_photo is None:
        raise CamError(f"{row.id}: where the input lies on the photo is not known, as the preprocessing cannot be undone")
    return row.map.nan_to_num(0, 0, 0), row.on_photo


def _on_photo(row: Row, size: tuple[int, int]) -> Tensor:
    """A map over the whole photo, at another (width, height). Pixels that were cropped away have the lowest value."""
    map, view = _known(row)
    (a, b, c), (d, e, f) = view.matrix
    across, down = size[0] / view.photo[0], size[1] / view.photo[1]
    matrix = ((a * across, b * across, c * across), (d * down, e * down, f * down))
    values, inside = View(matrix, view.size, size).on_photo(map)
    return torch.where(inside, values, values[inside].min() if bool(inside.any()) else values)


def _wsol(rows: list[Row]) -> np.ndarray:
    if len(rows) != 1:
        several = _several(rows, "method", "layer", "target")
        way_out = "choose the method and the layer" + ("; make a run of one target" if "target" in several else "")
        raise CamError(f"{rows[0].id} has {several}, and the evaluator takes one map for each image: {way_out}")
    return normalize(_on_photo(rows[0], (SIDE, SIDE)), (-2, -1)).numpy()


def _irn(rows: list[Row]) -> dict[str, Any]:
    several = _several(rows, "method", "layer")
    if several:
        raise CamError(f"{rows[0].id} has {several}, and IRN takes one of each: choose the method and the layer")
    others = [row.target for row in rows if not (row.target or "").isdigit()]
    if others:
        raise CamError(f"{rows[0].id} has the target {others[0]!r}, and IRN takes classes: make a run of classes")
    width, height = rows[0].width or 1, rows[0].height or 1
    high = torch.stack([_on_photo(row, (width, height)).clamp(min=0) for row in rows])
    small = resize(high, (-(-height // STRIDE), -(-width // STRIDE)))
    keys = torch.tensor([int(row.target or 0) for row in rows])
    return {"keys": keys, "cam": _by_maximum(small), "high_res": _by_maximum(high).numpy()}


def _several(rows: list[Row], *fields: str) -> str:
    """Of what an image has several, such as `"2 methods and 3 targets"`. Nothing if it has one of each."""
    counts = [(len({getattr(row, field) for row in rows}), field) for field in fields]
    told = [f"{count} {field}s" for count, field in counts if count > 1]
    return " and ".join(filter(None, (", ".join(told[:-1]), *told[-1:])))


def _by_maximum(maps: Tensor) -> Tensor:
    return maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-5)


def _nifti(row: Row) -> bytes:
    """A NIfTI-1 file of one map, (x, y, z), with the affine map from its cells to the photo's pixels."""
    assert row.map is not None
    grid = row.map.float()
    sides = [*reversed(grid.shape), 1, 1][: max(3, grid.ndim)]
    affine = np.eye(4)[:3]
    if row.on_photo is not None and grid.ndim == 2:
        matrix, size = np.asarray(row.on_photo.matrix), np.asarray(row.on_photo.size)
        cell = size / np.asarray([grid.shape[1], grid.shape[0]])
        affine[:2, :2] = matrix[:, :2] * cell
        affine[:2, 3] = matrix[:, :2] @ (cell / 2) + matrix[:, 2] - 0.5  # from the centers of cells to those of pixels
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(sides), *sides, *(1,) * (7 - len(sides)))
    struct.pack_into("<2h", header, 70, 16, 32)  # float32
    struct.pack_into("<8f", header, 76, 1.0, *np.linalg.norm(affine[:, :3], axis=0), *(1.0,) * 4)
    struct.pack_into("<2f", header, 108, 352.0, 1.0)  # where the values begin, and their slope
    struct.pack_into("<2h", header, 252, 0, 2)  # the affine map below is used
    struct.pack_into("<12f", header, 280, *affine.ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + grid.numpy().astype("<f4").tobytes()
