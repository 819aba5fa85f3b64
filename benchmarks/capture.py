"""What does a tap cost, with and without a gradient, and what does Score-CAM cost on top of its forwards?

Times are medians of interleaved rounds, in milliseconds. Every plain call of camfn makes a private copy; the bound is 5 ms for
a ResNet-50. `head backward` is the plain forward with a graph that starts at the layer, and its backward, with a hook in plain
torch. The last figure uses a network so small that its forwards take almost no time: `score_cam` minus the same number of
forwards of the same rows.

    python benchmarks/capture.py --out benchmarks/results/capture.json
"""

import argparse
import copy
from typing import Any

import common
import torch
from torch import nn

import camfn
from camfn.model.forward import look_with_gradients
from camfn.model.gradients import each_target
from camfn.model.prepare import opened
from camfn.targets import resolve

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
        "private_copy": lambda: opened(model).borrow(),
        "tap": lambda: camfn.tap(model, layer),
        "deepcopy": lambda: copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}),
        "forward": lambda: model(x),
        "tap and forward": lambda: camfn.tap(model, layer)(state, x),
        "forward and head backward": lambda: by_hand(model, layer, x),
        "capture with gradient": lambda: captured(model, layer, x),
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        found = common.interleaved(calls, rounds)
    times: dict[str, float] = {call: 1e3 * timing.median for call, timing in found.items()}
    times["gradient, ratio"] = common.ratio(found["capture with gradient"], found["forward and head backward"])
    return times


def by_hand(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """Plain torch: the parameters need no gradients, and the graph starts at the layer's output."""
    leaves = []

    def leaf(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1].clone()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handle = model.get_submodule(layer).register_forward_hook(leaf)
    with torch.enable_grad():
        model(x)[0, 1].backward()
    handle.remove()
    return leaves[0].grad


def captured(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    forward, pullback = look_with_gradients(model, layer, x, None, masks=True)
    return each_target(pullback.gradients, forward.output, resolve(1, forward.output, 1, x.device))[0][layer]


def overhead(rounds: int) -> float:
    """Milliseconds of `score_cam` on a tiny network, minus its forwards, in a row: single calls meet cold caches."""
    row = range(50)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x, rows = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 16, 16)
    calls = {
        "score_cam": lambda: [camfn.score_cam(model, "1", x, 1) for _ in row],
        "forwards": lambda: [(model(x), model(rows)) for _ in row],
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        found = common.interleaved(calls, rounds)
    return 1e3 * (found["score_cam"].median - found["forwards"].median) / len(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=common.positive, default=15)
    parser.add_argument("--out", help="write the figures to this file")
    options = parser.parse_args()
    results = {name: measure(name, layer, options.rounds) for name, layer in MODELS.items()}
    tiny = overhead(options.rounds)
    columns = ["milliseconds", *next(iter(results.values()))]
    print(common.table(columns, [[name, *(f"{ms:.2f}" for ms in row.values())] for name, row in results.items()]))
    print(f"score_cam on a tiny network, over its forwards: {tiny:.2f}")
    if options.out:
        where = common.environment(["camfn", "torchvision"])
        record = {"question": __doc__.splitlines()[0], "milliseconds": results, "overhead": tiny, "environment": where}
        common.write(options.out, record)


if __name__ == "__main__":
    main()
