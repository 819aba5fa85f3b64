"""The positions of a layer, as forward passes show them: which of them follow a change of the input at the same place."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camfn.formulas.scaling import correlation
from camfn.layouts import Form, view_of
from camfn.model.inputs import Batch, with_input

Seen = dict[str, Tensor]
"""Activations by name."""

_VALUES = 128
"""The least number of positions, over all changed images, whose changes are compared."""
_IMAGES = 16
"""The most changed images. A grid of a few cells needs more of them than a fine one."""
_LEAST, _MARGIN, _SPREAD = 0.1, 0.15, 3.0
"""A form fits if its correlation is at least `_LEAST`, and is taken if it exceeds all others by `_MARGIN`. Both are at least
`_SPREAD` standard deviations of the correlation of unrelated values, which is `1 / sqrt(number of values)`."""

_FOLLOWS = 0.9
"""The correlation, over the images, from which a token follows a cell."""


class _Changes(NamedTuple):
    """The places at which each image differs from the first one."""

    images: Tensor  # (1 + d, k, *size)
    places: Tensor  # (d, 1, *size): 1 where the image is changed


def placed(run: Callable[[Batch], Seen], batch: Batch, forms: dict[str, list[Form]]) -> dict[str, list[Form]]:
    """Keep the forms of each layer whose positions follow the input's.

    An image is changed in some of the cells of a form's grid. In the true form, the same cells change most: their change
    correlates with the image's. Positions that depend on all places alike, as learned queries do, correlate in no form.

    - `run(batch)`: the activations by name.
    - `forms`: for each layer, the forms to choose from.

    Returns, for each layer, the form that fits best, no form if none fits, and all that fit if none is clearly the best.
    """
    by_grid: dict[tuple[int, ...], dict[str, list[Form]]] = {}
    for name, some in forms.items():
        finest = max((form.grid for form in some), key=math.prod)
        by_grid.setdefault(finest, {})[name] = some
    found = dict(forms)
    for grid, layers in by_grid.items():
        if batch.size is None or any(len(form.grid) != len(batch.size) for some in layers.values() for form in some):
            continue  # no place of the input is known for their positions
        changes = _changes(batch, grid)
        seen = _changed(run, batch, changes.images, list(layers))
        for name, some in layers.items():
            fit = _fitting({form: _agreement(form, seen[name], changes) for form in some}, len(changes.places))
            # A layer with the axes of an image is no list of queries. Where each position depends on all, its axes are open.
            found[name] = fit if fit or any(form.tokens for form in some) else some
    return found


def _changes(batch: Batch, grid: Sequence[int]) -> _Changes:
    """Noise, and the same noise with some of the grid's cells changed."""
    count = min(_IMAGES, max(1, math.ceil(_VALUES / math.prod(grid))))
    size, generator = batch.image.shape[1:], torch.Generator().manual_seed(0)
    noise = torch.rand(1, *size, generator=generator)
    cells = torch.rand(count, 1, *grid, generator=generator)
    some = (cells.flatten(1) <= cells.flatten(1).quantile(0.3, 1, keepdim=True)).reshape(cells.shape).float()
    places = F.interpolate(some, tuple(size[1:]), mode="nearest")
    images = torch.cat([noise, torch.where(places > 0, 1 - noise, noise)])
    return _Changes(images.to(batch.image.device, batch.image.dtype), places)


def _changed(run: Callable[[Batch], Seen], batch: Batch, images: Tensor, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The activations of all images, in batches of the batch's own size, since companion inputs have its rows."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(images), batch.n):
        some = images[start : start + batch.n]
        padded = torch.cat([some, images[:1].expand(batch.n - len(some), *images.shape[1:])])
        found = run(batch._replace(x=with_input(batch.x, batch.pixels, padded)))
        for name in names:
            seen[name].append(found[name])
    return seen


def _agreement(form: Form, seen: list[Tensor], changes: _Changes) -> float:
    """The correlation of the change at each position with the share of its cell that was changed.

    It is 0 if a token outside the grid follows one cell through the images: such a token belongs to a grid. It is 0, too, if
    the positions follow the cells in another order than that of rows.
    """
    whole = form._replace(prefix=0, suffix=0)
    values = torch.cat([view_of(whole, part) for part in seen])[: len(changes.images)].to(torch.float32)
    moved = (values[1:] - values[:1]).norm(dim=1).cpu()
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(form.grid)]
    cells = pool(changes.places, form.grid).flatten(1)
    inside = slice(form.prefix, moved.shape[1] - form.suffix)
    own, others = moved[:, inside], torch.cat([moved[:, : inside.start], moved[:, inside.stop :]], 1)
    if len(cells) >= _IMAGES // 2 and any(_follows(other, own, cells) for other in others.mT):
        return 0.0
    found = float(correlation(own.flatten(), cells.flatten()))
    rival = max((float(correlation(own.flatten(), cells[:, order].flatten())) for order in _other_orders(form.grid)), default=0)
    return 0.0 if rival - found >= max(_MARGIN, _SPREAD / math.sqrt(cells.numel())) else found


def _other_orders(grid: Sequence[int]) -> Iterator[Tensor]:
    """The cells of a grid in the orders that layers use beside that of rows: of other axes first, and window by window.

    Some cells keep their place in these orders, so that rows correlate with them.
    """
    cells, axes = torch.arange(math.prod(grid)).reshape(grid), range(len(grid))
    for order in itertools.permutations(axes):
        yield cells.permute(order).flatten()
    for window in itertools.product(*([side for side in range(1, most + 1) if most % side == 0] for most in grid)):
        apart = [side for most, each in zip(grid, window) for side in (most // each, each)]
        inside = [2 * axis + 1 for axis in axes]
        yield cells.reshape(apart).permute(*(2 * axis for axis in axes), *inside).flatten()


def _follows(other: Tensor, own: Tensor, cells: Tensor) -> bool:
    """Whether a token follows one cell better than the position of the form there. A class token may attend to one cell."""
    pairs = zip(own.mT, cells.mT)
    return any(float(correlation(other, cell)) > max(_FOLLOWS, float(correlation(mine, cell))) for mine, cell in pairs)


def _fitting(scores: dict[Form, float], images: int) -> list[Form]:
    """The forms whose correlation is high: the best one alone if it is clear."""
    best = max(scores, key=lambda form: scores[form])
    spread = _SPREAD / math.sqrt(images * math.prod(best.grid))
    fit = [form for form, score in scores.items() if score >= max(_LEAST, spread)]
    return [form for form in fit if scores[best] - scores[form] < max(_MARGIN, spread)]
