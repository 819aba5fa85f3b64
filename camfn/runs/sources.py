"""The images of a run: a folder, a list, a table, a tar file, or an iterable. Each has an id, and is opened on its turn.

A name in a tar file is an id and never a path. Nothing is unpickled.
"""

import functools
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from camfn._errors import CamError, escaped, first_line
from camfn._paths import kind
from camfn.runs.rows import arrow

PICTURES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga")
)
"""The endings of picture files in folders and tar files."""
LARGEST = 2**30
"""The maximal number of bytes of a picture in a table or a tar file."""


class File(NamedTuple):
    """A picture file."""

    path: str

    def open(self) -> IO[bytes]:
        other = kind(self.path)
        if other:
            raise CamError(f"it is {other}, not a picture")
        return open(self.path, "rb")

    def __str__(self) -> str:
        return self.path


class Member(NamedTuple):
    """A member of a tar file, by its place."""

    path: str
    name: str
    start: int
    size: int

    def open(self) -> IO[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


class Cell(NamedTuple):
    """A picture in a cell of a table."""

    path: str
    column: str
    group: int
    row: int

    def open(self) -> IO[bytes]:
        found = _group(self.path, self.column, self.group)[self.row].as_py()
        found = found.get("bytes") if isinstance(found, dict) else found
        if not found:
            raise CamError("the cell is empty")
        return io.BytesIO(found)

    def __str__(self) -> str:
        return f"{self.path}:{self.group}:{self.row}"


@functools.lru_cache(maxsize=1)
def _group(path: str, column: str, group: int) -> Any:
    """The column of a row group, kept until another is asked for, since neighbors come one after the other."""
    with arrow().parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False)[column]  # threads do not survive a fork


class Given(NamedTuple):
    """A picture, or a tensor that is the network's input, from an iterable of the caller."""

    picture: Any

    def __str__(self) -> str:
        return type(self.picture).__name__


class Item(NamedTuple):
    """An image, not yet opened."""

    id: str
    source: File | Member | Cell | Given
    label: str | None = None


def items_of(images: Any) -> Iterable[Item]:
    """The images of a run, in a fixed order. Those of an iterable are taken one by one, the others are listed.

    **Raises** `CamError` if they cannot be listed, there are none, or two have the same id.
    """
    if not isinstance(images, (str, os.PathLike)):
        return _once(_given(images))
    found = list(_once(_listed(Path(images))))
    if not found:
        raise CamError(f"{str(images)!r} has no pictures in it")
    return found


def _once(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise CamError(f"the id {item.id!r} is there twice (the second time at {escaped(item.source)}): ids must differ")
        seen.add(item.id)
        yield item


def _listed(path: Path) -> Iterable[Item]:
    if path.is_dir():
        return _in_folder(path)
    readers = {".txt": _in_list, ".parquet": _in_table, ".tar": _in_tar}
    name, reader = repr(str(path)), readers.get(path.suffix.lower())
    if not os.path.lexists(path):
        raise CamError(f"there is no folder or file {name}")
    if reader is None or kind(path):
        other = kind(path) or f"a file that ends in {path.suffix!r}"
        raise CamError(f"{name} is {other}; images are a folder, a list (.txt), a table (.parquet) or a tar file (.tar)")
    try:
        return list(reader(path))
    except FileNotFoundError:
        raise CamError(f"there is no file {name}") from None
    except OSError as error:
        raise CamError(f"{name} cannot be read: {error.strerror or error}") from error


def text_of(path: object) -> str:
    """A path as text that every file can store: bytes that are no text are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------------------------ kinds


def _in_folder(folder: Path) -> Iterator[Item]:
    """The pictures of a folder and its subfolders. The id is the path inside the folder. Hidden names are left out."""

    def failed(error: OSError) -> None:
        raise CamError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error

    entered: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        entered.add(os.path.realpath(place))
        inside = ((name, os.path.realpath(os.path.join(place, name))) for name in sorted(folders) if not name.startswith("."))
        folders[:] = [name for name, real in inside if real not in entered]  # a link may lead back
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in PICTURES and not name.startswith("."):
                yield Item(text_of(path.relative_to(folder).as_posix()), File(str(path)))


def _in_list(path: Path) -> Iterator[Item]:
    """The lines of a list: a path, which is also the id, and after a tab a label. Paths are relative to the list's folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CamError(f"the list {str(path)!r} is not text: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().partition("\t")
        if "\0" in name:
            raise CamError(f"line {number} of {str(path)!r} has a null character, and is not a path")
        if name:
            yield Item(name, File(str(path.parent / name)), label or None)


def _in_table(path: Path) -> Iterator[Item]:
    """The rows of a table: `image` (bytes) or `path`; `id`, which is the path or the row's number by default; `label`."""
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            column = "image" if "image" in names else "path"
            if column not in names:
                raise CamError(f"the table {str(path)!r} needs a column image or path; it has {', '.join(sorted(names))}")
            _check_column(path, column, file.schema_arrow.field(column).type)
            read = sorted(names & {"id", "label", "path"})
            number = 0
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=read).to_pylist() if read else ({},) * _rows(file, group)
                for row, columns in enumerate(rows):
                    yield _of_row(path, columns, column, (group, row), number)
                    number += 1
    except pa.ArrowException as error:
        raise CamError(f"the table {str(path)!r} cannot be read: {first_line(error)}") from error


