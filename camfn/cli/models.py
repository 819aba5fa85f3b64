"""The model of a command, the device, and the input of a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camfn import zoo
from camfn._errors import CamError
from camfn.cli.options import one_line


@contextmanager
def opened(spec: str, weights: Path | None, no_pretrained: bool, device: torch.device | None) -> Iterator[zoo.Loaded]:
    """Load the model and move it to the device."""
    with zoo.opened(spec, weights=weights, pretrained=not no_pretrained) as loaded:
        with zoo.told(f"moving the model to {device}", loaded.file):
            model = loaded.model if device is None else loaded.model.to(device)
        yield loaded._replace(model=model)


def device_of(text: str | None) -> torch.device | None:
    """Parse a device. Raise CamError if it is not available."""
    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CamError(f"--device {text!r} is not a device of torch: write cpu, cuda, cuda:1, mps or similar") from None
    try:
        float(torch.ones(1, device=device))
    except Exception as error:  # each backend raises its own type
        why = one_line(error).partition(". ")[0]
        raise CamError(f"--device {text!r} cannot be used here: {why}; leave it out to run where the model is") from None
    return device


def input_of(loaded: zoo.Loaded, picture: Any, device: torch.device | None) -> Tensor:
    """Preprocess a picture to a batch of one on the device. A model without tensors has no device of its own."""
    x = zoo.input_of(loaded, picture)
    return x if device is None else x.to(device)
