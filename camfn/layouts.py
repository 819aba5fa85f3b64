"""Where a layer's activation has its channels. Inside, it is `(n, c, p)`: positions flattened, the grid beside it."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camfn._errors import CamError, layer_called
from camfn._types import Activations, Layout, Tokens

Sides = tuple[int, ...]


class Read(NamedTuple):
    """An activation on its grid, and the ways there and back."""

    values: Activations
    grid: Sides
    view: Callable[[Tensor], Activations]
    """Another tensor of the layer's shape, a gradient say, read the same way."""
    restore: Callable[..., Tensor]
    """`restore(values, images=None)`: values `(m, c, p)` as the layer returns them. What is no position (a class token, a
    register) is as it was captured: for the m images of the batch, or for those that `images` `(m,)` tells."""
    like: Layout
    """The same layout, for an input of another size."""


class Form(NamedTuple):
    """How an activation can be read."""

    name: str  # how `layout=` says it
    grid: Sides
    channels: int  # the width of its channels
    last: bool = False  # where they are
    prefix: int = 0  # tokens before the grid
    sequence: bool = False  # `(tokens, n, channels)`, as torch's own transformers have it

    @property
    def like(self) -> Layout:
        """It, without its grid."""
        named = self.name.strip('"')
        return named if named in _NAMED else Tokens(None, self.prefix)


class Clues(NamedTuple):
    """What the model's layers tell about its activations."""

    first: frozenset[int] = frozenset()  # widths of layers that have their channels first: convolutions, batch norms
    last: frozenset[int] = frozenset()  # and last: layer norms
    axes: frozenset[int] = frozenset()  # along how many its convolutions go
    grids: frozenset[Sides] = frozenset()  # what convolutions make of the input: where patches are embedded, their number


def tokens(grid: Sequence[int] | None = None, prefix: int | None = None) -> Tokens:
    """The layout `(n, tokens, channels)` of transformers: `prefix` tokens (class, distillation, registers), then a grid.

    What is `None` is found from the other and from the input's proportions, where only one reading fits.

    >>> import camfn, torch
    >>> read = camfn.layouts.read(torch.randn(2, 1 + 6, 8), camfn.layouts.tokens((2, 3)), None, "blocks.0", 2)
    >>> read.values.shape, read.grid
    (torch.Size([2, 8, 6]), (2, 3))
    """
    if grid is not None and not (_are_ints(grid, 1) and grid):
        raise CamError(f"layouts.tokens(grid={grid!r}): a grid is its sides, positive ints, or None")
    if prefix is not None and not _are_ints((prefix,), 0):
        raise CamError(f"layouts.tokens(prefix={prefix!r}): a prefix is a number of tokens, or None")
    return Tokens(None if grid is None else tuple(grid), prefix)


def _are_ints(values: Any, least: int) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)


def read(
    activation: Tensor,
    layout: Layout,
    spatial: Sides | None,
    layer: str,
    batch: int,
    clues: Callable[[], Clues] = Clues,
) -> Read:
    """The activation as `(n, c, p)`. `spatial` is the size of the input that has the pixels, if there is one."""
    if not (layout in _NAMED if isinstance(layout, str) else callable(layout) or isinstance(layout, Tokens)):
        raise CamError(
            f'layout must be "auto", "channels_first", "channels_last", camfn.layouts.tokens() or a callable; found {layout!r}'
        )
    if callable(layout):
        return _by_callable(activation, layout, layer, batch)
    shape = tuple(activation.shape)
    if not _is_sequence(shape, batch) or (isinstance(layout, str) and layout != "auto"):
        _check_batch(shape, layer, batch)
    forms = forms_of(shape, layout, spatial, batch, clues)
    if len(forms) != 1:
        raise CamError(f"{layer_called(layer)} gives {shape}, {_unclear(forms, shape, layout, spatial)}")
    form = forms[0]
    view, restore = functools.partial(_viewed, form), functools.partial(_restored, form, activation)
    return Read(view(activation), form.grid, view, restore, form.like)


