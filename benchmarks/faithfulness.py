"""What are the maps worth? All methods and controls, on drawn scenes with exact masks and on photos.

- `pairs`: scenes of two objects. The first is explained; the other shows whether a map knows its class.
- `slow`: the same for methods that need hundreds of forward passes and more, on fewer scenes.
- `grids`: four scenes of different classes in one input: the share of the energy in the cell of the class, .25 by chance.
- `apart`: the same grids, where only one cell can have caused a logit (DiFull).
- `removals`: each object is removed in turn: the correlation of the score's drop with the share of the map on it.
- the trained networks and photos of the folder in CAMFN_REAL (`tests/oracles/libraries.py` describes its `load.py`): metrics
  that need no boxes; on the large networks, of methods that take no sweep over the channels. Without the folder they are left
  out.

    CAMFN_REAL=FOLDER python benchmarks/faithfulness.py --out benchmarks/results/faithfulness.json --page docs/results.md
    python benchmarks/faithfulness.py --parts pairs --scenes 8                  # a quick look
"""

import argparse
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import results_page
import torch
from torch import Tensor, nn

import camfn
from camfn import demo, metrics
from camfn.evaluation import Evaluation, scenes
from camfn.evaluation.statistics import interval
from camfn.explanation.explain import takes
from camfn.methods.registry import method_of
from camfn.metrics.controls import CONTROL_METHODS, CONTROLS

LAYER, LINEAR = "features", "classify"
FITTING = tuple(name for name, row in camfn.METHODS.items() if "attention" not in row.needs)
SLOW = ("ss_cam", "is_cam", "rise", "opti_cam", "score_cam_pp", "smooth_grad_cam_pp", "cameras")
FAST = tuple(name for name in FITTING if name not in (*SLOW, *CONTROL_METHODS))
LIGHT = (
    *("cam", "grad_cam", "grad_cam_pp", "hires_cam", "xgrad_cam", "layer_cam", "grad_cam_elementwise", "eigen_grad_cam"),
    *("seg_eigen_cam", "full_grad", "recipro_cam", "fem", "eigen_cam"),
)
ATTENTIVE = tuple(name for name, row in camfn.METHODS.items() if "attention" in row.needs)
EXTRA = ("insertion_difference", "max_box_acc", "iou")
NETWORKS = {"cifar10_resnet20": "layer3", "mobilenet_v2": "features.18", "darknet_tiny": "features", "deit_tiny": None}
"""The trained networks, and the layer of each: a small CNN, a CNN, a leaky CNN and a ViT, whose layer each method chooses."""


def on_pairs(count: int, methods: Sequence[str]) -> Evaluation:
    wanted = [name for name, each in camfn.evaluation.MEASURES.items() if each.default or name in EXTRA]
    own = {"fc": LINEAR} if any(takes(method_of(method), "fc") for method in methods) else {}
    batches = scenes(count, batch=20)
    return camfn.evaluate(demo.network(), LAYER, batches, methods=methods, metrics=wanted, progress=progress(), **own)


def progress() -> Any:
    start = time.monotonic()
    return lambda name: common.say(f"{time.monotonic() - start:6.0f} s: {name}")


def raw(method: str, model: nn.Module, x: Tensor, classes: Tensor, *, layer: str = LAYER, fc: str | None = LINEAR) -> Tensor:
    """Raw, signed maps `(n, t, *grid)` of a method or a control."""
    if method in CONTROLS:
        return CONTROLS[method](x, (12, 12), 0)[:, None].expand(-1, classes.shape[1], -1, -1)
    given: dict[str, Any] = {"relu": False, "normalize": False, "fc": fc}
    known = {name: value for name, value in given.items() if takes(method_of(method), name)}
    card = camfn.explain(model, layer, x, classes, method=method, **known)
    return card.maps.detach()


def grids_of_scenes(count: int) -> tuple[Tensor, Tensor]:
    """Four scenes of one object each, of different classes that the network is right about: `(n, 4, c, h, w)` and `(n, 4)`."""
    model, found, singles = demo.network(), [], []
    for seed in itertools.count(2000):
        scene = demo.scene(seed)
        x = demo.preprocess(scene.image)
        with torch.no_grad():
            sure = float(model(x[None]).softmax(1)[0, scene.classes[0]]) > 0.9
        if sure and scene.classes[0] not in [each[1] for each in singles]:
            singles.append((x, scene.classes[0]))
        if len(singles) == 4:
            found.append(singles)
            singles = []
        if len(found) == count:
            break
    x = torch.stack([torch.stack([each[0] for each in four]) for four in found])
    return x, torch.tensor([[each[1] for each in four] for four in found])


