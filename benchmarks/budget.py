"""Score-CAM for a tenth of the forwards: how accurate is the map, and is its stated error true? On trained networks.

    python benchmarks/budget.py --out benchmarks/results/budget.json    # an hour; draws budget.png beside it
    python benchmarks/budget.py --networks cifar10_resnet20 --photos 2    # a quick look, in seconds
    python benchmarks/budget.py --plot benchmarks/results/budget.json     # draws the figure again; joins several records

The networks and photos come from the folder in the environment variable CAMFN_REAL; `tests/oracles/libraries.py` describes its
contents.
The target is the predicted class. Each photo gets one full map, and then one real call each with

* a budget of .05 to .7 of the channels that are not flat, with `order="predicted"`; at .1 and .2 also the published orders
  `std` (Faster-Score-CAM), `max` (CSKIP) and `gradient` (gScoreCAM), which give no weight to the channels that they leave out;
* a tolerance of .3, .1 and .03;
* `is_cam` and `ss_cam` at .1 and .2, each against its own full map, on the small networks and on fewer photos, because they
  are slow.

Two more maps serve as references, although no call returns them. `bound` keeps the channels with the largest true weights and
drops the others: the best of all orders that give no weight to the rest. `equal` weights all channels equally, which needs no
forward.

Pearson's correlation and the largest difference compare normalized maps on the layer's grid. The stated error is on the card
(`camfn.explain`). It is honest if the true error is at most the stated error plus ROUNDING, the possible difference of two
full float32 maps. `exceeded by` is the largest excess of a true error over its stated error. `within` is the share of maps
whose true error is at most the tolerance. Forwards are counted at the model, including the clean one; `share` divides them by
those of the full map. `time` divides the seconds from the model to the finished map by those of the full map, for one call
each after a warm-up. It includes gradients and linear algebra, which matter if forwards are cheap. `busy with us` shows the
effect of other work on the machine. The tables show medians over photos of stated error, forwards, share and time.

Typical output:

    Intel(R) Xeon(R) Processor, threads: 1
    Python 3.11.7, torch 2.13.0+cpu, torchvision 0.28.0, numpy 2.4.6, camfn 0.1.0

    cifar10_resnet20 layer3; photos: 20; channels that are not flat, median: 64
    in full, median: score_cam 66 forwards, 0.16 s; is_cam 642 forwards, 1.17 s; ss_cam 2242 forwards, 4.02 s
                          mean pearson  worst pearson  median error  worst error  stated  honest  forwards  share    time
    equal                       0.8014          0.375         0.469        0.770
    ...
    predicted 0.2               0.9977          0.983         0.015        0.226   0.233    100%        13  19.7%   63.6%
    std 0.2                     0.9358          0.473         0.067        0.738                        13  19.7%   37.1%
    max 0.2                     0.9108          0.473         0.094        0.691                        13  19.7%   38.0%
    gradient 0.2                0.9575          0.689         0.009        0.738                        13  19.7%   37.7%
    bound 0.2                   1.0000          1.000         0.000        0.016
    ...

    tolerance              pairs  honest  within  median stated  median true  stated over true  median share  median time
    cifar10_resnet20 0.3      20   95.0%  100.0%         0.0498       0.0067               7.4         30.3%        93.2%
    ...
"""

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

import camfn
from camfn import maps
from camfn.formulas.masks import flat_channels

LAYERS = {"mobilenet_v2": "features.18", "cifar10_resnet20": "layer3", "darknet_tiny": "features"}
ORDERS = ("predicted", "std", "max", "gradient")
SMALL, CURVE = (0.1, 0.2), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
TOLERANCES = (0.3, 0.1, 0.03)
KIN = {  # photos for the methods that sweep every channel 10 or 35 times
    "cifar10_resnet20": {"is_cam": 20, "ss_cam": 20},
    "darknet_tiny": {"is_cam": 10, "ss_cam": 3},
}
ROUNDING = 1e-4
PLOT = "measure nothing: show these records again, those of several runs joined"


