"""When does compiling a sweep pay off? The basis of `Sweep(compile="auto")`.

In a fresh process, time the first compiled call. Then time a later compiled call and the eager sweep (batch norms folded,
channels last), interleaved. Repeat in a second process that finds the compiler's artifacts on disk. The cost of compiling is
the time of the first call minus that of a later call. The saving is a share of the eager time. Compiling pays off from cost /
share seconds of eager work.

    python benchmarks/compile.py --out benchmarks/results/compile.json        # five minutes
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from typing import Any

import common
import torch

import camfn
from camfn.sweep import options as sweep_options

MODELS = {"resnet18": "layer2", "mobilenet_v2": "features.13"}  # a masked input costs the same at every layer


def seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> dict[str, float]:
    """Measure one model; run this in a fresh process."""
    torch.manual_seed(0)
    model, x = getattr(common.torchvision_models(), name)(weights=None).eval(), torch.randn(1, 3, 224, 224)
    sweep = functools.partial(camfn.score_cam, model, MODELS[name], x, 1)
    eager, compiled = (functools.partial(sweep, sweep=camfn.Sweep(compile=on)) for on in (False, True))
    eager()
    first = seconds(compiled)
    timings = common.interleaved({"eager": eager, "compiled": compiled}, rounds)
    later = {name: timing.median for name, timing in timings.items()}
    cost, share = first - later["compiled"], 1 - common.ratio(timings["compiled"], timings["eager"])
    return {**later, "first": first, "cost": cost, "saves": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--out", help="write the record to this file")
    parser.add_argument("--of", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(json.dumps(measure(options.of, options.rounds)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in MODELS:
            arguments = ["--of", name, "--rounds", str(options.rounds)]
            fresh, again = (common.in_fresh_process(__file__, arguments) for _ in range(2))
            found[name] = {**fresh, "cost, artefacts on disk": again["cost"]}
    saves, cost = (statistics.median(of[key] for of in found.values()) for key in ("saves", "cost"))
    record = {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "camfn"]),
        "models": found,
        "pays_from_seconds": cost / saves if saves > 0 else None,
        "rule": {"saves": sweep_options.SAVES, "costs_seconds": sweep_options.COSTS},
    }
    columns = ["seconds", *next(iter(found.values()))]
    print(common.table(columns, [[name, *(f"{value:.3f}" for value in row.values())] for name, row in found.items()]))
    if options.out:
        common.write(options.out, record)


if __name__ == "__main__":
    main()
