"""`camfn.runs.run`: make the maps of many images, and resume where an earlier run ended."""

import os
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from camfn._errors import CamError
from camfn.runs import local, lock, manifest, progress, shards
from camfn.runs.job import Job, checked, network_of, settings_of, words_of
from camfn.runs.sources import Item, items_of
from camfn.runs.worker import Done
from camfn.zoo.networks import Network


class Summary(NamedTuple):
    """The number of images of each outcome, and the time of a run."""

    made: int  # images whose maps this run has made
    failed: int  # images that have failed, of this run and of earlier ones
    done: int  # images that were done before this run
    seconds: float


def run(
    images: Any,
    *,
    model: str | Network,
    layer: str | Sequence[str] | None = None,
    methods: str | Sequence[str] = "grad_cam",
    target: Any = None,
    out: str | os.PathLike[str],
    batch: int = 16,
    workers: int | None = None,
    devices: str | Sequence[str] | None = None,
    retry: bool = False,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    dtype: str = "float16",
    seed: int = 0,
    every: int = 1000,
    views: bool = True,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    progress_line: bool = True,
    **options: Any,
) -> Summary:
    """Make the maps of many images, and store them in a folder. A run that ended early is resumed by the same call.

    **Arguments**

    - `images`: a folder, a list of paths (`.txt`), a table (`.parquet`), a tar file (`.tar`), or an iterable of pairs
      `(id, picture)`. A tensor in the place of a picture is the network's input, `(channels, h, w)`.
    - `model`, `weights`, `pretrained`: as in `camfn.open`, or a `Network`.
    - `layer`: the name of a layer, or several, which share the forward pass.
    - `methods`: a name in `camfn.METHODS`, or several.
    - `target`: classes by index or in words, `"top3"`, or a target of `camfn.targets`. By default, the predicted class.
    - `out`: the folder of the run. `camfn.runs.read` reads it.
    - `batch`: the number of images in a forward pass.
    - `workers`: the number of processes that decode, for each device. With 0, a picture that crashes its decoder ends the run.
      By default 1 on a CPU and 4 on a GPU; 0 for an iterable.
    - `devices`: the devices to run on, each with its own process if there are several. By default all GPUs, or the CPU. Under
      torchrun, each process has one.
    - `retry`: try the images again that failed, and only those.
    - `dtype`: `"float16"` or `"float32"`, that of the stored maps.
    - `seed`: the seed of all noise, together with each image's id.
    - `every`: the number of images in a shard.
    - `views`: whether to find where the input lies on the photo. It takes as long as some preprocessings, once for each size of
      the photos; overlays and all but the formats `npy` and `nifti` of `convert` need it.
    - `engine`, `address`: `"ray"` runs on a cluster of Ray.
    - `progress_line`: whether to show progress where stderr is a terminal.
    - `options`: options of the methods, such as `budget=` and `sweep=`.

    **Returns** a `Summary`. An image that fails is a row of `camfn.runs.failures(out)`, and the others are made.

    **Raises** `CamError` if a setting or the weights differ from those of the run in `out`, if another run writes to it, if
    `out` cannot be written to, or if 32 images in a row fail.

    >>> import camfn, tempfile
    >>> scenes = [(f"scene {seed}", camfn.demo.preprocess(camfn.demo.scene(seed).image)) for seed in range(3)]
    >>> with tempfile.TemporaryDirectory() as out:
    ...     summary = camfn.runs.run(scenes, model="demo", layer="features", target="top2", out=out)
    ...     rows = list(camfn.runs.read(out))
    >>> summary.made, len(rows), rows[0].map.shape
    (3, 6, torch.Size([12, 12]))
    """
    start = time.monotonic()
    how = _How(local.devices_of(devices), retry, progress_line, engine, address)
    listed = isinstance(images, (str, os.PathLike))
    if workers is None:
        workers = 0 if not listed else 4 if how.devices[0].startswith("cuda") else 1
    options = {key: value for key, value in options.items() if value is not None}
    names, some = (tuple(dict.fromkeys([each] if isinstance(each, str) else each or ())) for each in (layer, methods))
    folder = Path(os.fspath(out))
    job = checked(
        Job(model, weights, pretrained, names, some, target, options, seed, dtype, folder, batch, workers, every, views)
    )
    _check_engine(job, how, listed)
    items = items_of(images)
    network = network_of(job, how.devices[0] if len(how.devices) == 1 else None)
    words_of(job, network.names)
    made, before = _locked(job, network, items, how)
    failed = len(shards.ids_in(folder / shards.FAILURES) - shards.ids_in(folder / shards.MAPS))
    return Summary(made.images - made.failures, failed, before, time.monotonic() - start)


class _How(NamedTuple):
    """How to run: nothing that changes a map."""

    devices: tuple[str, ...]
    retry: bool
    shown: bool
    engine: str
    address: str | None


def _check_engine(job: Job, how: _How, listed: bool) -> None:
    if how.engine not in ("local", "ray"):
        raise CamError(f'engine must be "local" or "ray", found {how.engine!r}')
    if how.address and how.engine != "ray":
        raise CamError(f'address={how.address!r} is that of a cluster of Ray: pass engine="ray"')
    several = "several devices need" if len(how.devices) > 1 else "Ray needs" if how.engine == "ray" else ""
    if several and not isinstance(job.model, str):
        raise CamError(f"{several} the model by name, as its processes load it on their own")
    if several and not listed:
        raise CamError(f"{several} a folder, a list, a table or a tar file: an iterable stays in its process")


def _locked(job: Job, network: Network, items: Iterable[Item], how: _How) -> tuple[Done, int]:
    """Run under the lock. Returns what was made, and the number of images that were done before."""
    rank, world = local.ranks() or (None, 1)
    shards.make(job.out)
    with lock.locked(job.out, rank) as share_lock:
        if rank is None:
            shards.sweep(job.out)
        manifest.agree(job.out, settings_of(job, network))
        left, before = _left(job, islice(items, rank or 0, None, world), how, isinstance(items, list))
        with progress.line(len(left) if isinstance(left, list) else None, not how.shown) as told:
            if how.engine == "ray":
                from camfn.runs import on_ray

                return on_ray.run(job, list(left), how.address, told), before
            if len(how.devices) > 1:
                share_lock()
                return local.on_devices(job, how.devices, list(left), told), before
            return local.here(job, network, left, told), before


def _left(job: Job, items: Iterable[Item], how: _How, listed: bool) -> tuple[Iterable[Item], int]:
    """The images to make, and the number of those that are done. To retry are those that have failed."""
    done, failed = (shards.ids_in(job.out / name) for name in (shards.MAPS, shards.FAILURES))
    left = (item for item in items if item.id not in done and (item.id in failed) == how.retry)
    if not listed:
        return left, len(done)
    found = list(left)
    return found, len(done)
