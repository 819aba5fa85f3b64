"""How fast are the methods other than Score-CAM, compared with each other and with peers?

    python benchmarks/family.py                                  # every part, a few minutes
    python benchmarks/family.py recipro --rounds 3               # one part

Each part runs its calls in turn, one of each per round. Ratios are medians of the ratios within a round. Most calls run once
untimed before. Networks have seeded random weights; times do not depend on their values.

* `ablation`: Ablation-CAM on VGG-16's last convolution after the ReLU, 512 channels. pytorch-grad-cam runs the whole network
  for each channel, which takes minutes. Its time is extrapolated from the first `--channels` channels, two chunks of 32 by
  default. camfn skips channels that are zero; here none is, because the last bias is raised. The weights are not compared:
  pytorch-grad-cam sets a channel without zeros far below its smallest value. The tests compare the cases where it is correct.
* `recipro`: Recipro-CAM and Grad-CAM on ResNet-50's `layer4` with 49 positions, warm and cold. A cold call gets a fresh copy
  of the model.
* `gradient`: Grad-CAM and related methods at `layer4` of ResNet-18 and ResNet-50. They are compared with a forward and a
  backward from the score to the layer in plain torch (`by_hand` in `capture.py`), and with torchcam, whose hooks are already
  in place. The plain call and each extractor of torchcam have their own copies of the model.
* `eigen`: Eigen-CAM on ResNet-50's `layer4` with 2048 channels, compared with pytorch-grad-cam: the whole call, and the part
  after the forward, which both share. Both subtract the mean of each channel.
* `shared`: five gradient methods in one call of `camfn.explain`, compared with five calls.
"""

import os

os.environ["TQDM_DISABLE"] = "1"  # hide pytorch-grad-cam's progress bar; tqdm reads this at import

import argparse
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from capture import by_hand
from torch import Tensor, nn

import camfn
from camfn import maps
from camfn.formulas import components

CHUNK = 32  # pytorch-grad-cam's default
TORCHCAMS = {"grad_cam": "GradCAM", "grad_cam_pp": "GradCAMpp", "xgrad_cam": "XGradCAM", "layer_cam": "LayerCAM"}
KIN = (*TORCHCAMS, "hires_cam")


class Part(NamedTuple):
    """The measurements of a part."""

    rows: dict[str, float]  # seconds of each call, median over rounds
    ratios: dict[str, float]
    told: dict[str, Any]


def ablation(options: argparse.Namespace) -> Part:
    case = common.Case("ablation_cam", "vgg16", "features.29", chunk=CHUNK)
    model, x = common.model_and_input(case)
    with torch.no_grad():
        model.features[28].bias += 10
    seen = _seen(model, case.layer, x)
    card = camfn.explain(model, case.layer, x, 1, method="ablation_cam")
    theirs = functools.partial(_their_ablation, model, x, seen[:, : options.channels])
    calls = {
        "camfn": lambda: camfn.ablation_cam(model, case.layer, x, 1),
        f"pytorch-grad-cam, {options.channels} channels": theirs,
    }
    found = common.interleaved(calls, options.rounds)
    mine, part = found.values()
    channels = seen.shape[1]
    # It runs one forward of the whole input in addition to one per channel.
    share = (channels + 1) / (options.channels + 1)
    seconds = {"camfn": mine.median, "pytorch-grad-cam, estimated": part.median * share}
    ratio = share * common.ratio(part, mine)
    told = {
        "channels": channels,
        "channels of pytorch-grad-cam's that were timed": options.channels,
        "activations through the head": card.heads,
    }
    return Part(seconds, {"pytorch-grad-cam's time over camfn's": ratio}, told)


