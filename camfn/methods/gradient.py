"""Grad-CAM and its variants, which weight each channel by the gradient of the score."""

from torch import nn

from camfn._errors import CamError
from camfn._types import Combine, Gradients, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import weights
from camfn.formulas.weights import Alphas
from camfn.methods._common import (
    Drawing,
    Explained,
    curvatures_of,
    explained,
    grade_layer,
    weighed,
    weighed_by_gradients,
)
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import again, look_with_gradients
from camfn.model.gradients import Pullback


@method(weights.grad_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def grad_cam(
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
    """Grad-CAM: weight each channel by the mean of the score's gradient over positions.

    `G = d(score)/dA`, `w_k = mean_p G_kp`, `L = relu(sum_k w_k A_k)`.

    An integer target means the model's raw output for that class, which is the paper's `y^c` before the softmax. The cost is
    one forward pass, and for each target one backward pass that ends at the layer.

    **Arguments**

    - `combine`: `"sum"`, or `"eigen"` for the first component of `w_k A_k` instead of their sum (`camfn.maps.component`).

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> signed = camfn.grad_cam(model, "1", x, 3, relu=False, normalize=False)
    >>> cam = camfn.cam(model, "1", x, 3, fc="4", normalize=False)
    >>> torch.allclose(36 * signed, cam, atol=1e-6)  # on a pooled linear head, with 36 positions
    True

    Selvaraju et al., Grad-CAM, ICCV 2017 (arXiv 1610.02391).
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
    return weighed_by_gradients(graded, [weights.grad_cam(gradients) for gradients in graded.gradients])


@method(weights.grad_cam_pp, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def grad_cam_pp(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    alphas: Alphas = "paper",
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Grad-CAM++: weight each channel by a sum of its positive gradients that favors channels of small total activation.

    `w_k = sum_p a_kp relu(G_kp)`, `a = G^2 / (2 G^2 + S_k G^3)`, `S_k = sum_p A_kp`, `L = relu(sum_k w_k A_k)`.

    This is equation 19 of the paper, with `G = d(score)/dA`. Alpha (a) is 0 where its denominator is not positive. The cost is
    one forward pass, and one backward pass for each target.

    The paper derives the equation for `Y = exp(score)`, which multiplies all weights of an image by `exp(score)`. That factor
    is omitted, as in all libraries, because it cancels when the map is normalized.

    torchcam's `GradCAMpp` computes another formula: it writes the quotient to a copy, and so uses `w_k = sum_p relu(G_kp)^3`.

    **Arguments**

    - `alphas="paper"`: the equation above.
    - `alphas="authors"`: divide the alphas by their sum over the channel's positions of positive gradient, as in the authors'
      code.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.grad_cam_pp(model, "1", torch.randn(2, 3, 8, 8), [1, 3]).shape
    torch.Size([2, 6, 6])

    Chattopadhyay et al., Grad-CAM++, WACV 2018 (arXiv 1710.11063).
    """
    if alphas not in ("paper", "authors"):
        raise CamError(f'alphas must be "paper" or "authors", found {alphas!r}')
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
    return weighed_by_gradients(graded, [weights.grad_cam_pp(*pair, alphas) for pair in graded.pairs])


@method(weights.xgrad_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def xgrad_cam(
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
    """XGrad-CAM: weight each channel by the activation-weighted mean of its gradient over positions.

    `w_k = sum_p G_kp A_kp / sum_p A_kp`, `L = relu(sum_k w_k A_k)`.

    The sum of the signed map is `<G, A>`, as for HiResCAM. The method is meant for layers after a ReLU. A channel with values
    of both signs may sum to nearly zero, and its weight is then disproportionate. A channel that sums to zero, up to rounding,
    gets the weight 0. The cost is one forward pass, and one backward pass for each target.

    The arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> signed, other = (f(model, "1", x, 3, relu=False, normalize=False) for f in (camfn.xgrad_cam, camfn.hires_cam))
    >>> torch.allclose(signed.sum((1, 2)), other.sum((1, 2)), atol=1e-5)
    True

    Fu et al., Axiom-based Grad-CAM, BMVC 2020 (arXiv 2008.02312). torchcam's `XGradCAM`
    adds 1e-8 to the denominator.
    """
    drawing = Drawing(relu, size, normalize, layout, axes, combine)
    graded = grade_layer(model, layer, x, target, state, drawing, site="none")
    return weighed_by_gradients(graded, [weights.xgrad_cam(*pair) for pair in graded.pairs])


@method(weights.shapley_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=2))
def shapley_cam(
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
    """ShapleyCAM: weight each channel by its share of the score, to second order in the activation.

    `w_k = mean_p (G - 1/2 H A)_kp`, `L = relu(sum_k w_k A_k)`, where H is the Hessian of the score at the layer.

    If the network after the layer is piecewise linear, the logits have no curvature, and the map is that of `camfn.grad_cam`.
    The paper's target, "ReST", is `camfn.targets.rest()`. The cost is one forward pass, and for each target one backward pass
    and one Hessian-vector product `H A`. Fused attention has no second derivative. A model that uses it runs a second time,
    with its attention written out.

    The arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> shapley, plain = (method(model, "1", x, 3, relu=False) for method in (camfn.shapley_cam, camfn.grad_cam))
    >>> torch.allclose(shapley, plain, atol=1e-6)
    True
    >>> camfn.shapley_cam(model, "1", x, camfn.targets.rest(3), relu=False).shape
    torch.Size([2, 6, 6])

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261).
    """
    forward, pullback = look_with_gradients(model, layer, x, state, None, axes)
    found = explained(forward, target, Drawing(relu, size, normalize, layout, axes, combine))
    found, pairs = _with_curvatures(found, pullback)
    outcome = weighed(found, [weights.shapley_cam(*pair) for pair in pairs])
    return outcome._replace(backwards=found.clean.numel() * (1 + len(set(outcome.layers))))


def _with_curvatures(found: Explained, pullback: Pullback) -> tuple[Explained, list[tuple[Gradients, Gradients]]]:
    """Return gradients and Hessian-vector products, with the forward pass that they belong to."""
    forward = found.forward
    try:
        return found, curvatures_of(found, pullback)
    except RuntimeError as error:
        if "scaled_dot_product" not in str(error):
            raise
    other, pullback = again(forward, forward.image, unfused=True)
    found = found._replace(forward=other._replace(forwards=forward.forwards + forward.n))
    return found, curvatures_of(found, pullback)
