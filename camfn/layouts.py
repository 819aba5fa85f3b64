"""Layouts: the order of an activation's axes. Inside camfn an activation is `(n, c, p)`, with its grid flattened to p."""

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
    """An activation as `(n, c, p)` with its grid, and the functions to and from that form."""

    values: Activations
    grid: Sides
    view: Callable[[Tensor], Activations]
    """`view(tensor)`: another tensor of the layer's shape, such as a gradient, as `(n, c, p)`."""
    restore: Callable[..., Tensor]
    """`restore(values, images=None)`: values `(m, c, p)` in the layer's own layout. Tokens outside the grid (class token,
    registers) keep their captured values: those of the m images of the batch, or of the images `(m,)` at these indices."""
    like: Layout
    """The same layout, for an input of another size."""


class Form(NamedTuple):
    """One way to read an activation."""

    name: str  # the `layout=` argument that selects it
    grid: Sides
    channels: int  # the number of channels
    last: bool = False  # whether the channels are the last axis
    tokens: bool = False  # whether one axis has all positions, with other tokens before or after them
    prefix: int = 0  # the number of tokens before the grid
    suffix: int = 0  # the number of tokens after it
    sequence: bool = False  # whether it is `(tokens, n, channels)`, as in torch's own transformers

    @property
    def like(self) -> Layout:
        """Return the layout without the grid."""
        return Tokens(None, self.prefix, self.suffix) if self.tokens else self.name.strip('"')


class Clues(NamedTuple):
    """Evidence about the layout of activations, from the model's layers."""

    first: frozenset[int] = frozenset()  # channel counts of layers with channels first: convolutions, batch norms
    last: frozenset[int] = frozenset()  # channel counts of layers with channels last: layer norms
    linear: frozenset[int] = frozenset()  # channel counts of linear, recurrent and attention layers, which act on the last axis
    axes: frozenset[int] = frozenset()  # numbers of spatial axes of the convolutions
    grids: frozenset[Sides] = frozenset()  # output grids of convolutions on the input, such as a patch embedding
    permuted: frozenset[int] = frozenset()  # channel counts that a permuted convolution has last, for an input without a size


def tokens(grid: Sequence[int] | None = None, prefix: int | None = None, suffix: int | None = None) -> Tokens:
    """The layout `(n, tokens, channels)` of transformers.

    - `grid`: the sides of the grid of tokens, such as `(14, 14)`.
    - `prefix`: the number of tokens before the grid: class, distillation and register tokens.
    - `suffix`: the number of tokens after the grid.

    An argument that is `None` is inferred from the others, from the input's aspect ratio, and from forward passes of changed
    inputs. Raises `CamError` if an argument is not made of ints.

    >>> import camfn, torch
    >>> read = camfn.layouts.read(torch.randn(2, 1 + 6, 8), camfn.layouts.tokens((2, 3), prefix=1), None, "blocks.0", 2)
    >>> read.values.shape, read.grid
    (torch.Size([2, 8, 6]), (2, 3))
    """
    if grid is not None and not (_are_ints(grid, 1) and grid):
        raise CamError(f"layouts.tokens(grid={grid!r}): grid must be a sequence of positive ints, its sides, or None")
    if prefix is not None and not _are_ints((prefix,), 0):
        raise CamError(f"layouts.tokens(prefix={prefix!r}): prefix must be a number of tokens, or None")
    if suffix is not None and not _are_ints((suffix,), 0):
        raise CamError(f"layouts.tokens(suffix={suffix!r}): suffix must be a number of tokens, or None")
    return Tokens(None if grid is None else tuple(grid), prefix, suffix)


def _are_ints(values: Any, least: int) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)


