"""The picture of an evaluation: bars with intervals, and deletion curves."""

import math
from typing import TYPE_CHECKING, Any

from camfn import figures
from camfn.evaluation.measures import MEASURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from camfn import Evaluation

_PANELS = 4
"""The number of panels beside each other."""
_METHOD, _CONTROL, _BEST = "#4c72b0", "#b0b0b0", "#1b9e5a"
_TITLE = "Metrics by method"
_CURVES = 8
"""The number of curves that a picture can tell apart."""


def figure(found: "Evaluation") -> "Figure":
    """A panel of bars for each metric, and one of deletion curves. Bars that beat every control are green, controls gray."""
    made = figures.empty()
    panels = [*found.metrics, *(["curves"] if found.curves else [])]
    columns = min(_PANELS, len(panels))
    lines = math.ceil(len(panels) / columns)
    height = 0.9 + 0.19 * len(found.methods)
    drawn = made(figsize=(1.5 + 2.6 * columns, 0.8 + height * lines), dpi=120, layout="constrained")
    axes = drawn.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, panels):
        _draw_curves(axis, found) if name == "curves" else _draw_bars(axis, found, name)
    for number, axis in enumerate(axes[: len(panels)]):
        if number % columns and panels[number] != "curves":
            axis.set_yticklabels([])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawn.suptitle(_TITLE, fontsize=12)
    drawn.supxlabel("bars: means with intervals of 95 %; green: better than every control; gray: controls", fontsize=8)
    return drawn


def _draw_bars(axis: Any, found: "Evaluation", metric: str) -> None:
    names = list(reversed(found.methods))
    intervals = [found.interval(name, metric) for name in names]
    means = [each.mean if each.n else 0.0 for each in intervals]
    lengths = [
        [max(0.0, abs(each.mean - end)) if each.n > 1 else 0.0 for each, end in zip(intervals, ends)]
        for ends in (
            [each.low for each in intervals],
            [each.high for each in intervals],
        )
    ]
    axis.barh(range(len(names)), means, xerr=lengths, color=[_color(found, name, metric) for name in names], height=0.75)
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}[MEASURES[metric].better]
    axis.set_title(metric.replace("_", " ") + arrow, fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.margins(y=0.01)


def _color(found: "Evaluation", method: str, metric: str) -> str:
    if method in found.controls:
        return _CONTROL
    return _BEST if found.beats_controls(method, metric) else _METHOD


def _draw_curves(axis: Any, found: "Evaluation") -> None:
    """The mean curves: the controls in gray, and the methods whose curves fall first in color."""
    areas = {name: float(found.curves[name].area) for name in found.curves}
    best = sorted((name for name in areas if name not in found.controls), key=lambda name: areas[name])[:_CURVES]
    for name, curve in found.curves.items():
        if name in found.controls:
            axis.plot(curve.fractions, curve.scores[0], color=_CONTROL, linewidth=1)
    for name in best:
        axis.plot(found.curves[name].fractions, found.curves[name].scores[0], linewidth=1.3, label=name)
    axis.set_title("score while cells are deleted", fontsize=9)
    axis.set_xlabel("share of cells deleted", fontsize=7)
    axis.set_ylabel("score", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, frameon=False)
