"""The command line: what it prints and writes, each refusal in one sentence, and the example that the README runs."""

import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from click.testing import CliRunner
from PIL import Image

import camfn
from camfn import cli, images, zoo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import shapes  # noqa: E402

MODEL = """
import dataclasses
import torch
from torch import nn
import beside

NAMES = ["Dark", "light", "light", "Red fox"]


@dataclasses.dataclass
class Settings:
    "Dataclasses look for their module in sys.modules."
    width: "int" = 3


def net(classes=4):
    generator = torch.Generator().manual_seed(beside.SEED)
    model = nn.Sequential(nn.Conv2d(3, Settings().width, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model.train()


def preprocess(picture):
    import beside_later
    return (beside_later.tensor(picture.resize((8, 6))) - 0.5) / 0.25


def plain(): return net()
def pair(): return net(), preprocess
def triple(): return net(), preprocess, NAMES
def listed(): return [net(), None, tuple(NAMES)]
def wrong_count(): return net(), preprocess, NAMES[:3]
def needs(size): return net()
def gives_none(): return None
def gives_four(): return net(), preprocess, NAMES, 0
def gives_text(): return net(), preprocess, "four"
def raises():
    raise RuntimeError("no weights\\nhere")
def calls():
    return raises()
def refuses():
    from camfn import CamError
    raise CamError("weights are\\nmissing")
def exits():
    raise SystemExit("enough")
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
def maps(): return net()[:4]
def broken_preprocess(): return net(), lambda picture: 1 / 0
def bytes_preprocess(): return net(), lambda picture: (preprocess(picture) * 9).byte()
def batch_preprocess(): return net(), lambda picture: preprocess(picture)[None]
def two_preprocess(): return net(), lambda picture: torch.stack([preprocess(picture)] * 2)
def pil_preprocess(): return net(), lambda picture: picture
def root_preprocess(): return net(), lambda picture: preprocess(picture).clamp(0).sqrt(), NAMES
def double(): return net().double(), preprocess
def already(): return nn.Sequential(net(), nn.Softmax(1)), preprocess
def fails_when_masked():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
        def forward(self, x):
            assert x.shape[0] == 1, "one at a time"
            return self.net(x)
    return Fails(), preprocess
NUMBER = 3
"""
RAISES = next(number for number, line in enumerate(MODEL.splitlines(), 1) if line.startswith("    raise RuntimeError"))
BESIDE = {
    "beside.py": "SEED = 3\n",
    "beside_later.py": "import numpy, torch\n"
    "def tensor(p): return torch.from_numpy(numpy.array(p)).permute(2, 0, 1).float() / 255\n",
    "syntax.py": "import torch\n\ndef f(:\n",
    "absent.py": "import torch\n\nimport no_such_module_at_all\n",
    "nested.py": "import torch\nimport syntax\n",
    "notes.txt": "def f(): ...\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model file, two pictures, and nothing else."""
    for name, text in {"net.py": MODEL, **BESIDE}.items():
        (tmp_path / name).write_text(text)
    random = np.random.default_rng(5)
    for name in ("a.png", "b.png"):
        Image.fromarray(random.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("beside", "beside_later", "syntax"):
        sys.modules.pop(name, None)


def invoke(*arguments: str):
    try:
        runner = CliRunner(mix_stderr=False)  # click < 8.2
    except TypeError:
        runner = CliRunner()
    return runner.invoke(cli.app(), ["explain", *map(str, arguments)])


def explain(*arguments: str) -> list[str]:
    """The lines on stdout of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def facts(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()


def library(function: str, path: str, layer: str, target=None, method: str = "score_cam", **options):
    """The same by the library: the card, and the network's outputs."""
    with zoo.importable(Path.cwd()):
        loaded = zoo.load(f"net.py:{function}")
        x = loaded.preprocess(images.read(path))[None]
    with torch.no_grad():
        return camfn.explain(loaded.model, layer, x, target, method=method, **options), loaded.model.eval()(x)[0]


# ------------------------------------------------------------------------------------------------- what is written


def test_each_picture_gets_a_line_and_three_files(here):
    lines = explain("a.png", "b.png", "--model", "net.py:triple", "--layer", "2", "--out", "maps")
    names = sorted(path.name for path in Path("maps").iterdir())
    classes = [int(library("triple", path, "2")[1].argmax()) for path in ("a.png", "b.png")]
    bases = [f"{stem}-2-score_cam-{c}" for stem, c in zip("ab", classes)]
    assert names == sorted(base + ending for base in bases for ending in (".png", ".npy", ".json"))
    for line, base, path, c in zip(lines, bases, ("a.png", "b.png"), classes):
        card, y = library("triple", path, "2")
        label = ["Dark", "light", "light", "Red fox"][c]
        p = torch.softmax(y.double(), 0)[c]
        score = float(card.scores)
        assert line == (
            f"{path}: {label} (class {c}), score {score:.4g}, probability {p:.3g} -> {Path('maps') / base}.{{png,npy,json}}"
        )


@pytest.mark.parametrize("method", camfn.METHODS)
def test_the_npy_is_the_raw_map_of_explain(here, method):
    options = {"fc": "6"} if method == "cam" else {}
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--method", method, "--out", "maps")
    (saved,) = Path("maps").glob("*.npy")
    raw = library("pair", "a.png", "2", 1, method, normalize=False, **options)[0].maps[0]
    assert np.array_equal(np.load(saved), raw.numpy())
    assert raw.abs().max() > 0
    assert not torch.equal(raw, camfn.maps.normalize(raw, (-2, -1)))  # raw and scaled differ here


def test_the_png_is_the_map_over_the_picture_that_the_network_saw(here):
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")
    (saved,) = Path("maps").glob("*.png")
    seen = picture("a.png").resize((8, 6))  # as preprocess has it, before its scaling
    expected = images.overlay(seen, library("pair", "a.png", "2", 1)[0].maps[0])
    difference = np.asarray(picture(saved)).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1  # the scaling undone is not exact to the last bit, and a half is rounded either way


def test_the_card_tells_what_was_explained_and_how(here):
    explain("a.png", "--model", "net.py:triple", "--layer", "2", "--target", "3", "--out", "maps")
    card, y = library("triple", "a.png", "2", 3)
    found = facts("maps/a-2-score_cam-3.json")
    seconds = found.pop("seconds")
    assert 0 < seconds < 60
    assert found == {
        "image": "a.png",
        "model": "net.py:triple",
        "input": [3, 6, 8],
        "class": 3,
        "class_name": "Red fox",
        "score": float(y[3]),
        "probability": pytest.approx(float(torch.softmax(y.double(), 0)[3]), abs=1e-12),
        "predicted_class": int(y.argmax()),
        "predicted_class_name": ["Dark", "light", "light", "Red fox"][int(y.argmax())],
        "layer": "2",
        "method": "score_cam",
        "grid": [2, 3],
        "forwards": card.forwards,
        "notes": list(card.notes),
        "camfn": camfn.__version__,
        "torch": torch.__version__,
    }


def test_without_preprocess_the_picture_goes_in_as_it_is(here):
    explain("a.png", "--model", "net.py:plain", "--layer", "2", "--target", "0", "--out", "maps")
    found = facts("maps/a-2-score_cam-0.json")
    x = torch.from_numpy(np.asarray(picture("a.png")) / 255).permute(2, 0, 1).float()[None]
    with zoo.importable(here), torch.no_grad():
        y = zoo.load("net.py:plain").model.eval()(x)[0]
    assert found["input"] == [3, 11, 9]
    assert found["score"] == pytest.approx(float(y[0]), abs=1e-5)
    assert found["class_name"] is None
    assert picture("maps/a-2-score_cam-0.png").size == (9, 11)


@pytest.mark.parametrize(("function", "name"), [("listed", "light"), ("batch_preprocess", None), ("double", None)])
def test_the_function_may_return_these_too(here, function, name):
    explain("a.png", "--model", f"net.py:{function}", "--layer", "2", "--target", "1", "--out", "maps")
    assert facts("maps/a-2-score_cam-1.json")["class_name"] == name


@pytest.mark.parametrize("target", ["red fox", "RED Fox", " red fox ", "3"])
def test_a_target_is_an_index_or_a_name_in_any_case(here, target):
    explain("a.png", "--model", "net.py:triple", "--layer", "2", "--target", target, "--out", "maps")
    assert facts("maps/a-2-score_cam-3.json")["class"] == 3


def test_outputs_that_are_probabilities_are_not_made_probabilities_again(here):
    explain("a.png", "--model", "net.py:already", "--layer", "0.2", "--target", "2", "--out", "maps")
    found = facts("maps/a-0.2-score_cam-2.json")
    assert found["probability"] == pytest.approx(found["score"], abs=1e-7)


def test_each_layer_gets_files_and_a_card_of_its_own(here):
    (line,) = explain("a.png", "--model", "net.py:pair", "--layer", "0", "--layer", "2", "--target", "1", "--out", "maps")
    assert line.endswith(f"-> {Path('maps/a-0-score_cam-1')}.{{png,npy,json}}, {Path('maps/a-2-score_cam-1')}.{{png,npy,json}}")
    for layer, grid, channels in (("0", [6, 8], 3), ("2", [2, 3], 5)):
        found = facts(f"maps/a-{layer}-score_cam-1.json")
        assert (found["layer"], found["grid"], found["forwards"]) == (layer, grid, channels + 1)
        raw = library("pair", "a.png", layer, 1, normalize=False)[0].maps[0]
        assert np.array_equal(np.load(f"maps/a-{layer}-score_cam-1.npy"), raw.numpy())


def test_no_file_is_ever_overwritten(here):
    (here / "other").mkdir()
    picture("b.png").save("other/a.png")
    command = ("a.png", "other/a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")
    Path("maps").mkdir()
    Path("maps/a-2-score_cam-1-2.npy").write_text("mine")
    lines = explain(*command)
    first = {path.name: path.read_bytes() for path in Path("maps").iterdir()}
    assert first["a-2-score_cam-1-2.npy"] == b"mine"
    assert facts("maps/a-2-score_cam-1.json")["image"] == "a.png"
    assert facts("maps/a-2-score_cam-1-3.json")["image"] == str(Path("other/a.png"))
    assert lines[1].endswith("a-2-score_cam-1-3.{png,npy,json}")
    explain(*command)
    assert {name: Path("maps", name).read_bytes() for name in first} == first
    assert len(list(Path("maps").iterdir())) == 13


def test_a_name_that_another_run_takes_at_the_same_moment_is_left_to_it(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("theirs")
    monkeypatch.setattr(cli.os.path, "lexists", lambda path: False)  # it was not there yet when we looked
    assert cli._claim(tmp_path, "a") == tmp_path / "a-2"
    assert (tmp_path / "a.json").read_text() == "theirs"


def test_what_the_library_warns_of_is_a_note_on_stderr_and_on_the_card(here):
    result = invoke("a.png", "--model", "net.py:root_preprocess", "--target", "1", "--method", "cam", "--out", "maps")
    assert result.exit_code == 0
    notes = facts("maps/a-3-cam-1.json")["notes"]
    assert notes[0].startswith("layer=None: '3' was chosen")
    assert notes[1].startswith("fc=None: '6' was found")
    assert notes[2] == "the overlay's colours are stretched: preprocess does more than scale each channel"
    assert result.stderr.splitlines() == [f"note: a.png: {note}" for note in notes]
    assert len(result.stdout.splitlines()) == 1


def test_the_models_folder_is_importable_only_while_the_command_runs(here):
    before = list(sys.path)
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--out", "maps")  # beside.py at load, beside_later.py after
    assert sys.path == before
    invoke("a.png", "--model", "net.py:raises")
    assert sys.path == before


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSALS = {
    "a missing picture": (["a.png", "none.png", "--model", "net.py:pair"], r"there is no file 'none\.png'"),
    "a file that is no picture": (["net.py", "--model", "net.py:pair"], r"'net\.py' is not a picture that Pillow can read"),
    "a folder": ([".", "--model", "net.py:pair"], r"'\.' is a folder, not a picture"),
    "no colon": (
        ["a.png", "--model", "net.py"],
        r"--model 'net\.py' does not name a function: write path/to/file\.py:function",
    ),
    "no function": (["a.png", "--model", "net.py:"], r"--model 'net\.py:' does not name a function"),
    "no file": (["a.png", "--model", "nut.py:pair"], r"--model 'nut\.py:pair': there is no file 'nut\.py'"),
    "not Python": (["a.png", "--model", "notes.txt:f"], r"--model: 'notes\.txt' is not a Python file"),
    "an unknown function": (
        ["a.png", "--model", "net.py:pear"],
        r"--model 'net\.py:pear': the file has no function 'pear'; closest: 'pair'",
    ),
    "not a function": (["a.png", "--model", "net.py:NUMBER"], r"the file has no function 'NUMBER'"),
    "a syntax error": (
        ["a.png", "--model", "syntax.py:f"],
        r"--model 'syntax\.py:f' failed at line 3: SyntaxError: invalid syntax",
    ),
    "a failing import": (
        ["a.png", "--model", "absent.py:f"],
        r"--model 'absent\.py:f' failed at line 3 \(import no_such_module_at_all\): ModuleNotFoundError: No module named",
    ),
    "a failing import below": (
        ["a.png", "--model", "nested.py:f"],
        r"--model 'nested\.py:f' failed at line 2 \(import syntax\): SyntaxError",
    ),
    "a function with arguments": (
        ["a.png", "--model", "net.py:needs"],
        r"--model 'net\.py:needs': the function must take no argument \(missing a required argument: 'size'\)",
    ),
    "a function that raises": (
        ["a.png", "--model", "net.py:raises"],
        r"--model 'net\.py:raises' failed at line \d+ \(raise RuntimeError\(.*\)\): RuntimeError: no weights here$",
    ),
    "a function that raises further down": (
        ["a.png", "--model", "net.py:calls"],
        rf"--model 'net\.py:calls' failed at line {RAISES} \(raise RuntimeError\(.*\)\): RuntimeError: no weights here$",
    ),
    "a function that refuses in two lines": (["a.png", "--model", "net.py:refuses"], "^Error: weights are missing$"),
    "a function that exits": (["a.png", "--model", "net.py:exits"], r"'net\.py:exits' failed at line \d+ .*SystemExit: enough"),
    "no model": (
        ["a.png", "--model", "net.py:gives_none"],
        r"must return the model, \(model, preprocess\) or \(model, preprocess, class names\); found NoneType",
    ),
    "four things": (
        ["a.png", "--model", "net.py:gives_four"],
        r"must return the model, .*; found Sequential, function, list, int",
    ),
    "names in one text": (
        ["a.png", "--model", "net.py:gives_text"],
        r"must return the model, .*; found Sequential, function, str",
    ),
    "an unknown layer": (
        ["a.png", "--model", "net.py:pair", "--layer", "2", "--layer", "22"],
        r"no layer named '22' in Sequential; closest: '2'",
    ),
    "a layer without a grid": (
        ["a.png", "--model", "net.py:pair", "--layer", "5"],
        r"^Error: a\.png: layer '5' gives .*no spatial axes",
    ),
    "an unknown method": (
        ["a.png", "--model", "net.py:pair", "--method", "scorecam"],
        r"--method 'scorecam' is not known; closest: 'score_cam'.*; all: .*score_cam",
    ),
    "a class out of range": (
        ["a.png", "--model", "net.py:pair", "--target", "4"],
        r"^Error: a\.png: target 4 is not a class: the model has classes 0 to 3",
    ),
    "a negative class": (["a.png", "--model", "net.py:pair", "--target", "-1"], r"target -1 is not a class"),
    "an unknown name": (
        ["a.png", "--model", "net.py:triple", "--target", "red box"],
        r"--target 'red box' is not a class; closest: 'Red fox'",
    ),
    "a name of two classes": (
        ["a.png", "--model", "net.py:triple", "--target", "light"],
        r"--target 'light' is the name of the classes 1, 2: give the number",
    ),
    "a name without names": (
        ["a.png", "--model", "net.py:pair", "--target", "light"],
        r"--target 'light' is not a class; --model gives no class names, so give the number",
    ),
    "names of other classes": (["a.png", "--model", "net.py:wrong_count"], r"gives 3 class names, and the model has 4 classes"),
    "an output without classes": (
        ["a.png", "--model", "net.py:maps"],
        r"a class is explained, and the model's output has shape \(1, 5, 5, 4\), not \(1, classes\)",
    ),
    "a picture that does not fit": (
        ["a.png", "--model", "net.py:flat"],
        r"the model, on an input of shape \(1, 3, 11, 9\), failed: RuntimeError: .*; without preprocess a picture goes in",
    ),
    "a failing preprocess": (
        ["a.png", "--model", "net.py:broken_preprocess"],
        r"^Error: a\.png: preprocess failed at line \d+ \(.*1 / 0\): ZeroDivisionError",
    ),
    "integers": (
        ["a.png", "--model", "net.py:bytes_preprocess"],
        r"preprocess must return a tensor of floats, of shape \(channels, height, width\); found torch\.uint8 \(3, 6, 8\)",
    ),
    "two of them": (
        ["a.png", "--model", "net.py:two_preprocess"],
        r"preprocess must return .*; found torch\.float32 \(2, 3, 6, 8\)",
    ),
    "not a tensor": (["a.png", "--model", "net.py:pil_preprocess"], r"preprocess must return .*; found Image"),
    "a model that fails on masked inputs": (
        ["a.png", "--model", "net.py:fails_when_masked", "--layer", "net.2"],
        r"^Error: a\.png: the model, on masked inputs, failed at line \d+ \(assert .*\): AssertionError: one at a time",
    ),
    "an output folder that is a file": (
        ["a.png", "--model", "net.py:pair", "--out", "b.png"],
        r"--out 'b\.png' cannot be made: File exists",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_on_stderr_and_exit_2(here, case):
    arguments, words = REFUSALS[case]
    result = invoke(*arguments)
    (sentence,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert sentence.startswith("Error: ")
    assert re.search(words, sentence), sentence
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # click's; not the exception itself
    assert result.stdout == ""
    assert not list(here.rglob("*.npy"))


def test_a_folder_that_cannot_be_written_to_is_found_before_the_sweep(here, monkeypatch):
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    result = invoke("a.png", "--model", "net.py:pair", "--out", "maps")
    assert (result.exit_code, result.stderr) == (2, "Error: --out 'maps' cannot be written to\n")


def test_a_disk_that_is_full_is_a_sentence_too(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.np, "save", full)
    result = invoke("a.png", "--model", "net.py:pair", "--layer", "2", "--out", "maps")
    assert result.exit_code == 2
    assert result.stderr == "Error: a.png: the files cannot be written to 'maps': No space left on device\n"


def test_a_picture_that_may_not_be_read_is_a_sentence(here, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", "a.png")

    monkeypatch.setattr(Image, "open", forbidden)
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    result = invoke("a.png", "--model", "net.py:pair")
    assert result.exit_code == 2
    assert result.stderr == "Error: 'a.png' cannot be read as a picture: [Errno 13] Permission denied: 'a.png'\n"


@pytest.mark.parametrize(("module", "package"), [("PIL", "Pillow"), ("tqdm", "tqdm")])
def test_a_missing_extra_is_named(here, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    result = invoke("a.png", "--model", "net.py:pair")
    assert result.exit_code == 2
    assert result.stderr == f"Error: the command line needs {package}: pip install 'camfn[cli]'\n"


def test_main_says_so_where_click_is_missing():
    code = "import sys; sys.modules['click'] = None; from camfn.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Error: the command line needs click: pip install 'camfn[cli]'\n"


# ---------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_forwards_done_and_time_left_on_a_terminal_only(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli._bar("dog.png") as report:
            for done in (1, 2):
                time.sleep(0.15)  # tqdm draws ten times a second at most
                report(done, 8)
        shown = stream.getvalue()
        if stream.isatty():
            assert "dog.png:  25%" in shown
            assert "2/8" in shown
            assert "<00:0" in shown  # the time left
        else:
            assert shown == ""


def test_the_bar_is_told_of_every_forward_of_the_sweep(here, monkeypatch):
    told = []

    @contextmanager
    def bar(label):
        yield lambda done, total: told.append((label, done, total))

    monkeypatch.setattr(cli, "_bar", bar)
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--method", "is_cam", "--out", "maps")
    assert told == [("a.png 2", 32, 50), ("a.png 2", 50, 50)]  # 5 channels, 10 samples, 32 at a time


def test_the_help_says_that_the_file_is_run_and_what_the_defaults_are():
    text = " ".join(invoke("--help").stdout.split())
    for words in (
        "The file is run",
        "without it the picture goes in as it is, as numbers from 0 to 1, not resized",
        "The picture under the map is the one that the network saw, resized and cropped by preprocess",
        "under a name that no file has yet",
        *camfn.METHODS,
    ):
        assert words in text


# ---------------------------------------------------------------------------------------------------------- the example


def test_the_readmes_two_steps_work_as_processes(tmp_path):
    example = ROOT / "examples" / "shapes.py"
    subprocess.run([sys.executable, str(example), "scene.png"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "camfn", "explain", "scene.png", "--model", f"{example}:model", "--out", "maps"]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("scene.png: horizontal stripes (class 1), score ")
    assert result.stderr.startswith("note: scene.png: layer=None: 'features' was chosen")
    found = facts(tmp_path / "maps" / "scene-features-score_cam-1.json")
    assert found["class_name"] == found["predicted_class_name"] == "horizontal stripes"
    assert is_inside(torch.from_numpy(np.load(tmp_path / "maps" / "scene-features-score_cam-1.npy")), "horizontal stripes", 0)


def is_inside(map: torch.Tensor, name: str, seed: int) -> bool:
    """Is the maximum of the map, at the picture's size, on the class's object?"""
    inside = torch.from_numpy(np.array(shapes.scene(seed)[1][name])) > 0
    return bool(inside.flatten()[camfn.maps.resize(map, inside.shape).argmax()])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["score_cam", "cam"])
def test_in_the_example_each_classs_map_lies_on_the_classs_object(seed, method):
    model, preprocess, names = shapes.model()
    picture, objects = shapes.scene(seed)
    options = {"fc": "classify"} if method == "cam" else {}
    maps = getattr(camfn, method)(model, "features", preprocess(picture)[None], "all", relu=True, **options)[0]
    for name, map in zip(names, camfn.maps.resize(maps, picture.size)):
        inside = torch.from_numpy(np.array(objects[name])) > 0
        assert is_inside(map, name, seed), name
        assert map[inside].sum() > 0.85 * map.sum(), f"{name}: {map[inside].sum() / map.sum():.2f} of the map is on the object"


def test_the_examples_filters_are_what_they_say():
    waves = shapes.gabors()
    assert waves.shape == (32, 1, 15, 15)
    assert waves.sum((1, 2, 3)).abs().max() < 1e-6
    y, x = np.mgrid[-7:8, -7:8]
    for number, kernel in enumerate(waves[:, 0].double().numpy()):
        direction, period = np.deg2rad((0, 90, 45, 135)[number // 8]), (7, 11)[number // 4 % 2]
        wave = np.cos(2 * np.pi * (x * np.cos(direction) + y * np.sin(direction)) / period + number % 4 * np.pi / 2)
        assert (kernel * wave).sum() == pytest.approx(1, abs=1e-5)


def test_the_example_sees_no_class_in_a_plain_picture():
    model, preprocess, _ = shapes.model()
    for grey in (0, 90, 255):
        with torch.no_grad():
            features = model[:5](preprocess(Image.new("RGB", (224, 224), (grey, grey, grey)))[None])
        assert features[..., 1:-1, 1:-1].max() == 0  # outside the picture is grey: at its border there is an edge


def test_the_scene_is_the_same_for_the_same_seed_only():
    (first, _), (again, _), (other, _) = shapes.scene(1), shapes.scene(1), shapes.scene(2)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


# ------------------------------------------------------------------------------------------------------ a real photo


def test_on_a_photo_of_a_dog_and_a_cat_each_class_is_found_on_its_own_animal():
    model, preprocess, names = support.real_networks()["darknet_tiny"]()
    x = preprocess(images.read(support.REAL / "images" / "extra" / "both.png"))[None]
    dog, cat = camfn.score_cam(model, "features", x, torch.tensor([[243, 281]]))[0]
    assert (names[243], names[281]) == ("bull mastiff", "tabby, tabby cat")
    side = dog.shape[1]
    assert dog.argmax() // side < 5  # its head is in the upper third of the 14 x 14 grid, the cat in the lower half
    assert cat.argmax() // side > 8
