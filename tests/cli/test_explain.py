"""`camfn explain`: what it prints and writes, and each refusal in one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import camfn
from camfn import images, zoo
from camfn.cli import catalog, files, models
from tests.oracles import closeness, libraries, networks
from tests.support import command_line
from tests.support.command_line import RAISES, explain, facts, invoke, picture

here = command_line.here


def library(function: str, path: str, layer: str, target=None, method: str = "grad_cam", **given):
    """The same by the library: the card, and the network's outputs."""
    with zoo.opened(f"net.py:{function}") as loaded, torch.no_grad():
        x = loaded.preprocess(images.read(path))[None]
        return camfn.explain(loaded.model, layer, x, target, method=method, **given), loaded.model.eval()(x)[0]


# ------------------------------------------------------------------------------------------------- what is written


def test_each_picture_gets_a_line_and_three_files(here):
    lines = explain("a.png", "b.png", "--model", "net.py:triple", "--layer", "2", "--out", "maps")
    names = sorted(path.name for path in Path("maps").iterdir())
    classes = [int(library("triple", path, "2")[1].argmax()) for path in ("a.png", "b.png")]
    bases = [f"{stem}-2-grad_cam-{c}" for stem, c in zip("ab", classes)]
    assert names == sorted(base + ending for base in bases for ending in (".png", ".npy", ".json"))
    for line, base, path, c in zip(lines, bases, ("a.png", "b.png"), classes):
        card, y = library("triple", path, "2")
        label = ["Dark", "light", "light", "Red fox"][c]
        p = torch.softmax(y.double(), 0)[c]
        score = float(card.scores)
        assert line == (
            f"{path}: {label} (class {c}), score {score:.4g}, probability {p:.3g} -> {Path('maps') / base}.{{png,npy,json}}"
        )


@pytest.mark.parametrize("method", networks.LAYERED)
def test_the_npy_is_the_raw_map_of_explain(here, method):
    given, layer = {"fc": "6"} if method == "cam" else {}, "2" if camfn.METHODS[method].of_layer else None
    named = [] if layer is None else ["--layer", layer]
    explain("a.png", "--model", "net.py:pair", *named, "--target", "1", "--method", method, "--out", "maps")
    (saved,) = Path("maps").glob("*.npy")
    assert saved.name == ("-".join(["a", *named[1:], method, "1"]) + ".npy")
    assert facts(saved.with_suffix(".json"))["layer"] == layer
    raw = library("pair", "a.png", layer, 1, method, normalize=False, **given)[0].maps[0]
    assert np.array_equal(np.load(saved), raw.numpy())
    assert raw.abs().max() > 0
    assert not torch.equal(raw, camfn.maps.normalize(raw, (-2, -1)))  # raw and scaled differ here


@pytest.mark.parametrize("method", sorted(set(camfn.METHODS) - set(networks.LAYERED)))
def test_attention_is_explained_without_a_layer(here, method):
    explain("a.png", "--model", "net.py:attends", "--target", "1", "--method", method, "--out", "maps")
    (saved,) = Path("maps").glob("*.npy")
    assert saved.name == f"a-{method}-1.npy"
    raw = library("attends", "a.png", None, 1, method, normalize=False)[0].maps[0]
    assert raw.shape == (3, 4)
    assert np.array_equal(np.load(saved), raw.numpy())


def apart(found: Path | str, expected: Image.Image) -> int:
    """The largest difference of two pictures. One is rounding: a half is rounded either way."""
    return int(np.abs(np.asarray(picture(found)).astype(int) - np.asarray(expected)).max())


def test_the_png_is_the_map_over_the_photo_at_its_size(here):
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")
    (saved,) = Path("maps").glob("*.png")
    view = images.view_of(zoo.load("net.py:pair").preprocess, (9, 11))
    map = library("pair", "a.png", "2", 1)[0].maps[0]
    expected = images.overlay(images.read("a.png"), map, view=view)
    assert picture(saved).size == (9, 11)
    assert apart(saved, expected) == 0
    assert apart(saved, images.overlay(images.read("a.png"), map.flip(1), view=view)) > 30


def test_with_size_input_the_png_is_the_map_over_the_picture_that_the_network_saw(here):
    result = invoke("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--size", "input", "--out", "maps")
    (saved,) = Path("maps").glob("*.png")
    seen = picture("a.png").resize((8, 6))  # as preprocess has it, before its scaling
    expected = images.overlay(seen, library("pair", "a.png", "2", 1)[0].maps[0])
    assert apart(saved, expected) <= 1  # the scaling undone is not exact to the last bit
    assert "note" not in result.stderr


