"""Score-CAM swept in bfloat16: how accurate is the map, with and without refinement, and how much faster? On trained networks.

    python benchmarks/precision.py --out benchmarks/results/precision.json          # a quarter of an hour; and precision.png
    python benchmarks/precision.py --only speed --out benchmarks/results/precision.json    # only the speed, in the same record
    python benchmarks/precision.py --networks darknet_tiny --photos 2 --rounds 1    # a quick look, in a minute
    python benchmarks/precision.py --plot benchmarks/results/precision.json         # draws it again; joins several records

The networks and photos come from the folder in the environment variable CAMFN_REAL; `tests/oracles/libraries.py` describes its
contents.
The target is the predicted class. Each photo gets three maps:

* `float32`: the reference for the others;
* `bfloat16`: `camfn.score_cam(..., sweep=camfn.Sweep(dtype=torch.bfloat16))`. It scores the channels that carry the map again
  in full precision, until the possible effect of the others' rounding is small: at most a quarter of the channels;
* `unrefined`: the same with no channel scored again. The whole sweep is in bfloat16, softmax and sums in float32.

Pearson's correlation and the largest difference compare normalized maps on the layer's grid. A map is `near` if they are at
least .999 and at most .03. `again` is the share of masked inputs that were scored again, from the card's forwards: the median
over photos, and the maximum as `most`. `stated` is the error on the card, median over photos. It is `honest` if the true error
is at most the stated error plus the possible difference of two full float32 maps.

For the speed, torchcam and the three sweeps are interleaved on the first photo, one call each per round. Ratios are taken
within a round. `score_cam.py` measures the speed on a ResNet-18.

Typical output:

    Intel(R) Xeon(R) Processor, AVX512, threads: 1
    Python 3.11.7, torch 2.13.0+cpu, torchvision 0.28.0, numpy 2.4.6, camfn 0.1.0, torchcam 0.5.0

    darknet_tiny features; photos: 2
               near  error up to 0.03  pearson from 0.999  median error  worst error  ...  again  stated  honest
    bfloat16   100%              100%                100%        0.0108       0.0137  ...    25%  0.0139     50%
    unrefined    0%                0%                  0%        0.1324       0.1506  ...     0%

               seconds  times as fast as torchcam  times as fast as float32
    torchcam     10.69                       1.00                      0.50
    float32       5.38                       1.99                      1.00
    bfloat16      4.11                       2.60                      1.31
    unrefined     3.45                       3.10                      1.56
    busy with us 40% of the time
"""

import argparse
import functools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from budget import LAYERS, PLOT, compared, honest, joined, panels, trained
from torch import Tensor, nn

import camfn
from camfn.sweep import gaussian_process as gp

NARROW = camfn.Sweep(dtype=torch.bfloat16)
ERROR, PEARSON = 0.03, 0.999  # the limits within which a map counts as near


# -------------------------------------------------------------------------------------------------------------- calls


def unrefined() -> AbstractContextManager[Any]:
    """Switch off the refinement: no error is large enough to score a channel again."""
    return mock.patch.object(gp, "GOAL", math.inf)


def card(model: nn.Module, layer: str, x: Tensor, target: int | None, way: str) -> camfn.Explanation:
    """The card of one of the three maps."""
    with unrefined() if way == "unrefined" else nullcontext():
        return camfn.explain(model, layer, x, target, sweep=camfn.Sweep() if way == "float32" else NARROW)


def torchcam(model: nn.Module, layer: str, x: Tensor, target: int) -> Tensor:
    """torchcam's map, with its default batch size."""
    from torchcam.methods import ScoreCAM

    with ScoreCAM(model, layer, batch_size=32) as extractor:
        with torch.inference_mode():
            model(x)
        return extractor([target])[0]


