"""Channel weights: one pure function for each formula, named after its method. Tensors only.

`n` images, `c` channels, `p` positions of the layer's grid, `t` targets. `A` is the activation `(n, c, p)` and
`G = d(score)/dA` is the gradient `(n, t, c, p)`, in float32 or wider. Weights `w` are `(n, t, c)`; `camfn.maps.combine` sums
them into maps.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camfn._types import Activations, Gradients, Scores, Weights, wide
from camfn.formulas.scaling import magnitude, rescale

__all__ = [
    "Alphas",
    "FemForm",
    "Moments",
    "Variant",
    "Weighting",
    "ablation_cam",
    "cam",
    "far_above",
    "fem",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "group_cam",
    "hires_cam",
    "layer_cam",
    "lift_cam",
    "mean_cam",
    "opti_cam",
    "poly_cam",
    "random_cam",
    "score_cam",
    "shapley_cam",
    "smooth_grad_cam_pp",
    "winsor_cam",
    "with_draw",
    "xgrad_cam",
]

Alphas = Literal["paper", "authors"]
FemForm = Literal["mean", "share"]
Weighting = Literal["softmax", "score"]
Variant = Literal["+", "-", "+-"]


def score_cam(scores: Scores, weighting: Weighting = "softmax") -> Weights:
    """Score-CAM weights: the softmax over channels of the masked inputs' scores.

    `w_k = exp(S_k) / sum_j exp(S_j)`, or `w_k = S_k` for `weighting="score"`.

    Args:
        scores: `(n, c, t)`, the scores of the masked inputs, one input for each channel.
        weighting: `"softmax"` is Algorithm 1 of the paper; a constant added to all scores cancels. `"score"` is the authors'
            code, which takes probabilities as scores and no softmax.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> score_cam(torch.zeros(1, 4, 1)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]

    Wang et al., Score-CAM, CVPR Workshops 2020 (arXiv 1910.01279).
    """
    return torch.softmax(scores, 1).mT if weighting == "softmax" else scores.mT


def cam(score: Callable[[Tensor], Weights], matrix: Float[Tensor, "classes c"]) -> Weights:
    """CAM weights: the target's score of each column of the linear layer that follows the pooling.

    `w_k = s(W_k)`. For a class `y` this is the row `W_y`.

    Args:
        score: maps a matrix to the target's score of each column, read as logits.
        matrix: `W`, `(classes, c)`.

    Returns:
        The weights, shaped as `score` returns them.

    >>> import torch
    >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> cam(lambda logits: logits[1], matrix).tolist()  # class 1
    [3.0, 4.0]

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150).
    """
    return score(matrix)


def mean_cam(activations: Activations) -> Float[Tensor, "n c"]:
    """LaFAM weights: equal for all channels, so that the map is the mean activation.

    `w_k = 1 / c`. Class-agnostic.

    Args:
        activations: `(n, c, p)`.

    Returns:
        The weights `(n, c)`.

    >>> import torch
    >>> mean_cam(torch.ones(1, 4, 9)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]

    Karjauv and Albayrak, LaFAM, 2024 (arXiv 2407.06059).
    """
    return torch.ones_like(activations[..., 0], dtype=wide(activations.dtype)) / activations.shape[1]


def fem(activations: Activations, k: float = 2.0, form: FemForm = "mean") -> tuple[Float[Tensor, "n c"], Activations]:
    """FEM weights and the maps that they multiply: each channel's mean, and its binary map of rare, strong activations.

    `L = sum_k mu_k B_k`, with `mu_k = mean_p A_kp` and `B = far_above(A, k)`. Class-agnostic.

    Args:
        activations: `A`, `(n, c, p)`.
        k: the threshold, in standard deviations above a channel's mean.
        form: `"mean"` is the paper. `"share"` is pytorch-grad-cam: `L = sum_k mean_p(B_kp) A_k`.

    Returns:
        The weights `(n, c)`, and the values to sum `(n, c, p)`: `B`, or `A` for `form="share"`.

    >>> import torch
    >>> w, values = fem(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 5.0]]]), 1.9)
    >>> w.tolist(), values.tolist()
    ([[1.0]], [[[0.0, 0.0, 0.0, 0.0, 1.0]]])

    Fuad et al., Features Understanding in 3D CNNs for Actions Recognition in Video, IPTA 2020
    (doi 10.1109/IPTA50016.2020.9286629).
    """
    strong = far_above(activations, k)
    if form == "share":
        return strong.mean(-1), activations
    return activations.to(wide(activations.dtype)).mean(-1), strong


def far_above(activations: Activations, k: float) -> Activations:
    """FEM's binary maps: 1 where an activation is more than `k` standard deviations above its channel's mean.

    `B_kp = 1` where `A_kp > mu_k + k sigma_k` by more than rounding, and 0 elsewhere. Mean and deviation are over positions.

    Args:
        activations: `A`, `(n, c, p)`.
        k: the threshold, in standard deviations.

    Returns:
        `B`, `(n, c, p)`, in float32 or wider. It has no gradient.

    >>> import torch
    >>> far_above(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 5.0]]]), 1.9).tolist()
    [[[0.0, 0.0, 0.0, 0.0, 1.0]]]
    """
    values = rescale(activations.detach().to(wide(activations.dtype)), -1)
    off = values - values.mean(-1, keepdim=True)
    sigma = off.square().mean(-1, keepdim=True).sqrt()
    # One positive position among p is sqrt(p - 1) deviations above the mean, exactly 2 for p = 5: rounding must not decide.
    rounding = 16 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return (off > k * sigma + rounding).to(values.dtype)


def random_cam(drawn: Float[Tensor, "*c"], activations: Activations) -> Float[Tensor, "n c"]:
    """Random weights in [-1, 1), the same for every image: a baseline for other methods.

    `w_k = 2 u_k - 1`.

    Args:
        drawn: `u`, random numbers in [0, 1), one for each channel.
        activations: `(n, c, p)`; only the shape, the dtype and the device count.

    Returns:
        The weights, `(n, c)` for `drawn (c,)`.

    >>> import torch
    >>> random_cam(torch.tensor([0.0, 0.75]), torch.ones(1, 2, 9)).tolist()
    [[-1.0, 0.5]]

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261).
    """
    return (2 * drawn - 1).to(activations.device, wide(activations.dtype)).expand(activations.shape[0], -1)


# --------------------------------------------------------------------------------------- from gradients and from scores


def grad_cam(gradients: Gradients) -> Weights:
    """Grad-CAM weights: the mean of the gradient over positions.

    `w_k = mean_p G_kp`.

    Args:
        gradients: `G`, `(n, t, c, p)`.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> grad_cam(torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]])).tolist()
    [[[1.5, -0.5]]]

    Selvaraju et al., Grad-CAM, ICCV 2017 (arXiv 1610.02391).
    """
    return gradients.mean(-1)


def group_cam(scores: Scores, groups: int) -> Weights:
    """Group-CAM weights: how much each group raises the score of the blurred input.

    `w_tg = relu(S_g - S_0)`.

    Args:
        scores: `(n, t * groups + 1, t)`. The rows are the groups of each target in turn, scored for all targets. The last row
            is `S_0`, the score of the blurred input alone.
        groups: the number of groups of each target.

    Returns:
        The weights `(n, t, groups)`.

    >>> import torch
    >>> group_cam(torch.tensor([[[0.75], [0.25], [0.5]]]), 2).tolist()
    [[[0.25, 0.0]]]

    Zhang et al., Group-CAM, 2021 (arXiv 2103.13859).
    """
    n, _, t = scores.shape
    own = scores[:, :-1].reshape(n, t, groups, t).diagonal(dim1=1, dim2=3)  # (n, g, t)
    return torch.relu(own - scores[:, -1:]).mT


def poly_cam(scores: Scores, clean: Float[Tensor, "n t"], flat: Bool[Tensor, "n c"], variant: Variant = "+-") -> Weights:
    """Poly-CAM weights: the score that a channel's mask keeps, the score that it takes away, or both.

    - `variant="+"`: `w_k = s(x M_k)`
    - `variant="-"`: `w_k = relu(s(x) - s(x (1 - M_k)))`
    - `variant="+-"`: `w_k = relu(s(x M_k) + s(x) - s(x (1 - M_k)))`

    Args:
        scores: `(n, c, t)`, of the masks `M` for `"+"` or of the masks `1 - M` for `"-"`. For `"+-"`, `(n, 2 c, t)` of both,
            in this order.
        clean: `s(x)`, `(n, t)`.
        flat: `(n, c)`, true for flat channels. Their mask is zero, so `s(x (1 - M_k))` is taken as `s(x)`.
        variant: one of the above.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> kept, left, clean = torch.tensor([[[0.25], [0.5]]]), torch.tensor([[[0.25], [1.0]]]), torch.tensor([[0.5]])
    >>> poly_cam(torch.cat([kept, left], 1), clean, torch.zeros(1, 2, dtype=torch.bool)).tolist()
    [[[0.5, 0.0]]]

    Englebert et al., Poly-CAM, 2022 (arXiv 2204.13359).
    """
    if variant == "+":
        return scores.mT
    left = torch.where(flat[..., None], clean[:, None], scores[:, -flat.shape[1] :])
    fall = clean[:, None] - left
    return torch.relu(fall if variant == "-" else scores[:, : flat.shape[1]] + fall).mT


def ablation_cam(scores: Scores, clean: Float[Tensor, "n t"]) -> Weights:
    """Ablation-CAM weights: the relative drop of the score when a channel is set to zero.

    `w_k = (y - y^k) / |y|`. The paper divides by `y`, which inverts the map where `y` is negative. Where `y` is 0, the weight
    is the drop `y - y^k` itself.

    Args:
        scores: `y^k`, `(n, c, t)`, the scores without channel k.
        clean: `y`, `(n, t)`, the scores with all channels.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> ablation_cam(torch.tensor([[[1.5], [4.0]]]), torch.tensor([[2.0]])).tolist()
    [[[0.25, -1.0]]]

    Desai and Ramaswamy, Ablation-CAM, WACV 2020 (doi 10.1109/WACV45572.2020.9093360).
    """
    size = clean.abs()
    return ((clean[:, None] - scores) / torch.where(size == 0, 1, size)[:, None]).mT


def lift_cam(multipliers: Gradients, activations: Activations) -> Weights:
    """LIFT-CAM weights: each channel's DeepLIFT contribution, with zeros as the baseline.

    `w_k = sum_p m_kp A_kp`.

    Args:
        multipliers: `m`, `(n, t, c, p)`, DeepLIFT's multipliers between zeros and `A`.
        activations: `A`, `(n, c, p)`.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> lift_cam(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[3.0, 0.5]]])).tolist()
    [[[4.0]]]

    Jung and Oh, Towards Better Explanations of Class Activation Mapping, ICCV 2021 (arXiv 2102.05228).
    """
    return (multipliers * activations[:, None]).sum(-1)


class Moments(NamedTuple):
    """Sums over draws of the first three powers of the gradients, in units of `size`."""

    size: Gradients  # the unit of each gradient: the largest power of two among its draws; 0 where all draws are 0
    first: Gradients
    second: Gradients
    third: Gradients


def with_draw(held: Moments | None, gradients: Gradients) -> Moments:
    """Moments with one more draw added.

    Each gradient has its own unit, since the cube of 1e-15 is 0 in float32.

    Args:
        held: the moments so far; `None` for the first draw.
        gradients: `(n, t, c, p)`, the gradients of the new draw.

    Returns:
        The new moments; `held` is not modified.

    >>> import torch
    >>> one = with_draw(None, torch.full((1, 1, 1, 1), 3.0))
    >>> one.size.item(), one.first.item()  # 3.0 is 1.5 units of 2
    (2.0, 1.5)
    """
    own = torch.where(gradients == 0, 0, magnitude(gradients[..., None], -1)[..., 0])
    size = own if held is None else torch.maximum(held.size, own)
    some = torch.where(size == 0, 1, size)
    share = gradients / some
    powers = share, share**2, share**3
    if held is not None:
        grown = held.size / some
        powers = (held.first * grown + powers[0], held.second * grown**2 + powers[1], held.third * grown**3 + powers[2])
    return Moments(size, *powers)


def grad_cam_pp(gradients: Gradients, activations: Activations, alphas: Alphas = "paper") -> Weights:
    """Grad-CAM++ weights: positive gradients, weighted by position.

    `w_k = sum_p a_kp relu(G_kp)`, with `a = G^2 / (2 G^2 + S_k G^3)` and `S_k = sum_p A_kp` (equation 19). `a` is 0 where its
    denominator is not positive.

    Args:
        gradients: `G`, `(n, t, c, p)`.
        activations: `A`, `(n, c, p)`.
        alphas: `"paper"` is the equation. `"authors"` is their code, which divides `a` by its sum over a channel's positions
            of positive gradient.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> grad_cam_pp(torch.tensor([[[[1.0, 2.0, -1.0]]]]), torch.tensor([[[1.0, 0.0, 1.0]]])).tolist()
    [[[0.5833333730697632]]]

    Chattopadhyay et al., Grad-CAM++, WACV 2018 (arXiv 1710.11063).
    """
    size = magnitude(gradients, -1)
    g, total = torch.relu(gradients / size), _total(activations)[:, None, :, None]
    # Only positions with G > 0 count, and there alpha is 1 / (2 + S G): cubes of small gradients would underflow. G is in units
    # of the channel's size and alpha in units of its inverse, so that S G stays within the range of the dtype.
    below = 2 / size + total * g
    # Departure from the paper: alpha is 0 where its denominator is not positive. The paper does not cover a negative S: the
    # exponential behind equation 19 has no such derivatives there. pytorch-grad-cam keeps the alpha, with its sign flipped.
    counts = (below > 0) & (g > 0)
    alpha = torch.where(counts, 1 / torch.where(counts, below, 1), 0)
    if alphas == "authors":
        alpha = alpha / torch.where(counts.any(-1), alpha.sum(-1), 1)[..., None] * size
    return (alpha * g).sum(-1)


def smooth_grad_cam_pp(moments: Moments, draws: int, activations: Activations) -> Weights:
    """Smooth Grad-CAM++ weights: Grad-CAM++ with the powers of the gradient averaged over noisy inputs.

    `w_k = sum_p a_kp relu(D1_kp)`, with `a = D2 / (2 D2 + S_k D3)` and `S_k = sum_p A_kp`. `D1`, `D2` and `D3` are the means of
    `G`, `G^2` and `G^3` over the draws. The paper prints `D1` as the numerator of `a`, which without noise would not be
    Grad-CAM++; the numerator here is `D2`, as in torchcam.

    Args:
        moments: the sums of `G`, `G^2` and `G^3` over the draws, made by `with_draw`.
        draws: the number of draws.
        activations: `A`, `(n, c, p)`, of the input without noise.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> gradients, activations = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[2.0, 0.0]]])
    >>> smooth_grad_cam_pp(with_draw(None, gradients), 1, activations).tolist()
    [[[0.25]]]

    Omeiza et al., Smooth Grad-CAM++, 2019 (arXiv 1908.01224).
    """
    first, second, third = (total / draws for total in moments[1:])
    # With z the unit of each gradient, `alpha` here is z times the formula's, and `first` is D1 / z.
    below = 2 * second / torch.where(moments.size == 0, 1, moments.size) + _total(activations)[:, None, :, None] * third
    counts = below > 0
    alpha = torch.where(counts, second / torch.where(counts, below, 1), 0)
    return (alpha * torch.relu(first)).sum(-1)


def xgrad_cam(gradients: Gradients, activations: Activations) -> Weights:
    """XGrad-CAM weights: the mean of the gradient, weighted by the activation.

    `w_k = sum_p G_kp A_kp / sum_p A_kp`. The weight is 0 where `A` sums to zero up to rounding.

    Args:
        gradients: `G`, `(n, t, c, p)`.
        activations: `A`, `(n, c, p)`.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> xgrad_cam(torch.tensor([[[[1.0, 3.0], [1.0, 1.0]]]]), torch.tensor([[[2.0, 2.0], [1.0, -1.0]]])).tolist()
    [[[2.0, 0.0]]]

    Fu et al., Axiom-based Grad-CAM, BMVC 2020 (arXiv 2008.02312).
    """
    values = rescale(activations.to(wide(activations.dtype)), -1)  # the quotient does not depend on the scale
    total, size = values.sum(-1), values.abs().sum(-1)
    # In the paper A is the output of a ReLU, whose sum is zero only for a dead channel. Other layers' sums can cancel, and the
    # quotient then means nothing.
    none = total.abs() <= 4 * torch.finfo(activations.dtype).eps * size
    weighed = (gradients * values[:, None]).sum(-1)
    return torch.where(none[:, None], 0, weighed / torch.where(none, 1, total)[:, None])


def hires_cam(gradients: Gradients) -> Gradients:
    """HiResCAM weights: the gradient itself, element by element.

    `w_kp = G_kp`, so that `L = sum_k G_k * A_k`.

    Args:
        gradients: `G`, `(n, t, c, p)`.

    Returns:
        The weights `(n, t, c, p)`.

    >>> import torch
    >>> hires_cam(torch.tensor([[[[1.0, -2.0]]]])).tolist()
    [[[[1.0, -2.0]]]]

    Draelos and Carin, Use HiResCAM instead of Grad-CAM, 2020 (arXiv 2011.08891).
    """
    return gradients


def layer_cam(gradients: Gradients) -> Gradients:
    """LayerCAM weights: the positive part of the gradient, element by element.

    `w_kp = relu(G_kp)`.

    Args:
        gradients: `G`, `(n, t, c, p)`.

    Returns:
        The weights `(n, t, c, p)`.

    >>> import torch
    >>> layer_cam(torch.tensor([[[[1.0, -2.0]]]])).tolist()
    [[[[1.0, 0.0]]]]

    Jiang et al., LayerCAM, IEEE TIP 2021 (doi 10.1109/TIP.2021.3089943).
    """
    return torch.relu(gradients)


def grad_cam_elementwise(gradients: Gradients, activations: Activations) -> Gradients:
    """Element-wise Grad-CAM weights: the gradient where it has the sign of the activation, 0 elsewhere.

    `w_kp A_kp = relu(G_kp A_kp)`.

    Args:
        gradients: `G`, `(n, t, c, p)`.
        activations: `A`, `(n, c, p)`.

    Returns:
        The weights `(n, t, c, p)`.

    >>> import torch
    >>> grad_cam_elementwise(torch.tensor([[[[1.0, -2.0, 3.0]]]]), torch.tensor([[[1.0, -1.0, -1.0]]])).tolist()
    [[[[1.0, -2.0, -0.0]]]]

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261), as Grad-CAM-E.
    """
    sign = torch.sign(activations)[:, None]
    return torch.relu(gradients * sign) * sign


def shapley_cam(gradients: Gradients, bends: Gradients) -> Weights:
    """ShapleyCAM weights: the mean of the gradient, corrected by the Hessian-vector product with the activation.

    `w_k = mean_p (G - 1/2 H A)_kp`, with `H` the Hessian of the score at the layer.

    Args:
        gradients: `G`, `(n, t, c, p)`.
        bends: `H A`, `(n, t, c, p)`, the Hessian-vector product.

    Returns:
        The weights `(n, t, c)`.

    >>> import torch
    >>> shapley_cam(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])).tolist()
    [[[1.5]]]

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261).
    """
    return (gradients - bends / 2).mean(-1)


def _total(activations: Activations) -> Tensor:
    return activations.to(wide(activations.dtype)).sum(-1)


_MEMORY, _SQUARES, _EPS = 0.9, 0.999, 1e-8  # Adam's beta 1, beta 2 and epsilon


def opti_cam(gradient: Callable[[Tensor], Tensor], u: Tensor, steps: int = 50, rate: float = 0.1) -> Tensor:
    """Opti-CAM weights: the softmax of parameters that maximize a score.

    `w = softmax(u)`, with `u` after `steps` steps of Adam. The steps are those of `torch.optim.Adam(maximize=True)`.

    Args:
        gradient: maps `u` to the gradient of the score with respect to `u`.
        u: `(b, c)`, the initial parameters.
        steps: the number of steps.
        rate: the learning rate.

    Returns:
        The weights `(b, c)`.

    >>> import torch
    >>> w = opti_cam(lambda u: torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), steps=10)
    >>> [round(value, 4) for value in w[0].tolist()]  # each step moves u by 0.1
    [0.8808, 0.1192]

    Zhang et al., Opti-CAM, 2023 (arXiv 2301.07002); Kingma and Ba, Adam, 2014 (arXiv 1412.6980).
    """
    memory, squares, size = torch.zeros_like(u), torch.zeros_like(u), torch.ones_like(u)
    for step in range(1, steps + 1):
        g = gradient(u)
        memory = _MEMORY * memory + (1 - _MEMORY) * g
        # The squares are in units of the largest gradient so far, at least 1: in other units they could overflow. Gradients far
        # below 1 need no unit of their own, since `_EPS` outweighs them.
        before, size = size, torch.maximum(size, magnitude(g[..., None], -1)[..., 0])
        squares = _SQUARES * squares * (before / size).square() + (1 - _SQUARES) * (g / size).square()
        mean = squares / (1 - _SQUARES**step)
        # The inner `where` matters: the root of zero, of a channel without any gradient, has an infinite derivative.
        root = torch.where(mean > 0, torch.where(mean > 0, mean, 1).sqrt(), 0) * size
        u = u + rate / (1 - _MEMORY**step) * memory / (root + _EPS)
    return torch.softmax(u, -1)


def winsor_cam(weights: Sequence[Weights | Gradients], percentile: float) -> Float[Tensor, "l n t"]:
    """Winsor-CAM's layer weights: each layer's importance, winsorized and scaled to [0.1, 1].

    A layer's importance is `relu(mean w)` over its weights. Importances above their `percentile` are set to it, and min-max
    normalization scales them to [0.1, 1]. A layer of importance 0 gets 0 and does not count in the percentile. Where all others
    are equally important, they get 1.

    Args:
        weights: one tensor for each of the `l` layers, `(n, t, c)` or `(n, t, c, p)`.
        percentile: from 0 to 100.

    Returns:
        The layer weights `(l, n, t)`.

    >>> import torch
    >>> low, mid, high = (torch.full((1, 1, 2), value) for value in (1.0, 2.0, 9.0))
    >>> winsor_cam([low, mid, high], 50).flatten().tolist()
    [0.10000000149011612, 1.0, 1.0]

    Wall et al., Winsor-CAM, TPAMI 2026 (arXiv 2507.10846).
    """
    importance = torch.relu(torch.stack([w.flatten(2).mean(-1) for w in weights]))
    counts = importance > 0
    bound = torch.where(counts, importance, torch.nan).nanquantile(percentile / 100, dim=0)
    cut = torch.where(counts, torch.minimum(importance, bound), 0)
    low, high = torch.where(counts, cut, torch.inf).amin(0), cut.amax(0)
    even = ~(high > low)  # a single important layer, several that are equally important, or none
    scaled = 0.1 + 0.9 * (cut - torch.where(even, 0, low)) / torch.where(even, 1, high - low)
    return torch.where(counts, torch.where(even, 1, scaled), 0)
