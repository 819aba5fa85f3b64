"""What an overlay is, pixel by pixel, and what its colors say."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from camfn import CamError, images

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
MAP = torch.linspace(0, 1, 6).reshape(2, 3)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


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


def jet(values: np.ndarray) -> np.ndarray:
    """Its definition in matplotlib, which has one line between two knots."""
    red = np.interp(values, [0, 0.35, 0.66, 0.89, 1], [0, 0, 1, 1, 0.5])
    green = np.interp(values, [0, 0.125, 0.375, 0.64, 0.91, 1], [0, 0, 1, 1, 0, 0])
    blue = np.interp(values, [0, 0.11, 0.34, 0.65, 1], [0.5, 1, 1, 0, 0])
    return np.stack([red, green, blue], -1)


def theirs(name: str, values: np.ndarray) -> np.ndarray:
    """Matplotlib's colors, between its 256."""
    table = np.array([pytest.importorskip("matplotlib").colormaps[name](level)[:3] for level in range(256)])
    return np.stack([np.interp(values * 255, np.arange(256), table[:, k]) for k in range(3)], -1)


def heat(picture: np.ndarray, values: np.ndarray, alpha: float, colors: np.ndarray, power: float = 0.6) -> np.ndarray:
    """The docstring's formula in levels of 0 to 255."""
    gray = (0.299 * picture[..., 0] + 0.587 * picture[..., 1] + 0.114 * picture[..., 2])[..., None] / 255
    faded = (1 - alpha / 2) * ((1 - alpha) * picture / 255 + alpha * gray)
    weight = alpha * np.abs(values)[..., None] ** power
    return 255 * ((1 - weight) * faded + weight * colors)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
def test_heat_is_the_formula_of_the_docstring(alpha):
    values = bilinear(MAP.numpy(), 5, 7)
    found = pixels(images.overlay(PICTURE, MAP, alpha=alpha, colormap="jet")).astype(float)
    assert np.abs(found - heat(PICTURE, values, alpha, jet(values))).max() <= 0.501  # rounding to levels, and float32


@pytest.mark.parametrize("name", ["inferno", "viridis", "turbo"])
def test_heat_has_the_colors_of_its_map(name):
    values = bilinear(MAP.numpy(), 5, 7)
    found = pixels(images.overlay(PICTURE, MAP, colormap=name)).astype(float)
    assert np.abs(found - heat(PICTURE, values, 0.75, theirs(name, values))).max() <= 0.501 + 0.75 * 1.9


def test_by_default_it_is_inferno_at_three_quarters():
    assert images.overlay(PICTURE, MAP) == images.overlay(PICTURE, MAP, style="heat", alpha=0.75, colormap="inferno")


SIGNED = np.array([[-1.0, -0.5, 0.0], [0.25, 0.5, 1.0]])


def test_a_signed_map_is_diverging_about_zero():
    pytest.importorskip("matplotlib", minversion="3.10")  # which brought berlin
    values = bilinear(SIGNED, 5, 7)
    found = pixels(images.overlay(PICTURE, SIGNED)).astype(float)
    expected = heat(PICTURE, values, 0.75, theirs("berlin", values / 2 + 0.5), 1.0)
    assert np.abs(found - expected).max() <= 0.501 + 0.75 * 1.1
    assert images.overlay(PICTURE, SIGNED) == images.overlay(PICTURE, SIGNED, colormap="berlin")


def test_a_color_map_without_a_middle_shows_no_negative_values():
    positive = bilinear(SIGNED, 5, 7).clip(0)
    assert images.overlay(PICTURE, SIGNED, colormap="viridis") == images.overlay(PICTURE, positive, colormap="viridis")


@pytest.mark.parametrize("map", [MAP.numpy(), SIGNED])
def test_a_mask_darkens_what_the_map_leaves_out(map):
    values = bilinear(map, 5, 7)
    for alpha in (0.4, 1.0):
        expected = (1 - alpha * (1 - values.clip(0)))[..., None] * PICTURE
        assert np.abs(pixels(images.overlay(PICTURE, map, style="mask", alpha=alpha)) - expected).max() <= 0.501


def near(region: np.ndarray, radius: int) -> np.ndarray:
    """Is a pixel of the region at most so many rows and columns away?"""
    side = 2 * radius + 1
    return np.lib.stride_tricks.sliding_window_view(np.pad(region, radius), (side, side)).any((-2, -1))


