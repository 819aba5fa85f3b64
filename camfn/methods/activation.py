"""Methods that look at an activation, and at no gradient and no score but that of the clean input."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layer, Layers, Layout, Size, State, Target
from camfn.formulas import weights
from camfn.formulas.masks import uniform
from camfn.layouts import Read
from camfn.methods.table import Drawing, Outcome, checked_combine, clean_scores, combined, drawn, method, read
from camfn.model.forward import Subject, look
from camfn.model.linear_head import find_linear, matrix_of
from camfn.targets import Score, at_columns, resolve


@method("activations", "linear head", cost="1")
def cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    fc: Layer | None = None,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """Class activation maps: the activation weighted by the class's row of the linear layer behind the pooling.

    `L_c = sum_k W_ck A_k`, for models that end in global average pooling and one linear layer (or a 1x1 convolution). One
    forward, no ReLU. On such a head the mean of the map is the logit less its bias.

    **Arguments**, beside those that all methods share (`camfn.score_cam` tells them): `layer`, one layer; `fc`, the linear
    layer by name or as a module, found by its shape if `None`, which a warning says; `target`, one that is linear in the
    logits: classes, contrasts, sums and weightings of these, whose map is the sum of the classes' maps; `combine="eigen"`
    draws the first component of `W_ck A_k` in place of their sum.

    **Returns** `(n, *grid)`, or `(n, t, *grid)` for several classes; `(min, max)` scaled to `(0, 1)` unless `normalize=False`.

    **Raises** `CamError` where several layers are given, the target is another one, or there is no linear layer of the layer's
    channels and the model's classes, or more than one.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> raw = camfn.cam(model, "0", x, 3, fc="3", normalize=False)
    >>> torch.allclose(raw.mean((1, 2)) + model[3].bias[3], model(x)[:, 3], atol=1e-6)
    True

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv 1512.04150). torchcam's `CAM`.
    """
    if isinstance(layer, (list, tuple)) and len(layer) > 1:
        raise CamError(f"cam explains one layer, the one before the pooling; found {len(layer)}")
    subject, score, clean, reads = look_at(model, layer, x, target, state, layout)
    if not score.linear:
        raise CamError(
            "cam weighs channels by a class's row of the linear layer: its target must be classes, or a sum or contrast of them"
        )
    name = find_linear(subject.shell, fc, reads[0].values.shape[1], subject.output)
    matrix = matrix_of(subject.shell, subject.state, name)
    found = (at_columns(score, matrix),)  # of a class: its row
    drawing = Drawing(relu, size, normalize, checked_combine(combine))
    outcome = drawn(subject, score, clean, combined(found, reads, drawing), [reads[0].grid], drawing)
    return outcome._replace(weights=found)


@method("activations", cost="1")
def mean_cam(
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
    """LaFAM: the mean of all channels, where the layer is active, whatever for. The least that a method has to beat.

    `L = 1/c sum_k A_k`. One forward, no ReLU. It knows nothing of the target: its map is the same for each, and only the score
    that a card tells is of it. `combine="eigen"` draws the first component of the channels in place of their mean.

    The arguments, and what is returned and raised, are those of `camfn.cam`, for any layers and targets.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(camfn.mean_cam(model, "1", x, normalize=False), model[:2](x).mean(1))
    True

    Karjauv & Albayrak, LaFAM, 2024 (arXiv 2407.06059).
    """
    seen, drawing = look_at(model, layer, x, target, state, layout), Drawing(relu, size, normalize, checked_combine(combine))
    return alike_weighed(seen, [weights.mean_cam(part.values) for part in seen.reads], seen.reads, drawing)


@method("activations", cost="1")
def fem(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    form: Literal["mean", "share"] = "mean",
    k: float = 2.0,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """FEM: where channels are far above their mean, the more so the stronger the channel.

    `B_k = [A_k > mu_k + k sigma_k]`, with mean and standard deviation over positions.

    - `form="mean"` (the paper, Xplique): `L = sum_k mu_k B_k`;
    - `form="share"` (pytorch-grad-cam): `L = sum_k mean(B_k) A_k`, whose weights are the share of positions that are far above.

    Of `p` positions none can be more than `sqrt(p - 1)` deviations above the mean: on a grid of five or fewer a `k` of 2 finds
    nothing. One forward, no ReLU. It knows nothing of the target: its map is the same for each. `combine="eigen"` draws the
    first component of what is summed. The other arguments, and what is returned and raised, are those of `camfn.mean_cam`.

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
    seen, drawing = look_at(model, layer, x, target, state, layout), Drawing(relu, size, normalize, checked_combine(combine))
    strong = [weights.far_above(part.values, k) for part in seen.reads]
    if form == "share":
        return alike_weighed(seen, [part.mean(-1) for part in strong], seen.reads, drawing)
    summed = [part._replace(values=where) for part, where in zip(seen.reads, strong)]
    return alike_weighed(seen, [weights.means(part.values) for part in seen.reads], summed, drawing)


