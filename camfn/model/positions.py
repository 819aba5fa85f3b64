"""The positions of a layer, as forward passes show them: which of them follow a change of the input at the same place."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn._errors import RefusedError
from camfn.layouts import Form, view_of
from camfn.model.inputs import Batch, with_input
from camfn.model.memory import is_exhausted

Seen = dict[str, Tensor]
"""Activations by name."""

_MOST = 64
"""The most changed images."""


class _Look(NamedTuple):
    """How many images are changed, and what a form must reach."""

    values: int  # the least number of positions over all changed images: a grid of a few cells needs more images
    images: int  # the least number of changed images
    least: float  # the correlation that a form must exceed
    apart: float  # the least distance of the best form from the others


_FIRST, _SECOND = _Look(128, 1, 0.35, 0.25), _Look(2048, 8, 0.0, 0.15)
"""The first look tells nearly always. The second is for layers that the first leaves in doubt."""
_MARGIN = 0.15
"""How much better the positions must follow another order of the cells, at least, for a form to be none."""
_ORDERS, _SPREAD = 100, 4.0
"""The number of random orders of the cells, and how many of their standard deviations the true order must stand out."""
_SMALL, _STRONG = 8, 0.5
"""A grid of so few cells has few orders: there the correlation itself must be this high."""
_FOLLOWS, _EQUAL, _FEW = 0.9, 0.01, 8
"""The correlation, over the images, from which a token follows a cell, the difference of two that are as good, and the least
number of images to say so."""


class _Changes(NamedTuple):
    """The places at which each image differs from the first one."""

    images: Tensor  # (1 + d, k, *size)
    places: Tensor  # (d, 1, *size): 1 where the image is changed


def placed(run: Callable[[Batch], Seen], batch: Batch, forms: dict[str, list[Form]], twice: bool) -> dict[str, list[Form]]:
    """Keep the forms of each layer whose positions follow the input's.

    An image is changed in some of the cells of a form's grid. In the true form, the same cells change most: their change
    correlates with the image's. Positions that depend on all places alike, as learned queries do, correlate in no form.

    - `run(batch)`: the activations by name.
    - `forms`: for each layer, the forms to choose from.
    - `twice`: whether to look again, at more images, at layers that one look leaves in doubt. Without it, they get no form.

    Returns, for each layer, the form that fits best, no form if none fits, and all that fit if none is clearly the best.
    """
    known = {name: some for name, some in forms.items() if all(_has_axes(form, batch) for form in some)}
    found = forms | _looked(run, batch, known, _FIRST)
    doubtful = {name: some for name, some in known.items() if len(found[name]) != 1}
    if not twice:
        return found | {name: [] for name in doubtful}
    again = _looked(run, batch, doubtful, _SECOND)
    # A layer with the axes of an image is no list of queries: where all places count alike, its axes are open.
    return found | {
        name: fit if fit or any(form.tokens for form in forms[name]) else forms[name] for name, fit in again.items()
    }


def _has_axes(form: Form, batch: Batch) -> bool:
    """Whether the form's grid has the axes of the input, so that a place of the input is known for each position."""
    return batch.size is not None and len(form.grid) == len(batch.size)


def _looked(run: Callable[[Batch], Seen], batch: Batch, forms: dict[str, list[Form]], look: _Look) -> dict[str, list[Form]]:
    """The forms of each layer that fit, at this look."""
    by_grid: dict[tuple[int, ...], list[str]] = {}
    for name, some in forms.items():
        by_grid.setdefault(max((form.grid for form in some), key=math.prod), []).append(name)
    found: dict[str, list[Form]] = {}
    for grid, names in by_grid.items():
        changes = _changes(batch, grid, look)
        seen = _changed(run, batch, changes.images, names)
        for name in names:
            found[name] = _fitting(_agreements(forms[name], seen[name], changes, look.least), look)
    return found


def _changes(batch: Batch, grid: Sequence[int], look: _Look) -> _Changes:
    """Noise, and the same noise with some of the grid's cells changed."""
    count = min(_MOST, max(look.images, math.ceil(look.values / math.prod(grid))))
    size, generator = batch.image.shape[1:], torch.Generator().manual_seed(0)
    noise = torch.rand(1, *size, generator=generator, device="cpu")
    cells = torch.rand(count, 1, *grid, generator=generator, device="cpu")
    some = (cells.flatten(1) <= cells.flatten(1).quantile(0.3, 1, keepdim=True)).reshape(cells.shape).float()
    places = F.interpolate(some, tuple(size[1:]), mode="nearest")
    images = torch.cat([noise, torch.where(places > 0, 1 - noise, noise)])
    return _Changes(images.to(batch.image.device, batch.image.dtype), places)


def _changed(run: Callable[[Batch], Seen], batch: Batch, images: Tensor, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The activations of all images: in one batch, or, beside companion inputs, in batches of the batch's own size."""
    if batch.pixels.key is None:
        try:
            found = run(batch._replace(x=with_input(batch.x, batch.pixels, images), n=len(images)))
            return {name: [found[name]] for name in names}
        except Exception as error:  # a model for one number of images
            if is_exhausted(error) or isinstance(error, RefusedError):
                raise
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(images), batch.n):
        some = images[start : start + batch.n]
        padded = torch.cat([some, images[:1].expand(batch.n - len(some), *images.shape[1:])])
        found = run(batch._replace(x=with_input(batch.x, batch.pixels, padded)))
        for name in names:
            seen[name].append(found[name])
    return seen


