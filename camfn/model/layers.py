"""Which layers can be explained, and which one is where none is named."""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from camfn._errors import CamError
from camfn._types import Inputs, State
from camfn.layouts import Clues, Form, Sides, forms_of
from camfn.model.capture import resolve_state, watch
from camfn.model.inputs import Batch, Key, check
from camfn.model.linear_head import is_auxiliary, is_convolution, sides
from camfn.model.ports import Place, tensors_of
from camfn.model.prepare import Model, opened, prepares
from camfn.targets import logits_of


class Candidate(NamedTuple):
    """A layer that can be explained: its output lies on a grid of more than one position."""

    name: str
    """As `layer=` takes it: `"layer4"`, `"fpn:0"` for a part of what it returns, `"block@2"` for one of its calls."""
    kind: str
    """Its class."""
    shape: tuple[int, ...]
    """Of its output, with the batch."""
    grid: tuple[int, ...]
    chosen: bool
    """Is it the one that is taken where no layer is named?"""


@prepares
def candidate_layers(model: Model, x: Inputs, *, masked: Key = None, state: State | None = None) -> tuple[Candidate, ...]:
    """The layers that can be explained, in the order of execution, and which of them `layer=None` takes; one forward.

    That is the last one with a grid, but: where a class token leads the others, the last block but one, since after the
    last block only the class token counts; before the first layer that returns a pyramid of grids, as detectors have it, unless
    a linear head takes what comes after; and no layer that ends in a channel for each class, which is an output and not a
    feature.

    `x`, `masked` and `state` are those of `camfn.score_cam`. Layers that do not run, and those whose layout cannot be told
    from their shape, are not among them.

    >>> import camfn, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> for layer in camfn.candidate_layers(model, torch.randn(1, 3, 8, 8)):
    ...     print(layer.name, layer.kind, layer.grid, layer.chosen)
    0 Conv2d (6, 6) False
    1 ReLU (6, 6) True
    """
    full = resolve_state(opened(model).shell(), state)
    found = _outputs(model, full, check(x, masked, full, False))
    chosen = _chosen(found) if found.all else None
    return tuple(Candidate(out.name, out.kind, out.shape, out.form.grid, out is chosen) for out in found.all)


class Choice(NamedTuple):
    """The layer that is taken where none is named."""

    name: str
    why: str  # what it is, after "the"


def choose(model: Model, state: State, batch: Batch) -> Choice:
    """Choose a layer; one forward."""
    found = _outputs(model, state, batch)
    if not found.all:
        raise CamError(none_on_a_grid(model, batch.size))
    chosen = _chosen(found)
    why = "last block but one: after the last, only the class token counts" if chosen.form.prefix else "last layer on a grid"
    return Choice(chosen.name, why)


def stages(model: Model, state: State, batch: Batch) -> tuple[str, ...]:
    """The chosen layer, and before it, of each size that is larger along every axis, the last layer; one forward.

    Of one size, layers that stand in no other come first: the next stage's first convolutions can be of this one's size.
    """
    found = _outputs(model, state, batch)
    if not found.all:
        raise CamError(none_on_a_grid(model, batch.size))
    last = _chosen(found)
    usable = [out for out in found.all[: found.all.index(last)] if out.lone and out.form.channels not in found.classes]
    ends = [last]
    while finer := [out for out in usable if all(side > after for side, after in zip(out.form.grid, ends[0].form.grid))]:
        same = [out for out in finer if out.form.grid == finer[-1].form.grid]
        ends.insert(0, min(reversed(same), key=lambda out: out.name.count(".")))
    return tuple(out.name for out in ends)


def none_on_a_grid(model: Model, spatial: Sides | None) -> str:
    """A sentence for where there is no candidate."""
    axes = "spatial axes" if spatial is None else f"{len(spatial)} spatial axes"
    kind = type(opened(model).prepared.model).__name__
    return (
        f"no layer of {kind} has {axes} of more than one position that can be told from its shape; "
        "name one: [name for name, _ in model.named_modules()]"
    )


# ------------------------------------------------------------------------------------------------ what the layers give


class _Output(NamedTuple):
    """A tensor on a grid that a layer gave."""

    name: str
    kind: str
    shape: Sides
    form: Form
    lone: bool  # the layer ran once and gave nothing else
    pyramid: bool  # this layer, or one before it, gave grids of several sizes


class _Outputs(NamedTuple):
    """All of them, in the order of execution; the model itself is none of its layers."""

    all: list[_Output]
    classes: set[int]  # how many channels an output has, which is no feature
    heads: set[int]  # how many channels the linear layers take that give the classes, once
    linear: set[int]  # and how many any linear layer takes
    clues: Clues
    modules: dict[str, nn.Module]


_LEVELS = 3
"""From so many grids of one layer on, they are a pyramid. Two are an output and what it was before it was made smaller."""


