"""The metrics of a table: how each is asked of a batch of maps, and which direction is better."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from camfn import metrics
from camfn._errors import CamError, suggested
from camfn.evaluation.judged import Judged
from camfn.formulas.resampling import resize_with_ties
from camfn.metrics.boxes import box_ious, max_box_acc

Room = Literal["class", "faithfulness", "localization", "complexity", "robustness"]
AT = (0.3, 0.5, 0.7)
"""The overlaps from which on a box fits, of MaxBoxAccV2."""


class Measure(NamedTuple):
    """A metric in a table."""

    of: Callable[[Judged], Tensor]
    """From a batch of maps to a value for each image, or to a row that `settle` reads when all images are known."""
    better: Literal["higher", "lower", ""]
    room: Room
    about: str
    needs: tuple[Literal["masks", "boxes", "others"], ...] = ()
    default: bool = True
    """Whether it is in the default table. The others take many forward passes, or add little."""
    settle: Callable[[Tensor], Tensor] = lambda values: values


def _own_energy(judged: Judged) -> Tensor:
    return metrics.energy_pointing_game(judged.maps, _there(judged.asked.images.masks), spatial_ndim=judged.axes)


def _other_energy(judged: Judged) -> Tensor:
    own, other = (
        metrics.energy_pointing_game(judged.maps, _there(masks), spatial_ndim=judged.axes)
        for masks in (judged.asked.images.masks, judged.asked.images.others)
    )
    return torch.where(own + other > 0, other / (own + other), float("nan"))


def _there(masks: Tensor | None) -> Tensor:
    assert masks is not None  # a measure is asked only where its annotation is there
    return masks


def _on(metric: Callable[..., Tensor]) -> Callable[[Judged], Tensor]:
    return lambda judged: metric(judged.maps, _there(judged.asked.images.masks), spatial_ndim=judged.axes)


def _scored(metric: Callable[[Tensor, Tensor, metrics.ScoreFunction], Tensor]) -> Callable[[Judged], Tensor]:
    return lambda judged: metric(judged.masks, judged.x, judged.score)


def _ious(judged: Judged) -> Tensor:
    """The best overlap of each image at each threshold. An image without a box has NaN."""
    boxes = judged.asked.images.boxes
    assert boxes is not None
    finite = torch.isfinite(judged.maps).flatten(1).all(1).tolist()
    there = [number for number, own in enumerate(boxes) if len(own) and finite[number]]
    if not there:
        raise CamError("no image of a batch has a box and a finite map")
    maps = resize_with_ties(judged.masks[there], judged.x.shape[2:]).clamp(0, 1)
    known = box_ious(maps, [boxes[number] for number in there])
    return known.new_full((len(boxes), known.shape[1]), float("nan")).index_copy(0, torch.tensor(there), known)


def _accuracy(ious: Tensor) -> Tensor:
    """The share of the overlaps that each image reaches, at the threshold that is best over the data."""
    found = ious.new_full((len(ious),), float("nan"))
    known = ~ious.isnan().any(-1)
    if not known.any():
        return found
    ious = ious[known]
    places = [round(each * ious.shape[1]) for each in max_box_acc(ious, at=AT).thresholds]
    reached = torch.stack([(ious[:, place] >= enough).to(found) for place, enough in zip(places, AT)])
    return found.masked_scatter(known, reached.mean(0))


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "other_class": Measure(
            Judged.like_other, "lower", "class", "rank correlation with the map of the most probable other class"
        ),
        "permuted_classifier": Measure(
            Judged.like_permuted, "lower", "class", "rank correlation with the map after the classes are permuted"
        ),
        "other_energy": Measure(
            _other_energy,
            "lower",
            "class",
            "energy on objects of other classes, as a share of that on all objects",
            ("masks", "others"),
        ),
        "deletion": Measure(
            Judged.minus_random, "higher", "faithfulness", "area of deletion in random order less that in the map's order"
        ),
        "deletion_difference": Measure(
            lambda judged: metrics.deletion(judged.maps, judged.x, judged.score, order="difference", seed=judged.seed),
            *("higher", "faithfulness", "area of deletion, the least relevant cells first, less the most relevant first"),
        ),
        "insertion_difference": Measure(
            lambda judged: metrics.insertion(judged.maps, judged.x, judged.score, order="difference", seed=judged.seed),
            *("higher", "faithfulness", "area of insertion, the most relevant cells first, less the least relevant first"),
            default=False,
        ),
        "road": Measure(
            lambda judged: metrics.road(judged.maps, judged.x, judged.score, seed=judged.seed),
            *("higher", "faithfulness", "ROAD: half the difference between the removal of least and most relevant pixels"),
            default=False,
        ),
        "average_drop": Measure(
            _scored(metrics.average_drop), "lower", "faithfulness", "share of the probability that is lost"
        ),
        "increase_in_confidence": Measure(
            _scored(metrics.increase_in_confidence), "higher", "faithfulness", "share of images with a higher probability"
        ),
        "average_gain": Measure(
            _scored(metrics.average_gain), "higher", "faithfulness", "share of the missing probability that is gained"
        ),
        "adcc": Measure(
            lambda judged: metrics.adcc(judged.masks, judged.x, judged.score, judged.again),
            *("higher", "faithfulness", "harmonic mean of coherency, 1 - complexity and 1 - drop"),
            default=False,
        ),
        "arcc": Measure(
            lambda judged: metrics.arcc(judged.masks, judged.x, judged.score, judged.again, seed=judged.seed),
            *("higher", "faithfulness", "harmonic mean of coherency, 1 - complexity and ROAD"),
            default=False,
        ),
        "infidelity": Measure(
            lambda judged: metrics.infidelity(judged.maps, judged.x, judged.score, seed=judged.seed),
            *("lower", "faithfulness", "squared error of the map's prediction of the score without random squares"),
            default=False,
        ),
        "sensitivity_n": Measure(
            lambda judged: metrics.sensitivity_n(judged.maps, judged.x, judged.score, seed=judged.seed),
            *("higher", "faithfulness", "correlation of the map's sum with the drop, over random sets of cells"),
            default=False,
        ),
        "energy": Measure(_own_energy, "higher", "localization", "share of the map's energy on the object", ("masks",)),
        "pointing_game": Measure(
            _on(metrics.pointing_game), "higher", "localization", "share of images with the maximum on the object", ("masks",)
        ),
        "pixel_auc": Measure(
            _on(metrics.pixel_auc), "higher", "localization", "area under the ROC curve of the object's pixels", ("masks",)
        ),
        "iou": Measure(
            lambda judged: metrics.iou(judged.masks, _there(judged.asked.images.masks), spatial_ndim=judged.axes),
            *("higher", "localization", "intersection over union at half of the maximum"),
            needs=("masks",),
            default=False,
        ),
        "max_box_acc": Measure(
            _ious, "higher", "localization", "MaxBoxAccV2, the threshold chosen over the data", ("boxes",), False, _accuracy
        ),
        "gini": Measure(
            lambda judged: metrics.gini(judged.maps, spatial_ndim=judged.axes),
            "",
            "complexity",
            "Gini index; higher is sparser",
        ),
        "entropy": Measure(
            lambda judged: metrics.entropy(judged.maps, spatial_ndim=judged.axes),
            "",
            "complexity",
            "entropy in nats; lower is simpler",
            default=False,
        ),
        "maximum_sensitivity": Measure(
            lambda judged: metrics.maximum_sensitivity(judged.again, judged.x, seed=judged.seed, spatial_ndim=judged.axes),
            *("lower", "robustness", "largest relative change of the map under small noise"),
            default=False,
        ),
    }
)
"""The metrics that a table can have, in the order of its columns: class sensitivity first."""


_NEEDS = {"masks": "masks", "boxes": "boxes", "others": "masks of other objects (others)"}


def chosen(names: str | Sequence[str] | None, there: set[str]) -> tuple[dict[str, Measure], dict[str, str]]:
    """The measures of these names, and why others are left out. `None` is the default ones, `"all"` all.

    **Arguments**

    - `there`: the annotations that all batches have: `"masks"`, `"boxes"`, `"others"`.
    """
    asked = [names] if isinstance(names, str) and names != "all" else names
    if asked is None or asked == "all":
        wanted = [name for name, each in MEASURES.items() if each.default or asked == "all"]
    else:
        unknown = [name for name in asked if name not in MEASURES]
        if unknown:
            raise CamError(f"no metric named {unknown[0]!r}{suggested(unknown[0], MEASURES)}; all: {', '.join(MEASURES)}")
        wanted = [name for name in MEASURES if name in asked]
    missing = {name: [need for need in MEASURES[name].needs if need not in there] for name in wanted}
    left = {
        name: f"no {' and no '.join(_NEEDS[need] for need in needs)} were given" for name, needs in missing.items() if needs
    }
    if asked is not None and asked != "all" and left:
        name, why = next(iter(left.items()))
        raise CamError(f"the metric {name} cannot be computed: {why}")
    return {name: MEASURES[name] for name in wanted if name not in left}, left
