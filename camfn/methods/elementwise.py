"""HiResCAM, LayerCAM and Grad-CAM-E, which weight each position of a channel by its own gradient."""

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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """HiResCAM: multiply activation and gradient at each position, and sum over channels.

    `L = sum_k G_k * A_k` with `G = d(score)/dA`.

    There is no ReLU by default, as in the paper. If the network after the layer is piecewise linear, the sum of the map is the
    score minus the contribution of the biases. The cost is one forward pass, and one backward pass for each target.

    The arguments, the returned maps and the errors are those of `camfn.score_cam`.

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
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine), site="norm")
    return weighed_by_gradients(graded, [weights.hires_cam(gradients) for gradients in graded.gradients])


@method(weights.grad_cam_elementwise, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def grad_cam_elementwise(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Element-wise Grad-CAM: multiply activation and gradient, and sum the positive products over channels.

    `L = sum_k relu(G_k * A_k)` with `G = d(score)/dA`.

    The ReLU comes before the sum over channels, unlike in `camfn.hires_cam`. If no activation is negative, the map is that of
    `camfn.layer_cam`. The cost is one forward pass, and one backward pass for each target.

    **Arguments**

    - `relu`: has no effect, because the map is never negative.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(camfn.grad_cam_elementwise(model, "1", x), camfn.layer_cam(model, "1", x), atol=1e-6)
    True

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261), as Grad-CAM-E. The same as pytorch-grad-cam's
    `GradCAMElementWise`.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine), site="norm")
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
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """LayerCAM: weight each position of each channel by its own gradient, where that is positive.

    `L = relu(sum_k relu(G_k) * A_k)` with `G = d(score)/dA`.

    The method is also meant for shallow layers, and for one map of several layers. The cost is one forward pass, and one
    backward pass for each target.

    **Arguments**

    - `fuse=None`: return a tuple with one map per layer.
    - `fuse="paper"`: return one map, the maximum over layers of `tanh(2 L / max L)` (equation 9), with `L / max L` for the
      deepest layer. Give the layers from shallow to deep.
    - `fuse="torchcam"`: use `tanh(2 norm(L))` for all layers, where norm is min-max normalization, as torchcam's `fuse_cams`
      does.
    - `size`: the size of a fused map. `None` means the largest side of each axis among the layers' grids.
    - `normalize`: also applies to a fused map, after the fusion.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

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

    Jiang et al., LayerCAM, IEEE Transactions on Image Processing 2021 (doi 10.1109/TIP.2021.3089943). The same as
    torchcam's `LayerCAM`.
    """
    if fuse not in (None, "paper", "torchcam"):
        raise CamError(f'fuse must be None, "paper" or "torchcam", found {fuse!r}')
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine), site="norm")
    found = [weights.layer_cam(gradients) for gradients in graded.gradients]
    return weighed_by_gradients(graded, found) if fuse is None else _fused(graded, found, fuse)


def _fused(graded: Graded, found: list[Gradients], how: Fuse) -> Outcome:
    """Fuse the maps of several layers into one."""
    explained, drawing = graded.explained, graded.explained.drawing
    grids = [part.grid for part in explained.reads]
    if len(grids) < 2 or not drawing.relu:
        raise CamError(f"fuse={how!r} joins the maps of several layers, after their ReLU; found {len(grids)}, {drawing.relu=}")
    if any(after > before for grid, deeper in itertools.pairwise(grids) for before, after in zip(grid, deeper)):
        raise CamError(f"fuse={how!r} takes layers from shallow to deep; found grids {', '.join(map(str, grids))}")
    scaled = [within(each, drawing._replace(normalize=True)) for each in found]  # each map is scaled before the fusion
    raw = graded._replace(explained=explained._replace(drawing=drawing._replace(size=None, normalize=False)))
    outcome = weighed_by_gradients(raw, scaled)._replace(weights=tuple(found))
    axes = len(grids[0])
    size = checked_size(drawing.size, explained.forward.batch, axes) or [max(sides) for sides in zip(*grids)]
    fused = maps.layer_cam(tuple(outcome.maps), axes, how, size)
    return outcome._replace(maps=maps.normalize(fused, tuple(range(-axes, 0))) if drawing.normalize else fused)
