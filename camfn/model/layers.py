"""The layers that can be explained, and the choice of one for `layer=None`."""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError, RefusedError
from camfn._types import Inputs, State
from camfn.layouts import Clues, Form, Sides, forms_of, in_doubt
from camfn.model.capture import tap_from, watch
from camfn.model.inputs import Batch, Key, sample
from camfn.model.linear_head import is_auxiliary, is_convolution, sides
from camfn.model.memory import is_exhausted
from camfn.model.ports import Place, tensors_of
from camfn.model.positions import placed
from camfn.model.prepare import Model, opened, prepares
from camfn.model.task import Task, begin
from camfn.targets import logits_of


class Candidate(NamedTuple):
    """A layer that can be explained: its output has a grid of more than one position."""

    name: str
    """The name, as `layer=` takes it: `"layer4"`, `"fpn:0"` for a part of the output, `"block@2"` for one of its calls."""
    kind: str
    """The class of the layer."""
    shape: tuple[int, ...]
    """The shape of its output, including the batch."""
    grid: tuple[int, ...]
    """The spatial size of its output."""
    chosen: bool
    """Whether `layer=None` chooses this layer."""


@prepares
def candidate_layers(
    model: Model, x: Inputs, *, masked: Key = None, axes: str | None = None, state: State | None = None
) -> tuple[Candidate, ...]:
    """List the layers that can be explained, and mark the one that `layer=None` chooses. Takes one forward pass.

    The chosen layer is the last one with a grid, with three exceptions:

    - If a class token precedes the others, it is the block before the last: after the last block, only the class token matters.
    - If a layer returns a pyramid of grids, as in detectors, it is before that layer, unless a linear head takes what follows.
    - A layer with one channel for each class is an output, not a feature, and is not chosen.

    Layers that do not run, and layers whose shape fits several layouts or none, are not listed.

    Args:
        model: a module, or a model prepared by `camfn.prepare`.
        x: the inputs, as in `camfn.score_cam`.
        masked: the key of the input with the pixels, if there are several.
        axes: the order of its axes, as in `camfn.score_cam`.
        state: parameters and buffers by name; the model's own by default.

    Returns:
        The candidates, in the order of execution.

    Raises:
        CamError: if `x`, `masked` or `state` does not fit the model.

    >>> import camfn, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> for layer in camfn.candidate_layers(model, torch.randn(1, 3, 8, 8)):
    ...     print(layer.name, layer.kind, layer.grid, layer.chosen)
    0 Conv2d (6, 6) False
    1 ReLU (6, 6) True
    """
    found = _outputs(begin(model, x, state, masked, axes))
    chosen = _chosen(found) if found.all else None
    return tuple(Candidate(out.name, out.kind, out.shape, out.form.grid, out is chosen) for out in found.all)


class Choice(NamedTuple):
    """The layer that `layer=None` chooses."""

    name: str
    why: str  # the reason, for the end of a message: "the ..."


def choose(task: Task) -> Choice:
    """Choose a layer, by one forward pass, and by those of `placed_forms` for layers that are in doubt."""
    found = _outputs(task)
    if not found.all:
        raise CamError(none_on_a_grid(task.model, task.batch.size))
    chosen = _chosen(found)
    why = "last block but one: after the last, only the class token counts" if chosen.form.prefix else "last layer on a grid"
    return Choice(chosen.name, why)


def stages(task: Task) -> tuple[str, ...]:
    """The chosen layer, and before it the last layer of each larger grid, by one forward pass.

    A grid is larger if all of its sides are. Among layers of one grid, those nested least deeply are preferred: the first
    convolutions of the next stage can have the grid of this one.
    """
    found = _outputs(task)
    if not found.all:
        raise CamError(none_on_a_grid(task.model, task.batch.size))
    last = _chosen(found)
    usable = [out for out in found.all[: found.all.index(last)] if out.lone and out.form.channels not in found.classes]
    ends = [last]
    while finer := [out for out in usable if all(side > after for side, after in zip(out.form.grid, ends[0].form.grid))]:
        same = [out for out in finer if out.form.grid == finer[-1].form.grid]
        ends.insert(0, min(reversed(same), key=lambda out: out.name.count(".")))
    return tuple(out.name for out in ends)


def none_on_a_grid(model: Model, spatial: Sides | None) -> str:
    """The error message if there is no candidate."""
    axes = "spatial axes" if spatial is None else f"{len(spatial)} spatial axes"
    kind = type(opened(model).prepared.model).__name__
    return (
        f"no layer of {kind} has {axes} of more than one position that can be told from its shape; "
        "name one: [name for name, _ in model.named_modules()]"
    )


