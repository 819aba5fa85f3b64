"""How fast is a run over a data set, with decoding and writing, and how large are its maps?

Draws JPEGs of 224 to 640 px, and makes their Grad-CAM maps, all interleaved:

- `run`: `camfn.runs.run`. `run without views` does not find where inputs lie on their photos (`views=False`); here all photos
  differ in size, so that each needs it.
- `plain`: the same decoders and batches, a forward, and a backward from the logits to the layer. Nothing is written.
- `grad-cam`: a loop of pytorch-grad-cam, which saves each map as .npy.
- `two processes`: `run without views` in two processes of one thread each, instead of one process of two threads.

And the Score-CAM maps of a few of them, by `camfn.runs.run` with `budget=0.1`, and by a loop of torchcam that saves each map.

A ratio is the time of another over that of `run` within the round, median over rounds; above 1, `run` is faster.

    python benchmarks/runs.py --out benchmarks/results/runs.json                       # an hour
    python benchmarks/runs.py --parts resnet18 --images 50 --rounds 1                  # a quick look
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

from camfn import runs
from camfn.runs import shards
from camfn.runs.decoding import Decoder, batches, decoded
from camfn.runs.rows import Row
from camfn.runs.sources import items_of
from camfn.zoo.networks import Network

LAYER, BATCH, WORKERS = "layer4", 16, 1


def preprocess(picture: Any) -> torch.Tensor:
    """The shorter side to 256 px, the middle 224 px, and the mean and deviation of ImageNet."""
    scale = 256 / min(picture.size)
    picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + 224, top + 224))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def draw(folder: Path, count: int) -> None:
    """JPEGs of random sizes, as large as those of photos: smooth noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        width, height = random.integers(224, 641, 2)
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{number:05}.jpg", quality=90)


def resnet18() -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
    """A ResNet-18 with random weights and its preprocessing."""
    torch.manual_seed(0)
    return common.torchvision_models().resnet18(weights=None).eval(), preprocess


def plain(network: Network, images: Path) -> None:
    """A batched loop of a forward and a backward from the logits to the layer."""
    model, kept = network.model.requires_grad_(False), []
    handle = getattr(model, LAYER).register_forward_hook(
        lambda *seen: kept.append(seen[2].detach().requires_grad_()) or kept[-1]
    )
    with contextlib.closing(decoded(items_of(images), Decoder(network, views=False), WORKERS)) as found:
        for batch in batches(found, BATCH):
            x = torch.stack([torch.from_numpy(each.x) for each in batch])
            logits = model(x)
            activation = kept.pop()
            (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), activation)
            torch.relu((gradient.mean((2, 3), keepdim=True) * activation).sum(1))
    handle.remove()
    model.requires_grad_(True)


def peer(network: Network, images: Path, out: Path) -> None:
    """A loop of pytorch-grad-cam that saves each map."""
    from pytorch_grad_cam import GradCAM

    with GradCAM(model=network.model, target_layers=[getattr(network.model, LAYER)]) as cam:
        for path in sorted(images.glob("*.jpg")):
            with Image.open(path) as file:
                x = preprocess(file.convert("RGB"))[None]
            np.save(out / f"{path.stem}.npy", cam(x, None)[0])