def _agreements(forms: list[Form], seen: list[Tensor], changes: _Changes, least: float) -> dict[Form, float]:
    """The agreement of each of a layer's forms. Forms that differ in their grids alone have the same positions."""

    @functools.cache
    def moved(whole: Form) -> Tensor | None:
        values = torch.cat([view_of(whole, part) for part in seen])[: len(changes.images)].to(torch.float32)
        return (values[1:] - values[:1]).norm(dim=1).cpu() if len(values) == len(changes.images) else None

    wholes = {form: form._replace(name="", grid=(), prefix=0, suffix=0) for form in forms}
    return {form: _agreement(form, moved(wholes[form]), changes, least) for form in forms}


def _agreement(form: Form, moved: Tensor | None, changes: _Changes, least: float) -> float:
    """The correlation of the change at each position with the share of its cell that was changed.

    - `moved`: how far each position and token `(images, tokens)` moved; `None` for a layer with one value for all images, as
      an embedding of positions has.

    It is 0 if tokens outside the grid follow its cells through the images, since they belong to a grid themselves; and if the
    positions follow the cells in another order than that of rows, or no better than in a random one. Some images and some
    positions change more than others: with several images, this is taken out.
    """
    if moved is None or moved.shape[1] != math.prod(form.grid) + form.prefix + form.suffix:
        return 0.0
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(form.grid)]
    cells = pool(changes.places, form.grid).flatten(1)
    inside = slice(form.prefix, moved.shape[1] - form.suffix)
    own, others = moved[:, inside], torch.cat([moved[:, : inside.start], moved[:, inside.stop :]], 1)
    if len(cells) >= _FEW and _follow(others, own, cells):
        return 0.0
    own, cells = _centered(own), _centered(cells)
    found, *rivals = _correlations(own, cells, _usual_orders(form.grid)).tolist()
    return found if found >= least and max(rivals) - found < _MARGIN and _stands_out(found, own, cells) else 0.0


def _correlations(own: Tensor, cells: Tensor, orders: Tensor) -> Tensor:
    """The correlation of the positions' changes with those of the cells, in each of these orders `(r, p)`."""
    ordered = cells[:, orders].transpose(1, 2).flatten(0, 1)
    return (_standard(own.flatten()[:, None]).mT @ _standard(ordered))[0]


def _stands_out(found: float, own: Tensor, cells: Tensor) -> bool:
    """Whether the correlation is more than chance: more than in random orders of the cells."""
    if cells.shape[1] <= _SMALL:
        return found >= _STRONG
    chance = _correlations(own, cells, _random_orders(cells.shape[1]))
    return found - float(chance.mean()) >= _SPREAD * float(chance.std())


@functools.lru_cache(64)
def _random_orders(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(count, generator=generator, device="cpu") for _ in range(_ORDERS)])


@functools.lru_cache(64)
def _usual_orders(grid: tuple[int, ...]) -> Tensor:
    """The cells of a grid in the orders of layers: that of rows first, then that of other axes, and window by window.

    Some cells keep their place in the other orders, so that rows correlate with them.
    """
    cells, axes = torch.arange(math.prod(grid), device="cpu").reshape(grid), range(len(grid))
    orders = [cells.permute(order).flatten() for order in itertools.permutations(axes)]
    for window in itertools.product(*([side for side in range(1, most + 1) if most % side == 0] for most in grid)):
        apart = [side for most, each in zip(grid, window) for side in (most // each, each)]
        inside = [2 * axis + 1 for axis in axes]
        orders.append(cells.reshape(apart).permute(*(2 * axis for axis in axes), *inside).flatten())
    return torch.stack(orders)


def _follow(others: Tensor, own: Tensor, cells: Tensor) -> bool:
    """Whether tokens follow two cells or more as well as the positions of the form there. A class token may attend to one."""
    mine = (_standard(own) * _standard(cells)).sum(0)
    followed = (_standard(others).mT @ _standard(cells) > (mine - _EQUAL).clamp(min=_FOLLOWS)).any(0)
    return int(followed.sum()) > 1


def _standard(values: Tensor) -> Tensor:
    """Columns without their mean, of length 1: their products are correlations."""
    return F.normalize(values - values.mean(0), dim=0)


def _centered(values: Tensor) -> Tensor:
    """Values `(images, positions)` without the means of each image and each position."""
    if len(values) < _FEW:
        return values
    return values - values.mean(0) - values.mean(1, keepdim=True) + values.mean()


def _fitting(scores: dict[Form, float], look: _Look) -> list[Form]:
    """The forms whose correlation is high enough: the best one alone if it is far enough from the others."""
    best = max(scores.values())
    return [form for form, score in scores.items() if score > look.least and best - score < look.apart]
