"""The layers that can be explained, and the choice of one for `layer=None`."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from camfn import _compat
from camfn._errors import CamError, RefusedError
from camfn._types import Inputs, State
from camfn.layouts import Clues, Form, Sides, forms_of, in_doubt, restored, view_of
from camfn.model.capture import Captured, tap_from, watch
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
    why: str
    """Why it is chosen, or why not."""


@prepares
def candidate_layers(
    model: Model, x: Inputs, *, masked: Key = None, axes: str | None = None, state: State | None = None
) -> tuple[Candidate, ...]:
    """List the layers that can be explained, and mark the one that `layer=None` chooses.

    It takes one forward pass, and those of changed inputs for layers that its shapes leave in doubt, as tokens do.

    The chosen layer is the last one with a grid, with these exceptions:

    - If other tokens stand beside the grid, as a class token does, it is the block before the last: after the last block, only
      these tokens matter.
    - If a layer returns a pyramid of grids, or is given one, as the heads of detectors are, it is before that layer, unless a
      linear head takes what follows.
    - A layer with one channel for each class is an output, not a feature, and is not chosen. An embedding has no classes.

    Some methods take the norm after the chosen layer instead, if only the norm reads it: those that multiply activation and
    gradient at each position, as `camfn.hires_cam` does, since such products cancel before a layer norm, and those that were
    better there (see docs/layers.md).

    Layers that do not run, layers whose shape fits several layouts or none, and layers whose positions do not follow those of
    the input, such as learned queries, are not listed.

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
    if not found.all:
        return ()
    chosen, why = _chosen(found)
    return tuple(
        Candidate(out.name, out.kind, out.shape, out.form.grid, out is chosen, why.get(out.name, EARLIER)) for out in found.all
    )


Site = Literal["block", "norm", "none"]
"""Where a method explains a model that does not depend on the lengths of a layer's vectors: there, at the norm after it, or at
no layer that is known (`benchmarks/layers.py`)."""


class Choice(NamedTuple):
    """The layer that `layer=None` chooses."""

    name: str
    why: str  # the reason, for the end of a message: "the ..."
    forwards: int = 1  # forward passes of the inputs that the choice took


def choose(task: Task, site: Site = "block") -> Choice:
    """Choose a layer, by one forward pass, and by those of `placed_forms` for layers that are in doubt.

    For other sites than `"block"`, three forward passes more tell whether the model depends on the lengths of the layer's
    vectors. They are taken only if layers of the same grid follow. Where it does not, products of activation and gradient
    cancel.
    """
    found = _outputs(task)
    if not found.all:
        raise CamError(none_on_a_grid(task.model, task.batch.size))
    chosen, why = _chosen(found)
    after = [out for out in found.all[found.all.index(chosen) + 1 :] if _is_like(out, chosen)][:_NORMS]
    tried = {"block": [], "norm": [chosen, *after], "none": [chosen]}[site] if after else []
    forwards = 1
    for out in tried:
        forwards += 3
        if _length_matters(task, out):
            later = f"first layer after {chosen.name!r} whose vectors' lengths count, which this method needs"
            return Choice(out.name, why[out.name] if out is chosen else later, forwards)
    none = "" if site != "none" or not tried else f"; {_NO_PLACE}"
    return Choice(chosen.name, why[chosen.name] + none, forwards)


_NO_PLACE = (
    "but this method was no better than its controls at any layer of such a transformer that was tried, so compare it with "
    "another class (camfn.explain(check=True)), or take hires_cam"
)


def stages(task: Task) -> tuple[str, ...]:
    """The chosen layer, and before it the last layer of each larger grid, by one forward pass.

    A grid is larger if all of its sides are. Among layers of one grid, those nested least deeply are preferred: the first
    convolutions of the next stage can have the grid of this one.
    """
    found = _outputs(task)
    if not found.all:
        raise CamError(none_on_a_grid(task.model, task.batch.size))
    last, _ = _chosen(found)
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


# --------------------------------------------------------------------------------------- the lengths of its vectors


_NORMS = 3
"""The number of layers after the chosen one that are tried."""
_LITTLE = 0.02
"""The change of the output, as a share of that by other changes of the layer, below which lengths do not count."""


def _is_like(out: "_Output", chosen: "_Output") -> bool:
    return out.lone and (out.form.grid, out.form.channels) == (chosen.form.grid, chosen.form.channels)


