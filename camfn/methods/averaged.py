"""Methods that average gradients over several forwards: of noisy inputs, of inputs at several sizes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Combine, FlatMaps, Inputs, Layers, Layout, Size, State, Target, wide
from camfn.formulas import maps as _maps
from camfn.formulas import weights
from camfn.formulas.masks import check_noise, noises
from camfn.formulas.scaling import size_of
from camfn.methods.graded import Graded, grade, seen_of, weighed
from camfn.methods.table import Drawing, Outcome, checked_combine, drawn, method, read, slopes_at, stacked
from camfn.model.forward import again, look, without_graph
from camfn.model.gradients import slopes_of
from camfn.model.inputs import Key
from camfn.model.memory import is_exhausted
from camfn.targets import resolve

SIZES = tuple(side / 224 for side in range(324, 1000, 100))
"""CAMERAS' default: beside an input of 224 pixels, 324, 424 ... 924."""

_AT_ONCE = 1 << 22
"""Values of upsampled activations that CAMERAS holds at once."""


@method("activations", "gradients", cost="5, 4 backward")
def smooth_grad_cam_pp(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    num_samples: int = 4,
    std: float = 0.3,
    seed: int | torch.Generator = 0,
    masked: Key = None,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """Smooth Grad-CAM++: Grad-CAM++ with the powers of the gradient averaged over noisy inputs.

    `D_i = mean of G^i` over `num_samples` inputs `x + e`, `e ~ N(0, std^2)`; `w_k = sum_p a_kp relu(D1_kp)`, `a = D2 / (2 D2 +
    S_k D3)`, `S_k = sum_p A_kp`, `L = relu(sum_k w_k A_k)`, with the activation of the clean input. The paper's std is a share
    of the input's range; here it is in units of the input, as in torchcam. The numerator of alpha is printed as D1 in the
    paper, which without noise would not be Grad-CAM++.

    `seed` is an int, or a `torch.Generator`, which is copied and not advanced. All images of a batch share the noise; on the
    CPU it is what torchcam draws for one image after `torch.manual_seed(seed)`. `masked` is the key or index of the input that
    the noise is added to, by default the only floating-point one with spatial axes. One forward, and `num_samples` forwards
    with a backward for each target. The other arguments, and what is returned and raised, are those of `camfn.grad_cam`.

    torchcam's `SmoothGradCAMpp` takes the ReLU of the last noisy input's gradient alone, and `sum_p D3_kp A_kp` for `S_k D3`.

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
    check_noise("smooth_grad_cam_pp", num_samples, std, seed)
    with without_graph():
        seen = seen_of(look(model, layer, x, state, masked, masks=True), target, layout)
        subject, score, clean, reads, _ = seen
        held: list[Any] = [None] * len(reads)
        for noise in noises(num_samples, std, seed, subject.image[0]):
            noisy = again(subject, subject.image + noise.to(subject.image.dtype))
            slopes = slopes_at(noisy, score, layout)
            held = [weights.with_draw(*pair) for pair in zip(held, slopes)]
        found = [weights.smooth_grad_cam_pp(each, num_samples, part.values) for each, part in zip(held, reads)]
        outcome = weighed(seen, found, Drawing(relu, size, normalize, checked_combine(combine)))
    forwards = subject.forwards + num_samples * subject.n
    return outcome._replace(forwards=forwards, backwards=num_samples * clean.numel())


@method("activations", "gradients", "any size", cost="8, 8 backward")
def cameras(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    factors: Sequence[float] = SIZES,
    masked: Key = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = True,
    normalize: bool = True,
) -> Outcome:
    """CAMERAS: the activation times the gradient, each averaged over sizes of the input before.

    `A = mean_r U(A(x_r))`, `G = mean_r U(G(x_r))`, `L = relu(sum_k G_k * A_k)`; `x_r` is the input, and the input at `factors`
    times its sides (cubic interpolation), and U brings what the layer gives to the input's size (linear), which is the map's
    own.

    `factors` are 324/224, 424/224 ... 924/224 by default, the authors' sizes beside an input of 224; with all of them the call
    costs 61 times Grad-CAM. The network has to take inputs of any size. Where `target` is `None`, sizes at which another class
    is predicted are left out, image by image, as the authors' code does; with a target given, none is. `masked` is the key or
    index of the input that is resized, by default the only floating-point one with spatial axes. The other arguments, and what
    is returned and raised, are those of `camfn.grad_cam`.

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
    with without_graph():
        own = grade(model, layer, x, target, state, layout, masked=masked, masks=True)
        others = [_at(own, factor) for factor in factors]
        shares = _shares(own, others, target)
        side: Any = own.subject.size
        drawing, every = Drawing(relu, size, normalize), [own, *others]
        signed = [_product(_within(every, i, drawing), i, shares, side) for i in range(len(own.reads))]
        outcome = drawn(own.subject, own.score, own.clean, signed, [side] * len(signed), drawing)
    forwards = outcome.forwards + len(others) * own.subject.n
    return outcome._replace(forwards=forwards, backwards=(1 + len(others)) * own.clean.numel())


def _checked_factors(factors: Any) -> tuple[float, ...]:
    found = tuple(factors) if isinstance(factors, Sequence) and not isinstance(factors, str) else None
    if found is None or not all(isinstance(f, (int, float)) and 0 < f < math.inf for f in found):
        raise CamError(f"factors must be positive numbers, by which the input's sides are multiplied; found {factors!r}")
    return found


def _at(own: Graded, factor: float) -> Graded:
    """Activation and gradient of the input at another size."""
    subject = own.subject
    size = [max(1, round(side * factor)) for side in subject.image.shape[2:]]
    try:
        other = again(subject, _maps.cubic(subject.image, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, CamError) or is_exhausted(error):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CamError(
            f"cameras shows the model its input at other sizes, and it does not take {tuple(size)} ({first}); "
            "factors= says which, factors=() none"
        ) from error
    assert other.pull is not None
    reads = [read(other, name, seen, part.like) for name, seen, part in zip(other.layers, other.seen, own.reads)]
    found = slopes_of(other.pull, other.output, own.score)
    return Graded(other, own.score, own.clean, reads, stacked(other, found, [part.view for part in reads]))


def _shares(own: Graded, others: Sequence[Graded], target: Target) -> Tensor:
    """How much each size counts for each image, `(r, n)`; where the class is predicted, only sizes that agree on it do."""
    kept = torch.ones_like(own.clean[:, 0]).expand(1 + len(others), -1)
    if target is None:
        best = [resolve(None, other.subject.output, len(own.clean), own.clean.device).rows for other in others]
        kept = torch.stack([rows[:, 0] == own.score.rows[:, 0] for rows in (own.score.rows, *best)]).to(kept.dtype)
    return kept / kept.sum(0)


def _within(graded: Sequence[Graded], layer: int, drawing: Drawing) -> list[Graded]:
    """With a layer's gradients, at all sizes, up to one positive factor for each map, where that is normalised anyway."""
    if not drawing.normalize:
        return list(graded)
    size = torch.stack([size_of(part.slopes[layer], (2, 3)) for part in graded]).amax(0)
    return [
        part._replace(slopes=[slope / size if i == layer else slope for i, slope in enumerate(part.slopes)]) for part in graded
    ]


def _product(graded: Sequence[Graded], layer: int, shares: Tensor, size: Sequence[int]) -> FlatMaps:
    """`sum_k mean_r U(G) * mean_r U(A)` at a layer, some channels at a time."""
    _, targets, channels, _ = graded[0].slopes[layer].shape
    step = max(1, _AT_ONCE // (math.prod(size) * shares.shape[1] * (1 + targets)))
    total: Any = 0
    for start in range(0, channels, step):
        activations: Any = 0
        slopes: Any = 0
        for part, share in zip(graded, shares):
            values, grid = part.reads[layer].values[:, start : start + step], part.reads[layer].grid
            activations = activations + _spread(values, grid, size, share)
            slopes = slopes + _spread(part.slopes[layer][:, :, start : start + step], grid, size, share)
        total = total + _maps.combine(slopes, activations)
    return total


def _spread(values: Tensor, grid: Sequence[int], size: Sequence[int], share: Tensor) -> Tensor:
    """A share of values on a grid, brought to `size`."""
    upsampled = _maps.resize(values.to(wide(values.dtype)).unflatten(-1, tuple(grid)), size).flatten(-len(size))
    return upsampled * share.to(upsampled.dtype).reshape(-1, *[1] * (upsampled.ndim - 1))
