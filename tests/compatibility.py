"""Every method on every kind of architecture, with nothing but a model and an input: docs/compatibility.md.

    python tests/compatibility.py            # try all of them, some minutes on one core, and show the page
    python tests/compatibility.py --write    # put it into docs/compatibility.md
    python tests/compatibility.py --layers   # check what it says of headless networks and of ultralytics' networks

A cell is what came of `camfn.explain(model, None, x, method=...)`. What is neither a map nor a refusal that `REASONS` knows
is a fault, and no page is written.
"""

import re
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import camfn
from tests.oracles.architectures import ARCHITECTURES, made
from tests.oracles.libraries import torchvision_models

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"

OPTIONS: dict[str, dict[str, Any]] = {
    "cameras": {"factors": (1.25,)},
    "group_cam": {"groups": 4},
    "is_cam": {"num_samples": 1},
    "opti_cam": {"steps": 2},
    "rise": {"num_samples": 20, "cells": 3},
    "smooth_grad_cam_pp": {"num_samples": 1},
    "ss_cam": {"num_samples": 1},
}
"""What keeps the cost down, and nothing else."""

MAP, NONE = "✓", "-"

REASONS = {
    "a": (
        r"has no attention that could be seen",
        "the network has no attention between tokens; use a method that takes a layer",
    ),
    "w": (
        r"attention of shape .* over windows or groups|attention of \d+ queries to \d+ keys|number of tokens changes",
        "the method needs attention from all tokens to all tokens, the same in every layer, and some attention here is over "
        "windows or groups, pooled, of a single token, or on grids of several sizes",
    ),
    "c": (
        r"cam needs a linear layer|several layers could be fc=|its target must be classes",
        "no linear layer, or more than one, maps the layer's channels to the classes, or the target is not a class",
    ),
    "z": (r"cameras runs the model on its input at other sizes", "the network accepts images of one size only"),
    "n": (
        r"lift_cam has no rule for|depends? on values that are read in Python",
        "DeepLIFT's rule covers affine operations, element-wise functions and max-pooling, and the head has a layer norm, "
        "attention, a product of two varying values, or a branch in Python",
    ),
    "f": (
        r"no layer of \w+ has 3 spatial axes",
        "the tokens of all frames lie in another order than time, height, width: pass a layer and a function as `layout=`",
    ),
    "s": (
        r"masked= must say which|needs spatial axes in the input|in \d+ ways that fit equally|no layer of \w+ has 1 spatial",
        "the input is a sound or a spectrogram without a channel axis: methods that mask need `(n, channels, *size)`; for "
        "other methods, pass a layer and its `layout=`",
    ),
}
"""By the mark of the table: how to know the refusal, and what it means."""


class Row(NamedTuple):
    """What came of an architecture."""

    layer: str
    grid: str
    cells: dict[str, str]  # by method: a mark


class FaultError(AssertionError):
    """What neither gave a map nor was refused for a reason that the page tells."""


def tried(name: str, methods: Iterable[str] = tuple(camfn.METHODS)) -> Row:
    """All methods on an architecture."""
    case, places, cells = made(name), {}, {}
    for method in methods:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                card = camfn.explain(case.model, None, case.x, case.target, method=method, **OPTIONS.get(method, {}))
            except camfn.CamError as error:
                cells[method] = _mark(name, method, str(error))
                continue
            except Exception as error:
                raise FaultError(f"{name}, {method}: {error!r}") from error
        stray = [str(each.message) for each in said if not _EXPECTED.match(str(each.message))]
        _check(name, method, card, stray)
        cells[method] = MAP
        if "any size" not in camfn.METHODS[method].needs and len(card.layers) == 1:  # the map is on the grid of the layer
            places.setdefault((card.layers[0], card.grids[0]), []).append(method)
    if len({grid for _, grid in places}) > 1 or len(places) > 2:  # between blocks that norms read, and at the norm that follows
        raise FaultError(f"{name}: several layers were chosen, {places}")
    layer, grid = next((place for place, of in places.items() if "mean_cam" in of), next(iter(places), (NONE, ())))
    return Row(layer, " x ".join(map(str, grid)) or NONE, cells)


