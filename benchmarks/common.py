"""Shared code of the benchmarks: environment, interleaved timing, peak memory in a fresh process, records on disk.

A record contains no date, host name or path. Two runs on one machine with the same versions differ only in the measurements.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import camfn

MIB = 1 << 20


# ---------------------------------------------------------------------------------------------------------- where


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Versions of the packages (by distribution name), the processor, and torch's number of threads."""
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, **{name: _version(name) for name in packages}},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(modules: Mapping[str, str]) -> None:
    """Exit with a message if a module is missing; `modules` maps module names to distribution names."""
    missing = [distribution for module, distribution in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing: pip install 'camfn[bench]', or leave it out of this run (see --help)")


def libraries_of_the_tests() -> Any:
    """The module of the tests that loads other libraries and trained networks."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.oracles import libraries

    return libraries


def torchvision_models() -> Any:
    """`torchvision.models`, even if torchvision was built for another torch version; the tests have the workaround."""
    require({"torchvision": "torchvision"})
    try:
        import torchvision
    except RuntimeError:
        return libraries_of_the_tests().torchvision_models()
    return torchvision.models


# ----------------------------------------------------------------------------------------------------------- time


class Timing(NamedTuple):
    """The times of one call, once per round."""

    seconds: list[float]
    cpu_seconds: list[float]  # CPU time of all threads, which does not depend on the load of the machine

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time every call once per round, in reversed order in every other round. Warm up the calls first.

    All calls of a round see the same load, so ratios within a round are more reliable than times.
    """
    timings = {name: Timing([], []) for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            gc.collect()
            cpu, start = time.process_time(), time.perf_counter()
            calls[name]()
            timings[name].seconds.append(time.perf_counter() - start)
            timings[name].cpu_seconds.append(time.process_time() - cpu)
            say(f"round {number + 1} of {rounds}: {name} {timings[name].seconds[-1]:.2f} s")
    return timings


def ratio(of: Timing, to: Timing) -> float:
    """The median over rounds of the ratio within the round; below 1, `of` is faster."""
    return statistics.median(a / b for a, b in zip(of.seconds, to.seconds))


def share_of_threads(timings: Iterable[Timing]) -> float:
    """The share of its threads' time that the process got, median over calls; well below 1, others used the machine."""
    pairs = ((c, s) for timing in timings for c, s in zip(timing.cpu_seconds, timing.seconds))
    return statistics.median(c / (s * torch.get_num_threads()) for c, s in pairs)


# --------------------------------------------------------------------------------------------------------- memory


def peak_above(call: Callable[[], Any]) -> dict[str, float]:
    """Resident MiB before the call, and the rise during the call. Use it in a fresh process."""
    before, linux = resident(), _forget_peak()
    call()
    peak = _resident("VmHWM") if linux else _max_resident()
    return {"before": before, "above": peak - before}


def resident() -> float:
    """Resident MiB now, after freed memory is returned to the system."""
    gc.collect()
    _give_back()
    return _resident("VmRSS")


def _give_back() -> None:
    """Return freed memory to the system; otherwise the allocator reuses it without a visible rise. glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    """Reset the high-water mark, because making the model may have used more. Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    # Not getrusage: on Linux, its maximum starts from the parent's value at the fork, not from zero.
    status = Path("/proc/self/status")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.M)[1]) / 1024 if status.exists() else _max_resident()


def _max_resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def in_fresh_process(script: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run the script with other arguments in a fresh process; its last output line must be one JSON value."""
    env = {**os.environ, **(environment or {})}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"the fresh process with {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ a call to measure


@contextmanager
def watched(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see` with the input of each forward. Patches the model's class, because camfn runs a copy."""
    kind = type(model)
    forward = kind.forward

    def seen(self: nn.Module, x: Tensor) -> Any:
        see(x)
        return forward(self, x)

    kind.forward = seen
    try:
        yield
    finally:
        kind.forward = forward


class Case(NamedTuple):
    """A call of a method, described by the numbers that may determine its cost."""

    method: str = "score_cam"
    model: str = "resnet18"  # a torchvision model with seeded random weights; time and memory do not depend on their values
    layer: str = "layer4"
    size: int = 224  # side of the input in pixels
    chunk: int = 32  # masked inputs per forward
    channels: int | None = None  # sweep only the first channels of the layer; None sweeps all
    samples: int = 1  # number of samples of ss_cam and is_cam
    images: int = 1
    targets: int = 1  # the classes with the highest logits


def model_and_input(case: Case) -> tuple[nn.Module, Tensor]:
    """The model and input of a case, the same every time."""
    torch.manual_seed(0)
    model = getattr(torchvision_models(), case.model)(weights=None).eval()
    return model, torch.randn(case.images, 3, case.size, case.size)


def call_of(case: Case, model: nn.Module, x: Tensor) -> Callable[[], camfn.Explanation]:
    """The eager call of a case."""
    options: dict[str, Any] = {"layout": lambda activation: activation[:, : case.channels]}
    if case.method != "score_cam":
        options["num_samples"] = case.samples
    sweep = camfn.Sweep(chunk=case.chunk, compile=False)
    target = camfn.targets.top(case.targets)
    return functools.partial(camfn.explain, model, case.layer, x, target, method=case.method, sweep=sweep, **options)


# --------------------------------------------------------------------------------------------------------- saying


def say(line: str) -> None:
    """Print progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows as aligned columns, the first column to the left."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def positive(text: str) -> int:
    """Parse a positive int argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, found {text!r}")
    return int(text)


def write(path: str | Path, record: Any) -> None:
    """Write the record as JSON, with six significant digits."""
    Path(path).write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
