"""Methods that weigh each channel of an activation by the gradient of the score there."""

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
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Grad-CAM: each channel is weighted by the mean of the score's gradient over positions.

    `G = d(score)/dA`, `w_k = mean_p G_kp`, `L = relu(sum_k w_k A_k)`. One forward, and for each target one backward that
    ends at the layer. A class stands for the model's raw output, which is the paper's `y^c` before the softmax.
    `combine="eigen"` draws the first component of `w_k A_k` in place of their sum (`camfn.maps.component`).

    The arguments, and what is returned and raised, are those of `camfn.score_cam`, without those of a sweep. A plain call gives
    maps without a graph; under `torch.func.grad` and `jvp` they are differentiable in `x` and `state`.

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
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
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
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Grad-CAM++: each channel is weighted by its positive gradients, those of few and weak positions more.

    `w_k = sum_p a_kp relu(G_kp)`, `a = G^2 / (2 G^2 + S_k G^3)`, `S_k = sum_p A_kp`, `L = relu(sum_k w_k A_k)`: equation 19,
    with `G = d(score)/dA`. alpha is 0 where its denominator is not positive. One forward, and one backward for each target.

    - `alphas="paper"`: that equation. It is derived for `Y = exp(score)`, which makes all weights of an image `exp(score)`
      times as large: left out here, as in all libraries, since it cancels where the map is normalised.
    - `alphas="authors"`: in their code alphas are divided by their sum over a channel's positions of positive gradient.

    torchcam's `GradCAMpp` is another formula: a division that goes into a copy leaves `w_k = sum_p relu(G_kp)^3`. The other
    arguments, and what is returned and raised, are those of `camfn.grad_cam`.

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
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
    return weighed_by_gradients(graded, [weights.grad_cam_pp(*pair, alphas) for pair in graded.pairs])


@method(weights.xgrad_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=1))
def xgrad_cam(
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
    """XGrad-CAM: each channel is weighted by the mean of the gradient over positions, in proportion to the activation.

    `w_k = sum_p G_kp A_kp / sum_p A_kp`, `L = relu(sum_k w_k A_k)`. One forward, and one backward for each target. The sum of
    the signed map is `<G, A>`, as HiResCAM's is. Meant for layers behind a ReLU: a channel of both signs may sum to nearly
    nothing, and then has a weight out of all proportion; one that sums to zero, to rounding, has weight 0.

    The arguments, and what is returned and raised, are those of `camfn.grad_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> signed, other = (f(model, "1", x, 3, relu=False, normalize=False) for f in (camfn.xgrad_cam, camfn.hires_cam))
    >>> torch.allclose(signed.sum((1, 2)), other.sum((1, 2)), atol=1e-5)
    True

    Fu et al., Axiom-based Grad-CAM, BMVC 2020 (arXiv 2008.02312). torchcam's `XGradCAM`, but for the 1e-8 in its denominator.
    """
    graded = grade_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, combine))
    return weighed_by_gradients(graded, [weights.xgrad_cam(*pair) for pair in graded.pairs])


@method(weights.shapley_cam, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(backwards=2))
def shapley_cam(
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
    """ShapleyCAM: each channel is weighted by its share of the score, to second order in the activation.

    `w_k = mean_p (G - 1/2 H A)_kp`, `L = relu(sum_k w_k A_k)`; H is the Hessian of the score at the layer. One forward, one
    backward for each target, and one through it for the product `H A`. Where what comes after the layer is piecewise linear,
    the logits have no curvature and it is `camfn.grad_cam`: the paper's target is `camfn.targets.rest()`, its "ReST".

    The arguments, and what is returned and raised, are those of `camfn.grad_cam`. Fused attention has no second derivative: a
    model that has it runs a second time, with its attention written out.

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
    forward, pullback = look_with_gradients(model, layer, x, state)
    found = explained(forward, target, Drawing(relu, size, normalize, layout, combine))
    found, pairs = _with_curvatures(found, pullback)
    outcome = weighed(found, [weights.shapley_cam(*pair) for pair in pairs])
    return outcome._replace(backwards=found.clean.numel() * (1 + len(set(outcome.layers))))


def _with_curvatures(found: Explained, pullback: Pullback) -> tuple[Explained, list[tuple[Gradients, Gradients]]]:
    """Gradients and Hessian-vector products, and the forward pass that gave them."""
    forward = found.forward
    try:
        return found, curvatures_of(found, pullback)
    except RuntimeError as error:
        if "scaled_dot_product" not in str(error):
            raise
    other, pullback = again(forward, forward.image, unfused=True)
    found = found._replace(forward=other._replace(forwards=forward.forwards + forward.n))
    return found, curvatures_of(found, pullback)