@pytest.mark.parametrize("size", [(37, 41), (380, 390)])
@pytest.mark.parametrize("signed", [False, True])
def test_contours_are_lines_at_the_levels(signed, size):
    """A line of the level's color, with a white one of twice the width below it."""
    values = np.random.default_rng(3).uniform(-1 if signed else 0, 1, (3, 4))
    picture = np.random.default_rng(4).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = pixels(images.overlay(picture, values, style="contour", alpha=0.6)).astype(float)
    large, expected, radius = bilinear(values.astype(np.float32), *size), picture / 255, max(1, round(min(size) / 250))
    for level in (0.25, 0.5, 0.75, *((-0.25, -0.5, -0.75) if signed else ())):
        inside = large >= level if level > 0 else large <= level
        color = images.colorize(level / 2 + 0.5, "berlin") if signed else images.colorize(level, "inferno")
        for width, paint in ((2 * radius, np.ones(3)), (radius, color)):
            line = near(inside, width) & near(~inside, width)
            expected = np.where(line[..., None], 0.4 * expected + 0.6 * paint, expected)
    assert (np.abs(found - 255 * expected).max(-1) > 0.51).mean() < 1e-3  # a value may cross its level by rounding


def test_contours_lie_on_the_level_set_and_nowhere_else():
    """On a plane that rises by 1/200 a column, the lines are columns."""
    white = np.full((30, 200, 3), 90, np.uint8)
    plane = np.tile((np.arange(200) + 0.5) / 200, (30, 1))
    drawn = pixels(images.overlay(white, plane, style="contour", alpha=1.0))
    columns = np.nonzero((drawn != 90).any(-1).any(0))[0]
    assert np.array_equal(columns, [c + k for c in (50, 100, 150) for k in (-2, -1, 0, 1)])
    assert (drawn == drawn[:1]).all()


@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_an_even_map_has_no_contours(level):
    assert np.array_equal(pixels(images.overlay(PICTURE, torch.full((2, 2), level), style="contour")), PICTURE)


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
            torch.tensor([[-1.2, 1.0]]),
            r"map has values from -1\.2 to 1, .*\[-1, 1\] if it is signed.*normalize=True.*maps\.normalize\(map, \(-2, -1\)\)",
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
    with pytest.raises(CamError, match="alpha is the opacity of the map, from 0"):
        images.overlay(PICTURE, MAP, alpha=alpha)


def test_an_unknown_colormap_is_an_error_with_the_closest():
    with pytest.raises(CamError, match="'virids'; closest: 'viridis'; all: jet, inferno, berlin, turbo, viridis"):
        images.overlay(PICTURE, MAP, colormap="virids")


def test_an_unknown_style_is_an_error():
    with pytest.raises(CamError, match=r"^style must be 'heat', 'contour' or 'mask'; found 'contours'$"):
        images.overlay(PICTURE, MAP, style="contours")


# ----------------------------------------------------------------------------------------- what the colors seem to say

EVEN = ["inferno", "viridis"]
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lightness(drawn: Image.Image) -> np.ndarray:
    """The CIE's L*, of 0 to 100."""
    y = linear(pixels(drawn) / 255) @ LUMINANCE
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def ground(level: int, size: int = 101) -> np.ndarray:
    return np.full((5, size, 3), level, np.uint8)


VALUES = np.linspace(0, 1, 101)[None]


@pytest.mark.parametrize("name", EVEN)
def test_the_highest_value_is_the_lightest_on_any_ground(name):
    """Its overlay on black is lighter than that of any value on any gray, and so of the lowest on white."""
    darkest = min(lightness(images.overlay(ground(level), VALUES, colormap=name))[0, -1] for level in range(0, 256, 15))
    for level in range(0, 256, 15):
        found = lightness(images.overlay(ground(level), VALUES, colormap=name))[0]
        assert found.argmax() == 100
        assert found[0] < darkest
        assert (found[:70] < darkest).all()


@pytest.mark.parametrize("name", [*EVEN, "turbo", "jet", "berlin"])
def test_opacity_grows_with_the_value(name):
    """What is left of the picture's contrast between black and white shrinks."""
    values = VALUES if name != "berlin" else 2 * VALUES - 1
    black, white = (pixels(images.overlay(ground(level), values, colormap=name)).astype(int) for level in (0, 255))
    left = (white - black)[0].mean(-1)
    if name == "berlin":
        assert np.abs(left - left[::-1]).max() <= 1
        left = left[50:]
    assert left[0] == pytest.approx(255 * 0.625, abs=1)  # faded
    assert left[-1] == pytest.approx(255 * 0.625 * 0.25, abs=1)
    assert (np.diff(left) <= 1).all()
    assert (np.diff(left[::10]) < 0).all()


def test_lightness_grows_with_the_value_on_black():
    for name in EVEN:
        assert (np.diff(lightness(images.overlay(ground(0), VALUES, colormap=name))[0]) > -0.5).all()  # 8 bits