# ------------------------------------------------------------------------------------------------- networks and photos


def trained(name: str, count: int) -> tuple[nn.Module, list[Tensor]]:
    """A trained network, and photos `(1, 3, h, w)` for it."""
    from PIL import Image

    libraries = common.libraries_of_the_tests()
    if not (libraries.REAL / "load.py").exists():
        sys.exit("no trained networks: CAMFN_REAL must name a folder of them (tests/oracles/libraries.py says what it has)")
    model, preprocess, classes = libraries.real_networks()[name]()
    folder = libraries.REAL / "images" / ("cifar10_png" if len(classes) == 10 else "imagenet_foolbox")
    return model, [preprocess(Image.open(path))[None] for path in sorted(folder.iterdir())[:count]]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Collect the rows of each forward. Counts at the model's class, because camfn runs a copy."""
    rows: list[int] = []
    with common.watched(model, lambda x: rows.append(len(x))):
        yield rows


# ------------------------------------------------------------------------------------------------------------ one map


class Way(NamedTuple):
    """How a map is computed."""

    method: str = "score_cam"
    order: str = "predicted"  # an order of camfn, or "full", "bound", "equal"
    budget: float | None = None
    tolerance: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method."""
        if self.order == "full":
            return {}
        return {"budget": self.budget, "order": self.order} if self.tolerance is None else {"tolerance": self.tolerance}


def ways_of(network: str) -> Iterator[tuple[Way, int]]:
    """All ways, with their number of photos. The full map of each method comes before its other maps."""
    every = sys.maxsize
    for method, photos in {"score_cam": every, **KIN.get(network, {})}.items():
        yield Way(method, "full"), photos
        yield Way(method, "equal"), photos
        for budget in CURVE if method == "score_cam" else SMALL:
            yield Way(method, "predicted", budget), photos
    for budget in SMALL:
        for order in (*ORDERS[1:], "bound"):
            yield Way(order=order, budget=budget), every
    for tolerance in TOLERANCES:
        yield Way(tolerance=tolerance), every


class Full(NamedTuple):
    """A method's full map of a photo, and the maps that can be computed from it without a forward."""

    card: camfn.Explanation
    activation: Tensor  # (1, c, p)
    flat: Tensor  # (1, c)
    forwards: int
    seconds: float

    def weighted(self, weights: Tensor) -> Tensor:
        """The normalized map with other weights `(1, 1, c)`."""
        flat = maps.normalize(torch.relu(maps.combine(weights, self.activation)))
        return flat[0, 0].reshape(self.card.maps.shape[1:])

    def best(self, budget: float) -> Tensor:
        """The map of the largest true weights within the budget; flat channels share one forward and keep their weight."""
        weights, flat = self.card.weights[0], self.flat[:, None]
        most = max(1, int(budget * int((~flat).sum()) + 1e-9) - bool(flat.any()))
        largest = torch.where(flat, -1, weights).topk(most).indices
        return self.weighted(torch.where(flat.scatter(-1, largest, True), weights, 0))


def compared(map: Tensor, other: Tensor) -> dict[str, float]:
    """Pearson's correlation (0 if a map is flat) and the largest difference."""
    a, b = (m.double().flatten() - m.double().mean() for m in (map, other))
    pearson = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
    return {"pearson": pearson, "error": float((map - other).abs().max())}


def called(model: nn.Module, layer: str, x: Tensor, target: int | None, way: Way) -> tuple[camfn.Explanation, int]:
    """The card of one call, and its forwards, counted at the model."""
    with counted(model) as rows:
        card = camfn.explain(model, layer, x, target, method=way.method, **way.options)
    return card, sum(rows)


