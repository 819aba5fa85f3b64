"""Smooth Grad-CAM++ and CAMERAS, which average gradients over noisy inputs or over sizes of the input."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camfn._errors import CamError, first_line
from camfn._types import Combine, Inputs, Layers, Layout, Size, State, Target
from camfn.formulas import maps, noise, weights
from camfn.formulas.maps import Resized
from camfn.formulas.noise import Units
from camfn.formulas.scaling import magnitude
from camfn.methods._common import (
    Drawing,
    Explained,
    Graded,
    check_noise,
    drawn,
    explained,
    gradients_of,
    read_layer,
    stacked,
    weighed,
)
from camfn.methods.registry import Cost, Need, Outcome, method
from camfn.model.forward import again, another_batch, look, look_with_gradients, without_graph
from camfn.model.gradients import each_target
from camfn.model.inputs import Key
from camfn.model.memory import is_exhausted
from camfn.targets import resolve

SIZES = tuple(side / 224 for side in range(324, 1000, 100))
"""The default factors of CAMERAS: for inputs of 224 pixels, the sizes 324, 424 ... 924."""


@method(weights.smooth_grad_cam_pp, (Need.ACTIVATIONS, Need.GRADIENTS), Cost(5, backwards=4))
def smooth_grad_cam_pp(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    num_samples: int = 4,
    std: float = 0.05,
    units: Units = "range",
    seed: int | torch.Generator = 0,
    masked: Key = None,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Smooth Grad-CAM++: weight each channel as Grad-CAM++ does, with powers of the gradient averaged over noisy inputs.

    `D_i = mean of G^i` over `num_samples` inputs `x + e` with `e ~ N(0, s^2)`, `w_k = sum_p a_kp relu(D1_kp)`,
    `a = D2 / (2 D2 + S_k D3)`, `S_k = sum_p A_kp`, `L = relu(sum_k w_k A_k)`.

    A is the activation of the clean input. The paper prints D1 as the numerator of alpha, which without noise would not be
    Grad-CAM++. torchcam's `SmoothGradCAMpp` takes only the ReLU of the last noisy input's gradient, and `sum_p D3_kp A_kp`
    instead of `S_k D3`. The cost is one forward pass, and `num_samples` forward passes with one backward pass for each target.

    **Arguments**

    - `num_samples`: the number of noisy inputs.
    - `std`: the standard deviation s of the noise, in the given units.
    - `units`: `"range"`, so that `std` is a share of `max x - min x` of each image, as in the paper; or `"input"` for the units
      of the input, as in torchcam, where `std` is 0.3.
    - `seed`: an int, or a `torch.Generator`, which is copied and not advanced. All images of a batch share the noise. On the
      CPU it is what torchcam draws for one image after `torch.manual_seed(seed)`.
    - `masked`: the key or index of the input to add noise to. The default is the only floating-point input with spatial axes.
    - `axes`: the order of its axes, as in `camfn.score_cam`.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> still = camfn.smooth_grad_cam_pp(model, "1", x, 3, num_samples=2, std=0.0)
    >>> torch.allclose(still, camfn.grad_cam_pp(model, "1", x, 3), atol=1e-5)
    True

    Omeiza et al., Smooth Grad-CAM++, 2019 (arXiv 1908.01224).
    """
    check_noise("smooth_grad_cam_pp", num_samples, std, seed, units)
    with without_graph(x, state):
        forward = look(model, layer, x, state, masked, axes, masks=True)
        found = explained(forward, target, Drawing(relu, size, normalize, layout, axes, combine))
        held: list[Any] = [None] * len(found.reads)
        deviation = noise.deviation(forward.image, std, units)
        for image in noise.noisy(forward.image, num_samples, seed, deviation):
            noisy, pullback = again(forward, image)
            gradients = gradients_of(found._replace(forward=noisy), pullback)
            held = [weights.with_draw(*pair) for pair in zip(held, gradients)]
        each = [weights.smooth_grad_cam_pp(moments, num_samples, part.values) for moments, part in zip(held, found.reads)]
        outcome = weighed(found, each)
    forwards = forward.forwards + num_samples * forward.n
    return outcome._replace(forwards=forwards, backwards=num_samples * found.clean.numel())


