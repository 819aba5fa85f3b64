"""Where an input lies on its photo: a marked pixel goes through the preprocessing, and comes back by the view.

The photo is dark with a bright disk. The disk's center in the input, mapped to the photo, must be the disk's center to within a
cell: one pixel of the input or of the photo, whichever is larger. No test reads how the view was found.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from camfn import CamError, demo, images
from camfn.images import View, Views, view_of, whole
from camfn.images.preprocessing import pixels_of
from tests.oracles.libraries import torchvision_models

BILINEAR, BICUBIC, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST
LANDSCAPE, PORTRAIT, SQUARE, ODD = (500, 375), (240, 320), (256, 256), (333, 251)
LARGE, TINY, BANNER, COLUMN = (3000, 2000), (32, 32), (6000, 400), (100, 3000)


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, copy=True)).permute(2, 0, 1).float() / 255


def scaled(picture: Image.Image) -> torch.Tensor:
    return (tensor(picture) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.225


def by_shorter_side(picture: Image.Image, side: int, how: Image.Resampling = BILINEAR) -> Image.Image:
    factor = side / min(picture.size)
    return picture.resize([round(factor * each) for each in picture.size], how)


def center(picture: Image.Image, side: int) -> Image.Image:
    left, top = ((each - side) // 2 for each in picture.size)
    return picture.crop((left, top, left + side, top + side))


def usual(picture: Image.Image, how: Image.Resampling = BILINEAR) -> Image.Image:
    return center(by_shorter_side(picture, 256, how), 224)


def letterbox(color: tuple[int, int, int], centering: tuple[float, float] = (0.5, 0.5)) -> Callable:
    return lambda p: scaled(ImageOps.pad(p, (224, 224), color=color, centering=centering))


PREPROCESSINGS = {
    "resize and center crop": (lambda p: scaled(usual(p)), [LANDSCAPE, PORTRAIT, SQUARE, ODD, LARGE, TINY, BANNER, COLUMN]),
    "bicubic": (lambda p: scaled(usual(p, BICUBIC)), [LANDSCAPE, TINY]),
    "nearest": (lambda p: scaled(usual(p, NEAREST)), [LANDSCAPE, PORTRAIT, LARGE, TINY]),
    "squash": (lambda p: scaled(p.resize((224, 224), BILINEAR)), [LANDSCAPE, PORTRAIT, ODD, TINY]),
    "nearest squash": (lambda p: scaled(p.resize((160, 224), NEAREST)), [LANDSCAPE, ODD]),
    "few pixels": (lambda p: scaled(p.resize((24, 16), BILINEAR)), [LANDSCAPE, ODD, TINY]),
    "letterbox in black": (letterbox((0, 0, 0)), [LANDSCAPE, PORTRAIT, ODD, TINY]),
    "letterbox in gray": (letterbox((124, 116, 104)), [LANDSCAPE, PORTRAIT]),
    "letterbox in white, below": (letterbox((255, 255, 255), (0, 0)), [LANDSCAPE, PORTRAIT]),
    "a border": (lambda p: scaled(ImageOps.expand(p.resize((200, 200)), 12, (9, 99, 200))), [LANDSCAPE, TINY]),
    "border crop": (lambda p: scaled(ImageOps.crop(p, 3).resize((96, 96), BILINEAR)), [LANDSCAPE, TINY]),
    "a crop of fixed size": (lambda p: scaled(p.crop((90, 110, 190, 210))), [PORTRAIT, SQUARE]),
    "as it is": (tensor, [PORTRAIT, TINY, BANNER]),
    "half the size": (lambda p: tensor(p.resize((p.width // 2, p.height // 2), BILINEAR)), [ODD, BANNER]),
    "enlarged": (lambda p: tensor(p.resize((p.width * 3, p.height * 3), BICUBIC)), [TINY, (100, 60)]),
    "mirrored": (lambda p: scaled(ImageOps.mirror(usual(p))), [LANDSCAPE, ODD]),
    "upside down": (lambda p: scaled(ImageOps.flip(usual(p))), [PORTRAIT]),
    "a quarter turn": (lambda p: scaled(usual(p.transpose(Image.Transpose.ROTATE_90))), [LANDSCAPE, ODD]),
    "three quarter turns": (lambda p: scaled(p.transpose(Image.Transpose.ROTATE_270).resize((96, 128))), [LANDSCAPE]),
    "transposed": (lambda p: scaled(usual(p)).transpose(-1, -2), [LANDSCAPE, PORTRAIT]),
    "turned by 20 degrees": (lambda p: scaled(usual(p).rotate(20, BILINEAR)), [LANDSCAPE, SQUARE]),
    "turned and expanded": (lambda p: scaled(p.rotate(-20, BICUBIC, expand=True).resize((224, 224))), [PORTRAIT]),
    "gray": (lambda p: scaled(usual(p))[:1], [LANDSCAPE]),
    "gray by its weights": (lambda p: torch.from_numpy(np.array(usual(p).convert("L")))[None] / 255, [LANDSCAPE]),
    "without an axis of channels": (lambda p: scaled(usual(p))[0], [LANDSCAPE]),
    "0 to 255 less a mean, BGR": (lambda p: 255 * tensor(usual(p)).flip(0) - 110, [LANDSCAPE]),
    "inverted": (lambda p: 1 - 2 * tensor(usual(p)), [PORTRAIT]),
    "one channel inverted": (lambda p: tensor(usual(p)) * torch.tensor([1.0, -1.0, 0.1])[:, None, None], [PORTRAIT]),
    "no green": (lambda p: tensor(usual(p)) * torch.tensor([1.0, 0.0, 1.0])[:, None, None], [PORTRAIT]),
    "no blue": (lambda p: tensor(usual(p)) * torch.tensor([1.0, 1.0, 0.0])[:, None, None], [PORTRAIT]),
    "a batch of one": (lambda p: scaled(usual(p))[None], [LANDSCAPE]),
    "channels last": (lambda p: scaled(usual(p)).movedim(0, -1), [LANDSCAPE]),
    "an array": (lambda p: np.asarray(usual(p)).transpose(2, 0, 1), [LANDSCAPE]),
    "a picture": (usual, [LANDSCAPE]),
    "half precision": (lambda p: scaled(usual(p)).half(), [LANDSCAPE]),
    "a graph": (lambda p: scaled(usual(p)).requires_grad_(), [LANDSCAPE]),
    "camfn.demo": (demo.preprocess, [(96, 96)]),
}
CASES = [(name, size) for name, (_, sizes) in PREPROCESSINGS.items() for size in sizes]


def photo(size: tuple[int, int], at: tuple[int, int], radius: int) -> Image.Image:
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    inside = (x - at[0]) ** 2 + (y - at[1]) ** 2 <= radius**2
    return Image.fromarray(np.uint8(20 + 230 * inside)).convert("RGB")


def center_of(weights: np.ndarray) -> np.ndarray:
    """The center (x, y) of a spot, in pixels from the corner."""
    y, x = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


def spot_in_input(preprocess: Callable, size: tuple[int, int], at: tuple[int, int], radius: int) -> np.ndarray:
    dark, marked = (pixels_of(preprocess, photo(size, at, each)).detach().double().numpy() for each in (-1, radius))
    changed = np.abs(marked - dark)
    changed = changed if changed.ndim == 2 else changed.sum(-1 if changed.shape[-1] == 3 else 0)
    return changed * (changed > 0.05 * changed.max())


def check(preprocess: Callable, size: tuple[int, int], seed: int = 0) -> View:
    view = view_of(preprocess, size)
    assert view.photo == size
    draw = np.random.default_rng(seed)
    cell = max(1.0, float(np.linalg.norm(np.asarray(view.matrix)[:, :2], axis=0).max()))
    # The photo's middle, which all of these show. The disk has some pixels in the photo and in the input.
    reach, radius = min(size) // 8, min(max(2, round(2 * cell)), min(size) // 4)
    for _ in range(2 if size[0] * size[1] < 10**6 else 1):
        at = tuple(int(side // 2 + draw.integers(-reach, reach + 1)) for side in size)
        true, spot = np.array(at) + 0.5, spot_in_input(preprocess, size, at, radius)
        assert (spot.shape[1], spot.shape[0]) == view.size
        found = center_of(spot)
        assert np.linalg.norm(view.to_photo(found) - true) <= cell
        assert np.linalg.norm(view.to_input(true) - found) <= max(1.0, 1 / cell * max(1, len(spot) / min(size)))
        laid, shown = view.on_photo(torch.from_numpy(spot / spot.max()).float())
        assert shown[at[1], at[0]]
        assert laid.shape == (size[1], size[0])
        assert np.linalg.norm(center_of(laid.numpy()) - true) <= cell
    return view


@pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{name} of {w} x {h}" for name, (w, h) in CASES])
def test_a_marked_pixel_comes_back_to_within_a_cell(name, size):
    check(PREPROCESSINGS[name][0], size)


# ------------------------------------------------------------------------------------------------ libraries' own


@pytest.mark.parametrize("returned", ["lists", "pt", "np"])
@pytest.mark.parametrize("name", ["ViTImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor"])
def test_processors_of_transformers(name, returned):
    torchvision_models()
    processor = getattr(pytest.importorskip("transformers"), name)()
    check(processor if returned == "lists" else lambda p: processor(p, return_tensors=returned), LANDSCAPE)


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_transforms_of_timm(mode, size):
    torchvision_models()
    create_transform = pytest.importorskip("timm.data").create_transform
    check(create_transform((3, 224, 224), crop_pct=0.9, crop_mode=mode), size)


@pytest.mark.parametrize("version", ["transforms", "transforms.v2"])
def test_transforms_of_torchvision(version):
    torchvision_models()
    t = pytest.importorskip(f"torchvision.{version}")
    for part in (t.CenterCrop(224), t.Pad(20, fill=99), t.RandomHorizontalFlip(1.0), t.Grayscale(3)):
        check(t.Compose([t.Resize(256), part, tensor]), LANDSCAPE)
    with pytest.raises(CamError, match="it draws random numbers, and two runs on one photo differ"):
        view_of(t.Compose([t.RandomResizedCrop(224), tensor]), LANDSCAPE)


# ------------------------------------------------------------------------------------------- what cannot be undone


def bent(strength: float) -> Callable:
    """A fisheye lens."""

    def preprocess(picture):
        y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
        out = 1 + strength * (x**2 + y**2)
        return torch.nn.functional.grid_sample(
            scaled(usual(picture))[None], torch.stack([x * out, y * out], -1)[None], align_corners=True
        )

    return preprocess


def standardized(x: torch.Tensor, least: float) -> torch.Tensor:
    return (x - x.mean()) / (x.std() + least)


def by_chance(draw: Callable[[], float], change: Callable) -> Callable:
    return lambda p: change(scaled(usual(p))) if draw() < 0.5 else scaled(usual(p))


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x.roll(int(torch.randint(40, ())), -1)


AWAY = r"it moves pixels by up to \d+\.\d photo pixels from an affine map, more than the \d+\.\d of a pixel"
SAME = "a black and a white picture give the same input, as where each picture is scaled by its own mean"
RANDOM = "it draws random numbers, and two runs on one photo differ"
CONTENT = "a white rectangle arrives elsewhere than ramps tell, so that its output depends on what a picture shows"
FEW = "too few pixels of the input show the photo"
INFINITE = "its output on a plain picture has NaN or infinite values"
NEVER = {
    "perspective": (
        lambda p: scaled(usual(p).transform((224, 224), Image.Transform.PERSPECTIVE, (1, 0.1, 0, 0.05, 1, 0, 6e-4, 3e-4))),
        AWAY,
    ),
    "fisheye": (bent(0.15), AWAY),
    "mirrored borders": (lambda p: torch.nn.functional.pad(scaled(usual(p)), (90, 90, 0, 0), mode="reflect"), AWAY),
    "repeated borders": (lambda p: torch.nn.functional.pad(scaled(usual(p)), (50, 50, 0, 0), mode="replicate"), AWAY),
    "halves swapped": (lambda p: scaled(usual(p)).roll(112, -1), AWAY),
    "gamma 2.2": (lambda p: tensor(usual(p)) ** 2.2, AWAY),
    "gamma 2": (lambda p: tensor(usual(p)) ** 2, AWAY),  # rising and falling ramps deviate by as much
    "gamma 1.2": (lambda p: tensor(usual(p)) ** 1.2, AWAY),
    "four levels": (lambda p: tensor(ImageOps.posterize(usual(p), 2)), AWAY),
    "contrast that clips": (lambda p: tensor(ImageEnhance.Contrast(usual(p)).enhance(3)), AWAY),
    "contrast": (lambda p: tensor(ImageEnhance.Contrast(usual(p)).enhance(1.2)), CONTENT),
    "scaled by its maximum": (lambda p: tensor(usual(p)) / tensor(usual(p)).amax().clamp(min=1e-3), CONTENT),
    "autocontrast after a crop": (lambda p: tensor(ImageOps.autocontrast(usual(p))), CONTENT),
    "a crop around what is bright": (lambda p: tensor(p.crop(p.getbbox()).resize((224, 224))), CONTENT),
    "standardized": (lambda p: standardized(tensor(usual(p)), 0), INFINITE),
    "standardized with an epsilon": (lambda p: standardized(tensor(usual(p)), 1e-6), SAME),
    "less its mean": (lambda p: tensor(usual(p)) - tensor(usual(p)).mean(), SAME),
    "constant": (lambda p: torch.zeros(3, 8, 8), SAME),
    "NaN": (lambda p: scaled(usual(p)) * torch.nan, INFINITE),
    "logarithm": (lambda p: tensor(usual(p)).log(), INFINITE),
    "a random flip by torch": (by_chance(lambda: float(torch.rand(())), lambda x: x.flip(-1)), RANDOM),
    "a random flip by numpy": (by_chance(lambda: np.random.rand(), lambda x: x.flip(-1)), RANDOM),  # noqa: NPY002
    "a random flip by python": (by_chance(random.random, lambda x: x.flip(-1)), RANDOM),
    "a random crop": (lambda p: shifted(scaled(usual(p)))[..., 40:], RANDOM),
    "noise": (lambda p: scaled(usual(p)) + 0.01 * torch.randn(3, 224, 224), RANDOM),
    "it raises": (lambda p: 1 / 0, "on a plain picture it fails with division by zero"),
    "a vector": (lambda p: torch.zeros(5), r"its output has shape \(5,\), which is not \(channels, h, w\)"),
    "five crops": (lambda p: torch.stack([scaled(usual(p))] * 5), r"its output has shape \(5, 3, 224, 224\)"),
    "a shape by content": (
        lambda p: tensor(p)[:, : 100 + round(float(tensor(p).mean()) * 50)],
        r"two pictures of one size give inputs of shapes \(3, 100, 500\) and \(3, 150, 500\)",
    ),
    "edges": (lambda p: tensor(usual(p)).diff(), SAME),
    "a column": (lambda p: tensor(p)[..., 100:101], FEW),
    "a row": (lambda p: tensor(p)[:, 100:101], FEW),
    "a column repeated": (lambda p: tensor(p)[..., 100:101].expand(-1, -1, 96), "its output is constant along an axis"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_be_undone_is_an_error_of_one_sentence_and_leaves_no_trace(name):
    preprocess, words = NEVER[name]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()  # noqa: NPY002
    with pytest.raises(CamError, match=rf"^the preprocessing cannot be undone: {words}") as caught:
        view_of(preprocess, LANDSCAPE)
    assert "\n" not in str(caught.value)
    after = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][0], after[1][0])
    assert (before[1][1], before[2]) == (after[1][1], after[2])


# ----------------------------------------------------------------------------------------------- photos of many sizes


def check_alike(view: View | None, wanted: View) -> None:
    """The corners of two views lie within half a cell of each other."""
    assert view is not None
    assert (view.size, view.photo) == (wanted.size, wanted.photo)
    corners = np.array([[0, 0], [view.size[0], 0], [0, view.size[1]], view.size])
    cell = max(1.0, float(np.linalg.norm(np.asarray(wanted.matrix)[:, :2], axis=0).max()))
    assert np.linalg.norm(view.to_photo(corners) - wanted.to_photo(corners), axis=-1).max() <= cell / 2


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_views_of_photos_of_many_sizes_are_those_of_each(name):
    preprocess, sizes = PREPROCESSINGS[name]
    views, sizes = Views(preprocess), [*sizes, (227, 391)]
    for size in sizes:
        check_alike(views(size), view_of(preprocess, size))
    again = Views(preprocess)
    assert {size: again(size) for size in reversed(sizes)} == {size: views(size) for size in sizes}, "their order tells"


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_be_undone_has_no_views(name):
    preprocess, _ = NEVER[name]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate()
    views = Views(preprocess)
    assert [views(size) for size in (LANDSCAPE, PORTRAIT, LANDSCAPE)] == [None] * 3
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def floored(picture: Image.Image) -> torch.Tensor:
    """Colors rounded down, so that all positions look as if they lay further left and up."""
    return (tensor(usual(picture)) * 254.9).floor() / 255


def by_size(change: Callable) -> Callable:
    """The usual preprocessing, and a change of its output for photos that are wider than 400 pixels."""
    return lambda p: change(scaled(usual(p))) if p.width > 400 else scaled(usual(p))


CHANGES = {
    "mirrored": by_size(lambda x: x.flip(-1)),
    "other channels": by_size(lambda x: x.flip(0)),
    "one channel": by_size(lambda x: x[:1]),
    "brighter": by_size(lambda x: x + 0.1),
    "more contrast": by_size(lambda x: x * 1.5),
    "padding in black": by_size(lambda x: torch.nn.functional.pad(x, (20, 20), value=-2.0)),
    "padding in gray": by_size(lambda x: torch.cat([scaled(Image.new("RGB", (50, 224), (128, 128, 128))), x], -1)),
    "padding that mirrors": by_size(lambda x: torch.nn.functional.pad(x, (90, 90), mode="reflect")),
    "a tenth of it": by_size(lambda x: x[..., 100:124, 60:82]),
    "a curve": by_size(lambda x: x**2),
    "an error": by_size(lambda x: 1 / 0),
    "random numbers": by_size(lambda x: x.flip(-1) if torch.rand(()) < 0.5 else x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_preprocessing_does_to_photos_of_another_shape_is_seen(name):
    views = Views(CHANGES[name])
    for size in (PORTRAIT, LANDSCAPE, (410, 500), SQUARE):
        try:
            wanted = view_of(CHANGES[name], size)
        except CamError:
            assert views(size) is None
        else:
            check_alike(views(size), wanted)


@pytest.mark.parametrize("preprocess", [lambda p: scaled(usual(p)), lambda p: 1 - 2 * tensor(usual(p)), floored])
def test_one_picture_tells_the_view_of_a_size(preprocess):
    runs = []
    views = Views(lambda p: (runs.append(p.size), preprocess(p))[1])
    views((30, 20))
    del runs[:]
    sizes = [PORTRAIT, SQUARE, ODD, (500, 380), (640, 250)]  # the last is cropped to less than half: a second, steeper ramp
    for size in [*sizes, *sizes]:
        check_alike(views(size), view_of(preprocess, size))
    assert runs == [*sizes, sizes[-1]]


# ------------------------------------------------------------------------------------------------------------ the view


def test_random_numbers_that_change_nothing_are_no_error_and_leave_no_trace():
    """As albumentations draws a number for each transform, also where its probability is one."""

    def preprocess(picture):
        drawn = float(torch.rand(())) + np.random.rand() + random.random()  # noqa: NPY002
        return scaled(usual(picture)) + 0 * drawn

    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    found = view_of(preprocess, LANDSCAPE)
    assert (float(torch.rand(())), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert found == view_of(lambda p: scaled(usual(p)), LANDSCAPE)


def test_what_no_array_can_be_made_of_is_named():
    for made, words in (
        (None, "what preprocess returns must be a tensor or an array; found NoneType"),
        ({"image": 1}, "preprocess returns a mapping of 'image', and no 'pixel_values'"),
    ):
        with pytest.raises(CamError, match=f"^{words}$"):
            view_of(lambda p, made=made: made, LANDSCAPE)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_a_photo_of_one_pixel_a_side_tells_no_places(size):
    said = f"^the preprocessing cannot be undone: a photo of {size[0]} x {size[1]} pixels is too small to tell places$"
    with pytest.raises(CamError, match=said):
        view_of(lambda p: scaled(p.resize((32, 32))), size)


@pytest.mark.parametrize("size", [(2, 2), (5, 4), (2, 9)])
def test_a_photo_of_a_few_pixels_is_found_to_a_tenth_of_a_pixel(size):
    """Between the outermost centers: an enlarged photo is constant beyond them, and tells no places there."""
    view = view_of(lambda p: scaled(p.resize((224, 160), BILINEAR)), size)
    for x, y in ((0, 0), (224, 160)):
        assert np.abs(view.to_photo(np.array([x, y])) - np.array([x / 224, y / 160]) * size).max() < 0.1


def test_a_crop_of_a_very_narrow_photo_is_found_to_a_pixel():
    """Fewer than two of 256 levels lie in what is seen."""
    view = view_of(lambda p: scaled(p.crop((12_000, 3, 12_096, 83))), (20_000, 90))
    assert np.abs(view.to_photo(np.array([[0.0, 0.0], [96, 80]])) - [[12_000, 3], [12_096, 83]]).max() < 0.3


def test_a_narrow_photo_that_would_become_a_giant_is_refused_before_it_is_one():
    sizes = []

    def preprocess(picture):
        sizes.append(picture.size)
        return scaled(by_shorter_side(picture, 224))

    with pytest.raises(CamError, match=r"preprocess would make an input of .* crop or pad the picture first"):
        view_of(preprocess, (2, 20_000))
    assert max(map(max, sizes)) < 1000


def test_a_size_may_be_a_list_and_floats_are_whole():
    assert view_of(lambda p: scaled(usual(p)), [500, 375]).photo == LANDSCAPE


# ---------------------------------------------------------------------------------------------------------- a view


def test_a_view_maps_points_there_and_back():
    view = View(((1.5, -0.5, 10.0), (0.25, 2.0, -7.0)), (224, 160), (300, 200))
    points = np.random.default_rng(0).uniform(0, 100, (3, 4, 2))
    x, y = points[..., 0], points[..., 1]
    expected = np.stack([1.5 * x - 0.5 * y + 10, 0.25 * x + 2 * y - 7], -1)
    assert np.allclose(view.to_photo(points), expected, rtol=0, atol=1e-12)
    assert np.allclose(view.to_input(expected), points, rtol=0, atol=1e-12)


def sampled(view: View, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A loop over the photo's pixels: where each lies on the map, and what four cells around say."""
    (a, b, c), (d, e, f) = view.matrix
    found, shown = np.empty(view.photo[::-1]), np.empty(view.photo[::-1], bool)
    rows, columns = values.shape
    for j in range(view.photo[1]):
        for i in range(view.photo[0]):
            x, y = np.linalg.solve([[a, b], [d, e]], [i + 0.5 - c, j + 0.5 - f])
            shown[j, i] = -0.4 <= x <= view.size[0] + 0.4 and -0.4 <= y <= view.size[1] + 0.4
            u = min(max(x / view.size[0] * columns - 0.5, 0), columns - 1)
            v = min(max(y / view.size[1] * rows - 0.5, 0), rows - 1)
            left, top = min(int(u), max(columns - 2, 0)), min(int(v), max(rows - 2, 0))
            right, bottom, s, t = min(left + 1, columns - 1), min(top + 1, rows - 1), u - left, v - top
            found[j, i] = (1 - t) * ((1 - s) * values[top, left] + s * values[top, right]) + t * (
                (1 - s) * values[bottom, left] + s * values[bottom, right]
            )
    return found, shown