def forms_of(shape: Sides, layout: Layout, spatial: Sides | None, batch: int, clues: Callable[[], Clues] = Clues) -> list[Form]:
    """How an activation of this shape can be read: in one way, it is to be hoped; in none, or in several that fit alike."""
    if len(shape) < 3 or 0 in shape:
        return []
    if layout in ("channels_first", "channels_last"):
        return [_grid_form(shape, layout == "channels_last")]
    first, last = _grid_form(shape, False), _grid_form(shape, True)
    if layout == "auto" and shape[0] == batch and _fit(spatial, first.grid) and not _fit(spatial, last.grid):
        return [first]  # as nearly every activation is; nothing more has to be known
    known = clues()
    if isinstance(layout, Tokens):
        return _token_forms(shape, layout, spatial, batch, known)
    if shape[0] == batch and _fit(spatial, first.grid) >= max(_fit(spatial, last.grid), 1) and known.first and not known.last:
        return [first]  # a model of convolutions in which no layer has its channels last, and no better reading
    if len(shape) == 3 and known.axes and 1 not in known.axes and (spatial is None or len(spatial) == 1):
        return []  # a spectrogram whose channel axis the model adds: its tokens are no line
    found = _token_forms(shape, Tokens(), spatial, batch, known)
    if spatial is None or len(spatial) == 1:  # a line has all proportions: a convolution must have made the grid
        found = [form for form in found if form.prefix and form.grid in known.grids]
    if shape[0] == batch:
        same_rank = spatial is None or len(shape) == len(spatial) + 2
        found += [first, last] if same_rank else [first] if first.channels in known.first else []
    return _best({form: _evidence(form, spatial, known) for form in found})


_NAMED = ("auto", "channels_first", "channels_last")


def _grid_form(shape: Sides, last: bool) -> Form:
    grid, channels = (shape[1:-1], shape[-1]) if last else (shape[2:], shape[1])
    return Form('"channels_last"' if last else '"channels_first"', grid, channels, last)


# ------------------------------------------------------------------------------------------------- there and back


def _viewed(form: Form, activation: Tensor) -> Activations:
    return _moved(form, activation).flatten(2)[..., form.prefix :]


def _moved(form: Form, activation: Tensor) -> Tensor:
    """Batch first, channels second."""
    batched = activation.transpose(0, 1) if form.sequence else activation
    return batched.movedim(-1, 1) if form.last else batched


def _restored(form: Form, activation: Tensor, values: Activations, images: Tensor | None = None) -> Tensor:
    whole = _moved(form, activation)
    flat = values.to(activation.dtype)
    if form.prefix:
        before = whole.flatten(2)[..., : form.prefix]
        before = before if images is None else before.index_select(0, images)
        flat = torch.cat([before.expand(len(flat), -1, -1), flat], -1)
    moved = flat.reshape(-1, *whole.shape[1:])
    batched = moved.movedim(1, -1) if form.last else moved
    # What a model views as one block of memory has to be one.
    return (batched.transpose(0, 1) if form.sequence else batched).contiguous()


def _by_callable(activation: Tensor, layout: Callable[[Tensor], Tensor], layer: str, batch: int) -> Read:
    moved = layout(activation)
    if moved.ndim < 3 or math.prod(moved.shape[2:]) == 0:
        raise CamError(
            f"{layer_called(layer)} gives {tuple(activation.shape)}, and layout= makes it {tuple(moved.shape)}, "
            "which has no spatial axes; it is to make it (n, c, *grid)"
        )
    _check_batch(tuple(moved.shape), layer, batch)

    def restore(values: Activations, images: Tensor | None = None) -> Tensor:
        raise CamError(
            f"this method writes values into {layer_called(layer)}, and layout= is a function, which has no way back; "
            'say it as "channels_first", "channels_last" or camfn.layouts.tokens(grid, prefix)'
        )

    return Read(moved.flatten(2), tuple(moved.shape[2:]), lambda other: layout(other).flatten(2), restore, layout)


# ------------------------------------------------------------------------------------------------------ inference


def _best(evidence: dict[Form, tuple[int, ...]]) -> list[Form]:
    """The forms that no other beats, which has for it all that they have, and more."""

    def beaten(mine: tuple[int, ...]) -> bool:
        return any(other != mine and all(b >= a for a, b in zip(mine, other)) for other in evidence.values())

    return [form for form, mine in evidence.items() if not beaten(mine)]