def test_the_card_tells_what_was_explained_and_how(here):
    explain("a.png", "--model", "net.py:triple", "--layer", "2", "--target", "3", "--out", "maps")
    card, y = library("triple", "a.png", "2", 3)
    found = facts("maps/a-2-grad_cam-3.json")
    seconds = found.pop("seconds")
    assert 0 < seconds < 60
    assert found == {
        "image": "a.png",
        "model": "net.py:triple",
        "weights": None,
        "pretrained": True,
        "device": "cpu",
        "input": [3, 6, 8],
        "class": 3,
        "class_name": "Red fox",
        "score": float(y[3]),
        "probability": pytest.approx(float(torch.softmax(y.double(), 0)[3]), abs=1e-12),
        "predicted_class": int(y.argmax()),
        "predicted_class_name": ["Dark", "light", "light", "Red fox"][int(y.argmax())],
        "layer": "2",
        "method": "grad_cam",
        "seed": None,
        "grid": [2, 3],
        "photo": [11, 9],
        "picture": [11, 9],
        "view": [pytest.approx([9 / 8, 0, 0], abs=0.3), pytest.approx([0, 11 / 6, 0], abs=0.3)],
        "forwards": card.forwards,
        "backwards": card.backwards,
        "heads": 0,
        "findings": [finding._asdict() for finding in card.findings],
        "notes": list(card.notes),
        "check": None,
        "camfn": camfn.__version__,
        "torch": torch.__version__,
    }


def test_several_methods_have_files_of_their_own_and_one_picture(here):
    result = invoke(
        "a.png", "--model", "net.py:pair", "--layer", "2", "--method", "grad_cam", "--method", "score_cam", "--target", "1"
    )
    for method in ("grad_cam", "score_cam"):
        card, _ = library("pair", "a.png", "2", 1, method=method, normalize=False)
        assert np.allclose(np.load(f"camfn-maps/a-2-{method}-1.npy"), card.maps[0], atol=1e-6)
        assert facts(f"camfn-maps/a-2-{method}-1.json")["findings"] == [finding._asdict() for finding in card.findings]
        assert f"camfn-maps/a-2-{method}-1." in result.stdout
    assert result.stdout.splitlines()[-1] == "a.png: all maps in one picture -> camfn-maps/a-grid.png"
    assert [path.name for path in Path("camfn-maps").glob("*.png")] == ["a-grid.png"]
    assert picture("camfn-maps/a-grid.png").width > 600  # two panels, side by side, although the photo is small


def test_of_all_methods_those_that_do_not_fit_are_left_out(here, monkeypatch):
    some = {name: catalog.ROWS[name] for name in ("cam", "grad_cam", "score_cam")}
    monkeypatch.setattr(catalog, "ROWS", some)
    result = invoke("a.png", "--model", "net.py:pair", "--layer", "0", "--method", "all", "--target", "1")  # no CAM there
    assert {path.name for path in Path("camfn-maps").glob("*.npy")} == {"a-0-grad_cam-1.npy", "a-0-score_cam-1.npy"}
    assert "note: a.png: cam is left out: cam needs a linear layer from the layer's 3 channels" in result.stderr


def test_a_method_that_is_named_and_does_not_fit_is_an_error(here):
    result = invoke("a.png", "--model", "net.py:pair", "--layer", "0", "--method", "cam", "--method", "score_cam")
    assert result.exit_code == 2
    assert "cam needs a linear layer" in result.stderr
    assert not Path("camfn-maps").exists()


def test_without_preprocess_the_picture_goes_in_as_it_is(here):
    explain("a.png", "--model", "net.py:plain", "--layer", "2", "--target", "0", "--out", "maps")
    found = facts("maps/a-2-grad_cam-0.json")
    x = torch.from_numpy(np.asarray(picture("a.png")) / 255).permute(2, 0, 1).float()[None]
    with zoo.opened("net.py:plain") as loaded, torch.no_grad():
        y = loaded.model.eval()(x)[0]
    assert found["input"] == [3, 11, 9]
    assert found["score"] == pytest.approx(float(y[0]), abs=1e-5)
    assert found["class_name"] is None
    assert picture("maps/a-2-grad_cam-0.png").size == (9, 11)


@pytest.mark.parametrize(("function", "name"), [("listed", "light"), ("batch_preprocess", None), ("double", None)])
def test_the_function_may_return_these_too(here, function, name):
    explain("a.png", "--model", f"net.py:{function}", "--layer", "2", "--target", "1", "--out", "maps")
    assert facts("maps/a-2-grad_cam-1.json")["class_name"] == name


