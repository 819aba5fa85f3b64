"""`camfn evaluate`."""

import csv

import pytest

from tests.support import datasets
from tests.support.command_line import command

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of noise, a file that is none, and boxes of all but one."""
    folder = tmp_path_factory.mktemp("images")
    datasets.pictures(folder, 4)
    (folder / "bad.png").write_text("no picture")
    lines = [
        "id,x0,y0,x1,y1,label",
        *(f"{name},2,3,12,20,ring" for name in ("a/0000.png", "b/0001.png", "a/0002.png", "bad.png")),
    ]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder


def judged(images, *more):
    return command("evaluate", images, "--model", "demo", "--layer", "features", *more)


def test_scenes_are_judged_in_one_command(tmp_path):
    result = judged("scenes", "--method", "grad_cam", "--method", "cam", "--limit", "3", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "| grad_cam | " in result.stdout
    assert "| *all_ones* | " in result.stdout
    assert result.stdout.splitlines()[-1].endswith("evaluation.png")
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} >= {"grad_cam", "cam", "mean_cam"}
    assert {row["n"] for row in rows if row["metric"] == "energy" and row["method"] == "cam"} == {"3"}
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000


def test_photos_with_boxes_are_judged_and_the_others_are_told(images):
    result = judged(images, "--boxes", images / "boxes.csv", "--metric", "energy", "--metric", "max_box_acc")
    assert result.exit_code == 0, result.output
    assert "| localization | energy ↑ | max_box_acc ↑ |" in result.stdout
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert any("b/0003.png is left out: it has no box" in line for line in notes)
    assert any("bad.png is left out: " in line for line in notes)


def test_the_maps_of_a_run_are_judged(images, tmp_path):
    datasets.made(images, tmp_path, target="top2")
    result = command("evaluate", tmp_path, "--model", "demo", "--boxes", images / "boxes.csv", "--metric", "energy")
    assert result.exit_code == 0, result.output
    assert "| grad_cam | " in result.stdout
    again = command("evaluate", tmp_path, "--model", "demo", "--layer", "features")
    assert again.exit_code == 2
    assert "leave --method, --layer and --target out" in again.stderr
    other = command("evaluate", tmp_path, "--model", "demo", "--no-pretrained")
    assert other.exit_code == 2
    assert "other weights" in other.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--metric", "enrgy"), "no metric named 'enrgy'; closest: 'energy'"),
        (("--method", "grad_kam"), "--method 'grad_kam' is not known"),
        (("--metric", "energy"), "the metric energy cannot be computed: no masks were given"),
        (("--boxes", "none.csv"), "'none.csv' cannot be read"),
        (("--target", "zebra"), "zebra"),
        (("--target", "top3"), "must name one class"),
        (("--method", "legrad"), "no method could be judged: legrad"),
        (("--method", "mean_cam"), "methods has only controls (mean_cam)"),
        (
            ("--layer", "feature"),
            "closest: 'features', 'features.1', 'features.0'; `camfn layers --model SPEC` lists the layers",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(images, more, message):
    result = judged(images, *more)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("Error: ")


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    result = judged(tmp_path / "none")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