# ---------------------------------------------------------------------------------------------- the layers' outputs


class _Output(NamedTuple):
    """An output tensor of a layer that has a grid."""

    name: str
    kind: str
    shape: Sides
    form: Form
    lone: bool  # whether the layer ran once and returned only this tensor
    pyramid: bool  # whether this layer, or one before it, returned a pyramid of grids


class _Outputs(NamedTuple):
    """The outputs of all layers, in the order of execution; the model itself is not a layer."""

    all: list[_Output]
    classes: set[int]  # channel counts of outputs: a layer with as many is not a feature
    heads: set[int]  # input widths of the linear layers that run once and return the classes
    linear: set[int]  # input widths of all linear layers
    clues: Clues
    modules: dict[str, nn.Module]


_LEVELS = 3
"""The least number of grids of one layer that are a pyramid. Two are often an output before and after downsampling."""


class _Seen(NamedTuple):
    """A tensor that a layer returned."""

    name: str  # of the output, as `layer=` takes it
    layer: str
    shape: Sides
    lone: bool


def _outputs(task: Task) -> _Outputs:
    modules = dict(task.model.borrow().module.named_modules())
    clues = clues_of(modules[""], task.batch)
    output, runs = _watched(task)
    forms = {seen.name: _forms_on_grid(seen.shape, task.batch, clues) for run in runs for seen in run}
    forms |= placed_forms(task, {name: some for name, some in forms.items() if in_doubt(some)})
    found: list[_Output] = []
    pyramid = False
    for run in runs:
        clear = [(seen, forms[seen.name][0]) for seen in run if len(forms[seen.name]) == 1]
        pyramid = pyramid or len({form.grid for _, form in clear}) >= _LEVELS
        found += [
            _Output(seen.name, type(modules[seen.layer]).__name__, seen.shape, form, seen.lone, pyramid) for seen, form in clear
        ]
    count = Counter(run[0].layer for run in runs if run)
    classes = _classes_of(output, task.batch.n)
    linear = {name: taken for name, module in modules.items() if (taken := sides(module)) is not None}
    heads = {inside for name, (inside, outside) in linear.items() if outside in classes - {1} and count[name] == 1}
    return _Outputs(found, classes, heads, {inside for inside, _ in linear.values()}, clues, modules)


def _watched(task: Task) -> tuple[Any, list[list[_Seen]]]:
    """Run the model, and return its output and the tensors of each run of a layer, in the order of execution."""
    count: Counter[str] = Counter()
    given: list[tuple[str, int, dict[tuple[str, ...], Sides]]] = []

    def see(name: str, args: tuple[Any, ...], out: object) -> None:
        count[name] += 1
        given.append((name, count[name], {part: tuple(tensor.shape) for part, tensor in tensors_of(out)}))

    with torch.no_grad():
        output = watch(task.model, task.state, task.batch.x, see)

    def seen(name: str, call: int, part: tuple[str, ...], shapes: dict[tuple[str, ...], Sides]) -> _Seen:
        # A single tensor needs no part in its name, unless it is nested more than one level deep.
        place = Place(name, call if count[name] > 1 else None, part if len(shapes) > 1 or len(part) > 1 else ())
        return _Seen(str(place), name, shapes[part], count[name] == len(shapes) == 1)

    return output, [[seen(name, call, part, shapes) for part in shapes] for name, call, shapes in given if name]


def _forms_on_grid(shape: Sides, batch: Batch, clues: Clues) -> list[Form]:
    """The forms that an output's shape fits, with as many spatial axes as the input and more than one position."""
    forms = forms_of(shape, "auto", batch.size, batch.n, lambda: clues) if batch.n in shape[:2] else []
    axes = len(batch.size) if batch.size else None
    return [form for form in forms if math.prod(form.grid) > 1 and axes in (None, len(form.grid))]


def placed_forms(task: Task, forms: dict[str, list[Form]]) -> dict[str, list[Form]]:
    """Keep the forms of each layer whose positions follow the input's, by forward passes of changed inputs.

    The inputs are noise and the state is the model's own under a transform, so the forms are the same there. Where the model
    does not accept the inputs, all forms are kept.
    """
    if not forms or _compat.compiling():
        return forms
    own = _compat.transformed()

    def run(batch: Batch) -> dict[str, Tensor]:
        private = task.model.borrow()
        tap = tap_from(private, list(forms))
        return dict(zip(forms, tap(dict(private.tensors) if own else task.state, batch.x).seen))

    try:
        with _compat.outside_transforms(), torch.inference_mode(False), torch.no_grad():
            return placed(run, task.batch._replace(x=sample(task.batch.x)) if own else task.batch, forms)
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return forms


