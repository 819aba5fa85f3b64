"""CAM, and class-agnostic methods, which need an activation and neither gradients nor masked inputs."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layer, Layers, Layout, Size, State, Target
from camfn.formulas import maps, noise, weights
from camfn.formulas.diagnostics import about_linear, about_negative
from camfn.methods._common import Drawing, Explained, cancelled, combined, drawn, explain_layer, weighed, with_findings
from camfn.methods.registry import Need, Outcome, method
from camfn.model.linear_head import find_linear, linear_of
from camfn.targets import at_columns, at_rows


@method(weights.cam, (Need.ACTIVATIONS, Need.LINEAR_HEAD))
def cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    fc: Layer | None = None,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """CAM: weight each channel by the class's weight in the linear layer after global average pooling.

    `L_c = sum_k W_ck A_k`.

    The model must end in global average pooling and one linear layer, or one 1x1 convolution. On such a model, the mean of the
    map is the logit minus its bias. There is no ReLU by default. The cost is one forward pass.

    **Arguments**

    - `layer`: one layer, the one before the pooling.
    - `fc`: the linear layer, by name or as a module. `None` finds it by its shape, and a warning names it.
    - `target`: a target that is linear in the logits: classes, contrasts, and sums and multiples of these. The map is the same
      combination of the classes' maps.
    - `combine`: `"sum"`, or `"eigen"` for the first component of `W_ck A_k` instead of their sum.

    The other arguments are those of `camfn.score_cam`.

    **Returns** maps `(n, *grid)`, or `(n, t, *grid)` for several targets. Their minimum and maximum are scaled to 0 and 1
    unless `normalize=False`.

    **Raises** `CamError` for several layers, and for a target that is not linear in the logits. The same error reports that no
    linear layer, or more than one, maps the layer's channels to the model's classes.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> raw = camfn.cam(model, "0", x, 3, fc="3", normalize=False)
    >>> torch.allclose(raw.mean((1, 2)) + model[3].bias[3], model(x)[:, 3], atol=1e-6)
    True

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150). The same
    as torchcam's `CAM`.
    """
    if isinstance(layer, (list, tuple)) and len(layer) > 1:
        raise CamError(f"cam explains one layer, the one before the pooling; found {len(layer)}")
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
    if not found.score.linear:
        raise CamError(
            "cam weighs channels by a class's row of the linear layer: its target must be classes, or a sum or contrast of them"
        )
    task = found.forward.task
    name = find_linear(task.private, fc, found.reads[0].values.shape[1], found.forward.output)
    matrix, bias = linear_of(task.private, task.state, name)
    outcome = weighed(found, [weights.cam(partial(at_columns, found.score), matrix)])
    if _compat.transformed():
        return outcome
    with torch.no_grad():
        told = at_rows(found.score, maps.pooled_logits(found.reads[0].values, matrix, bias))
    return outcome._replace(remarks=about_linear(told, found.clean, outcome.layers[0]))


@method(weights.mean_cam, (Need.ACTIVATIONS,))
def mean_cam(
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
    """LaFAM: average all channels; a class-agnostic baseline for the other methods.

    `L = 1/c sum_k A_k`.

    The map shows where the layer is active, and every other method should improve on it. It is class-agnostic: all targets get
    the same map, and only the score in `camfn.explain` depends on the target. There is no ReLU by default. The cost is one
    forward pass.

    **Arguments**

    - `combine`: `"sum"`, or `"eigen"` for the first component of the channels instead of their mean.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(camfn.mean_cam(model, "1", x, normalize=False), model[:2](x).mean(1))
    True

    Karjauv & Albayrak, LaFAM, 2024 (arXiv 2407.06059).
    """
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
    return weighed_alike(found, [weights.mean_cam(part.values) for part in found.reads])


@method(weights.fem, (Need.ACTIVATIONS,))
def fem(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    form: Literal["mean", "share"] = "mean",
    k: float = 2.0,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """FEM: mark where each channel is far above its mean, and sum the marks weighted by the channel means.

    `B_k = [A_k > mu_k + k sigma_k]`, with mean mu and standard deviation sigma over positions.

    The map is class-agnostic: all targets get the same map. There is no ReLU by default. The cost is one forward pass.

    **Arguments**

    - `form="mean"` (the paper and Xplique): `L = sum_k mu_k B_k`.
    - `form="share"` (pytorch-grad-cam): `L = sum_k mean(B_k) A_k`. A channel's weight is its share of marked positions.
    - `k`: the threshold in standard deviations. Among p positions, none can be more than `sqrt(p - 1)` deviations above the
      mean. With `k=2`, a grid of five or fewer positions therefore gives an empty map.
    - `combine`: `"sum"`, or `"eigen"` for the first component of the terms instead of their sum.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.fem(model, "1", torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 6, 6])

    Fuad et al., Features Understanding in 3D CNNs for Actions Recognition in Video, IPTA 2020
    (doi 10.1109/IPTA50016.2020.9286629).
    """
    if form not in ("mean", "share"):
        raise CamError(f'form must be "mean" or "share", found {form!r}')
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not math.isfinite(k):
        raise CamError(f"fem needs a finite number of deviations for k, found {k!r}")
    drawing = Drawing(relu, size, normalize, layout, axes, combine)
    found = explain_layer(model, layer, x, target, state, drawing, site="none")
    pairs = [weights.fem(part.values, k, form) for part in found.reads]
    summed = tuple(part._replace(values=values) for part, (_, values) in zip(found.reads, pairs))
    outcome = weighed_alike(found._replace(reads=summed), [weight for weight, _ in pairs])
    if form == "share" or _compat.transformed():
        return outcome
    with torch.no_grad():
        against = [maps.negative_share(*pair) for pair in pairs]
    return outcome._replace(remarks=about_negative(against, found.forward.layers))


@method(weights.random_cam, (Need.ACTIVATIONS,))
def random_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    seed: int | torch.Generator = 0,
    combine: Combine = "sum",
    axes: str | None = None,
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """RandomCAM: weight each channel at random; a control for the other methods.

    `w_k ~ U(-1, 1)`, `L = sum_k w_k A_k`.

    If a method gives no better maps than this one, its weights carry no information. The map is class-agnostic: all targets get
    the same map. There is no ReLU by default, unlike in pytorch-grad-cam. After a layer with its own ReLU, a second one would
    leave half of the maps empty. The cost is one forward pass.

    **Arguments**

    - `seed`: an int, or a `torch.Generator`, which is copied and not advanced. The weight of a channel depends only on the seed
      and on the channel's number. All images of a batch share it, and it starts again for every layer.

    The other arguments, the returned maps and the errors are those of `camfn.score_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> one, again, other = (camfn.random_cam(model, "1", x, seed=seed) for seed in (0, 0, 1))
    >>> torch.equal(one, again), torch.equal(one, other)
    (True, False)

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261) reports it as a control. pytorch-grad-cam has it as
    `RandomCAM`.
    """
    if not isinstance(seed, (int, torch.Generator)):
        raise CamError(f"seed must be an int or a torch.Generator, found {seed!r}")
    found = explain_layer(model, layer, x, target, state, Drawing(relu, size, normalize, layout, axes, combine))
    drawn = [noise.uniform(seed, part.values.shape[1]) for part in found.reads]
    return weighed_alike(found, [weights.random_cam(u, part.values) for u, part in zip(drawn, found.reads)])


# ------------------------------------------------------------------------------------------------ shared functions


def weighed_alike(found: Explained, weights: Sequence[Float[Tensor, "n c"]]) -> Outcome:
    """Return the outcome of weights that all targets share."""
    each = [part[:, None] for part in weights]
    outcome = drawn_alike(found, [part[:, 0] for part in combined(found, each)], weights)
    return with_findings(outcome, cancelled(found, each, "map" if found.drawing.combine == "sum" else "sign"))


def drawn_alike(
    found: Explained, signed: Sequence[Float[Tensor, "n p"]], weights: Sequence[Float[Tensor, "n c"]] = ()
) -> Outcome:
    """Return the outcome of class-agnostic maps, which are computed once and repeated for each target."""

    def each(value: Tensor) -> Tensor:
        return value[:, None].expand(-1, found.clean.shape[1], -1)

    return drawn(found, [each(part) for part in signed])._replace(weights=tuple(each(part) for part in weights))
