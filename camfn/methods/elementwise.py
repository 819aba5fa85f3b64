"""Methods that weigh every position of a channel by the gradient of the score there."""

import itertools

from torch import nn

from camfn._errors import CamError
from camfn._types import Combine, Gradients, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import maps, weights
from camfn.formulas.maps import Fuse
from camfn.methods._common import Drawing, Graded, checked_size, grade_layer, weighed_by_gradients, within
from camfn.methods.registry import Cost, Need, Outcome, method


@method(weights.hires_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def hires_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """HiResCAM: the activation times the score's gradient, position by position, summed over channels.

    `L = sum_k G_k * A_k`. One forward, and one backward for each target; no ReLU in the paper. Where what comes after the layer
    is piecewise linear, the sum of the map is the score less what its biases contribute.

    The arguments, and what is returned and raised, are those of `camfn.grad_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> raw = camfn.hires_cam(model, "1", x, 3, normalize=False)
    >>> torch.allclose(raw.sum((1, 2)) + model[3].bias[3], model(x)[:, 3], atol=1e-5)
    True

    Draelos & Carin, Use HiResCAM instead of Grad-CAM, 2020 (arXiv 2011.08891).
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
    return weighed_by_gradients(graded, [weights.hires_cam(gradients) for gradients in graded.gradients])


@method(weights.grad_cam_elementwise, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def grad_cam_elementwise(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Element-wise Grad-CAM: HiResCAM of what speaks for the target alone, the ReLU before the sum over channels.

    `L = sum_k relu(G_k * A_k)`. One forward, and one backward for each target. Where no activation is negative it is
    `camfn.layer_cam`. Nothing is negative: `relu` changes nothing.

    The arguments, and what is returned and raised, are those of `camfn.grad_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(camfn.grad_cam_elementwise(model, "1", x), camfn.layer_cam(model, "1", x), atol=1e-6)
    True

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261), as Grad-CAM-E; pytorch-grad-cam's
    `GradCAMElementWise`.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
    return weighed_by_gradients(graded, [weights.grad_cam_elementwise(*pair) for pair in graded.pairs])


@method(weights.layer_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def layer_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    fuse: Fuse | None = None,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """LayerCAM: each position of each channel is weighted by its own gradient, where that is positive.

    `L = relu(sum_k relu(G_k) * A_k)`. One forward, and one backward for each target. Made for shallow layers too, and for maps
    of several layers in one:

    - `fuse=None`: a map for each layer, a tuple of them;
    - `fuse="paper"`: one map, the maximum over layers of `tanh(2 L / max L)` (equation 9), but for the deepest, which is
      `L / max L`. Layers are given from shallow to deep;
    - `fuse="torchcam"`: `tanh(2 norm(L))` for all of them, norm being min-max, as torchcam's `fuse_cams` has it.

    A fused map has the largest side of each axis, or `size`; with `normalize` it is brought to [0, 1] at the end. The other
    arguments, and what is returned and raised, are those of `camfn.grad_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> body = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU()
    >>> model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 9, 9)
    >>> [m.shape for m in camfn.layer_cam(model, ("1", "3"), x)]
    [torch.Size([2, 7, 7]), torch.Size([2, 3, 3])]
    >>> camfn.layer_cam(model, ("1", "3"), x, fuse="paper").shape
    torch.Size([2, 7, 7])

    Jiang et al., LayerCAM, IEEE Transactions on Image Processing 2021 (doi 10.1109/TIP.2021.3089943). torchcam's `LayerCAM`.
    """
    if fuse not in (None, "paper", "torchcam"):
        raise CamError(f'fuse must be None, "paper" or "torchcam", found {fuse!r}')
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
    found = [weights.layer_cam(gradients) for gradients in graded.gradients]
    return weighed_by_gradients(graded, found) if fuse is None else _fused(graded, found, fuse)


def _fused(graded: Graded, found: list[Gradients], how: Fuse) -> Outcome:
    """One map of several layers' maps."""
    explained, drawing = graded.explained, graded.explained.drawing
    grids = [part.grid for part in explained.reads]
    if len(grids) < 2 or not drawing.relu:
        raise CamError(f"fuse={how!r} joins the maps of several layers, after their ReLU; found {len(grids)}, {drawing.relu=}")
    if any(after > before for grid, deeper in itertools.pairwise(grids) for before, after in zip(grid, deeper)):
        raise CamError(f"fuse={how!r} takes layers from shallow to deep; found grids {', '.join(map(str, grids))}")
    scaled = [within(each, drawing._replace(normalize=True)) for each in found]  # each map is scaled before they are fused
    raw = graded._replace(explained=explained._replace(drawing=drawing._replace(size=None, normalize=False)))
    outcome = weighed_by_gradients(raw, scaled)._replace(weights=tuple(found))
    axes = len(grids[0])
    size = checked_size(drawing.size, explained.forward.batch, axes) or [max(sides) for sides in zip(*grids)]
    fused = maps.layer_cam(tuple(outcome.maps), axes, how, size)
    return outcome._replace(maps=maps.normalize(fused, tuple(range(-axes, 0))) if drawing.normalize else fused)
