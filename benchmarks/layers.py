"""Where does each method mean something on a pre-norm vision transformer? `python benchmarks/layers.py --out FILE`.

Each method is run at the layer that `layer=None` takes for Grad-CAM, at the norm after it, and at other places. Two
transformers of `benchmarks/train_vits.py` choose, the third judges, with the DeiT-tiny of a folder of trained networks, if
CAMFN_REAL names one.

The measures do not reward maps of no class:

* `energy`: on scenes of two objects, the share of the map's energy on both that lies on the object of the class
* `cell`: on 2 x 2 grids of windows of other classes, the share of energy in the cell of the class; .25 by chance
* `auc`: the pixel AUC of the object of the class, on the scenes
* `other`: the rank correlation with the map of the other class, lower is better

Maps are raw, and rectified for energies. A map that is nowhere positive has the energy of chance.

`photos` is DeiT too, with metrics of `camfn.evaluate` on whole photos at the two places between which to choose.
"""

import argparse
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faithfulness
import torch
import train_vits
from torch import Tensor, nn

import camfn
from camfn import demo
from camfn.evaluation.statistics import Interval, difference, interval

GRADED = ("grad_cam", "grad_cam_pp", "xgrad_cam", "hires_cam", "layer_cam", "grad_cam_elementwise", "shapley_cam")
EIGEN = ("eigen_grad_cam", "seg_eigen_cam", "eigen_cam", "kpca_cam", "mean_cam", "fem", "random_cam")
SWEPT = ("ablation_cam", "recipro_cam", "score_cam", "group_cam")
OPTIONS: dict[str, dict[str, Any]] = {"recipro_cam": {"window": "gaussian"}}
DEIT = ("blocks.10", "blocks.11.norm1")
PHOTOS = ("other_class", "permuted_classifier", "deletion", "deletion_difference")
FIRST = 5000
"""The first seed of the scenes, on which no network was trained."""


class Samples(NamedTuple):
    """Inputs of one network, and the classes that are asked for."""

    scenes: Tensor  # (n, 3, h, w)
    masks: Tensor | None  # (n, 2, h, w)
    classes: Tensor  # (n, 2)
    grids: Tensor  # (m, 3, h, w)
    cells: Tensor  # (m, 4): the class in each cell

    def first(self, count: int) -> "Samples":
        """Some of the samples."""
        return Samples(*(None if each is None else each[:count] for each in self))


# ------------------------------------------------------------------------------------------------------------ samples


def of_scenes(model: nn.Module, count: int) -> Samples:
    """Scenes of two objects that are both among the network's first three classes, and grids of windows it is right about."""
    pairs, seed = [], FIRST
    while len(pairs) < count:
        scene = demo.scene(seed, 2)
        seed += 1
        with torch.no_grad():
            best = model(demo.preprocess(scene.image)[None])[0].topk(3).indices.tolist()
        if set(scene.classes) <= set(best):
            pairs.append(scene)
    windows: dict[int, list[Tensor]] = {c: [] for c in range(len(demo.CLASSES))}
    for number in range(6 * count):
        scene = demo.scene(2 * FIRST + number)
        y, x = scene.masks[0].nonzero().float().mean(0).sub(24).round().long().clamp(0, 48).tolist()
        windows[scene.classes[0]].append(demo.preprocess(scene.image)[:, y : y + 48, x : x + 48])
    draw, grids, cells = random.Random(0), [], []
    while len(grids) < count:
        four = draw.sample(sorted(windows), 4)
        one, two, three, last = (draw.choice(windows[c]) for c in four)
        grids.append(torch.cat([torch.cat([one, two], 2), torch.cat([three, last], 2)], 1))
        cells.append(four)
    x, masks = (torch.stack([part(s) for s in pairs]) for part in (lambda s: demo.preprocess(s.image), lambda s: s.masks))
    return Samples(x, masks, torch.tensor([s.classes for s in pairs]), torch.stack(grids), torch.tensor(cells))


def of_photos(folder: Path, count: int) -> tuple[nn.Module, Samples]:
    """DeiT-tiny, and grids of photos that it knows, at half their size. Without boxes there are no masks."""
    from PIL import Image

    model, preprocess, _ = faithfulness.load(folder).MODELS["deit_tiny"]()
    labels = json.loads((folder / "images" / "labels.json").read_text())
    paths = sorted(path for path in labels if path.startswith("imagenet"))
    x = torch.stack([preprocess(Image.open(folder / "images" / path).convert("RGB")) for path in paths])
    truth = torch.tensor([labels[path]["label"] for path in paths])
    with torch.no_grad():
        known = (model(x).argmax(1) == truth).nonzero()[:, 0].tolist()
    small, draw, picked = nn.functional.interpolate(x, scale_factor=0.5, mode="area"), random.Random(0), []
    while len(picked) < count:
        four = draw.sample(known, 4)
        if len(set(truth[four].tolist())) == 4:
            picked.append(four)
    grids = torch.stack(
        [torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1) for a, b, c, d in (small[p] for p in picked)]
    )
    cells = torch.stack([truth[p] for p in picked])
    return model, Samples(grids, None, cells[:, :2], grids, cells)


# ----------------------------------------------------------------------------------------------------------- measures