_EXPECTED = re.compile(r"layer=None: '.*' (was|were) chosen|fc=None: '.*' was found|the model's output for an input depends on")


def _mark(name: str, method: str, refusal: str) -> str:
    found = [mark for mark, (pattern, _) in REASONS.items() if re.search(pattern, refusal)]
    if len(found) != 1:
        raise FaultError(f"{name}, {method}: {refusal}")
    return found[0]


def _check(name: str, method: str, card: camfn.Explanation, stray: list[str]) -> None:
    """A map is finite and has more than one position, and what is said of it is not that the layer was the wrong one."""
    kinds = {finding.kind for finding in card.findings}
    wrong = {
        f"warns: {stray}": bool(stray),
        "the map is not finite": not bool(torch.isfinite(card.maps).all()),
        "the map has one position": any(torch.Size(grid).numel() < 2 for grid in card.grids),
        "no gradient reaches the layer": "no gradient" in kinds,
        "the map is flat": "flat map" in kinds and method not in _MAY_BE_FLAT,
    }
    if any(wrong.values()):
        raise FaultError(f"{name}, {method}: {', '.join(fault for fault, here in wrong.items() if here)}")


_MAY_BE_FLAT = ("fem", "group_cam", "poly_cam")
"""On a grid of 2 x 2 no value is two deviations above the mean. In a random network no group of channels may add to the blurred
picture, and a product over layers is zero where one of them says nothing."""

# --------------------------------------------------------------------------------------------------------- the page


def groups_of(rows: dict[str, Row]) -> list[tuple[str, ...]]:
    """Methods with the same mark for every architecture, in the order of the table."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in camfn.METHODS:
        found.setdefault(tuple(row.cells[method] for row in rows.values()), []).append(method)
    return [tuple(methods) for methods in found.values()]


def page(rows: dict[str, Row]) -> str:
    """The document."""
    groups = groups_of(rows)
    head = ["architecture", "layer", "grid", *(chr(65 + i) for i in range(len(groups)))]
    lines = [head, ["---"] * 3 + [":-:"] * len(groups)]
    for name, row in rows.items():
        layer = NONE if row.layer == NONE else f"`{row.layer}`"
        lines.append([name, layer, row.grid, *(row.cells[method] for method, *_ in groups)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    columns = "".join(f"- {chr(65 + i)}: {', '.join(f'`{m}`' for m in methods)}\n" for i, methods in enumerate(groups))
    marks = {cell for row in rows.values() for cell in row.cells.values()}
    reasons = "".join(f"- {mark}: {said}.\n" for mark, (_, said) in REASONS.items() if mark in marks)
    lowered = ", ".join(_call(method, options) for method, options in OPTIONS.items())
    libraries = ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)
    sizes = {"count": len(rows), "methods": len(camfn.METHODS)}
    parts = {"columns": columns, "table": table, "reasons": reasons, "lowered": lowered, "libraries": libraries}
    yolo = "".join(f"| {name} | `{layer}` |\n" for name, layer in YOLO.items())
    return PROSE.format(**parts, **sizes, headless=len(HEADLESS), kinds=", ".join(HEADLESS), yolo=yolo)


def _call(method: str, options: dict[str, Any]) -> str:
    return f"`{method}({', '.join(f'{key}={value}' for key, value in options.items())})`"


def _version(library: str) -> str:
    """Without what a build adds."""
    return version(library).partition("+")[0]


# ---------------------------------------------------------------------------------- the automatic layer, beside the table

HEADLESS: dict[str, tuple[str, int]] = {
    "ResNet": ("resnet18", 64),
    "MobileNetV2": ("mobilenetv2_100", 64),
    "EfficientNet": ("efficientnet_b0", 64),
    "RegNet": ("regnetx_002", 64),
    "VGG": ("vgg11", 64),
    "DenseNet": ("densenet121", 64),
    "ConvNeXt": ("convnext_atto", 64),
    "MobileViT": ("mobilevit_xxs", 256),
    "GhostNet": ("ghostnet_100", 64),
    "RepVGG": ("repvgg_a0", 64),
    "Mixer": ("mixer_s32_224", 224),
    "Swin": ("swin_tiny_patch4_window7_224", 224),
    "DeiT": ("deit_tiny_distilled_patch16_224", 224),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", 518),
    "XCiT": ("xcit_nano_12_p16_224", 224),
    "PoolFormer": ("poolformer_s12", 64),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", 256),
}
"""Networks of timm, with the side of their input, whose layer is the same with a classifier and without (`num_classes=0`)."""

YOLO = {
    **dict.fromkeys(("yolov8n", "yolov8n-seg", "yolov8n-pose"), "model.21"),
    "yolov8n-cls": "model.9.conv",
    **dict.fromkeys(("yolo11n", "yolo11n-seg", "yolo11n-pose"), "model.22"),
    "yolo11n-cls": "model.10.conv",
}
"""The layers of ultralytics' networks."""


