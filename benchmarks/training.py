"""What does a map in the loss cost, compared with the same training step without it?

    python benchmarks/training.py --out benchmarks/results/training.json      # one minute

The network is torchvision's ResNet-18 with seeded random weights, on 4 images of 32 pixels. A step computes the loss, its
gradient for all parameters, and no update. Without the map, the loss is the cross-entropy. With it, the loss also has the mean
square of a map at `layer2`, which has 128 channels. The steps are interleaved, and ratios are medians of those within a round.
"""

import argparse
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn

import camfn

LAYER, IMAGES, SIDE = "layer2", 4, 32
METHODS = ("grad_cam", "score_cam")


def steps(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """A training step without a map, and one for each method."""
    x, y = torch.randn(IMAGES, 3, SIDE, SIDE), torch.arange(IMAGES)
    state = {**camfn.state_of(model), **camfn.parameters_of(model)}

    def step(method: str | None) -> None:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if method is not None:
            loss = loss + camfn.METHODS[method].function(model, LAYER, x, y, state=state).square().mean()
        loss.backward()

    return {name or "without": (lambda name=name: step(name)) for name in (None, *METHODS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--out", help="write the record to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    calls = steps(common.torchvision_models().resnet18().eval())
    calls["without"]()
    calls["grad_cam"]()
    timings = common.interleaved(calls, options.rounds)
    record = {
        "question": __doc__.splitlines()[0],
        "environment": common.environment(["torchvision", "camfn"]),
        "network": {"model": "resnet18", "layer": LAYER, "images": IMAGES, "side": SIDE},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratios": {name: common.ratio(timings[name], timings["without"]) for name in METHODS},
        "share of its threads": common.share_of_threads(timings.values()),
    }
    print(common.table(["step", "times as long"], [[name, f"{value:.1f}"] for name, value in record["ratios"].items()]))
    if options.out:
        common.write(options.out, record)


if __name__ == "__main__":
    main()
