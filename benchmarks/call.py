"""What does a call cost, compared with torchcam's, and how much of it is not the model's own work?

    python benchmarks/call.py --out benchmarks/results/call.json      # every figure, ten minutes
    python benchmarks/call.py grad_cam --rounds 5                     # one of them
    python benchmarks/call.py grad_cam --parts                        # and where the time goes

The networks are torchvision's and a MobileNetV1 of half the width, at 224 px, with one image and seeded random weights. Their
batch norms have the statistics of such images, because vanishing activations give meaningless maps. `prepared` is a call on a
prepared model, which is made outside the timed part. `plain` is a call on the model. Several calls run in a row, because
single calls meet cold caches. The rows of calls are interleaved in each round. Ratios are medians of the ratios within a
round.

* `grad_cam`: Grad-CAM, compared with torchcam's, whose extractor is built outside the timed part, and with the plain forward
  under `no_grad`. The maps are compared first.
* `finds`: the number of images that Score-CAM runs through the model besides the clean and the masked images, counted at the
  model. It is the intercept of a line through the counts for 8 and for 16 channels, where the sweep has one image per channel.
  Also the time of the call, divided by the time of its clean and masked images alone in the same chunks.
* `record`: the time of the first call of Ablation-CAM on a newly prepared model, minus that of the second call, in forwards.
* `later`: whether calls on a prepared model get slower or use more memory. Calls 151 to 200 are compared with calls 3 to 52,
  each divided by a plain forward next to it. The resident memory after them is compared too. Every call has a new image, and
  Score-CAM has 8 channels. Also the memory that a thousand plain calls of each of three methods leave behind, on one tiny
  network and on a thousand tiny networks. Memory is measured in fresh processes.

`--parts` adds two tables. One gives the time that each step adds to a forward in plain torch: a torch-function mode that does
nothing, detached tensors with `functional_call`, copies of the buffers, a graph of all parameters as in torchcam, and the
gradient from the layer on by hand. The other gives the time in each file, by cProfile, which charges built-in functions to the
file that calls them and overstates the time in Python.
"""

import argparse
import copy
import cProfile
import functools
import json
import pstats
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from capture import by_hand
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import camfn

ROW = 5  # calls in a row
CLOSE = 1e-3  # tolerance for normalized maps: torchcam adds 1e-8 to the range that it divides by
CHANNELS = 8  # `finds` counts the images of a sweep of this many channels, and of twice as many
CALLS, FIRST, SOME = 200, 2, 50  # `later`: calls, skipped calls at the start, counted calls at each end
THOUSAND, WARM = 1000, 50

# -------------------------------------------------------------------------------------------------------- networks


