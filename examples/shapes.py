"""A picture to explain, and a small network to explain it with: nothing to download, no training.

    python examples/shapes.py scene.png
    camfn explain scene.png --model examples/shapes.py:model --out maps

The scene has a disc, a square and a triangle, each with stripes in its own direction, and a plain disc, which is of no class,
on a mottled ground. The network tells directions of stripes. Its weights are written down, not learned: Gabor filters,
then competition between directions, the mean over the picture, and one linear layer.
"""

import math
import sys
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

SIDE = 224
CLASSES = ["vertical stripes", "horizontal stripes", "diagonal stripes"]
DIRECTIONS = (0, 90, 45, 135)  # of the waves, in degrees: the lines of a stripe run across them
PERIODS = (7.0, 11.0)  # of the waves, in pixels

# ----------------------------------------------------------------------------------------------------- the network


def model():
    """`(model, preprocess, class names)`, as `camfn explain --model` wants it."""
    return network().eval(), preprocess, CLASSES


def preprocess(image: Image.Image) -> Tensor:
    """`(3, 224, 224)` in [-1, 1], so that 0, which hides a pixel in Score-CAM, is grey."""
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def network() -> nn.Sequential:
    """Luminance, waves of four directions and two periods, eight channels that each like one wave, three classes."""
    luminance, waves = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 32, 15, padding=7, bias=False)
    compete, classify = nn.Conv2d(32, 8, 3, padding=1), nn.Linear(8, 3)
    with torch.no_grad():
        luminance.weight.copy_(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1))
        waves.weight.copy_(gabors())
        compete.weight.copy_(competition())
        compete.bias.fill_(-0.15)
        classify.weight.copy_(directions_of_classes())
        classify.bias.zero_()
    energy = [("luminance", luminance), ("waves", waves), ("rectify", nn.ReLU()), ("pool", nn.AvgPool2d(8))]
    features = nn.Sequential(compete, nn.ReLU())
    head = [("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classify", classify)]
    return nn.Sequential(OrderedDict([*energy, ("features", features), *head]))


def gabors() -> Tensor:
    """`(32, 1, 15, 15)`: for each direction and period a wave at four phases, a quarter apart, under a Gaussian.

    Each kernel sums to 0 (an even grey says nothing) and answers 1 to its own wave of height 1.
    """
    y, x = torch.meshgrid(torch.arange(-7.0, 8.0), torch.arange(-7.0, 8.0), indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * 3.5**2))
    kernels = []
    for direction in DIRECTIONS:
        along = x * math.cos(math.radians(direction)) + y * math.sin(math.radians(direction))
        for period in PERIODS:
            for phase in range(4):
                wave = torch.cos(2 * math.pi * along / period + phase * math.pi / 2)
                kernel = window * wave - window * (window * wave).sum() / window.sum()
                kernels.append(kernel / (kernel * wave).sum())
    return torch.stack(kernels)[:, None]


def competition() -> Tensor:
    """`(8, 32, 3, 3)`: a channel takes the energy of its own wave, less that of the strongest rivals: the other directions."""
    blur = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    own = torch.eye(8)
    same_direction = torch.kron(torch.eye(4), torch.ones(2, 2))
    rivals = 1 - same_direction
    return (own - 0.25 * rivals).repeat_interleave(4, 1)[:, :, None, None] * blur


def directions_of_classes() -> Tensor:
    """`(3, 8)`: a class counts its own directions, and half against itself the others'."""
    of = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 1.0]]).repeat_interleave(2, 1)
    return 200 * (of - 0.5 * (1 - of))


# ------------------------------------------------------------------------------------------------------- the scene


def scene(seed: int = 0) -> tuple[Image.Image, dict[str, Image.Image]]:
    """The picture, and for each class the mask of its object."""
    random = np.random.default_rng(seed)
    picture = ground(random)
    corners = random.permutation([(62, 62), (162, 62), (62, 162), (162, 162)]) + random.integers(-6, 7, (4, 2))
    objects = {}
    for (shape, name), centre in zip(zip(("square", "disc", "triangle"), CLASSES), corners):
        objects[name] = outline(shape, centre)
        picture.paste(stripes(name, random), mask=objects[name])
    picture.paste(colour(random, 110), mask=outline("disc", corners[3]))
    return picture, objects


def ground(random: np.random.Generator) -> Image.Image:
    """Grey, mottled in coarse and in fine grain."""
    coarse = Image.fromarray(random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(8))
    grey = 128 + 6.0 * (np.asarray(coarse, dtype=np.float64) - 128) + random.normal(0, 8, (SIDE, SIDE))
    return Image.fromarray(grey.clip(60, 190).astype(np.uint8)).convert("RGB")


def outline(shape: str, centre: np.ndarray) -> Image.Image:
    """A mask: white inside the shape."""
    mask = Image.new("L", (SIDE, SIDE))
    draw, (x, y), r = ImageDraw.Draw(mask), (int(side) for side in centre), 36
    if shape == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - r + 4, y - r + 4, x + r - 4, y + r - 4), fill=255)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=255)
    return mask


def stripes(name: str, random: np.random.Generator) -> Image.Image:
    """A whole picture of stripes, dark and light in turn, of a random width, phase and hue."""
    y, x = np.mgrid[:SIDE, :SIDE]
    direction = {"vertical stripes": 0, "horizontal stripes": 90}.get(name, random.choice([45, 135]))
    along = x * math.cos(math.radians(direction)) + y * math.sin(math.radians(direction))
    light = np.sin(2 * math.pi * (along / random.uniform(7, 11) + random.uniform())) > 0
    return Image.composite(colour(random, 190), colour(random, 60), Image.fromarray(light))


def colour(random: np.random.Generator, brightness: int) -> Image.Image:
    """A whole picture of one random colour of a given luminance."""
    offset = random.uniform(-50, 50, 3)
    offset -= offset @ (0.299, 0.587, 0.114)
    return Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in brightness + offset))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/shapes.py OUT.png [SEED]")
    scene(int(sys.argv[2]) if len(sys.argv) == 3 else 0)[0].save(sys.argv[1])