def share(parts: Tensor, own: Tensor) -> Tensor:
    """The share of the own part; that of chance where all are zero."""
    total = parts.sum(-1)
    return torch.where(total > 0, own / torch.where(total > 0, total, 1), 1 / parts.shape[-1])


def measured(maps: Tensor, cells: Tensor, found: Samples) -> dict[str, Tensor]:
    """The measures of each scene and each grid, from raw maps `(n, 2, *grid)` and `(m, 4, *grid)`."""
    values = {"other": camfn.metrics.rank_correlation(maps[:, 0], maps[:, 1])}
    half = cells.shape[-1] // 2
    rows = cells.clamp(min=0).unflatten(-1, (2, half)).unflatten(-3, (2, half)).sum((-1, -3)).flatten(2)  # (m, 4, 4)
    values["cell"] = share(rows, rows.diagonal(dim1=1, dim2=2)).mean(1)
    if found.masks is not None:
        size = found.masks.shape[-2:]
        pixels = camfn.maps.resize(maps, size)
        energy = pixels.flatten(2).clamp(min=0).double() @ found.masks.flatten(2).double().mT
        values["energy"] = share(energy, energy.diagonal(dim1=1, dim2=2)).mean(1)
        values["auc"] = camfn.metrics.pixel_auc(pixels, found.masks).mean(1)
    return values


def run(model: nn.Module, found: Samples, method: str, layers: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The measures of a method at each layer; nothing at a layer that it refuses."""
    own = {"relu": False, "normalize": False, "layout": camfn.layouts.tokens(prefix=1), **OPTIONS.get(method, {})}
    results = {}
    groups = [list(layers)] if method in (*GRADED, *EIGEN) else [[layer] for layer in layers]
    for names in groups:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked = ((found.scenes, found.classes), (found.grids, found.cells))
                maps = [getattr(camfn, method)(model, names, x, target, **own) for x, target in asked]
        except camfn.CamError as error:
            print(f"    {method} at {names}: {str(error)[:100]}", flush=True)
            continue
        results |= {name: measured(*pair, found) for name, *pair in zip(names, *maps)}
    return results


def on_photos(model: nn.Module, batches: Sequence[Any], method: str) -> dict[str, dict[str, Tensor]]:
    """The metrics of a method on whole photos, at DeiT's last block but one and the norm after it."""
    own = {"methods": [method], "metrics": PHOTOS, "controls": False, "layout": camfn.layouts.tokens(prefix=1)}
    return {layer: dict(camfn.evaluate(model, layer, batches, **own).values[method]) for layer in DEIT}


def compared(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, list[float]]:
    """By measure, the mean difference `other - one`, with its paired interval."""
    return {name: rounded(difference(other[name], one[name])) for name in one}


def rounded(found: Interval) -> list[float]:
    """A mean and its interval."""
    return [round(each, 4) for each in found[:3]]


def main() -> None:
    """Run the methods on the networks, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=[*train_vits.PLANS, "deit", "photos"])
    parser.add_argument("--methods", nargs="+", default=[*GRADED, *EIGEN, *SWEPT])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    for name in asked.networks:
        start = time.perf_counter()
        folder = os.environ.get("CAMFN_REAL")
        if folder is None and name in ("deit", "photos"):
            print(f"{name}: CAMFN_REAL names no folder of trained networks, so it is left out")
            continue
        own = record[name] = of_network(name, Path(folder or ""), asked.methods, asked.samples)
        own["seconds"] = round(time.perf_counter() - start)
        if asked.out:
            asked.out.write_text(json.dumps(record, indent=1) + "\n")


def of_network(name: str, folder: Path, methods: Sequence[str], samples: int) -> dict[str, Any]:
    """The part of the record about one network."""
    if name == "photos":
        given = faithfulness.of_photos(folder, "deit_tiny")
        rows = {method: told(name, method, on_photos(*given, method), *DEIT) for method in methods}
        return {"block": DEIT[0], "norm": DEIT[1], "methods": rows}
    model = train_vits.load(name) if name != "deit" else None
    model, found = of_photos(folder, samples) if model is None else (model, of_scenes(model, samples))
    depth = len(model.get_submodule("blocks")._modules)
    block, norm = f"blocks.{depth - 2}", f"blocks.{depth - 1}.norm1"
    layers = [block, norm, f"blocks.{depth - 3}", f"blocks.{depth - 2}.norm1"]
    rows = {}
    for method in methods:
        few = method in SWEPT  # many forward passes: half of the samples, at the two places between which to choose
        results = run(model, found.first(samples // 2) if few else found, method, layers[: 2 if few else None])
        rows[method] = told(name, method, results, block, norm)
    return {"block": block, "norm": norm, "samples": samples, "methods": rows}


def told(name: str, method: str, results: dict[str, dict[str, Tensor]], block: str, norm: str) -> dict[str, Any]:
    """Means with intervals at each layer, and the paired differences of norm and block."""
    row: dict[str, Any] = {
        layer: {key: rounded(interval(value)) for key, value in each.items()} for layer, each in results.items()
    }
    for layer, each in row.items():
        print(
            f"{name:8} {method:22} {layer:16} {'  '.join(f'{key} {value[0]:.2f}' for key, value in each.items())}", flush=True
        )
    if block in results and norm in results:
        row["norm less block"] = compared(results[block], results[norm])
    return row


if __name__ == "__main__":
    main()
