"""How many masked inputs should a forward have on a CPU? The basis of the default chunk.

Runs `score_cam` eagerly on 64 channels, with folded batch norms and channels last, in chunks of 4 to 32 and in its default
chunk. The calls are interleaved, one of each per round. A time is given as its ratio to chunks of 32 within the round, median
over rounds.

    python benchmarks/chunk.py --out benchmarks/results/chunk.json        # ten minutes
    python benchmarks/chunk.py --models resnet18 --rounds 1               # a quick look

A forward whose activations do not fit the fast memory takes longer per input. A forward of few inputs reads all weights for
them, which matters if a network has many weights and small activations (ViT). The rule is `camfn.sweep.runner.chunk_of`.
"""

import argparse
import functools
from typing import Any

import common
import torch
from torch import Tensor, nn

import camfn

CASES = {  # layer, side of the input
    "resnet18": ("layer3", 224),
    "resnet18, 112 px": ("layer3", 112),
    "mobilenet_v2": ("features.18", 224),
    "resnet50": ("layer4", 224),
    "densenet121": ("features", 224),
    "convnext_tiny": ("features", 224),
    "swin_t": ("features", 224),
    "vgg16": ("features.29", 224),
    "vit_b_16": ("conv_proj", 224),
}
CHUNKS, CHANNELS = (4, 8, 16, 32), 64


def measure(name: str, rounds: int) -> dict[str, Any]:
    layer, size = CASES[name]
    torch.manual_seed(0)
    model = getattr(common.torchvision_models(), name.partition(",")[0])(weights=None).eval()
    x = torch.randn(1, 3, size, size)

    def first(activation: Tensor) -> Tensor:
        return (activation.movedim(-1, 1) if name == "swin_t" else activation)[:, :CHANNELS]

    call = functools.partial(camfn.score_cam, model, layer, x, 1, layout=first)
    sweeps = {str(chunk): camfn.Sweep(chunk=chunk, compile=False) for chunk in CHUNKS} | {"own": camfn.Sweep(compile=False)}
    own = chunk_of(model, functools.partial(call, sweep=sweeps["own"]))
    found = common.interleaved({name: functools.partial(call, sweep=sweep) for name, sweep in sweeps.items()}, rounds)
    ratios = {name: common.ratio(timing, found["32"]) for name, timing in found.items()}
    return {"own chunk": own, "seconds at 32": found["32"].median, "time over that of 32": ratios}


def chunk_of(model: nn.Module, call: Any) -> int:
    """The largest number of rows in a forward of the call. The call also serves as a warm-up."""
    rows = []
    with common.watched(model, lambda x: rows.append(len(x))):
        call()
    return max(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--out", metavar="FILE.json", help="where to write the record")
    options = parser.parse_args()
    found = {name: measure(name, options.rounds) for name in options.models}
    rows = [
        [name, str(of["own chunk"]), f"{of['seconds at 32']:.2f}", *(f"{r:.2f}" for r in of["time over that of 32"].values())]
        for name, of in found.items()
    ]
    print(common.table(["", "own chunk", "seconds at 32", *map(str, CHUNKS), "own"], rows))
    if options.out:
        where = common.environment(["torchvision", "camfn"])
        common.write(options.out, {"question": __doc__.splitlines()[0], "environment": where, "models": found})


if __name__ == "__main__":
    main()
