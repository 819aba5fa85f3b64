"""The pictures of a card: taken before preprocessing, checked against the inputs, and drawn with the maps."""

import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from camfn import figures, images
from camfn._errors import CamError
from camfn.explanation.fields import Fields, Picture, class_name, has_targets, label, map_of
from camfn.formulas.diagnostics import Finding
from camfn.images import View, pixels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

Preprocess = Callable[[Any], Any]
_SAME = 0.02
"""How far an input may be from the preprocessed picture, as a share of its range, to be made of it: for narrow dtypes."""
WIDTH = 6
"""The most panels side by side in a figure."""
_PAGE, _LARGEST = 9.0, 3.0
"""The width of a figure, and the largest width of a panel, in inches."""
_THUMBNAIL = 720
"""The longer side of a photo in a figure, in pixels."""


# --------------------------------------------------------------------------------------------------------- taken


def taken(given: Any, x: Tensor, preprocess: Preprocess | None) -> tuple[tuple[Picture, ...], tuple[Finding, ...]]:
    """Pair pictures with the inputs that were made of them.

    - `given`: a picture for each input: a PIL image, an array or tensor, or a path. One input can have a bare picture.
    - `x`: the inputs, `(n, c, h, w)`.
    - `preprocess`: the function from a PIL image to an input. Without it, a picture must have the proportions of its input.

    **Returns** the pictures with their views, and findings about those whose preprocessing cannot be undone.

    **Raises** `CamError` if the number of pictures is wrong, or a picture is not the one that its input was made of.
    """
    some = list(given) if isinstance(given, (list, tuple)) else [given]
    if x.ndim != 4:
        raise CamError(f"images= needs inputs with two spatial axes, and these have {x.ndim - 2}")
    if len(some) != len(x):
        raise CamError(f"images has {len(some)} picture{'s' * (len(some) != 1)}, and x has {len(x)} input{'s' * (len(x) != 1)}")
    views: dict[Any, View | CamError] = {}  # by size and turn
    found = [_picture(f"images[{i}]", image, x[i], preprocess, views) for i, image in enumerate(some)]
    return tuple(picture for picture, _ in found), tuple(finding for _, finding in found if finding)


def _picture(
    name: str, image: Any, x: Tensor, preprocess: Preprocess | None, views: dict[Any, View | CamError]
) -> tuple[Picture, Finding | None]:
    """One picture with its view. `views` has the views of pictures so far, by size and turn."""
    file = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
    upright, turn = images.upright(image)
    size, shape = upright.size, (x.shape[-1], x.shape[-2])
    if preprocess is None:
        _check_proportions(name, size, shape)
        return Picture(upright, images.whole(shape, size), file), None
    run, made = _run_of(upright, turn, x, preprocess)
    if run is None:
        raise CamError(f"{name} is not the picture of its input: preprocess makes another input of it, or draws random numbers")
    if (size, made) not in views:
        views[size, made] = view_or_error(run, size)
    view = views[size, made]
    if isinstance(view, View):
        return Picture(upright, view, file), None
    return _as_seen(x, run, size, file, str(view))


def unplaced(why: object) -> str:
    """The sentence about a picture whose place on the photo is not known."""
    return f"the picture is the one that the network saw, and not the photo: {why}"


def _run_of(upright: "Image", turn: int | None, x: Tensor, preprocess: Preprocess) -> tuple[Preprocess | None, Any]:
    """The preprocessing that makes an input `(c, h, w)` of an upright picture, and how it differs from the given one.

    The given one may have seen the picture as it was stored, before its EXIF tag turned it, and may put the channels last.
    """
    for how in itertools.product(dict.fromkeys((None, turn)), (False, True)):
        run = _channels_first(images.turned(preprocess, how[0]), how[1])
        with images.random_states_kept():
            made, mine = run(upright).detach().cpu().double(), x.detach().cpu().double()
        if made.shape == mine.shape and bool((made - mine).abs().max() <= _SAME * (mine.max() - mine.min())):
            return run, how
    return None, None


def _channels_first(preprocess: Preprocess, last: bool) -> Preprocess:
    def run(picture: Any) -> Tensor:
        found = pixels_of(preprocess, picture)
        return found.movedim(-1, 0) if last else found

    return run


def view_or_error(preprocess: Preprocess, size: tuple[int, int]) -> View | CamError:
    """Where an input lies on its photo, or why that cannot be found."""
    try:
        return images.view_of(preprocess, size)
    except CamError as error:
        return error