@pytest.mark.parametrize("target", ["red fox", "RED Fox", " red fox ", "red_fox", "3", "fox", "re"])
def test_a_target_is_an_index_a_name_in_any_case_or_a_part_of_it(here, target):
    explain("a.png", "--model", "net.py:triple", "--layer", "2", "--target", target, "--out", "maps")
    assert facts("maps/a-2-grad_cam-3.json")["class"] == 3


def test_outputs_that_are_probabilities_are_not_made_probabilities_again(here):
    explain("a.png", "--model", "net.py:already", "--layer", "0.2", "--target", "2", "--out", "maps")
    found = facts("maps/a-0.2-grad_cam-2.json")
    assert found["probability"] == pytest.approx(found["score"], abs=1e-7)


def test_each_layer_gets_files_and_a_card_of_its_own(here):
    swept = ("--method", "score_cam", "--target", "1", "--out", "maps")
    line, page = explain("a.png", "--model", "net.py:pair", "--layer", "0", "--layer", "2", *swept)
    assert line.endswith(f"-> {Path('maps/a-0-score_cam-1')}.{{npy,json}}, {Path('maps/a-2-score_cam-1')}.{{npy,json}}")
    assert page == f"a.png: all maps in one picture -> {Path('maps/a-grid.png')}"
    for layer, grid, channels in (("0", [6, 8], 3), ("2", [2, 3], 5)):
        found = facts(f"maps/a-{layer}-score_cam-1.json")
        assert (found["layer"], found["grid"], found["forwards"]) == (layer, grid, channels + 1)
        raw = library("pair", "a.png", layer, 1, "score_cam", normalize=False)[0].maps[0]
        assert np.array_equal(np.load(f"maps/a-{layer}-score_cam-1.npy"), raw.numpy())


def test_no_file_is_ever_overwritten(here):
    (here / "other").mkdir()
    picture("b.png").save("other/a.png")
    command = ("a.png", "other/a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--out", "maps")
    Path("maps").mkdir()
    Path("maps/a-2-grad_cam-1-2.npy").write_text("mine")
    lines = explain(*command)
    first = {path.name: path.read_bytes() for path in Path("maps").iterdir()}
    assert first["a-2-grad_cam-1-2.npy"] == b"mine"
    assert facts("maps/a-2-grad_cam-1.json")["image"] == "a.png"
    assert facts("maps/a-2-grad_cam-1-3.json")["image"] == str(Path("other/a.png"))
    assert lines[1].endswith("a-2-grad_cam-1-3.{png,npy,json}")
    explain(*command)
    assert {name: Path("maps", name).read_bytes() for name in first} == first
    assert len(list(Path("maps").iterdir())) == 13