def _length_matters(task: Task, out: "_Output") -> bool:
    """Whether the output changes if the vector at each position is scaled, compared with a scaling of each channel.

    A layer norm takes the length off a vector. So it does not matter before one, unless the vector also goes elsewhere.
    """
    own = _compat.transformed()
    generator = torch.Generator().manual_seed(0)

    def run(nudge: tuple[Tensor, ...] | None = None) -> Captured:
        private = task.model.borrow()
        given = (dict(private.tensors), sample(task.batch.x)) if own else (task.state, task.batch.x)
        return tap_from(private, [out.name])(*given, nudge)

    def change(clean: Captured, axis: int) -> float:
        seen = clean.seen[0].detach()
        values = view_of(out.form, seen)
        shape = [side if number == axis else 1 for number, side in enumerate(values.shape)]
        factors = (0.5 + torch.rand(shape, generator=generator)).to(values)
        return _apart(run((restored(out.form, seen, factors * values) - seen,)).output, clean.output)

    try:
        with _compat.outside_transforms(), torch.inference_mode(False), torch.no_grad():
            clean = run()
            return change(clean, 2) > _LITTLE * change(clean, 1)
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return True  # the output has no fixed shape, or the layer cannot be changed


def _apart(one: Any, other: Any) -> float:
    """The largest difference between two outputs: of their logits, or of all tensors if the output has no logits."""
    pairs = zip(_told(one), _told(other), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a.is_floating_point() and a.numel())


def _told(output: Any) -> list[Tensor]:
    try:
        return [logits_of(output)]
    except CamError:
        return [tensor for _, tensor in tensors_of(output)]


# ---------------------------------------------------------------------------------------------- the layers' outputs


class _Output(NamedTuple):
    """An output tensor of a layer that has a grid."""

    name: str
    layer: str
    kind: str
    shape: Sides
    form: Form
    lone: bool  # whether the layer ran once and returned only this tensor
    pyramid: bool  # whether it follows a layer that returned a pyramid of grids, or is inside one that is given one


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


class _Watched(NamedTuple):
    """The clean forward pass, layer by layer."""

    output: Any
    runs: list[list[_Seen]]  # of each run of a layer, in the order of execution
    given: dict[str, list[Sides]]  # the shapes of the tensors that each layer is given


def _outputs(task: Task) -> _Outputs:
    modules = dict(task.model.borrow().module.named_modules())
    clues = clues_of(modules[""], task.batch)
    output, runs, given = _watched(task)
    forms = {seen.name: _forms_on_grid(seen.shape, task.batch, clues) for run in runs for seen in run}
    doubtful = {name: some for name, some in forms.items() if in_doubt(some)}
    forms |= placed_forms(task, doubtful, False)
    # A second look costs more, and is taken after the last layer that is clear: of those before it, none would be chosen.
    last = max((number for number, name in enumerate(forms) if len(forms[name]) == 1), default=-1)
    forms |= placed_forms(task, {name: doubtful[name] for name in [*forms][last + 1 :] if name in doubtful})
    takers = [f"{name}." for name, shapes in given.items() if _is_pyramid(shapes, task.batch, clues)]
    found: list[_Output] = []
    pyramid = False
    for run in runs:
        clear = [(seen, forms[seen.name][0]) for seen in run if len(forms[seen.name]) == 1]
        pyramid = pyramid or len({form.grid for _, form in clear}) >= _LEVELS
        for seen, form in clear:
            inside = pyramid or seen.layer.startswith(tuple(takers))
            found.append(
                _Output(seen.name, seen.layer, type(modules[seen.layer]).__name__, seen.shape, form, seen.lone, inside)
            )
    count = Counter(run[0].layer for run in runs if run)
    classes = _classes_of(output, task.batch.n)
    linear = {name: taken for name, module in modules.items() if (taken := sides(module)) is not None}
    heads = {inside for name, (inside, outside) in linear.items() if outside in classes - {1} and count[name] == 1}
    outputs = classes if _is_dense(output) else classes - _features(found, modules)
    return _Outputs(found, outputs, heads, {inside for inside, _ in linear.values()}, clues, modules)


def _is_pyramid(shapes: list[Sides], batch: Batch, clues: Clues) -> bool:
    """Whether tensors of these shapes have grids of several sizes."""
    forms = (_forms_on_grid(shape, batch, clues) for shape in shapes if len(shapes) >= _LEVELS)
    return len({some[0].grid for some in forms if len(some) == 1}) >= _LEVELS