# --------------------------------------------------------------------------------------------------------- a network


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one network: lists over photos, and seconds over rounds."""
    model, photos = trained(name, options.photos)
    layer, found = LAYERS[name], {"bfloat16": [], "unrefined": []}
    for number, x in enumerate(photos):
        full = card(model, layer, x, None, "float32")
        for way, rows in found.items():
            rows.append(against(full, card(model, layer, x, int(full.classes), way)))
        common.say(f"{name}: photo {number + 1} of {len(photos)}, {full.seconds:.1f} s in full")
    found["unrefined"] = [row | {"stated": None} for row in found["unrefined"]]  # without refinement no error is stated
    ways = {way: {column: [row[column] for row in rows] for column in rows[0]} for way, rows in found.items()}
    shown = {way: summary(of) for way, of in ways.items()}
    return {"layer": layer, "photos": len(photos), "ways": ways, "summary": shown, "speed": None}


def against(full: camfn.Explanation, narrow: camfn.Explanation) -> dict[str, float]:
    again = (narrow.forwards - full.forwards) / (full.forwards - 1)
    return compared(narrow.maps[0], full.maps[0]) | {"again": again, "stated": float(narrow.errors[0])}


def summary(of: Mapping[str, list[Any]]) -> dict[str, Any]:
    error, pearson, stated = of["error"], of["pearson"], of["stated"]
    told = None not in stated
    return {
        "near": statistics.fmean(e <= ERROR and p >= PEARSON for e, p in zip(error, pearson)),
        f"error up to {ERROR:g}": statistics.fmean(e <= ERROR for e in error),
        f"pearson from {PEARSON:g}": statistics.fmean(p >= PEARSON for p in pearson),
        "median error": statistics.median(error),
        "worst error": max(error),
        "median pearson": statistics.median(pearson),
        "worst pearson": min(pearson),
        "again": statistics.median(of["again"]),
        "most": max(of["again"]),
        "stated": statistics.median(stated) if told else None,
        "honest": honest(error, stated) if told else None,
    }


def timed(name: str, rounds: int) -> dict[str, Any]:
    """Run each sweep once as a warm-up, then interleaved."""
    model, (x,) = trained(name, 1)
    layer = LAYERS[name]
    target = int(card(model, layer, x, None, "float32").classes)
    calls: dict[str, Callable[[], Any]] = {"torchcam": functools.partial(torchcam, model, layer, x, target)}
    calls |= {way: functools.partial(card, model, layer, x, target, way) for way in ("float32", "bfloat16", "unrefined")}
    for call in calls.values():
        call()
    timings = common.interleaved(calls, rounds)
    return {
        "threads": torch.get_num_threads(),
        "share of threads": common.share_of_threads(timings.values()),
        "contenders": {
            name: {
                "seconds": timing.seconds,
                "median seconds": timing.median,
                **{f"times as fast as {other}": 1 / common.ratio(timing, timings[other]) for other in ("torchcam", "float32")},
            }
            for name, timing in timings.items()
        },
    }


# -------------------------------------------------------------------------------------------------------------- shown


def text(record: dict[str, Any]) -> str:
    where = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    parts = [f"{where['processor']}, {where['torch_cpu_capability']}, threads: {where['threads']}"]
    parts.append(f"Python {where['python']}, {versions}")
    for name, network in record["networks"].items():
        rows = [[way, *_cells(of)] for way, of in network["summary"].items()]
        columns = ("", *(column for column in next(iter(network["summary"].values()))))
        parts += ["", f"{name} {network['layer']}; photos: {network['photos']}", common.table(columns, rows)]
        parts += ["", _speed(network["speed"])] if network["speed"] else []
    return "\n".join(parts)


def _cells(of: dict[str, float | None]) -> list[str]:
    shares = {"near", f"error up to {ERROR:g}", f"pearson from {PEARSON:g}", "honest", "again", "most"}
    forms = {name: ".0%" if name in shares else ".5f" if "pearson" in name else ".4f" for name in of}
    return ["" if value is None else format(value, forms[name]) for name, value in of.items()]


def _speed(of: dict[str, Any]) -> str:
    columns = ("seconds", "times as fast as torchcam", "times as fast as float32")
    rows = [
        [name, *(f"{one[f'median {c}' if c == 'seconds' else c]:.2f}" for c in columns)]
        for name, one in of["contenders"].items()
    ]
    return (
        f"{common.table(('', *columns), rows)}\nthreads: {of['threads']}, busy with us {of['share of threads']:.0%} of the time"
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot the sorted errors and correlations of all photos for each network."""
    figure, axes = panels(2, len(record["networks"]), sharex="col", sharey="row")
    for column, (name, network) in zip(axes.T, record["networks"].items()):
        for way, mark in (("unrefined", "o:"), ("bfloat16", "o-")):
            of = network["ways"][way]
            share = [100 * (i + 0.5) / network["photos"] for i in range(network["photos"])]
            column[0].plot(share, sorted(max(1e-5, e) for e in of["error"]), mark, label=way, markersize=4)
            column[1].plot(share, sorted(max(1e-8, 1 - p) for p in of["pearson"]), mark, label=way, markersize=4)
        for axis, bound in zip(column, (ERROR, 1 - PEARSON)):
            axis.axhline(bound, color="grey", linestyle="--", linewidth=1, label=f"bound: {bound:.3g}")
            axis.set(yscale="log", xlim=(0, 100))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        column[0].set_title(f"{name} {network['layer']}")
        column[1].set_xlabel("photos, sorted by what is shown (%)")
    axes[0, 0].set_ylabel("largest error of the normalised map")
    axes[1, 0].set_ylabel("1 - Pearson's correlation")
    figure.savefig(path)


# --------------------------------------------------------------------------------------------------------------- main


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("The networks")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--photos", type=common.positive, default=20, help="photos for each network, 20 at most")
    parser.add_argument("--rounds", type=common.positive, default=3, help="calls of each contender for the speed")
    parser.add_argument(
        "--only", choices=["errors", "speed"], help="the maps alone, or the speed alone, for the record of --out"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where to write the record, after each network; .png beside it"
    )
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE.json", help=PLOT)
    options = parser.parse_args()
    if options.only == "speed" and not (options.out and options.out.exists()):
        parser.error("--only speed adds to a record: name it with --out")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    record = {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "numpy", "camfn", "torchcam"]),
        "arguments": {"rounds": options.rounds, "goal": gp.GOAL, "most": gp.MOST},
        "networks": {},
    }
    if options.only == "speed":
        record = json.loads(options.out.read_text())
    for name in options.networks:
        if options.only != "speed":
            record["networks"][name] = measured(name, options)
        if options.only != "errors":
            record["networks"][name]["speed"] = timed(name, options.rounds)
        if options.out:
            common.write(options.out, record)
    return record


def main() -> None:
    options = options_of()
    warnings.simplefilter("error", camfn.CamWarning)  # such as the warning that this processor has no bfloat16 instructions
    if not (options.plot or options.only == "errors"):
        common.require({"torchcam": "torchcam"})
    try:
        record = joined(options.plot) if options.plot else measure(options)
    except camfn.CamWarning as found:
        sys.exit(f"{found}; nothing was measured")
    print(text(record))
    if options.out:
        common.write(options.out, record)
    if path := options.out or (options.plot and options.plot[0]):
        plot(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
