"""The loop of a search: score the channels that matter most, learn, and go on until it is enough."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from camfn._types import Scores


class Searched(Protocol):
    """One image's state of knowledge."""

    def choose(self) -> Tensor:
        """The channels of the next round, as a mask `(c,)` on the CPU; none when it is enough."""
        ...

    def learn(self, scores: Tensor, mask: Tensor) -> None:
        """Take in the scores `(c, t)` of the channels of a mask."""
        ...


def search(images: Sequence[Searched], score: Callable[[Tensor], Scores]) -> Tensor:
    """Run the rounds of all images at once, and return all channels that were scored, `(n, c)`."""
    every = chosen = torch.stack([image.choose() for image in images])
    while bool(chosen.any()):
        found = score(chosen)
        for image, scores, mask in zip(images, found, chosen):
            image.learn(scores, mask)
        chosen = torch.stack([image.choose() for image in images])
        every = every | chosen
    return every
