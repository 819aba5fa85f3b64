"""`camfn run` and `camfn convert`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import CamError, runs
from tests.support import datasets
from tests.support.command_line import command, process
from tests.support.datasets import table, tarred

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return datasets.pictures(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run of one map for each image."""
    out = tmp_path_factory.mktemp("run")
    datasets.made(images, out)
    return out


def given(images, out, *more):
    return "run", images, "--model", "demo", "--layer", "features", "--out", out, "--workers", "0", *more


def test_a_folder_is_mapped_and_resumed(images, tmp_path):
    result = command(*given(images, tmp_path, "--target", "top2", "--method", "grad_cam", "--method", "layer_cam"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("4 images in ")
    assert len(datasets.keyed(tmp_path)) == 4 * 2 * 2
    again = command(*given(images, tmp_path, "--target", "top2", "--method", "grad_cam", "--method", "layer_cam"))
    assert again.stdout.startswith("0 images in ")
    assert "and 4 were done before" in again.stdout
    other = command(*given(images, tmp_path, "--target", "top3"))
    assert other.exit_code == 2
    assert "has methods ['grad_cam', 'layer_cam'], and this call has ['grad_cam']" in other.stderr


def test_failures_are_told_and_the_status_is_1(tmp_path):
    datasets.pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.png").write_text("no picture")
    for more in ((), ("--retry",)):
        result = command(*given(tmp_path / "in", tmp_path / "out", *more))
        assert result.exit_code == 1
        assert "1 image failed: see the reasons in " in result.stderr
    (tmp_path / "in" / "bad.png").write_bytes((tmp_path / "in" / "a" / "0000.png").read_bytes())
    result = command(*given(tmp_path / "in", tmp_path / "out", "--retry"))
    assert (result.exit_code, result.stdout[:11]) == (0, "1 image in ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--method", "all"), "name the methods of a run"),
        (("--method", "scorecam"), "is not known; closest: 'score_cam'"),
        (("--target", "wolf"), "'wolf' is not a class"),
        (("--device", "cpu,gpu"), "'gpu' is not a device"),
        (("--budget", "0.1"), "no option 'budget'"),
        (("--address", "auto"), "is that of a cluster of Ray"),
    ],
)
def test_what_is_wrong_is_one_line(images, tmp_path, more, words):
    result = command(*given(images, tmp_path / "out", *more))
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_is_quiet_when_piped(images, tmp_path):
    result = process("run", images, "--model", "demo", "--layer", "features", "--out", tmp_path / "out")
    assert result.returncode == 0
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["model"] == "demo"


# ------------------------------------------------------------------------------------------------------------- convert