def read(
    activation: Tensor,
    layout: Layout,
    spatial: Sides | None,
    layer: str,
    batch: int,
    clues: Callable[[], Clues] = Clues,
    *,
    placed: Callable[[list[Form]], list[Form]] = list,
) -> Read:
    """Read an activation as `(n, c, p)`.

    - `spatial`: the spatial size of the input with the pixels, if there is one.
    - `layer`: the layer's name, for error messages.
    - `clues`: a function that returns the evidence from the model's layers. It is called only if it is needed.
    - `placed`: a function that keeps the forms whose positions follow the input's. It is called only if the shape leaves a
      doubt: with several forms, and with tokens.

    Raises `CamError` if the activation has no spatial axes, another batch size, or no unambiguous layout.
    """
    if not (layout in _NAMED if isinstance(layout, str) else callable(layout) or isinstance(layout, Tokens)):
        raise CamError(
            f'layout must be "auto", "channels_first", "channels_last", camfn.layouts.tokens() or a callable; found {layout!r}'
        )
    if callable(layout):
        return _by_callable(activation, layout, layer, batch)
    shape = tuple(activation.shape)
    if not _is_sequence(shape, batch) or (isinstance(layout, str) and layout != "auto"):
        _check_batch(shape, layer, batch)
    fitting = forms_of(shape, layout, spatial, batch, clues)
    forms = placed(fitting) if in_doubt(fitting, layout) else fitting
    if len(forms) != 1:
        why = _unplaced_message(fitting) if fitting and not forms else _unclear_message(forms, shape, layout, spatial)
        raise CamError(f"{layer_called(layer)} gives {shape}, {why}")
    form = forms[0]
    view, restore = functools.partial(view_of, form), functools.partial(restored, form, activation)
    return Read(view(activation), form.grid, view, restore, form.like)


def in_doubt(forms: list[Form], layout: Layout = "auto") -> bool:
    """Whether a shape leaves a doubt: several forms fit, or the caller has not said which of the tokens are a grid."""
    said = isinstance(layout, Tokens) and layout.grid is not None and layout.suffix is not None
    return len(forms) > 1 or any(form.tokens and (layout == "auto" or (form.suffix > 0 and not said)) for form in forms)


def forms_of(shape: Sides, layout: Layout, spatial: Sides | None, batch: int, clues: Callable[[], Clues] = Clues) -> list[Form]:
    """Return the ways to read an activation of this shape: one, none, or several that fit equally well."""
    if len(shape) < 3 or 0 in shape:
        return []
    if layout in ("channels_first", "channels_last"):
        return [_grid_form(shape, layout == "channels_last")]
    first, last = _grid_form(shape, False), _grid_form(shape, True)
    if layout == "auto" and shape[0] == batch and _fit(spatial, first.grid) and not _fit(spatial, last.grid):
        return [first]  # nearly every activation; the clues are not needed
    known = clues()
    if isinstance(layout, Tokens):
        return _token_forms(shape, layout, spatial, batch, known)
    convolutional = known.first and not known.last and not (len(shape) == 3 and shape[-1] in known.linear)
    if shape[0] == batch and _fit(spatial, first.grid) >= max(_fit(spatial, last.grid), 1) and convolutional:
        return [first]  # a convolutional model without channels-last layers, and no better reading
    if len(shape) == 3 and known.axes and 1 not in known.axes and (spatial is None or len(spatial) == 1):
        return []  # a spectrogram whose channel axis the model adds: its tokens do not lie on a line
    found = _token_forms(shape, Tokens(), spatial, batch, known)
    if spatial is None or len(spatial) == 1:  # any length fits a line, so require a convolution with this output grid
        found = [form for form in found if (form.prefix or form.suffix) and form.grid in known.grids]
    if shape[0] == batch:
        same_rank = spatial is None or len(shape) == len(spatial) + 2
        ways = [first] if math.prod(shape[1:]) == 1 else [first, last]  # one channel at one position is read alike in both
        found += ways if same_rank else [first] if first.channels in known.first else []
    return _best({form: _evidence(form, spatial, known) for form in found})


_NAMED = ("auto", "channels_first", "channels_last")


def _grid_form(shape: Sides, last: bool) -> Form:
    grid, channels = (shape[1:-1], shape[-1]) if last else (shape[2:], shape[1])
    return Form('"channels_last"' if last else '"channels_first"', grid, channels, last)


# -------------------------------------------------------------------------------------------- to (n, c, p) and back


def view_of(form: Form, activation: Tensor) -> Activations:
    """Bring an activation to `(n, c, p)`."""
    flat = _move_axes(form, activation).flatten(2)
    return flat[..., form.prefix : flat.shape[-1] - form.suffix]