def _seen(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return camfn.tap(model, layer)(camfn.state_of(model), x)[1]


def _their_ablation(model: nn.Module, x: Tensor, activation: Tensor) -> Tensor:
    """pytorch-grad-cam's weights of the given channels, the first of the layer."""
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    twin = copy.copy(model)
    with AblationCAM(twin, [twin.features[29]], batch_size=CHUNK) as cam:
        found = cam.get_cam_weights(x, twin.features[29], [ClassifierOutputTarget(1)], activation.numpy(), None)
    return torch.as_tensor(found).flatten()


def recipro(options: argparse.Namespace) -> Part:
    model, x = common.model_and_input(common.Case("recipro_cam", "resnet50", "layer4"))
    names = ("grad_cam", "recipro_cam")
    calls = {f"{name}, warm": functools.partial(camfn.METHODS[name].function, model, "layer4", x, 1) for name in names}
    for call in calls.values():
        call()
    copies = {name: iter([copy.deepcopy(model) for _ in range(options.rounds)]) for name in names}

    def cold(name: str) -> None:
        camfn.METHODS[name].function(next(copies[name]), "layer4", x, 1)

    calls |= {f"{name}, cold": functools.partial(cold, name) for name in names}
    found = common.interleaved(calls, options.rounds)
    ratios = {when: common.ratio(found[f"recipro_cam, {when}"], found[f"grad_cam, {when}"]) for when in ("warm", "cold")}
    return Part(
        {name: timing.median for name, timing in found.items()},
        {f"Recipro-CAM's time over Grad-CAM's, {when}": ratio for when, ratio in ratios.items()},
        {"positions": 49},
    )


def gradient(options: argparse.Namespace) -> Part:
    common.require({"torchcam": "torchcam"})
    parts = [_kin(name, options.rounds) for name in ("resnet18", "resnet50")]
    rows, ratios, differences = ({key: value for part in parts for key, value in part[i].items()} for i in range(3))
    return Part(rows, ratios, {"largest difference of a map from torchcam's": differences})


def _kin(name: str, rounds: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Seconds, ratios, and the differences of the maps from torchcam's."""
    from torchcam import methods

    model, x = common.model_and_input(common.Case("grad_cam", name, "layer4"))
    calls = {method: functools.partial(camfn.METHODS[method].function, model, "layer4", x, 1) for method in KIN}
    base = functools.partial(by_hand, copy.deepcopy(model), "layer4", x)
    theirs = {method: _torchcams(getattr(methods, kind), copy.deepcopy(model), x) for method, kind in TORCHCAMS.items()}
    differences = {f"{name}, {method}": float((calls[method]() - call()).abs().max()) for method, call in theirs.items()}
    for call in (base, calls["hires_cam"]):
        call()
    found = common.interleaved(
        {"forward and head backward": base, **calls, **{f"torchcam's {method}": call for method, call in theirs.items()}},
        rounds,
    )
    ratios = {
        f"{name}, {method}: over forward and head backward": common.ratio(found[method], found["forward and head backward"])
        for method in KIN
    }
    ratios |= {
        f"{name}, {method}: over torchcam's": common.ratio(found[method], found[f"torchcam's {method}"]) for method in theirs
    }
    return {f"{name}, {call}": timing.median for call, timing in found.items()}, ratios, differences


def _torchcams(kind: Any, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    extractor = kind(model, "layer4")
    return lambda: extractor(1, model(x))[0]


def eigen_cam(options: argparse.Namespace) -> Part:
    from pytorch_grad_cam import EigenCAM
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

    model, x = common.model_and_input(common.Case("eigen_cam", "resnet50", "layer4"))
    twin = copy.deepcopy(model)
    seen = _seen(model, "layer4", x)
    with EigenCAM(twin, [twin.layer4]) as cam:
        calls = {
            "camfn": lambda: camfn.eigen_cam(model, "layer4", x, center=True),
            "pytorch-grad-cam": lambda: cam(x, None),
            "camfn, from the activation": lambda: components.first(maps.centered(seen.flatten(2), seen.dtype), "peak").scores,
            "pytorch-grad-cam, from the activation": lambda: torch.as_tensor(get_2d_projection(seen.numpy())).flatten(1),
        }
        for call in calls.values():
            call()
        found = common.interleaved(calls, options.rounds)
    ours, theirs = (calls[name]() for name in list(calls)[2:])
    sign = (ours * theirs).sum().sign()
    return Part(
        {name: timing.median for name, timing in found.items()},
        {
            "pytorch-grad-cam's time over camfn's": common.ratio(found["pytorch-grad-cam"], found["camfn"]),
            "the same, from the activation": common.ratio(
                *(found[f"{of}, from the activation"] for of in ("pytorch-grad-cam", "camfn"))
            ),
        },
        {
            "channels": seen.shape[1],
            "largest difference, as a share": float((ours - sign * theirs).abs().max() / ours.abs().max()),
        },
    )


def shared(options: argparse.Namespace) -> Part:
    rows: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name in ("resnet18", "resnet50"):
        model, x = common.model_and_input(common.Case("grad_cam", name, "layer4"))
        together = functools.partial(camfn.explain, model, "layer4", x, 1, method=KIN)
        alone = [functools.partial(camfn.explain, model, "layer4", x, 1, method=method) for method in KIN]
        calls = {"together": together, "one by one": lambda alone=alone: [call() for call in alone]}
        for call in calls.values():
            call()
        found = common.interleaved(calls, options.rounds)
        rows |= {f"{name}, {call}": timing.median for call, timing in found.items()}
        ratios[f"{name}: together over one by one"] = common.ratio(found["together"], found["one by one"])
    return Part(rows, ratios, {"methods": KIN})


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "ablation": ablation,
    "recipro": recipro,
    "gradient": gradient,
    "eigen": eigen_cam,
    "shared": shared,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=common.positive, default=5)
    parser.add_argument("--channels", type=common.positive, default=2 * CHUNK, help="of pytorch-grad-cam's that are timed")
    parser.add_argument("--out", help="write the figures to this file; other parts in it stay as they are")
    options = parser.parse_args()
    common.require({"pytorch_grad_cam": "grad-cam", "torchvision": "torchvision"})
    common.torchvision_models()
    for name in options.parts or PARTS:
        if name not in PARTS:
            parser.error(f"no part {name!r}: choose of {', '.join(PARTS)}")
        part = PARTS[name](options)
        print(common.table([name, "seconds"], [[row, f"{seconds:.3f}"] for row, seconds in part.rows.items()]))
        print("".join(f"{what}: {ratio:.2f}\n" for what, ratio in part.ratios.items()))
        if options.out:
            _written(options.out, name, part, options)


def _written(out: str, name: str, part: Part, options: argparse.Namespace) -> None:
    record = json.loads(Path(out).read_text(encoding="utf-8")) if Path(out).exists() else {}
    where = common.environment(["camfn", "torchvision", "grad-cam", "torchcam"])
    record[name] = {**part._asdict(), "rounds": options.rounds, "environment": where}
    common.write(out, record)


if __name__ == "__main__":
    main()
