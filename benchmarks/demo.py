"""Does the demo network recognize its shapes, and do the maps lie on them? Scenes of one object, not used for training.

A hit is a map whose maximum is on the object or within one cell (8 pixels) of it. The controls are the middle of the picture,
a map of random numbers, and Score-CAM on the same network with random weights.

    python benchmarks/demo.py --out benchmarks/results/demo.json
"""

import argparse
from collections.abc import Sequence

import common
import torch
from torch import Tensor

import camfn
from camfn import demo, metrics
from camfn.cli.demo import FITTING
from camfn.demo.train import FIRST, accuracy

CELL = 8


def maps_of(method: str, model: torch.nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    function, of_layer = camfn.METHODS[method].function, camfn.METHODS[method].of_layer
    layer, options = "features" if of_layer else None, {"fc": "classify", "relu": True} if method == "cam" else {}
    return torch.cat([function(model, layer, a, b, **options) for a, b in zip(x.split(50), classes.split(50))])


def measure(methods: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    """The hits and the mean energy inside the object of each map, in percent."""
    scenes = [demo.scene(seed) for seed in range(count)]
    x, masks = torch.stack([demo.preprocess(s.image) for s in scenes]), torch.stack([s.masks[0] for s in scenes])
    classes = torch.tensor([s.classes[0] for s in scenes])
    middle = torch.zeros(count, demo.SIDE, demo.SIDE)
    middle[:, demo.SIDE // 2 - 1 : demo.SIDE // 2 + 1, demo.SIDE // 2 - 1 : demo.SIDE // 2 + 1] = 1
    maps = {
        "middle of the picture": middle,
        "random numbers": torch.rand(count, 12, 12, generator=torch.Generator().manual_seed(0)),
        "score_cam, untrained network": maps_of("score_cam", demo.network(pretrained=False), x, classes),
        **{method: maps_of(method, demo.network(), x, classes) for method in methods},
    }
    return {
        name: {
            "hits": 100 * float(metrics.pointing_game(map, masks, tolerance=CELL).mean()),
            "energy inside": 100 * float(metrics.energy_pointing_game(map, masks).mean()),
        }
        for name, map in maps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=common.positive, default=200)
    parser.add_argument("--methods", nargs="+", default=list(FITTING), choices=list(FITTING))
    parser.add_argument("--out", help="write the figures to this file")
    options = parser.parse_args()
    known = accuracy(demo.network(), range(1000))
    centre = sum(bool(demo.scene(seed).masks[0, demo.SIDE // 2, demo.SIDE // 2]) for seed in range(1000)) / 1000
    found = measure(options.methods, options.scenes)
    print(f"accuracy on 1000 scenes: {known:.1%}; the middle of the picture is in the object in {centre:.1%} of them\n")
    print(
        common.table(
            ["map", "hits", "energy inside"],
            [[name, *(f"{value:.1f} %" for value in row.values())] for name, row in found.items()],
        )
    )
    if options.out:
        record = {"question": "Do the maps lie on the objects?", "scenes": options.scenes, "first seed trained on": FIRST}
        record |= {"accuracy": known, "middle in the object": centre, "unit of maps": "percent", "maps": found}
        common.write(options.out, {**record, "environment": common.environment(["camfn"])})


if __name__ == "__main__":
    main()
