"""The images of a run: folders, lists, tables, tar files and iterables; those that are hostile are one sentence each."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import CamError
from camfn.runs.decoding import Decoder
from camfn.runs.sources import Cell, File, Member, items_of
from camfn.zoo.networks import open_network
from tests.support import datasets
from tests.support.datasets import table, tarred

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(color=0, size=(6, 5)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def opened(item):
    with item.source.open() as stream, Image.open(stream) as file:
        return np.asarray(file)[0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- they work


def test_a_folder_gives_the_pictures_below_it(tmp_path):
    datasets.pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(png())
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path / "in")
    assert [item.id for item in items_of(tmp_path / "in")] == ["a/0000.png", "a/0002.png", "b/0001.png"]


def test_a_name_that_is_no_text_has_an_id(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.png"), "wb") as file:
        file.write(png(9))
    (item,) = items_of(tmp_path)
    assert (item.id, opened(item)) == ("\\udcff.png", 9)


def test_a_list_names_paths_beside_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes(png(7))
    (tmp_path / "list.txt").write_text("in/a b.png\tfox\n\nin/b.png\n", encoding="utf-8-sig")
    first, second = items_of(tmp_path / "list.txt")
    assert (first.id, first.label, opened(first)) == ("in/a b.png", "fox", 7)
    assert (second.id, second.label) == ("in/b.png", None)


@pytest.mark.parametrize("nested", [False, True])
def test_a_table_has_bytes(tmp_path, nested):
    cells = [png(color) for color in range(5)]
    cells = [{"bytes": cell, "path": None} for cell in cells] if nested else cells
    found = items_of(table(tmp_path / "t.parquet", image=cells, label=[1, 2, None, 4, 5]))
    assert [(item.id, item.label, opened(item)) for item in found] == [
        *[("0", "1", 0), ("1", "2", 1), ("2", None, 2), ("3", "4", 3), ("4", "5", 4)]
    ]
    assert isinstance(found[3].source, Cell)
    assert found[3].source[2:] == (1, 1), "the second row of the second group"


def test_a_table_has_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    (item,) = items_of(table(tmp_path / "t.parquet", path=["a.png"], id=[12]))
    assert (item.id, opened(item), type(item.source)) == ("12", 3, File)


def test_a_tar_file_gives_its_pictures(tmp_path):
    path = tarred(tmp_path / "s.tar", {"x/1.jpg": png(1), "x/1.cls": b"42\n", "x/1.json": b"{}", "x/2.left.png": png(2)})
    first, second = items_of(path)
    assert (first.id, first.label, opened(first)) == ("s/x/1", "42", 1)
    assert (second.id, second.label, opened(second)) == ("s/x/2.left", None, 2)


def test_names_in_a_tar_file_are_no_paths(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    path = tarred(tmp_path / "in.tar", {"../secret.png": png(2), str(secret): png(3)})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    assert [opened(item) for item in items_of(path)] == [2, 3], "what the tar file holds, and no links"
    assert all(isinstance(item.source, Member) for item in items_of(path))


def test_nothing_is_unpickled(tmp_path):
    """WebDataset's own reader unpickles `.pyd` and runs `.pth`; here they are not opened."""
    path = tarred(tmp_path / "in.tar", {"1.png": png(), "1.pyd": b"cos\nabort\n.", "1.pth": b"x", "1.npy": b"x"})
    assert len(items_of(path)) == 1


def test_an_iterable_gives_pictures_tensors_and_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png(255))
    decode = Decoder(open_network("demo"))
    black = Image.new("RGB", (6, 6))
    given = [("picture", black), (4, torch.zeros(3, 5, 7)), ("path", tmp_path / "a.png"), str(tmp_path / "a.png")]
    found = [decode(item) for item in items_of(given)]
    assert [each.item.id for each in found] == ["picture", "4", "path", str(tmp_path / "a.png")]
    assert [each.x.shape for each in found] == [(3, 96, 96), (3, 5, 7), (3, 96, 115), (3, 96, 115)]
    assert found[0].x.max() == -2, "a picture is preprocessed"
    assert found[1].x.max() == 0, "a tensor is not"


# ------------------------------------------------------------------------------------------------------- they are wrong


def damaged(folder, kind):
    tar = tarred(folder / "t.tar", {"1.png": png(), "2.png": png() * 30})
    data, path = bytearray(tar.read_bytes()), folder / "d.tar"
    second = 1024  # a header and a picture of one block each
    if kind == "header":
        data[second : second + 300] = b"\1" * 300
    path.write_bytes({"header": data, "cut": data[: second + 700], "short": data[:second], "empty": b""}[kind])
    return path


