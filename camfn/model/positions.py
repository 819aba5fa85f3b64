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

_FIRST, _MORE, _MOST = 128, 2048, 64
"""The least number of positions over all changed images: in the first look, which tells nearly always, and in the second. The
most changed images: a grid of a few cells needs more of them than a fine one."""
_CLEAR, _APART, _MARGIN = 0.35, 0.25, 0.15
"""The correlation from which a form is taken at the first look, and its least distance from that of other forms, at the first
and at the second look. Another order of the cells must be better by as much for the form to be none."""
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
    clear, doubtful = _looked(run, batch, forms, _FIRST)
    return clear | (_looked(run, batch, doubtful, _MORE)[0] if twice else {name: [] for name in doubtful})


def _looked(
    run: Callable[[Batch], Seen], batch: Batch, forms: dict[str, list[Form]], values: int
) -> tuple[dict[str, list[Form]], dict[str, list[Form]]]:
    """Look at the layers: those that are clear, with their forms, and those that are not. The second look leaves no doubt."""
    by_grid: dict[tuple[int, ...], dict[str, list[Form]]] = {}
    for name, some in forms.items():
        finest = max((form.grid for form in some), key=math.prod)
        by_grid.setdefault(finest, {})[name] = some
    clear, doubtful = {}, {}
    for grid, layers in by_grid.items():
        if batch.size is None or any(len(form.grid) != len(batch.size) for some in layers.values() for form in some):
            clear |= layers  # no place of the input is known for their positions
            continue
        changes = _changes(batch, grid, values)
        seen = _changed(run, batch, changes.images, list(layers))
        for name, some in layers.items():
            scores = {form: _agreement(form, seen[name], changes, 0.0 if values == _MORE else _CLEAR) for form in some}
            if values == _MORE:
                fit = _fitting(scores, 0.0, _MARGIN)
                # A layer with the axes of an image is no list of queries: where all places count alike, its axes are open.
                clear[name] = fit if fit or any(form.tokens for form in some) else some
            elif found := _fitting(scores, _CLEAR, _APART):
                clear[name] = found
            if name not in clear or len(clear[name]) > 1:
                doubtful[name] = some
    return clear, doubtful


def _changes(batch: Batch, grid: Sequence[int], values: int) -> _Changes:
    """Noise, and the same noise with some of the grid's cells changed."""
    count = min(_MOST, max(1 if values == _FIRST else 8, math.ceil(values / math.prod(grid))))
    size, generator = batch.image.shape[1:], torch.Generator().manual_seed(0)
    noise = torch.rand(1, *size, generator=generator)
    cells = torch.rand(count, 1, *grid, generator=generator)
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


def _agreement(form: Form, seen: list[Tensor], changes: _Changes, least: float) -> float:
    """The correlation of the change at each position with the share of its cell that was changed.

    It is 0 if tokens outside the grid follow its cells through the images, since they belong to a grid themselves; and if the
    positions follow the cells in another order than that of rows, or no better than in a random one. Some images and some
    positions change more than others: with several images, this is taken out.
    """
    whole = form._replace(prefix=0, suffix=0)
    values = torch.cat([view_of(whole, part) for part in seen])[: len(changes.images)].to(torch.float32)
    tokens = math.prod(form.grid) + form.prefix + form.suffix
    if len(values) < len(changes.images) or values.shape[2] != tokens:
        return 0.0  # the layer gives one value for all images, as an embedding of positions does; or the axes are others
    moved = (values[1:] - values[:1]).norm(dim=1).cpu()
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
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(_ORDERS)])


@functools.lru_cache(64)
def _usual_orders(grid: tuple[int, ...]) -> Tensor:
    """The cells of a grid in the orders of layers: that of rows first, then that of other axes, and window by window.

    Some cells keep their place in the other orders, so that rows correlate with them.
    """
    cells, axes = torch.arange(math.prod(grid)).reshape(grid), range(len(grid))
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


def _fitting(scores: dict[Form, float], least: float, apart: float) -> list[Form]:
    """The forms whose correlation is more than this: the best one alone if it is that far from the others."""
    best = max(scores.values())
    return [form for form, score in scores.items() if score > least and best - score < apart]