def _as_seen(x: Tensor, preprocess: Preprocess, size: tuple[int, int], file: str, why: str) -> tuple[Picture, Finding]:
    """The picture that the network saw, where its place on the photo is not known."""
    seen, _ = images.as_seen(x, preprocess, size)
    image = images.image_of(seen)
    finding = Finding("no view", "", 1.0, unplaced(why))
    return Picture(image, images.whole(image.size, image.size), file), finding


def _check_proportions(name: str, size: tuple[int, int], shape: tuple[int, int]) -> None:
    (width, height), (columns, rows) = size, shape
    if abs(width * rows / height - columns) > 1 and abs(height * columns / width - rows) > 1:
        raise CamError(
            f"{name} has {width} x {height} pixels, and its input {columns} x {rows}, of other proportions: pass preprocess=, "
            "the function that made the input of the picture, to find where the input lies on it"
        )


# --------------------------------------------------------------------------------------------------------- drawn


def overlay(card: Fields, image: int, target: int, layer: int, **how: Any) -> "Image":
    """Draw one map over its picture, at the picture's size."""
    map, picture = scaled(card, map_of(card, image, target, layer)), picture_of(card, image)
    return images.overlay(picture.image, map, view=picture.view, **how)


def picture_of(card: Fields, image: int) -> Picture:
    """The picture of an input. Raises `CamError` if the card has none."""
    if not card.pictures:
        raise CamError("the card has no pictures: pass images= to camfn.explain, or explain photos by camfn.open(SPEC).explain")
    return card.pictures[image]


def scaled(card: Fields, map: Tensor) -> Tensor:
    """A map for drawing: a normalized one as it is, a raw one divided by its largest absolute value. NaN is drawn as 0."""
    if map.ndim != 2:
        raise CamError(f"a map with {map.ndim} axes cannot be drawn on a picture: take its frames or slices one by one")
    values = map.detach().cpu().float().nan_to_num(0, 0, 0)
    most = float(values.abs().max())
    return values if card.settings.get("normalize", True) or not most else values / most


def figure(card: Fields, **how: Any) -> "Figure":
    """Draw each photo with the maps of its targets beside it: an image in each row, or wrapped after six panels."""
    rows = [_panels(card, image) for image in range(len(card.scores))]
    width = min(WIDTH, max(map(len, rows)))
    lines = [line for row in rows for line in figures.lines(row, width)]
    title = f"{card.method}{' at ' + ', '.join(card.layers) if card.layers else ''}"
    return figures.figure(lines, title=title, side=min(_LARGEST, _PAGE / width), **how)


def _panels(card: Fields, image: int) -> list[figures.Panel]:
    picture = reduced(picture_of(card, image), _THUMBNAIL)
    first = figures.Panel(picture.image, caption=os.path.basename(picture.name))
    return [first, *(_panel(card, picture, image, target, layer) for target, layer in parts(card))]


def parts(card: Fields) -> list[tuple[int, int]]:
    """The target and layer of each map of an image."""
    layers = len(card.maps) if isinstance(card.maps, tuple) else 1
    targets = card.scores.shape[1] if has_targets(card) else 1
    return [(target, layer) for target in range(targets) for layer in range(layers)]


def _panel(card: Fields, picture: Picture, image: int, target: int, layer: int) -> figures.Panel:
    map = scaled(card, map_of(card, image, target, layer))
    return figures.Panel(picture.image, map, caption=caption(card, image, target, layer), view=picture.view)


def caption(card: Fields, image: int, target: int, layer: int) -> str:
    """The class of a map, its target and score, and the layer of one of several, on a line each."""
    several = isinstance(card.maps, tuple) and len(card.maps) > 1
    lines = [class_name(card, image, target), label(card, image, target), card.layers[layer] if several else ""]
    return "\n".join(line for line in lines if line)


def reduced(picture: Picture, side: int) -> Picture:
    """Shrink a picture whose longer side is above `side`."""
    factor = side / max(picture.image.size)
    return picture if factor >= 1 else resized(picture, factor)


def resized(picture: Picture, factor: float) -> Picture:
    """Scale a picture, and its view with it."""
    width, height = (max(1, round(length * factor)) for length in picture.image.size)
    return picture._replace(image=picture.image.resize((width, height)), view=picture.view.resized((width, height)))
