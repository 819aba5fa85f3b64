"""Group-CAM and ScoreCAM++, whose maps are sums of masks, weighted by the scores of masked inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps, masks, weights
from camfn.formulas.masks import Variation
from camfn.methods._common import (
    Drawing,
    Explained,
    checked_blur,
    checked_size,
    drawn,
    explained,
    gradients_of,
    with_sweep,
    within,
)
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import look, look_with_gradients, without_graph
from camfn.model.inputs import Key
from camfn.sweep.options import Sweep
from camfn.sweep.scoring import Swept, sweep_in_full
from camfn.targets import as_probabilities


@method(weights.group_cam, (Need.ACTIVATIONS, Need.GRADIENTS, Need.MASKED_INPUTS), Cost(2, masked=32, backwards=1))
def group_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    groups: int = 32,
    percentile: float | None = 70,
    blur: tuple[int, float] = (51, 50.0),
    masked: Key = None,
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Group-CAM: sum masks made of groups of channels, each weighted by the score that it adds to a blurred input.

    `M_g = norm(U(relu(sum_{k in g} w_k A_k)))`, `S_g = relu(s(x * M_g + b * (1 - M_g)) - s(b))`, `L = relu(sum_g S_g M_g)`.

    The g are groups of consecutive channels, `w_k` are Grad-CAM's weights, and b is the blurred input. U upsamples linearly to
    the input's size, and norm is min-max normalization. A group that is zero everywhere has the score 0. The cost is the clean
    forward pass, one forward pass of b, and for each target one backward pass and `groups` forward passes.

    An integer target means the probability of that class in s, as in the paper, and its raw output in the gradient.
    Every other target is used unchanged in both. `camfn.targets.logit(c)` therefore scores by the raw output.

    **Arguments**

    - `groups`: the number of groups, cut as by `torch.chunk`. The last group may be smaller, and there are fewer groups if
      there are fewer channels.
    - `percentile`: set a group's values up to this percentile to zero before upsampling. 70 is that of the paper and of the
      authors' first code (March 2021). `None` sets none to zero, as their code does since August 2021.
    - `blur`: kernel size in pixels (an odd number) and standard deviation of the Gaussian. The border is mirrored.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. `sweep` must not set a dtype. The
    `weights` in `camfn.explain` are S, `(n, t, groups)`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.group_cam(model, "1", torch.randn(2, 3, 8, 8), groups=2).shape
    torch.Size([2, 6, 6])

    Zhang et al., Group-CAM: Group Score-Weighted Visual Explanations, 2021 (arXiv 2103.13859).
    """
    _check_groups(groups, percentile)
    kernel, sigma = checked_blur(blur)
    forward, pullback = look_with_gradients(model, layer, x, state, masked, axes, masks=True)
    with without_graph(x, state):
        drawing, spatial = Drawing(relu, size, normalize, layout, axes), tuple(forward.image.shape[2:])
        gradients = gradients_of(explained(forward, target, drawing), pullback)
        del pullback  # free the graph before the sweep
        found = explained(forward, as_probabilities(target), drawing)
        pairs = [(weights.grad_cam(each), part.values) for each, part in zip(gradients, found.reads)]
        levels = [maps.group_levels(*pair, groups) for pair in pairs]
        each = [
            masks.group_cam(level, part.grid, spatial, percentile, part.values.dtype)
            for level, part in zip(levels, found.reads)
        ]
        # The masks of all targets are swept like channels, with a mask of zeros, which scores the blurred input.
        rows = [torch.cat([m.flatten(1, 2), torch.zeros_like(m[:, 0, :1])], 1) for m in each]
        reads = [part._replace(values=values) for part, values in zip(found.reads, rows)]
        variation = Variation(form="given", under=_blurred(forward.image, kernel, sigma, len(forward.batch.pixels.axes.still)))
        swept = sweep_in_full("group_cam", forward, found.score, reads, variation, sweep)
        gains = [weights.group_cam(part.scores, m.shape[2]) for part, m in zip(swept, each)]
        summed = [maps.group_cam(*pair) for pair in zip(gains, each)]
        # Resize before the ReLU: on the grid a mask may be negative, because upsampling does not reach its lowest cell.
        sizes = _sizes(found)
        signed = [maps.resize(m.unflatten(-1, part.grid), to).flatten(2) for m, part, to in zip(summed, reads, sizes)]
        outcome = _counted(drawn(found, signed, sizes), found, swept)
        return outcome._replace(weights=tuple(gains), backwards=found.clean.numel())


def _check_groups(groups: int, percentile: float | None) -> None:
    """Raise an error unless the groups and the percentile are valid."""
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise CamError(f"group_cam needs a whole number of groups >= 1, found {groups!r}")
    if percentile is not None and not 0 <= percentile < 100:
        raise CamError(f"percentile={percentile!r} must be None, or from 0 to less than 100 (70 is the paper's)")


def _sizes(found: Explained) -> list[tuple[int, ...]]:
    """The size of each layer's map."""
    batch, size = found.forward.batch, found.drawing.size
    return [checked_size(size, batch, len(part.grid)) or part.grid for part in found.reads]


def _counted(outcome: Outcome, found: Explained, swept: Sequence[Swept]) -> Outcome:
    """The outcome with the layers' own grids and the cost of the sweep."""
    return with_sweep(outcome, swept)._replace(grids=tuple(part.grid for part in found.reads))


def _blurred(image: Tensor, kernel: int, sigma: float, axes: int) -> Tensor:
    """Blur the last axes of the image in float32 or wider."""
    return maps.blur(image.to(wide(image.dtype)), kernel, sigma, axes).to(image.dtype)


@method(maps.score_cam_pp, (Need.ACTIVATIONS, Need.MASKED_INPUTS), Cost(per_channel=1))
def score_cam_pp(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    masked: Key = None,
    sweep: Sweep = Sweep(),
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """ScoreCAM++: sum the tanh of all channels, each weighted by the score of the input masked with it.

    `M_k = tanh(U(A_k))`, `S_k = s(x * M_k)`, `L = relu(sum_k S_k M_k)`.

    Unlike Score-CAM, there is no min-max normalization within a channel and no softmax over channels, and the map sums the
    masks rather than the activation. In the map, U upsamples to `size`: `size="input"` gives the paper's map. The cost is one
    forward pass for each channel that is not zero everywhere, for any number of targets.

    An integer target means the probability of that class, as in the paper. Use `camfn.targets.logit(c)` for the raw
    output.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`. `sweep` must not set a dtype.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.score_cam_pp(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Chen et al., ScoreCAM++: Gated Score-Weighted Visual Explanations for CNNs, 2024 (arXiv 2404.19341).
    """
    forward = look(model, layer, x, state, masked, axes, masks=True)
    with without_graph(x, state):
        found = explained(forward, as_probabilities(target), Drawing(relu, size, normalize, layout, axes))
        swept = sweep_in_full("score_cam_pp", forward, found.score, found.reads, Variation(form="tanh"), sweep)
        each, sizes = [weights.score_cam(part.scores, "score") for part in swept], _sizes(found)
        scaled = [within(w, found.drawing) for w in each]
        signed = [maps.score_cam_pp(w, p.values, p.grid, to) for w, p, to in zip(scaled, found.reads, sizes)]
        return _counted(drawn(found, signed, sizes), found, swept)._replace(weights=tuple(each))
