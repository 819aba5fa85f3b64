"""The result of an evaluation: values for each image, intervals, tables and a picture."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn.evaluation import drawing
from camfn.evaluation.measures import MEASURES, Measure
from camfn.evaluation.statistics import Interval, difference, interval
from camfn.metrics import CIRCULAR
from camfn.metrics.faithfulness import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETTER, CIRCLE = "*", "°"
NOTE = (
    f"Means over images with bootstrap intervals of 95 %. {BETTER} better than every control (the paired interval of the "
    f"difference excludes 0); {CIRCLE} the method is made by what the metric measures."
)
ENOUGH = 6
"""The number of images from which a method can be better than a control: the differences of five have one sign by chance in one
case of sixteen, more often than an interval of 95 % allows."""


class Evaluation(NamedTuple):
    """What methods are worth on some images, beside controls.

    `values[method][metric]` has a value for each image, NaN where it is not defined. Printed, it is a table.
    """

    values: Mapping[str, Mapping[str, Float[Tensor, " n"]]]
    controls: tuple[str, ...]
    curves: Mapping[str, Curve]  # the mean deletion curve of each method, if "deletion" was asked
    skipped: Mapping[str, str]  # methods and metrics that are not in the table, with the reason
    seed: int
    note: str = ""  # what the maps are, if they are not signed and unscaled
    origins: Mapping[str, str] = MappingProxyType({})  # the method of each name, where they differ

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that were judged, the controls last."""
        judged = tuple(self.values)
        return (*(name for name in judged if name not in self.controls), *(n for n in self.controls if n in judged))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the table."""
        return tuple(next(iter(self.values.values())))

    def interval(self, method: str, metric: str) -> Interval:
        """The mean over images, with its interval."""
        return interval(self._of(method, metric), self.seed)

    def paired(self, method: str, metric: str, control: str) -> Interval:
        """The mean of a method's value less that of another or a control for the same image, with its interval."""
        return difference(self._of(method, metric), self._of(control, metric), self.seed)

    def beats_controls(self, method: str, metric: str) -> bool:
        """Whether the method is better than every control: the intervals of the paired differences exclude 0.

        It is false for fewer than six images.
        """
        self._of(method, metric)
        better = MEASURES[metric].better
        controls = [name for name in self.controls if name in self.values and name != method]
        if not better or not controls or method in self.controls:
            return False
        known = [each for control in controls if (each := self.paired(method, metric, control)).n]
        enough = bool(known) and min(each.n for each in known) >= ENOUGH
        return enough and all(each.low > 0 if better == "higher" else each.high < 0 for each in known)

    def _of(self, method: str, metric: str) -> Tensor:
        if method not in self.values or metric not in self.values[method]:
            raise CamError(
                f"the evaluation has no value of {metric!r} for {method!r}: it has {', '.join(self.metrics)} for "
                f"{', '.join(self.methods)}{self._why(method, metric)}"
            )
        return self.values[method][metric]

    def _why(self, *names: str) -> str:
        return "".join(f"; {name}: {self.skipped[name]}" for name in names if name in self.skipped)

    def records(self) -> list[dict[str, Any]]:
        """A row for each method and metric: the mean, its interval, the number of images, and how it compares."""
        return [
            {
                "method": method,
                "metric": metric,
                **self.interval(method, metric)._asdict(),
                "better": MEASURES[metric].better,
                "control": method in self.controls,
                "beats_controls": self.beats_controls(method, metric),
                "circular": self._circular(method, metric),
            }
            for method in self.methods
            for metric in self.metrics
        ]

    def _circular(self, method: str, metric: str) -> bool:
        return self.origins.get(method, method) in CIRCULAR.get(metric, ())

    def csv(self) -> str:
        """The records as CSV."""
        text, rows = io.StringIO(), self.records()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def markdown(self) -> str:
        """The table in Markdown: one table for each kind of metric."""
        rooms = dict.fromkeys(MEASURES[metric].room for metric in self.metrics)
        tables = [self._table(room) for room in rooms]
        left = [f"Not in the table: {name}, as {why}." for name, why in self.skipped.items()]
        return "\n\n".join([*tables, f"{NOTE} {self.note}".rstrip(), *(["\n".join(left)] if left else [])]) + "\n"

    def _table(self, room: str) -> str:
        metrics = [metric for metric in self.metrics if MEASURES[metric].room == room]
        arrows = {"higher": " ↑", "lower": " ↓", "": ""}
        heads = [room, *(f"{metric}{arrows[MEASURES[metric].better]}" for metric in metrics)]
        rows = [[self._named(method), *(self._cell(method, metric) for metric in metrics)] for method in self.methods]
        lines = [heads, ["---", *["--:"] * len(metrics)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _named(self, method: str) -> str:
        return f"*{method}*" if method in self.controls else method

    def _cell(self, method: str, metric: str) -> str:
        found = self.interval(method, metric)
        if not found.n:
            return ""
        marks = BETTER if self.beats_controls(method, metric) else ""
        marks += CIRCLE if self._circular(method, metric) else ""
        ends = f" ({found.low:.3g}, {found.high:.3g})" if found.n > 1 else ""
        return f"{found.mean:.3g}{marks}{ends}"

    def __repr__(self) -> str:
        n = max((len(values) for own in self.values.values() for values in own.values()), default=0)
        names = self.methods
        width = max(map(len, names))
        lines = [f"Evaluation of {n} images (controls in brackets)"]
        for metric in self.metrics:
            better = MEASURES[metric].better
            lines.append(f"  {metric}{f' ({better} is better)' if better else ''}: {MEASURES[metric].about}")
            for name in names:
                shown = f"[{name}]" if name in self.controls else name
                lines.append(f"    {shown:{width + 2}} {self._cell(name, metric)}")
        return "\n".join(lines)

    def figure(self) -> "Figure":
        """Bars with intervals for each metric, and the mean deletion curves, as a figure of matplotlib."""
        return drawing.figure(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table (.md, .csv, .json) or the picture (.png, .pdf, .svg), by the ending of the path.

        **Raises** `CamError` for another ending, or if the file cannot be written.
        """
        place = Path(path)
        texts = {".md": self.markdown, ".csv": self.csv, ".json": lambda: json.dumps(_finite(self.records()), indent=1) + "\n"}
        ending = place.suffix.lower()
        try:
            if ending in texts:
                place.write_text(texts[ending](), encoding="utf-8")
            elif ending in (".png", ".pdf", ".svg"):
                self.figure().savefig(place)
            else:
                raise CamError(f"{str(place)!r} must end in .md, .csv, .json, .png, .pdf or .svg")
        except OSError as error:
            raise CamError(f"{str(place)!r} cannot be written: {error.strerror}") from error


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no NaN."""
    lost = [{key: None for key, value in row.items() if isinstance(value, float) and math.isnan(value)} for row in rows]
    return [{**row, **none} for row, none in zip(rows, lost)]


class Gathered:
    """The values of batches, while an evaluation runs."""

    def __init__(self, names: tuple[str, ...], controls: tuple[str, ...]) -> None:
        self.skipped: dict[str, str] = {}
        self._controls = controls
        self._found: dict[str, dict[str, list[Tensor | int]]] = {name: {} for name in names}
        self._curves: dict[str, list[Curve]] = {}
        self._failed: dict[str, dict[str, str]] = {}  # by metric and method

    def add(self, name: str, metric: str, values: Tensor | None, count: int) -> None:
        self._found[name].setdefault(metric, []).append(count if values is None else values)

    def add_curve(self, name: str, curve: Curve) -> None:
        self._curves.setdefault(name, []).append(curve)

    def skip(self, name: str, error: Exception) -> None:
        self.skipped[name] = _reason(error)
        self._found.pop(name, None)
        self._curves.pop(name, None)

    def cannot(self, metric: str, method: str, error: Exception) -> None:
        self._failed.setdefault(metric, {}).setdefault(method, _reason(error))

    def result(self, measures: Mapping[str, Measure], left: Mapping[str, str], seed: int) -> Evaluation:
        judged = {name: own for name, own in self._found.items() if own}
        if not any(name not in self._controls for name in judged):
            by_reason: dict[str, list[str]] = {}
            for name, why in self.skipped.items():
                by_reason.setdefault(why, []).append(name)
            told = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
            raise CamError(f"no method could be judged: {told}")
        methods = [own for name, own in judged.items() if name not in self._controls]
        lost = {metric for metric in self._failed if all(_none(own[metric]) for own in methods)}
        if not set(measures) - lost:
            why = "; ".join(f"{name}: {reason}" for name, reason in self._told(lost).items())
            raise CamError(f"no metric could be computed: {why}")
        values = {
            name: MappingProxyType({key: each.settle(_joined(own[key])) for key, each in measures.items() if key not in lost})
            for name, own in judged.items()
        }
        curves = {name: _mean(own) for name, own in self._curves.items()}
        skipped = MappingProxyType({**self.skipped, **left, **self._told(lost)})
        return Evaluation(MappingProxyType(values), self._controls, MappingProxyType(curves), skipped, seed)

    def _told(self, lost: set[str]) -> dict[str, str]:
        """Why metrics are not in the table, or have no value for some methods."""
        found = {}
        for metric, by in self._failed.items():
            if metric in lost:
                found[metric] = next(iter(by.values()))
            else:
                found |= {f"{metric} of {method}": why for method, why in by.items()}
        return found


def _none(parts: list[Tensor | int]) -> bool:
    return all(isinstance(part, int) for part in parts)


def _joined(parts: list[Tensor | int]) -> Tensor:
    """Values of all batches. Where a batch failed, those of its images are NaN."""
    known = next((part for part in parts if isinstance(part, Tensor)), torch.zeros(0))
    filled = [known.new_full((part, *known.shape[1:]), float("nan")) if isinstance(part, int) else part for part in parts]
    return torch.cat(filled)


def _reason(error: Exception) -> str:
    told = first_line(error).rstrip(".")
    return told if isinstance(error, CamError) else f"{type(error).__name__}: {told}"


def _mean(curves: list[Curve]) -> Curve:
    """The mean over images, at the fractions of the first batch. Batches of other grids have other fractions."""
    at = curves[0].fractions.double().cpu()
    scores = torch.cat([_scores_at(at, curve) for curve in curves])
    return Curve(at.to(curves[0].fractions.dtype), scores.mean(0, keepdim=True).to(curves[0].scores.dtype))


def _scores_at(at: Tensor, curve: Curve) -> Tensor:
    known, scores = curve.fractions.double().cpu(), curve.scores.detach().double().cpu()
    if torch.equal(known, at):
        return scores
    return torch.from_numpy(np.stack([np.interp(at.numpy(), known.numpy(), row.numpy()) for row in scores]))
