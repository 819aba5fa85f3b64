"""How much memory does a sweep take, compared with the model's own forwards, and does it grow with the work?

    python benchmarks/memory.py --out benchmarks/results/memory.json                            # the record
    python benchmarks/memory.py --model resnet18 --size 64 --chunks 2 --repeats 1 --no-curves   # a quick look, in a minute

Contenders run eagerly, with the same chunk of masked inputs per forward, each in fresh processes:

* `plain`: forwards of one chunk under `no_grad`, on the copy of the model that camfn uses for its sweep (batch norms folded,
  channels last). The copy is made before the measurement, the batch during it.
* `score_cam`, `ss_cam`, `is_cam`: the first call of camfn in its process, because the first call is the one that would run out
  of memory. It includes the checks of the model (a few forwards of one or two inputs) and making the copy. The size of the
  copy is then subtracted, because the plain forwards have it already.
* `torchcam-ScoreCAM`, `torchcam-SSCAM`, `torchcam-ISCAM`: the call. torchcam makes no copy, so nothing is subtracted.

SS-CAM and IS-CAM have `--samples` draws. Every sweep ends after `--chunks` forwards, and `plain` runs equally many. Later
chunks repeat the same work, which the curves confirm. 64 chunks cover the whole `layer4` of a ResNet-50.

The peak is the rise of resident memory above its value just before the call, after imports, with model and input in memory,
freed memory returned to the system, and torch's threads started by an unrelated layer. There are two versions:

* `peak`: with the allocator's defaults, median of `--repeats` processes. glibc keeps freed memory and reuses only some of it,
  so even the peak of the plain forwards varies by a quarter between processes.
* `in use`: with glibc set to return large blocks immediately, which shows the memory that the code itself holds. It varies by
  less than 1 %, and the bound applies to its ratio. Without glibc both are the same.

The curves show the memory in use during whole sweeps on a MobileNetV2 at 112 px, with growing numbers of channels, draws and
images. "Growth" is the highest peak of a curve divided by its lowest; 1 is flat. The forward of the clean input has all images
in one batch.

Typical output, of `--chunks 2 --repeats 1 --curve-counts 1 8` with one thread:

    Peak memory in MiB, resnet50 layer4, 224 px, chunk 32, forwards of a chunk: 2, draws: 1, processes: 1
    Intel(R) Xeon(R) Processor, threads: 1
    Python 3.11.7, torch 2.13.0+cpu, torchvision 0.28.0, numpy 2.4.6, camfn 0.1.0, torchcam 0.5.0

                       copy  in use  peak  in use x plain  peak x plain
    plain                 0     265   402            1.00          1.00
    score_cam            90     287   457            1.08          1.14
    ss_cam               90     293   372            1.10          0.92
    is_cam               90     287   443            1.08          1.10
    torchcam-ScoreCAM     0     376   429            1.42          1.07
    torchcam-SSCAM        0    1552  1717            5.85          4.27
    torchcam-ISCAM        0     786   936            2.96          2.33

    score_cam  128 channels  320 channels  640 channels  1280 channels  growth
    peak                 78            78            80             80    1.03

    ss_cam  1 samples  8 samples  growth
    peak           82         83    1.01

    is_cam  1 samples  8 samples  growth
    peak           78         80    1.02

    score_cam  1 images  8 images  growth
    peak             78        87    1.11
"""

import argparse
import importlib
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import torch
from common import Case
from torch import Tensor, nn

import camfn
from camfn.model.forward import look
from camfn.sweep import scoring
from camfn.sweep.runner import Runner, runner_of
from camfn.targets import resolve

WHOLE = 1 << 30  # more chunks than any sweep needs
GIVING_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "131072"
}  # if set, glibc does not adapt it: larger blocks are mapped, and unmapped when freed
BOUND = 1.2  # the largest allowed ratio to the plain forwards
OURS = ("score_cam", "ss_cam", "is_cam")
PEERS = {"torchcam-ScoreCAM": "ScoreCAM", "torchcam-SSCAM": "SSCAM", "torchcam-ISCAM": "ISCAM"}
CONTENDERS = ("plain", *OURS, *PEERS)


# ----------------------------------------------------------------------------------------------------- contenders


def copy_of(case: Case, model: nn.Module, x: Tensor) -> Runner:
    """The model as a sweep runs it, made by the library's own code."""
    with torch.no_grad():
        forward = look(model, case.layer, x, None, masks=True)
        score = resolve(None, forward.output, forward.n, x.device)
        return runner_of(forward, score, camfn.Sweep(chunk=case.chunk, compile=False), rows=1 << 20)


