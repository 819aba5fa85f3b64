"""Pictures: what an overlay is, pixel by pixel; colour maps against matplotlib; reading; what a network saw."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import CamError, images, maps
from tests.oracles.closeness import close

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
MAP = torch.linspace(0, 1, 6).reshape(2, 3)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


# -------------------------------------------------------------------------------------------------------- overlays

CHW = np.ascontiguousarray(PICTURE.transpose(2, 0, 1))
KINDS = {
    "PIL": Image.fromarray(PICTURE),
    "uint8 HWC array": PICTURE,
    "uint8 CHW array": CHW,
    "uint8 HWC tensor": torch.from_numpy(PICTURE),
    "uint8 CHW tensor": torch.from_numpy(CHW),
    "a view that is not contiguous": torch.from_numpy(PICTURE).permute(2, 0, 1),
    "an array that is read-only": np.asarray(Image.fromarray(PICTURE)),
    "an array of negative strides": PICTURE[::-1][::-1],
    "float64 HWC array": PICTURE / 255,
    "float32 CHW array": (CHW / 255).astype(np.float32),
    "float32 CHW tensor": torch.from_numpy(CHW).float() / 255,
    "float16 CHW tensor": torch.from_numpy(CHW).half() / 255,
    "float64 tensor that wants a gradient": (torch.from_numpy(PICTURE).double() / 255).requires_grad_(),
    "RGBA PIL": Image.fromarray(np.dstack([PICTURE, np.full((5, 7), 9, np.uint8)])),
    "RGBA HWC array": np.dstack([PICTURE, np.full((5, 7), 9, np.uint8)]),
    "RGBA CHW tensor": torch.cat([torch.from_numpy(CHW).float() / 255, torch.zeros(1, 5, 7)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_the_picture_to_the_bit_whatever_its_type(kind):
    assert np.array_equal(pixels(images.overlay(KINDS[kind], MAP, alpha=0)), PICTURE)


GREY = PICTURE[..., 0]
GREYS = {
    "PIL L": Image.fromarray(GREY),
    "PIL LA": Image.merge("LA", [Image.fromarray(GREY)] * 2),
    "uint8 HW": GREY,
    "uint8 HW1": GREY[..., None],
    "uint8 1HW": torch.from_numpy(GREY)[None],
    "float HW": torch.from_numpy(GREY) / 255,
}


@pytest.mark.parametrize("kind", GREYS)
def test_a_grey_picture_has_three_equal_channels(kind):
    assert np.array_equal(pixels(images.overlay(GREYS[kind], MAP, alpha=0)), np.dstack([GREY] * 3))


def test_alpha_one_is_the_coloured_map():
    whole = maps.resize(MAP, (5, 7)).numpy()
    for name in images.COLORMAPS:
        expected = np.rint(images.colorize(whole, name) * 255)
        assert np.array_equal(pixels(images.overlay(PICTURE, MAP, alpha=1, colormap=name)), expected)


def test_alpha_weighs_the_map_in_closed_form():
    picture = Image.new("RGB", (4, 3), (200, 100, 60))
    hot = torch.ones(1, 1)  # jet's last colour is (0.5, 0, 0)
    assert images.overlay(picture, hot, alpha=0.25, colormap="jet").getpixel((1, 1)) == (182, 75, 45)  # 150 + 31.875, 75, 45
    assert images.overlay(picture, hot, alpha=0.9, colormap="jet").getpixel((1, 1)) == (135, 10, 6)  # 20 + 114.75, 10, 6
    assert pixels(images.overlay(picture, hot, colormap="jet"))[0, 0].tolist() == [164, 50, 30]  # half and half: 100 + 63.75


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_the_map_is_neither_rescaled_nor_squared(value):
    drawn = pixels(images.overlay(PICTURE, torch.full((2, 2), value), alpha=1, colormap="viridis"))
    assert (drawn == np.rint(images.colorize(value, "viridis") * 255)).all()


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel centres are at halves and edges are repeated: written out."""

    def at(i: int, size: int, cells: int) -> tuple[int, int, float]:
        where = min(max((i + 0.5) * cells / size - 0.5, 0), cells - 1)
        low = int(where)
        return low, min(low + 1, cells - 1), where - low

    out = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            a, b, s = at(i, height, values.shape[0])
            c, d, t = at(j, width, values.shape[1])
            top = values[a, c] * (1 - t) + values[a, d] * t
            bottom = values[b, c] * (1 - t) + values[b, d] * t
            out[i, j] = top * (1 - s) + bottom * s
    return out


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (5, 7), (9, 4)])
def test_the_map_is_resized_bilinearly_to_the_picture(grid):
    small = np.random.default_rng(1).random(grid)
    big = bilinear(small, 5, 7)
    drawn = images.overlay(PICTURE, small, alpha=0.7)
    assert drawn.size == (7, 5)
    assert np.array_equal(pixels(drawn), pixels(images.overlay(PICTURE, big, alpha=0.7)))


