"""What a card shows: its text, its HTML, its pictures, and its files."""

import html.parser
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.func import vmap

import camfn
from camfn import CamError, demo, images
from tests.oracles.networks import inputs, small_net

SCENES = [demo.scene(seed, objects=2) for seed in (3, 4)]
X = torch.stack([demo.preprocess(scene.image) for scene in SCENES])
PHOTOS = [images.overlay(scene.image, torch.zeros(1, 1), alpha=0) for scene in SCENES]
NAMES = list(demo.CLASSES)


def crop(picture: Image.Image) -> torch.Tensor:
    """A preprocessing of a photo: the middle of it, resized, as the demo network takes it."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return demo.preprocess(picture.crop((left, top, left + side, top + side)).resize((96, 96)))


def wide(seed: int = 0, size: tuple[int, int] = (240, 160)) -> Image.Image:
    """A photo with a scene in its middle, on noise."""
    photo = Image.fromarray(np.random.default_rng(seed).integers(90, 160, (size[1], size[0], 3), dtype=np.uint8))
    photo.paste(PHOTOS[0].resize((120, 120)), ((size[0] - 120) // 2, (size[1] - 120) // 2))
    return photo


def card_of(target=None, **options):
    given = {"method": "grad_cam", "images": PHOTOS, "names": NAMES, **options}
    return camfn.explain(demo.network(), "features", X, target, **given)


# ------------------------------------------------------------------------------------------------------------- text


def test_the_text_of_a_card_has_the_targets_the_findings_and_the_cost():
    card = card_of(camfn.targets.top(2))
    first, *images_, last = [line for line in repr(card).splitlines() if "finding" not in line]
    assert first == f"Explanation: grad_cam at 'features', maps {tuple(card.maps.shape)}"
    assert last.startswith("  cost: 2 forwards, 4 backwards in ")
    for i, line in enumerate(images_):
        best = [int(c) for c in card.classes[i]]
        told = [f"{NAMES[c]} (logit {c} = {float(card.scores[i, k]):.4g})" for k, c in enumerate(best)]
        assert line == f"  image {i}: {', '.join(told)}"
    assert len(images_) == 2
    assert [f"  finding: {note}" for note in card.notes] == [line for line in repr(card).splitlines() if "finding" in line]


def test_a_card_of_many_images_and_targets_is_a_few_lines():
    x = torch.rand(40, 3, 96, 96)
    card = camfn.explain(demo.network(), "features", x, camfn.targets.top(8), method="mean_cam")
    lines = repr(card).splitlines()
    assert len(lines) <= 12
    assert sum(len(line) for line in lines) < 2000
    assert "  ... and 36 more images" in lines
    assert lines[1].endswith(", ... and 3 more targets")


def test_a_card_of_a_transform_has_a_text_without_values():
    seen, net = [], small_net()

    def one(image):
        seen.append(repr(camfn.explain(net, "features", image[None], 1, method="grad_cam")))
        return image.sum()

    vmap(one)(inputs())
    assert seen[0].startswith("Explanation: grad_cam at 'features', maps ")
    assert "image" not in seen[0]


def test_a_long_name_is_cut_in_the_middle():
    card = card_of(0, names=["a very long name of a class " * 4 + "end", *NAMES[1:]])
    assert "a very long nam…of a class end (logit 0 = " in repr(card)


# ------------------------------------------------------------------------------------------------------------- HTML


class Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text: str) -> Parser:
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_a_notebook_shows_each_photo_beside_its_maps():
    found = card_of(camfn.targets.top(2), names=["<b>&", *NAMES[1:]])._repr_html_()
    parser = parsed(found)
    assert parser.tags.count("tr") == 1 + 2 * 2
    assert parser.tags.count("img") == 2 * (1 + 2)
    assert "script" not in parser.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in parser.sources)
    assert "<b>&amp;" not in found


def test_a_card_without_pictures_shows_its_maps_in_a_notebook():
    card = camfn.explain(demo.network(), "features", X, method="grad_cam")
    assert parsed(card._repr_html_()).tags.count("img") == 2


def test_a_notebook_shows_eight_images_and_a_page_shows_all(tmp_path):
    x = torch.rand(10, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    card = camfn.explain(demo.network(), "features", x, method="grad_cam", images=list(x))
    assert parsed(card._repr_html_()).tags.count("tr") == 1 + 8
    assert "... and 2 more images" in card._repr_html_()
    card.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert parsed(page).tags.count("tr") == 1 + 10
    assert "http" not in page.replace("data:", "")


# ---------------------------------------------------------------------------------------------------------- pictures


def test_an_overlay_is_that_of_the_map_on_the_photo():
    card = card_of(camfn.targets.top(2))
    expected = images.overlay(PHOTOS[1], card.maps[1, 0])
    assert np.abs(np.asarray(card.overlay(1, 0)).astype(int) - np.asarray(expected)).max() <= 2
    assert card.overlay(1, 1) != card.overlay(1, 0)
    assert card.overlay(style="mask") == images.overlay(PHOTOS[0], card.maps[0, 0], style="mask")


def test_a_raw_map_is_divided_by_its_largest_absolute_value():
    card = card_of(0, relu=False, normalize=False)
    map = card.maps[0] / card.maps[0].abs().max()
    assert float(map.min()) < 0
    assert card.overlay() == images.overlay(PHOTOS[0], map)


def test_a_map_lies_where_the_crop_was_on_the_photo():
    photo = wide()
    card = camfn.explain(demo.network(), "features", crop(photo)[None], method="grad_cam", images=photo, preprocess=crop)
    view = card.pictures[0].view
    assert np.allclose(view.matrix, [[160 / 96, 0, 40], [0, 160 / 96, 0]], atol=0.3)
    drawn = np.asarray(card.overlay())
    assert drawn.shape == (160, 240, 3)
    sides = np.concatenate([drawn[:, :38], drawn[:, 202:]], 1)
    assert int(sides.max()) < 0.45 * 255, "what was cropped away is dark"
    assert (np.ptp(sides, -1) <= 1).all(), "and gray"
    high = np.unravel_index(int(card.maps[0].argmax()), card.maps[0].shape)
    y, x = (np.array(high) + 0.5) * 160 / 12 + [0, 40]
    brightest = np.unravel_index(drawn[:, 40:200].sum(-1).argmax(), (160, 160))
    assert np.abs(np.add(brightest, [0, 40]) - [y, x]).max() <= 1.5 * 160 / 12


def test_a_preprocessing_may_put_the_channels_last():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = demo.network()

        def forward(self, x):
            return self.net(x.permute(0, 3, 1, 2))

    def preprocess(picture):
        return crop(picture).permute(1, 2, 0)

    photo = wide()
    options = {"method": "grad_cam", "images": photo, "preprocess": preprocess, "axes": "nhwc"}
    card = camfn.explain(Last(), "net.features", preprocess(photo)[None], 0, **options)
    assert np.allclose(card.pictures[0].view.matrix, [[160 / 96, 0, 40], [0, 160 / 96, 0]], atol=0.3)


def test_without_pillow_a_notebook_shows_the_text(monkeypatch):
    card = card_of(0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr("camfn.explanation.card.find_spec", lambda name: None)
    assert card._repr_html_() is None
    with pytest.raises(CamError, match=r"^pictures need Pillow: pip install 'camfn\[cli\]'$"):
        card_of(0, images=["a.png", "b.png"])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("obeyed", [True, False])
def test_a_photo_with_an_exif_tag_is_shown_upright(tmp_path, turn, obeyed):
    """The preprocessing obeys the tag, or ignores it: the input says which."""
    photo = wide()
    photo.paste((255, 0, 0), (70, 30, 84, 44))  # a mark off the center
    photo.save(tmp_path / "photo.png", exif=_exif(turn))
    with Image.open(tmp_path / "photo.png") as stored:
        stored.load()
    upright = images.read(tmp_path / "photo.png")
    x = crop(upright if obeyed else stored.convert("RGB"))[None]
    red = np.asarray(upright).astype(float) @ [1, -1, 0]
    (top, left), (bottom, right) = (edge(np.argwhere(red > 200), 0) for edge in (np.min, np.max))
    seen = (x[0, 0] - x[0, 1]).numpy()
    v, u = np.argwhere(seen > seen.max() / 2).mean(0) + 0.5
    for given in (tmp_path / "photo.png", stored):
        card = camfn.explain(demo.network(), "features", x, method="grad_cam", images=given, preprocess=crop)
        assert np.array_equal(np.asarray(card.pictures[0].image), np.asarray(upright))
        there = card.pictures[0].view.to_photo(np.array([u, v]))
        assert np.abs(there - [(left + right + 1) / 2, (top + bottom + 1) / 2]).max() < 2


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def test_where_the_preprocessing_cannot_be_undone_the_picture_is_what_the_network_saw():
    def warped(picture):
        return crop(picture.transform(picture.size, Image.Transform.QUAD, (30, 0, 0, 160, 240, 120, 160, 30)))

    photo = wide()
    card = camfn.explain(demo.network(), "features", warped(photo)[None], method="grad_cam", images=photo, preprocess=warped)
    assert card.pictures[0].image.size == (96, 96)
    assert [finding.kind for finding in card.findings][-1] == "no view"
    assert re.search(
        "the picture is the one that the network saw, and not the photo: .* cannot be undone: it moves", card.notes[-1]
    )


def test_a_figure_has_a_row_for_each_image_and_at_most_six_panels_in_it():
    pytest.importorskip("matplotlib")
    figure = card_of(camfn.targets.top(2)).figure()
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * 3
    eight = card_of(camfn.targets.top(8)).figure()
    assert max(axes.get_subplotspec().get_geometry()[1] for axes in eight.axes if axes.images) == 6
    captions = [axes.get_xlabel() for axes in panels]
    card = card_of(camfn.targets.top(2))
    assert captions[1] == f"{NAMES[int(card.classes[0, 0])]}\nlogit {int(card.classes[0, 0])} = {float(card.scores[0, 0]):.4g}"


def test_captions_side_by_side_do_not_overlap():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = card_of(camfn.targets.top(5), names=["WMWMWMWM " * 9] * 8).figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.images and axes.get_xlabel()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_several_layers_are_panels_of_their_own():
    card = camfn.explain(
        demo.network(), ["body", "features"], X, camfn.targets.top(2), method="layer_cam", images=PHOTOS, names=NAMES
    )
    assert len(card.maps) == 2
    assert card.overlay(1, 1, layer=0) == images.overlay(PHOTOS[1], card.maps[0][1, 1])
    assert card.overlay(1, 1, layer=1) == images.overlay(PHOTOS[1], card.maps[1][1, 1])
    captions = [axes.get_xlabel() for axes in card.figure().axes if axes.images]
    assert sum(caption.endswith("\nbody") for caption in captions) == 4


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_card_comes_back_from_its_file(tmp_path, suffix):
    card = card_of(camfn.targets.top(2), method="score_cam", layout=lambda activation: activation)
    card.save(tmp_path / f"card.{suffix}")
    found = camfn.load(tmp_path / f"card.{suffix}")
    assert type(found) is camfn.Explanation
    for name in ("maps", "scores", "classes"):
        assert torch.equal(getattr(found, name), getattr(card, name))
    for name in ("method", "layers", "grids", "targets", "forwards", "seconds", "findings", "names", "versions"):
        assert getattr(found, name) == getattr(card, name), name
    assert all(torch.equal(a, b) for a, b in zip(found.weights, card.weights))
    assert found.settings["layout"] == "<lambda>"
    assert found.settings["normalize"] is True
    assert repr(found) == repr(card)
    assert found.overlay(1, 1) == card.overlay(1, 1)


def test_cards_of_several_layers_and_without_pictures_come_back(tmp_path):
    card = camfn.explain(demo.network(), ["body", "features"], X.bfloat16(), method="layer_cam", state=_narrow())
    for suffix in ("npz", "safetensors"):
        card.save(tmp_path / f"card.{suffix}")
        found = camfn.load(tmp_path / f"card.{suffix}")
        assert len(found.maps) == 2
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found.maps, card.maps))
        assert found.pictures == ()


def _narrow():
    return {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in camfn.state_of(demo.network()).items()
    }


def test_the_facts_of_a_card_in_safetensors_are_its_metadata(tmp_path):
    from safetensors import safe_open

    card_of(0).save(tmp_path / "card.safetensors")
    with safe_open(tmp_path / "card.safetensors", framework="np") as file:
        facts = json.loads(file.metadata()["camfn"])
        assert file.get_tensor("maps").shape == (2, 12, 12)
    assert facts["method"] == "grad_cam"
    assert facts["names"] == NAMES


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_a_card_is_saved_as_a_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    card_of(0).save(tmp_path / f"card.{suffix}")
    with Image.open(tmp_path / f"card.{suffix}") as found:
        assert found.format == ("PNG" if suffix == "png" else "JPEG")
        assert min(found.size) > 200


# ---------------------------------------------------------------------------------------------------------- bad input

PLAIN = {"method": "grad_cam", "images": None, "names": None}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": PHOTOS[:1]}, r"images has 1 picture, and x has 2 inputs"),
        ({"images": [PHOTOS[0], wide()]}, r"images\[1\] has 240 x 160 pixels, and its input 96 x 96.*pass preprocess="),
        (
            {"images": PHOTOS[::-1], "preprocess": crop},
            r"images\[0\] is not the picture of its input: preprocess makes another",
        ),
        ({"images": ["nowhere.png"] * 2}, "there is no file 'nowhere.png'"),
        ({"images": None, "preprocess": crop}, "preprocess= says where the inputs lie on their pictures: pass the pictures"),
        ({"names": NAMES[:5]}, "names has 5 names, and the model has 8 classes"),
        ({"names": [*NAMES, "more"]}, "names has 9 names, and the model has 8 classes"),
        ({"names": "ring"}, "names must have a name for each class; found the string 'ring'"),
        ({"names": {1: "a", 2: "b"}}, "names must name the classes 0 to 1; found 1, 2"),
    ],
)
def test_pictures_and_names_that_do_not_fit_are_an_error(options, words):
    with pytest.raises(CamError, match=words):
        card_of(0, **options)


def test_names_may_be_a_mapping_of_indices():
    assert card_of(0, names={str(i): name for i, name in enumerate(NAMES)}).names == tuple(NAMES)


def test_a_card_without_pictures_cannot_be_drawn(tmp_path):
    card = card_of(0, images=None)
    for draw in (card.overlay, card.figure, lambda: card.save(tmp_path / "card.png")):
        with pytest.raises(CamError, match=r"^the card has no pictures: pass images= to camfn\.explain, or explain photos by"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_an_image_a_target_or_a_layer_that_is_not_there_is_an_error():
    card = card_of(camfn.targets.top(2))
    for arguments, options, what in (((2, 0), {}, "image 2: the card has 2"), ((0, 2), {}, "target 2: the card has 2")):
        with pytest.raises(CamError, match=f"there is no {what}"):
            card.overlay(*arguments, **options)
    with pytest.raises(CamError, match="target= is an index from 0 to 1; found 'ring'"):
        card.overlay(0, "ring")
    with pytest.raises(CamError, match="there is no layer 1: the card has 1"):
        card.overlay(layer=1)


def test_a_video_has_no_picture():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5))
    x = torch.rand(1, 3, 4, 8, 8)
    with pytest.raises(CamError, match="images= needs inputs with two spatial axes, and these have 3"):
        camfn.explain(model, "1", x, method="grad_cam", images=PHOTOS[:1])
    card = camfn.explain(model, "1", x, method="grad_cam")
    assert "maps (1, 2, 6, 6)" in repr(card)
    assert parsed(card._repr_html_()).tags.count("img") == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("card.txt", "", "is not a card: cards that can be loaded end in .npz or .safetensors"),
        ("card.npz", None, "there is no file"),
        ("card.npz", "no archive", "is not a card that camfn saved"),
        ("card.safetensors", "no tensors", "cannot be read"),
    ],
)
def test_a_file_that_is_no_card_is_an_error(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CamError, match=words):
        camfn.load(tmp_path / name)


def test_arrays_of_others_are_no_card(tmp_path):
    np.savez(tmp_path / "other.npz", maps=np.zeros(3))
    with pytest.raises(CamError, match="is not a card that camfn saved"):
        camfn.load(tmp_path / "other.npz")


def test_a_suffix_that_is_not_known_and_a_folder_that_is_not_there_are_errors(tmp_path):
    card = card_of(0)
    with pytest.raises(CamError, match=r"a card is saved as \.png, \.jpg, \.html, \.npz or \.safetensors; found"):
        card.save(tmp_path / "card.gif")
    for suffix in ("png", "html", "npz", "safetensors"):
        with pytest.raises(CamError, match="cannot be written"):
            card.save(tmp_path / "nowhere" / f"card.{suffix}")


def test_pictures_have_no_meaning_under_a_transform():
    net = small_net()
    with pytest.raises(CamError, match="images= has no meaning under a transform"):
        vmap(lambda x: camfn.explain(net, "features", x[None], 1, method="grad_cam", images=PHOTOS[0]).maps)(inputs())