def _watched(task: Task) -> _Watched:
    """Run the model, and collect what each layer is given and returns."""
    taken: dict[str, list[Sides]] = {}
    count: Counter[str] = Counter()
    given: list[tuple[str, int, dict[tuple[str, ...], Sides]]] = []

    def see(name: str, args: tuple[Any, ...], out: object) -> None:
        count[name] += 1
        taken[name] = [tuple(tensor.shape) for _, tensor in tensors_of(args)] if name else []
        given.append((name, count[name], {part: tuple(tensor.shape) for part, tensor in tensors_of(out)}))

    with torch.no_grad():
        output = watch(task.model, task.state, task.batch.x, see)

    def seen(name: str, call: int, part: tuple[str, ...], shapes: dict[tuple[str, ...], Sides]) -> _Seen:
        # A single tensor needs no part in its name, unless it is nested more than one level deep.
        place = Place(name, call if count[name] > 1 else None, part if len(shapes) > 1 or len(part) > 1 else ())
        return _Seen(str(place), name, shapes[part], count[name] == len(shapes) == 1)

    runs = [[seen(name, call, part, shapes) for part in shapes] for name, call, shapes in given if name]
    return _Watched(output, runs, taken)


def _forms_on_grid(shape: Sides, batch: Batch, clues: Clues) -> list[Form]:
    """The forms that an output's shape fits, with as many spatial axes as the input and more than one position."""
    forms = forms_of(shape, "auto", batch.size, batch.n, lambda: clues) if batch.n in shape[:2] else []
    axes = len(batch.size) if batch.size else None
    return [form for form in forms if math.prod(form.grid) > 1 and axes in (None, len(form.grid))]


def placed_forms(task: Task, forms: dict[str, list[Form]], twice: bool = True) -> dict[str, list[Form]]:
    """Keep the forms of each layer whose positions follow the input's, by forward passes of changed inputs.

    The inputs are noise and the state is the model's own under a transform, so the forms are the same there. Where the model
    does not accept the inputs, all forms are kept.
    """
    if not forms:
        return forms
    own = _compat.transformed()

    def run(batch: Batch) -> dict[str, Tensor]:
        private = task.model.borrow()
        tap = tap_from(private, list(forms))
        return dict(zip(forms, tap(dict(private.tensors) if own else task.state, batch.x).seen))

    try:
        with _compat.outside_transforms(), torch.inference_mode(False), torch.no_grad():
            return placed(run, task.batch._replace(x=sample(task.batch.x)) if own else task.batch, forms, twice)
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return forms


def _watched_plainly(task: Task) -> _Watched:
    """The same with plain tensors, also under a transform."""
    if not _compat.transformed():
        return _watched(task)
    state, x = dict(task.model.borrow().tensors), sample(task.batch.x)
    with _compat.outside_transforms():
        return _watched(task._replace(state=state, batch=task.batch._replace(x=x)))


_EARLY = 3
"""The number of layers that are asked for the places of a model's tokens. In the first ones, attention has mixed them least."""


def placed_tokens(task: Task, forms: list[Form]) -> list[Form]:
    """Keep the forms of the model's tokens, by layers that return as many; all forms if no such layer shows its positions."""
    counts = {math.prod(form.grid) + form.prefix + form.suffix for form in forms}
    n = task.batch.n
    several: dict[str, list[Form]] = {}
    for seen in (seen for run in _watched_plainly(task).runs for seen in run if len(seen.shape) == 3):
        for sequence in (False, True):
            if seen.shape[int(not sequence)] in counts and seen.shape[int(sequence)] == n:
                own = [form._replace(channels=seen.shape[2], sequence=sequence) for form in forms]
                several[seen.name] = several.get(seen.name, []) + own
    first = dict(itertools.islice(several.items(), _EARLY))
    found = [kept[0] for kept in placed_forms(task, first, False).values() if len(kept) == 1]
    return [form for form in forms if found and (form.prefix, form.grid) == (found[0].prefix, found[0].grid)] or forms


def _classes_of(output: Any, n: int) -> set[int]:
    try:
        return {1, logits_of(output).shape[1]}
    except (CamError, IndexError):  # no logits, as in an optical-flow model
        return {1, *(part.shape[1] for _, part in tensors_of(output) if part.ndim > 2 and part.shape[0] == n)}


def _is_dense(output: Any) -> bool:
    """Whether the model's output has a grid, as that of a segmentation model."""
    try:
        return logits_of(output).ndim > 2
    except CamError:
        return True


def _features(found: list[_Output], modules: dict[str, nn.Module]) -> set[int]:
    """Widths of several layers with weights. An output of one of them is an embedding: a class layer is alone in its width."""
    weighted = [out for out in found if [*modules[out.layer].parameters(recurse=False)]]
    return {width for width, count in Counter(out.form.channels for out in weighted).items() if count > 1}


# ------------------------------------------------------------------------------------------------------ the choice


EARLIER = "earlier layer"
_LAST = "last layer on a grid"
_BEFORE_LAST = "last block but one: after the last, only the tokens beside the grid count"