WRONG = {
    "nothing": (lambda folder: folder / "none.txt", "there is no folder or file"),
    "an empty folder": (lambda folder: folder, "has no pictures in it"),
    "another file": (
        lambda folder: written(folder / "a.csv", b"a"),
        "is a file that ends in '.csv'; images are a folder, a list",
    ),
    "a pipe": (lambda folder: piped(folder / "p.txt"), "is a pipe; images are"),
    "a list of bytes": (lambda folder: written(folder / "l.txt", b"a\xff\xfe"), "is not text: invalid start byte at byte 1"),
    "a null": (lambda folder: written(folder / "l.txt", b"a.png\n\0.png"), "line 2 of .* has a null character"),
    "an id twice": (lambda folder: written(folder / "l.txt", b"a.png\na.png"), "the id 'a.png' is there twice"),
    "no table": (lambda folder: written(folder / "t.parquet", b"PAR1nothing"), "cannot be read"),
    "no column": (lambda folder: table(folder / "t.parquet", pixels=[1]), "needs a column image or path; it has pixels"),
    "numbers": (lambda folder: table(folder / "t.parquet", image=[1.5]), "column 'image' .* must have bytes; found double"),
    "paths of bytes": (
        lambda folder: table(folder / "t.parquet", path=[b"a"]),
        "column 'path' .* must have text; found binary",
    ),
    "no id": (lambda folder: table(folder / "t.parquet", path=["a", "b"], id=["a", None]), "row 1 of .* has no id"),
    "an odd id": (
        lambda folder: table(folder / "t.parquet", path=["a"], id=[1.5]),
        "must be text or whole numbers; found float",
    ),
    "no path": (lambda folder: table(folder / "t.parquet", path=["a", None]), "row 1 of .* has no path"),
    "a damaged header": (lambda folder: damaged(folder, "header"), "is cut off or damaged at byte 1024"),
    "a tar file that is cut": (lambda folder: damaged(folder, "cut"), "cut off or damaged|unexpected end"),
    "a tar file without its end": (lambda folder: damaged(folder, "short"), "is cut off or damaged at byte 1024"),
    "an empty tar file": (lambda folder: damaged(folder, "empty"), "cannot be read as a tar file"),
    "a compressed one": (lambda folder: tarred(folder / "z.tar", {"1.png": png()}, mode="w:gz"), "must be decompressed first"),
    "a label of a megabyte": (
        lambda folder: tarred(folder / "t.tar", {"1.cls": b"a" * 2**20, "1.png": png()}),
        "is a label of 1048576 bytes",
    ),
    "a number": (lambda folder: 3, "images are a path, or pairs .*; found int"),
    "pictures alone": (lambda folder: [Image.new("RGB", (2, 2))], "images are a path, or pairs .*; found Image"),
    "a mapping": (lambda folder: {"a": 1}, "found dict"),
}


def written(path, data):
    path.write_bytes(data)
    return path


def piped(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(tmp_path, case):
    make, words = WRONG[case]
    with pytest.raises(CamError, match=words) as caught:
        list(items_of(make(tmp_path)))
    assert "\n" not in str(caught.value)


FAILS = {
    "text": (b"no picture", "cannot identify image file"),
    "nothing": (b"", "cannot identify image file"),
    "a half": (png(size=(60, 50))[:60], "Truncated|truncated|broken"),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_picture_that_fails_tells_why(tmp_path, case):
    data, words = FAILS[case]
    (item,) = items_of([written(tmp_path / "a.png", data)])
    found = Decoder(open_network("demo"))(item)
    assert found.x is None
    assert any(word in found.error for word in words.split("|")), found.error


def test_cells_and_paths_that_lead_nowhere_tell_why(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    items = [
        *items_of(table(tmp_path / "t.parquet", image=[None, b"", png()])),
        *items_of([tmp_path / "none.png", tmp_path / "pipe.png", tmp_path]),
        *items_of([("one", torch.zeros(3)), ("two", 3)]),
    ]
    errors = [Decoder(open_network("demo"))(item).error for item in items]
    words = ["the cell is empty", "the cell is empty", None, "there is no file", "it is a pipe", "it is a folder"]
    for found, wanted in zip(errors, [*words, "a tensor is the network's input", "image"], strict=True):
        assert (found is None) if wanted is None else (wanted in found), found


def test_a_member_that_claims_too_much_is_refused(tmp_path):
    info = tarfile.TarInfo("1.png")
    info.size = 2**40
    (tmp_path / "t.tar").write_bytes(info.tobuf() + b"\0" * 2048)
    with pytest.raises(CamError, match=r"cut off|unexpected end|cannot be read"):
        items_of(tmp_path / "t.tar")
