"""Score-CAM: is camfn as fast as the model itself, and how does it compare with torchcam and pytorch-grad-cam?

    python benchmarks/score_cam.py                                                     # a quarter of an hour
    python benchmarks/score_cam.py --size 64 --layer layer1 --rounds 1 --no-memory     # a quick look, in seconds

Contenders run from the model to the finished map, as in their documentation, with the same class and the same number of
threads. Each uses its own number of masked inputs per forward; `--chunk` sets one number for all.

* `plain`: the model alone on a batch of 32, eager, under `no_grad`, as often as there are channels to score. It computes no
  masks and no maps. It is the ceiling for a library that runs the unmodified model eagerly, with torchcam's batch size, and
  scores every channel.
* `torchcam` (32), and `camfn`: `camfn.score_cam(..., recipe="torchcam")`, the default, with camfn's default chunk.
* `torchcam-best`: torchcam with the `batch_size` at which the plain forward is fastest on this machine, for users who tune it.
* `grad-cam` (pytorch-grad-cam, 16), and `camfn-as-grad-cam`: camfn with `recipe="pytorch-grad-cam"` and `size="input"`.

The network has seeded random weights. Its batch norms have the statistics of noise, and its logits the spread of a trained
network's. Otherwise all channels would score nearly the same, and maps would agree whatever the scores are.

First every contender runs once, untimed, as a warm-up and a check. The rows that reach the model are counted, and camfn's
normalized maps are compared with the peer's. A difference above 1e-4 stops the run. A map within 1e-2 of the map of equal
weights also stops it, because agreement on such a map would prove nothing. Then the contenders are interleaved, one call each
per round. Times are medians over rounds. Ratios are medians of the ratios within a round. Peak memory is the rise of resident
memory during one call in a fresh process, after imports, with model and input in memory.

Typical output:

    Score-CAM, resnet18 layer4, 512 channels; images: 1, of 224 px; chunk of its own; rounds: 3
    Intel(R) Xeon(R) Processor, threads: 2, busy with us 100% of the time
    Python 3.11.7, torch 2.13.0+cpu, torchvision 0.28.0, numpy 2.4.6, camfn 0.1.0, torchcam 0.5.0, grad-cam 1.5.7

                       seconds  masked/s  masked  clean  peak MiB  difference  x torchcam  x plain  of limit
    plain                 9.25      55.4     512      0       269                    1.01     1.00      0.60
    torchcam              9.60      53.4     512      2       283                    1.00     0.99      0.58
    torchcam-best         7.92      64.6     512      2        93                    1.17     1.16      0.70
    camfn                 5.63      91.0     512      2       130     1.8e-06        1.65     1.64      0.99
    ...
    limit                 5.57      91.9     512      0        55                    1.72     1.66      1.00
"""

import os

os.environ["TQDM_DISABLE"] = "1"  # hide pytorch-grad-cam's progress bar; tqdm reads this at import

import argparse
import copy
import functools
import importlib
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

import camfn

TOLERANCE = 1e-4
PEERS = {"torchcam": "torchcam", "torchcam-best": "torchcam", "grad-cam": "pytorch_grad_cam"}  # contender -> module


class Job(NamedTuple):
    """The task of every contender: the maps of these classes, at this layer, for this input."""

    model: nn.Module
    layer: str
    x: Tensor
    classes: list[int]
    channels: int
    chunk: int | None


# ----------------------------------------------------------------------------------------------------- contenders


def plain(job: Job) -> None:
    batch, rows = _noise(job, job.chunk or 32), job.channels * len(job.x)
    with torch.no_grad():
        for start in range(0, rows, len(batch)):
            job.model(batch[: rows - start])
    _wait(job)


def _noise(job: Job, rows: int) -> Tensor:
    return torch.randn(rows, *job.x.shape[1:], generator=torch.Generator().manual_seed(1)).to(job.x.device)