def _move_axes(form: Form, activation: Tensor) -> Tensor:
    """Move the batch to the first axis and the channels to the second."""
    batched = activation.transpose(0, 1) if form.sequence else activation
    return batched.movedim(-1, 1) if form.last else batched


def restored(form: Form, activation: Tensor, values: Activations, images: Tensor | None = None) -> Tensor:
    """Bring `(n, c, p)` back to the layout of an activation, whose other tokens are kept."""
    whole = _move_axes(form, activation)
    flat = values.to(activation.dtype)
    if form.prefix or form.suffix:
        own = whole.flatten(2) if images is None else whole.flatten(2).index_select(0, images)
        own = own.expand(len(flat), -1, -1)
        flat = torch.cat([own[..., : form.prefix], flat, own[..., own.shape[-1] - form.suffix :]], -1)
    moved = flat.reshape(-1, *whole.shape[1:])
    batched = moved.movedim(1, -1) if form.last else moved
    # contiguous: the model may call `view` on it
    return (batched.transpose(0, 1) if form.sequence else batched).contiguous()


def _by_callable(activation: Tensor, layout: Callable[[Tensor], Tensor], layer: str, batch: int) -> Read:
    moved = layout(activation)
    if moved.ndim < 3 or math.prod(moved.shape[2:]) == 0:
        raise CamError(
            f"{layer_called(layer)} gives {tuple(activation.shape)}, and layout= makes it {tuple(moved.shape)}, "
            "which has no spatial axes; it must return (n, c, *grid)"
        )
    _check_batch(tuple(moved.shape), layer, batch)

    def restore(values: Activations, images: Tensor | None = None) -> Tensor:
        raise CamError(
            f"this method writes values into {layer_called(layer)}, and layout= is a function, which has no inverse; "
            'pass "channels_first", "channels_last" or camfn.layouts.tokens(grid, prefix)'
        )

    return Read(moved.flatten(2), tuple(moved.shape[2:]), lambda other: layout(other).flatten(2), restore, layout)


# ------------------------------------------------------------------------------------------------------ inference


def _best(evidence: dict[Form, tuple[int, ...]]) -> list[Form]:
    """Return the forms whose evidence no other form dominates."""

    def beaten(mine: tuple[int, ...]) -> bool:
        return any(other != mine and all(b >= a for a, b in zip(mine, other)) for other in evidence.values())

    return [form for form, mine in evidence.items() if not beaten(mine)]


def _evidence(form: Form, spatial: Sides | None, clues: Clues) -> tuple[int, ...]:
    """Score a form by the input's aspect ratio, the layers' channel counts, and the output grids of convolutions."""
    return (
        _fit(spatial, form.grid),
        form.channels in (_widths_last(form, clues) if form.last else clues.first),
        form.grid in clues.grids,
    )


def _fit(spatial: Sides | None, grid: Sides) -> int:
    """Return 2 if the grid is the input at a single stride, 1 if it is up to one cell, else 0 (also if it is finer)."""
    if spatial is None or len(grid) != len(spatial):
        return 0
    if len({Fraction(side, cell) for side, cell in zip(spatial, grid)}) == 1:
        return 2 if grid[0] <= spatial[0] else 0
    low = max(side / (cell + 1) for side, cell in zip(spatial, grid))
    high = min(side / (cell - 1) if cell > 1 else math.inf for side, cell in zip(spatial, grid))
    return int(low < high and high >= 1)


def _widths_last(form: Form, clues: Clues) -> frozenset[int]:
    """The channel counts of layers with channels last. Linear layers count for sequences alone, as most heads have one."""
    widths = clues.last | clues.permuted
    return widths | clues.linear if form.tokens or len(form.grid) == 1 else widths


def _tokens_call(grid: Sides | None, prefix: int | None, suffix: int | None) -> str:
    return f"camfn.layouts.tokens(grid={grid}, prefix={prefix}{f', suffix={suffix}' if suffix else ''})"


_EXTRA = 8
"""The most tokens outside the grid that are tried: a class token and some registers. More, all of them before the grid or
after it, are tried where a convolution made the grid."""


