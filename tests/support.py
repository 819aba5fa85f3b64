"""What several test files share: networks, torchvision where it was built for another torch, trained networks if there."""

import copy
import functools
import importlib.util
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn

CHEAP = {
    "cam": {"fc": "fc"},
    "cameras": {"factors": (1.25,)},
    "fem": {"k": 0.75},
    "group_cam": {"blur": (3, 1.0)},
    "is_cam": {"num_samples": 3},
    "opti_cam": {"steps": 2},
    "rise": {"num_samples": 20, "cells": 3},
    "smooth_grad_cam_pp": {"num_samples": 2},
    "ss_cam": {"num_samples": 3},
}
"""Options that keep a method's cost, and its warnings, down. (On a small grid nothing is two deviations above the mean.)"""

REAL = Path(os.environ.get("CAMFN_REAL", Path(__file__).resolve().parents[2] / "shared" / "real"))
"""A folder of trained networks and photos with a `load.py`; tests that want it are skipped where it is missing."""


def torchvision_models():
    """`torchvision.models`, also where torchvision was built for CUDA and torch for the CPU; skips where it is missing.

    There its compiled operators do not load, and the import stops at their missing schemas; the models need none of them.
    """
    pytest.importorskip("torchvision", exc_type=ImportError) if _torchvision_loads() else _define_schemas()
    import torchvision

    return torchvision.models


_LIBRARY = []  # a registration lives as long as its library object


def _torchvision_loads() -> bool:
    if importlib.util.find_spec("torchvision") is None:
        return True  # and importorskip skips
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        return False
    return True


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.append(library)


def detectors():
    """`torchvision.models.detection`, with the one compiled operator that its models cannot do without written in Python."""
    models = torchvision_models()
    if _LIBRARY and len(_LIBRARY) == 1:
        import torchvision

        _LIBRARY.append(torch.library.Library("torchvision", "IMPL"))
        _LIBRARY[1].impl("nms", _nms, "CPU")
        torchvision.extension._has_ops = lambda: True
    return models.detection


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes in the order of their scores, less those that overlap with a better one."""
    from torchvision.ops import box_iou

    order, overlap, kept = scores.argsort(descending=True), box_iou(boxes, boxes), []
    while len(order):
        kept.append(order[0])
        order = order[overlap[order[0], order] <= iou_threshold]
        order = order[order != kept[-1]]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


def real_networks():
    """`load.MODELS` of the folder of trained networks; skips where it is missing."""
    if not (REAL / "load.py").exists():
        pytest.skip(f"no trained networks under {REAL}")
    torchvision_models()
    spec = importlib.util.spec_from_file_location("camfn_real_load", REAL / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODELS


LAYERED = [name for name, method in camfn.METHODS.items() if "attention" not in method.needs]
"""The methods that convolutional networks take; those that follow attention are in tests/methods/test_transformers.py."""

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class SmallNet(nn.Module):
    """conv, batch norm, ReLU, conv with stride 2 (`features`), ReLU, and a pooled or dense linear head."""

    def __init__(
        self, dims: int = 2, channels: int = 6, classes: int = 5, side: int = 8, dense: bool = False, inplace: bool = False
    ):
        super().__init__()
        conv = CONVS[dims]
        bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.stem = nn.Sequential(conv(3, 4, 3, padding=1), bn(4), nn.ReLU())
        self.features = conv(4, channels, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=inplace)
        self.pool = nn.Identity() if dense else POOLS[dims](1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(channels * (((side + 1) // 2) ** dims if dense else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(self.act(self.features(self.stem(x)))).flatten(1)))


def small_net(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs) -> SmallNet:
    """A `SmallNet` with seeded weights and batch-norm statistics that are not the trivial ones; in train mode."""
    generator = torch.Generator().manual_seed(seed)
    net = SmallNet(**kwargs)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if "fc" in name else 0.5))
    return net.to(dtype)


def inputs(n: int = 2, dims: int = 2, side: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """`(n, 3, side, ...)` normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *(side,) * dims, generator=generator, dtype=torch.float64).to(dtype)


