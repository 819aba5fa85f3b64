"""Procedural scenes: shapes of known class and place on a textured ground.

A scene is a function of its seed; its size only sets the resolution. Color, texture, size, place and rotation are drawn before
the classes, and are independent of them. All shapes of the same size have the same area.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._errors import CamError, suggested

Array = np.ndarray
SIDE = 96
"""The default side of a scene in pixels, on which the network was trained."""


class Scene(NamedTuple):
    """A picture with the masks and classes of its objects."""

    image: Float[Tensor, "3 h w"]  # RGB, in [0, 1]
    masks: Bool[Tensor, "k h w"]  # the visible pixels of each object
    classes: tuple[int, ...]  # indices into `CLASSES`, one per object, all different


# ------------------------------------------------------------------------------------------------------------- shapes


def _polygon(corners: int) -> Callable[[Array, Array], Array]:
    """Return the indicator of a regular polygon, the intersection of half-planes."""
    normals = [2 * math.pi * side / corners + math.pi / 2 for side in range(corners)]
    return lambda x, y: np.max([x * math.cos(a) + y * math.sin(a) for a in normals], 0) < 0.5


def _star(x: Array, y: Array) -> Array:
    """Return the indicator of a star with five points. By symmetry, only half a point is tested."""
    half, notch = math.pi / 5, 0.5
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return (1 - along) * notch * math.sin(half) > across * (1 - notch * math.cos(half))


def _ring(x: Array, y: Array) -> Array:
    return (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.55)


def _cross(x: Array, y: Array) -> Array:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (near < 0.3) & (far < 0.95)


def _crescent(x: Array, y: Array) -> Array:
    return (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y) > 0.7)


def _heart(x: Array, y: Array) -> Array:
    x, y = 1.25 * x, 0.15 - 1.25 * y
    return (x**2 + y**2 - 1) ** 3 < x**2 * y**3


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: np.hypot(x, y) < 1,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
}
CLASSES = tuple(_SHAPES)
"""The names of the classes, by index."""
_BAR = "bar"
"""The shape of a distractor, which is of no class."""
_FORMS = {**_SHAPES, _BAR: lambda x, y: (np.abs(x) < 0.95) & (np.abs(y) < 0.3)}
REACH = 1.7
"""The maximal distance of any point of a shape of size 1 from its center."""


@functools.cache
def _measure(name: str) -> tuple[float, float, float]:
    """Return the scale that gives a shape the area of a disc of radius 1, and its center of mass."""
    y, x = np.mgrid[-1:1:801j, -1:1:801j]
    inside = _FORMS[name](x, y)
    return math.sqrt(inside.mean() * 4 / math.pi), float(x[inside].mean()), float(y[inside].mean())


class Place(NamedTuple):
    """The center of mass, size and rotation of an object, in units of the picture's shorter side."""

    x: float
    y: float
    size: float  # the radius of the disc of the same area
    turn: float  # in radians


def _inside(name: str, place: Place, x: Array, y: Array) -> Array:
    scale, x0, y0 = _measure(name)
    x, y = (x - place.x) / place.size * scale, (y - place.y) / place.size * scale
    cos, sin = math.cos(place.turn), math.sin(place.turn)
    return _FORMS[name](x * cos + y * sin + x0, y * cos - x * sin + y0)


# ----------------------------------------------------------------------------------------------------------- textures


def _waves(x: Array, y: Array, random: Array) -> Array:
    return 0.5 + 0.5 * np.sin(_phase(x, y, random))


def _checks(x: Array, y: Array, random: Array) -> Array:
    return (np.sin(_phase(x, y, random)) * np.sin(_phase(y, -x, random)) > 0).astype(x.dtype)


def _dots(x: Array, y: Array, random: Array) -> Array:
    return (np.cos(_phase(x, y, random)) + np.cos(_phase(y, -x, random)) > 0.6).astype(x.dtype)


def _clouds(x: Array, y: Array, random: Array) -> Array:
    """Return the sum of a few long waves in random directions."""
    waves = [np.sin(2 * math.pi * (8 * (a - 0.5) * x + 8 * (b - 0.5) * y + c)) for a, b, c in random.reshape(-1, 3)]
    return 0.5 + 0.5 * np.tanh(np.sum(waves, 0) / math.sqrt(len(waves)))


def _phase(x: Array, y: Array, random: Array) -> Array:
    """Return the phase of a wave in a random direction, with 9 to 16 periods per side of the picture."""
    turn, per_side = math.pi * random[0], 9 + 7 * random[1]
    return 2 * math.pi * (per_side * (x * math.cos(turn) + y * math.sin(turn)) + random[2])


_TEXTURES = (_waves, _checks, _dots, _clouds)


class Paint(NamedTuple):
    """A texture between two colors."""

    colors: Array  # (2, 3)
    texture: Callable[[Array, Array, Array], Array]
    random: Array  # (18,), the random parameters of the texture


