"""How a sweep is carried out: the options, checked, and the progress that is shown."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from camfn import _compat
from camfn._errors import CamError, warn

CHUNK = 32
"""Masked inputs per forward, at most, where nothing else is asked for."""


class Sweep(NamedTuple):
    """How a sweep is carried out. Nothing here changes the result beyond rounding, that of `dtype` if one is given.

    - `chunk`: masked inputs per forward; 32 by default, on a CPU fewer where so many would hold more than it is quick with, or
      than half of what is free.
    - `memory`: how much the sweep may take, in bytes (an int) or as a share of what is free (a float in (0, 1]): the chunk is
      what fits, `chunk` being then the most. Where an allocator has no memory left, the chunk is halved, which a warning says.
    - `compile`: `True` compiles the kernel with `torch.compile(fullgraph=True)`; `"auto"` uses a compiled kernel where this
      model and these shapes have one, and makes one where the work at hand pays for it (`camfn.sweep.options.pays`).
    - `fold`: `True` gives the model the chunk as a batch; `False` maps through the model, which then sees one row at a time:
      for models whose samples are not independent. `"auto"` finds out, in each call, by three forwards;
      under a transform it is `True`.
    - `dtype`: `torch.bfloat16` or `torch.float16` runs the sweep in it, faster where the processor has instructions for it
      and few channels carry the map; without instructions a warning says so, and it is left out, as it is under a transform.
      The channels that carry the map are scored again in full precision, until three standard errors of what the others'
      rounding can move are below 0.02 of the normalised map, and a quarter of them at most; `camfn.explain` tells the error.
    - `progress`: `True` shows a bar (tqdm), a callable gets `(done, total)` forwards.
    """

    chunk: int | None = None
    memory: int | float | None = None
    compile: bool | Literal["auto"] = "auto"
    fold: bool | Literal["auto"] = "auto"
    dtype: torch.dtype | None = None
    progress: bool | Callable[[int, int], None] = False


def checked(options: Sweep) -> Sweep:
    """`options`, or a sentence about what is wrong with them."""
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


def usable(options: Sweep, device: torch.device, own: torch.dtype) -> Sweep:
    """Without a dtype that would be no faster here, which a warning says."""
    if options.dtype in (None, own) or _compat.transformed():
        return options._replace(dtype=None)
    if not _compat.is_fast(options.dtype, device):
        warn(f"Sweep(dtype={options.dtype}): this {device.type} has no instructions for it, and would be slower: left out")
        return options._replace(dtype=None)
    return options


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def pays(seconds: float) -> bool:
    """Is compiling worth it for a sweep that would take so many more seconds without?

    A compiled kernel saves 6 % at best of the time of one that has its batch norms merged and its channels last already
    (`benchmarks/results/score_cam.json`), and compiling is taken to cost `COSTS` seconds (`benchmarks/compile.py` measures it).
    """
    return SAVES * seconds > COSTS


SAVES, COSTS = 0.05, 40.0  # a share, seconds


def counter(progress: bool | Callable[[int, int], None], total: int) -> Callable[[int | None], None]:
    """A function that is told of every chunk how many forwards it was, and shows it; told `None`, it is at its end."""
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
