"""Reading picture files, and the largest pictures and inputs."""

import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import CamError, images

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_read_turns_a_picture_as_its_exif_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show"
    Image.fromarray(PICTURE).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(pixels(images.read(tmp_path / "phone.png")), np.rot90(PICTURE, -1))


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}
"""What the EXIF orientation asks for."""


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "CMYK"])
def test_a_tiff_is_turned_too(tmp_path, mode, turn):
    """Pillow maps some uncompressed ones into memory, and garbles those that are to be turned by a quarter."""
    grey = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
    picture = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(PICTURE).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "p.tif", exif=exif)
    rgb = np.dstack([np.rint(grey / 257).astype(np.uint8)] * 3) if mode == "I;16" else np.asarray(picture.convert("RGB"))
    assert np.array_equal(pixels(images.read(tmp_path / "p.tif")), TURNS[turn](rgb))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_read_gives_rgb_of_whatever_is_8_bits(tmp_path, mode):
    picture = Image.fromarray(PICTURE).convert(mode)
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    picture.save(path)
    assert np.array_equal(pixels(images.read(str(path))), np.asarray(picture.convert("RGB")))


def test_a_palette_with_an_opacity_for_each_colour_is_read_without_a_warning(tmp_path):
    picture = Image.fromarray(PICTURE).convert("P")
    picture.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert np.array_equal(pixels(images.read(tmp_path / "p.png")), np.asarray(picture.convert("RGB")))


def test_files_that_are_no_pictures_are_errors_of_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(PICTURE).resize((99, 99)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for path, words in (
        (tmp_path / "none.png", "there is no file '.*none.png'"),
        (tmp_path, "'.*' is a folder, not a picture"),
        (tmp_path / "text.png", "text.png' is not a picture that Pillow can read"),
        (tmp_path / "cut.png", "cut.png' cannot be read as a picture: .*truncated"),
    ):
        with pytest.raises(CamError, match=words) as caught:
            images.read(path)
        assert "\n" not in str(caught.value)


def test_pipes_sockets_and_devices_are_no_pictures_and_are_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
        for path, found in (
            ("pipe.png", "a pipe"),
            ("link.png", "a pipe"),
            ("socket.png", "a socket"),
            ("/dev/zero", "a device"),
        ):
            with pytest.raises(CamError, match=rf"^'{path}' is {found}, not a picture: copy it to a file first$"):
                images.read(path)


def test_a_picture_of_absurd_size_is_refused(tmp_path, monkeypatch):
    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    monkeypatch.setattr("camfn.images.reading.LARGEST", 34)
    with pytest.raises(CamError, match=r"p.png' has more than 0 megapixels: make it smaller first"):
        images.read(tmp_path / "p.png")
    monkeypatch.setattr("camfn.images.reading.LARGEST", 35)
    assert images.read(tmp_path / "p.png").size == (7, 5)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_a_16_bit_picture_is_divided_by_257(kind):
    values = np.array([[0, 128, 129, 257], [40000, 65278, 65407, 65535]], dtype=np.uint16)
    deep = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind]))
    assert deep.mode == kind
    expected = np.rint(values / 257).astype(np.uint8)  # no value is halfway: 257 is odd
    assert np.array_equal(pixels(images.overlay(deep, torch.zeros(1, 1), alpha=0)), np.stack([expected] * 3, -1))


# ------------------------------------------------------------------------------------------------- what may be made


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def shorter_side(side, crop=None):
    """As torchvision and timm preprocess, with what the largest picture on the way was."""

    def preprocess(picture):
        scale = side / min(picture.size)
        width, height = (round(scale * each) for each in picture.size)
        preprocess.largest = max(preprocess.largest, width * height)
        picture = picture.resize((width, height))
        if crop:
            left, top = (width - crop) // 2, (height - crop) // 2
            picture = picture.crop((left, top, left + crop, top + crop))
        return (tensor(picture) - 0.5) / 0.25

    preprocess.largest = 0
    return preprocess


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (7, 60_000)])
def test_a_narrow_picture_that_would_become_a_giant_is_refused_before_it_is_one(size):
    long = round(224 * max(size) / min(size))
    sides = f"{long} x 224" if size[0] > size[1] else f"224 x {long}"
    for preprocess, limit in ((shorter_side(224), 16), (shorter_side(224, crop=200), 100)):
        with pytest.raises(CamError) as caught:
            images.check_narrow(preprocess, size)
        made = sides if limit == 16 else sides.replace("224", "200").replace(str(long), str(round(200 / 224 * long)))
        assert str(caught.value) == (
            f"preprocess would make an input of {made} pixels of the picture's {size[0]} x {size[1]}, "
            f"more than {limit} megapixels: crop or pad the picture first"
        )
        assert preprocess.largest <= 224 * 224 * 8


@pytest.mark.parametrize(
    "preprocess",
    [
        shorter_side(20),
        shorter_side(24, crop=20),
        lambda p: tensor(p.resize((224, 224))),  # keeps no aspect ratio
        lambda p: tensor(p),
        lambda p: tensor(p.crop((0, 0, 224, 224))),  # pads
        lambda p: 1 / 0,
        lambda p: "no tensor",
        lambda p: {"pixel_values": [tensor(p.resize((224, 224))).numpy()]},
    ],
)
def test_a_narrow_picture_that_stays_small_is_not_refused(preprocess):
    for size in ((1, 10_000), (10_000, 1), (100, 3200)):
        images.check_narrow(preprocess, size)


def test_an_input_may_be_as_large_as_its_picture_and_not_much_larger(monkeypatch):
    images.check_input(torch.empty(1, device="meta").expand(3, 8000, 6000), (6000, 8000))
    images.check_input(torch.empty(1, device="meta").expand(1, 3, 4000, 4000), (2, 2))
    with pytest.raises(
        CamError, match=r"^preprocess makes an input of 4000 x 4001 pixels of the picture's 2 x 3, more than 16 mega"
    ):
        images.check_input(torch.empty(1, device="meta").expand(1, 3, 4001, 4000), (2, 3))


def test_a_processor_and_random_numbers_are_tried_too():
    """What an image processor of transformers returns, and a preprocessing that draws."""

    def preprocess(picture):
        torch.rand(3)
        return {"pixel_values": [shorter_side(224)(picture).numpy()]}

    before = torch.get_rng_state()
    with pytest.raises(CamError, match="preprocess would make an input"):
        images.check_narrow(preprocess, (1, 10_000))
    assert torch.equal(torch.get_rng_state(), before)
