"""Eigen-CAM and its variants: the first component of an activation, or of its product with the gradient."""

import math
from collections.abc import Callable
from functools import partial

from torch import nn

from camfn._errors import CamError
from camfn._types import FlatMaps, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import components
from camfn.formulas.components import Kernel, Side
from camfn.methods._common import Drawing, Graded, cancelled, drawn, explain_layer, grade_layer, with_findings, within
from camfn.methods.activation import drawn_alike
from camfn.methods.registry import Cost, Need, Outcome, method


@method(components.eigen_cam, (Need.ACTIVATIONS,))
def eigen_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    center: bool = False,
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Eigen-CAM: project the activation onto its first singular vector (class-agnostic).

    `L = sum_k v_k A_k`, where v is the first singular vector of A, with positions as rows.

    Among all sums of channels with unit-norm weights, this one has the largest norm. The map is class-agnostic: all targets get
    the same map. There is no ReLU by default. The cost is one forward pass.

    The sign of a singular vector is arbitrary, and pytorch-grad-cam leaves it to chance, so that its map may be inverted. Here
    the entry of the map with the largest absolute value is positive (equation 13 of Seg-Eigen-CAM). If that leaves the sign
    open, the map has the sign of the sum of the channels. If two singular values are equal, the first component is not unique
    and has no derivative. The undetermined part is then treated as constant.

    **Arguments**

    - `center=False` (the paper): use the activation itself. After a ReLU the whole map is positive, and dominated by what all
      positions share.
    - `center=True` (pytorch-grad-cam): subtract each channel's mean over positions. The map is then the first principal
      component.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(1, 3, 8, 8)
    >>> values = torch.linalg.svdvals(model[:2](x)[0].flatten(1))
    >>> torch.allclose(camfn.eigen_cam(model, "1", x, normalize=False).norm(), values[0])
    True

    Muhammad & Yeasin, Eigen-CAM, IJCNN 2020 (arXiv 2008.00299).
    """
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes), site="none")
    first = [components.eigen_cam(part.values, center) for part in found.reads]
    return drawn_alike(found, [each.scores for each in first], [each.loadings for each in first])


@method(components.kpca_cam, (Need.ACTIVATIONS,))
def kpca_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    kernel: Kernel = "sigmoid",
    gamma: float | None = None,
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """KPCA-CAM: project the activation onto its first kernel principal component (class-agnostic).

    `L = sqrt(l) a`, where l is the largest eigenvalue of the centered matrix `k(x_p, x_q)`, and a its unit eigenvector.

    `x_p` is the activation at a position, minus each channel's mean. The map extends Eigen-CAM beyond sums of channels. It is
    class-agnostic: all targets get the same map. There is no ReLU by default. The sign and the derivatives are determined as in
    `camfn.eigen_cam`. The cost is one forward pass, and a matrix of p x p entries for p positions.

    **Arguments**

    - `kernel`: `"sigmoid"`, `tanh(gamma x.y + 1)`, as in pytorch-grad-cam; `"rbf"`, `exp(-gamma |x - y|^2)`; `"poly"`,
      `(gamma x.y + 1)^3`; or `"linear"`, which equals `camfn.eigen_cam` with `center=True`.
    - `gamma`: a positive number. `None` means 1 / number of channels. Every kernel except `"linear"` depends on the scale of
      the activation.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.kpca_cam(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Karmani et al., KPCA-CAM, 2024 (arXiv 2410.00267). Up to the sign, the same as pytorch-grad-cam's `KPCA_CAM`.
    """
    if kernel not in components.KERNELS:
        raise CamError(f"kernel {kernel!r} is not known; all: {', '.join(components.KERNELS)}")
    if gamma is not None and not (isinstance(gamma, (int, float)) and 0 < gamma < math.inf):
        raise CamError(f"gamma must be None or a finite number above 0, found {gamma!r}")
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes), site="norm")
    return drawn_alike(found, [components.kpca_cam(part.values, kernel, gamma, unit=normalize) for part in found.reads])


@method(components.eigen_grad_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def eigen_grad_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    center: bool = True,
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """EigenGrad-CAM: project the activation times the gradient onto its first principal component.

    `L = sum_k v_k X_k`, where X is `G * A` minus each channel's mean over positions, `G = d(score)/dA`, and v is the first
    singular vector of X, with positions as rows.

    The map is Eigen-CAM for a target. Its sign is the one that agrees with `sum_k X_k`, the map of HiResCAM. pytorch-grad-cam
    leaves the sign to chance. The derivatives are those described in `camfn.eigen_cam`. There is no ReLU by default. The cost
    is one forward pass, and one backward pass for each target.

    **Arguments**

    - `center`: `False` does not subtract the means.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.eigen_grad_cam(model, "1", torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 6, 6])

    Muhammad & Yeasin, Eigen-CAM, IJCNN 2020 (arXiv 2008.00299), with the gradient as in pytorch-grad-cam's `EigenGradCAM`.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes), site="norm")
    return _of_gradients(graded, partial(components.eigen_grad_cam, center=center), True)


@method(components.seg_eigen_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def seg_eigen_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    center: bool = True,
    side: Side = "largest",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Seg-Eigen-CAM: project the activation times the absolute gradient onto its first principal component.

    `L = sum_k v_k X_k`, where X is `|G| * A` minus each channel's mean over positions, `G = d(score)/dA`, and v is the first
    singular vector of X, with positions as rows (equations 10 to 13).

    The method is meant for segmentation networks with `camfn.targets.segmentation`, and accepts any target. It keeps no sign of
    the gradient: the entry of the map with the largest absolute value is positive, whether it speaks for the class or against
    it. The derivatives are those described in `camfn.eigen_cam`. There is no ReLU by default. The cost is one forward pass, and
    one backward pass for each target.

    **Arguments**

    - `center`: `True` subtracts the means, as pytorch-grad-cam does. `False` does not.
    - `side="largest"` (the paper and pytorch-grad-cam): the largest entry is positive, as above.
    - `side="class"`: the sign agrees with `sum_k G_k A_k`, the map of HiResCAM, as that of `camfn.eigen_grad_cam` does.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.seg_eigen_cam(model, "1", torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 6, 6])

    Chung & Ying, Seg-Eigen-CAM, Applied Sciences 2025 (doi 10.3390/app15137562). The same as pytorch-grad-cam's
    `SegEigenCAM`.
    """
    if side not in ("largest", "class"):
        raise CamError(f'side must be "largest" or "class" (the side that speaks for the target is positive), found {side!r}')
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes))
    return _of_gradients(graded, partial(components.seg_eigen_cam, center=center, side=side), side == "class")


def _of_gradients(graded: Graded, formula: Callable[..., FlatMaps], by_class: bool) -> Outcome:
    """Return the outcome of a formula of gradients and activations. `by_class`: its sign is that of `sum_k G_k A_k`."""
    found = graded.explained
    signed = [formula(within(gradients, found.drawing), activations) for gradients, activations in graded.pairs]
    outcome = drawn(found, signed)._replace(backwards=found.clean.numel())
    return with_findings(outcome, cancelled(found, graded.gradients, "sign")) if by_class else outcome