@method("activations", cost="1")
def random_cam(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    seed: int | torch.Generator = 0,
    combine: Combine = "sum",
    state: State | None = None,
    layout: Layout = "auto",
    size: Size = None,
    relu: bool = False,
    normalize: bool = True,
) -> Outcome:
    """RandomCAM: random weights for the channels. The control: a method that is no better has found nothing in its weights.

    `w_k ~ U(-1, 1)`, `L = sum_k w_k A_k`. One forward. It knows nothing of the target: its map is the same for each. No ReLU,
    which pytorch-grad-cam's has: behind a layer with a ReLU of its own, that leaves nothing of half of the maps.

    `seed` is an int, or a `torch.Generator`, which is copied and not advanced. The weight of a channel depends on that and
    on its number alone; all images of a batch share it, and every layer starts anew. The other arguments, and what is returned
    and raised, are those of `camfn.mean_cam`.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> one, again, other = (camfn.random_cam(model, "1", x, seed=seed) for seed in (0, 0, 1))
    >>> torch.equal(one, again), torch.equal(one, other)
    (True, False)

    Cai, CAMs as Shapley Value-based Explainers, 2025 (arXiv 2501.06261) has it in its tables; pytorch-grad-cam's `RandomCAM`.
    """
    if not isinstance(seed, (int, torch.Generator)):
        raise CamError(f"seed must be an int or a torch.Generator, found {seed!r}")
    seen, drawing = look_at(model, layer, x, target, state, layout), Drawing(relu, size, normalize, checked_combine(combine))
    found = [weights.random_cam(uniform(seed, part.values.shape[1]), part.values) for part in seen.reads]
    return alike_weighed(seen, found, seen.reads, drawing)


# ------------------------------------------------------------------------------------------------- what they share


class Seen(NamedTuple):
    """What one forward gives."""

    subject: Subject
    score: Score
    clean: Tensor  # (n, t)
    reads: list[Read]  # of each layer


def look_at(model: nn.Module, layer: Layers, x: Inputs, target: Target, state: State | None, layout: Layout) -> Seen:
    """Activations and scores."""
    subject = look(model, layer, x, state, None, masks=False)
    score = resolve(target, subject.output, subject.n, subject.image.device)
    clean = clean_scores(subject, score)
    return Seen(subject, score, clean, [read(subject, *each, layout) for each in zip(subject.layers, subject.seen)])


def alike_weighed(seen: Seen, found: Sequence[Float[Tensor, "n c"]], summed: Sequence[Read], drawing: Drawing) -> Outcome:
    """The maps of weights that are the same for all targets."""
    signed = combined([each[:, None] for each in found], summed, drawing)
    return alike(seen, [part[:, 0] for part in signed], found, drawing)


def alike(
    seen: Seen, signed: Sequence[Float[Tensor, "n p"]], found: Sequence[Float[Tensor, "n c"]], drawing: Drawing
) -> Outcome:
    """Maps that are the same for all targets: made once, and shown for each."""
    every = [part[:, None].expand(-1, seen.clean.shape[1], -1) for part in signed]
    outcome = drawn(seen.subject, seen.score, seen.clean, every, [part.grid for part in seen.reads], drawing)
    return outcome._replace(weights=tuple(each[:, None].expand(-1, seen.clean.shape[1], -1) for each in found))
