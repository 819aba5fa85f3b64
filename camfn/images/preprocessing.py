"""Running the caller's preprocessing, whatever it returns, without a trace."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camfn._errors import CamError
from camfn.images.pictures import tensor_of


def pixels_of(preprocess: Callable[[Any], Any], picture: Any) -> Tensor:
    """Run a preprocessing on a picture, and return its pixels without an axis for the batch.

    An image processor of transformers returns a mapping with lists of arrays.
    """
    found = preprocess(picture)
    if isinstance(found, Mapping):
        if "pixel_values" not in found:
            raise CamError(f"preprocess returns a mapping of {', '.join(map(repr, found))}, and no 'pixel_values'")
        found = found["pixel_values"]
    found = tensor_of(found, "what preprocess returns", "a tensor or an array")
    return found[0] if found.ndim == 4 and len(found) == 1 else found


def random_states() -> tuple[Any, ...]:
    """The states of the generators that a transform may draw from."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the caller's transforms may draw from it)
    return torch.get_rng_state().numpy().tobytes(), name, np.asarray(keys).tobytes(), rest, random.getstate()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python at the end."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)
