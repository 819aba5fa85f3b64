"""The engine on Ray: the same worker on a cluster, as actors of Ray Data, which restarts what dies."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from camfn._errors import CamError
from camfn.runs import shards
from camfn.runs.job import Job, network_of
from camfn.runs.sources import Item
from camfn.runs.worker import Done, Worker


def run(job: Job, items: Sequence[Item], address: str | None, told: Callable[[Done], None]) -> Done:
    """Run on the cluster at `address`, or on one that is started here and ends with this call.

    Work that Ray does twice is stored once: an actor subtracts what is committed before it begins with a group of images.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    images = failures = 0
    try:
        for row in _mapped(ray, job, items).iter_rows():
            images, failures = images + int(row["images"]), failures + int(row["failures"])
            told(Done(int(row["images"]), int(row["failures"])))
    except ray.exceptions.RayError as error:
        raise CamError(f"Ray has ended the run: {str(error).strip().splitlines()[-1]}; run again to make the rest") from error
    finally:
        if started:
            ray.shutdown()
    return Done(images, failures)


def _mapped(ray: Any, job: Job, items: Sequence[Item]) -> Any:
    """The data set of what is done, a row for each group of images. A group is one shard, and one task."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    actors = gpus or max(1, cpus // 2)
    size = max(1, min(job.every, -(-len(items) // actors)))
    groups = [{"group": pickle.dumps(items[start : start + size])} for start in range(0, len(items), size)]
    read = {name: shards.names_in(job.out / name) for name in (shards.MAPS, shards.FAILURES)}  # the driver knows these
    # Half a CPU each: with all of them taken, the tasks that read the groups would wait for ever.
    needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 0.5}
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(groups))),
        fn_constructor_args=(job, max(1, cpus // actors), bool(gpus), read),
        **needs,
    )


class Actor:
    """A worker in a process of Ray."""

    def __init__(self, job: Job, threads: int, gpu: bool, read: dict[str, set[str]]) -> None:
        torch.set_num_threads(threads)
        self._out = job.out
        self._worker = Worker(job, network_of(job, "cuda" if gpu else None))
        self._read = read
        self._done: set[str] = set()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the maps of a group of images."""
        items: list[Item] = pickle.loads(batch["group"][0])  # pickled by the driver of this run
        for name, read in self._read.items():  # by an actor that has died
            now = shards.names_in(self._out / name)
            self._done |= shards.ids_in(self._out / name, read)
            read |= now
        done = self._worker(items, self._done)
        return {"images": [done.images], "failures": [done.failures]}


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]: an extra
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CamError("engine=\"ray\" needs Ray: pip install 'camfn[ray]'") from error
    return ray
