"""Boxes from files, on the network's input."""

import numpy as np
import pytest
import torch
from PIL import Image

import camfn
from camfn import CamError, demo, runs
from camfn.evaluation import evaluate_run, read_boxes, scenes
from camfn.evaluation.annotations import Boxes, Photos, box_of, on_input
from camfn.images import View
from camfn.runs.sources import items_of

pytest.importorskip("pyarrow")
COUNT = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Scenes as photos of twice the size, with their boxes."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["id,x0,y0,x1,y1,label"]
    for seed in range(COUNT):
        scene = demo.scene(seed)
        pixels = (scene.image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((192, 192), Image.Resampling.NEAREST).save(folder / f"{seed}.png")
        box = [2 * float(side) for side in box_of(scene.masks[0])[0]]
        lines.append(",".join([f"{seed}.png", *map(str, box), demo.CLASSES[scene.classes[0]]]))
    boxes = folder / "boxes.csv"
    boxes.write_text("\n".join(lines) + "\n")
    return folder, boxes


@pytest.fixture(scope="module")
def network():
    """The demo network behind a resize to its size."""
    loaded = camfn.open("demo")

    def preprocess(picture):
        pixels = torch.from_numpy(np.array(picture.resize((96, 96), Image.Resampling.BOX))).permute(2, 0, 1) / 255
        return demo.preprocess(pixels)

    return camfn.Network(*loaded._replace(preprocess=preprocess))


def test_boxes_lie_on_the_input_where_the_objects_are(photos, network):
    folder, boxes = photos
    given = Photos(network, items_of(folder), boxes=read_boxes(boxes), workers=0)
    (batch,) = list(given)
    assert given.ids == [f"{seed}.png" for seed in range(COUNT)]
    assert not given.failed
    assert batch["target"].tolist() == [demo.scene(seed).classes[0] for seed in range(COUNT)]
    for seed in range(COUNT):
        wanted = box_of(demo.scene(seed).masks[0])
        torch.testing.assert_close(batch["boxes"][seed], wanted, atol=0.3, rtol=0)
        inside = torch.zeros(96, 96, dtype=torch.bool)
        x0, y0, x1, y1 = wanted[0].int().tolist()
        inside[y0:y1, x0:x1] = True
        assert int((inside != batch["masks"][seed]).sum()) <= 2 * 96


def test_a_crop_cuts_boxes_off():
    crop = View(((2.0, 0.0, 20.0), (0.0, 2.0, 0.0)), size=(40, 50), photo=(200, 100))  # x from 20 to 100, y from 0 to 100
    boxes = Boxes(((30.0, 10.0, 60.0, 30.0), (90.0, -10.0, 150.0, 20.0), (120.0, 0.0, 180.0, 50.0)))
    assert on_input(boxes, crop).tolist() == [[5, 5, 20, 15], [35, 0, 40, 10]]


def test_photos_that_cannot_be_judged_are_told(photos, network):
    folder, boxes = photos
    known = read_boxes(boxes)
    del known["1.png"]
    known["2.png"] = Boxes(((500.0, 0.0, 600.0, 10.0),), known["2.png"].label)
    given = Photos(network, items_of(folder), boxes=known, workers=0)
    list(given)
    assert given.ids == ["0.png", "3.png"]
    assert given.failed == {"1.png": "it has no box", "2.png": "its boxes are cropped away"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,x0,y0,x1\na,1,2,3\n", "has no column 'y1'"),
        ("id,x0,y0,x1,y1\na,1,2,wide,4\n", "line 2: x0, y0, x1 and y1 must be numbers"),
        ("id,x0,y0,x1,y1\na,1,2\n", "line 2: x0, y0, x1 and y1 must be numbers"),
        ("id,x0,y0,x1,y1\na,5,2,3,4\n", "line 2: a box must have x0 < x1"),
        ("id,x0,y0,x1,y1\na,nan,2,3,4\n", "line 2: a box must have x0 < x1"),
        ("id,x0,y0,x1,y1,label\na,1,2,3,4,cat\na,1,2,3,4,dog\n", "line 3: 'a' has the labels 'cat' and 'dog'"),
        ("", "has no column 'id'"),
    ],
)
def test_a_file_of_boxes_that_is_wrong_is_one_sentence(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(CamError, match=message):
        read_boxes(tmp_path / "boxes.csv")


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(CamError, match="cannot be read"):
        read_boxes(tmp_path / "none.csv")


def test_scenes_have_exact_masks():
    (first, second) = scenes(5, batch=3)
    assert len(first["x"]) == 3
    assert len(second["x"]) == 2
    scene = demo.scene(4, 2)
    assert torch.equal(second["masks"][1], scene.masks[0])
    assert torch.equal(second["others"][1], scene.masks[1])
    assert second["target"].tolist()[1] == scene.classes[0]
    x0, y0, x1, y1 = second["boxes"][1][0].int().tolist()
    rows, columns = scene.masks[0].nonzero().unbind(1)
    assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


# --------------------------------------------------------------------------------------------------------------- runs


def test_the_maps_of_a_run_are_judged_as_they_are(photos, network, tmp_path):
    folder, boxes = photos
    methods = ["grad_cam", "mean_cam"]
    runs.run(
        folder, model=network, layer="features", methods=methods, target="top2", out=tmp_path, workers=0, progress_line=False
    )
    known = read_boxes(boxes)
    found, given = evaluate_run(tmp_path, network, boxes=known)
    assert set(found.values) == {*methods, *camfn.metrics.CONTROLS}
    assert "energy" in found.metrics
    assert "new maps" in found.skipped["permuted_classifier"]
    assert "after their methods' ReLU" in found.markdown()
    assert found.interval("mean_cam", "other_class").mean == pytest.approx(1)
    assert found.interval("grad_cam", "other_class").mean < 0.9
    x = next(iter(Photos(network, items_of(folder), boxes=known, workers=0)))
    maps = camfn.grad_cam(network.model, "features", x["x"], normalize=False)
    wanted = camfn.metrics.energy_pointing_game(maps, x["masks"])
    torch.testing.assert_close(found.values["grad_cam"]["energy"], wanted, atol=2e-3, rtol=0)  # float16, and one batch
    assert given.ids == [f"{seed}.png" for seed in range(COUNT)]


def test_a_run_of_other_weights_is_an_error(photos, network, tmp_path):
    runs.run(photos[0], model=network, layer="features", out=tmp_path, workers=0, progress_line=False)
    other = network._replace(model=demo.network(pretrained=False))
    with pytest.raises(CamError, match="other weights"):
        evaluate_run(tmp_path, other)