def test_a_name_that_another_run_takes_at_the_same_moment_is_left_to_it(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("theirs")
    monkeypatch.setattr(files.os.path, "lexists", lambda path: False)  # it was not there yet when we looked
    assert files.claim(tmp_path, "a", ("png", "json")) == tmp_path / "a-2"
    assert (tmp_path / "a.json").read_text() == "theirs"


def test_what_the_library_warns_of_is_a_note_on_stderr_and_on_the_card(here):
    command = ("--model", "net.py:root_preprocess", "--size", "input", "--target", "1", "--method", "cam", "--out", "maps")
    result = invoke("a.png", *command)
    assert result.exit_code == 0
    notes = facts("maps/a-3-cam-1.json")["notes"]
    assert notes[0].startswith("layer=None: '3' was chosen")
    assert notes[1].startswith("fc=None: '6' was found")
    assert notes[2] == "the overlay's colors are stretched: preprocess does more than scale each channel"
    assert result.stderr.splitlines() == [f"note: a.png: {note}" for note in notes]
    assert len(result.stdout.splitlines()) == 1


def test_what_several_methods_find_is_said_once_and_is_on_the_card_of_each(here):
    command = ("--model", "net.py:root_preprocess", "--size", "input", "--layer", "3", "--target", "1", "--out", "maps")
    result = invoke("a.png", *command, "--method", "mean_cam", "--method", "fem")
    said = "the overlay's colors are stretched: preprocess does more than scale each channel"
    assert all(said in facts(f"maps/a-3-{method}-1.json")["notes"] for method in ("mean_cam", "fem"))
    assert [line for line in result.stderr.splitlines() if "stretched" in line] == [f"note: a.png: {said}"]


def test_a_note_of_some_methods_names_them(here):
    command = ("--model", "net.py:pair", "--target", "1", "--method", "rise", "--method", "grad_cam", "--method", "layer_cam")
    notes = [line for line in invoke("a.png", *command).stderr.splitlines() if "layer=None" in line]
    assert [line.partition(" was chosen")[0] for line in notes] == ["note: a.png: grad_cam, layer_cam: layer=None: '3'"]


def test_the_models_folder_is_importable_only_while_the_command_runs(here):
    before = list(sys.path)
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--out", "maps")  # beside.py at load, beside_later.py after
    assert sys.path == before
    invoke("a.png", "--model", "net.py:raises")
    assert sys.path == before


# --------------------------------------------------------------------------------------------------------- options


def best(function: str, path: str, k: int) -> list[int]:
    return library(function, path, "2")[1].topk(k).indices.tolist()


def test_the_best_classes_have_files_of_their_own_best_first(here):
    top = ("--target", "Top3", "--layout", "separate", "--out", "maps")
    found = explain("a.png", "--model", "net.py:triple", "--layer", "2", *top)
    view = images.view_of(zoo.load("net.py:triple").preprocess, (9, 11))
    classes = best("triple", "a.png", 3)
    assert len(list(Path("maps").iterdir())) == 9
    for line, c in zip(found, classes, strict=True):
        card, y = library("triple", "a.png", "2", c, normalize=False)
        assert f"(class {c}), score {float(y[c]):.4g}, " in line
        assert line.endswith(f"-> {Path('maps')}/a-2-grad_cam-{c}.{{png,npy,json}}")
        assert facts(f"maps/a-2-grad_cam-{c}.json")["score"] == pytest.approx(float(y[c]), abs=1e-6)
        closeness.assert_close(torch.from_numpy(np.load(f"maps/a-2-grad_cam-{c}.npy")), card.maps[0], 1e-6)
        expected = images.overlay(images.read("a.png"), camfn.maps.normalize(card.maps[0], (-2, -1)), view=view)
        assert apart(f"maps/a-2-grad_cam-{c}.png", expected) <= 1


def rows(*arguments: str) -> int:
    """How many inputs went through the network of a command."""
    Path("seen.txt").unlink(missing_ok=True)
    explain("a.png", "--model", "net.py:watched", "--layer", "net.2", "--method", "score_cam", *arguments)
    return sum(int(line.split()[1]) for line in Path("seen.txt").read_text().splitlines() if line.startswith("rows"))


def test_the_best_classes_come_from_one_sweep(here):
    # Five channels; the clean input, looked at and tried, four times; and how the model may be run, by three inputs.
    assert rows("--target", "top4") == rows("--target", "0") == 5 + 4 + 3


@pytest.mark.parametrize(("logit", "predicted"), [(-3.0, None), (1.0, 0)])
@pytest.mark.parametrize("shape", ["(1, 1)", "(1,)"])
def test_the_probability_of_a_single_logit_is_its_sigmoid(here, logit, predicted, shape):
    """An output of 1 is no probability of 1: it is a logit too."""
    Path("one.py").write_text(
        f"""import torch
class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return (0 * self.conv(x).mean((1, 2, 3)) + {logit}).reshape({shape})
def load(): return One()
"""
    )
    line = explain("a.png", "--model", "one.py:load", "--layer", "conv", "--method", "mean_cam", "--json")[0]
    found = json.loads(line)
    assert (found["class"], found["score"], found["predicted_class"]) == (0, logit, predicted)
    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-12)
    assert found["predicted_class_name"] is None


def test_repeated_targets_are_one_table_of_classes_in_their_order_each_once_from_one_sweep(here):
    first, second = best("triple", "a.png", 2)
    other = next(index for index in (0, 3) if index not in (first, second))
    name = {0: "dark", 3: "fox"}[other]
    targets = [each for target in (name, "top2", str(first), str(other)) for each in ("--target", target)]
    found = explain("a.png", "--model", "net.py:triple", "--layer", "2", *targets, "--json", "--out", "maps")
    assert [json.loads(line)["class"] for line in found] == [other, first, second]
    assert rows(*(each for target in ("3", "top2", "0") for each in ("--target", target))) == rows("--target", "0")


def test_top_1_is_the_predicted_class(here):
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "top1", "--out", "maps")
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--out", "again")
    (one,), (other,) = Path("maps").glob("*.npy"), Path("again").glob("*.npy")
    assert one.name == other.name
    assert np.array_equal(np.load(one), np.load(other))