def _evidence(form: Form, spatial: Sides | None, clues: Clues) -> tuple[int, ...]:
    """The input's proportions; a width that such layers of the model have; a grid that a convolution makes of the input."""
    return (
        _fit(spatial, form.grid),
        form.channels in (clues.last if form.last else clues.first),
        form.grid in clues.grids,
    )


def _fit(spatial: Sides | None, grid: Sides) -> int:
    """Is the grid the input at one stride: 2 if it is, 1 give or take a cell, 0 if not, or if it is finer than the input."""
    if spatial is None or len(grid) != len(spatial):
        return 0
    if len({Fraction(side, cell) for side, cell in zip(spatial, grid)}) == 1:
        return 2 if grid[0] <= spatial[0] else 0
    low = max(side / (cell + 1) for side, cell in zip(spatial, grid))
    high = min(side / (cell - 1) if cell > 1 else math.inf for side, cell in zip(spatial, grid))
    return int(low < high and high >= 1)


def _said(grid: Sides | None, prefix: int | None) -> str:
    return f"camfn.layouts.tokens(grid={grid}, prefix={prefix})"


_PREFIX = 8
"""Most tokens before a grid that are looked for: a class token and some registers."""


def _token_forms(shape: Sides, asked: Tokens, spatial: Sides | None, batch: int, clues: Clues) -> list[Form]:
    if len(shape) != 3:
        return []
    sequence = _is_sequence(shape, batch)
    count, channels = (shape[0] if sequence else shape[1]), shape[2]

    def form(prefix: int, grid: Sides) -> Form:
        return Form(_said(grid, prefix), grid, channels, True, prefix, sequence)

    if asked.grid is not None:
        prefix = count - math.prod(asked.grid)
        return [form(prefix, asked.grid)] if prefix >= 0 and asked.prefix in (None, prefix) else []
    prefixes = range(min(_PREFIX + 1, count)) if asked.prefix is None else (asked.prefix,)
    if spatial is None or len(spatial) == 1:
        some = [form(prefix, (count - prefix,)) for prefix in prefixes if count > prefix]
        return [found for found in some if found.grid in clues.grids] or some
    for grids in (clues.grids, _regular(spatial)):
        sizes = {grid: math.prod(grid) for grid in grids}
        found = [form(p, grid) for p in prefixes for grid, size in sizes.items() if size > 1 and p + size == count]
        if found:
            return found
    return []


def _regular(spatial: Sides) -> Iterator[Sides]:
    """The grids of square patches that cover the input."""
    common = math.gcd(*spatial)
    return (tuple(side // patch for side in spatial) for patch in range(1, common + 1) if common % patch == 0)


# --------------------------------------------------------------------------------------------------------- errors


def _is_sequence(shape: Sides, batch: int) -> bool:
    """`(tokens, n, channels)`, as torch's own transformers have it by default."""
    return len(shape) == 3 and shape[0] != batch and shape[1] == batch


def _check_batch(shape: Sides, layer: str, batch: int) -> None:
    if shape[:1] == (batch,):
        return
    found = f"{layer_called(layer)} gives {shape}, a batch of {shape[0]} for x with a batch of {batch}"
    if shape[0] % batch == 0 and len(shape) > 2:
        parts = shape[0] // batch
        raise CamError(
            f"{found}: {parts} windows, crops or frames of each input, and their order cannot be seen; choose the layer around "
            "them, or pass as layout= a function that brings them to (n, c, *grid)"
        )
    raise CamError(f"{found}: is the batch axis of x missing? (x[None] adds one)")


def _unclear(forms: list[Form], shape: Sides, layout: Layout, spatial: Sides | None) -> str:
    if forms:
        ways = " or ".join(form.name for form in forms[:4])
        return f"which can be read in {len(forms)} ways that fit alike; say which by layout={ways}"
    if len(shape) < 3 or 0 in shape:
        return "which has no spatial axes; choose a layer before pooling and flattening, or pass layout= to say where they are"
    if isinstance(layout, Tokens):
        return f"which is not (n, tokens, channels) with a prefix and a grid as layout={_said(*layout)} has them"
    size = "the input" if spatial is None else f"the input, {spatial}"
    return (
        f"and no grid of that many positions has the proportions of {size}; say where they are by "
        "layout=camfn.layouts.tokens(grid, prefix), or by a function that brings it to (n, c, *grid)"
    )
