"""Train the demo network from scratch: `python -m camfn.demo.train OUT.safetensors`, a few minutes on two cores.

An object covers a twentieth of its scene, and global average pooling dilutes its signal. The first epochs therefore use windows
around single objects. The others use whole scenes of up to three objects, with equal shares of the classes as the label.
"""

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from camfn.demo.network import network, preprocess
from camfn.demo.scenes import CLASSES, scene

FIRST = 1_000_000
"""The first seed of the training scenes. Tests and examples use smaller seeds."""


class Settings(NamedTuple):
    """The hyperparameters of the training."""

    scenes: int = 12_000
    window_epochs: int = 8
    scene_epochs: int = 6
    window: int = 56  # pixels
    batch: int = 64
    rate: float = 4e-3
    seed: int = 0


class Data(NamedTuple):
    """The training scenes, three quarters of which have a single object."""

    images: Tensor  # (n, 3, h, w), uint8
    shares: Tensor  # (n, classes)
    centers: Tensor  # (n, 2), of the first object
    single: Tensor  # (n,)


def data(count: int) -> Data:
    """Return `count` scenes, from seed `FIRST` on."""
    images, shares, centers = [], torch.zeros(count, len(CLASSES)), []
    for i in range(count):
        made = scene(FIRST + i, objects=(2 + i // 4 % 2) if i % 4 == 0 else 1)
        images.append((255 * made.image).byte())
        shares[i, list(made.classes)] = 1 / len(made.classes)
        centers.append(made.masks[0].nonzero().float().mean(0))
    return Data(torch.stack(images), shares, torch.stack(centers), shares.amax(1) == 1)


def batches(found: Data, settings: Settings, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and class shares, augmented by flips, transposition and permuted color channels."""
    windows = epoch < settings.window_epochs
    among = found.single.nonzero()[:, 0] if windows else torch.arange(len(found.images))
    order = among[torch.randperm(len(among), generator=generator)]
    for number, index in enumerate(order.split(settings.batch)):
        x = found.images[index]
        if windows:
            x = _around(x, found.centers[index], settings.window, generator)
        x = x.flip([axis for bit, axis in ((1, -1), (2, -2)) if number & bit])
        x = x.transpose(-1, -2) if number & 4 else x
        yield preprocess(x[:, torch.randperm(3, generator=generator)].float() / 255), found.shares[index]


def _around(images: Tensor, centers: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a window out of each image, with its center up to 8 pixels from the object's."""
    shift = 16 * (torch.rand(centers.shape, generator=generator) - 0.5)
    corners = (centers + shift - side / 2).round().long().clamp(0, images.shape[-1] - side)
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners.tolist())])


def train(settings: Settings = Settings()) -> nn.Sequential:
    """Train the network and return it in eval mode. One line is printed per epoch."""
    found, generator = data(settings.scenes), torch.Generator().manual_seed(settings.seed)
    model = network(pretrained=False, seed=settings.seed)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch takes it, its overloads do not say so
    single, epochs = int(found.single.sum()), settings.window_epochs + settings.scene_epochs
    phases = (settings.window_epochs, single), (settings.scene_epochs, settings.scenes)
    steps = sum(times * math.ceil(count / settings.batch) for times, count in phases)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        losses = []
        for x, shares in batches(found, settings, epoch, generator):
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), shares)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return model.eval()


def accuracy(model: nn.Module, seeds: range) -> float:
    """Return the top-1 accuracy on single-object scenes."""
    made = [scene(seed) for seed in seeds]
    with torch.no_grad():
        best = torch.cat([model(preprocess(part)).argmax(1) for part in torch.stack([s.image for s in made]).split(64)])
    return sum(int(found) == s.classes[0] for found, s in zip(best, made)) / len(made)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m camfn.demo.train OUT.safetensors")
    trained = train()
    save_file(
        {name: tensor.contiguous() for name, tensor in trained.state_dict().items()},
        sys.argv[1],
        {"made by": "python -m camfn.demo.train"},
    )
    print(f"accuracy on 1000 scenes that were not trained on: {accuracy(trained, range(1000)):.1%}")