def full_of(model: nn.Module, layer: str, x: Tensor, method: str) -> Full:
    card, forwards = called(model, layer, x, None, Way(method, "full"))
    activation = camfn.tap(model, layer)(camfn.state_of(model), x).seen.flatten(2)
    return Full(card, activation, flat_channels(activation), forwards, card.seconds)


def found(model: nn.Module, layer: str, x: Tensor, way: Way, full: Full) -> dict[str, float | None]:
    """The accuracy of the map, its stated error, and its cost."""
    nothing = {"stated": None, "forwards": None, "share": None, "seconds": None, "time": None}
    if way.order == "full":
        return {"forwards": full.forwards, "seconds": full.seconds}
    if way.order in ("bound", "equal"):
        map = full.best(way.budget) if way.budget else full.weighted(torch.ones_like(full.card.weights[0]))
        return compared(map, full.card.maps[0]) | nothing
    card, forwards = called(model, layer, x, int(full.card.classes), way)
    return compared(card.maps[0], full.card.maps[0]) | {
        "stated": None if card.errors[0] is None else float(card.errors[0]),
        "forwards": forwards,
        "share": forwards / full.forwards,
        "seconds": card.seconds,
        "time": card.seconds / full.seconds,
    }


# ----------------------------------------------------------------------------------------------------------- a network


def measured(network: str, count: int, only: Sequence[str]) -> dict[str, Any]:
    """The results of every way, as lists over photos."""
    model, photos = trained(network, count)
    layer, todo = LAYERS[network], [pair for pair in ways_of(network) if pair[0].method in only]
    runs = {way: [] for way, _ in todo}
    camfn.score_cam(model, layer, photos[0], budget=0.05)  # warm-up
    live, cpu, start = [], time.process_time(), time.perf_counter()
    for number, x in enumerate(photos):
        full = functools.cache(functools.partial(full_of, model, layer, x))
        for way, most in todo:
            if number < most:
                runs[way].append(found(model, layer, x, way, full(way.method)))
        live.append(int((~full(todo[0][0].method).flat).sum()))
        say_of(network, number, len(photos), runs)
    return {
        "layer": layer,
        "photos": len(photos),
        "live channels": live,
        "share of threads": (time.process_time() - cpu) / (time.perf_counter() - start) / torch.get_num_threads(),
        "runs": [_columns(way, of) for way, of in runs.items()],
    }


def say_of(network: str, number: int, count: int, runs: dict[Way, list[dict[str, Any]]]) -> None:
    spent = sum(of[number]["seconds"] or 0 for of in runs.values() if len(of) > number)
    common.say(f"{network}: photo {number + 1} of {count}, {spent:.1f} s")


def _columns(way: Way, of: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [one[name] for one in of] for name in of[0]}
    return way._asdict() | {name: None if column[0] is None else column for name, column in columns.items()}


# ----------------------------------------------------------------------------------------------------------- summaries


def pick(network: dict[str, Any], **way: Any) -> dict[str, Any] | None:
    """The run with these options."""
    wanted = Way(**way)._asdict()
    return next((run for run in network["runs"] if all(run[name] == value for name, value in wanted.items())), None)


def near(run: dict[str, Any]) -> dict[str, float | None]:
    """The accuracy of the maps of a run, over photos."""
    pearson, error = run["pearson"], run["error"]
    middle = {name: run[name] and statistics.median(run[name]) for name in ("stated", "forwards", "share", "seconds", "time")}
    return {
        "mean pearson": statistics.fmean(pearson),
        "worst pearson": min(pearson),
        "median error": statistics.median(error),
        "worst error": max(error),
        "honest": run["stated"] and honest(run["error"], run["stated"]),
        **middle,
    }


def honest(error: Sequence[float], stated: Sequence[float]) -> float:
    """The share of maps whose true error is at most the stated one."""
    return statistics.fmean(e <= s + ROUNDING for e, s in zip(error, stated))


