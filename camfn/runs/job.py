"""The arguments of a run, its settings for the manifest, and its network."""

import copy
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from camfn import zoo
from camfn._errors import CamError, suggested
from camfn.methods import METHODS
from camfn.runs import manifest
from camfn.runs.rows import NARROW, WIDE
from camfn.sweep.options import Sweep
from camfn.targets import Top
from camfn.zoo.networks import Network, open_network


class Job(NamedTuple):
    """The arguments of a run that each of its processes needs."""

    model: str | Network
    weights: str | os.PathLike[str] | None
    pretrained: bool
    layers: tuple[str, ...]
    methods: tuple[str, ...]
    target: Any
    options: dict[str, Any]
    seed: int
    dtype: str  # of the stored maps
    out: Path
    batch: int
    workers: int
    every: int  # images in a shard
    views: bool  # whether to find where inputs lie on their photos


def checked(job: Job) -> Job:
    """Check the arguments that say all by themselves."""
    if not job.methods:
        raise CamError("methods is empty: name one or more")
    for name in job.methods:
        if name not in METHODS:
            raise CamError(f"no method named {name!r}{suggested(name, METHODS)}; all: {', '.join(METHODS)}")
    for key in job.options:
        if key in ("normalize", "seed", "state") or not any(key in parameters(name) for name in job.methods):
            raise CamError(f"a run of {', '.join(job.methods)} has no option {key!r}")
    for name, least in (("batch", 1), ("workers", 0), ("every", 1), ("seed", 0)):
        value = getattr(job, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CamError(f"{name} must be a whole number of at least {least}, found {value!r}")
    if job.dtype not in (NARROW, WIDE):
        raise CamError(f"dtype must be {NARROW!r} or {WIDE!r}, found {job.dtype!r}")
    if not job.layers and any(METHODS[name].of_layer for name in job.methods):
        raise CamError("name a layer, so that all maps come from the same layer: `camfn layers --model SPEC` lists the layers")
    return job


def parameters(method: str) -> Mapping[str, inspect.Parameter]:
    """The options of a method."""
    return inspect.signature(METHODS[method].run).parameters


def network_of(job: Job, device: str | torch.device | None) -> Network:
    """Load the network of a run, and check its layers."""
    if isinstance(job.model, str):
        network = open_network(job.model, weights=job.weights, pretrained=job.pretrained, device=device)
    else:
        network = job.model if device is None else job.model._replace(model=_moved(job.model.model, device))
    if job.layers:
        zoo.check_layers(network.model, job.layers)
    return Network(*network)


def _moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The caller's model, or a copy of it if it is on another device."""
    there = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    meant = torch.zeros((), device=device).device  # with its index
    return model if there <= {meant} else copy.deepcopy(model).to(device)


def settings_of(job: Job, network: Network) -> dict[str, Any]:
    """The settings that decide the maps. A resumed run must have the same."""
    return {
        "model": network.spec,
        "weights": manifest.weights_of(network.model),
        "layers": list(job.layers),
        "methods": list(job.methods),
        "target": _plain(job.target),
        "options": {key: _plain(value) for key, value in sorted(job.options.items())},
        "seed": job.seed,
        "dtype": job.dtype,
        "views": job.views,
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it, or as text. Of a sweep, only the dtype changes a map."""
    if isinstance(value, Sweep):
        return {"dtype": str(value.dtype)}
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return repr(value)


def words_of(job: Job, names: Sequence[str]) -> tuple[int | Top, ...] | None:
    """The classes that a target names, in words or by index. `None` for any other target."""
    if job.target is None:
        return (Top(1),)
    some = job.target if isinstance(job.target, (list, tuple)) else [job.target]
    if not some or not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in some):
        return None
    return zoo.targets_of([str(each) for each in some], names)


def seed_of(seed: int, id: str) -> int:
    """The seed of an image's noise. It depends on nothing but the run's seed and the image's id.

    >>> seed_of(0, "a.jpg") == seed_of(0, "a.jpg"), seed_of(0, "a.jpg") == seed_of(0, "b.jpg")
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode("utf-8", "backslashreplace")).digest()[:7], "big")
