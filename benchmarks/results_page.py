"""docs/results.md and its pictures, from the record of `faithfulness.py`: `python benchmarks/results_page.py` writes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camfn import figures
from camfn.evaluation import MEASURES
from camfn.metrics import CIRCULAR

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "benchmarks" / "results" / "faithfulness.json", ROOT / "docs" / "results.md"
CONTROLS = ("mean_cam", "random_cam", "centered_gaussian", "random_pixels", "input_edges", "all_ones")
NETWORKS = {
    "cifar10_resnet20": "ResNet-20 on CIFAR-10",
    "mobilenet_v2": "MobileNetV2",
    "darknet_tiny": "Darknet, with leaky ReLUs",
    "deit_tiny": "DeiT-tiny, a vision transformer",
}
CHANCE = 0.25
"""The energy in one cell of four of a map that knows no class."""
_REMOVED = "Correlation of the score's drop with the map's share on the removed object"
_CURVES = ("grad_cam", "layer_cam", "score_cam", "full_grad")

Record = Mapping[str, Any]


def of(record: Record, part: str) -> dict[tuple[str, str], Record]:
    return {(each["method"], each["metric"]): each for each in record["parts"].get(part, {}).get("records", ())}


def cell(found: Record | None) -> str:
    """A mean with its interval, and a star if it beats every control."""
    if found is None or not found["n"]:
        return ""
    marks = ("*" if found.get("beats_controls") else "") + ("°" if found["method"] in CIRCULAR.get(found["metric"], ()) else "")
    return f"{found['mean']:.2f}{marks} ({found['low']:.2f}, {found['high']:.2f})"


def table(found: Mapping[tuple[str, str], Record], metrics: Sequence[str]) -> Iterator[str]:
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    names = list(dict.fromkeys(method for method, _ in found))
    better = {name: arrows[MEASURES[name].better] if name in MEASURES else " ↑" for name in metrics}
    yield f"| method | {' | '.join(f'{name}{better[name]}' for name in metrics)} |"
    yield f"| --- | {' | '.join('--:' for _ in metrics)} |"
    for method in names:
        shown = f"*{method}*" if method in CONTROLS else f"`{method}`"
        yield f"| {shown} | {' | '.join(cell(found.get((method, metric))) for metric in metrics)} |"


def blind(record: Record) -> list[str]:
    """The methods whose energy on a grid is not above chance: their intervals hold it, or lie below it."""
    grids = of(record, "grids")
    return [method for (method, _), each in grids.items() if method not in CONTROLS and each["low"] <= CHANCE]


def no_better(found: Mapping[tuple[str, str], Record]) -> list[str]:
    """The methods that beat the controls in no metric of faithfulness and localization."""
    names = dict.fromkeys(method for method, _ in found if method not in CONTROLS)
    rooms = ("faithfulness", "localization")
    beats = {m for (m, metric), each in found.items() if MEASURES[metric].room in rooms and each["beats_controls"]}
    return [name for name in names if name not in beats]


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


_INTRO = """# Results

