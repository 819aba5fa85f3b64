"""Methods whose map is a first component: of an activation, or of its product with a gradient."""

import math
from collections.abc import Callable
from functools import partial

from torch import nn

from camfn._errors import CamError
from camfn._types import FlatMaps, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import components
from camfn.formulas.components import Kernel
from camfn.methods._common import Drawing, Graded, drawn, explain_layer, grade_layer, within
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
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Eigen-CAM: the weighted sum of channels, of all with weights of one length, that varies most.

    `L = sum_k v_k A_k`, v being the first singular vector of A, with positions for rows. One forward, no ReLU. It knows nothing
    of the target: its map is the same for each.

    - `center=False` (the paper): of the activation as it is. Behind a ReLU all of the map is positive, and what all positions
      share is most of it.
    - `center=True` (pytorch-grad-cam): less each channel's mean over positions, the first principal component.

    A singular vector may be turned round, and pytorch-grad-cam's is as it comes, with the map inverted or not. Here what is
    largest in size is positive (equation 13 of Seg-Eigen-CAM); where that leaves it open, the map goes with the sum of the
    channels. Where two singular values are equal there is no one first component, and it has no derivative: what is not
    determined counts as constant.

    The other arguments, and what is returned and raised, are those of `camfn.mean_cam`, without `combine`.

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
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout))
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
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """KPCA-CAM: the first kernel principal component of the positions: Eigen-CAM, not only by sums of channels.

    `L = sqrt(l) a`, with l the largest eigenvalue of the matrix `k(x_p, x_q)`, centred, and a its unit vector; `x_p` is the
    activation at a position, less each channel's mean. One forward, no ReLU. It knows nothing of the target: its map is the
    same for each.

    - `kernel`: `"sigmoid"`, `tanh(gamma x.y + 1)`, as in pytorch-grad-cam; `"rbf"`, `exp(-gamma |x - y|^2)`; `"poly"`,
      `(gamma x.y + 1)^3`; `"linear"`, which is `camfn.eigen_cam` with `center=True`.
    - `gamma`: 1 over the number of channels for `None`. But for the linear one, kernels are of the size of the activation.

    The sign is that of `camfn.eigen_cam`, and what is said there of derivatives holds here too. The matrix has p x p entries,
    for p positions. The other arguments, and what is returned and raised, are those of `camfn.mean_cam`, without `combine`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.kpca_cam(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Karmani et al., KPCA-CAM, 2024 (arXiv 2410.00267). pytorch-grad-cam's `KPCA_CAM`, up to the sign.
    """
    if kernel not in components.KERNELS:
        raise CamError(f"kernel {kernel!r} is not known; all: {', '.join(components.KERNELS)}")
    if gamma is not None and not (isinstance(gamma, (int, float)) and 0 < gamma < math.inf):
        raise CamError(f"gamma must be None or a finite number above 0, found {gamma!r}")
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout))
    return drawn_alike(found, [components.kpca_cam(part.values, kernel, gamma, unit=normalize) for part in found.reads])


@method(components.eigen_grad_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def eigen_grad_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    center: bool = True,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """EigenGrad-CAM: the first principal component of the activation times the gradient: Eigen-CAM of a class.

    `L = sum_k v_k X_k`, `X = G * A` less each channel's mean over positions, `G = d(score)/dA`, v the first singular vector of
    X, with positions for rows. `center=False` leaves the means in. One forward, and for each target one backward; no ReLU.

    Its sign is the one with which it goes with `sum_k X_k`, the map of HiResCAM. pytorch-grad-cam's is as it comes. What
    `camfn.eigen_cam` says of derivatives holds here too. The other arguments, and what is returned and raised, are those of
    `camfn.grad_cam`, without `combine`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.eigen_grad_cam(model, "1", torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 6, 6])

    Muhammad & Yeasin, Eigen-CAM, IJCNN 2020 (arXiv 2008.00299), with the gradient as in pytorch-grad-cam's `EigenGradCAM`.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout))
    return _of_gradients(graded, partial(components.eigen_grad_cam, center=center))


@method(components.seg_eigen_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def seg_eigen_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    center: bool = True,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Seg-Eigen-CAM: the first principal component of the activation times the size of the gradient.

    `L = sum_k v_k X_k`, `X = |G| * A` less each channel's mean over positions, `G = d(score)/dA`, v the first singular vector
    of X, with positions for rows; what is largest in size is positive (equations 10 to 13). `center=False` leaves the means in;
    pytorch-grad-cam takes them off. One forward, and for each target one backward; no ReLU.

    Meant for segmentation networks with `camfn.targets.segmentation`; it takes any target. What `camfn.eigen_cam` says of
    derivatives holds here too. The other arguments, and what is returned and raised, are those of `camfn.grad_cam`, without
    `combine`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.seg_eigen_cam(model, "1", torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 6, 6])

    Chung & Ying, Seg-Eigen-CAM, Applied Sciences 2025 (doi 10.3390/app15137562). pytorch-grad-cam's `SegEigenCAM`.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout))
    return _of_gradients(graded, partial(components.seg_eigen_cam, center=center))


def _of_gradients(graded: Graded, formula: Callable[..., FlatMaps]) -> Outcome:
    found = graded.explained
    signed = [formula(within(gradients, found.drawing), activations) for gradients, activations in graded.pairs]
    return drawn(found, signed)._replace(backwards=found.clean.numel())