def limit(job: Job) -> None:
    """The forward under `torch.compile`, weights as inputs, channels last, at the fastest batch size; full batches only."""
    run, batch = _limit_of(job)
    with torch.no_grad():
        for _ in range(_limit_rows(job) // len(batch)):
            run(batch)
    _wait(job)


def _limit_rows(job: Job) -> int:
    batch = len(_limit_of(job)[1])
    return math.ceil(job.channels * len(job.x) / batch) * batch


_BATCHES = (4, 8, 16, 32, 64)
_FOUND: dict[tuple[str, int], Any] = {}  # the compiled forward and the fastest batch of a model, by its id


def _limit_of(job: Job) -> tuple[Callable[[Tensor], Any], Tensor]:
    key = "limit", id(job.model)
    if key not in _FOUND:
        last = copy.deepcopy(job.model).eval().to(memory_format=torch.channels_last)
        state = {name: t.detach() for name, t in (*last.named_parameters(), *last.named_buffers())}
        forward = torch.compile(lambda state, x: torch.func.functional_call(last, state, (x,)), dynamic=False)
        run = functools.partial(forward, state)
        noise = (_noise(job, rows).contiguous(memory_format=torch.channels_last) for rows in _BATCHES)
        _FOUND[key] = run, _quickest(job, "limit", run, list(noise))
    return _FOUND[key]


def _quickest(job: Job, name: str, run: Callable[[Tensor], Any], batches: list[Tensor]) -> Tensor:
    """The batch with the least time per input, median of five turns with equally many inputs."""
    most = max(map(len, batches))

    def turn(batch: Tensor) -> None:
        for _ in range(most // len(batch)):
            run(batch)
        _wait(job)

    with torch.no_grad():
        for batch in batches:
            run(batch)  # may compile
        found = common.interleaved({str(len(batch)): functools.partial(turn, batch) for batch in batches}, 5)
    best = min(batches, key=lambda batch: found[str(len(batch))].median)
    common.say(f"{name}: the best batch is {len(best)}")
    return best


def _wait(job: Job) -> None:
    if job.x.device.type == "cuda":
        torch.cuda.synchronize()


def torchcam(job: Job, batch: int = 32) -> Tensor:
    from torchcam.methods import ScoreCAM

    with ScoreCAM(job.model, job.layer, batch_size=job.chunk or batch) as extractor:
        with torch.inference_mode():
            job.model(job.x)
        return extractor(job.classes)[0]


def torchcam_best(job: Job) -> Tensor:
    return torchcam(job, _best_batch(job))


def _best_batch(job: Job) -> int:
    key = "eager", id(job.model)
    if key not in _FOUND:
        _FOUND[key] = len(_quickest(job, "torchcam", job.model, [_noise(job, rows) for rows in _BATCHES]))
    return _FOUND[key]


def grad_cam(job: Job) -> Tensor:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with ScoreCAM(job.model, [job.model.get_submodule(job.layer)]) as extractor:
        if job.chunk:
            extractor.batch_size = job.chunk
        return torch.from_numpy(extractor(job.x, [ClassifierOutputTarget(c) for c in job.classes]))


def as_camfn(
    job: Job, recipe: str = "torchcam", size: Any = None, target: Any = None, budget: float = 1.0, **sweep: Any
) -> Tensor:
    options = {"recipe": recipe, "size": size, "budget": budget, "sweep": camfn.Sweep(chunk=job.chunk, **sweep)}
    maps = camfn.score_cam(job.model, job.layer, job.x, job.classes if target is None else target, **options)
    _wait(job)
    return maps


def prepare(name: str, job: Job) -> None:
    """Find the fastest batch before the timing, since it is not part of a call."""
    if name == "limit":
        _limit_of(job)
    elif name == "torchcam-best":
        _best_batch(job)


CONTENDERS: dict[str, Callable[[Job], Any]] = {
    "plain": plain,
    "torchcam": torchcam,
    "torchcam-best": torchcam_best,
    "camfn": functools.partial(as_camfn, compile=False),
    "grad-cam": grad_cam,
    "camfn-as-grad-cam": functools.partial(as_camfn, recipe="pytorch-grad-cam", size="input", compile=False),
    "limit": limit,
    "camfn-compiled": functools.partial(as_camfn, compile=True),
    "camfn-bfloat16": functools.partial(as_camfn, compile=False, dtype=torch.bfloat16),
    "camfn-budget": functools.partial(as_camfn, compile=False, budget=0.1),
    "camfn-budget-bfloat16": functools.partial(as_camfn, compile=False, budget=0.1, dtype=torch.bfloat16),
    "camfn-top5": functools.partial(as_camfn, compile=False, target=camfn.targets.top(5)),
    "camfn-all": functools.partial(as_camfn, compile=False, target="all"),
}
PAIRS = {"camfn": "torchcam", "camfn-as-grad-cam": "grad-cam", "camfn-compiled": "torchcam"}
COMPILED = ("limit", "camfn-compiled")
APPROXIMATE = dict.fromkeys(("camfn-bfloat16", "camfn-budget", "camfn-budget-bfloat16"), "torchcam")


# ------------------------------------------------------------------------------------------------------- the job


def job_of(options: argparse.Namespace) -> Job:
    models = common.torchvision_models()
    if not callable(getattr(models, options.model, None)):
        sys.exit(f"torchvision.models has no {options.model!r}")
    torch.manual_seed(0)
    model = getattr(models, options.model)(weights=None)
    x = torch.randn(options.images, 3, options.size, options.size)
    logits = _settle(model, x)
    seen = camfn.tap(model, options.layer)(camfn.state_of(model), x).seen
    job = Job(model, options.layer, x, logits.argmax(1).tolist(), seen.shape[1], options.chunk)
    return job._replace(model=model.to(options.device), x=x.to(options.device))


@torch.no_grad()
def _settle(model: nn.Module, x: Tensor) -> Tensor:
    """Set batch-norm statistics from noise and the logits' standard deviation to 3, so that scores differ. Returns logits."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain average over all batches
    model.train()
    model(torch.randn(16, *x.shape[1:]))
    model.eval()
    last = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    factor = 3 / model(x).std()
    for tensor in last.parameters():
        tensor.mul_(factor)
    return model(x)


@contextmanager
def counted(job: Job) -> Iterator[dict[str, int]]:
    """Count the rows that reach the model, at its class, because camfn runs a copy. Rows of the input itself are `clean`."""
    rows = {"clean": 0, "masked": 0}

    def count(x: Tensor) -> None:
        clean = x.shape == job.x.shape and torch.equal(x, job.x)
        rows["clean" if clean else "masked"] += len(x)

    with common.watched(job.model, count):
        yield rows


# ----------------------------------------------------------------------------------------------------- the check


def warm_up(job: Job, names: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Run every contender once; return the maps and the rows."""
    maps, rows = {}, {}
    for name in names:
        common.say(f"warm-up: {name}")
        prepare(name, job)
        if name in COMPILED:  # the compiler would trace the patched forward
            maps[name] = CONTENDERS[name](job)
            rows[name] = {"clean": 0, "masked": _limit_rows(job)} if name == "limit" else {**rows["camfn"]}
            continue
        if name.startswith("camfn"):
            CONTENDERS[name](job)  # warm up first, so that the rows of an ordinary call are counted
        with counted(job) as rows[name]:
            maps[name] = CONTENDERS[name](job)
    return maps, rows


def differences(job: Job, maps: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Differences of camfn's maps from the peers' and from the maps of equal weights. Exits if camfn and a peer disagree."""
    found = {}
    for ours, theirs in {**PAIRS, **APPROXIMATE}.items():
        if ours not in maps or theirs not in maps:
            continue
        pair = {
            "from_peer": _largest(maps[ours], maps[theirs]),
            "from_equal_weights": _largest(maps[ours], _unweighted(job, maps[ours])),
        }
        if ours in PAIRS and not pair["from_peer"] <= TOLERANCE:
            sys.exit(f"{ours} and {theirs} differ by {pair['from_peer']:.3g}, more than {TOLERANCE:g}: nothing was timed")
        if not pair["from_equal_weights"] > 100 * TOLERANCE:
            sys.exit(
                f"the map of equal weights is within {pair['from_equal_weights']:.3g} of {ours}'s: agreement there would "
                "prove nothing; nothing was timed (a larger --size, another --layer?)"
            )
        found[ours] = pair
    return found


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        sys.exit(f"maps differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).abs().max())


def _unweighted(job: Job, like: Tensor) -> Tensor:
    """The map with equal weights for all channels, at the size of another map."""
    activation = camfn.tap(job.model, job.layer)(camfn.state_of(job.model), job.x).seen
    return camfn.maps.normalize(camfn.maps.resize(torch.relu(activation.mean(1)), like.shape[1:]), (1, 2))


# ---------------------------------------------------------------------------------------------------- the record


def measure(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    names = options.methods
    job = job_of(options)
    maps, rows = warm_up(job, names)
    agreement = differences(job, maps)
    fresh = () if options.no_memory else names
    memory = {name: common.in_fresh_process(__file__, [*argv, "--memory-of", name]) for name in fresh}
    timings = common.interleaved({name: functools.partial(CONTENDERS[name], job) for name in names}, options.rounds)
    arguments = {key: value for key, value in vars(options).items() if key not in ("out", "no_memory", "memory_of")}
    return {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "numpy", "camfn", "torchcam", "grad-cam"]),
        "arguments": arguments,
        "channels": job.channels,
        "tolerance": TOLERANCE,
        "share_of_threads": common.share_of_threads(timings.values()),
        "contenders": {name: _entry(name, timings, rows, memory.get(name), agreement.get(name)) for name in names},
    }


def memory_of(name: str, job: Job) -> dict[str, float]:
    """In a fresh process: the peak memory of one call, after the contender's own imports."""
    if name in PEERS:
        importlib.import_module("torchcam.methods" if "torchcam" in name else PEERS[name])
    prepare(name, job)
    return common.peak_above(lambda: CONTENDERS[name](job))


def _entry(
    name: str, timings: dict[str, common.Timing], all_rows: dict[str, Any], memory: dict[str, float] | None, agreement: Any
) -> dict[str, Any]:
    timing, rows = timings[name], all_rows[name]
    return {
        "seconds": timing.seconds,
        "cpu_seconds": timing.cpu_seconds,
        "median_seconds": timing.median,
        "masked_per_second": rows["masked"] / timing.median,
        "rows": rows,
        "memory_mib": memory,
        "largest_difference": agreement,
        "compared_with": {**PAIRS, **APPROXIMATE}.get(name) if agreement else None,
        "share_of_limit": _share_of_limit(name, timings, all_rows),
        "time_over": {
            other: common.ratio(timing, timings[other]) for other in ("torchcam", "plain", "limit") if other in timings
        },
    }


def _share_of_limit(name: str, timings: dict[str, common.Timing], rows: dict[str, Any]) -> float | None:
    """Rows per second over those of `limit`, within each round; only for contenders that score all rows in float32."""
    if "limit" not in timings or name in APPROXIMATE:
        return None
    pairs = zip(timings[name].seconds, timings["limit"].seconds)
    return statistics.median(rows[name]["masked"] / mine * its / rows["limit"]["masked"] for mine, its in pairs)


def text(record: dict[str, Any]) -> str:
    where, asked = record["environment"], record["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    rows = [_line(name, entry) for name, entry in record["contenders"].items()]
    columns = ("", "seconds", "masked/s", "masked", "clean", "peak MiB", "difference", "x torchcam", "x plain", "of limit")
    return "\n".join(
        [
            f"Score-CAM, {asked['model']} {asked['layer']}, {record['channels']} channels; images: {asked['images']}, "
            f"of {asked['size']} px; chunk {asked['chunk'] or 'of its own'}; rounds: {asked['rounds']}",
            f"{where['processor']}, threads: {where['threads']}, busy with us {record['share_of_threads']:.0%} of the time",
            f"Python {where['python']}, {versions}",
            "",
            common.table(columns, rows),
        ]
    )


def _line(name: str, entry: dict[str, Any]) -> list[str]:
    over = entry["time_over"]
    times = [f"{1 / over[other]:.2f}" if other in over else "" for other in ("torchcam", "plain")]
    share = entry["share_of_limit"]
    difference = f"{entry['largest_difference']['from_peer']:.1e}" if entry["largest_difference"] else ""
    rate, rows = f"{entry['masked_per_second']:.1f}", entry["rows"]
    peak = f"{entry['memory_mib']['above']:.0f}" if entry["memory_mib"] else ""
    return [
        name,
        f"{entry['median_seconds']:.2f}",
        rate,
        str(rows["masked"]),
        str(rows["clean"]),
        peak,
        difference,
        *times,
        f"{share:.2f}" if share else "",
    ]


def options_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("Contenders")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models")
    parser.add_argument("--layer", default="layer4")
    parser.add_argument("--size", type=common.positive, default=224, help="side of the input in pixels")
    parser.add_argument("--images", type=common.positive, default=1, help="batch of the input")
    parser.add_argument("--device", default="cpu", help='where model and input are: "cpu", "cuda"')
    parser.add_argument("--rounds", type=common.positive, default=3)
    chunks = "masked inputs per forward, for every contender; by default each has its own"
    parser.add_argument("--chunk", type=common.positive, help=chunks)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS)[:6],
        help="contenders to run; the first six if none is named",
    )
    parser.add_argument("--out", metavar="FILE.json", help="where to write the record")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes that measure memory")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = options_of(argv)
    warnings.simplefilter("error", camfn.CamWarning)  # a meaningless map would make no comparison
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, job_of(options))))
        return
    common.require({PEERS[name]: name.removesuffix("-best") for name in options.methods if name in PEERS})
    try:
        record = measure(options, argv)
    except (camfn.CamError, camfn.CamWarning) as found:
        sys.exit(f"{found}; nothing was timed")
    print(text(record))
    if options.out:
        common.write(options.out, record)


if __name__ == "__main__":
    main(sys.argv[1:])
