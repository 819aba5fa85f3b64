"""The local engine: this process, or one process for each device."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from camfn._errors import CamError
from camfn.runs import lock
from camfn.runs.decoding import end_with_parent, sentence
from camfn.runs.job import Job, network_of
from camfn.runs.sources import Item
from camfn.runs.worker import Done, Worker
from camfn.zoo.networks import Network

Told = Callable[[Done], None]


def here(job: Job, network: Network, items: Iterable[Item], told: Told) -> Done:
    """Run in this process."""
    return Worker(job, network, told)(items)


def on_devices(job: Job, devices: Sequence[str], items: Sequence[Item], told: Told) -> Done:
    """Run one process for each device, each with its share of the images. Ctrl-C lets each commit what it has made.

    **Raises** `CamError` if a process fails or is killed. What the others made is committed.
    """
    spawn, running = multiprocessing.get_context("spawn"), {}
    threads = max(1, torch.get_num_threads() // len(devices))
    for rank, device in enumerate(devices):
        own, theirs = spawn.Pipe()
        share = [*islice(items, rank, None, len(devices))]
        process = spawn.Process(target=_process, args=(theirs, job, share, device, rank, threads), name=f"camfn-{device}")
        process.start()
        theirs.close()
        running[own] = process
    try:
        return _followed(running, told)
    except BaseException:
        _stop(running)
        raise


def _followed(running: dict[Connection, Any], told: Told) -> Done:
    """Follow processes to their end."""
    images = failures = 0
    errors: list[str] = []
    open_ends: list[Any] = [*running]
    while open_ends:
        ready: list[Any] = wait(open_ends)
        for end in ready:
            try:
                found = end.recv()
            except EOFError:
                open_ends.remove(end)
                errors += _death(running[end])
                continue
            if isinstance(found, str):
                errors.append(found)
                continue
            images, failures = images + found.images, failures + found.failures
            told(found)
    if errors:
        raise CamError(errors[0])
    return Done(images, failures)


def _death(process: Any) -> list[str]:
    """Why a process ended, if it was killed."""
    process.join()
    if process.exitcode >= 0:
        return []
    return [f"the process {process.name} was killed by {signal.Signals(-process.exitcode).name}: run again to make the rest"]


def _stop(running: dict[Connection, Any]) -> None:
    """Ask the processes to commit what they have and end, and wait for them."""
    for end in running:
        with contextlib.suppress(OSError):  # it has ended
            end.send("stop")
    for process in running.values():
        process.join(600)


def _process(end: Connection, job: Job, share: list[Item], device: str, rank: int, threads: int) -> None:
    """One process of several. It tells of its batches, and of its error, to the parent."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # the parent says when to stop
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        with lock.locked(job.out, rank):
            Worker(job, network_of(job, device), end.send)(share, stopped=end.poll)
    except Exception as error:
        end.send(sentence(error))


# ---------------------------------------------------------------------------------------------------------- torchrun


def ranks() -> tuple[int, int] | None:
    """The rank and the number of processes, if torchrun or the like has started several."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank, world) if world > 1 else None


def devices_of(devices: str | Sequence[str] | None) -> tuple[str, ...]:
    """The devices of a run: all GPUs by default, or the CPU. Under torchrun, the one of this process."""
    given = (devices,) if isinstance(devices, str) else tuple(devices or ())
    if not given:
        given = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)
    local = os.environ.get("LOCAL_RANK", "0")
    return (given[int(local) % len(given)],) if ranks() and local.isdigit() else given
