"""Methods that weigh an activation by the gradient of the score there."""

from typing import NamedTuple

from torch import Tensor, nn

from camfn import weights
from camfn._types import Combine, Gradients, Inputs, Layers, Layout, Size, State, Target
from camfn.layouts import Read
from camfn.methods.table import Drawing, Outcome, checked_combine, clean_scores, combined, drawn, method, read, slopes_at
from camfn.subject import Subject, look
from camfn.targets import Score, resolve


class Graded(NamedTuple):
    """What one forward and one backward for each target give."""

    subject: Subject
    score: Score
    clean: Tensor  # (n, t)
    reads: list[Read]  # of each layer
    slopes: list[Gradients]


@method("activations", "gradients", cost="1, 1 backward")
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
    graded = grade(model, layer, x, target, state, layout)
    drawing = Drawing(relu, size, normalize, checked_combine(combine))
    return weighed(graded, [weights.grad_cam(slopes) for slopes in graded.slopes], drawing)


# ------------------------------------------------------------------------------------------------- what they share


def grade(model: nn.Module, layer: Layers, x: Inputs, target: Target, state: State | None, layout: Layout) -> Graded:
    """Activations, scores and the scores' gradients."""
    subject = look(model, layer, x, state, None, masks=False, graph=True)
    score = resolve(target, subject.output, subject.n, subject.image.device)
    clean = clean_scores(subject, score)
    reads = [read(subject, name, activation, layout) for name, activation in zip(subject.layers, subject.seen)]
    return Graded(subject, score, clean, reads, slopes_at(subject, score, layout))


def weighed(graded: Graded, found: list[Tensor], drawing: Drawing) -> Outcome:
    """The maps of weights `(n, t, c)`, or `(n, t, c, p)`, of each layer."""
    subject, score, clean, reads, _ = graded
    outcome = drawn(subject, score, clean, combined(found, reads, drawing.combine), [part.grid for part in reads], drawing)
    return outcome._replace(weights=tuple(found), backwards=clean.numel())