def on_grids(count: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    inputs, classes = grids_of_scenes(count)
    x, model = metrics.grid_of(inputs), demo.network()
    return [in_cells(method, raw(method, model, x, classes), "cell_energy") for method in methods]


def on_cells_apart(count: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Of the methods that explain any layer: `full_grad` explains none, and `cam` needs a linear head of all logits."""
    inputs, classes = grids_of_scenes(count)
    x, network = metrics.grid_of(inputs), demo.network()
    model = metrics.DiFull(network[:3], network[3:])
    targets = classes + len(demo.CLASSES) * torch.arange(4)
    fitting = [method for method in methods if method not in ("cam", "full_grad")]
    return [in_cells(each, raw(each, model, x, targets, layer="grid", fc=None), "cell_energy_apart") for each in fitting]


def in_cells(method: str, maps: Tensor, metric: str) -> dict[str, Any]:
    """The share of each map's energy in the cell of its class."""
    share = metrics.grid_pointing_game(maps, torch.arange(4).expand(len(maps), 4)).nanmean(1)
    common.say(f"{metric}: {method}")
    return {"method": method, "metric": metric, **interval(share)._asdict()}


def on_removals(count: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The correlation over all pairs of a target and an object, and its interval over resampled scenes."""
    model, drawn = demo.network(), [demo.interventions(seed) for seed in range(3000, 3000 + count)]
    x, classes = torch.stack([demo.preprocess(each.image) for each in drawn]), torch.tensor([each.classes for each in drawn])
    drops = torch.stack([_drops(model, each) for each in drawn])  # (n, targets, objects)
    masks, records = torch.stack([each.masks for each in drawn]), []
    for method in methods:
        shares = metrics.object_energy(raw(method, model, x, classes), masks)
        resampled = torch.randint(count, (500, count), generator=torch.Generator().manual_seed(0))
        each = torch.stack([_pooled(shares[rows], drops[rows]) for rows in resampled])
        low, high = each.nanquantile(torch.tensor([0.025, 0.975], dtype=each.dtype)).tolist()
        own = {"mean": float(_pooled(shares, drops)), "low": low, "high": high, "n": count}
        records.append({"method": method, "metric": "single_deletion", **own})
        held = metrics.target_sensitivity(shares, drops)
        records.append({"method": method, "metric": "target_sensitivity", **interval(held)._asdict()})
        common.say(f"removals: {method}")
    return records


CLASSES = {"grids": on_grids, "apart": on_cells_apart, "removals": on_removals}
"""The parts that need more than an image, a class and a mask."""


def _pooled(shares: Tensor, drops: Tensor) -> Tensor:
    known = ~shares.isnan()
    return metrics.single_deletion(shares[known], drops[known])


def _drops(model: nn.Module, of: Any) -> Tensor:
    with torch.no_grad():
        scores = model(demo.preprocess(of.without))[:, list(of.classes)]
    return torch.stack([scores[0] - scores[1], scores[0] - scores[2]], -1)


def load(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_photos(folder: Path, name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A trained network, and batches of the photos that it was trained for."""
    from PIL import Image

    model, preprocess, classes = load(folder).MODELS[name]()
    labels = json.loads((folder / "images" / "labels.json").read_text())
    kind = "cifar10_png" if len(classes) == 10 else "imagenet_foolbox"
    paths, batches = sorted(path for path in labels if path.startswith(kind)), []
    for start in range(0, len(paths), 10):
        some = paths[start : start + 10]
        x = torch.stack([preprocess(Image.open(folder / "images" / path).convert("RGB")) for path in some])
        batches.append({"x": x, "target": torch.tensor([labels[path]["label"] for path in some])})
    return model, batches


def on_photos(folder: Path, name: str) -> Evaluation:
    model, batches = of_photos(folder, name)
    small = name.startswith("cifar10")
    methods = [each for each in FAST if small or each in LIGHT] + (list(ATTENTIVE) if name == "deit_tiny" else [])
    wanted = ["other_class", "permuted_classifier", "deletion", "deletion_difference", "average_drop", "gini"]
    return camfn.evaluate(model, NETWORKS[name], batches, methods=methods, metrics=wanted, progress=progress())


def told(found: Evaluation) -> dict[str, Any]:
    curves = {
        name: {"fractions": curve.fractions.tolist(), "scores": curve.scores[0].tolist()}
        for name, curve in found.curves.items()
    }
    records = [{key: value for key, value in record.items() if key != "better"} for record in found.records()]
    return {"records": records, "curves": curves, "skipped": dict(found.skipped)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=common.positive, default=60)
    parser.add_argument("--slow-scenes", type=common.positive, default=16)
    parser.add_argument("--grids", type=common.positive, default=20)
    parser.add_argument("--parts", nargs="+", default=["pairs", "grids", "apart", "removals", "slow", *NETWORKS])
    parser.add_argument(
        "--out", metavar="FILE.json", help="where to write the record; parts that it has and that are not asked stay"
    )
    parser.add_argument("--page", metavar="FILE.md", help="where to write the page and its pictures")
    options = parser.parse_args()
    folder = os.environ.get("CAMFN_REAL")
    before = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {"parts": {}}
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": common.environment(["timm", "torchvision"]),
        "arguments": {"scenes": options.scenes, "slow_scenes": options.slow_scenes, "grids": options.grids},
        "parts": before["parts"],
    }
    every = (*FAST, *CONTROL_METHODS, *CONTROLS)
    for part in options.parts:
        if part in NETWORKS and folder is None:
            print(f"{part}: CAMFN_REAL names no folder of trained networks, so it is left out")
            continue
        if part in CLASSES:
            count = options.scenes if part == "removals" else options.grids
            record["parts"][part] = {"records": CLASSES[part](count, every)}
        elif part in NETWORKS:
            record["parts"][part] = told(on_photos(Path(folder or ""), part))
        else:
            count, methods = (options.scenes, FAST) if part == "pairs" else (options.slow_scenes, SLOW)
            found = on_pairs(count, methods)
            record["parts"][part] = told(found)
            print(found.markdown())
        if options.out:
            common.write(options.out, record)
    if options.page:
        results_page.write(record, Path(options.page))


if __name__ == "__main__":
    main()