def chosen(model: torch.nn.Module, side: int) -> list[str]:
    """The layer that `layer=None` chooses."""
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return [layer.name for layer in camfn.candidate_layers(model.eval(), x) if layer.chosen]


def with_and_without_classifier(kind: str) -> tuple[list[str], list[str]]:
    """The layers of a network of timm with a classifier, and of its twin without."""
    torchvision_models()
    import timm

    name, side = HEADLESS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [timm.create_model(name, **options) for options in ({}, {"num_classes": 0})]
    first, second = (chosen(model, side) for model in models)
    return first, second


def yolo(name: str) -> torch.nn.Module:
    """A network of ultralytics, with random weights."""
    from ultralytics.nn import tasks

    kinds = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}
    made = getattr(tasks, kinds.get(name.partition("-")[2], "DetectionModel"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made(f"{name}.yaml", verbose=False)


def check_automatic_layers() -> None:
    """Check the paragraph and the table of the page that need other libraries, or much time."""
    for kind in HEADLESS:
        first, second = with_and_without_classifier(kind)
        if first != second or not first:
            raise FaultError(f"{kind}: {first} with a classifier, {second} without")
    for name, layer in YOLO.items():
        if chosen(yolo(name), 128) != [layer]:
            raise FaultError(f"{name}: {chosen(yolo(name), 128)}")


LIBRARIES = ("torch", "torchvision", "timm", "transformers")

PROSE = """# What works on which architecture

This page shows which method works on which architecture: {count} networks, one of each kind, small and with random weights, and
{methods} methods. Every method was called with nothing but the model and an input, `camfn.explain(model, None, x, method=...)`.
camfn therefore chose the layer, and the target is the predicted class. Only detectors, segmentation models and image towers got
a target, because they predict no class. `python tests/compatibility.py --write` generates this page. This version is from
{libraries}.

Each column is a group of methods with the same result on every network:

{columns}
{table}
✓ means a map: it is finite, a gradient reaches the layer, and the only warning names the chosen layer, or says that the masked
inputs run one by one. A letter means a `camfn.CamError` that gives the reason:

{reasons}
`rise` and `full_grad` take no layer. Their maps, and those of `cameras`, have the size of the input. `poly_cam` takes the last
layer of each grid size, and its map is on the finest of these grids.
Maps of the attention methods are on the grid of the tokens.

`cam` uses a linear layer of matching widths. It does not notice if the network has more than average pooling between the two,
such as a class token or a norm.

Pass more arguments to get some of the refused maps: `layer=` for another layer, `fc=` for the linear layer, `factors=()` for
`cameras`. [Layers](layers.md#where-the-channels-are) says how to name a layout.

{headless} networks of timm get the same layer with their classifier and without it (`num_classes=0`): {kinds}.

In YOLO of ultralytics 8.4, the layer is the last stage of the neck, or the last one before the pooling of a classifier:

| network | layer |
| --- | --- |
{yolo}
`python tests/compatibility.py --layers` checks these two.

These options were lowered to save time: {lowered}.
"""


def main() -> None:
    torch.set_num_threads(1)
    if "--layers" in sys.argv[1:]:
        check_automatic_layers()
        return
    rows = {name: tried(name) for name in ARCHITECTURES}
    sys.stdout.write(page(rows))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
