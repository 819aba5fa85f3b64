"""`camfn demo`: the table it prints, held to the library and to loops over pixels, and the picture it draws."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import camfn
from camfn import cli, demo, maps
from camfn.cli import catalog
from camfn.cli import demo as command

pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, *arguments: str):
    return CliRunner().invoke(cli.app(), ["demo", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run, into a folder that has a file of the same name."""
    out = tmp_path_factory.mktemp("demo")
    (out / "demo.png").write_text("mine")
    return out, run(out)


def numbers(result) -> dict[str, list[float]]:
    """Of each line of the table: energy in percent, hits, maps, and forwards and seconds where there are any."""
    lines = result.stdout.splitlines()
    return {line.split("  ")[0].strip(): [float(n) for n in re.findall(r"[\d.]+", line)] for line in lines[2:-1]}


def test_it_says_where_the_picture_is_and_overwrites_nothing(ran):
    out, result = ran
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"-> {out / 'demo-2.png'}"
    assert result.stderr == ""
    assert (out / "demo.png").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["demo-2.png", "demo.png"]


def test_the_table_has_every_method_and_what_an_even_map_gets(ran):
    assert list(numbers(ran[1])) == ["(even map)", *command.METHODS]
    scenes = [demo.scene(seed, objects) for seed, objects in command.SHOWN]
    shares = [float(mask.float().mean()) for s in scenes for mask in s.masks]
    energy, _, count = numbers(ran[1])["(even map)"]
    assert energy == pytest.approx(100 * sum(shares) / len(shares), abs=0.05)
    assert count == len(shares) > len(scenes)  # scenes of two objects are explained for both
    assert all(seed < 100_000 for seed, _ in command.SHOWN)  # the network was not trained on them


@pytest.mark.parametrize("method", ["cam", "grad_cam", "full_grad"])
def test_the_numbers_are_those_of_the_library(method, tmp_path, monkeypatch):
    """Energy and hits by loops over pixels, maps from one call for each class."""
    monkeypatch.setattr(command, "SHOWN", ((4, 2),))
    network, energies, hits, forwards = demo.network(), [], 0, 0
    layer, given = None if method == "full_grad" else "features", {"fc": "classify"} if method == "cam" else {}
    for seed, objects in command.SHOWN:
        s = demo.scene(seed, objects)
        for index, mask in zip(s.classes, s.masks):
            x = demo.preprocess(s.image)[None]
            (raw,) = getattr(camfn, method)(network, layer, x, index, normalize=False, **given)
            values = maps.resize(raw, mask.shape).clamp(min=0)
            energies.append(float(values[mask].sum() / values.sum()))
            y, x = divmod(int(maps.resize(raw, mask.shape).argmax()), mask.shape[1])
            hits += bool(mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].any())
        forwards += camfn.explain(network, layer, demo.preprocess(s.image)[None], method=method, **given).forwards
    found = numbers(run(tmp_path, "--method", method))
    assert list(found) == ["(even map)", method]
    assert found[method][0] == pytest.approx(100 * sum(energies) / len(energies), abs=0.051)
    assert found[method][1:4] == [hits, len(energies), forwards]


def test_all_are_those_that_the_network_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "FITTING", ("hires_cam", "full_grad"))  # of a layer, and of none
    monkeypatch.setattr(command, "SHOWN", ((0, 1),))
    assert list(numbers(run(tmp_path, "--method", "all"))) == ["(even map)", "hires_cam", "full_grad"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("legrad", "--method legrad needs attention, and the demo network has none: choose another, or all"),
        ("grad-cam", "--method 'grad-cam' is not known; closest: 'grad_cam'"),
    ],
)
def test_a_method_that_does_not_fit_is_one_line(tmp_path, method, words):
    result = run(tmp_path, "--method", "grad_cam", "--method", method)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {words}")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_on_the_shipped_scenes_the_maps_are_better_than_nothing(ran):
    found = numbers(ran[1])
    for method in set(command.METHODS) - {"mean_cam"}:  # which knows no class
        assert found[method][0] > 2 * found["(even map)"][0]
        assert found[method][1] > 2 * found["(even map)"][1]


def test_the_picture_has_a_row_for_each_method(ran):
    with Image.open(ran[0] / "demo-2.png") as file:
        found = np.asarray(file.convert("RGB")).astype(int)
    frames = (found.sum(-1) == 0).mean(1) > 0.4  # the black lines above and below the panels
    starts = np.flatnonzero(frames & ~np.roll(frames, 1))
    assert len(starts) == 2 * (1 + len(command.METHODS))


def test_every_panel_shows_what_its_number_counts():
    shown = command.Shown(demo.scene(0), 0, torch.tensor([[-4.0, 0.0], [1.0, 2.0]]), 0.25, 1.0)
    panel = command.panel(shown)
    assert panel.map.tolist() == [[0, 0], [0.5, 1]]
    assert panel.caption == "25%"
    assert torch.equal(panel.outline, shown.scene.masks[0])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: --out '.*out' cannot be made: Not a directory\n", result.stderr)
    assert result.stdout == ""


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "rows", lambda methods, report: iter([command.Row("cam", [], 0, 0.0)]))
    monkeypatch.setattr(command, "picture", lambda found: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(Image.Image, "save", full)
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"Error: the files cannot be written to '.*': No space left on device\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_a_missing_extra_is_one_line(monkeypatch, tmp_path, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: the command line needs {module}: pip install 'camfn[cli]'\n"
    assert list(Path(tmp_path).iterdir()) == []


def test_the_readmes_picture_is_this_one(ran):
    """To what its palette and rounding leave; a map of another scene or method is far off."""
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another matplotlib lays the panels out otherwise")
    pictures = []
    for path in (ROOT / "docs" / "demo.png", ran[0] / "demo-2.png"):
        with Image.open(path) as file:
            pictures.append(np.asarray(file.convert("RGB").resize((174, 137), Image.Resampling.BOX)).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 3