def tolerated(runs: Sequence[dict[str, Any]], tolerance: float) -> dict[str, float | None]:
    """For maps with a tolerance: is it met, is the stated error true, and how many forwards does it save?"""
    error, stated, share, time = (
        [value for run in runs for value in run[name] or ()] for name in ("error", "stated", "share", "time")
    )
    true, said = statistics.median(error), statistics.median(stated)
    return {
        "pairs": len(error),
        "honest": honest(error, stated),
        "exceeded by": max(0.0, *(e - s for e, s in zip(error, stated))),
        "within": statistics.fmean(e <= tolerance for e in error),
        "median stated": said,
        "median true": true,
        "stated over true": said / true if true > ROUNDING else None,
        "median share": statistics.median(share),
        "median time": statistics.median(time) if time else None,
    }


def summary(networks: dict[str, Any]) -> dict[str, Any]:
    """The summary of all runs: accuracy by network and way, tolerances by network and over all."""
    groups = {name: [network] for name, network in networks.items()} | {"all": list(networks.values())}
    kept = {
        name: {str(level): tolerated(runs, level) for level in TOLERANCES if (runs := _to(group, level))}
        for name, group in groups.items()
    }
    return {
        "near": {name: {label(run): near(run) for run in _maps(network)} for name, network in networks.items()},
        "tolerance": {name: levels for name, levels in kept.items() if levels},
    }


