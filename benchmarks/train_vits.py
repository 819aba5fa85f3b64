"""Train three small pre-norm vision transformers on the shipped scenes: `python benchmarks/train_vits.py`.

It took 7 to 10 minutes for each, in one thread of a busy machine. Their accuracy on other scenes of one object is 83 %
(shallow), 68 % (coarse) and 68 % (third). The transformers serve `benchmarks/layers.py`, which chooses layers on two of them
and judges the choice on the third. They differ in depth, width, patch and seed. As in `camfn.demo.train`, the first epochs use
windows around single objects, and the others whole scenes. A window takes the embeddings of positions of its place on the
scene.

The weights are stored in float16, `benchmarks/vits/NAME.safetensors`, a few hundred kB each.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from camfn.demo import CLASSES, train
from camfn.demo.scenes import SIDE

FOLDER = Path(__file__).with_name("vits")


class Plan(NamedTuple):
    """The shape of a transformer, its seed, and the length of its training."""

    depth: int
    width: int
    patch: int  # pixels
    heads: int
    seed: int
    windows: int  # epochs
    scenes: int  # epochs


PLANS = {
    "shallow": Plan(3, 64, 8, 4, 0, windows=16, scenes=2),
    "coarse": Plan(5, 48, 12, 3, 1, windows=24, scenes=4),
    "third": Plan(4, 64, 8, 4, 2, windows=14, scenes=2),
}
CHOSEN_ON, JUDGED_ON = ("shallow", "coarse"), "third"


class Attention(nn.Module):
    """Multi-head self-attention, named as timm names it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens `(n, tokens, width)`."""
        n, count, width = x.shape
        q, k, v = self.qkv(x).reshape(n, count, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, width))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and the perceptron to the tokens."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A pre-norm transformer with a class token. Three strided convolutions make the patches."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        width, last, side = plan.width, plan.patch // 4, SIDE // plan.patch
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, width, last + 2, last, 1)
        )
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, width, side, side))
        self.blocks = nn.Sequential(*(Block(width, plan.heads) for _ in range(plan.depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
        """The logits of scenes `(n, 3, h, w)`, or of windows of them whose corner is at this patch."""
        patches = self.stem(x)
        (y, x0), (rows, columns) = corner, patches.shape[2:]
        patches = patches + self.pos_embed[:, :, y : y + rows, x0 : x0 + columns]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).mT], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def load(name: str) -> SmallViT:
    """A trained transformer in eval mode, float32."""
    model = SmallViT(PLANS[name])
    model.load_state_dict({key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()})
    return model.eval()


class Settings(NamedTuple):
    """The hyperparameters of the training."""

    scenes: int = 4000
    window: int = 48  # pixels, a multiple of every patch
    batch: int = 64
    rate: float = 2e-3


def batches(found: train.Data, settings: Settings, epoch: int, plan: Plan, generator: torch.Generator) -> Iterator[tuple]:
    """Yield batches of inputs, class shares, and the patch at the corner of the window."""
    own = train.Settings(window=settings.window, batch=settings.batch, window_epochs=plan.windows)
    most = (SIDE - settings.window) // plan.patch
    for x, shares in train.batches(found, own, epoch, generator):
        corner = torch.randint(most + 1, (2,), generator=generator).tolist() if epoch < plan.windows else (0, 0)
        yield x, shares, tuple(corner)


def fit(plan: Plan, found: train.Data, settings: Settings) -> SmallViT:
    """Train one transformer. One line is printed per epoch."""
    torch.manual_seed(plan.seed)
    model, generator = SmallViT(plan), torch.Generator().manual_seed(plan.seed)
    for parameter in (model.cls_token, model.pos_embed):
        nn.init.normal_(parameter, std=0.02)
    phases = (plan.windows, int(found.single.sum())), (plan.scenes, len(found.images))
    steps = sum(times * math.ceil(count / settings.batch) for times, count in phases)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps, pct_start=0.15)
    for epoch in range(plan.windows + plan.scenes):
        losses = []
        for x, shares, corner in batches(found, settings, epoch, plan, generator):
            loss = F.cross_entropy(model(x, corner), shares)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"  epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train the transformers that are asked for, and tell their accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(PLANS), help=f"of {', '.join(PLANS)}")
    parser.add_argument("--scenes", type=int, default=Settings().scenes)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings, start = Settings(scenes=asked.scenes), time.perf_counter()
    found = train.data(settings.scenes)
    print(f"{settings.scenes} scenes in {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    FOLDER.mkdir(exist_ok=True)
    for name in asked.names:
        start = time.perf_counter()
        model = fit(PLANS[name], found, settings)
        save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, FOLDER / f"{name}.safetensors")
        right = train.accuracy(load(name), range(500))
        print(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes, accuracy on 500 other scenes {right:.1%}", flush=True)


if __name__ == "__main__":
    main()