@contextmanager
def noting_copies(model: nn.Module) -> Iterator[list[float]]:
    """Collect the sizes of the copies that camfn makes inside the block. For few masked inputs it makes none."""
    sizes: list[float] = []

    def noting(*args: Any) -> Runner:
        runner = runner_of(*args)
        sizes.append(size_of(runner, model))
        return runner

    scoring.runner_of = noting
    try:
        yield sizes
    finally:
        scoring.runner_of = runner_of


def size_of(copy: Runner, model: nn.Module) -> float:
    """MiB of the copy's tensors that it does not share with the model."""
    shared = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copy.state.values()}
    return sum(size for place, size in storages.items() if place not in shared) / common.MIB


def plain(case: Case, copy: Runner, chunks: int) -> None:
    run = copy.call()
    with torch.no_grad():
        batch = torch.randn(case.chunk, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
        for _ in range(chunks):
            run(copy.state, batch)


def torchcam(case: Case, model: nn.Module, x: Tensor) -> None:
    kind = getattr(importlib.import_module("torchcam.methods"), PEERS[case.method])
    draws = {} if case.method == "torchcam-ScoreCAM" else {"num_samples": case.samples}
    with kind(model, case.layer, batch_size=case.chunk, **draws) as extractor:
        with torch.inference_mode():
            classes = model(x).argmax(1).tolist()
        extractor(classes)


class EnoughError(Exception):
    """The sweep has run the requested number of chunks."""


@contextmanager
def at_most(model: nn.Module, chunks: int, chunk: int) -> Iterator[None]:
    """Stop the block before its next chunk. Counts at the model's class, because camfn runs a copy."""
    kind, seen = type(model), 0
    forward = kind.forward

    def counting(self: nn.Module, x: Tensor) -> Any:
        nonlocal seen
        seen += len(x) == chunk
        if seen > chunks:
            raise EnoughError
        return forward(self, x)

    kind.forward = counting
    try:
        yield
    except EnoughError:
        pass
    finally:
        kind.forward = forward


# ------------------------------------------------------------------------------------------------------- the peak


def peak_here(case: Case, chunks: int) -> dict[str, float]:
    """In a fresh process: MiB before the call, the rise, the copy's share of the rise, and the rest."""
    model, x = common.model_and_input(case)
    _start_torch()
    if case.method in PEERS:
        importlib.import_module("torchcam.methods")
    copy = copy_of(case, model, x) if case.method == "plain" else None
    with noting_copies(model) as copies:
        found = common.peak_above(_call_of(case, model, x, copy, chunks))
    return {**found, "copy": sum(copies), "peak": found["above"] - sum(copies)}


def _start_torch() -> None:
    """Load the threads and libraries of a process's first convolution, so that no contender is charged for them."""
    with torch.no_grad():
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 62 * 62, 8))(torch.randn(2, 3, 64, 64))


def _call_of(case: Case, model: nn.Module, x: Tensor, copy: Runner | None, chunks: int) -> Callable[[], None]:
    if copy is not None:
        return lambda: plain(case, copy, chunks)
    whole = (lambda: torchcam(case, model, x)) if case.method in PEERS else common.call_of(case, model, x)

    def call() -> None:
        with at_most(model, chunks, case.chunk):
            whole()

    return call


def peak(case: Case, chunks: int = WHOLE, in_use: bool = True) -> dict[str, float]:
    """`peak_here` in a fresh process; `in_use` excludes freed memory that the allocator keeps."""
    common.say(f"peak{' in use' if in_use else ''}: {describe(case)}")
    arguments = ["--peak-of", json.dumps(case), "--chunks", str(chunks)]
    return common.in_fresh_process(__file__, arguments, GIVING_BACK if in_use else None)


def describe(case: Case) -> str:
    """The arguments that differ from the defaults."""
    usual = Case()._asdict()
    return ", ".join(f"{name} {value}" for name, value in case._asdict().items() if value != usual[name] or name == "method")


# ------------------------------------------------------------------------------------------------------ the curves


def curves(size: int, counts: list[int]) -> dict[str, list[Case]]:
    """Cases that differ in one number, by name."""
    base = Case(model="mobilenet_v2", layer="features.18", size=size, channels=128)
    return {
        "score_cam, channels": [base._replace(channels=channels) for channels in (128, 320, 640, 1280)],
        "ss_cam, samples": [base._replace(method="ss_cam", samples=count) for count in counts],
        "is_cam, samples": [base._replace(method="is_cam", samples=count) for count in counts],
        "score_cam, images": [base._replace(images=count) for count in counts],
    }


