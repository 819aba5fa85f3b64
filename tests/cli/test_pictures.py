"""The pictures of `camfn explain`: their size, style and colors, one for all maps or one each, and pictures from stdin."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camfn import images, zoo
from camfn.cli import files, options, page
from tests.support import command_line
from tests.support.command_line import CAMFN, ENVIRONMENT, command, explain, facts, invoke, picture

pytest.importorskip("matplotlib")
here = command_line.here
ONE = ("--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")
THREE = ("--model", "net.py:triple", "--layer", "2", "--target", "top3", "--out", "maps")
PNG = "maps/a-2-grad_cam-1.png"


def scaled(path: str) -> np.ndarray:
    """The map of a .npy in [0, 1]."""
    raw = np.load(path)
    return (raw - raw.min()) / (raw.max() - raw.min())


# -------------------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ((), {}),
        (("--style", "contour"), {"style": "contour"}),
        (("--style", "mask", "--alpha", "0.5"), {"style": "mask", "alpha": 0.5}),
        (("--colors", "turbo"), {"colormap": "turbo"}),
        (("--alpha", "0"), {"alpha": 0}),
    ],
)
def test_style_colors_and_alpha_are_those_of_overlay(here, arguments, how):
    explain("a.png", *ONE, *arguments)
    view = images.view_of(zoo.load("net.py:pair").preprocess, (9, 11))
    expected = images.overlay(images.read("a.png"), scaled("maps/a-2-grad_cam-1.npy"), view=view, **how)
    assert np.abs(np.asarray(picture(PNG)).astype(int) - np.asarray(expected)).max() <= 1
    plain = images.overlay(images.read("a.png"), scaled("maps/a-2-grad_cam-1.npy"), view=view)
    assert (np.asarray(plain) != np.asarray(expected)).any() == bool(arguments)  # each shows


def test_the_options_are_those_of_the_library():
    assert set(options.COLORS) == set(images.COLORMAPS)
    assert options.COLORS[0] == images.UNSIGNED
    assert options.STYLES == images.STYLES
    assert options.ALPHA == images.ALPHA


# ------------------------------------------------------------------------------------------------------- the size


@pytest.mark.parametrize(
    ("text", "size"),
    [("photo", (9, 11)), ("input", (8, 6)), ("22", (18, 22)), ("44x1000", (36, 44)), ("1000x27", (27, 33)), ("1", (1, 1))],
)
def test_the_size_is_that_of_the_picture_which_keeps_its_proportions(here, text, size):
    explain("a.png", *ONE, "--size", text)
    found = facts("maps/a-2-grad_cam-1.json")
    assert picture(PNG).size == size
    assert (found["picture"], found["photo"], found["grid"]) == ([size[1], size[0]], [11, 9], [2, 3])
    assert np.load("maps/a-2-grad_cam-1.npy").shape == (2, 3)  # the map's own


def test_the_view_leads_from_the_input_to_the_picture(here):
    Path("crop.py").write_text(
        "from net import *\n"
        "def cropped(picture):\n"
        "    import beside_later\n"
        "    return beside_later.tensor(picture.crop((20, 0, 80, 60)).resize((30, 30)))\n"
        "def load(): return net(), cropped\n"
    )
    Image.new("RGB", (100, 60), "gray").save("wide.png")
    where = ("--model", "crop.py:load", "--layer", "2", "--target", "1", "--out", "maps")
    explain("wide.png", *where)
    view = np.array(facts("maps/wide-2-grad_cam-1.json")["view"])
    assert np.allclose(view, [[2, 0, 20], [0, 2, 0]], atol=0.2)
    explain("wide.png", *where, "--size", "200")
    assert np.allclose(facts("maps/wide-2-grad_cam-1-2.json")["view"], 2 * view, atol=1e-6)
    dark = np.asarray(picture("maps/wide-2-grad_cam-1.png"))
    assert (dark[:, :15] == dark[0, 0]).all()  # cropped away; a line frames what the input shows
    assert (dark[:, 86:] == dark[0, 0]).all()
    sys.modules.pop("net", None)


def test_where_preprocess_cannot_be_undone_the_picture_is_the_one_that_the_network_saw_and_that_is_told(here):
    Path("mixed.py").write_text(
        "from net import *\n"
        "ORDER = torch.randperm(48, generator=torch.Generator().manual_seed(0))\n"
        "def load(): return net(), lambda picture: preprocess(picture).flatten(1)[:, ORDER].view(3, 6, 8)\n"
    )
    result = invoke("a.png", "b.png", "--model", "mixed.py:load", "--layer", "2", "--target", "1", "--out", "maps")
    words = "the picture is the one that the network saw, and not the photo: the preprocessing cannot be undone: "
    notes = [line for line in result.stderr.splitlines() if words in line]
    assert [note.split(": ")[1] for note in notes] == ["a.png", "b.png"]
    assert picture(PNG).size == (8, 6)
    found = facts("maps/a-2-grad_cam-1.json")
    assert (found["view"], found["picture"], found["photo"]) == ([[1, 0, 0], [0, 1, 0]], [6, 8], [11, 9])
    assert any(note.startswith(words) for note in found["notes"])
    sys.modules.pop("net", None)


def test_a_photo_of_more_than_25_megapixels_is_drawn_smaller_and_that_is_told(here, monkeypatch):
    monkeypatch.setattr("camfn.cli.drawing.LARGEST", 50)
    result = invoke("a.png", *ONE)
    assert picture(PNG).size == (6, 8)
    assert "note: a.png: the picture is drawn with 6 x 8 pixels, since the photo has more than 0 megapixels" in result.stderr


# ---------------------------------------------------------------------------------------------- one or each its own


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("--target", "top3"), 3),
        (("--target", "0", "--method", "grad_cam", "--method", "mean_cam"), 2),
        (("--target", "0", "--layer", "0", "--layer", "2"), 2),
        (("--target", "top2", "--layer", "0", "--layer", "2", "--method", "grad_cam", "--method", "mean_cam"), 8),
    ],
)
def test_all_maps_of_an_image_are_in_one_picture_unless_each_is_to_have_its_own(here, arguments, count):
    explain("a.png", "b.png", "--model", "net.py:triple", *arguments, "--out", "maps")
    assert sorted(path.name for path in Path("maps").glob("*.png")) == ["a-grid.png", "b-grid.png"]
    assert len(list(Path("maps").glob("*.npy"))) == len(list(Path("maps").glob("*.json"))) == 2 * count
    explain("a.png", "--model", "net.py:triple", *arguments, "--layout", "separate", "--out", "apart")
    assert {path.stem for path in Path("apart").glob("*.png")} == {path.stem for path in Path("apart").glob("*.npy")}
    assert len(list(Path("apart").glob("*.png"))) == count


def test_the_panels_of_the_picture_are_the_maps_in_the_order_of_layers_methods_and_classes(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "drawn", lambda *given: (drawn.append(given), Image.new("RGB", (1, 1)))[1])
    some = ("--layer", "0", "--layer", "2", "--method", "grad_cam", "--method", "mean_cam", "--target", "0", "--target", "fox")
    found = [json.loads(line) for line in explain("a.png", "--model", "net.py:triple", *some, "--out", "maps", "--json")]
    ((cells, columns, title, bar),) = drawn
    expected = [(layer, method, c) for layer in "02" for method in ("grad_cam", "mean_cam") for c in (0, 3)]
    assert [(each["layer"], each["method"], each["class"]) for each in found] == expected
    names = {0: "Dark", 3: "Red fox"}
    assert [(cell.caption[0], *cell.caption[2:]) for cell in cells] == [(names[c], m, layer) for layer, m, c in expected]
    assert all(cell.caption[1].endswith("%") for cell in cells)
    assert (columns % 2, title, bar) == (0, ("a.png",), page.Bar(0.75, "inferno"))
    view = images.view_of(zoo.load("net.py:triple").preprocess, (9, 11))
    for cell, each in zip(cells, found):
        alone = images.overlay(images.read("a.png"), scaled(each["files"]["npy"]), view=view).resize(cell.image.size)
        assert np.abs(np.asarray(cell.image).astype(float) - np.asarray(alone)).mean() < 25  # drawn larger, not enlarged


def test_what_all_maps_have_in_common_is_in_the_title(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "drawn", lambda *given: (drawn.append(given), Image.new("RGB", (1, 1)))[1])
    explain("a.png", *THREE)
    ((cells, columns, title, _),) = drawn
    assert (columns, title) == (3, ("a.png", "grad_cam, layer 2"))
    assert [len(cell.caption) for cell in cells] == [2, 2, 2]


def test_a_layer_is_in_the_title_if_all_maps_are_of_it_and_else_in_the_captions(here, monkeypatch):
    titles, captions = [], []

    def draw(cells, columns, title, bar):
        titles.append(title)
        captions.append([cell.caption[2:] for cell in cells])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(page, "drawn", draw)
    some = ("--model", "net.py:pair", "--layer", "2", "--target", "1", "--method", "grad_cam", "--method")
    for other in ("mean_cam", "full_grad"):  # full_grad explains no layer
        explain("a.png", *some, other)
    assert titles == [("a.png", "layer 2"), ("a.png",)]
    assert captions == [[("grad_cam",), ("mean_cam",)], [("grad_cam", "2"), ("full_grad",)]]


def test_captions_are_where_there_are_several_maps_or_where_they_are_wished(here):
    explain("a.png", *THREE)
    explain("a.png", *THREE, "--no-captions")
    assert picture("maps/a-grid-2.png").height < picture("maps/a-grid.png").height
    explain("a.png", *ONE, "--size", "200", "--out", "one")
    explain("a.png", *ONE, "--size", "200", "--out", "one", "--captions")
    alone, told = picture(PNG.replace("maps", "one")), picture("one/a-2-grad_cam-1-2.png")
    assert alone.size == (164, 200)
    assert told.height > 200 + 4 * 11  # class, probability, method, layer
    gap = (told.width - 164) // 2
    assert np.array_equal(np.asarray(told)[gap : gap + 200, gap : gap + 164], np.asarray(alone))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--style", "cloud"), "'cloud' is not one of 'heat', 'contour', 'mask'"),
        (("--colors", "magma"), "'magma' is not one of"),
        (("--alpha", "1.5"), "1.5 is not in the range 0<=x<=1"),
        (("--layout", "row"), "'row' is not one of 'grid', 'separate'"),
    ],
)
def test_an_option_that_is_not_known_is_clicks_own_to_tell(here, arguments, words):
    result = invoke("a.png", *ONE, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


# --------------------------------------------------------------------------------------------------- standard input


def test_a_picture_from_stdin_gives_the_files_of_the_same_picture_by_the_name_stdin(here):
    explain("a.png", *ONE)
    result = invoke("-", *ONE, given=Path("a.png").read_bytes())
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("stdin: class 1, score ")
    assert np.array_equal(np.load("maps/stdin-2-grad_cam-1.npy"), np.load("maps/a-2-grad_cam-1.npy"))
    assert picture("maps/stdin-2-grad_cam-1.png").tobytes() == picture(PNG).tobytes()
    assert facts("maps/stdin-2-grad_cam-1.json")["image"] == "stdin"


def test_stdin_may_stand_among_files_and_twice_and_a_file_of_that_name_has_a_path(here):
    result = invoke("a.png", "-", "-", *ONE, given=Path("b.png").read_bytes())
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == ["a.png", "stdin", "stdin"]
    picture("a.png").save("-", format="png")
    assert invoke("./-", *ONE).stdout.startswith("-: class 1, score ")


def test_layers_takes_a_picture_from_stdin(here):
    given = Path("a.png").read_bytes()
    assert command("layers", "-", "--model", "net.py:pair", given=given).stdout == (
        command("layers", "a.png", "--model", "net.py:pair").stdout
    )


HOW = "pipe a picture into the command, as in: camfn explain - --model demo < photo.jpg"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", f"- stands for standard input, which is empty: {HOW}"),
        (b"no picture", "standard input is not a picture that Pillow can read"),
    ],
)
@pytest.mark.parametrize("name", ["explain", "layers"])
def test_a_stdin_without_a_picture_is_one_sentence(here, name, given, words):
    result = command(name, "-", "--model", "net.py:leaves_a_mark", given=given)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"Error: {words}\n")
    assert not Path("loaded").exists()


def test_the_size_of_a_picture_from_stdin_is_checked_by_its_header(here):
    stream = io.BytesIO()
    Image.new("1", (10_001, 10_000)).save(stream, "png")
    result = invoke("-", *ONE, given=stream.getvalue()[:99])  # without its pixels
    assert result.stderr == "Error: standard input has more than 100 megapixels: make it smaller first\n"
    result = invoke("-", *ONE, given=Path("a.png").read_bytes()[:300])
    assert result.stderr.startswith("Error: standard input cannot be read as a picture: ")


def test_no_more_is_read_from_stdin_than_a_picture_can_have(here, monkeypatch):
    monkeypatch.setattr(files, "_LIMIT", 2**20)
    result = invoke("-", *ONE, given=b"x" * (2**20 + 1))
    assert result.stderr == "Error: standard input has more than 1 MiB, more than a picture: name a file\n"


def test_a_stdin_that_is_a_terminal_or_closed_is_one_sentence(here):
    pair = pty.openpty()
    result = subprocess.run(
        [*CAMFN, "explain", "-", *ONE], stdin=pair[1], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    for end in pair:
        os.close(end)
    assert (result.returncode, result.stderr) == (2, f"Error: - stands for standard input, which is a terminal: {HOW}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.sys, "stdin", None)
        with pytest.raises(files.CamError, match=r"^- stands for standard input, which is closed: pipe a picture"):
            files.source("-")