def _chosen(outputs: _Outputs) -> tuple[_Output, dict[str, str]]:
    """The last layer, as in torchcam, that no rule leaves out; and why it is chosen, and others are not, by name.

    A rule that would leave out all layers is not applied.
    """
    found, classes, heads, linear, clues, modules = outputs
    known = clues.first | clues.last
    rules: dict[str, Callable[[_Output], bool]] = {
        "it runs several times, or returns several tensors": lambda out: out.lone,
        "it belongs to an auxiliary head": lambda out: not is_auxiliary(out.name),
        "it belongs to a head, which takes grids of several sizes": lambda out: out.form.channels in heads or not out.pyramid,
        "it is an output, with a channel for each class": lambda out: out.form.channels not in classes,
        # Attention weights have the axes of an image, with the heads as channels; no layer has that width. Keys and values
        # together have one that no norm has. The concatenation of branches may have a width that only a linear layer takes.
        "no layer has its number of channels, as with attention weights": lambda out: (
            out.form.channels in (clues.last if out.form.last else clues.first) or out.form.channels in linear - known
        ),
    }
    why: dict[str, str] = {}
    for reason, usable in rules.items():
        found = _kept(found, usable, reason, why)
    if any(_has_extra(out) and out.form.grid in clues.grids for out in found):
        found = _kept(found, lambda out: out.form.grid in clues.grids, "its tokens are not those of the patches", why)
    if not _has_extra(found[-1]):
        return found[-1], {**why, found[-1].name: _LAST}
    chosen = _before_the_last_block(found, modules)
    later = found[found.index(chosen) + 1 :]
    return chosen, {**why, **{out.name: "it is after the last block but one" for out in later}, chosen.name: _BEFORE_LAST}


def _kept(found: list[_Output], usable: Callable[[_Output], bool], reason: str, why: dict[str, str]) -> list[_Output]:
    """Keep the usable outputs, and add to `why` the reason for the others; all outputs if none is usable."""
    kept = [out for out in found if usable(out)]
    if kept:
        why |= {out.name: reason for out in found if not usable(out)}
    return kept or found


def _has_extra(out: _Output) -> bool:
    """Whether other tokens stand beside the grid."""
    return out.form.prefix + out.form.suffix > 0


def _before_the_last_block(found: list[_Output], modules: dict[str, nn.Module]) -> _Output:
    """The block before the last. Blocks are members of a list with submodules, of one class and one depth of nesting."""

    def is_block(out: _Output) -> bool:
        parent, own = modules[out.name.rpartition(".")[0]], modules[out.name]
        return isinstance(parent, (nn.Sequential, nn.ModuleList)) and any(own.children())

    blocks = [out for out in found if _has_extra(out) and out.name in modules and is_block(out)]
    same = [out for out in blocks if (out.kind, out.name.count(".")) == (blocks[-1].kind, blocks[-1].name.count("."))]
    if same and same[-1].name != _last_child(same[-1].name, modules):
        return same[-1]  # the last block does not show its positions, or is left out for another reason
    without = [out for out in found if not _has_extra(out)]  # the class token may be added after the other blocks
    return (same[:-1] or without or found)[-1]


def _last_child(name: str, modules: dict[str, nn.Module]) -> str:
    """The name of the last module in the list that has this one."""
    parent = name.rpartition(".")[0]
    return f"{parent}.{[*modules[parent]._modules][-1]}".lstrip(".")


# ------------------------------------------------------------------------------------------------------- the clues


def clues_of(model: nn.Module, batch: Batch) -> Clues:
    """Clues from the layers of a model about the layout of its activations, for these inputs."""
    spatial = batch.size
    first: set[int] = set()
    last: set[int] = set()
    linear: set[int] = set()
    permuted: set[int] = set()
    tokens: set[int] = set()  # widths of 1-d batch norms: of sequences if the model has 1-d convolutions, else of tokens
    axes: set[int] = set()
    grids = {spatial} if spatial else set()
    for module in model.modules():
        if is_convolution(module):
            first |= {module.in_channels, module.out_channels}
            permuted |= set() if spatial or isinstance(batch.x, list) else {module.out_channels}
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
    return Clues(*found, frozenset(grids - {spatial}), frozenset(permuted))


def _strided(conv: _ConvNd, grid: Sides) -> Sides:
    """The output grid of a convolution. One over frames leaves their axis, the first, as it is."""
    if len(grid) > len(conv.kernel_size):
        return grid[0], *_strided(conv, grid[1:])
    padding = (0,) * len(grid) if isinstance(conv.padding, str) else conv.padding
    knobs = zip(grid, conv.kernel_size, conv.stride, padding, conv.dilation)
    return tuple((side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, dilation in knobs)