@method(maps.cameras, (Need.ACTIVATIONS, Need.GRADIENTS, Need.ANY_SIZE), Cost(8, backwards=8))
def cameras(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    factors: Sequence[float] = SIZES,
    masked: Key = None,
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """CAMERAS: multiply activation and gradient, each averaged over several sizes of the input.

    `A = mean_r U(A(x_r))`, `G = mean_r U(G(x_r))`, `L = relu(sum_k G_k * A_k)`.

    The `x_r` are the input, and the input resized by each of `factors` (cubic interpolation). U upsamples linearly to the
    input's size, which is also the size of the map. The network must accept inputs of any size. With the default factors, a
    call costs 61 times as much as Grad-CAM.

    If `target` is `None`, the mean leaves out sizes at which another class is predicted, image by image, as in the authors'
    code. With a target, it includes every size.

    **Arguments**

    - `factors`: multipliers of the input's sides, beside the input itself. The default is 324/224, 424/224 ... 924/224: the
      authors' sizes for inputs of 224 pixels.
    - `masked`: the key or index of the input to resize. The default is the only floating-point input with spatial axes.
    - `axes`: the order of its axes, as in `camfn.score_cam`. All axes but those of the images and channels are resized.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> camfn.cameras(model, "1", x).shape
    torch.Size([2, 8, 8])
    >>> alone = camfn.cameras(model, "1", x, 3, factors=(), relu=False, normalize=False)
    >>> hires = camfn.hires_cam(model, "1", x, 3, size="input", normalize=False)
    >>> torch.allclose(alone, hires, atol=1e-6)  # on a pooled linear head, whose gradient is the same everywhere
    True

    Jalwana et al., CAMERAS, CVPR 2021 (arXiv 2106.10649).
    """
    factors = _checked_factors(factors)
    with without_graph(x, state):
        forward, pullback = look_with_gradients(model, layer, x, state, masked, axes, masks=True)
        own = explained(forward, target, Drawing(relu, size, normalize, layout, axes))
        graded = Graded(own, gradients_of(own, pullback))
        others = [_at(graded, factor) for factor in factors]
        shares, side = _shares(own, [other.explained for other in others], target), tuple(forward.image.shape[2:])
        parts = [_resized([graded, *others], i) for i in range(len(own.reads))]
        outcome = drawn(own, [maps.cameras(each, shares, side) for each in parts], [side] * len(parts))
    forwards = outcome.forwards + len(others) * forward.n
    return outcome._replace(forwards=forwards, backwards=(1 + len(others)) * own.clean.numel())


def _checked_factors(factors: Any) -> tuple[float, ...]:
    """Return the factors as a tuple, or raise an error unless they are positive and finite."""
    found = tuple(factors) if isinstance(factors, Sequence) and not isinstance(factors, str) else None
    if found is None or not all(isinstance(f, (int, float)) and 0 < f < math.inf for f in found):
        raise CamError(f"factors must be positive numbers, by which the input's sides are multiplied; found {factors!r}")
    return found


def _at(own: Graded, factor: float) -> Graded:
    """Return activations and gradients for the input resized by a factor."""
    forward, found = own.explained.forward, own.explained
    size = [max(1, round(side * factor)) for side in forward.image.shape[2:]]
    try:
        other, pullback = again(forward, maps.cubic(forward.image, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, CamError) or is_exhausted(error):
            raise
        first = first_line(error)
        raise CamError(
            f"cameras runs the model on its input at other sizes, and the model does not accept {tuple(size)} ({first}); "
            "choose the sizes by factors=, or pass factors=() for none"
        ) from error
    likes = [part.like for part in found.reads]
    reads = tuple(read_layer(other, *each) for each in zip(other.layers, other.activations, likes))
    each = each_target(pullback.gradients, other.output, found.score)
    return Graded(found._replace(forward=other, reads=reads), stacked(other, each, [part.view for part in reads]))


def _shares(own: Explained, others: Sequence[Explained], target: Target) -> Tensor:
    """The weight of each size for each image, `(r, n)`. For `target=None`, a size that predicts another class has weight 0."""
    kept = torch.ones_like(own.clean[:, 0]).expand(1 + len(others), -1)
    if target is None:
        device = own.clean.device
        best = [
            resolve(None, f.output, f.n, device, another=partial(another_batch, f)).rows for f in (o.forward for o in others)
        ]
        kept = torch.stack([rows[:, 0] == own.score.rows[:, 0] for rows in (own.score.rows, *best)]).to(kept.dtype)
    return kept / kept.sum(0)


def _resized(graded: Sequence[Graded], layer: int) -> list[Resized]:
    """Return one layer's activations and gradients at all sizes.

    If the map is normalized anyway, its gradients are first divided by one positive factor, so that no product overflows.
    """
    gradients = [part.gradients[layer] for part in graded]
    if graded[0].explained.drawing.normalize:
        size = torch.stack([magnitude(each, (2, 3)) for each in gradients]).amax(0)
        gradients = [each / size for each in gradients]
    reads = [part.explained.reads[layer] for part in graded]
    return [Resized(part.values, each, part.grid) for part, each in zip(reads, gradients)]
