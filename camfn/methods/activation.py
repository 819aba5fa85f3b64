"""Methods that look at an activation, and at no gradient and no score but that of the clean input."""

from torch import nn

from camfn._errors import CamError
from camfn._types import Combine, Inputs, Layer, Layers, Layout, Size, State, Target
from camfn.linear import find_linear, matrix_of
from camfn.methods.table import Drawing, Outcome, checked_combine, clean_scores, combined, drawn, method, read
from camfn.subject import look
from camfn.targets import at_columns, resolve


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
    subject = look(model, layer, x, state, None, masks=False)
    score = resolve(target, subject.output, subject.n, subject.image.device)
    if not score.linear:
        raise CamError(
            "cam weighs channels by a class's row of the linear layer: its target must be classes, or a sum or contrast of them"
        )
    reads = [read(subject, subject.layers[0], subject.seen[0], layout)]
    clean = clean_scores(subject, score)
    name = find_linear(subject.shell, subject.model, fc, reads[0].values.shape[1], subject.output)
    matrix = matrix_of(subject.shell, subject.state, name)
    found = (at_columns(score, matrix),)  # of a class: its row
    drawing = Drawing(relu, size, normalize, checked_combine(combine))
    outcome = drawn(subject, score, clean, combined(found, reads, combine), [reads[0].grid], drawing)
    return outcome._replace(weights=found)
