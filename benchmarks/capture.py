"""What does a tap cost? A shell, a tap, and a tapped forward, beside `copy.deepcopy` and the plain forward.

Medians of interleaved rounds, in milliseconds. A shell is made anew in every call of camfn; its bound is 5 ms for a
ResNet-50.

    python benchmarks/capture.py --out benchmarks/results/capture.json
"""

import argparse
import copy

import common
import torch

import camfn
from camfn.shell import shell_of

MODELS = {
    "resnet18": "layer4",
    "resnet50": "layer4",
    "vgg16": "features.29",
    "mobilenet_v2": "features.18",
    "vit_b_16": "encoder.layers.encoder_layer_10",
}


def measure(name: str, layer: str, rounds: int) -> dict[str, float]:
    model = getattr(common.torchvision_models(), name)().eval()
    x, state = torch.randn(1, 3, 224, 224), camfn.state_of(model)
    calls = {
        "shell": lambda: shell_of(model),
        "tap": lambda: camfn.tap(model, layer),
        "deepcopy": lambda: copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}),
        "forward": lambda: model(x),
        "tap and forward": lambda: camfn.tap(model, layer)(state, x),
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        return {call: 1e3 * timing.median for call, timing in common.interleaved(calls, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.positive, default=15)
    parser.add_argument("--out", help="write the figures to this file")
    options = parser.parse_args()
    results = {name: measure(name, layer, options.rounds) for name, layer in MODELS.items()}
    columns = ["milliseconds", *next(iter(results.values()))]
    print(common.table(columns, [[name, *(f"{ms:.2f}" for ms in row.values())] for name, row in results.items()]))
    if options.out:
        where = common.environment(["camfn", "torchvision"])
        common.write(options.out, {"question": "What does a tap cost?", "milliseconds": results, "environment": where})


if __name__ == "__main__":
    main()