def test_maps_are_taken_as_tensors_and_arrays_of_any_float_alike():
    as_is = pixels(images.overlay(PICTURE, MAP))
    for other in (MAP.numpy(), MAP.double().requires_grad_(), MAP.tolist()):
        assert (
            np.abs(pixels(images.overlay(PICTURE, other)).astype(int) - as_is).max() <= 1
        )  # float32 to float64: a tie may turn
    eighths = torch.tensor([[0.0, 0.125], [0.75, 1.0]])
    assert (
        images.overlay(PICTURE, eighths.half())
        == images.overlay(PICTURE, eighths.bfloat16())
        == images.overlay(PICTURE, eighths)
    )


def test_overlay_leaves_its_arguments_as_they_were():
    picture, map = torch.from_numpy(CHW).float() / 255, MAP.clone()
    before = picture.clone()
    images.overlay(picture, map)
    assert torch.equal(picture, before)
    assert torch.equal(map, MAP)


def test_what_is_out_of_range_by_rounding_is_in_range():
    barely = torch.tensor([[-1e-7, 1 + 2e-7]])
    assert images.overlay(PICTURE, barely) == images.overlay(PICTURE, torch.tensor([[0.0, 1.0]]))
    assert images.overlay(torch.full((3, 2, 2), 1 + 2e-7), MAP, alpha=0).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("map", "words"),
    [
        (
            torch.tensor([[-0.2, 1.0]]),
            r"map has values from -0\.2 to 1, .*normalize=True.*camfn\.maps\.normalize\(map, \(-2, -1\)\)",
        ),
        (torch.tensor([[0.0, 1.001]]), r"map has values from 0 to 1\.001"),
        (np.array([[0, 255]], dtype=np.uint8), "map has values from 0 to 255"),
        (torch.tensor([[0.0, torch.nan]]), "map has NaN or infinite values"),
        (torch.tensor([[0.0, torch.inf]]), "map has NaN or infinite values"),
        (torch.zeros(1, 2, 3), r"map has shape \(1, 2, 3\).*one map \(h, w\).*maps\[0\]"),
        (torch.zeros(0, 3), r"map has shape \(0, 3\)"),
        ("a map", "map must be a tensor or an array; found str"),
    ],
)
def test_a_map_that_cannot_be_coloured_is_an_error(map, words):
    with pytest.raises(CamError, match=words):
        images.overlay(PICTURE, map)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            torch.tensor([[[-2.0]], [[0.5]], [[2.0]]]).expand(3, 6, 6),
            r"image has values from -2 to 2, .*undo the normalization",
        ),
        (PICTURE.astype(np.float32), "undo the normalization .*or divide by 255"),
        (torch.full((3, 5, 7), torch.nan), "image has NaN or infinite values"),
        (PICTURE.astype(np.int64), r"image is torch\.int64: it must be uint8, or floats in \[0, 1\]"),
        (torch.ones(5, 7, dtype=torch.bool), r"image is torch\.bool"),
        (np.zeros((5, 7, 2)), r"image has shape \(5, 7, 2\).*k = 1, 3 or 4"),
        (torch.zeros(1, 3, 5, 7), r"image has shape \(1, 3, 5, 7\), but must be one picture.*x\[0\]"),
        (torch.zeros(5), r"image has shape \(5,\)"),
        (np.zeros((0, 7, 3)), r"image has shape \(0, 7, 3\)"),
        (np.zeros((3, 9, 4)), r"image of shape \(3, 9, 4\) could be .*pass it as a PIL image"),
        (Image.new("F", (4, 4)), "pixels of mode 'F', floats of an unknown range: scale them to 8 or 16 bits first"),
        (Image.new("I", (4, 4), 65536), "pixels of mode 'I' with values from 65536 to 65536: scale them to 8 or 16 bits first"),
        (Image.new("I", (4, 4), -1), "pixels of mode 'I' with values from -1 to -1"),
        (None, "image must be a PIL image, a tensor or an array; found NoneType"),
    ],
)
def test_a_picture_that_is_none_is_an_error(image, words):
    with pytest.raises(CamError, match=words):
        images.overlay(image, MAP)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range_is_an_error_that_says_what_it_weighs(alpha):
    with pytest.raises(CamError, match="alpha is the weight of the map, from 0"):
        images.overlay(PICTURE, MAP, alpha=alpha)