def test_a_class_that_is_called_top2_is_had_by_its_index_only(here):
    explain("a.png", "--model", "net.py:tops", "--layer", "2", "--target", "top2", "--out", "maps")
    assert len(list(Path("maps").glob("*.npy"))) == 2
    explain("a.png", "--model", "net.py:tops", "--layer", "2", "--target", "1", "--out", "one")
    assert facts("one/a-2-grad_cam-1.json")["class_name"] == "top2"


def test_the_seed_is_that_of_the_noise(here):
    command = ("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--method", "ss_cam")
    for seed, arguments in ((0, ()), (7, ("--seed", "7"))):
        explain(*command, *arguments, "--out", f"maps{seed}")
        raw = library("pair", "a.png", "2", 1, "ss_cam", seed=seed, normalize=False)[0].maps[0]
        assert np.array_equal(np.load(f"maps{seed}/a-2-ss_cam-1.npy"), raw.numpy())
        assert facts(f"maps{seed}/a-2-ss_cam-1.json")["seed"] == seed
    assert not np.array_equal(np.load("maps0/a-2-ss_cam-1.npy"), np.load("maps7/a-2-ss_cam-1.npy"))


def test_a_chunk_is_as_many_inputs_as_go_through_the_network_at_once(here):
    swept = ("--method", "score_cam", "--chunk", "2", "--out", "maps")
    explain("a.png", "--model", "net.py:watched", "--layer", "net.2", "--target", "1", *swept)
    assert Path("seen.txt").read_text().splitlines()[-3:] == ["rows 2", "rows 2", "rows 1"]
    raw = library("pair", "a.png", "2", 1, "score_cam", normalize=False)[0].maps[0]
    closeness.assert_close(torch.from_numpy(np.load("maps/a-net.2-score_cam-1.npy")), raw, 1e-5)


def test_the_device_is_where_the_model_is_moved_to(here):
    explain("a.png", "--model", "net.py:watched", "--layer", "net.2", "--device", "cpu", "--out", "maps")
    assert Path("seen.txt").read_text().startswith("to cpu\n")
    (card,) = Path("maps").glob("*.json")
    assert facts(card)["device"] == "cpu"


@pytest.mark.parametrize("function", ["pair", "without_tensors"])
def test_the_input_is_moved_to_the_device_of_the_model_with_tensors_or_without(here, function):
    away = torch.device("meta")  # a device that every torch has, though nothing can be computed on it
    with models.opened(f"net.py:{function}", None, False, away) as loaded:
        assert {tensor.device for tensor in loaded.model.state_dict().values()} <= {away}
        assert models.input_of(loaded, images.read("a.png"), away).device == away


def test_weights_are_those_of_the_file(here):
    with zoo.opened("net.py:pair") as loaded, torch.no_grad():
        state = {name: 2 * tensor for name, tensor in loaded.model.state_dict().items()}
        loaded.model.load_state_dict(state)
        y = loaded.model.eval()(loaded.preprocess(images.read("a.png"))[None])[0]
    torch.save(state, "doubled.pt")
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--target", "1", "--weights", "doubled.pt", "--out", "maps")
    found = facts("maps/a-2-grad_cam-1.json")
    assert found["score"] == pytest.approx(float(y[1]), rel=1e-6)
    assert abs(found["score"] - float(library("pair", "a.png", "2")[1][1])) > 1
    assert (found["weights"], found["pretrained"]) == ("doubled.pt", True)


def test_without_pretraining_weights_are_random_and_the_same_in_every_run(here):
    scores = []
    for arguments in ((), ("--no-pretrained",), ("--no-pretrained",)):
        (line,) = explain("a.png", "--model", "demo", "--layer", "features", "--target", "0", "--json", *arguments)
        assert json.loads(line)["pretrained"] == (not arguments)
        scores.append(json.loads(line)["score"])
    assert scores[1] == scores[2] != scores[0]


def test_json_is_the_card_and_the_names_of_the_files(here):
    command = ("a.png", "--model", "net.py:pair", "--layer", "0", "--layer", "2", "--target", "top2", "--json", "--out", "maps")
    found = [json.loads(line) for line in explain(*command)]
    classes = best("pair", "a.png", 2)
    assert [(f["image"], f["layer"], f["class"]) for f in found] == [("a.png", layer, c) for layer in "02" for c in classes]
    for each in found:
        written = each.pop("files")
        base = Path(f"maps/a-{each['layer']}-grad_cam-{each['class']}")
        assert written == {"png": str(Path("maps/a-grid.png")), "npy": f"{base}.npy", "json": f"{base}.json"}
        assert each == facts(written["json"])
        assert all(Path(path).stat().st_size for path in written.values())


