"""What is explained: from the model's output to one score, or several, per input.

Every kind of target is resolved, once, on the clean output, to a `Score`: a function of one sample's output and a row of
tensors. The function is the same for all rows of a sweep and the tensors are looked up by image, so that one compiled
kernel serves every target of a kind.
"""

from typing import Any

import torch

from camfn._types import Target
from camfn.targets.algebra import Each, Function, Named, Sum
from camfn.targets.classes import (
    Contrast,
    OfClasses,
    Output,
    Top,
    contrast,
    log_probability,
    logit,
    probability,
    regression,
    rest,
    top,
)
from camfn.targets.dense import Segmentation, segmentation
from camfn.targets.detections import Boxes, boxes
from camfn.targets.embeddings import Similarity, similarity
from camfn.targets.scores import (
    Clean,
    Kind,
    Scale,
    Score,
    at_columns,
    distinct,
    logits_of,
    names,
    reads_logits,
    rows_at,
    score_rows,
)

__all__ = [
    "Boxes",
    "Clean",
    "Contrast",
    "Each",
    "Function",
    "Kind",
    "Named",
    "OfClasses",
    "Output",
    "Scale",
    "Score",
    "Segmentation",
    "Similarity",
    "Sum",
    "Top",
    "as_probabilities",
    "at_columns",
    "boxes",
    "contrast",
    "distinct",
    "is_plain",
    "log_probability",
    "logit",
    "logits_of",
    "named",
    "names",
    "probability",
    "reads_logits",
    "regression",
    "resolve",
    "rest",
    "rows_at",
    "score_rows",
    "segmentation",
    "similarity",
    "top",
]


def named(target: Target) -> Named:
    """The target as one of those that have a name: plain classes, callables, and one of whatever for each image."""
    if isinstance(target, Named):
        return target
    if callable(target):
        return Function(target)
    mixed = isinstance(target, (list, tuple)) and any(one is None or callable(one) or isinstance(one, Named) for one in target)
    return Each(tuple(map(named, target))) if mixed else OfClasses(target)


def is_plain(target: Target) -> bool:
    """Is it classes and nothing else, so that what one stands for is the method's to say?"""
    found = named(target)
    return isinstance(found, Top) or (isinstance(found, OfClasses) and found.scale is None)


def as_probabilities(target: Target) -> Named:
    """For methods whose papers score by the softmax: plain classes on that scale; what says its own is left alone."""
    found = named(target)
    if isinstance(found, Each):
        return Each(tuple(map(as_probabilities, found.targets)))
    if not is_plain(found):
        return found
    return OfClasses(found.classes if isinstance(found, OfClasses) else found, "probability")


def resolve(target: Target, output: Any, n: int, device: torch.device, scale: Scale = "logit") -> Score:
    """The score that `target` means for this clean output. `scale` is what a plain class stands for."""
    return named(target).resolve(Clean(output, n, device, scale))