UNITS = 256
"""Rounding errors that `close` allows: those of float64 sums of some hundred terms, added in another order. Where maps, weights
and gradients are computed twice, 63 are the most seen, with the newest and the oldest kernels of MKL, oneDNN and ATen."""


def close(
    found: Tensor,
    expected: Tensor,
    what: str = "",
    *,
    units: float = UNITS,
    size: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """The largest difference is at most `units` times the rounding of the largest value compared.

    A unit of rounding is `eps` of the dtype of `found`, times the largest value of both tensors. Give `size`, the largest
    value that was added, where the result is the small rest of larger terms; and `dtype` where a step on the way is narrower.
    """
    if size is None:
        size = max((float(t.detach().abs().max()) for t in (found, expected) if t.numel()), default=0.0)
    unit = torch.finfo(dtype or found.dtype).eps * float(size)
    _assert_within(found, expected, units * unit, what, unit)


def assert_close(ours: Tensor, theirs: Tensor, atol: float, what: str = "") -> None:
    """The largest absolute difference is at most `atol`: 0, or the error of an approximation. For rounding there is `close`."""
    _assert_within(ours, theirs, atol, what)


def _assert_within(found: Tensor, expected: Tensor, atol: float, what: str, unit: float = 0.0) -> None:
    """Fails with the index and the values of the largest difference, and its ratio to the bound."""
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    difference = (found.double() - expected.double()).abs()
    if bool((difference <= atol).all()):
        return
    flat = int(difference.nan_to_num(torch.inf).argmax())
    index = tuple(int(i) for i in np.unravel_index(flat, tuple(found.shape)))
    worst = float(difference.flatten()[flat])
    values = f"{found.flatten()[flat]:.17g} against {expected.flatten()[flat]:.17g}"
    ratio = f", {worst / atol:.3g} times the bound" if atol else ""
    rounding = f", {worst / unit:.3g} units of rounding" if unit else ""
    raise AssertionError(f"{what}: differs by {worst:.3g} (allowed {atol:.3g}{ratio}{rounding}) at {index}: {values}")


def score_cam_loop(net: nn.Module, layer: str, x: Tensor, score, raw: bool = False) -> Tensor:
    """Score-CAM as a plain loop with a plain hook, `(n, t, h, w)`.

    `score(y, i)` is `(t,)`, of what the model gives for image i alone under a mask. `raw`: after the ReLU, not scaled.
    """
    net, kept = copy.deepcopy(net).eval(), []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    with torch.no_grad():
        net(x)
        handle.remove()
        maps = torch.stack([_loop_one(net, x[i : i + 1], a, functools.partial(score, i=i)) for i, a in enumerate(kept[0])])
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return maps if raw else (maps - low) / (high - low)


def _loop_one(net: nn.Module, image: Tensor, activation: Tensor, score) -> Tensor:
    scores = []
    for a in activation:
        mask = (a - a.min()) / (a.max() - a.min() + 1e-8)
        mask = F.interpolate(mask[None, None], image.shape[2:], mode="bilinear", align_corners=False)
        scores.append(score(sample_of(net(image * mask))))
    return torch.relu(torch.einsum("ct,chw->thw", torch.stack(scores).softmax(0), activation))


def grad_cam_loop(net: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """Grad-CAM by `autograd.grad` and a plain hook, image by image and score by score, `(n, t, h, w)`, not scaled."""
    net, kept, maps = copy.deepcopy(net).eval(), [], []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    for i in range(len(x)):
        scores = score(sample_of(net(x[i : i + 1])), i=i)
        slopes = [torch.autograd.grad(one, kept[i], retain_graph=True)[0][0] for one in scores]
        maps.append(torch.stack([torch.relu((g.mean((1, 2))[:, None, None] * kept[i][0]).sum(0)) for g in slopes]))
    return torch.stack(maps).detach()


def sample_of(output):
    """The one sample of an output, of a batch of one."""
    if isinstance(output, dict):
        return {key: value[0] for key, value in output.items()}
    return output[0]


def at_once(jobs):
    """The results of the jobs, each in a thread of its own, started together."""
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(place):
        try:
            barrier.wait()
            results[place] = jobs[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
