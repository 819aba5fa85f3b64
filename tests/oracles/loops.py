"""Plain loops with plain hooks on a copy of the model: nothing of camfn computes a value here."""

import copy
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def score_cam_loop(net: nn.Module, layer: str, x: Tensor, score, raw: bool = False) -> Tensor:
    """Score-CAM as a plain loop with a plain hook, `(n, t, h, w)`.

    `score(y, i)` is `(t,)`, of what the model gives for image i alone under a mask. `raw`: after the ReLU, not scaled.
    """
    maps = torch.relu(score_cam_sum(net, layer, x, score))
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return maps if raw else (maps - low) / (high - low)


def score_cam_sum(net: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """Score-CAM before its ReLU."""
    net, kept = copy.deepcopy(net).eval(), []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    with torch.no_grad():
        net(x)
        handle.remove()
        return torch.stack([_loop_one(net, x[i : i + 1], a, functools.partial(score, i=i)) for i, a in enumerate(kept[0])])


def _loop_one(net: nn.Module, image: Tensor, activation: Tensor, score) -> Tensor:
    scores = []
    for a in activation:
        mask = (a - a.min()) / (a.max() - a.min() + 1e-8)
        mask = F.interpolate(mask[None, None], image.shape[2:], mode="bilinear", align_corners=False)
        scores.append(score(sample_of(net(image * mask))))
    return torch.einsum("ct,chw->thw", torch.stack(scores).softmax(0), activation)


def grad_cam_loop(net: nn.Module, layer: str, x: Tensor, score) -> Tensor:
    """Grad-CAM by `autograd.grad` and a plain hook, image by image and score by score, `(n, t, h, w)`, not scaled."""
    return torch.relu(graded_loop(net, layer, x, score, weigh_by_means))


def graded_loop(net: nn.Module, layer: str, x: Tensor, score, weights_of) -> Tensor:
    """The sum over channels of an activation weighed by its gradient, `(n, t, h, w)`, with its sign."""
    net, kept, maps = copy.deepcopy(net).eval(), [], []
    net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    for i in range(len(x)):
        scores = score(sample_of(net(x[i : i + 1])), i=i)
        slopes = [torch.autograd.grad(one, kept[i], retain_graph=True)[0][0] for one in scores]
        maps.append(torch.stack([(weights_of(g) * kept[i][0]).sum(0) for g in slopes]))
    return torch.stack(maps).detach()


def weigh_by_means(gradient: Tensor) -> Tensor:
    """Grad-CAM: each channel by the mean of its gradient."""
    return gradient.mean((1, 2))[:, None, None]


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


def seen_at(net: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's activation and the output, the plain way."""
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    output = net(x).detach()  # with a graph: without one torch 2.0 takes a fused path, past the hook
    handle.remove()
    return kept[0], output


def output_with(net: nn.Module, layer: str, x: Tensor, value: Tensor) -> Tensor:
    """The model's output with the layer's replaced, by a plain hook: a whole forward."""
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, out: value.clone())
    output = net(x).detach()
    handle.remove()
    return output


def tokens_first(a: Tensor) -> bool:
    return a.ndim == 3


def ablation_loop(net: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(n, classes, c)` and signed maps, one forward for each channel of each image."""
    weights, maps = [], []
    for one in x.split(1):
        a, y = seen_at(net, layer, one)
        drops = []
        axis = 2 if tokens_first(a) else 1
        for k in range(a.shape[axis]):
            without = a.clone()
            if tokens_first(a):
                without[:, 1:, k] = 0
            else:
                without[:, k] = 0
            drops.append((y - output_with(net, layer, one, without))[0] / y[0].abs())
        weights.append(torch.stack(drops, 1))
        grid = a[0, 1:].mT.unflatten(1, (4, 4)) if tokens_first(a) else a[0]
        maps.append(torch.einsum("ck,khw->chw", weights[-1], grid))
    return torch.stack(weights), torch.stack(maps)


def recipro_loop(net: nn.Module, layer: str, x: Tensor, gaussian: bool = False) -> Tensor:
    """The logits `(n, classes, h, w)`, one forward for each position of each image."""
    steps = {0: 0.5, 1: 0.25} if gaussian else {0: 1.0}
    maps = []
    for one in x.split(1):
        a, y = seen_at(net, layer, one)
        h, w = (4, 4) if tokens_first(a) else a.shape[2:]
        found = torch.zeros(y.shape[1], h, w, dtype=x.dtype)
        for i, j in itertools.product(range(h), range(w)):
            mask = torch.zeros(h, w, dtype=x.dtype)
            for k, m in itertools.product(range(h), range(w)):
                mask[k, m] = steps.get(abs(k - i), 0.0) * steps.get(abs(m - j), 0.0)
            value = a.clone()
            if tokens_first(a):
                value[:, 1:] *= mask.flatten()[:, None]
            else:
                value *= mask
            found[:, i, j] = output_with(net, layer, one, value)[0]
        maps.append(found)
    return torch.stack(maps)


def _every_class(y: Tensor, i: int) -> Tensor:
    return y


LOOPS = {
    "grad_cam": lambda net, layer, x: graded_loop(net, layer, x, _every_class, weigh_by_means),
    "hires_cam": lambda net, layer, x: graded_loop(net, layer, x, _every_class, lambda g: g),
    "layer_cam": lambda net, layer, x: graded_loop(net, layer, x, _every_class, torch.relu),
    "score_cam": lambda net, layer, x: score_cam_sum(net, layer, x, _every_class),
    "ablation_cam": lambda net, layer, x: ablation_loop(net, layer, x)[1],
    "recipro_cam": recipro_loop,
}
"""Of a plain classifier, the signed maps of all classes, `(n, classes, h, w)`, at a layer with the channels first."""