def _paint(random: np.random.Generator, unlike: Array | None = None) -> Paint:
    """Draw a paint of two colors around a random color, at a distance from `unlike`."""
    base = random.random(3)
    while unlike is not None and np.abs(base - unlike).mean() < 0.35:
        base = random.random(3)
    apart = 0.3 * (random.random(3) - 0.5)
    texture = _TEXTURES[int(random.random() * len(_TEXTURES))]
    return Paint(np.stack([base - apart, base + apart]), texture, random.random(18))


def _paint_at(paint: Paint, x: Array, y: Array) -> Array:
    """Return the colors of a paint at these points, `(3, h, w)`."""
    one, other = paint.colors.astype(x.dtype)[..., None, None]
    return one + (other - one) * paint.texture(x, y, paint.random)


# ------------------------------------------------------------------------------------------------------------- scenes


def scene(seed: int, objects: int = 1, *, classes: Sequence[str] | None = None, size: int | tuple[int, int] = SIDE) -> Scene:
    """A scene of 1 to 3 objects of different classes.

    - `seed`: the same seed, number and classes give the same scene at every size, up to the width of a pixel.
    - `objects`: the number of objects.
    - `classes`: the names of the classes, one per object, instead of random ones. Nothing else in the scene changes.
    - `size`: the side or the (height, width), in pixels.

    **Raises** `CamError` if a class is unknown or given twice, or the number of objects or the size is out of range.

    >>> from camfn import demo
    >>> scene = demo.scene(0, classes=["star", "ring"])
    >>> scene.image.shape, scene.masks.shape, [demo.CLASSES[c] for c in scene.classes]
    (torch.Size([3, 96, 96]), torch.Size([2, 96, 96]), ['star', 'ring'])
    """
    plan = _planned(seed, objects, classes, size)
    return _render(plan.ground, plan.objects, *plan.size)


class _Plan(NamedTuple):
    """All that is drawn at random for a scene."""

    ground: Paint
    objects: list["_Object"]
    size: tuple[int, int]


def _planned(seed: int, objects: int, classes: Sequence[str] | None, size: int | tuple[int, int]) -> _Plan:
    names = None if classes is None else _check_classes(classes)
    count = objects if names is None else len(names)
    height, width = _check_size(size)
    if count not in (1, 2, 3):
        raise CamError(f"a scene has 1 to 3 objects, found {count!r}")
    random = np.random.default_rng(seed)
    ground = _paint(random)
    paints = [_paint(random, unlike=ground.colors.mean(0)) for _ in range(count)]
    places = _places(random, count, _sides(height, width))
    drawn = [CLASSES[i] for i in np.argsort(random.random(len(CLASSES)))[:count]]
    return _Plan(ground, [_Object(*of) for of in zip(names or drawn, paints, places)], (height, width))


def _sides(height: int, width: int) -> tuple[float, float]:
    """Return the sides of a picture in units of the shorter one."""
    return height / min(height, width), width / min(height, width)


class Interventions(NamedTuple):
    """A scene, and what it would be with objects removed, without its distractors one by one, and on other grounds.

    A set of removed objects has a number: bit j is 1 if object j is removed, and 0 is the whole picture.
    """

    image: Float[Tensor, "3 h w"]
    masks: Bool[Tensor, "k h w"]  # the visible pixels of each object
    classes: tuple[int, ...]
    distractors: Bool[Tensor, "m h w"]  # the visible pixels of each distractor, a bar of no class
    without: Float[Tensor, "subsets 3 h w"]  # the pictures of all 2**k sets of removed objects; the first is `image`
    undistracted: Float[Tensor, "m 3 h w"]  # without each distractor
    grounds: Float[Tensor, "g 3 h w"]  # on other grounds


def interventions(
    seed: int,
    objects: int = 2,
    *,
    classes: Sequence[str] | None = None,
    distractors: int = 0,
    grounds: int = 0,
    size: int | tuple[int, int] = SIDE,
) -> Interventions:
    """A scene with everything that removal metrics ask for: see `camfn.metrics.removal`.

    - `seed`, `objects`, `classes`, `size`: as for `scene`. Without distractors, the picture is that of `scene`.
    - `distractors`: the number of bars, which are of no class, beside the objects.
    - `grounds`: the number of other grounds. They are drawn unlike all objects.

    **Raises** `CamError` as `scene` does, or if a number is negative.

    >>> from camfn import demo
    >>> found = demo.interventions(3, classes=["star", "ring"], distractors=1)
    >>> found.without.shape, found.undistracted.shape
    (torch.Size([4, 3, 96, 96]), torch.Size([1, 3, 96, 96]))
    """
    if min(distractors, grounds) < 0:
        raise CamError(f"distractors={distractors!r} and grounds={grounds!r} must be 0 or more")
    plan = _planned(seed, objects, classes, size)
    bars, others = _bars(plan, seed, distractors), _other_grounds(plan, seed, grounds)

    def picture(ground: Paint = plan.ground, gone: int = 0, bar: int | None = None) -> Scene:
        kept = [one for j, one in enumerate(plan.objects) if not gone >> j & 1]
        return _render(ground, [one for j, one in enumerate(bars) if j != bar] + kept, *plan.size)

    whole, sets = picture(), [picture(gone=gone).image for gone in range(2 ** len(plan.objects))]
    return Interventions(
        *(whole.image, whole.masks[distractors:], whole.classes, whole.masks[:distractors], torch.stack(sets)),
        _stacked([picture(bar=bar).image for bar in range(distractors)], whole.image),
        _stacked([picture(ground).image for ground in others], whole.image),
    )