def curve(name: str, cases: list[Case]) -> dict[str, Any]:
    knob = name.split(", ")[1]
    peaks = [peak(case)["peak"] for case in cases]
    return {
        "first": cases[0]._asdict(),
        knob: [getattr(case, knob) for case in cases],
        "peak_mib": peaks,
        "growth": max(peaks) / min(peaks),
    }


# ----------------------------------------------------------------------------------------------------- the record


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = Case(model=options.model, layer=options.layer, size=options.size, chunk=options.chunk, samples=options.samples)
    cases = {name: base._replace(method=name) for name in options.methods}
    in_use = {name: peak(case, options.chunks) for name, case in cases.items()}
    found = [{name: peak(case, options.chunks, in_use=False) for name, case in cases.items()} for _ in range(options.repeats)]
    chosen = {} if options.no_curves else curves(options.curve_size, options.curve_counts)
    return {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "numpy", "camfn", "torchcam"]),
        "arguments": {key: value for key, value in vars(options).items() if key not in ("out", "peak_of")},
        "bound": BOUND,
        "contenders": {name: _entry(name, in_use, found) for name in cases},
        "curves": {name: curve(name, cases) for name, cases in chosen.items()},
    }


def _entry(name: str, in_use: dict[str, dict[str, float]], found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Ratios of the peaks in use, and of the medians of the peaks with the allocator's defaults."""

    def middle(of: str) -> float:
        return statistics.median(run[of]["peak"] for run in found)

    return {
        "copy_mib": in_use[name]["copy"],
        "in_use_mib": in_use[name]["peak"],
        "peaks_mib": [run[name]["peak"] for run in found],
        "peak_mib": middle(name),
        "in_use_times_plain": in_use[name]["peak"] / in_use["plain"]["peak"],
        "peak_times_plain": middle(name) / middle("plain"),
    }


SIZES = ("copy_mib", "in_use_mib", "peak_mib")


def text(record: dict[str, Any]) -> str:
    where, asked = record["environment"], record["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    rows = [
        [
            name,
            *(f"{entry[of]:.0f}" for of in SIZES),
            *(f"{entry[of]:.2f}" for of in ("in_use_times_plain", "peak_times_plain")),
        ]
        for name, entry in record["contenders"].items()
    ]
    lines = [
        f"Peak memory in MiB, {asked['model']} {asked['layer']}, {asked['size']} px, chunk {asked['chunk']}, "
        f"forwards of a chunk: {asked['chunks']}, draws: {asked['samples']}, processes: {asked['repeats']}",
        f"{where['processor']}, threads: {where['threads']}",
        f"Python {where['python']}, {versions}",
        "",
        common.table(["", "copy", "in use", "peak", "in use x plain", "peak x plain"], rows),
    ]
    return "\n".join([*lines, *(_curve_text(name, found) for name, found in record["curves"].items())])


def _curve_text(name: str, found: dict[str, Any]) -> str:
    method, knob = name.split(", ")
    columns = [method, *(f"{value} {knob}" for value in found[knob]), "growth"]
    row = ["peak", *(f"{value:.0f}" for value in found["peak_mib"]), f"{found['growth']:.2f}"]
    return "\n" + common.table(columns, [row])


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("Contenders")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a name of torchvision.models")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--size", type=common.positive, default=224, help="side of the input in pixels")
    parser.add_argument("--chunk", type=common.positive, default=32, help="masked inputs per forward, for every contender")
    parser.add_argument("--samples", type=common.positive, default=1, help="draws of SS-CAM and IS-CAM")
    parser.add_argument("--repeats", type=common.positive, default=3, help="processes of each, whose median is the peak")
    parser.add_argument("--chunks", type=common.positive, default=8, help="forwards of a chunk after which a sweep is ended")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="contenders to run; plain always")
    parser.add_argument("--no-curves", action="store_true", help="leave out the curves")
    parser.add_argument("--curve-size", type=common.positive, default=112, help="side of the curves' input in pixels")
    parser.add_argument("--curve-counts", type=common.positive, nargs="+", default=[1, 4, 16, 32], help="draws, and images")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the record")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.methods = list(dict.fromkeys(["plain", *options.methods]))
    return options


def main(argv: list[str]) -> None:
    options = options_of(argv)
    warnings.simplefilter("ignore", camfn.CamWarning)  # random weights give meaningless maps
    if options.peak_of:
        print(json.dumps(peak_here(Case(*options.peak_of), options.chunks)))
        return
    if PEERS.keys() & set(options.methods):
        common.require({"torchcam": "torchcam"})
    record = measure(options)
    print(text(record))
    if options.out:
        common.write(options.out, record)


if __name__ == "__main__":
    main(sys.argv[1:])
