"""Plain loops with plain hooks on a copy of the model: nothing of camfn computes a value here."""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def score_cam_loop(net: nn.Module, layer: str, x: Tensor, score, raw: bool = False) -> Tensor:
    """Score-CAM as a plain loop with a plain hook, `(n, t, h, w)`.

    `score(y, i)` is `(t,)`, of what the model gives for image i alone under a mask. `raw`: after the ReLU, not scaled.
    """
    net, kept = copy.deepcopy(net).eval(), []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    with torch.no_grad():
        net(x)
        handle.remove()
        maps = torch.stack([_loop_one(net, x[i : i + 1], a, functools.partial(score, i=i)) for i, a in enumerate(kept[0])])
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return maps if raw else (maps - low) / (high - low)


def _loop_one(net: nn.Module, image: Tensor, activation: Tensor, score) -> Tensor:
    scores = []
    for a in activation:
        mask = (a - a.min()) / (a.max() - a.min() + 1e-8)
        mask = F.interpolate(mask[None, None], image.shape[2:], mode="bilinear", align_corners=False)
        scores.append(score(sample_of(net(image * mask))))
    return torch.relu(torch.einsum("ct,chw->thw", torch.stack(scores).softmax(0), activation))


def grad_cam_loop(net: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """Grad-CAM by `autograd.grad` and a plain hook, image by image and score by score, `(n, t, h, w)`, not scaled."""
    net, kept, maps = copy.deepcopy(net).eval(), [], []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    for i in range(len(x)):
        scores = score(sample_of(net(x[i : i + 1])), i=i)
        slopes = [torch.autograd.grad(one, kept[i], retain_graph=True)[0][0] for one in scores]
        maps.append(torch.stack([torch.relu((g.mean((1, 2))[:, None, None] * kept[i][0]).sum(0)) for g in slopes]))
    return torch.stack(maps).detach()


def sample_of(output):
    """The one sample of an output, of a batch of one."""
    if isinstance(output, dict):
        return {key: value[0] for key, value in output.items()}
    return output[0]


MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}

DIMS = (1, 2, 3)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def activation_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen = []
    model = frozen(model)
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    model(x)
    return seen[0]


def upsampled(channel: Tensor, size, align_corners: bool) -> Tensor:
    return F.interpolate(channel[None, None], tuple(size), mode=MODES[channel.ndim], align_corners=align_corners)[0, 0]


def min_max(values: Tensor, eps: float) -> Tensor:
    """Zeros for one value everywhere, also where interpolation has rounded it."""
    if is_flat(values):
        return torch.zeros_like(values)
    return (values - values.min()) / (values.max() - values.min() + eps)


def is_flat(values: Tensor) -> bool:
    return float(values.max() - values.min()) <= 1e-12 * float(values.abs().max())


def gradient_of(model: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """Of one image's score at the layer."""
    model, seen = copy.deepcopy(model).eval(), []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out) or out.clone())
    (gradient,) = torch.autograd.grad(score(model(x)[0]), seen)
    return gradient[0]


def blurred(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """By padding with mirrored pixels and a convolution with the whole kernel."""
    axes, half = x.ndim - 2, kernel // 2
    bell = torch.tensor([math.exp(-((i - half) ** 2) / (2 * sigma**2)) for i in range(kernel)], dtype=x.dtype)
    whole = bell
    for _ in range(axes - 1):
        whole = whole[..., None] * bell
    padded = F.pad(x, (half, half) * axes, mode="reflect")
    return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](padded.flatten(0, 1)[:, None], (whole / whole.sum())[None, None]).reshape(
        x.shape
    )
