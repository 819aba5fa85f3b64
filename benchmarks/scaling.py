"""Do time and memory grow linearly with the work, without steps?

    python benchmarks/scaling.py --out benchmarks/results/scaling.json              # the record, and scaling.png beside it
    python benchmarks/scaling.py --plot benchmarks/results/scaling.json             # draws the figure again, from the record
    python benchmarks/scaling.py --out look.json --rounds 1 --points 2         # a quick look

The calls are eager, on a MobileNetV2's `features.18`, in chunks of 32. On each line they differ in one number: channels,
images in a batch, draws of SS-CAM and IS-CAM, side of the input, or classes; the line of channels also runs with one thread.
All calls are large enough that camfn makes its copy of the weights, which speeds up its forwards. Every call is warmed up
once. Then all calls are interleaved, one each per round. Times are medians over rounds.

Time is fitted to the work: the pixels of all inputs that went through the model, as counted by the call, or the number of
classes on the line of classes. The fit is the straight line that is best in relative terms. The largest relative residual is
the distance of a point from the line, as a share of the line's value. A step would stand out.

Memory is the peak in use during the whole first call in a fresh process, above the model, the input and the copy of the
weights (see `benchmarks/memory.py`). It may grow with the side of the input, as the forwards do, and with nothing else.

Typical output, of `--rounds 1 --points 3` with one thread on a busy machine:

    Time and memory against work, mobilenet_v2 features.18; rounds: 1
    Intel(R) Xeon(R) Processor, threads: 1
    Python 3.11.7, torch 2.13.0+cpu, torchvision 0.28.0, numpy 2.4.6, camfn 0.1.0

                                     from   to      seconds  largest residual  peak MiB  growth of peak
    score_cam, channels               128  300  0.37 - 0.83              1.3%   78 - 78            1.00
    score_cam, channels, one thread   128  300  0.40 - 0.82              2.6%
    score_cam, images                   1    3  0.38 - 1.03              0.7%   78 - 85            1.08
    ss_cam, draws                       1    3  0.42 - 1.15              0.6%   82 - 82            1.00
    is_cam, draws                       1    3  0.36 - 1.02              1.2%   78 - 78            1.00
    score_cam, side                    96  160  0.25 - 0.81              0.2%  63 - 138            2.19
    score_cam, classes                  1   25  0.38 - 0.39              1.2%   78 - 78            1.00
"""

import argparse
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import memory
import numpy as np
import torch
from common import Case

import camfn

BASE = Case(model="mobilenet_v2", layer="features.18", size=112, channels=128)


class Line(NamedTuple):
    """A line of calls that differ in one number."""

    knob: str  # the field of `Case` that differs
    values: tuple[int, ...]
    base: Case = BASE
    threads: int | None = None  # None uses all threads


SWEPT = (128, 200, 300, 400, 512, 640)
COUNTS = (1, 2, 3, 4, 6)
LINES = {
    "score_cam, channels": Line("channels", SWEPT),
    "score_cam, channels, one thread": Line("channels", SWEPT, threads=1),
    "score_cam, images": Line("images", COUNTS),
    "ss_cam, draws": Line("samples", COUNTS, BASE._replace(method="ss_cam")),
    "is_cam, draws": Line("samples", COUNTS, BASE._replace(method="is_cam")),
    "score_cam, side": Line("size", (96, 128, 160, 192, 224)),
    "score_cam, classes": Line("targets", (1, 5, 25, 100, 400, 1000)),
}
PANELS = {  # for each column, the label of the horizontal axis and its lines
    "channels swept": ("score_cam, channels", "score_cam, channels, one thread"),
    "images in the batch": ("score_cam, images",),
    "draws per channel": ("ss_cam, draws", "is_cam, draws"),
    "side of the input (px)": ("score_cam, side",),
    "classes explained": ("score_cam, classes",),
}


# --------------------------------------------------------------------------------------------------------- time


def cases_of(line: Line, points: int) -> list[Case]:
    return [line.base._replace(**{line.knob: value}) for value in line.values[:points]]


def with_threads(call: Callable[[], Any], threads: int | None) -> Callable[[], Any]:
    """The call with this number of threads; other calls keep theirs."""
    if threads is None:
        return call

    def narrow() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return narrow


def measured_times(chosen: dict[str, list[Case]], rounds: int) -> dict[str, dict[str, list[Any]]]:
    """For each line, the seconds of each point in every round, and the forwards that the call reports."""
    prepared = functools.cache(common.model_and_input)  # calls on the same input share a model
    calls, forwards = {}, {}
    for name, cases in chosen.items():
        for number, case in enumerate(cases):
            usual = Case(model=case.model, size=case.size, images=case.images)
            calls[name, number] = with_threads(common.call_of(case, *prepared(usual)), LINES[name].threads)
            common.say(f"warm-up: {name}, point {number + 1}")
            forwards[name, number] = calls[name, number]().forwards
    timings = common.interleaved(calls, rounds)
    return {
        name: {
            "forwards": [forwards[name, number] for number in range(len(cases))],
            "seconds": [timings[name, number].seconds for number in range(len(cases))],
        }
        for name, cases in chosen.items()
    }