def test_with_json_notes_are_in_the_object_and_on_stderr(here):
    result = invoke("a.png", "--model", "net.py:pair", "--json", "--out", "maps")
    (found,) = map(json.loads, result.stdout.splitlines())
    assert found["notes"][0].startswith("layer=None: '3' was chosen")
    assert result.stderr.splitlines() == [f"note: a.png: {note}" for note in found["notes"]]


def test_a_check_is_a_line_and_a_fact(here):
    command = ("a.png", "--model", "net.py:pair", "--layer", "2", "--method", "mean_cam", "--check", "--json", "--out", "maps")
    result = invoke(*command)
    (found,) = map(json.loads, result.stdout.splitlines())
    assert found["check"].startswith("the map fails the check: it ")
    assert "it is like the mean of the channels (correlation 1.00)" in found["check"]
    assert f"note: a.png: mean_cam: {found['check']}" in result.stderr.splitlines()
    assert "--check" in invoke("--help").stdout


def test_a_layer_that_is_named_twice_is_explained_once(here):
    explain("a.png", "--model", "net.py:pair", "--layer", "2", "--layer", "2", "--target", "1", "--out", "maps")
    assert len(list(Path("maps").iterdir())) == 3


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSALS = {
    "a missing picture": (["none.png", "--model", "net.py:pair"], r"there is no file 'none\.png'"),
    "a file that is no picture": (["net.py", "--model", "net.py:pair"], r"'net\.py' is not a picture that Pillow can read"),
    "a folder without pictures": (
        ["a.png", "empty", "--model", "net.py:pair"],
        r"the folder 'empty' has no pictures in it \(files that end in \.png, .*\)$",
    ),
    "no colon": (
        ["a.png", "--model", "net.py"],
        r"model 'net\.py' does not name a function: write path/to/file\.py:function",
    ),
    "no function": (["a.png", "--model", "net.py:"], r"model 'net\.py:' does not name a function"),
    "no file": (["a.png", "--model", "nut.py:pair"], r"model 'nut\.py:pair': there is no file 'nut\.py'"),
    "a pipe": (["pipe", "--model", "net.py:pair"], r"^Error: 'pipe' is a pipe, not a picture: copy it to a file first$"),
    "a device": (["/dev/zero", "--model", "net.py:pair"], r"^Error: '/dev/zero' is a device, not a picture: copy it"),
    "a pipe for a model": (["a.png", "--model", "pipe:f"], r"^Error: model 'pipe:f': 'pipe' is a pipe, not a Python file$"),
    "a pipe for weights": (["a.png", "--model", "demo", "--weights", "pipe"], r"weights file 'pipe' is a pipe, not a file$"),
    "not Python": (["a.png", "--model", "notes.txt:f"], r"'notes\.txt' is not a Python file"),
    "an unknown function": (
        ["a.png", "--model", "net.py:pear"],
        r"model 'net\.py:pear': the file has no function 'pear'; closest: 'pair'",
    ),
    "not a function": (["a.png", "--model", "net.py:NUMBER"], r"the file has no function 'NUMBER'"),
    "a syntax error": (
        ["a.png", "--model", "syntax.py:f"],
        r"model 'syntax\.py:f' failed at line 3: SyntaxError: invalid syntax",
    ),
    "a failing import": (
        ["a.png", "--model", "absent.py:f"],
        r"model 'absent\.py:f' failed at line 3 \(import no_such_module_at_all\): ModuleNotFoundError: No module named",
    ),
    "a failing import below": (
        ["a.png", "--model", "nested.py:f"],
        r"model 'nested\.py:f' failed at line 2 \(import syntax\): SyntaxError",
    ),
    "a function with arguments": (
        ["a.png", "--model", "net.py:needs"],
        r"model 'net\.py:needs': the function must take no argument \(missing a required argument: 'size'\)",
    ),
    "a function that raises": (
        ["a.png", "--model", "net.py:raises"],
        r"model 'net\.py:raises' failed at line \d+ \(raise RuntimeError\(.*\)\): RuntimeError: no weights here$",
    ),
    "a function that raises further down": (
        ["a.png", "--model", "net.py:calls"],
        rf"model 'net\.py:calls' failed at line {RAISES} \(raise RuntimeError\(.*\)\): RuntimeError: no weights here$",
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
        r"no layer named '22' in Sequential; closest: '2'.*; `camfn layers --model SPEC` lists the layers$",
    ),
    "a layer without a grid": (
        ["a.png", "--model", "net.py:pair", "--layer", "5"],
        r"^Error: a\.png: layer '5' gives .*no spatial axes",
    ),
    "a layer without a grid, after one with": (
        ["a.png", "--model", "net.py:pair", "--layer", "2", "--layer", "5"],
        r"^Error: a\.png: layer '5' gives .*no spatial axes",
    ),
    "tokens": (
        ["a.png", "--model", "net.py:odd", "--layer", "tokens"],
        r"^Error: a\.png: layer 'tokens' gives a map of shape \(\d+,\), and a picture needs \(height, width\)$",
    ),
    "a layer that runs twice": (
        ["a.png", "--model", "net.py:odd", "--layer", "last", "--layer", "twice"],
        r"^Error: a\.png: layer 'twice' runs more than once",
    ),
    "no layer with a grid": (
        ["a.png", "--model", "net.py:headless"],
        r"^Error: a\.png: no layer of Sequential has 2 spatial axes of more than one position that can be told from its shape;",
    ),
    "cam without a linear layer": (
        ["a.png", "b.png", "--model", "net.py:without_tensors", "--layer", "1", "--method", "cam"],
        r"^Error: a\.png: cam needs a linear layer .*; found no linear layer at all; name another layer, or another method$",
    ),
    "an unknown method": (
        ["a.png", "--model", "net.py:pair", "--method", "scorecam"],
        r"--method 'scorecam' is not known; closest: 'score_cam'.*; `camfn methods` lists all$",
    ),
    "a class out of range": (
        ["a.png", "--model", "net.py:pair", "--target", "4"],
        r"^Error: a\.png: target 4 is not a class: the model has classes 0 to 3",
    ),
    "a class beyond all integers": (
        ["a.png", "--model", "net.py:pair", "--target", "9" * 30],
        r"^Error: a\.png: target 9{30} is not a class: the model has classes 0 to 3$",
    ),
    "too many of the best": (
        ["a.png", "--model", "net.py:pair", "--target", "top5"],
        r"^Error: a\.png: target top5 needs 5 classes: the model has 4$",
    ),
    "none of the best": (
        ["a.png", "--model", "net.py:triple", "--target", "top0"],
        r"--target 'top0' is not a class; give the index$",
    ),
    "a size in words": (
        ["a.png", "--model", "net.py:pair", "--size", "big"],
        r"--size 'big' is not a size: write photo, input, or pixels, such as 800 or 600x800 \(height by width\)$",
    ),
    "a size of nothing": (["a.png", "--model", "net.py:pair", "--size", "0x5"], r"--size '0x5' is not a size: "),
    "a size that is absurd": (
        ["a.png", "--model", "net.py:pair", "--size", "10001x10000"],
        r"--size '10001x10000' is more than 25 megapixels: write a smaller one$",
    ),
    "a seed where nothing is drawn": (
        ["a.png", "--model", "net.py:pair", "--seed", "0"],
        r"--seed 0: grad_cam draws no random numbers; omit it, or use another method, such as "
        r"random_cam, smooth_grad_cam_pp or ss_cam$",
    ),
    "a seed below 0": (
        ["a.png", "--model", "net.py:pair", "--method", "ss_cam", "--seed", "-1"],
        r"--seed -1: a seed is an integer from 0 to 2\*\*63 - 1$",
    ),
    "a seed beyond": (
        ["a.png", "--model", "net.py:pair", "--method", "ss_cam", "--seed", str(2**63)],
        r"--seed 9\d*: a seed is an integer from 0 to 2\*\*63 - 1$",
    ),
    "a chunk where nothing is swept": (
        ["a.png", "--model", "net.py:pair", "--method", "cam", "--chunk", "8"],
        r"--chunk 8: cam has no sweep to split; omit it, or use another method, such as "
        r"ablation_cam, recipro_cam or score_cam$",
    ),
    "an unknown device": (
        ["a.png", "--model", "net.py:pair", "--device", "gpu"],
        r"--device 'gpu' is not a device of torch: write cpu, cuda, cuda:1, mps or similar$",
    ),
    "a device without numbers": (
        ["a.png", "--model", "net.py:pair", "--device", "meta"],
        r"--device 'meta' cannot be used here: .*[mM]eta.*; leave it out to run where the model is$",
    ),
    "an output folder in a file": (
        ["a.png", "--model", "net.py:pair", "--out", "b.png/maps"],
        r"--out 'b\.png/maps' cannot be made: Not a directory$",
    ),
    "a negative class": (["a.png", "--model", "net.py:pair", "--target", "-1"], r"target -1 is not a class"),
    "an unknown name": (
        ["a.png", "--model", "net.py:triple", "--target", "red box"],
        r"--target 'red box' is not a class; closest: 'Red fox'",
    ),
    "a name of two classes": (
        ["a.png", "--model", "net.py:triple", "--target", "light"],
        r"--target 'light' fits 2 classes: 1 'light', 2 'light'; give the index$",
    ),
    "a name without names": (
        ["a.png", "--model", "net.py:pair", "--target", "light"],
        r"--target 'light' is not a class; the model has no class names, so give the index$",
    ),
    "names of other classes": (["a.png", "--model", "net.py:wrong_count"], r"gives 3 class names, and the model has 4 classes"),
    "an output without classes": (
        ["a.png", "--model", "net.py:maps"],
        r"the model's output has shape \(1, 5, 5, 4\): the command explains classes, and needs \(1, classes\)",
    ),
    "a picture that does not fit": (
        ["a.png", "--model", "net.py:flat"],
        r"the model, on an input of shape \(1, 3, 11, 9\), failed: RuntimeError: .*; without preprocess the picture is neither",
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
        ["a.png", "--model", "net.py:fails_when_masked", "--layer", "net.2", "--method", "score_cam"],
        r"^Error: a\.png: the model, on masked inputs, failed at line \d+ \(assert .*\): AssertionError: no zeros",
    ),
    "weights that are not there": (
        ["a.png", "--model", "net.py:pair", "--weights", "none.pt"],
        r"weights file 'none\.pt' is not there$",
    ),
    "weights of another model": (["a.png", "--model", "net.py:pair", "--weights", "linear.pt"], r"linear\.pt.*'?weight'?"),
    "no weights of a function": (
        ["a.png", "--model", "net.py:pair", "--no-pretrained"],
        r"--no-pretrained has no meaning with model 'net\.py:pair'",
    ),
    "an output folder that is a file": (
        ["a.png", "--model", "net.py:pair", "--out", "b.png"],
        r"--out 'b\.png' cannot be made: File exists",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_the_model_is_loaded(here):
    result = invoke("a.png", "--model", "net.py:leaves_a_mark", "--device", "cuda")
    assert re.fullmatch(
        r"Error: --device 'cuda' cannot be used here: .*(CUDA|NVIDIA).*; leave it out to run where .* is\n", result.stderr
    )
    assert result.exit_code == 2
    assert not Path("loaded").exists()
    explain("a.png", "--model", "net.py:leaves_a_mark", "--layer", "2")
    assert Path("loaded").exists()


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_on_stderr_and_exit_2(here, case):
    arguments, words = REFUSALS[case]
    torch.save(torch.nn.Linear(2, 3).state_dict(), "linear.pt")
    os.mkfifo("pipe")
    result = invoke(*arguments)
    (sentence,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert sentence.startswith("Error: ")
    assert re.search(words, sentence), sentence
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # click's; not the exception itself
    assert result.stdout == ""
    assert not list(here.rglob("*.json"))
    assert not list(here.rglob("*.npy"))


def test_a_folder_that_cannot_be_written_to_is_found_before_the_sweep(here, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    result = invoke("a.png", "--model", "net.py:pair", "--out", "maps")
    assert (result.exit_code, result.stderr) == (2, "Error: --out 'maps' cannot be written to\n")


def test_a_disk_that_is_full_is_a_sentence_too(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "save", full)
    result = invoke("a.png", "--model", "net.py:pair", "--layer", "2", "--out", "maps")
    assert result.exit_code == 2
    assert result.stderr == "Error: a.png: the files cannot be written to 'maps': No space left on device\n"
    assert not list(Path("maps").iterdir())  # neither the .png, which was written, nor the .json, which held the name


def test_a_picture_that_may_not_be_read_is_a_sentence(here, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", "a.png")

    monkeypatch.setattr(Image, "open", forbidden)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
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


# ------------------------------------------------------------------------------------------------------ a real photo


def test_on_a_photo_of_a_dog_and_a_cat_each_class_is_found_on_its_own_animal():
    model, preprocess, names = libraries.real_networks()["darknet_tiny"]()
    x = preprocess(images.read(libraries.REAL / "images" / "extra" / "both.png"))[None]
    dog, cat = camfn.score_cam(model, "features", x, torch.tensor([[243, 281]]))[0]
    assert (names[243], names[281]) == ("bull mastiff", "tabby, tabby cat")
    side = dog.shape[1]
    assert dog.argmax() // side < 5  # its head is in the upper third of the 14 x 14 grid, the cat in the lower half
    assert cat.argmax() // side > 8
