"""Small networks with seeded weights, their inputs, and the methods' cheap options."""

import math

import torch
from torch import Tensor, nn

import camfn

CHEAP = {
    "cam": {"fc": "fc"},
    "cameras": {"factors": (1.25,)},
    "fem": {"k": 0.75},
    "group_cam": {"blur": (3, 1.0)},
    "is_cam": {"num_samples": 3},
    "opti_cam": {"steps": 2},
    "rise": {"num_samples": 20, "cells": 3},
    "smooth_grad_cam_pp": {"num_samples": 2},
    "ss_cam": {"num_samples": 3},
}
"""Options that keep a method's cost, and its warnings, down. (On a small grid nothing is two deviations above the mean.)"""

LAYERED = [name for name, method in camfn.METHODS.items() if "attention" not in method.needs]
"""The methods that convolutional networks take; those that follow attention are in tests/methods/test_transformers.py."""

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class SmallNet(nn.Module):
    """conv, batch norm, ReLU, conv with stride 2 (`features`), ReLU, and a pooled or dense linear head."""

    def __init__(
        self, dims: int = 2, channels: int = 6, classes: int = 5, side: int = 8, dense: bool = False, inplace: bool = False
    ):
        super().__init__()
        conv = CONVS[dims]
        bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.stem = nn.Sequential(conv(3, 4, 3, padding=1), bn(4), nn.ReLU())
        self.features = conv(4, channels, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=inplace)
        self.pool = nn.Identity() if dense else POOLS[dims](1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(channels * (((side + 1) // 2) ** dims if dense else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(self.act(self.features(self.stem(x)))).flatten(1)))


def small_net(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs) -> SmallNet:
    """A `SmallNet` with seeded weights and batch-norm statistics that are not the trivial ones; in train mode."""
    generator = torch.Generator().manual_seed(seed)
    net = SmallNet(**kwargs)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if "fc" in name else 0.5))
    return net.to(dtype)


def inputs(n: int = 2, dims: int = 2, side: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """`(n, 3, side, ...)` normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *(side,) * dims, generator=generator, dtype=torch.float64).to(dtype)


class Headed(SmallNet):
    """A `SmallNet` with a second layer, and an activation of its own (`bend`), before the pooling: gradients differ from place
    to place, and from image to image."""

    def __init__(self, bend: nn.Module, dims: int):
        super().__init__(dims)
        self.between, self.bend, self.last, self.fc = CONVS[dims](6, 7, 2), bend, POOLS[dims](1), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.bend(self.between(self.act(self.features(self.stem(x)))))).flatten(1))


def headed(bend: nn.Module | None = None, seed: int = 0, dims: int = 2, act: nn.Module | None = None) -> Headed:
    """With `act` after the layer of that name, by default a ReLU."""
    net = Headed(nn.ReLU() if bend is None else bend, dims)
    net.act = net.act if act is None else act
    return seeded(net, seed)


def seeded(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net in float64, with weights and statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return net.double()


def net_with_flat_channels(dims: int) -> nn.Module:
    """One channel of `features` is a constant that is not 0, one is 0."""
    model = small_net(dims=dims)
    with torch.no_grad():
        model.features.weight[1] = 0.0
        model.features.bias[1] = 0.7
        model.features.weight[4] = 0.0
        model.features.bias[4] = 0.0
    return model


def softer(model: nn.Module) -> nn.Module:
    """With smaller logits, so that probabilities are no 0 and 1."""
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.mul_(0.3)
    return model


def livened(model: nn.Module) -> nn.Module:
    """Fresh weights make every score the same to rounding: set the statistics and scale the logits to a deviation of 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.normal_(generator=generator).mul_(math.sqrt(2 / tensor[0].numel()))
        batch = torch.randn(8, 3, 64, 64, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()(batch)
        model.eval()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(1 / model(batch).std(0).mean())
    return model