Evaluation of all methods by `benchmarks/faithfulness.py`: {n} drawn scenes of two objects with exact masks, on the network that
ships with camfn, and a few photos on trained networks. The scenes are drawn shapes, and the samples are small: the intervals
say how small. Nothing here is a ranking for your network. Measure it: [metrics.md](metrics.md#evaluation).

A value is a mean over images with its bootstrap interval of 95 %. A star marks a method that is better than every control: the
interval of each paired difference excludes 0. A circle marks a method that is made by what the metric measures. Controls are in
italics. Maps are raw and signed.

![Energy in the right cell of a grid](results-grids.png)

- Not above chance on grids, so that they explain no class here: {blind}.
- Better than all controls in no metric of faithfulness or localization: {no_better}.

## Which class?

`other_class` and `permuted_classifier` are rank correlations with the map of another class, and with the map after the classes
are permuted: 1 means that the class does not matter. `other_energy` is the energy on the object of the other class, as a share
of that on both; a map of no class has 0.5.
"""
_REMOVALS = """
On {grids} grids of four scenes of different classes, `cell_energy` is the energy in the cell of the class. In
`cell_energy_apart` the network sees each cell apart (DiFull): the remaining energy lies in cells that cannot affect the logit.
On {scenes} scenes from which each object is removed in turn, `single_deletion` is the correlation of the score's drop with the
map's share on the object.
"""


def lines(record: Record) -> Iterator[str]:
    given, pairs = record["arguments"], of(record, "pairs")
    n = next(iter(pairs.values()))["n"]
    yield _INTRO.format(n=n, blind=listed(blind(record)), no_better=listed(no_better({**pairs, **of(record, "slow")})))
    yield from table(pairs, ("other_class", "permuted_classifier", "other_energy"))
    yield _REMOVALS.format(**given)
    all_parts = {**of(record, "grids"), **of(record, "apart"), **of(record, "removals")}
    yield from table(all_parts, ("cell_energy", "cell_energy_apart", "single_deletion", "target_sensitivity"))
    yield "\n![Removal of objects](results-removals.png)\n\n## Does the score follow the map?\n"
    yield from table(pairs, ("deletion", "deletion_difference", "insertion_difference", "average_drop", "average_gain"))
    yield "\n![Deletion](results-deletion.png)\n\n## Is it on the object?\n"
    yield from table(pairs, ("energy", "pointing_game", "pixel_auc", "max_box_acc"))
    slow = of(record, "slow")
    if slow:
        yield f"\n## Methods that take many forward passes\n\nOn {given['slow_scenes']} of the scenes.\n"
        yield from table(slow, ("other_class", "other_energy", "deletion_difference", "average_drop", "energy", "pixel_auc"))
    for part, name in NETWORKS.items():
        found = of(record, part)
        if found:
            yield from photos(found, name)


def photos(found: Mapping[tuple[str, str], Record], name: str) -> Iterator[str]:
    n = next(iter(found.values()))["n"]
    yield f"\n## {name}\n\n{n} photos, without boxes: metrics of localization are absent."
    poor, methods = no_better(found), {method for method, _ in found if method not in CONTROLS}
    yield f"Better than all controls in no metric of faithfulness: {'all of them' if {*poor} == methods else listed(poor)}.\n"
    wanted = ("other_class", "permuted_classifier", "deletion", "deletion_difference", "average_drop")
    yield from table(found, [metric for metric in wanted if any(metric == each for _, each in found)])


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_bars(record: Record, part: str, metric: str, title: str, chance: float | None) -> Any:
    found = [each for (_, name), each in of(record, part).items() if name == metric]
    found = sorted(found, key=lambda each: each["mean"] if each["n"] else 0)
    drawn = figures.empty()(figsize=(7, 0.22 * len(found) + 1), dpi=110, layout="constrained")
    axis = drawn.subplots()
    colors = ["#b0b0b0" if each["method"] in CONTROLS else "#4c72b0" for each in found]
    lengths = [
        [max(0.0, each["mean"] - each["low"]) for each in found],
        [max(0.0, each["high"] - each["mean"]) for each in found],
    ]
    axis.barh(range(len(found)), [each["mean"] for each in found], xerr=lengths, color=colors, height=0.75)
    axis.set_yticks(range(len(found)), [each["method"] for each in found], fontsize=8)
    axis.margins(y=0.01)
    if chance is not None:
        axis.axvline(chance, color="black", linewidth=0.8, linestyle="--")
    axis.set_title(title, fontsize=10)
    return drawn


def draw_curves(record: Record) -> Any:
    curves = record["parts"]["pairs"]["curves"]
    drawn = figures.empty()(figsize=(6, 4), dpi=110, layout="constrained")
    axis = drawn.subplots()
    for name in (*CONTROLS, *_CURVES):
        if name in curves:
            style = {"color": "#b0b0b0", "linewidth": 1} if name in CONTROLS else {"linewidth": 1.8, "label": name}
            axis.plot(curves[name]["fractions"], curves[name]["scores"], **style)
    axis.set_title("Deletion of the cells of a map, the highest first; controls in gray", fontsize=10)
    axis.set_xlabel("share of cells deleted", fontsize=9)
    axis.set_ylabel("probability", fontsize=9)
    axis.legend(frameon=False, fontsize=9)
    return drawn


def write(record: Record, page: Path) -> None:
    page.write_text("\n".join(lines(record)).rstrip() + "\n")
    grids = draw_bars(record, "grids", "cell_energy", "Energy in the right cell of four; dashed: no class", CHANCE)
    grids.savefig(page.with_name("results-grids.png"))
    removals = draw_bars(record, "removals", "single_deletion", _REMOVED, None)
    removals.savefig(page.with_name("results-removals.png"))
    draw_curves(record).savefig(page.with_name("results-deletion.png"))


if __name__ == "__main__":
    write(json.loads(RECORD.read_text()), PAGE)