VIEWS = {
    "whole": whole((40, 30), (53, 31)),
    "a crop": View(((0.7, 0.0, 8.2), (0.0, 0.7, 3.3)), (40, 30), (53, 31)),
    "padding": View(((1.5, 0.0, -4.0), (0.0, 1.5, -6.0)), (40, 30), (53, 31)),
    "turned": View(((0.8, -0.3, 14.0), (0.3, 0.8, -1.0)), (40, 30), (53, 31)),
    "a quarter turn": View(((0.0, 53 / 30, 0.0), (-31 / 40, 0.0, 31.0)), (40, 30), (53, 31)),
    "a line": View(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), (9, 1), (9, 1)),
}


@pytest.mark.parametrize("grid", [(4, 6), (30, 40), (1, 1), (1, 3)])
@pytest.mark.parametrize("name", VIEWS)
def test_a_map_is_laid_over_the_photo_bilinearly_whatever_its_resolution(name, grid):
    values = np.random.default_rng(1).random(grid)
    laid, shown = VIEWS[name].on_photo(torch.from_numpy(values))
    expected, inside = sampled(VIEWS[name], values)
    assert np.array_equal(shown.numpy(), inside)
    assert np.abs(laid.numpy() - expected).max() < 1e-12


def test_a_photo_in_parts_is_the_photo_at_once(monkeypatch):
    values, view = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)), VIEWS["turned"]
    laid, shown = view.on_photo(values)
    monkeypatch.setattr("camfn.images.views._PIXELS", 53 * 7)
    parts = view.on_photo(values)
    assert torch.equal(parts[0], laid)
    assert torch.equal(parts[1], shown)


