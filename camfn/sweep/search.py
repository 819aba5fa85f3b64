"""Search in rounds: score the channels that matter most, update the posterior, repeat until it suffices."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from camfn._types import Scores


class Searched(Protocol):
    """The search on one image."""

    def choose(self) -> Tensor:
        """The channels of the next round, as a mask `(c,)` on the CPU. No channel ends the search."""
        ...

    def learn(self, scores: Tensor, mask: Tensor) -> None:
        """Update the posterior with the scores `(c, t)` of the channels in `mask`."""
        ...


def search(images: Sequence[Searched], score: Callable[[Tensor], Scores]) -> Tensor:
    """Run the rounds of all images together, and return the mask `(n, c)` of all channels that were scored."""
    every = chosen = torch.stack([image.choose() for image in images])
    while bool(chosen.any()):
        found = score(chosen)
        for image, scores, mask in zip(images, found, chosen):
            image.learn(scores, mask)
        chosen = torch.stack([image.choose() for image in images])
        every = every | chosen
    return every
