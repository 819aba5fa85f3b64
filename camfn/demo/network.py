"""The demo network: six convolutions with batch norms, global average pooling, and a linear layer."""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn.demo.scenes import CLASSES, SIDE

WEIGHTS = Path(__file__).with_name("network.safetensors")
"""Made by `python -m camfn.demo.train`."""


def network(*, pretrained: bool = True, seed: int = 0) -> nn.Sequential:
    """The demo network in eval mode, from `(n, 3, h, w)` to `(n, 8)` logits.

    The layer to explain is `features`, with 64 channels and cells of 8 x 8 pixels. `classify` is the linear layer after the
    pooling.

    - `pretrained`: load the trained weights. If False, draw random weights.
    - `seed`: the seed of the random weights.

    Raises `CamError` if the weights need safetensors and it is not installed.

    >>> from camfn import demo
    >>> scene = demo.scene(0)
    >>> int(demo.network()(demo.preprocess(scene.image)[None]).argmax()) == scene.classes[0]
    True
    """
    with torch.device("meta"):  # torch's own initialization would draw from the global random state
        model = _architecture()
    model = model.to_empty(device="cpu")
    if pretrained:
        model.load_state_dict(_trained_weights())
    else:
        _initialize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _architecture() -> nn.Sequential:
    parts = {
        "stem": nn.Sequential(_block(3, 24, 2), _block(24, 48, 2)),
        "body": nn.Sequential(_block(48, 48), _block(48, 64, 2)),
        "features": nn.Sequential(_block(64, 64), _block(64, 64)),
        "mean": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classify": nn.Linear(64, len(CLASSES)),
    }
    return nn.Sequential(OrderedDict(parts))


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution block. Its kernel is 4 if the stride is 2, since a kernel of 3 would shift maps by half a pixel."""
    kernel = 4 if stride == 2 else 3
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def _trained_weights() -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CamError("the demo network's weights need safetensors: pip install 'camfn[cli]'") from error
    return load_file(WEIGHTS)


def _initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw He-normal weights. Set biases to 0 and batch norms to the identity."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
                module.get_buffer("running_var").fill_(1)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)


def preprocess(picture: Any) -> Tensor:
    """Preprocess a picture to `(3, h, w)` in [-2, 2]. The value 0, with which Score-CAM masks pixels, is gray.

    - `picture`: a tensor `(3, h, w)` in [0, 1], which keeps its size, or a PIL image, whose shorter side is scaled to 96
      pixels.
    """
    if not isinstance(picture, Tensor):
        picture = picture.convert("RGB")
        scale = SIDE / min(picture.size)
        picture = picture.resize([max(SIDE, round(scale * side)) for side in picture.size])
        picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (picture - 0.5) / 0.25