@pytest.mark.parametrize(
    ("name", "size"),
    [("squash", LANDSCAPE), ("squash", TINY), ("as it is", ODD), ("enlarged", TINY), ("letterbox in black", ODD)],
)
def test_all_of_a_photo_that_is_not_cropped_is_shown(name, size):
    """No line of pixels at the border is lost by the error of the fit."""
    assert view_of(PREPROCESSINGS[name][0], size).on_photo(torch.zeros(1, 1))[1].all()


@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270])
@pytest.mark.parametrize("size", [LANDSCAPE, ODD, TINY, (1501, 1001)])
def test_all_of_a_turned_photo_is_shown(turn, size):
    view = view_of(lambda p: scaled(p.transpose(turn).resize((112, 96), BILINEAR)), size)
    assert view.on_photo(torch.zeros(1, 1))[1].all()


def test_what_was_cropped_away_is_not_shown():
    _, shown = view_of(lambda p: tensor(p.crop((90, 110, 190, 210))), PORTRAIT).on_photo(torch.zeros(1, 1))
    rows, columns = np.nonzero(shown.numpy())
    assert shown.sum() == (columns.max() - columns.min() + 1) * (rows.max() - rows.min() + 1)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(found - [90, 110, 190, 210]).max() <= 1


def test_a_phones_photo_that_its_tag_turns_comes_back_upright(tmp_path):
    upright, at = (300, 400), (210, 130)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by a quarter clockwise to show"
    photo(upright, at, 9).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    read = images.read(tmp_path / "phone.png")
    assert read.size == upright
    view, x = view_of(lambda p: scaled(usual(p)), read.size), scaled(usual(read))
    spot = (x.sum(0) - x.sum(0).min()).numpy()
    assert np.linalg.norm(view.to_photo(center_of(spot)) - np.array(at) - 0.5) <= 1.4  # a cell
    row, column = np.unravel_index(int(view.on_photo(torch.from_numpy(spot))[0].argmax()), upright[::-1])
    assert np.hypot(column - at[0], row - at[1]) <= 9
