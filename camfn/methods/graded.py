"""What methods share that look at the gradient of the score at a layer: activations and gradients, and maps of weights."""

from typing import NamedTuple

from torch import Tensor, nn

from camfn._types import Gradients, Inputs, Layers, Layout, State, Target, Weights
from camfn.layouts import Read
from camfn.methods.table import Drawing, Outcome, clean_scores, combined, drawn, read, slopes_at
from camfn.model.forward import Subject, look
from camfn.model.inputs import Key
from camfn.targets import Score, resolve


class Graded(NamedTuple):
    """What one forward and one backward for each target give."""

    subject: Subject
    score: Score
    clean: Tensor  # (n, t)
    reads: list[Read]  # of each layer
    slopes: list[Gradients]


def grade(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target,
    state: State | None,
    layout: Layout,
    *,
    masked: Key = None,
    masks: bool = False,
) -> Graded:
    """Activations, scores and the scores' gradients. `masks`: the method changes an input, which `masked` says."""
    seen = seen_of(look(model, layer, x, state, masked, masks=masks, graph=True), target, layout)
    return seen._replace(slopes=slopes_at(seen.subject, seen.score, layout))


def seen_of(subject: Subject, target: Target, layout: Layout) -> Graded:
    """Activations and scores; no gradients yet."""
    score = resolve(target, subject.output, subject.n, subject.image.device)
    reads = [read(subject, *seen, layout) for seen in zip(subject.layers, subject.seen)]
    return Graded(subject, score, clean_scores(subject, score), reads, [])


def weighed(graded: Graded, found: list[Weights] | list[Gradients], drawing: Drawing) -> Outcome:
    """The maps of weights of each layer: `(n, t, c)`, or `(n, t, c, p)`."""
    subject, score, clean, reads, _ = graded
    outcome = drawn(subject, score, clean, combined(found, reads, drawing), [part.grid for part in reads], drawing)
    return outcome._replace(weights=tuple(found), backwards=clean.numel())
