"""`camfn.open`: from a photo to its card."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

import camfn
from camfn import CamError, demo, images
from tests.oracles.closeness import close

SCENE = demo.scene(3, objects=2, size=(96, 144))
PHOTO = images.overlay(SCENE.image, torch.zeros(1, 1), alpha=0)
AT = {"layer": "features"}


def net():
    return camfn.open("demo")


def test_a_photo_is_explained_as_by_hand(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    card = net().explain(tmp_path / "photo.png", "square", **AT)
    x = demo.preprocess(PHOTO)[None]
    expected = camfn.grad_cam(demo.network(), "features", x, demo.CLASSES.index("square"))
    assert torch.equal(card.maps, expected)
    assert card.method == "grad_cam"
    assert card.names == tuple(demo.CLASSES)
    assert card.pictures[0].name == str(tmp_path / "photo.png")
    assert card.overlay() == images.overlay(PHOTO, card.maps[0], view=card.pictures[0].view)


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL", "several"])
def test_photos_of_all_kinds(kind):
    array = np.asarray(PHOTO)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    given = {"array": array, "tensor": tensor, "PIL": PHOTO, "several": [PHOTO, array]}[kind]
    card = net().explain(given, 1, **AT)
    assert card.maps.shape[0] == (2 if kind == "several" else 1)
    close(card.maps[0], net().explain(PHOTO, 1, **AT).maps[0])


def test_targets_in_words_and_as_ever():
    assert net().explain(PHOTO, "STAR", **AT).targets == (("logit 3",),)
    assert net().explain([PHOTO] * 2, ["star", "square"], **AT).targets == (("logit 3", "logit 1"),) * 2
    assert net().explain(PHOTO, "top2", **AT).maps.shape[1] == 2
    assert net().explain(PHOTO, camfn.targets.logit(3) - camfn.targets.logit(1), **AT).targets == (("logit 3 - logit 1",),)
    assert net().explain([PHOTO] * 2, [3, 1], **AT).targets == (("logit 3",), ("logit 1",))
    best = int(demo.network()(demo.preprocess(PHOTO)[None]).argmax())
    assert net().explain(PHOTO, **AT).targets == ((f"logit {best}",),)


def test_several_methods_make_several_cards():
    cards = net().explain(PHOTO, "star", method=["grad_cam", "recipro_cam"], **AT)
    assert [card.method for card in cards] == ["grad_cam", "recipro_cam"]
    assert all(card.pictures and card.names for card in cards)


def test_a_photo_with_an_exif_tag_is_preprocessed_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    card = net().explain(tmp_path / "phone.png", "star", **AT)
    assert torch.equal(card.maps, net().explain(PHOTO, "star", **AT).maps)
    assert card.overlay().size == PHOTO.size


FILE = """
import torch
from torch import nn
import helper

def load():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return model, preprocess, ["cat", "dog"]

def preprocess(picture):
    import late  # on use, from the file's own folder
    return helper.tensor(picture.resize((32, 32)))
"""


def test_a_file_of_the_user_may_import_from_its_folder_at_any_time(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "late.py").write_text("")
    text = "import numpy, torch\ndef tensor(picture):\n    return torch.tensor(numpy.array(picture)).permute(2, 0, 1) / 255\n"
    (tmp_path / "helper.py").write_text(text)
    card = camfn.open(f"{tmp_path / 'mine.py'}:load").explain(PHOTO, "dog", layer="1")
    assert card.targets == (("logit 1",),)
    assert card.overlay().size == PHOTO.size


def test_the_random_states_are_as_they_were():
    """A preprocessing that draws random numbers draws the same for the input and for its check, and leaves none drawn."""

    def noisy(picture):
        return demo.preprocess(picture) + 0.1 * torch.rand(1) + 0.1 * float(np.random.rand()) + 0.1 * random.random()  # noqa: NPY002

    network = net()._replace(preprocess=noisy)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    card = network.explain([PHOTO, PHOTO], "star", **AT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert {finding.kind for finding in card.findings} >= {"no view"}


@pytest.mark.parametrize(
    ("pictures", "target", "words"),
    [
        ([], None, "pictures is empty"),
        (
            [PHOTO, PHOTO.resize((300, 96))],
            1,
            r"the inputs of the photos must have one shape; found \(3, 96, 144\) and \(3, 96, 300\)",
        ),
        (PHOTO, "elephant", "target 'elephant' is not a class; closest: 'crescent'"),
        (PHOTO, "s", "target 's' fits 5 classes"),
        (PHOTO, ["star", "top2"], r"topK stands alone as a target, .*; found \['star', 'top2'\]"),
        (PHOTO, 8, "8"),
        ("nowhere.png", None, "there is no file 'nowhere.png'"),
        (torch.rand(2, 3, 8, 8), None, r"image has shape \(2, 3, 8, 8\), but must be one picture"),
    ],
)
def test_what_cannot_be_explained_is_an_error(pictures, target, words):
    with pytest.raises(CamError, match=words):
        net().explain(pictures, target, **AT)


def test_a_device_and_random_weights():
    random = camfn.open("demo", pretrained=False, device="cpu")
    assert not torch.equal(next(random.model.parameters()), next(net().model.parameters()))
