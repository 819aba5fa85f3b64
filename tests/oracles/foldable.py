"""Networks with batch norms behind convolutions, and Score-CAM of them by its definition."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camfn
from camfn._types import State
from tests.oracles.networks import CONVS

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with statistics and gains far from the trivial ones (negative gains too); in train mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 2 + 0.1)
            elif tensor.is_floating_point() and not tensor.is_sparse:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 2)
    return model


def images(n: int = 4, dims: int = 2, side: int = 6, channels: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, *(side,) * dims, generator=generator, dtype=torch.float64)


def pair(dims: int = 2, affine: bool = True, cls: Any = None, **kwargs) -> nn.Sequential:
    return nn.Sequential((cls or CONVS[dims])(4, 16, 3, **kwargs), NORMS[dims](16, affine=affine))


class Net(nn.Module):
    """`inner`, which has 16 channels: with four images a sweep of 64 rows, then a pooled linear head."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.tanh(self.inner(x)).flatten(2).mean(2))


def loop_maps(model: nn.Module, layer: str, x: Tensor, target: Any, state: State | None = None) -> Tensor:
    """Signed Score-CAM maps by their definition in plain Python: one image, one channel, one forward of the model at a time."""
    state = camfn.state_of(model) if state is None else state
    activation, maps = camfn.tap(model, layer)(state, x.clone()).seen, []
    for image, channels in zip(x, activation):
        scores = [loop_score(model, state, image, channel, target) for channel in channels]
        weights = torch.softmax(torch.stack(scores), 0).reshape(-1, *(1,) * (channels.ndim - 1))
        maps.append((weights * channels).sum(0))
    return torch.stack(maps).detach()


def loop_score(model: nn.Module, state: State, image: Tensor, channel: Tensor, target: Any) -> Tensor:
    low, high = channel.min(), channel.max()
    mask = torch.zeros_like(channel) if low == high else (channel - low) / (high - low + 1e-8)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[channel.ndim]
    mask = F.interpolate(mask[None, None], image.shape[1:], mode=mode, align_corners=False)[0]
    output = camfn.pure(model)(state, (image * mask)[None])
    return target(output) if callable(target) else output[0, target]


signed_maps = functools.partial(camfn.score_cam, relu=False, normalize=False)