def _classes_of(output: Any, n: int) -> set[int]:
    try:
        return {1, logits_of(output).shape[1]}
    except (CamError, IndexError):  # no logits, as in an optical-flow model
        return {1, *(part.shape[1] for _, part in tensors_of(output) if part.ndim > 2 and part.shape[0] == n)}


# ------------------------------------------------------------------------------------------------------ the choice


def _chosen(outputs: _Outputs) -> _Output:
    """The last layer, as in torchcam; but not the model itself, class maps, pyramids, or the last block with a class token."""
    found, classes, heads, linear, clues, modules = outputs
    known = clues.first | clues.last
    for usable in (
        lambda out: out.lone and not is_auxiliary(out.name),
        lambda out: out.form.channels in heads or not out.pyramid,
        lambda out: out.form.channels not in classes,
        # Attention weights have the axes of an image, with the heads as channels; no layer has that width. The concatenation
        # of branches may have a width that only the following linear layer has.
        lambda out: (
            len(out.shape) == 3
            or out.form.channels in (clues.last if out.form.last else clues.first)
            or out.form.channels in linear - known
        ),
    ):
        found = [out for out in found if usable(out)] or found
    if any(out.form.prefix and out.form.grid in clues.grids for out in found):
        found = [out for out in found if out.form.grid in clues.grids]  # drops the tokens of a text
    return _before_the_last_block(found, modules) if found[-1].form.prefix else found[-1]


def _before_the_last_block(found: list[_Output], modules: dict[str, nn.Module]) -> _Output:
    """The block before the last. Blocks are members of a list with submodules, of one class and one depth of nesting."""

    def is_block(out: _Output) -> bool:
        parent, own = modules[out.name.rpartition(".")[0]], modules[out.name]
        return isinstance(parent, (nn.Sequential, nn.ModuleList)) and any(own.children())

    blocks = [out for out in found if out.form.prefix and out.name in modules and is_block(out)]
    same = [out for out in blocks if (out.kind, out.name.count(".")) == (blocks[-1].kind, blocks[-1].name.count("."))]
    without = [out for out in found if not out.form.prefix]  # the class token may be added after the other blocks
    return (same[:-1] or without or found)[-1]


# ------------------------------------------------------------------------------------------------------- the clues


def clues_of(model: nn.Module, batch: Batch) -> Clues:
    """Clues from the layers of a model about the layout of its activations, for these inputs."""
    spatial = batch.size
    first: set[int] = set()
    last: set[int] = set()
    linear: set[int] = set()
    tokens: set[int] = set()  # widths of 1-d batch norms: of sequences if the model has 1-d convolutions, else of tokens
    axes: set[int] = set()
    grids = {spatial} if spatial else set()
    for module in model.modules():
        if is_convolution(module):
            first |= {module.in_channels, module.out_channels}
            axes.add(len(module.kernel_size))
            covered = {len(spatial), len(batch.pixels.axes.still)} if spatial else set()
            if max(module.stride) > 1 and len(module.kernel_size) in covered:
                grids |= {made for grid in grids if min(made := _strided(module, grid)) > 0}
        elif isinstance(module, _NormBase):
            first.add(module.num_features)
            tokens |= {module.num_features} if isinstance(module, nn.BatchNorm1d) else set()
        elif isinstance(module, nn.GroupNorm):
            first.add(module.num_channels)
        elif isinstance(module, nn.LayerNorm):
            last.add(module.normalized_shape[-1])
        elif isinstance(module, nn.Linear):
            linear |= {module.in_features, module.out_features}
        elif isinstance(module, nn.RNNBase):
            linear |= {module.input_size, module.hidden_size * (1 + module.bidirectional)}
        elif isinstance(module, nn.MultiheadAttention):
            linear.add(module.embed_dim)
    last |= set() if 1 in axes else tokens
    found = frozenset(first), frozenset(last), frozenset(linear), frozenset(axes)
    return Clues(*found, frozenset(grids - {spatial}))


def _strided(conv: _ConvNd, grid: Sides) -> Sides:
    """The output grid of a convolution. One over frames leaves their axis, the first, as it is."""
    if len(grid) > len(conv.kernel_size):
        return grid[0], *_strided(conv, grid[1:])
    padding = (0,) * len(grid) if isinstance(conv.padding, str) else conv.padding
    knobs = zip(grid, conv.kernel_size, conv.stride, padding, conv.dilation)
    return tuple((side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, dilation in knobs)
