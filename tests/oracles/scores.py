"""Targets as functions of the output, and the mean of maps that pytorch-grad-cam takes."""

import torch
from torch import Tensor

import camfn


def entropy(output: Tensor) -> Tensor:
    return -(output.softmax(-1) * output.log_softmax(-1)).sum()


def margin(output: Tensor) -> Tensor:
    return output[2] - output[0]


def norm(output: Tensor) -> Tensor:
    return output.square().sum().sqrt()


def averaged(maps: tuple[Tensor, ...], size) -> Tensor:
    """It averages the layers' maps, normalised on their grids, and normalises again."""
    if len(maps) == 1:
        return maps[0]
    return camfn.maps.normalize(torch.stack([camfn.maps.resize(m, size) for m in maps]).mean(0), (-2, -1))