def test_overlays_have_the_size_of_the_photos(run, images, tmp_path):
    result = command("convert", run, "--to", "png", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("4 files in ")
    for row in runs.read(run):
        with Image.open(tmp_path / f"{row.id[:-4]}-features-grad_cam-{row.target}.png") as file:
            assert file.size == (row.width, row.height)


def test_overlays_of_photos_in_a_tar_file_or_a_table_are_those_of_files(run, images, tmp_path):
    photos = {str(path.relative_to(images)): path.read_bytes() for path in sorted(images.rglob("*.png"))}
    packed = [
        tarred(tmp_path / "photos.tar", photos),
        table(tmp_path / "photos.parquet", image=list(photos.values()), id=list(photos)),
    ]
    runs.convert(run, tmp_path / "files", "png")
    for place in packed:
        out, overlays = tmp_path / f"run-{place.suffix}", tmp_path / f"overlays-{place.suffix}"
        datasets.made(place, out)
        missing = command("convert", out, "--to", "png", "--out", overlays)
        assert missing.exit_code == 2
        assert "pass the images of the run" in missing.stderr
        result = command("convert", out, "--to", "png", "--out", overlays, "--images", place)
        assert result.exit_code == 0, result.output
        found, wanted = (
            {path.name: pixels(path) for path in folder.rglob("*.png")} for folder in (overlays, tmp_path / "files")
        )
        assert found == wanted
        assert len(found) == 4


def pixels(path) -> bytes:
    with Image.open(path) as file:
        return file.tobytes()


def test_arrays_are_the_raw_maps(run, tmp_path):
    assert runs.convert(run, tmp_path, "npy") == 4
    for row in runs.read(run):
        np.testing.assert_array_equal(np.load(tmp_path / f"{row.id[:-4]}-features-grad_cam-{row.target}.npy"), row.map)


def test_the_wsol_evaluator_takes_its_maps(run, tmp_path):
    """What its `check_scoremap_validity` asks for, and where it looks."""
    runs.convert(run, tmp_path, "wsol")
    for row in runs.read(run):
        found = np.load(tmp_path / f"{row.id}.npy")
        assert (found.shape, found.dtype) == ((224, 224), np.float32)
        assert (found.min(), found.max()) == ((0.0, 1.0) if float(row.map.std()) else (0.0, 0.0))


def test_a_wsol_map_lies_over_the_whole_image(tmp_path):
    """The map of a crop of the middle is where the crop is: its maximum as well as what was cropped away."""
    from camfn.runs import manifest, shards
    from camfn.runs.rows import Row

    shards.make(tmp_path)
    manifest.agree(tmp_path, {"methods": ["m"], "layers": ["l"]})
    peak = torch.zeros(4, 4)
    peak[0, 0] = 1.0
    sides = {"width": 448, "height": 224, "input_width": 112, "input_height": 112}
    crop = Row("a", "a", **sides, view=(2.0, 0.0, 112.0, 0.0, 2.0, 0.0), layer="l", method="m", target="1", map=peak)
    shards.commit(tmp_path / shards.MAPS, [crop])
    runs.convert(tmp_path, tmp_path / "out", "wsol")
    found = np.load(tmp_path / "out" / "a.npy")
    rows, columns = np.nonzero(found == found.max())
    assert rows.max() < 28 + 1, "the upper cell, of a quarter of the height"
    assert columns.min() >= 56 - 1, "right of what was cropped away"
    assert columns.max() < 56 + 28 + 1
    assert found[:, :54].max() == 0.0


def test_irn_takes_its_dictionaries(images, tmp_path):
    datasets.made(images, tmp_path / "run", target="top2")
    runs.convert(tmp_path / "run", tmp_path / "out", "irn")
    for id in {row.id for row in runs.read(tmp_path / "run")}:
        found = np.load(tmp_path / "out" / f"{id[:-4]}.npy", allow_pickle=True).item()
        (row, _) = runs.read(tmp_path / "run", id=id)
        assert found["keys"].shape == (2,)
        assert found["high_res"].shape == (2, row.height, row.width)
        assert found["cam"].shape == (2, -(-row.height // 4), -(-row.width // 4))
        assert found["high_res"].max() <= 1.0


def test_scans_have_their_place(run, tmp_path):
    """The header by its offsets in the standard: the size, the type, and the affine map to the photo."""
    runs.convert(run, tmp_path, "nifti")
    row = next(runs.read(run))
    data = (tmp_path / f"{row.id[:-4]}-features-grad_cam-{row.target}.nii").read_bytes()
    assert data[344:348] == b"n+1\0"
    assert np.frombuffer(data[40:48], "<i2").tolist() == [3, *reversed(row.map.shape), 1]
    values = np.frombuffer(data[352:], "<f4").reshape(row.map.shape)
    np.testing.assert_array_equal(values, row.map)
    affine = np.frombuffer(data[280:312], "<f4").reshape(2, 4)
    cell = row.width / row.map.shape[1]
    np.testing.assert_allclose(affine[0, [0, 3]], (cell, cell / 2 - 0.5), rtol=0.02)


def test_ids_never_lead_out_of_the_folder(tmp_path):
    x = torch.randn(3, 16, 16)
    datasets.made([("../../up", x), ("/root", x), ("a\n:b", x)], tmp_path / "run")
    runs.convert(tmp_path / "run", tmp_path / "out", "wsol")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"up.npy", "root.npy", "a__b.npy"}


def test_what_a_format_cannot_hold_is_an_error(images, run, tmp_path):
    datasets.made(images, tmp_path / "two", target="top2")
    with pytest.raises(
        CamError, match=r"has 2 targets, and the evaluator takes one map for each image: .*a run of one target$"
    ):
        runs.convert(tmp_path / "two", tmp_path / "out", "wsol")
    datasets.made(images, tmp_path / "four", target="top2", methods=["grad_cam", "mean_cam"])
    with pytest.raises(CamError, match="has 2 methods and 2 targets, and the evaluator"):
        runs.convert(tmp_path / "four", tmp_path / "out", "wsol")
    with pytest.raises(CamError, match="has 2 methods, and IRN takes one of each: choose the method and the layer"):
        runs.convert(tmp_path / "four", tmp_path / "out", "irn")
    with pytest.raises(CamError, match="to='gif' is none of png, npy"):
        runs.convert(run, tmp_path / "out", "gif")
    datasets.made([("x", torch.zeros(3, 16, 16))], tmp_path / "tensors")
    with pytest.raises(CamError, match="pass the images of the run"):
        runs.convert(tmp_path / "tensors", tmp_path / "out", "png")
