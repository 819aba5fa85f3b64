"""Methods that weigh every position of a channel by the gradient of the score there."""

import itertools
from typing import Literal

import torch
from torch import nn

from camfn._errors import CamError
from camfn._types import Combine, Gradients, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import maps as _maps
from camfn.formulas import weights
from camfn.methods.graded import Graded, grade, weighed
from camfn.methods.table import Drawing, Outcome, checked_combine, checked_size, method, within

Fuse = Literal["paper", "torchcam"]


@method("activations", "gradients", cost="1, 1 backward")
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
    graded = grade(model, layer, x, target, state, layout)
    return weighed(graded, graded.slopes, Drawing(relu, size, normalize, checked_combine(combine)))


@method("activations", "gradients", cost="1, 1 backward")
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
    graded = grade(model, layer, x, target, state, layout)
    found = [weights.grad_cam_elementwise(slopes, part.values) for slopes, part in zip(graded.slopes, graded.reads)]
    return weighed(graded, found, Drawing(relu, size, normalize, checked_combine(combine)))


@method("activations", "gradients", cost="1, 1 backward")
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
    graded = grade(model, layer, x, target, state, layout)
    found = [torch.relu(slopes) for slopes in graded.slopes]
    drawing = Drawing(relu, size, normalize, checked_combine(combine))
    return weighed(graded, found, drawing) if fuse is None else _fused(graded, found, fuse, drawing)


def _fused(graded: Graded, found: list[Gradients], how: Fuse, drawing: Drawing) -> Outcome:
    """One map of several layers' maps."""
    subject, grids = graded.subject, [part.grid for part in graded.reads]
    if len(grids) < 2 or not drawing.relu:
        raise CamError(f"fuse={how!r} joins the maps of several layers, after their ReLU; found {len(grids)}, {drawing.relu=}")
    if any(after > before for grid, deeper in itertools.pairwise(grids) for before, after in zip(grid, deeper)):
        raise CamError(f"fuse={how!r} takes layers from shallow to deep; found grids {', '.join(map(str, grids))}")
    scaled = [within(each, drawing._replace(normalize=True)) for each in found]  # each map is scaled before they are fused
    outcome = weighed(graded, scaled, drawing._replace(size=None, normalize=False))._replace(weights=tuple(found))
    axes = len(grids[0])
    if how == "torchcam":
        shown = [torch.tanh(2 * _maps.normalize(each, tuple(range(-axes, 0)))) for each in outcome.maps]
    else:
        shares = [_maps.share(each, axes) for each in outcome.maps]
        # How the deepest is scaled the paper does not say; as it is, it would not compare with what is below 1.
        shown = [*(torch.tanh(2 * each) for each in shares[:-1]), shares[-1]]
    size = checked_size(drawing.size, subject.x, subject.key, axes) or [max(sides) for sides in zip(*grids)]
    fused = _maps.fuse(shown, size)
    return outcome._replace(maps=_maps.normalize(fused, tuple(range(-axes, 0))) if drawing.normalize else fused)