@pytest.mark.parametrize("level", [0, 90, 128, 200])
def test_a_value_and_its_negative_are_about_as_light_and_differ_in_hue(level):
    found = images.overlay(ground(level), 2 * VALUES - 1)
    light, colors = lightness(found)[0], pixels(found)[0].astype(int)
    assert np.abs(light - light[::-1]).max() < 7
    assert (colors[:40, 2] > colors[:40, 0] + 5).all()  # blue is against
    assert (colors[61:, 0] > colors[61:, 2] + 5).all()  # red is for
    assert np.ptp(colors[50]) <= 1  # zero has no color


DEUTERANOPIA = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
"""Machado, Oliveira and Fernandes (2009), severity 1: of linear RGB."""


@pytest.mark.parametrize("name", EVEN)
def test_without_green_cones_the_order_is_the_same(name):
    colors = np.clip(linear(images.colorize(np.linspace(0, 1, 256), name)) @ DEUTERANOPIA.T, 0, 1)
    assert (np.diff(colors @ LUMINANCE) > 0).all()


def test_without_green_cones_for_and_against_differ_in_hue():
    seen = np.clip(linear(images.colorize(np.array([0.0, 1.0]), "berlin")) @ DEUTERANOPIA.T, 0, 1)
    assert seen[0, 2] > 1.5 * seen[0, 0]
    assert seen[1, 0] > 1.2 * seen[1, 2]


# ------------------------------------------------------------------------------------------------------- on the photo

CROP = images.View(((2.0, 0.0, 20.0), (0.0, 2.0, 10.0)), (30, 20), (100, 60))
"""Shows columns 20 to 79 and rows 10 to 49 of a photo; half of an input's pixel, one of the photo, is left to doubt."""
PHOTO = np.random.default_rng(5).integers(0, 256, (60, 100, 3), dtype=np.uint8)
SHOWN = np.zeros((60, 100), bool)
SHOWN[9:51, 19:81] = True


@pytest.mark.parametrize("style", images.STYLES)
def test_alpha_zero_is_the_picture_to_the_bit_in_all_styles_where_it_is_shown(style):
    drawn = pixels(images.overlay(PHOTO, SIGNED, style=style, alpha=0, view=CROP))
    assert np.array_equal(drawn[SHOWN], PHOTO[SHOWN])
    assert np.array_equal(pixels(images.overlay(PHOTO, SIGNED, style=style, alpha=0)), PHOTO)


@pytest.mark.parametrize("style", images.STYLES)
def test_what_was_cropped_away_is_dark_and_gray_outside_of_a_line(style):
    drawn = pixels(images.overlay(PHOTO, MAP, style=style, view=CROP)).astype(int)
    line = near(SHOWN, 1) & ~SHOWN
    assert (drawn[line] == 128).all()
    rest = ~SHOWN & ~line
    assert np.abs(drawn[rest] - (PHOTO[rest] @ [0.299, 0.587, 0.114] / 4)[:, None]).max() <= 0.501


def test_a_map_lies_where_its_view_says():
    hot = np.zeros((20, 30))
    hot[4, 25] = 1.0  # its center is at (71, 19) of the photo
    found, without = (lightness(images.overlay(np.full_like(PHOTO, 60), map, view=CROP)) for map in (hot, 0 * hot))
    rows, columns = np.nonzero(found - without == (found - without).max())
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == (19.0, 71.0)


def test_a_large_picture_is_drawn_in_strips_as_at_once(monkeypatch):
    expected = [images.overlay(PHOTO, SIGNED, style=style, view=CROP) for style in images.STYLES]
    for pixels_at_once in (1, 700):
        monkeypatch.setattr("camfn.images.overlays._PIXELS", pixels_at_once)
        assert [images.overlay(PHOTO, SIGNED, style=style, view=CROP) for style in images.STYLES] == expected


def test_a_view_of_another_photo_is_an_error():
    with pytest.raises(CamError, match=r"^the view belongs to a photo of 100 x 60 pixels, and the picture has 7 x 5$"):
        images.overlay(PICTURE, MAP, view=CROP)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 1), (3, 5000)])
@pytest.mark.parametrize("style", images.STYLES)
def test_pictures_of_a_pixel_or_a_line(style, shape):
    picture = np.random.default_rng(6).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(pixels(images.overlay(Image.fromarray(picture), MAP, style=style, alpha=0)), picture)
    assert images.overlay(Image.fromarray(picture), SIGNED, style=style).size == shape[::-1]


def test_a_map_that_is_negative_by_rounding_is_not_signed():
    barely = torch.tensor([[-1e-7, 1.0]])
    assert images.default_colormap(barely) == "inferno"
    assert images.default_colormap(barely.double()) == "berlin"  # there it is no rounding
    assert images.default_colormap(torch.tensor([[-0.001, 1.0]]).half()) == "inferno"


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