def fit(work: list[float], seconds: list[float]) -> dict[str, Any]:
    """The line `seconds = start + slope * work` that is best in relative terms, and the residuals of the points."""
    slope, start = np.polyfit(work, seconds, 1, w=1 / np.asarray(seconds))
    line = start + slope * np.asarray(work)
    residual = np.abs(np.asarray(seconds) / line - 1)
    return {"start": float(start), "slope": float(slope), "line": line.tolist(), "largest_residual": float(residual.max())}


def work_of(line: Line, cases: list[Case], forwards: list[int]) -> list[float]:
    """Millions of pixels through the model, or, if that is the same for all calls, the number that differs."""
    if line.knob == "targets":
        return [case.targets for case in cases]
    return [count * case.size**2 / 1e6 for count, case in zip(forwards, cases)]


# ----------------------------------------------------------------------------------------------------- the record


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: cases_of(line, options.points) for name, line in LINES.items()}
    times = measured_times(chosen, options.rounds)
    memories = {} if options.no_memory else {name: cases for name, cases in chosen.items() if LINES[name].threads is None}
    peaks = {name: [memory.peak(case)["peak"] for case in cases] for name, cases in memories.items()}
    return {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "numpy", "camfn"]),
        "arguments": {key: value for key, value in vars(options).items() if key not in ("out", "plot")},
        "lines": {name: _entry(LINES[name], cases, times[name], peaks.get(name)) for name, cases in chosen.items()},
    }


def _entry(line: Line, cases: list[Case], times: dict[str, list[Any]], peaks: list[float] | None) -> dict[str, Any]:
    medians = [statistics.median(of) for of in times["seconds"]]
    return {
        "first": cases[0]._asdict(),
        "knob": line.knob,
        "values": list(line.values[: len(cases)]),
        "threads": line.threads or torch.get_num_threads(),
        **times,
        "median_seconds": medians,
        "fit": fit(work_of(line, cases, times["forwards"]), medians),
        "peak_mib": peaks,
        "growth_of_peak": max(peaks) / min(peaks) if peaks else None,
    }


def text(record: dict[str, Any]) -> str:
    where, asked = record["environment"], record["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    columns = ("", "from", "to", "seconds", "largest residual", "peak MiB", "growth of peak")
    return "\n".join(
        [
            f"Time and memory against work, {BASE.model} {BASE.layer}; rounds: {asked['rounds']}",
            f"{where['processor']}, threads: {where['threads']}",
            f"Python {where['python']}, {versions}",
            "",
            common.table(columns, [_line(name, entry) for name, entry in record["lines"].items()]),
        ]
    )


def _line(name: str, entry: dict[str, Any]) -> list[str]:
    ends, peaks = (entry["values"][0], entry["values"][-1]), entry["peak_mib"]
    seconds = f"{entry['median_seconds'][0]:.2f} - {entry['median_seconds'][-1]:.2f}"
    spread = (f"{min(peaks):.0f} - {max(peaks):.0f}", f"{entry['growth_of_peak']:.2f}") if peaks else ("", "")
    return [name, *map(str, ends), seconds, f"{entry['fit']['largest_residual']:.1%}", *spread]


# ---------------------------------------------------------------------------------------------------- the picture


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot time above memory, with a column for each number that differs."""
    common.require({"matplotlib": "matplotlib"})
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(PANELS), 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(PANELS), squeeze=False)
    for (above, below), (label, names) in zip(axes.T, PANELS.items()):
        for colour, name in zip(("tab:blue", "tab:orange"), names):
            _draw(above, below, name, record["lines"][name], colour)
        for axis in (above, below):
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
            if axis.has_data():  # a record may lack memory
                axis.set_ylim(0, 1.35 * axis.dataLim.ymax)  # leave room for the legend
                axis.legend(fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("seconds (median)")
    axes[1, 0].set_ylabel("peak memory (MiB)\nabove model, input and copy of the weights")
    where = record["environment"]
    figure.suptitle(
        f"camfn on {BASE.model} {BASE.layer}: points measured, dashed the straight line in the work "
        f"({where['processor']}, torch {where['versions']['torch']})"
    )
    FigureCanvasAgg(figure).print_png(path)


def _draw(above: Any, below: Any, name: str, entry: dict[str, Any], colour: str) -> None:
    method, residual = name.split(",")[0], entry["fit"]["largest_residual"]
    threads = "1 thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
    above.plot(entry["values"], entry["median_seconds"], "o", color=colour, label=f"{method}, {threads}: within {residual:.1%}")
    above.plot(entry["values"], entry["fit"]["line"], "--", color=colour, linewidth=1)
    if entry["peak_mib"]:
        below.plot(entry["values"], entry["peak_mib"], "o-", color=colour, label=f"{method}: x {entry['growth_of_peak']:.2f}")


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("Typical")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--points", type=common.positive, default=6, help="the first so many points of each line, two at least")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes that measure memory")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="where to write the record, with its picture beside it")
    parser.add_argument("--plot", metavar="FILE.json", type=Path, help="measure nothing: draw the picture of this record again")
    options = parser.parse_args(argv)
    if options.points < 2:
        parser.error("--points: a line has two points at least")
    return options


def main(argv: list[str]) -> None:
    options = options_of(argv)
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    warnings.simplefilter("ignore", camfn.CamWarning)  # random weights give meaningless maps
    record = measure(options)
    print(text(record))
    if options.out:
        common.write(options.out, record)
        plot(record, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
