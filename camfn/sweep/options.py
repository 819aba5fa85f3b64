"""The options of a sweep, their validation, and the progress bar."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from camfn import _compat
from camfn._errors import CamError, warn

CHUNK = 32
"""The default of `Sweep.chunk`: masked inputs per forward pass, at most."""


class Sweep(NamedTuple):
    """Execution options of a sweep: chunk size, memory, compilation, precision, progress.

    No option changes the result beyond rounding, which is that of `dtype` if one is given.

    Args:
        chunk: masked inputs per forward pass. The default is 32; on a CPU it is the chunk size that is fastest there, at most
            32, in at most half of the free memory.
        memory: a limit in bytes (an int) or as a share of the free memory (a float in (0, 1]). The chunk is then the largest
            that fits, at most `chunk`, or 1024 without one. When memory runs out, with or without a limit, the chunk is
            halved, and a warning says so.
        compile: `True` compiles the kernel with `torch.compile(fullgraph=True)`; `False` never does. `"auto"` uses a kernel
            that is already compiled for this model and these shapes, and compiles one if the work left pays for it
            (`camfn.sweep.options.pays`).
        fold: `True` runs the model on the chunk as one batch. `False` maps over the chunk with `vmap`, so that the model sees
            one row at a time: for models whose samples are not independent. `"auto"` finds out in each call, by two forward
            passes on three images in all (more if their outputs disagree); under a transform it is `True`. A model that reads
            a value of its input in Python runs on one row at a time, since it may decide by it for the whole batch.
        dtype: `torch.bfloat16` or `torch.float16` runs the sweep in this dtype. It is faster if the processor has instructions
            for it and few channels carry the map. Those channels are scored again in full precision, until three standard
            errors of the others' rounding are below 0.02 of the min-max normalized map: at most a quarter of the channels,
            or 8. `camfn.explain` reports the error. Without such instructions `dtype` is ignored with a warning; under a
            transform it is ignored.
        progress: `True` shows a tqdm bar; a callable receives `(done, total)` forward passes.

    >>> import camfn, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> camfn.score_cam(model, "1", torch.randn(2, 3, 8, 8), sweep=camfn.Sweep(chunk=4)).shape
    torch.Size([2, 6, 6])
    """

    chunk: int | None = None
    memory: int | float | None = None
    compile: bool | Literal["auto"] = "auto"
    fold: bool | Literal["auto"] = "auto"
    dtype: torch.dtype | None = None
    progress: bool | Callable[[int, int], None] = False


def checked(options: Sweep) -> Sweep:
    """Return `options`, or raise `CamError` if one is invalid."""
    chunk, memory = options.chunk, options.memory
    if chunk is not None and not (_is_whole(chunk) and chunk > 0):
        raise CamError(f"Sweep(chunk={chunk!r}): chunk must be None or a positive int, masked inputs per forward")
    share = isinstance(memory, float) and 0 < memory <= 1
    if memory is not None and not share and not (_is_whole(memory) and memory > 0):
        raise CamError(f"Sweep(memory={memory!r}): memory must be None, bytes (a positive int), or a share in (0, 1] (a float)")
    for name in ("compile", "fold"):
        value = getattr(options, name)
        if not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
            raise CamError(f'Sweep({name}={value!r}): {name} must be "auto", True or False')
    if options.dtype not in (None, torch.bfloat16, torch.float16):
        raise CamError(f"Sweep(dtype={options.dtype!r}): dtype must be None, torch.bfloat16 or torch.float16")
    return options


def refuse_with_graph(graphed: bool, options: Sweep, budgeted: bool = False) -> None:
    """Raise `CamError` for options without a derivative, if the maps have a graph."""
    given = {
        "budget= or tolerance=": budgeted,
        f"Sweep(dtype={options.dtype})": options.dtype is not None,
        "Sweep(compile=True)": options.compile is True,
    }
    for said, is_given in given.items():
        if graphed and is_given:
            raise CamError(
                f"the map has a graph, since x or a tensor of state= requires grad, and {said} has no derivative: leave it "
                "out, or call under torch.no_grad()"
            )


def usable(options: Sweep, device: torch.device, own: torch.dtype) -> Sweep:
    """Drop a dtype that would not be faster on this device, with a warning."""
    if options.dtype in (None, own) or _compat.transformed():
        return options._replace(dtype=None)
    if not _compat.is_fast(options.dtype, device):
        warn(f"Sweep(dtype={options.dtype}): this {device.type} has no instructions for it and would be slower: it is left out")
        return options._replace(dtype=None)
    return options


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def pays(seconds: float) -> bool:
    """Whether compiling pays off for a sweep with this many seconds left to run without it.

    A compiled kernel saves at most 6 % of the time of one with folded batch norms and channels last
    (`benchmarks/results/score_cam.json`). Compiling is assumed to cost `COSTS` seconds (`benchmarks/compile.py` measures it).
    """
    return SAVES * seconds > COSTS


SAVES, COSTS = 0.05, 40.0  # share of the time saved; seconds to compile


def counter(progress: bool | Callable[[int, int], None], total: int) -> Callable[[int | None], None]:
    """Return `tick`: `tick(n)` advances the progress by n forward passes, and `tick(None)` completes it."""
    if progress is False:
        return lambda used: None
    report, done = _bar(total) if progress is True else progress, 0

    def tick(used: int | None) -> None:
        nonlocal done
        if used is None and done == total:
            return
        done = total if used is None else done + used
        report(done, total)

    return tick


def _bar(total: int) -> Callable[[int, int], None]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise CamError("progress=True needs tqdm (pip install 'camfn[cli]'); or pass a callable (done, total)") from error
    bar = tqdm(total=total, unit="forward")

    def report(done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report
