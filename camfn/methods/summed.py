"""Methods that score masked inputs by masks of their own, and whose maps are sums of these masks: Group-CAM, ScoreCAM++."""

from functools import reduce

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import FlatMaps, Gradients, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, weights
from camfn.formulas.masks import Variation, gate
from camfn.formulas.scaling import unit
from camfn.layouts import Read
from camfn.methods.sweeps import sweep_in_full
from camfn.methods.table import Drawing, Outcome, checked_size, clean_scores, drawn, method, read, slopes_at, within
from camfn.model.forward import look, without_graph
from camfn.model.inputs import Key
from camfn.sweep.options import Sweep
from camfn.targets import as_probabilities, resolve

_AT_ONCE = 64  # maps at the input's size


@method("activations", "gradients", "masked inputs", cost="32 + 2, 1 backward")
def group_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    groups: int = 32,
    percentile: float | None = None,
    blur: tuple[int, float] = (51, 50.0),
    masked: Key = None,
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Group-CAM: Grad-CAM in groups of channels, each weighted by what it adds to a blurred input.

    `M_g = norm(U(relu(sum_{k in g} w_k A_k)))` over `groups` groups of consecutive channels, `w_k` being Grad-CAM's;
    `S_g = relu(s(x * M_g + b * (1 - M_g)) - s(b))` with the blurred input b; `L = relu(sum_g S_g M_g)`. norm is min-max, and a
    group that is zero throughout has the score 0. For each target `groups` forwards, and for all of them one of b.

    - A plain class stands for its probability in s, as in the paper, and for the raw output in the gradient. Every other
      target is itself in both: `camfn.targets.logit(c)` scores by the raw output.
    - `groups`: as `torch.chunk` cuts them; the last may be smaller, and there are fewer where there are fewer channels.
    - `percentile=70` is the paper's: what is not above this percentile of a group's map is zero before it is upsampled. The
      authors' first code, and `None`, have none.
    - `blur`: pixels (an odd number) and standard deviation of the Gaussian; at the border the input is mirrored.

    The other arguments, and what is returned and raised, are those of `camfn.score_cam`, without a recipe and a budget, and
    without a dtype of the sweep. `weights` on the card are `S`, `(n, t, groups)`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.group_cam(model, "1", torch.randn(2, 3, 8, 8), groups=2).shape
    torch.Size([2, 6, 6])

    Zhang et al., Group-CAM: Group Score-Weighted Visual Explanations, 2021 (arXiv 2103.13859).
    """
    _check_groups(groups, percentile)
    kernel, sigma = maps.checked_blur(blur)
    subject = look(model, layer, x, state, masked, masks=True, graph=True)
    with without_graph():
        n, device = subject.n, subject.image.device
        slopes = slopes_at(subject, resolve(target, subject.output, n, device), layout)
        score = resolve(as_probabilities(target), subject.output, n, device)
        clean = clean_scores(subject, score)
        subject = subject._replace(pull=None)  # and with it the graph
        reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        spatial = tuple(subject.image.shape[2:])
        masks = [_group_masks(part, slope, groups, percentile, spatial) for part, slope in zip(reads, slopes)]
        # The masks of all targets are swept as channels, and a mask of zeros beside them, which scores the blurred input.
        each = [torch.cat([m.flatten(1, 2), torch.zeros_like(m[:, 0, :1])], 1) for m in masks]
        rows = [part._replace(values=values) for part, values in zip(reads, each)]
        under = _blurred(subject.image, kernel, sigma)
        swept = sweep_in_full("group_cam", subject, score, rows, Variation(form="given"), sweep, under)
        found = tuple(weights.gain(part.scores, m.shape[2]) for part, m in zip(swept, masks))
        summed = [torch.einsum("ntg,ntgp->ntp", w, m.to(w.dtype)) for w, m in zip(found, masks)]
        # To the size before the ReLU: on the grid a mask may begin below 0, where upsampling does not reach its lowest cell.
        sizes = [checked_size(size, subject.x, subject.key, len(part.grid)) or part.grid for part in reads]
        signed = [maps.resize(s.unflatten(-1, r.grid), to).flatten(2) for s, r, to in zip(summed, reads, sizes)]
        outcome = drawn(subject, score, clean, signed, sizes, Drawing(relu, size, normalize))
        forwards = outcome.forwards + sum(part.forwards for part in swept)
        grids = tuple(part.grid for part in reads)
        return outcome._replace(weights=found, grids=grids, forwards=forwards, backwards=clean.numel())


def _check_groups(groups: int, percentile: float | None) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise CamError(f"group_cam needs a whole number of groups >= 1, found {groups!r}")
    if percentile is not None and not 0 <= percentile < 100:
        raise CamError(f"percentile={percentile!r} must be None, or from 0 to less than 100 (70 is the paper's)")


def _group_masks(part: Read, slopes: Gradients, groups: int, percentile: float | None, size: tuple[int, ...]) -> Tensor:
    """The masks of each target's groups `(n, t, g, p)`: such that, upsampled to `size`, they begin at 0 and end at 1."""
    pieces = zip(weights.grad_cam(slopes).chunk(groups, -1), part.values.chunk(groups, 1))
    levels = torch.relu(torch.stack([maps.combine(unit(w, -1), values) for w, values in pieces], 2))  # each is normalised
    if percentile is not None:
        bound = maps.percentile(levels, percentile)
        levels = torch.where(levels > bound, levels, 0)
    # Upsampling is linear: scaled on the grid by the extremes of what is upsampled, a map is upsampled to a scaled one.
    pieces = levels.flatten(0, 2).unflatten(-1, part.grid).split(_AT_ONCE)
    extremes = torch.cat([_extremes(maps.resize(some, size).flatten(1)) for some in pieces])
    low, high = extremes.reshape(*levels.shape[:3], 2).split(1, -1)
    flat = maps.is_flat(low, high, part.values.dtype)
    return torch.where(flat, 0, (levels - low) / torch.where(flat, 1, high - low))


