"""`camfn explain` over many pictures, and as a process: what goes on, what stops, what is on which stream."""

import fcntl
import io
import json
import os
import pkgutil
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camfn.cli import files, job
from tests.support import command_line
from tests.support.command_line import CAMFN, ENVIRONMENT, explain, facts, invoke, picture, process

here = command_line.here
PAIR = ("--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")


def stems(folder: str = "maps") -> list[str]:
    return sorted(path.name.partition("-")[0] for path in Path(folder).glob("*.npy"))


def spoil(path: str) -> None:
    """Leave the first half of a picture."""
    Path(path).write_bytes(Path("a.png").read_bytes()[: Path("a.png").stat().st_size // 2])


# --------------------------------------------------------------------------------------------------------- folders


def test_a_folder_stands_for_its_pictures_by_ending_and_name_without_hidden_ones_and_folders(here):
    Path("pics/inside.png").mkdir(parents=True)
    for name in ("c.PNG", "b.jpg", "d.tif", "a.webp", "e.bmp", ".hidden.png", "inside.png/f.png"):
        picture("a.png").save(f"pics/{name}", format=Image.registered_extensions()[Path(name).suffix.lower()])
    for name in ("notes.txt", "maps.npy", "card.json", "film.mpg", "paper.pdf", "data.h5", "drawing.eps", "png"):
        Path("pics", name).write_text("no picture")
    lines = explain("b.png", "pics", *PAIR)
    assert [line.partition(": ")[0] for line in lines] == [
        "b.png",
        *(f"pics/{n}" for n in ("a.webp", "b.jpg", "c.PNG", "d.tif", "e.bmp")),
    ]
    assert stems() == ["a", "b", "b", "c", "d", "e"]


def test_pipes_and_devices_in_a_folder_are_no_pictures(here):
    Path("pics").mkdir()
    os.mkfifo("pics/a.png")
    Path("pics/b.png").symlink_to("/dev/zero")
    result = invoke("pics", *PAIR)
    assert (result.exit_code, result.stderr.splitlines()[0][:48]) == (2, "Error: the folder 'pics' has no pictures in it (")
    picture("a.png").save("pics/c.png")
    Path("pics/d.png").symlink_to("nowhere")  # a picture is missing, and that is told
    result = invoke("pics", *PAIR)
    assert (result.exit_code, [line.partition(": ")[0] for line in result.stdout.splitlines()]) == (1, ["pics/c.png"])
    assert result.stderr.splitlines()[0] == "Error: there is no file 'pics/d.png'"


def test_a_folder_that_may_not_be_read_is_a_sentence(here, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    result = invoke("empty", *PAIR)
    assert (result.exit_code, result.stderr) == (2, "Error: the folder 'empty' cannot be read: Permission denied\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_folder_that_is_read_only_is_a_sentence(here):
    Path("empty").chmod(0o500)
    result = invoke("a.png", "--model", "net.py:pair", "--out", "empty")
    assert (result.exit_code, result.stderr) == (2, "Error: --out 'empty' cannot be written to\n")


def test_a_picture_given_twice_is_written_twice(here):
    explain("a.png", "a.png", *PAIR)
    assert len(list(Path("maps").iterdir())) == 6


# ------------------------------------------------------------------------------------------------------ bad pictures


def test_a_run_goes_on_after_a_bad_picture_tells_of_it_at_the_end_and_exits_1(here):
    Path("pics").mkdir()
    for name in ("one.png", "three.png"):
        picture("a.png").save(f"pics/{name}")
    spoil("pics/two.png")
    result = process("explain", "pics", "none.jpg", "b.png", *PAIR)
    assert result.returncode == 1
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == ["pics/one.png", "pics/three.png", "b.png"]
    assert result.stderr.splitlines() == [
        "Error: 'pics/two.png' cannot be read as a picture: image file is truncated",
        "Error: there is no file 'none.jpg'",
        "Error: 2 of 5 pictures failed: pics/two.png, none.jpg",
    ]
    assert stems() == ["b", "one", "three"]


def test_one_bad_picture_is_one_line_and_exit_2(here):
    spoil("cut.png")
    result = process("explain", "cut.png", *PAIR)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Error: 'cut.png' cannot be read as a picture: image file is truncated\n"


def test_a_folder_of_one_bad_picture_is_one_bad_picture(here):
    spoil("empty/cut.png")
    result = invoke("empty", *PAIR)
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: 'empty/cut.png' cannot be read as a picture: image file is truncated\n",
    )


def test_where_every_picture_is_bad_no_model_is_loaded(here):
    result = invoke("none.png", "net.py", "--model", "net.py:leaves_a_mark", "--out", "maps")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: there is no file 'none.png'",
        "Error: 'net.py' is not a picture that Pillow can read",
        "Error: 2 of 2 pictures failed: none.png, net.py",
    ]
    assert not Path("loaded").exists()
    assert not Path("maps").exists()


def test_with_json_a_bad_picture_is_an_object_with_its_error(here):
    result = invoke("none.png", "a.png", *PAIR, "--json")
    bad, good = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 1
    assert bad == {"image": "none.png", "error": "there is no file 'none.png'"}
    assert good["image"] == "a.png"
    result = invoke("none.png", *PAIR, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (2, bad)


@pytest.mark.parametrize("order", [("a.png", "wide.png"), ("wide.png", "a.png")])
def test_a_picture_that_the_network_does_not_take_fails_alone(here, order):
    Image.new("RGB", (20, 10)).save("wide.png")
    result = invoke(*order, "--model", "net.py:only_9_by_11", "--layer", "0.2", "--target", "1", "--out", "maps")
    assert result.exit_code == 1
    first, last = result.stderr.splitlines()
    assert first.startswith("Error: wide.png: the model, on an input of shape (1, 3, 10, 20), failed: RuntimeError: ")
    assert last == "Error: 1 of 2 pictures failed: wide.png"
    assert stems() == ["a"]


@pytest.mark.parametrize("order", [("a.png", "dot.png"), ("dot.png", "a.png")])
def test_a_picture_on_which_the_layer_has_no_grid_fails_alone_and_leaves_no_files_of_other_layers(here, order):
    Image.new("RGB", (3, 3)).save("dot.png")
    result = invoke(
        *order, "--model", "net.py:squeezes", "--layer", "first", "--layer", "last", "--target", "1", "--out", "maps"
    )
    assert result.exit_code == 1
    assert "Error: dot.png: layer 'last' gives (1, 3), which has no spatial axes" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: 1 of 2 pictures failed: dot.png"
    assert stems() == ["a", "a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "net.py:wrong_count"], "gives 3 class names, and the model has 4 classes"),
        (["--model", "net.py:flat"], "the model, on an input of shape .* failed: RuntimeError"),
        (["--model", "net.py:broken_preprocess"], "preprocess failed at line"),
        (["--model", "net.py:pair", "--layer", "5"], "layer '5' gives .* which has no spatial axes"),
        (["--model", "net.py:pair", "--layer", "nine"], "no layer named 'nine'"),
        (["--model", "net.py:pair", "--target", "4"], "target 4 is not a class"),
        (["--model", "net.py:pair", "--target", "top9"], "target top9 needs 9 classes"),
        (["--model", "net.py:without_tensors", "--layer", "1", "--method", "cam"], "cam needs a linear layer"),
        (["--model", "net.py:pair", "--out", "net.py/maps"], "--out 'net.py/maps' cannot be made: Not a directory"),
    ],
)
def test_what_is_wrong_for_all_pictures_is_said_once_before_the_first_sweep(here, arguments, words):
    result = invoke("none.png", "a.png", "b.png", "--out", "maps", *arguments)
    (line,) = result.stderr.splitlines()[-1:]
    assert re.search(words, line), line
    assert [line for line in result.stderr.splitlines() if not line.startswith("note: ")] == [line]
    assert (result.exit_code, result.stdout) == (2, "")
    assert not list(here.rglob("*.npy"))


# ---------------------------------------------------------------------------------------------------- kinds of pictures


def grey16() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 65536, (11, 9)).astype(np.uint16)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS = {
    "grey": lambda p: (p.convert("L"), "x.png", {}, np.dstack([np.asarray(p.convert("L"))] * 3)),
    "alpha": lambda p: (Image.merge("RGBA", (*p.split(), Image.new("L", p.size, 9))), "x.png", {}, np.asarray(p)),
    "CMYK": lambda p: (
        Image.fromarray(np.dstack([255 - np.asarray(p), np.zeros((11, 9), np.uint8)]), "CMYK"),
        "x.tif",
        {},
        np.asarray(p),
    ),
    "16 bits": lambda p: (Image.fromarray(grey16()), "x.png", {}, np.dstack([np.rint(grey16() / 257).astype(np.uint8)] * 3)),
    "EXIF": lambda p: (p, "x.png", {"exif": turned()}, np.rot90(np.asarray(p), -1)),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_gives_the_map_of_the_same_picture_in_rgb_made_by_hand(here, kind):
    image, name, saving, rgb = KINDS[kind](picture("a.png"))
    image.save(name, **saving)
    Image.fromarray(np.ascontiguousarray(rgb)).save("hand.png")
    arguments = ("--model", "net.py:plain", "--layer", "2", "--target", "1", "--out", "maps")
    explain(name, "hand.png", *arguments)
    assert np.array_equal(np.load("maps/x-2-grad_cam-1.npy"), np.load("maps/hand-2-grad_cam-1.npy"))
    assert picture("maps/x-2-grad_cam-1.png").tobytes() == picture("maps/hand-2-grad_cam-1.png").tobytes()


def header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of that size, whose pixels are missing."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + b"\0\0\1\0IDAT"


@pytest.mark.parametrize("size", [(10_001, 10_000), (30_000, 30_000)])
def test_a_picture_over_100_megapixels_is_refused_by_its_header(here, size):
    Path("big.png").write_bytes(header(*size))
    result = invoke("big.png", *PAIR)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: 'big.png' has more than 100 megapixels: make it smaller first\n"


def test_a_picture_of_100_megapixels_is_read_and_pillows_warning_of_its_size_is_not_shown(here):
    Path("big.png").write_bytes(header(10_000, 10_000))
    result = process("explain", "big.png", *PAIR)
    (line,) = result.stderr.splitlines()
    assert re.match(r"Error: 'big\.png' cannot be read as a picture: image file is truncated", line)
    assert result.returncode == 2


@pytest.mark.parametrize("command", ["explain", "layers"])
def test_a_narrow_picture_is_refused_before_it_is_enlarged(here, command):
    Image.new("RGB", (1, 10_000)).save("tall.png")
    result = command_line.command(command, "tall.png", "--model", "demo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "preprocess would make an input of 96 x 960000 pixels of the picture's 1 x 10000, more than 16 megapixels: "
        "crop or pad the picture first\n"
    )
    assert len(result.stderr.splitlines()) == 1


def test_an_input_that_preprocess_has_made_too_large_is_refused_before_a_forward(here):
    result = invoke("a.png", "--model", "net.py:enlarges", "--layer", "net.2", "--method", "mean_cam")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: a.png: preprocess makes an input of 4001 x 4000 pixels of the picture's 9 x 11, more than 16 megapixels: "
        "crop or pad the picture first\n"
    )
    assert not Path("seen.txt").exists()


# ---------------------------------------------------------------------------------------------------------- streams


def test_a_good_run_is_quiet_on_stderr_where_that_is_no_terminal(here):
    result = process("explain", "a.png", "b.png", *PAIR)
    assert (result.returncode, result.stderr, len(result.stdout.splitlines())) == (0, "", 2)


def on_a_terminal(*arguments: str) -> str:
    """What a command shows on a terminal, stderr alone."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # lines and columns; else there is no room
    running = subprocess.Popen([*CAMFN, *arguments], stderr=theirs, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert running.wait(60) == 0
    return shown.decode()


def test_a_terminal_gets_a_bar_unless_it_is_not_wanted(here):
    command = (
        "explain",
        "a.png",
        "--model",
        "net.py:slow",
        "--layer",
        "net.2",
        "--target",
        "1",
        "--method",
        "score_cam",
        "--chunk",
        "1",
        "--out",
        "maps",
    )
    assert re.search(r"a\.png net\.2:\s+\d+%.*\d/5 .*forward", on_a_terminal(*command))
    assert on_a_terminal(*command, "--no-progress") == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_forwards_done_and_time_left_on_a_terminal_only(monkeypatch):
    for stream, hidden in ((Terminal(), False), (Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with job._bar("dog.png", hidden) as report:
            for done in (1, 2):
                time.sleep(0.15)  # tqdm draws ten times a second at most
                report(done, 8)
        shown = stream.getvalue()
        if stream.isatty() and not hidden:
            assert "dog.png:  25%" in shown
            assert "2/8" in shown
            assert "<00:0" in shown  # the time left
        else:
            assert shown == ""


def test_the_bar_is_told_of_every_forward_of_the_sweep(here, monkeypatch):
    told = []

    @contextmanager
    def bar(label, hidden):
        yield lambda done, total: told.append((label, done, total))

    monkeypatch.setattr(job, "_bar", bar)
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--method", "is_cam", "--out", "maps")
    assert told == [("a.png 2", 32, 50), ("a.png 2", 50, 50)]  # 5 channels, 10 samples, 32 at a time


def test_what_a_model_prints_and_warns_of_is_on_stderr_and_a_warning_is_one_line(here):
    command = ("--model", "net.py:talks", "--layer", "net.2", "--target", "1", "--out", "maps", "--json")
    result = process("explain", "a.png", "b.png", *command)
    assert result.returncode == 0
    assert [json.loads(line)["class"] for line in result.stdout.splitlines()] == [1, 1]
    said = result.stderr.splitlines()
    assert said.count("note: UserWarning: twice as good") == 1  # and not once for each picture
    assert set(said) == {"note: UserWarning: twice as good", "twice", "as good"}


def test_a_name_that_the_terminal_has_no_letters_for_is_spelt_out(here):
    Path("maße.png").write_bytes(Path("a.png").read_bytes())
    command = ("--model", "net.py:accents", "--layer", "2", "--target", "1", "--out", "maps")
    result = process("explain", "maße.png", *command, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ma\\xdfe.png: F\\xfcchse (class 1), score ")
    assert facts("maps/maße-2-grad_cam-1.json")["class_name"] == "Füchse"


WILD = "a\n\x1b[31mb\r\t\u202e\u2028\udcff.png"
SHOWN = r"a\n\x1b[31mb\r\t\u202e\u2028\udcff.png"


def assert_plain(text: str) -> None:
    assert not [letter for line in text.split("\n") for letter in line if not letter.isprintable()], text


def test_control_characters_of_names_are_spelt_out_in_every_line(here):
    Path(WILD).write_bytes(Path("a.png").read_bytes())
    found = invoke(
        WILD, "a.png", "none" + WILD, "--model", "net.py:wild", "--method", "fem", "--method", "mean_cam", "--out", WILD[:-4]
    )
    assert found.exit_code == 1
    assert_plain(found.stdout + found.stderr)
    first, page, last, _ = found.stdout.splitlines()
    assert page == rf"{SHOWN}: all maps in one picture -> {SHOWN[:-4]}/a___31mb_____-grid.png"
    assert first.startswith(rf"{SHOWN}: two\nlines\x1b[2J (class ")
    assert first.count(f" {SHOWN[:-4]}/") == 2
    assert last.startswith("a.png: ")
    notes = found.stderr.splitlines()
    assert notes[0].startswith(f"note: {SHOWN}: layer=None: ")
    assert notes[-2:] == [f"Error: there is no file 'none{SHOWN}'", rf"Error: 1 of 3 pictures failed: none{SHOWN}"]


def test_a_picture_with_a_wild_name_that_fails_is_told_of_in_one_line(here):
    Path(WILD).write_bytes(Path("a.png").read_bytes())
    for function, words in (
        ("wild_error", r"failed at .*: RuntimeError: one two \\x1b\[2J three"),
        ("pair", "target 9 is not"),
    ):
        found = invoke(WILD, "--model", f"net.py:{function}", "--target", "9")
        (line,) = found.stderr.splitlines()
        assert line.startswith(f"Error: {SHOWN}: ")
        assert re.search(words, line)
        assert_plain(line)


def test_json_of_a_wild_name_is_ascii_and_gives_the_name_back(here):
    Path(WILD).write_bytes(Path("a.png").read_bytes())
    found = invoke(WILD, "none" + WILD, "--model", "net.py:wild", "--layer", "2", "--json", "--out", "maps")
    good, bad = found.stdout.splitlines()
    assert good.isascii()
    assert (json.loads(good)["image"], json.loads(bad)["image"]) == (WILD, "none" + WILD)
    assert json.loads(good)["class_name"] == "two\nlines\x1b[2J"
    written = json.loads(good)["files"]["json"]
    assert facts(written)["image"] == WILD


def test_layers_and_misuse_are_spelt_out_too(here):
    found = command_line.command("layers", "a.png", "--model", "net.py:wild_layer")
    assert [line.split("  ")[0] for line in found.stdout.splitlines()] == ["layer", "0", r"a\x1b", "2", "3"]
    for arguments in (["methods", WILD], ["--a" + WILD], ["methods", "--a" + WILD], [WILD]):
        found = command_line.command(*arguments)
        assert found.exit_code == 2
        assert_plain(found.stderr)
        assert r"a\n\x1b[31mb\r\t\u202e\u2028\udcff" in found.stderr or r"a \x1b[31mb \u202e \udcff" in found.stderr


# ------------------------------------------------------------------------------------------------------- long names


@pytest.mark.parametrize("stem", ["n" * 251, "é" * 125, "n" * 232])  # 255 bytes are the most; a grid's name is shorter
def test_a_name_that_is_too_long_for_the_files_is_cut_and_that_is_told(here, stem):
    Path(f"{stem}.png").write_bytes(Path("a.png").read_bytes())
    methods = ("--method", "mean_cam", "--method", "grad_cam")
    for number in ("", "-2"):
        found = invoke(f"{stem}.png", "a.png", *PAIR, *methods)
        assert found.exit_code == 0, found.output
        written = sorted(Path("maps").glob(f"{stem[:50]}*-2-mean_cam-1{number}.npy"))
        assert len(written) == 1
        assert len(os.fsencode(written[0].name)) <= 255
        assert f"{written[0].with_suffix('')}." in found.stdout
        assert [line for line in found.stderr.splitlines() if "too long" in line] == [
            f"note: {stem}.png: the name is too long for a file name, and is cut, as in {written[0].stem}"
        ]
        assert facts(written[0].with_suffix(".json"))["image"] == f"{stem}.png"
    assert len(list(Path("maps").iterdir())) == 2 * 2 * (2 * 2 + 1)


def test_names_that_differ_in_the_middle_alone_differ_when_they_are_cut(tmp_path):
    names = ["a" * 200 + letter + "b" * 200 for letter in "xyz"]
    cut = [files.fitted(tmp_path, name) for name in names]
    assert len(set(cut)) == 3
    assert all(len(name) == 244 and name.startswith("a" * 99) and name.endswith("b" * 99) for name in cut)
    assert files.fitted(tmp_path, names[0][:244]) == names[0][:244]


def test_a_path_without_room_for_file_names_is_found_before_the_sweep(here):
    out = "/".join(["o" * 250] * 16) + "/" + "p" * 60
    assert len(out) < 4096
    result = invoke("a.png", "--model", "net.py:watched", "--layer", "net.2", "--out", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: --out '{out}' is too long a path for file names in it: name a folder with a shorter path\n"
    assert "rows 5" not in Path("seen.txt").read_text()  # no masked inputs


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SLOWLY = [
    *CAMFN,
    "explain",
    *["a.png"] * 9,
    *["--model", "net.py:slow", "--layer", "net.2", "--target", "1", "--method", "score_cam", "--out", "maps"],
]


def test_a_pipe_that_is_closed_ends_the_run_without_a_word(here):
    running = subprocess.Popen(SLOWLY, **PIPES, env=ENVIRONMENT)
    assert running.stdout.readline().startswith("a.png: class 1")
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == ""
    assert running.wait(60) != 0
    assert len(list(Path("maps").iterdir())) < 27


def test_ctrl_c_is_one_line_and_exit_130_and_leaves_no_half_of_a_picture(here):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a run of the tests in the background may be deaf to it
    running = subprocess.Popen(SLOWLY, **PIPES, env=ENVIRONMENT, preexec_fn=heard)
    running.stdout.readline()  # the first picture is done
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "Interrupted: the files written so far are complete\n")
    written = list(Path("maps").iterdir())
    assert 0 < len(written) < 27
    assert len(written) % 3 == 0
    assert all(path.stat().st_size for path in written)


def test_files_that_are_begun_when_a_run_is_stopped_are_taken_away(here, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("camfn.cli.files.np.save", stopped)
    result = invoke("a.png", *PAIR)
    assert (result.exit_code, result.stderr) == (130, "Interrupted: the files written so far are complete\n")
    assert not list(Path("maps").iterdir())


NUMBERS = {"SIGINT": (130, "Interrupted"), "SIGTERM": (143, "Terminated"), "SIGHUP": (129, "Hung up")}


@pytest.fixture
def as_in_a_shell():
    """No signal is ignored; a run of the tests in the background may be deaf to some."""
    default = {"SIGINT": signal.default_int_handler}
    before = {name: signal.signal(getattr(signal, name), default.get(name, signal.SIG_DFL)) for name in NUMBERS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def sends(name: str, function):
    """The function, after whose first call the process has the signal."""
    sent = []

    def then_sends(*arguments, **more):
        found = function(*arguments, **more)
        if not sent:
            sent.append(os.kill(os.getpid(), getattr(signal, name)))
        return found

    return then_sends


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("place", "whole"),
    [("files.claim", 3), ("files.np.save", 3), ("files.json.dumps", 3), ("explain._explain", 3), ("job._map", 0)],
)
def test_a_signal_leaves_all_files_of_a_map_or_none_and_says_one_line(here, monkeypatch, as_in_a_shell, name, place, whole):
    owner, _, function = f"camfn.cli.{place}".rpartition(".")
    monkeypatch.setattr(f"{owner}.{function}", sends(name, attribute(f"camfn.cli.{place}")))
    result = invoke("a.png", "b.png", *PAIR, "--method", "score_cam")  # which does not run before the folder is made
    status, word = NUMBERS[name]
    assert (result.exit_code, result.stderr) == (status, f"{word}: the files written so far are complete\n")
    written = list(Path("maps").iterdir())
    assert len(written) == whole
    assert all(path.stat().st_size for path in written)
    assert all(facts(path) for path in written if path.suffix == ".json")


def attribute(dotted: str):
    place, name = dotted.rsplit(".", 1)
    return getattr(pkgutil.resolve_name(place), name)


def test_a_signal_that_is_ignored_stops_nothing_and_handlers_are_given_back(here, monkeypatch, as_in_a_shell):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    monkeypatch.setattr(job, "_map", sends("SIGHUP", job._map))
    explain("a.png", *PAIR)
    assert stems() == ["a"]
    assert [signal.getsignal(getattr(signal, name)) for name in NUMBERS] == [
        signal.default_int_handler,
        signal.SIG_DFL,
        signal.SIG_IGN,
    ]


def test_in_another_thread_a_command_leaves_signals_alone(here):
    found = []
    thread = threading.Thread(target=lambda: found.append(invoke("a.png", *PAIR)))
    thread.start()
    thread.join()
    assert found[0].exit_code == 0


def test_sigterm_ends_a_process_with_143_one_line_and_whole_files(here):
    running = subprocess.Popen(SLOWLY, **PIPES, env=ENVIRONMENT)
    running.stdout.readline()  # the first picture is done
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (143, "Terminated: the files written so far are complete\n")
    written = list(Path("maps").iterdir())
    assert 0 < len(written) < 27
    assert len(written) % 3 == 0


# ----------------------------------------------------------------------------------------------------------- extras

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{module}":
            raise {error}

sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("module", "package", "error"),
    [
        ("click", "click", "ModuleNotFoundError('there is none')"),
        ("PIL", "Pillow", "ImportError('it was built for another Python')"),
        ("tqdm", "tqdm", "ModuleNotFoundError('there is none')"),
    ],
)
def test_an_extra_that_cannot_be_imported_is_one_line(here, module, package, error):
    Path("empty/sitecustomize.py").write_text(BLOCK.format(module=module, error=error))
    path = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(Path("empty").resolve()), ENVIRONMENT["PYTHONPATH"]))}
    result = process("explain", "a.png", *PAIR, env=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"Error: the command line needs {package}: pip install 'camfn[cli]'\n"


def test_a_torchvision_that_cannot_be_imported_is_one_line(here):
    found = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    if found.returncode == 0:
        pytest.skip("torchvision works")
    result = process("explain", "a.png", "--model", "torchvision:resnet18", "--no-pretrained", "--out", "maps")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert re.match(r"Error: .*torchvision", line)


# ------------------------------------------------------------------------------------------------------- misspelling


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png"], r"Missing option '--model'"),
        (["--model", "net.py:pair"], r"Missing argument 'IMAGE\|FOLDER\|-\.\.\.'"),
        (["a.png", "--model", "net.py:pair", "--methid", "cam"], r"No such option:? '?--methid'?"),
        (["a.png", "--model", "net.py:pair", "--chunk", "0"], r"Invalid value for '--chunk'"),
        (["a.png", "--model", "net.py:pair", "--seed", "one"], r"Invalid value for '--seed'"),
    ],
)
def test_misuse_is_clicks_own_to_tell(here, arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert re.search(words, result.stderr), result.stderr