def _stacked(images: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(images) if images else like.new_empty(0, *like.shape)


def _bars(plan: _Plan, seed: int, count: int) -> list["_Object"]:
    """Draw distractors, as large as objects and beside them, in paints unlike the ground."""
    random = np.random.default_rng((seed, 1))
    paints = [_paint(random, unlike=plan.ground.colors.mean(0)) for _ in range(count)]
    places = _places(random, count, _sides(*plan.size), [one.place for one in plan.objects])
    return [_Object(_BAR, *of) for of in zip(paints, places)]


def _other_grounds(plan: _Plan, seed: int, count: int) -> list[Paint]:
    """Draw grounds: of some colors, that which is most unlike the objects, since a color far from all may not exist."""
    random = np.random.default_rng((seed, 2))
    objects = np.stack([one.paint.colors.mean(0) for one in plan.objects])
    drawn = [[_paint(random) for _ in range(8)] for _ in range(count)]
    return [max(some, key=lambda paint: np.abs(objects - paint.colors.mean(0)).mean(1).min()) for some in drawn]


def _check_classes(classes: Sequence[str]) -> list[str]:
    for name in classes:
        if name not in _SHAPES:
            raise CamError(f"no shape is called {name!r}{suggested(str(name), CLASSES)}; all: {', '.join(CLASSES)}")
    if len(set(classes)) < len(classes):
        raise CamError(f"the objects of a scene must have different classes; found {', '.join(classes)}")
    return list(classes)


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise CamError(f"size={size!r}: a scene must have at least one pixel on each side")
    return height, width


def _places(random: np.random.Generator, count: int, sides: tuple[float, float], taken: Sequence[Place] = ()) -> list[Place]:
    """Draw places that overlap neither each other nor those `taken`. The objects shrink until they fit.

    The picture's edge may cut off a far corner, since a wider margin would concentrate the objects in the middle.
    """
    sizes = 0.1 + 0.08 * random.random(count)
    turns = (random.random(count) - 0.5) * math.pi / 3
    while True:
        for _ in range(50):
            margin = 1.2 * sizes[:, None]
            centers = margin + random.random((count, 2)) * (np.array(sides) - 2 * margin)
            drawn = [Place(x, y, size, turn) for (y, x), size, turn in zip(centers, sizes, turns)]
            if all(_apart(one, other) for i, one in enumerate(drawn) for other in (*taken, *drawn[:i])):
                return drawn
        sizes = 0.9 * sizes


def _apart(one: Place, other: Place) -> bool:
    return np.hypot(one.y - other.y, one.x - other.x) > 1.3 * (one.size + other.size)


class _Object(NamedTuple):
    """A shape with its paint and its place."""

    name: str
    paint: Paint
    place: Place


_FINE = 2
"""Samples per pixel along each side, over which edges and textures are averaged."""


def _render(ground: Paint, objects: Sequence[_Object], height: int, width: int) -> Scene:
    step = 1 / (_FINE * min(height, width))
    x, y = ((np.arange(_FINE * side, dtype=np.float32) + 0.5) * step for side in (width, height))
    image = _paint_at(ground, x[None], y[:, None])
    owner = np.zeros(image.shape[1:], dtype=np.int64)  # 0 is the ground
    for number, (name, paint, place) in enumerate(objects, 1):
        rows, columns = (
            slice(*np.searchsorted(at, (c - REACH * place.size, c + REACH * place.size)))
            for at, c in ((y, place.y), (x, place.x))
        )
        near = x[columns][None], y[rows][:, None]
        inside = _inside(name, place, *near)
        image[:, rows, columns] = np.where(inside, _paint_at(paint, *near), image[:, rows, columns])
        owner[rows, columns][inside] = number
    masks = _pixels(owner == 1 + np.arange(len(objects))[:, None, None]) > 0.5
    classes = tuple(CLASSES.index(one.name) for one in objects if one.name != _BAR)
    return Scene(_pixels(image).clamp(0, 1), masks, classes)


def _pixels(fine: Array) -> Tensor:
    """Average the samples of each pixel, `(k, h, w)`."""
    return torch.nn.functional.avg_pool2d(torch.from_numpy(fine.astype(np.float32))[:, None], _FINE)[:, 0]