def test_an_unknown_colormap_is_an_error_with_the_closest():
    with pytest.raises(CamError, match="no colormap named 'virids'; closest: 'viridis'; all: jet, turbo, viridis"):
        images.overlay(PICTURE, MAP, colormap="virids")


# ----------------------------------------------------------------------------------------------------- colour maps


@pytest.mark.parametrize(("name", "levels"), [("jet", 1e-9), ("turbo", 1.9), ("viridis", 1.4)])
def test_colours_are_matplotlibs_to_the_error_that_the_docstring_states(name, levels):
    matplotlib = pytest.importorskip("matplotlib")
    theirs = np.array([matplotlib.colormaps[name](level)[:3] for level in range(256)])
    ours = images.colorize(np.arange(256) / 255, name)
    worst = np.abs(ours - theirs).max() * 255
    assert worst <= levels, f"{name} differs by {worst:.3g} of 255"


@pytest.mark.parametrize("name", images.COLORMAPS)
def test_a_colour_map_keeps_shape_and_range_and_has_no_jumps(name):
    colours = images.colorize(np.linspace(0, 1, 2001).reshape(3, 667), name)
    assert colours.shape == (3, 667, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert np.abs(np.diff(colours.reshape(-1, 3), axis=0)).max() < 0.005  # no slope is above 10


def test_viridis_grows_lighter_all_the_way():
    luminance = images.colorize(np.linspace(0, 1, 256), "viridis") @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).all()


# --------------------------------------------------------------------------------------------------------- reading


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
    monkeypatch.setattr(images, "LARGEST", 34)
    with pytest.raises(CamError, match=r"p.png' has more than 0 megapixels: make it smaller first"):
        images.read(tmp_path / "p.png")
    monkeypatch.setattr(images, "LARGEST", 35)
    assert images.read(tmp_path / "p.png").size == (7, 5)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_a_16_bit_picture_is_divided_by_257(kind):
    values = np.array([[0, 128, 129, 257], [40000, 65278, 65407, 65535]], dtype=np.uint16)
    deep = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind]))
    assert deep.mode == kind
    expected = np.rint(values / 257).astype(np.uint8)  # no value is halfway: 257 is odd
    assert np.array_equal(pixels(images.overlay(deep, torch.zeros(1, 1), alpha=0)), np.stack([expected] * 3, -1))


# ---------------------------------------------------------------------------------------------- what a network sees

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((12, 10), Image.Resampling.BILINEAR).crop((2, 1, 10, 9))


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 24, 3), dtype=np.uint8))


