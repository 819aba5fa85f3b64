"""The shards of a run: Parquet files that appear whole or not at all, each named by the hash of its ids."""

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from camfn._errors import CamError, CamWarning, first_line
from camfn.runs.rows import NARROW, Row, arrow, row_of, table_of

if TYPE_CHECKING:
    import pyarrow

MAPS, FAILURES = "shards", "failures"
"""The folders of a run: maps, and images that failed."""


def commit(folder: Path, rows: Sequence[Row], dtype: str = NARROW) -> Path:
    """Write rows as one shard. The same ids have the same file, so that work done twice is stored once."""
    pq = arrow().parquet
    ids = "\n".join(sorted({row.id for row in rows}))
    path = folder / f"{hashlib.sha256(ids.encode()).hexdigest()[:24]}.parquet"
    with whole(path) as file:
        pq.write_table(table_of(rows, dtype), file, compression="zstd", write_page_checksum=True)
    return path


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name when all of it is on the disk. **Raises** `CamError` if it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CamError(f"{str(path.parent)!r} cannot be written to: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    """Put the name of a new file on the disk. Not every system can open a folder."""
    if os.name != "nt":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def make(out: Path) -> None:
    """Make the folders of a run."""
    try:
        for name in (MAPS, FAILURES):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamError(f"the folder {str(out)!r} cannot be made or written to: {error.strerror or error}") from error


def sweep(out: Path) -> None:
    """Remove the half-written files of a killed run. No other run may be writing."""
    for left in (left for folder in (out, out / MAPS, out / FAILURES) for left in folder.glob(".*.tmp")):
        left.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- reading


def ids_in(folder: Path, read: Collection[str] = ()) -> set[str]:
    """The ids of all images in a folder of shards, but for those whose names were read before."""
    found: set[str] = set()
    for table in _tables(folder, lambda file: file.read(columns=["id"]), read):
        found.update(table["id"].unique().to_pylist())
    return found


def rows_in(folder: Path, wanted: Callable[[Any], bool] = lambda row: True) -> Iterator[Row]:
    """Read the rows of all shards, in the order of the shards' names. `wanted` is asked before a map is decoded."""
    for table in _tables(folder, lambda file: file.read()):
        maps = table["map"].combine_chunks()
        starts, values = maps.offsets.to_numpy(), maps.values.to_numpy(zero_copy_only=False)
        stored = maps.is_valid().to_pylist()
        others = table.select([name for name in table.column_names if name != "map"])
        for number, columns in enumerate(others.to_pylist()):
            if wanted(columns):
                yield row_of(columns, values[starts[number] : starts[number + 1]] if stored[number] else None)


def names_in(folder: Path) -> set[str]:
    """The names of the shards in a folder."""
    return {path.name for path in folder.glob("[!.]*.parquet")}


def _tables(folder: Path, read: Callable[[Any], "pyarrow.Table"], but: Collection[str] = ()) -> "Iterator[pyarrow.Table]":
    """Read each shard. One that is cut off or damaged is left out, with a warning."""
    pa = arrow()
    for path in (folder / name for name in sorted(names_in(folder).difference(but))):
        try:
            with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                table = read(file)
        except (pa.ArrowException, OSError) as error:
            told = f"the shard {str(path)!r} is cut off or damaged, and is left out: {first_line(error)}"
            warnings.warn(f"{told}; run again to make its images anew", CamWarning, stacklevel=2)
            continue
        yield table