def measure(name: str, images: Path, rounds: int, skip: bool, two: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    network = Network(name, None, getattr(common.torchvision_models(), name)(weights=None).eval(), preprocess, ())

    def fresh(make: Callable[[Path], Any]) -> None:
        with tempfile.TemporaryDirectory() as out:
            make(Path(out))

    def run(out: Path, **options: Any) -> None:
        given = {"model": network, "layer": LAYER, "batch": BATCH, "workers": WORKERS, "progress_line": False, **options}
        made = runs.run(images, out=out, **given)
        assert made.failed == 0

    calls: dict[str, Callable[[], Any]] = {
        "run": partial(fresh, run),
        "run without views": partial(fresh, partial(run, views=False)),
        "plain": partial(plain, network, images),
    }
    if not skip:
        calls["grad-cam"] = partial(fresh, partial(peer, network, images))
    if two:
        spec = f"{__file__}:resnet18"  # each process loads the model on its own
        calls["two processes"] = partial(fresh, partial(run, views=False, model=spec, devices=["cpu", "cpu"]))
    calls["plain"]()
    found = common.interleaved(calls, rounds)
    ratios = {other: common.ratio(found[other], found["run"]) for other in calls}
    return {"seconds": {other: timing.median for other, timing in found.items()}, "over run": ratios}


def measure_score_cam(images: Path, rounds: int) -> dict[str, Any]:
    """Score-CAM with a budget beside torchcam's, on ResNet-18."""
    torch.manual_seed(0)
    network = Network("resnet18", None, common.torchvision_models().resnet18(weights=None).eval(), preprocess, ())

    def ours() -> None:
        with tempfile.TemporaryDirectory() as out:
            options: dict[str, Any] = {"methods": ["score_cam"], "budget": 0.1, "progress_line": False, "workers": WORKERS}
            assert runs.run(images, model=network, layer=LAYER, out=out, **options).failed == 0

    def torchcam() -> None:
        from torchcam.methods import ScoreCAM

        with tempfile.TemporaryDirectory() as out, ScoreCAM(network.model, LAYER, batch_size=32) as cam:
            for path in sorted(images.glob("*.jpg")):
                with Image.open(path) as file, torch.no_grad():
                    x = preprocess(file.convert("RGB"))[None]
                    np.save(Path(out) / f"{path.stem}.npy", cam(int(network.model(x).argmax()), None)[0].numpy())

    found = common.interleaved({"run": ours, "torchcam": torchcam}, rounds)
    return {
        "seconds": {name: timing.median for name, timing in found.items()},
        "over run": {"torchcam": common.ratio(found["torchcam"], found["run"])},
    }


def size_of_maps(count: int = 20_000) -> float:
    """The bytes of a 7 x 7 map with all of its columns, in shards of 1000 images of 2 targets."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, count, 2000):
            rows = [row_of(start + number, generator) for number in range(2000)]
            shards.commit(Path(folder), rows)
        return sum(path.stat().st_size for path in Path(folder).iterdir()) / count


def row_of(number: int, generator: torch.Generator) -> Row:
    id, target = f"val/n{number // 100:08}/ILSVRC2012_val_{number // 2:08}.JPEG", str(number * 7919 % 1000)
    sides = {"width": 500, "height": 300 + number % 200, "input_width": 224, "input_height": 224}
    view = (1.5 + number % 200 / 1000, 0.0, 30.0, 0.0, 1.5, number % 200 / 2)
    map = torch.relu(torch.randn(7, 7, generator=generator))
    found = torch.randn(2, generator=generator).tolist()
    about = {"layer": LAYER, "method": "grad_cam", "target": target, "class_name": f"class {target}"}
    return Row(id, id, **sides, view=view, **about, predicted=1, score=found[0], probability=abs(found[1]), map=map)


def on_network(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.images)
        found = measure(name, Path(folder), arguments.rounds, arguments.no_peer, name == "resnet18")
    return {"images": arguments.images, "rounds": arguments.rounds, **found}


def on_score_cam(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.score_cam_images)
        found = measure_score_cam(Path(folder), arguments.rounds)
    return {"images": arguments.score_cam_images, "rounds": arguments.rounds, **found}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "resnet18": partial(on_network, "resnet18"),
    "resnet50": partial(on_network, "resnet50"),
    "score_cam": on_score_cam,
    "bytes of a map": lambda arguments: size_of_maps(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--score-cam-images", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the record; parts in it that are not asked for stay")
    arguments = parser.parse_args()
    out = arguments.out and Path(arguments.out)
    parts = json.loads(out.read_text())["parts"] if out and out.exists() else {}
    for name in arguments.parts:
        parts[name] = PARTS[name](arguments)
        print(name, parts[name], flush=True)
        record = {
            "question": (__doc__ or "").splitlines()[0],
            "environment": common.environment(["torchvision", "pyarrow", "pillow", "grad-cam", "torchcam"]),
            "arguments": {"batch": BATCH, "workers": WORKERS},
            "parts": parts,
        }
        if out:
            common.write(out, record)


if __name__ == "__main__":
    main()
