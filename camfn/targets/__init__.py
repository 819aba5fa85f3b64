"""Targets: functions from the model's output to one or more scores per input.

A target is resolved once, on the clean output, to a `Score`: a function of one sample's output and a row of tensors. The
function is the same for all rows of a sweep, and the tensors are looked up by image. One compiled kernel therefore serves
all targets of a kind.
"""

import functools
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
from camfn.targets.outputs import Another, flatten, logits_of, observe, repeats
from camfn.targets.scores import (
    Clean,
    Kind,
    Scale,
    Score,
    at_columns,
    at_rows,
    distinct,
    names,
    reads_logits,
    rows_at,
    score_rows,
)

__all__ = [
    "Another",
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
    "at_rows",
    "boxes",
    "contrast",
    "distinct",
    "flatten",
    "is_plain",
    "log_probability",
    "logit",
    "logits_of",
    "named",
    "names",
    "probability",
    "reads_logits",
    "regression",
    "repeats",
    "resolve",
    "rest",
    "rows_at",
    "score_rows",
    "segmentation",
    "settled",
    "similarity",
    "top",
]


def named(target: Target) -> Named:
    """Convert plain classes, callables and per-image sequences of targets to `Named` targets."""
    if isinstance(target, Named):
        return target
    if callable(target):
        return Function(target)
    mixed = isinstance(target, (list, tuple)) and any(one is None or callable(one) or isinstance(one, Named) for one in target)
    return Each(tuple(map(_of_one_image, target))) if mixed else OfClasses(target)


def _of_one_image(target: Target) -> Named:
    """Convert the target of one image. Several classes are the one row of a table."""
    return OfClasses([target]) if isinstance(target, (list, tuple)) else named(target)


def is_plain(target: Target) -> bool:
    """Return True if the target is classes without a scale. The method then chooses the scale."""
    found = named(target)
    return isinstance(found, Top) or (isinstance(found, OfClasses) and found.scale is None)


def as_probabilities(target: Target) -> Named:
    """Score plain classes by their probability. Targets with a scale are returned unchanged."""
    found = named(target)
    if isinstance(found, Each):
        return Each(tuple(map(as_probabilities, found.targets)))
    if not is_plain(found):
        return found
    return OfClasses(found.classes if isinstance(found, OfClasses) else found, "probability")


def resolve(
    target: Target, output: Any, n: int, device: torch.device, scale: Scale = "logit", another: Another = lambda: None
) -> Score:
    """Resolve a target on the clean output of n samples.

    - `output`: the model's output on the clean batch.
    - `scale`: the scale of classes that do not name one.
    - `another`: gives the output for another number of images, which tells what in the output belongs to them. It is called
      once, and only if the target depends on it and the output leaves it open.

    Returns a `Score`. Raises `CamError` if the target does not fit the output.
    """
    return named(target).resolve(_clean(output, n, device, scale, another))


def settled(target: Target, output: Any, n: int, device: torch.device, another: Another) -> Named:
    """Return a target that gives the same score on every output as `resolve` gives on this one. The arguments are the same."""
    return named(target).settled(_clean(output, n, device, "logit", another))


def _clean(output: Any, n: int, device: torch.device, scale: Scale, another: Another) -> Clean:
    return Clean(output, n, device, scale, functools.cache(lambda: observe(output, n, another)))