SCALINGS = {
    "none": lambda p: tensor(resized(p)),
    "mean and standard deviation": lambda p: (tensor(resized(p)) - MEAN) / STD,
    "0 to 255 less a mean, BGR": lambda p: tensor(resized(p)).flip(0) * 255 - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1),
    "another cyclic order": lambda p: (tensor(resized(p)).roll(1, 0) - MEAN) / STD,
    "inverted": lambda p: 1 - 2 * tensor(resized(p)),
    "a batch of one": lambda p: ((tensor(resized(p)) - MEAN) / STD)[None],
}


@pytest.mark.parametrize("name", SCALINGS)
def test_what_the_network_saw_is_the_cropped_picture_in_its_own_colours(name):
    preprocess = SCALINGS[name]
    seen, true = images.as_seen(preprocess(photo()).reshape(3, 8, 8), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen.numpy() * 255), np.asarray(resized(photo())))


def test_a_grey_network_saw_a_grey_picture():
    def preprocess(picture):
        return (torch.from_numpy(np.array(resized(picture).convert("L")))[None].float() / 255 - 0.4) / 0.2

    seen, true = images.as_seen(preprocess(photo()), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen.numpy() * 255), np.dstack([np.asarray(resized(photo()).convert("L"))] * 3))


def test_padding_is_black_and_the_rest_true():
    def preprocess(picture):
        return torch.nn.functional.pad((tensor(resized(picture)) - MEAN) / STD, (2, 2, 0, 0), value=0.7)

    seen, true = images.as_seen(preprocess(photo()), preprocess, photo().size)
    assert true
    assert np.array_equal(np.rint(seen[:, 2:-2].numpy() * 255), np.asarray(resized(photo())))
    assert not seen[:, :2].any()
    assert not seen[:, -2:].any()


def choosy(picture):
    if len(set(picture.getdata() if not hasattr(picture, "get_flattened_data") else picture.get_flattened_data())) == 1:
        raise ValueError("an even picture")
    return tensor(resized(picture))


UNMEASURABLE = {
    "a square root": lambda p: tensor(resized(p)).sqrt(),
    "channels mixed": lambda p: tensor(resized(p)) @ torch.full((8, 8), 0.1) + tensor(resized(p)).mean(0) * 3,
    "scaled by its own mean": lambda p: tensor(resized(p)) / tensor(resized(p)).mean().clamp(min=1e-3),
    "refuses even pictures": choosy,
    "two channels": lambda p: tensor(resized(p))[:2] * 3,
    "constant": lambda p: torch.zeros(3, 8, 8),
}


@pytest.mark.parametrize("name", UNMEASURABLE)
def test_where_colours_cannot_be_undone_the_input_is_stretched_and_that_is_said(name):
    x = UNMEASURABLE[name](photo())
    seen, true = images.as_seen(x, UNMEASURABLE[name], photo().size)
    assert not true
    grey = x.double() if len(x) == 3 else x.double().mean(0).expand(3, 8, 8)
    span = grey.max() - grey.min()
    expected = (grey - grey.min()) / span if span else torch.zeros(3, 8, 8, dtype=torch.float64)
    close(seen, expected.permute(1, 2, 0))


# ------------------------------------------------------------------------------------------------- what may be made


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


# ------------------------------------------------------------------------------------------------------ lazy imports


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_camfn_loads_neither_pillow_nor_matplotlib_and_images_needs_them_only_when_called():
    found = python(
        "import sys, camfn\n"
        "names = 'PIL', 'matplotlib', 'click'\n"
        "print(*[name for name in names if name in sys.modules])\n"
        "sys.modules['PIL'] = None\n"
        "from camfn import images\n"
        "print(images.colorize(0.0, 'jet').tolist())\n"
        "for call in (lambda: images.read('x.png'), lambda: images.overlay([[0.5]], [[0.5]])):\n"
        "    try: call()\n"
        "    except camfn.CamError as error: print(error)\n"
        "import numpy, camfn.cli\n"
        "print(*[name for name in names if sys.modules.get(name)])\n"
    )
    need = "pictures need Pillow: pip install 'camfn[cli]'"
    assert found.split("\n") == ["", "[0.0, 0.0, 0.5]", need, need, "", ""]
