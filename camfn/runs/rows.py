"""The rows of a run: one for each image, layer, method and target, and their columns in Parquet."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from camfn._errors import CamError
from camfn.images import View

if TYPE_CHECKING:
    import pyarrow


class Row(NamedTuple):
    """A map of a run, or an image that failed."""

    id: str
    source: str  # the file of the image, and the place in it
    width: int | None = None  # of the photo, in pixels
    height: int | None = None
    input_width: int | None = None  # of the network's input
    input_height: int | None = None
    view: tuple[float, ...] | None = None  # the affine map from the input's pixels to the photo's, by rows; null if not known
    layer: str | None = None
    method: str | None = None
    target: str | None = None  # the index of the class, or the name of the target
    class_name: str | None = None
    label: str | None = None  # that of the source
    predicted: int | None = None  # the class with the highest output
    score: float | None = None
    probability: float | None = None
    map_error: float | None = None  # the estimated error of an approximate map
    findings: tuple[str, ...] = ()  # the kinds of `camfn.explain`'s findings
    error: str | None = None  # why the image failed
    map: Tensor | None = None  # raw, float32, of the layer's grid

    @property
    def on_photo(self) -> View | None:
        """Where the network's input lies on the photo, for `camfn.images.overlay(photo, row.map, view=row.on_photo)`."""
        if self.view is None:
            return None
        a, b, c, d, e, f = self.view
        size, photo = (self.input_width, self.input_height), (self.width, self.height)
        return View(((a, b, c), (d, e, f)), size, photo)  # pyright: ignore[reportArgumentType]: a row with a view has both


def arrow() -> Any:
    """Import pyarrow, with its Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CamError("runs need pyarrow: pip install 'camfn[runs]'") from error
    return pyarrow


NARROW, WIDE = "float16", "float32"
"""The dtypes of stored maps."""


def schema(dtype: str = NARROW) -> "pyarrow.Schema":
    """The columns of a shard. `map` has values of `dtype`, which `scale` multiplies to the raw map of shape `grid`."""
    pa = arrow()
    text, whole, real = pa.string(), pa.int32(), pa.float32()
    types = {
        **dict.fromkeys(("id", "source"), text),
        **dict.fromkeys(("width", "height", "input_width", "input_height"), whole),
        "view": pa.list_(pa.float64()),
        **dict.fromkeys(("layer", "method", "target", "class_name", "label"), text),
        "predicted": whole,
        "score": pa.float64(),
        **dict.fromkeys(("probability", "map_error"), real),
        "findings": pa.list_(text),
        "error": text,
        "grid": pa.list_(whole),
        "map": pa.list_(pa.float16() if dtype == NARROW else real),
        "scale": real,
    }
    return pa.schema([pa.field(name, kind, nullable=name not in ("id", "source")) for name, kind in types.items()])


_COLUMNS = [name for name in Row._fields if name != "map"]


def table_of(rows: Sequence[Row], dtype: str = NARROW) -> "pyarrow.Table":
    """Store rows."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    stored = [(None, None, None) if row.map is None else packed(row.map, dtype) for row in rows]
    columns.update(zip(("grid", "map", "scale"), map(list, zip(*stored)) if stored else ([], [], [])))
    return arrow().table(columns, schema=schema(dtype))


def packed(values: Tensor, dtype: str) -> tuple[list[int], np.ndarray, float]:
    """Return the grid, the values and the scale of a map. A narrow map is divided by its largest finite absolute value.

    >>> packed(torch.tensor([[0.0, 3e5]]), "float16")
    ([1, 2], array([0., 1.], dtype=float16), 300000.0)
    """
    found = values.double().numpy()
    most = largest(values)
    scale = float(np.float32(most)) or 1.0 if dtype == NARROW else 1.0
    return list(found.shape), (found / scale).ravel().astype(dtype), scale


def largest(values: Tensor) -> float:
    """The largest finite absolute value of a map."""
    finite = values[torch.isfinite(values)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def checked(values: Tensor) -> Tensor:
    """Return a map for a row, on the CPU. **Raises** `CamError` if its values are beyond float32."""
    found = values.detach().cpu()
    if largest(found) > torch.finfo(torch.float32).max:
        raise CamError(f"the map has values up to {largest(found):.3g}, beyond float32")
    return found


def row_of(columns: Mapping[str, Any], map: np.ndarray | None) -> Row:
    """Make a row of its columns, with the stored values of its map."""
    plain = {name: columns[name] for name in _COLUMNS}
    plain["view"] = plain["view"] and tuple(plain["view"])
    plain["findings"] = tuple(plain["findings"] or ())
    raw = None
    if map is not None:
        scaled = map.astype(np.float32) * np.float32(columns["scale"])
        raw = torch.from_numpy(scaled.reshape(columns["grid"]))
    return Row(**plain, map=raw)