def _rows(file: Any, group: int) -> int:
    return file.metadata.row_group(group).num_rows


def _check_column(path: Path, column: str, found: Any) -> None:
    """Images are bytes, by themselves or as the field `bytes` of a struct, as in tables of Hugging Face's datasets."""
    types = arrow().types
    if column == "image" and types.is_struct(found):
        found = next((field.type for field in found if field.name == "bytes"), found)
    fits = (types.is_binary, types.is_large_binary) if column == "image" else (types.is_string, types.is_large_string)
    if not any(fit(found) for fit in fits):
        wanted = "bytes" if column == "image" else "text"
        raise CamError(f"the column {column!r} of {str(path)!r} must have {wanted}; found {found}")


def _of_row(path: Path, columns: dict[str, Any], column: str, place: tuple[int, int], number: int) -> Item:
    name, id = columns.get("path"), columns.get("id")
    if column == "path" and not name:
        raise CamError(f"row {number} of {str(path)!r} has no path")
    if id is None:
        if "id" in columns:
            raise CamError(f"row {number} of {str(path)!r} has no id")
        id = number if name is None else name
    if not isinstance(id, (str, int)):
        raise CamError(f"the ids of {str(path)!r} must be text or whole numbers; found {type(id).__name__}")
    label = columns.get("label")
    source = Cell(str(path), column, *place) if column == "image" else File(str(path.parent / str(name)))
    return Item(str(id), source, None if label is None else str(label))


def _in_tar(path: Path) -> Iterator[Item]:
    """The pictures of a tar file. The id is the file's name and the member's, less its ending; `NAME.cls` has the label."""
    with _members(path) as members:
        labels = {}
        for member, start in members:
            stem, ending = os.path.splitext(member.name)
            if ending.lower() == ".cls":
                labels[stem] = _text(path, member, start)
        for member, start in members:
            stem, ending = os.path.splitext(member.name)
            if ending.lower() in PICTURES:
                source = Member(str(path), text_of(member.name), start, member.size)
                yield Item(text_of(f"{path.stem}/{stem}"), source, labels.get(stem))


def _text(path: Path, member: tarfile.TarInfo, start: int) -> str:
    if member.size > 1000:
        raise CamError(f"{member.name!r} in {str(path)!r} is a label of {member.size} bytes: a label is a short text")
    return Member(str(path), member.name, start, member.size).open().read().decode("utf-8", "replace").strip()


@contextmanager
def _members(path: Path) -> Iterator[list[tuple[tarfile.TarInfo, int]]]:
    """The plain files in a tar file, with their places."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed, so that members can be read at their places
            found = [(member, member.offset_data) for member in tar if member.isreg() and not member.issparse()]
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise CamError(
            f"{str(path)!r} cannot be read as a tar file ({first_line(error)}); a compressed one must be decompressed first"
        ) from error
    with open(path, "rb") as file:
        file.seek(min(end, size))
        tail = file.read(tarfile.BLOCKSIZE)
    if end > size or tail.strip(b"\0") or not tail:  # `tarfile` takes a damaged header for the end
        raise CamError(f"the tar file {str(path)!r} is cut off or damaged at byte {min(end, size)}")
    for member, _ in found:
        if member.size > LARGEST:
            raise CamError(f"{escaped(member.name)} in {str(path)!r} has {member.size} bytes: more than a picture has")
    yield found


def _given(images: Any) -> Iterator[Item]:
    """Pairs of an id and a picture or tensor, or paths."""
    wanted = "images are a path, or pairs of an id and a picture or tensor"
    if isinstance(images, dict) or not isinstance(images, Iterable):
        raise CamError(f"{wanted}; found {type(images).__name__}")
    for each in images:
        if isinstance(each, (str, os.PathLike)):
            yield Item(text_of(each), File(os.fspath(each)))
        elif isinstance(each, Sequence) and len(each) == 2 and isinstance(each[0], (str, int)):
            yield Item(str(each[0]), File(os.fspath(each[1])) if isinstance(each[1], (str, os.PathLike)) else Given(each[1]))
        else:
            raise CamError(f"{wanted}; found {type(each).__name__}")
