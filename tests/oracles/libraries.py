"""What may be missing: torchvision, its detectors, peers, a compiler, trained networks. Tests are skipped without them."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from camfn import _compat

REAL = Path(os.environ.get("CAMFN_REAL", Path(__file__).resolve().parents[3] / "shared" / "real"))
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


def peer():
    return pytest.importorskip("torchcam.methods")


def grad_cam():
    torchvision_models()  # it imports torchvision, which must load first
    return pytest.importorskip("pytorch_grad_cam")


needs_compiler = pytest.mark.skipif(bool(_compat.can_compile()), reason="this torch cannot compile the kernel")