def _to(group: Iterable[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    return [run for network in group if (run := pick(network, tolerance=tolerance))]


def _maps(network: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with a budget, sorted by budget, and the references."""
    runs = [run for run in network["runs"] if run["order"] != "full" and run["tolerance"] is None]
    return sorted(runs, key=lambda run: (run["method"] != "score_cam", run["method"], run["budget"] or 0))


def label(run: dict[str, Any]) -> str:
    order = run["order"] if run["budget"] is None else f"{run['order']} {run['budget']:g}"
    return order if run["method"] == "score_cam" else f"{run['method']} {order}"


# ---------------------------------------------------------------------------------------------------------------- text


def text(record: dict[str, Any]) -> str:
    where, made = record["environment"], record["summary"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    parts = [f"{where['processor']}, threads: {where['threads']}", f"Python {where['python']}, {versions}"]
    for name, network in record["networks"].items():
        parts += ["", _heading(name, network), _near_table(made["near"][name])]
    return "\n".join([*parts, "", _tolerance_table(made["tolerance"])])


def _heading(name: str, network: dict[str, Any]) -> str:
    costs = [
        f"{run['method']} {statistics.median(run['forwards']):g} forwards, {statistics.median(run['seconds']):.2f} s"
        for run in network["runs"]
        if run["order"] == "full"
    ]
    live = statistics.median(network["live channels"])
    first = f"{name} {network['layer']}; photos: {network['photos']}; channels that are not flat, median: {live:g}"
    busy = f"busy with us {network['share of threads']:.0%} of the time"
    return f"{first}\nin full, median: {'; '.join(costs)}; {busy}"


def _near_table(rows: dict[str, dict[str, Any]]) -> str:
    columns = {
        "mean pearson": ".4f",
        "worst pearson": ".3f",
        "median error": ".3f",
        "worst error": ".3f",
        "stated": ".3f",
        "honest": ".0%",
        "forwards": ".0f",
        "share": ".1%",
        "time": ".1%",
    }
    return common.table(["", *columns], [[name, *_cells(row, columns)] for name, row in rows.items()])


def _tolerance_table(of: dict[str, dict[str, Any]]) -> str:
    columns = {
        "pairs": "d",
        "honest": ".1%",
        "exceeded by": ".4f",
        "within": ".1%",
        "median stated": ".4f",
        "median true": ".4f",
        "stated over true": ".1f",
        "median share": ".1%",
        "median time": ".1%",
    }
    rows = [[f"{name} {level}", *_cells(row, columns)] for name, levels in of.items() for level, row in levels.items()]
    return common.table(["tolerance", *columns], rows)


def _cells(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    return ["" if row[name] is None else format(row[name], how) for name, how in columns.items()]


# ------------------------------------------------------------------------------------------------------------- picture

FLOOR = 1e-3


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot true and stated error against the share of forwards, with one panel per network."""
    figure, axes = panels(1, len(record["networks"]), sharey=True)
    for axis, (name, network) in zip(axes[0], record["networks"].items()):
        runs = [run for budget in CURVE if (run := pick(network, budget=budget))]
        if runs:
            _curves(axis, runs)
        _crosses(axis, [run for level in TOLERANCES if (run := pick(network, tolerance=level))])
        axis.set(title=f"{name} {network['layer']}", xlabel="share of the full map's forwards (median photo)")
        axis.set(xlim=(0, 1), ylim=(0.8 * FLOOR, 1.3), yscale="log", yticks=[FLOOR, 0.01, 0.03, 0.1, 0.3, 1])
        axis.set_yticklabels([f"≤ {FLOOR:g}", "0.01", "0.03", "0.1", "0.3", "1"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("largest error of the normalised map")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path)


def panels(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure with a grid of axes, without matplotlib's global state."""
    common.require({"matplotlib": "matplotlib"})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 0.4, 3.8 * rows + 0.2), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _curves(axis: Any, runs: list[dict[str, Any]]) -> None:
    share = [statistics.median(run["share"]) for run in runs]

    def over(name: str, of: Callable[[list[float]], float]) -> list[float]:
        return [max(FLOOR, of(run[name])) for run in runs]

    axis.plot(share, over("error", statistics.median), "o-", color="tab:blue", label="budget: true, median photo")
    axis.plot(share, over("error", ninth), "o:", color="tab:blue", markersize=4, label="budget: true, 9 photos of 10 below")
    axis.plot(share, over("stated", statistics.median), "s--", color="tab:orange", label="budget: stated, median photo")


def _crosses(axis: Any, runs: list[dict[str, Any]]) -> None:
    for name, mark, colour in (("error", "P", "tab:green"), ("stated", "X", "tab:red")):
        points = [(statistics.median(run["share"]), max(FLOOR, statistics.median(run[name]))) for run in runs]
        what = "true" if name == "error" else "stated"
        axis.plot(*zip(*points), mark, color=colour, markersize=8, linestyle="", label=f"tolerance .3, .1, .03: {what}, median")


def ninth(values: Sequence[float]) -> float:
    """The 90 % quantile."""
    return float(torch.tensor(values).quantile(0.9))


# ---------------------------------------------------------------------------------------------------------------- main


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("The networks")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--photos", type=common.positive, default=20, help="photos for each network, 20 at most")
    parser.add_argument(
        "--methods", nargs="+", choices=["score_cam", "is_cam", "ss_cam"], default=["score_cam", "is_cam", "ss_cam"]
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="where to write the record, after each network; .png beside it"
    )
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE.json", help=PLOT)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    record = {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "numpy", "camfn"]),
        "rounding": ROUNDING,
        "networks": {},
    }
    for name in options.networks:
        record["networks"][name] = measured(name, options.photos, options.methods)
        record["summary"] = summary(record["networks"])
        if options.out:
            common.write(options.out, record)
    return record


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """Join the records of several runs on one machine."""
    records = [json.loads(path.read_text()) for path in paths]
    if any(record["environment"] != records[0]["environment"] for record in records):
        sys.exit('the records were made in different environments (see their "environment"): not joined')
    networks = {name: network for record in records for name, network in record["networks"].items()}
    return records[0] | {"networks": networks}


def main() -> None:
    options = options_of()
    warnings.simplefilter("error", camfn.CamWarning)
    record = joined(options.plot) if options.plot else measure(options)
    record["summary"] = summary(record["networks"])
    print(text(record))
    if options.out:
        common.write(options.out, record)
    if path := options.out or (options.plot and options.plot[0]):
        plot(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