def _outputs(model: Model, state: State, batch: Batch) -> _Outputs:
    spatial, n = batch.size, batch.n
    modules = dict(opened(model).shell().module.named_modules())
    clues = clues_of(modules[""], spatial)
    runs: Counter[str] = Counter()
    given: list[tuple[str, int, dict[tuple[str, ...], Sides]]] = []

    def see(name: str, args: tuple[Any, ...], out: object) -> None:
        runs[name] += 1
        given.append((name, runs[name], {part: tuple(tensor.shape) for part, tensor in tensors_of(out)}))

    with torch.no_grad():
        output = watch(model, state, batch.x, see)
    found: list[_Output] = []
    pyramid = False
    for name, call, shapes in given:
        forms = {part: form for part, shape in shapes.items() if (form := _on_grid(shape, spatial, n, clues)) is not None}
        pyramid = pyramid or len({form.grid for form in forms.values()}) >= _LEVELS
        for part, form in forms.items() if name else ():
            # A tensor that is alone is found by itself, but not in a tuple in a tuple.
            place = Place(name, call if runs[name] > 1 else None, part if len(shapes) > 1 or len(part) > 1 else ())
            lone = runs[name] == len(shapes) == 1
            found.append(_Output(str(place), type(modules[name]).__name__, shapes[part], form, lone, pyramid))
    classes = _classes_of(output, n)
    linear = {name: taken for name, module in modules.items() if (taken := sides(module)) is not None}
    heads = {inside for name, (inside, outside) in linear.items() if outside in classes - {1} and runs[name] == 1}
    return _Outputs(found, classes, heads, {inside for inside, _ in linear.values()}, clues, modules)


def _on_grid(shape: Sides, spatial: Sides | None, n: int, clues: Clues) -> Form | None:
    """How an output is read, if that can be told from its shape, and it has as many axes as the input, and positions."""
    forms = forms_of(shape, "auto", spatial, n, lambda: clues) if n in shape[:2] else []
    if len(forms) != 1 or (spatial is not None and len(forms[0].grid) != len(spatial)):
        return None
    return forms[0] if math.prod(forms[0].grid) > 1 else None


def _classes_of(output: Any, n: int) -> set[int]:
    try:
        return {1, logits_of(output).shape[1]}
    except (CamError, IndexError):  # no logits: an optical flow, say
        return {1, *(part.shape[1] for _, part in tensors_of(output) if part.ndim > 2 and part.shape[0] == n)}


# ------------------------------------------------------------------------------------------------------ the choice


def _chosen(outputs: _Outputs) -> _Output:
    """As torchcam's rule, the last layer, but for the model itself, class maps, pyramids and class tokens."""
    found, classes, heads, linear, clues, modules = outputs
    known = clues.first | clues.last
    for usable in (
        lambda out: out.lone and not is_auxiliary(out.name),
        lambda out: out.form.channels in heads or not out.pyramid,
        lambda out: out.form.channels not in classes,
        # Attention weights have the axes of a picture, and as many channels as it has heads. What branches are joined to may
        # have a width that only the linear layer behind it has.
        lambda out: (
            len(out.shape) == 3
            or out.form.channels in (clues.last if out.form.last else clues.first)
            or out.form.channels in linear - known
        ),
    ):
        found = [out for out in found if usable(out)] or found
    if any(out.form.prefix and out.form.grid in clues.grids for out in found):
        found = [out for out in found if out.form.grid in clues.grids]  # an image's tokens, which those of a text are not
    return _before_the_last_block(found, modules) if found[-1].form.prefix else found[-1]


def _before_the_last_block(found: list[_Output], modules: dict[str, nn.Module]) -> _Output:
    """Blocks are members of a list, with parts of their own. Those of the class of the last, as deep in the model, count."""

    def is_block(out: _Output) -> bool:
        parent, own = modules[out.name.rpartition(".")[0]], modules[out.name]
        return isinstance(parent, (nn.Sequential, nn.ModuleList)) and any(own.children())

    blocks = [out for out in found if out.form.prefix and out.name in modules and is_block(out)]
    same = [out for out in blocks if (out.kind, out.name.count(".")) == (blocks[-1].kind, blocks[-1].name.count("."))]
    without = [out for out in found if not out.form.prefix]  # the class token may come after all blocks of the others
    return (same[:-1] or without or found)[-1]


# ------------------------------------------------------------------------------------------------------- the clues


def clues_of(model: nn.Module, spatial: Sides | None) -> Clues:
    """What the layers of a model tell about the layout of its activations, for an input of this size."""
    first: set[int] = set()
    last: set[int] = set()
    tokens: set[int] = set()  # widths of batch norms that are of lines, or else of tokens
    axes: set[int] = set()
    grids = {spatial} if spatial else set()
    for module in model.modules():
        if is_convolution(module):
            first |= {module.in_channels, module.out_channels}
            axes.add(len(module.kernel_size))
            if spatial is not None and len(spatial) == len(module.kernel_size) and max(module.stride) > 1:
                grids |= {made for grid in grids if min(made := _strided(module, grid)) > 0}
        elif isinstance(module, _NormBase):
            first.add(module.num_features)
            tokens |= {module.num_features} if isinstance(module, nn.BatchNorm1d) else set()
        elif isinstance(module, nn.GroupNorm):
            first.add(module.num_channels)
        elif isinstance(module, nn.LayerNorm):
            last.add(module.normalized_shape[-1])
    last |= set() if 1 in axes else tokens
    return Clues(frozenset(first), frozenset(last), frozenset(axes), frozenset(grids - {spatial}))


def _strided(conv: _ConvNd, grid: Sides) -> Sides:
    """What a convolution makes of a grid."""
    padding = (0,) * len(grid) if isinstance(conv.padding, str) else conv.padding
    knobs = zip(grid, conv.kernel_size, conv.stride, padding, conv.dilation)
    return tuple((side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, dilation in knobs)