def _extremes(values: Tensor) -> Tensor:
    return torch.stack([values.amin(-1), values.amax(-1)], -1)


def _blurred(image: Tensor, kernel: int, sigma: float) -> Tensor:
    return maps.blur(image.to(wide(image.dtype)), kernel, sigma, image.ndim - 2).to(image.dtype)


@method("activations", "masked inputs", cost="channels + 1")
def score_cam_pp(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    masked: Key = None,
    sweep: Sweep = Sweep(),
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """ScoreCAM++: each channel opens a soft gate to the input, and is weighted by the score of what comes through.

    `M_k = tanh(U(A_k))`, `S_k = s(x * M_k)`, `L = relu(sum_k S_k M_k)`: no min-max within a channel, no softmax over them, and
    the gates are what is summed. In the map U upsamples to the size that is asked for: `size="input"` is the paper's map.
    One forward for every channel that is not zero throughout, for any number of targets.

    A plain class stands for its probability in s, as in the paper; `camfn.targets.logit(c)` for the raw output. The other
    arguments, and what is returned and raised, are those of `camfn.score_cam`, without a recipe and a budget, and without a
    dtype of the sweep.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.score_cam_pp(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Chen et al., ScoreCAM++: Gated Score-Weighted Visual Explanations for CNNs, 2024 (arXiv 2404.19341).
    """
    subject = look(model, layer, x, state, masked, masks=True)
    with without_graph():
        score = resolve(as_probabilities(target), subject.output, subject.n, subject.image.device)
        clean = clean_scores(subject, score)
        reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
        swept = sweep_in_full("score_cam_pp", subject, score, reads, Variation(form="tanh"), sweep)
        found = tuple(weights.score(part.scores) for part in swept)
        sizes = [checked_size(size, subject.x, subject.key, len(part.grid)) or part.grid for part in reads]
        drawing = Drawing(relu, size, normalize)
        signed = [_gated(within(w, drawing), part, grid) for w, part, grid in zip(found, reads, sizes)]
        outcome = drawn(subject, score, clean, signed, sizes, drawing)
        forwards = outcome.forwards + sum(part.forwards for part in swept)
        return outcome._replace(weights=found, grids=tuple(part.grid for part in reads), forwards=forwards)


def _gated(scores: Tensor, part: Read, size: tuple[int, ...]) -> FlatMaps:
    """`sum_k S_k tanh(U(A_k))`, some channels at a time."""
    pieces = zip(scores.split(_AT_ONCE, -1), part.values.to(scores.dtype).unflatten(-1, part.grid).split(_AT_ONCE, 1))
    return reduce(torch.add, (maps.combine(w, gate("tanh", maps.resize(values, size)).flatten(2)) for w, values in pieces))
