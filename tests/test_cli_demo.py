"""`camfn demo`: the table it prints, held to the library and to loops over pixels, and the picture it draws."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support import LAYERED

import camfn
from camfn import cli, demo, maps
from camfn.cli import demo as command

pytest.importorskip("safetensors")
matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run, into a folder that has a file of the same name."""
    out = tmp_path_factory.mktemp("demo")
    (out / "demo.png").write_text("mine")
    return out, CliRunner().invoke(cli.app(), ["demo", "--out", str(out)])


def numbers(ran) -> dict[str, list[float]]:
    """Of each line of the table: energy in percent, hits, maps, and forwards and seconds where there are any."""
    lines = ran[1].stdout.splitlines()
    return {line.split("  ")[0].strip(): [float(n) for n in re.findall(r"[\d.]+", line)] for line in lines[2:-1]}


def test_it_says_where_the_picture_is_and_overwrites_nothing(ran):
    out, result = ran
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"-> {out / 'demo-2.png'}"
    assert result.stderr == ""
    assert (out / "demo.png").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["demo-2.png", "demo.png"]


def test_the_table_has_every_method_and_what_an_even_map_gets(ran):
    assert list(numbers(ran)) == ["(even map)", *LAYERED]
    scenes = [demo.scene(seed, objects) for seed, objects in command.SHOWN]
    shares = [float(mask.float().mean()) for s in scenes for mask in s.masks]
    energy, _, count = numbers(ran)["(even map)"]
    assert energy == pytest.approx(100 * sum(shares) / len(shares), abs=0.05)
    assert count == len(shares) > len(scenes)  # scenes of two objects are explained for both
    assert all(seed < 100_000 for seed, _ in command.SHOWN)  # the network was not trained on them


@pytest.mark.parametrize("method", ["cam", "score_cam"])
def test_the_numbers_are_those_of_the_library(ran, method):
    """Energy and hits by loops over pixels, maps from one call for each class."""
    network, energies, hits, forwards = demo.network(), [], 0, 0
    given = {"fc": "classify"} if method == "cam" else {}
    for seed, objects in command.SHOWN:
        s = demo.scene(seed, objects)
        for index, mask in zip(s.classes, s.masks):
            x = demo.preprocess(s.image)[None]
            (raw,) = getattr(camfn, method)(network, "features", x, index, normalize=False, **given)
            values = maps.resize(raw, mask.shape).clamp(min=0)
            energies.append(float(values[mask].sum() / values.sum()))
            y, x = divmod(int(maps.resize(raw, mask.shape).argmax()), mask.shape[1])
            hits += bool(mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].any())
        forwards += camfn.explain(network, "features", demo.preprocess(s.image)[None], method=method, **given).forwards
    found = numbers(ran)[method]
    assert found[0] == pytest.approx(100 * sum(energies) / len(energies), abs=0.051)
    assert found[1:4] == [hits, len(energies), forwards]


def test_on_the_shipped_scenes_the_maps_are_better_than_nothing(ran):
    found = numbers(ran)
    for method in ("cam", "score_cam", "is_cam"):
        assert found[method][0] > 2 * found["(even map)"][0]
        assert found[method][1] > 2 * found["(even map)"][1]


def test_the_picture_has_a_row_for_each_method(ran):
    with Image.open(ran[0] / "demo-2.png") as file:
        found = np.asarray(file.convert("RGB")).astype(int)
    frames = (found.sum(-1) == 0).mean(1) > 0.4  # the black lines above and below the panels
    starts = np.flatnonzero(frames & ~np.roll(frames, 1))
    assert len(starts) == 2 * (1 + len(LAYERED))


def test_every_panel_shows_what_its_number_counts():
    shown = command.Shown(demo.scene(0), 0, torch.tensor([[-4.0, 0.0], [1.0, 2.0]]), 0.25, 1.0)
    panel = command._panel(shown)
    assert panel.map.tolist() == [[0, 0], [0.5, 1]]
    assert panel.caption == "25%"
    assert torch.equal(panel.outline, shown.scene.masks[0])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli.app(), ["demo", "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: --out '.*out' cannot be made: Not a directory\n", result.stderr)
    assert result.stdout == ""


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "rows", lambda report: iter([command.Row("cam", [], 0, 0.0)]))
    monkeypatch.setattr(command, "picture", lambda found: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(Image.Image, "save", full)
    result = CliRunner().invoke(cli.app(), ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"Error: the files cannot be written to '.*': No space left on device\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_a_missing_extra_is_one_line(monkeypatch, tmp_path, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    result = CliRunner().invoke(cli.app(), ["demo", "--out", str(tmp_path)])
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