def _token_forms(shape: Sides, asked: Tokens, spatial: Sides | None, batch: int, clues: Clues) -> list[Form]:
    if len(shape) != 3:
        return []
    sequence = _is_sequence(shape, batch)
    count, channels = (shape[0] if sequence else shape[1]), shape[2]

    def splits(grid: Sides) -> list[Form]:
        """The forms with this grid: all extra tokens before it, all after it, and then a few before it and the rest after."""
        extra = count - math.prod(grid)
        asked_before = [asked.prefix] if asked.suffix is None else [extra - asked.suffix]
        usual = (extra, 0, *range(min(extra, _EXTRA)))
        before = [p for p in dict.fromkeys((*usual, *asked_before)) if p is not None and 0 <= p <= extra]
        some = [p for p in before if asked.prefix in (None, p) and asked.suffix in (None, extra - p)]
        return [Form(_tokens_call(grid, p, extra - p), grid, channels, True, True, p, extra - p, sequence) for p in some]

    if asked.grid is not None:
        return splits(asked.grid)
    if spatial is None or len(spatial) == 1:
        lines = [(side,) for side in range(count, max(0, count - _EXTRA - 1), -1)]
        some = [form for line in lines for form in splits(line)]
        return [form for form in some if form.grid in clues.grids] or some
    for grids in (clues.grids, _regular(spatial)):
        sizes = {grid: math.prod(grid) for grid in grids}
        near = [grid for grid, size in sizes.items() if size > 1 and 0 <= count - size <= _EXTRA]
        if found := [form for grid in near for form in splits(grid)]:
            return found
    return [form for grid in clues.grids if 1 < math.prod(grid) < count for form in splits(grid)]


def _regular(spatial: Sides) -> Iterator[Sides]:
    """Yield the grids of square patches that tile the input."""
    common = math.gcd(*spatial)
    return (tuple(side // patch for side in spatial) for patch in range(1, common + 1) if common % patch == 0)


# --------------------------------------------------------------------------------------------------------- errors


def _is_sequence(shape: Sides, batch: int) -> bool:
    """Return True for the shape `(tokens, n, channels)`, the default of torch's own transformers."""
    return len(shape) == 3 and shape[0] != batch and shape[1] == batch


def _check_batch(shape: Sides, layer: str, batch: int) -> None:
    if shape[:1] == (batch,):
        return
    found = f"{layer_called(layer)} gives {shape}, a batch of {shape[0]} for x with a batch of {batch}"
    if shape[0] % batch == 0 and len(shape) > 2:
        parts = shape[0] // batch
        raise CamError(
            f"{found}: {parts} windows, crops or frames per input, whose order is not known; choose the layer around "
            "them, or pass as layout= a function that brings them to (n, c, *grid)"
        )
    raise CamError(f"{found}: is the batch axis of x missing? (x[None] adds one)")


def _unplaced_message(forms: list[Form]) -> str:
    """The message if the shape fits some forms, and no position of the input made their positions."""
    return (
        f"which has the shape of layout={forms[0].name}, but its positions do not follow those of the input: a change of the "
        "input at one place shows elsewhere, or everywhere alike, as in learned queries; choose another layer, or pass "
        "layout=camfn.layouts.tokens(grid, prefix, suffix)"
    )


def _unclear_message(forms: list[Form], shape: Sides, layout: Layout, spatial: Sides | None) -> str:
    if forms:
        plainest = sorted(forms, key=lambda form: (form.suffix > 0, form.prefix > 0 and form.suffix > 0))
        ways = " or ".join(form.name for form in plainest[:4])
        return f"which can be read in {len(forms)} ways that fit equally well; choose one by layout={ways}"
    if len(shape) < 3 or 0 in shape:
        return "which has no spatial axes; choose a layer before pooling and flattening, or pass layout="
    if isinstance(layout, Tokens):
        return f"which is not (n, tokens, channels) with the prefix and grid of layout={_tokens_call(*layout)}"
    size = "the input" if spatial is None else f"the input, {spatial}"
    return (
        f"and no grid of that many positions has the proportions of {size}; pass "
        "layout=camfn.layouts.tokens(grid, prefix), or a function that brings it to (n, c, *grid)"
    )