class MobileNetV1(nn.Module):
    """MobileNetV1 of half the width. Its blocks are numbered as in the original; `features.26` is the last."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [_block(3, 16, 3, stride=2)]
        for into, out, stride in zip(_WIDTHS, _WIDTHS[1:], (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
            blocks += [_block(into, into, 3, stride=stride, groups=into), _block(into, out, 1)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(_WIDTHS[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


_WIDTHS = (16, 32, 64, 64, 128, 128, *(256,) * 6, 512, 512)


def _block(into: int, out: int, side: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


LAYERS = {
    "resnet18": "layer4",
    "squeezenet1_1": "features.12",
    "mobilenet_v2": "features.18",
    "mobilenet_v1 x0.5": "features.26",
}


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The model and input, the same every time."""
    torch.manual_seed(0)
    model = MobileNetV1() if name.startswith("mobilenet_v1") else getattr(common.torchvision_models(), name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over all batches
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    return model.eval(), torch.randn(1, 3, size, size)


def tiny() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval(), torch.randn(1, 3, 16, 16)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def in_a_row(call: Callable[[], Any], times: int = ROW) -> Callable[[], None]:
    """Several calls in a row as one call, for timing."""

    def row() -> None:
        for _ in range(times):
            call()

    return row


def milliseconds(found: Mapping[str, common.Timing]) -> dict[str, float]:
    """Milliseconds of a single call of each row."""
    return {name: 1e3 * timing.median / ROW for name, timing in found.items()}


# -------------------------------------------------------------------------------------------------------- grad_cam


class Contenders(NamedTuple):
    """The calls on a network. torchcam has its own copy of the network, because of its hooks."""

    model: nn.Module
    x: Tensor
    layer: str
    calls: dict[str, Callable[[], Any]]


def contenders(name: str, size: int) -> Contenders:
    """The calls to compare. Exits if the maps of camfn and torchcam differ."""
    from torchcam.methods import GradCAM

    model, x = network(name, size)
    layer, target, twin = LAYERS[name], int(forward(model, x).argmax()), copy.deepcopy(model)
    extractor = GradCAM(twin, layer)
    prepared = camfn.prepare(model)
    calls = {
        "forward": lambda: forward(model, x),
        "torchcam": lambda: extractor(target, twin(x))[0],
        "prepared": lambda: camfn.grad_cam(prepared, layer, x, target),
        "plain": lambda: camfn.grad_cam(model, layer, x, target),
    }
    theirs = calls["torchcam"]()
    for kind in ("prepared", "plain"):
        difference = float((calls[kind]() - theirs).abs().max())
        if not (theirs.max() > 0.5 and difference < CLOSE):
            sys.exit(
                f"{name}: the map of a {kind} call differs by {difference:.2g} from torchcam's, whose top is {theirs.max():.2g}"
            )
    return Contenders(model, x, layer, calls)


def grad_cam(options: argparse.Namespace) -> dict[str, Any]:
    common.require({"torchcam": "torchcam"})
    record: dict[str, Any] = {}
    for name in LAYERS:
        model, x, layer, calls = contenders(name, options.size)
        found = common.interleaved({call: in_a_row(function) for call, function in calls.items()}, options.rounds)
        ratios = {
            f"{of} over {to}": common.ratio(found[of], found[to])
            for to in ("torchcam", "forward")
            for of in ("torchcam", "prepared", "plain")
            if of != to
        }
        shares = {"share of its threads": common.share_of_threads(found.values())}
        record[name] = {"milliseconds": milliseconds(found), "ratios": ratios, **shares}
        if options.parts:
            record[name]["pieces, milliseconds"] = pieces(model, x, layer, options.rounds)
            record[name]["files, milliseconds"] = files(calls)
    return record


# ----------------------------------------------------------------------------------------------------- where it goes


class _Nothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def pieces(model: nn.Module, x: Tensor, layer: str, rounds: int) -> dict[str, float]:
    """Milliseconds that each step adds to a forward."""
    twin = copy.deepcopy(model)  # by_hand changes the parameters

    def guarded() -> None:
        with _Nothing():
            forward(model, x)

    def with_state() -> None:
        state = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        with torch.no_grad():
            functional_call(model, state, (x,))

    def with_copies() -> None:
        for buffer in model.buffers():
            buffer.clone()
        forward(model, x)

    def with_graph() -> None:
        with torch.enable_grad():
            model(x)

    calls = {
        "forward": lambda: forward(model, x),
        "a mode that does nothing": guarded,
        "detached tensors, by functional_call": with_state,
        "copies of the buffers": with_copies,
        "a graph of all parameters": with_graph,
        "the gradient from the layer on": lambda: by_hand(twin, layer, x),
    }
    for call in calls.values():
        call()
    with torch.enable_grad():
        found = common.interleaved({name: in_a_row(call) for name, call in calls.items()}, rounds)
    base = found.pop("forward")
    return {name: 1e3 / ROW * statistics.median(a - b for a, b in zip(t.seconds, base.seconds)) for name, t in found.items()}


def files(calls: Mapping[str, Callable[[], Any]], times: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds of one call under the profiler, by file. Found from the paths, whatever the files are called."""
    spent: dict[str, Counter[str]] = {}
    for name, call in calls.items():
        profile = cProfile.Profile()
        profile.runcall(in_a_row(call, times))
        spent[name] = _by_file(pstats.Stats(profile).stats)  # pyright: ignore[reportAttributeAccessIssue]
    places = sorted({place for found in spent.values() for place in found}, key=lambda p: -max(f[p] for f in spent.values()))
    rows = {place: {name: 1e3 * found[place] / times for name, found in spent.items()} for place in places}
    return {place: row for place, row in rows.items() if max(row.values()) >= 0.05}


def _by_file(stats: Mapping[tuple[str, int, str], Any]) -> Counter[str]:
    spent: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        if file != "~":
            spent[_place(file)] += own
        for (caller, _, _), (_, _, part, _) in callers.items() if file == "~" else ():
            spent[_place(caller)] += part
    return spent


def _place(file: str) -> str:
    """The label of a file: `camfn/model/private_copy.py` for a file of camfn, the package, such as `torch/nn`, for others."""
    if file == "~":
        return "built in"
    own = Path(camfn.__file__).parent
    if Path(file).is_relative_to(own):
        return f"camfn/{Path(file).relative_to(own)}"
    found = re.search(r"site-packages/(torch/[^/]+|[^/]+)", file)
    return found[1] if found else "elsewhere"


# ------------------------------------------------------------------------------------------------ what a sweep finds


def finds(options: argparse.Namespace) -> dict[str, Any]:
    return {name: _finds(name, options) for name in LAYERS}


def _finds(name: str, options: argparse.Namespace) -> dict[str, float]:
    model, x = network(name, options.size)
    prepared, layer = camfn.prepare(model), LAYERS[name]
    alive = forward_to(model, layer, x).flatten(2).amax(2)[0].argsort(descending=True)  # because flat channels share a forward

    def sweep(channels: int) -> None:
        kept = alive[:channels]
        options = {"layout": lambda activation: activation[:, kept], "sweep": camfn.Sweep(chunk=CHANNELS, compile=False)}
        camfn.score_cam(prepared, layer, x, 1, **options)

    counts = {channels: _images(model, functools.partial(sweep, channels)) for channels in (CHANNELS, 2 * CHANNELS)}
    slope = (counts[2 * CHANNELS] - counts[CHANNELS]) / CHANNELS
    rows = x.expand(CHANNELS, -1, -1, -1).contiguous()

    def alone() -> None:
        for batch in (x, rows, rows):
            forward(model, batch)

    calls = {"call": functools.partial(sweep, 2 * CHANNELS), "its forwards": alone}
    found = common.interleaved(calls, options.rounds)
    return {
        "images for each channel": slope,
        "images besides": counts[CHANNELS] - slope * CHANNELS - 1,
        "masked images": 2 * CHANNELS,
        "time over that of the clean and the masked": common.ratio(found["call"], found["its forwards"]),
    }


def forward_to(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return camfn.tap(model, layer)(camfn.state_of(model), x)[1]


def _images(model: nn.Module, call: Callable[[], Any]) -> int:
    """The number of images in the second call. Counts at the model's class, because camfn runs copies."""
    call()
    count: list[int] = []
    with common.watched(model, lambda x: count.append(x.shape[0])):
        call()
    return sum(count)


# --------------------------------------------------------------------------------------------------------- record


def record(options: argparse.Namespace) -> dict[str, Any]:
    return {name: _record(name, options) for name in LAYERS}


def _record(name: str, options: argparse.Namespace) -> dict[str, float]:
    model, x = network(name, options.size)
    prepared: Any = camfn.prepare(model)

    def ablate() -> None:
        camfn.ablation_cam(prepared, LAYERS[name], x, 1)

    def anew() -> None:
        nonlocal prepared
        prepared = camfn.prepare(model)
        ablate()

    # In either order of a round, the second call follows a first call on the same `prepared`.
    found = common.interleaved({"first": anew, "second": ablate, "forward": lambda: forward(model, x)}, options.rounds)
    pairs = zip(found["first"].seconds, found["second"].seconds)
    times = {call: 1e3 * timing.median for call, timing in found.items()}
    return {**times, "first less second, in forwards": statistics.median(a - b for a, b in pairs) / found["forward"].median}


# ---------------------------------------------------------------------------------------------------------- later


def later(options: argparse.Namespace) -> dict[str, Any]:
    """Run each measurement in a fresh process."""
    return {what: common.in_fresh_process(__file__, ["--alone", what]) for what in ALONE}


def _many(method: str, **options: Any) -> dict[str, float]:
    model, _ = network("resnet18", 64)
    prepared, function = camfn.prepare(model), functools.partial(camfn.METHODS[method].function, **options)
    ratios, resident = [], {}

    for number in range(1, CALLS + 1):
        x = torch.randn(1, 3, 64, 64)
        call = _seconds(lambda x=x: function(prepared, "layer4", x, 1))
        ratios.append(ROW * call / _seconds(in_a_row(lambda x=x: forward(model, x))))
        if number in (FIRST + 1, FIRST + SOME, CALLS - SOME, CALLS):
            resident[number] = common.resident()
    first, last = (statistics.median(part) for part in (ratios[FIRST : FIRST + SOME], ratios[-SOME:]))
    memory = {f"MiB after call {number}": size for number, size in resident.items()}
    return {"first, in forwards": first, "last, in forwards": last, "last over first": last / first, **memory}


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call, without garbage collection before it: two hundred collections would take longer than the calls."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _thousand(networks: Iterator[nn.Module]) -> dict[str, float]:
    x = tiny()[1]

    def run(times: int) -> float:
        """Call a gradient method, a masking method and a swapping method on each network; return the resident memory."""
        for _ in range(times):
            model = next(networks)
            for function in (camfn.grad_cam, camfn.score_cam, camfn.ablation_cam):
                function(model, "2", x, 1)
        return common.resident()

    before, half, whole = run(WARM), run(THOUSAND // 2), run(THOUSAND // 2)
    return {"MiB before": before, "MiB more after half of them": half - before, "MiB more": whole - before}


def _same() -> Iterator[nn.Module]:
    model = tiny()[0]
    while True:
        yield model


def _others() -> Iterator[nn.Module]:
    while True:
        yield tiny()[0]


ALONE: dict[str, Callable[[], dict[str, float]]] = {
    "grad_cam, prepared": functools.partial(_many, "grad_cam"),
    "score_cam, prepared": functools.partial(_many, "score_cam", layout=lambda activation: activation[:, :CHANNELS]),
    "ablation_cam, prepared": functools.partial(_many, "ablation_cam"),
    "a tiny network, plain": lambda: _thousand(_same()),
    "a thousand tiny networks, plain": lambda: _thousand(_others()),
}

# ----------------------------------------------------------------------------------------------------------- main


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "grad_cam": grad_cam,
    "finds": finds,
    "record": record,
    "later": later,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=common.positive, default=30)
    parser.add_argument("--size", type=common.positive, default=224, help="side of the input in pixels")
    parser.add_argument("--parts", action="store_true", help="say where the time of Grad-CAM goes")
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="write the figures to this file; others in it stay as they are")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=camfn.CamWarning)  # warnings that maps of random networks are nowhere positive
    if options.alone:
        print(json.dumps(ALONE[options.alone]()))
        return
    common.torchvision_models()
    for name in options.figures or PARTS:
        if name not in PARTS:
            parser.error(f"no figure {name!r}: choose of {', '.join(PARTS)}")
        rows = PARTS[name](options)
        print(_tables(name, rows), end="\n\n")
        if options.out:
            _written(options.out, name, rows, options)


def _tables(name: str, rows: Mapping[str, Any]) -> str:
    """The figures of each network, and a table for each figure that is a table."""
    said = []
    for row, figures in rows.items():
        said.append(f"{name}, {row}")
        for what, figure in figures.items():
            if not isinstance(figure, Mapping):
                said.append(f"  {what}: {figure:.3f}")
            elif any(isinstance(value, Mapping) for value in figure.values()):
                lines = [[place, *(f"{value:.2f}" for value in of.values())] for place, of in figure.items()]
                said.append(common.table([what, *next(iter(figure.values()))], lines))
            else:
                said.append(f"  {what}: " + ", ".join(f"{key} {value:.3f}" for key, value in figure.items()))
    return "\n".join(said)


def _written(out: str, name: str, rows: Mapping[str, Any], options: argparse.Namespace) -> None:
    record = json.loads(Path(out).read_text(encoding="utf-8")) if Path(out).exists() else {}
    record["question"] = __doc__.splitlines()[0]
    where = common.environment(["camfn", "torchvision", "torchcam"])
    record[name] = {"figures": rows, "rounds": options.rounds, "size": options.size, "environment": where}
    common.write(out, record)


if __name__ == "__main__":
    main()
