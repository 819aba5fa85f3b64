"""The maps of one method for one batch, with all that metrics may ask about them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from camfn import metrics, targets
from camfn._errors import CamError
from camfn._types import Inputs, State, Target
from camfn.metrics.faithfulness import Curve
from camfn.model.prepare import Prepared

TURNS = 2
"""The number of random orders whose curve is subtracted."""


OF_SCORES = ("state", "axes", "masked")
"""Options that hold for scores as for maps."""


class Images(NamedTuple):
    """A batch of images with its annotation."""

    x: Any  # the inputs
    target: Target = None
    masks: Bool[Tensor, "n h w"] | None = None  # of the explained object
    boxes: Sequence[Any] | None = None  # for each image (k, 4), of the explained class
    others: Bool[Tensor, "n h w"] | None = None  # of the objects of other classes


class Makes(Protocol):
    """Make a method's signed, unscaled maps `(n, *grid)`, of other pictures, another target or another state."""

    def __call__(self, x: Tensor | None = None, target: Target = None, state: State | None = None) -> Tensor: ...


class Asked:
    """What metrics ask about a batch, whatever the method: found once, on first use."""

    def __init__(self, model: Prepared, images: Images, seed: int, options: Mapping[str, Any] | None = None) -> None:
        self.model, self.images, self.seed = model, images, seed
        self._own = {name: value for name, value in (options or {}).items() if name in OF_SCORES}
        plain = self._score(images.target)
        if plain.clean.shape[1] != 1:
            raise CamError(f"the target has {plain.clean.shape[1]} scores for each image: evaluate one target at a time")
        self.classes: Int[Tensor, " n"] | None = None if plain.classes is None else plain.classes[:, 0]
        self._plain = plain

    def _score(self, target: Target) -> metrics.ScoreFunction:
        return metrics.score_function(self.model, self.images.x, target, **self._own)

    @property
    def x(self) -> Tensor:
        """The inputs with the pixels, `(n, channels, *size)`."""
        return self._plain.x

    def whole(self, x: Tensor) -> Inputs:
        """What the model takes for other pixels."""
        return self._plain.whole(x)

    @property
    def target(self) -> Target:
        """The target, settled on these images."""
        return self.images.target if self.classes is None else self.classes

    @cached_property
    def score(self) -> metrics.ScoreFunction:
        """The probability of the class, or the score of another target."""
        if self.classes is None:
            return self._plain
        return self._score(targets.probability(self.classes))

    @cached_property
    def other(self) -> Tensor:
        """The most probable class of each image but the explained one."""
        own, logits = self._needed(), self._score("all").clean
        if logits.shape[1] < 2:
            raise CamError("the model has one class, and there is no other")
        return logits.scatter(1, own[:, None], float("-inf")).argmax(1)

    @cached_property
    def permuted(self) -> State:
        """The state with a permuted classifier."""
        self._needed()
        return metrics.permuted_classifier(self.model, self.images.x, state=self._own.get("state"), seed=self.seed)

    def _needed(self) -> Tensor:
        if self.classes is None:
            raise CamError("the target is not a class")
        return self.classes

    @cached_property
    def by_chance(self) -> dict[tuple[int, ...], Tensor]:
        """The areas of the curves of random orders, for each grid of cells."""
        return {}


class Judged:
    """The maps of one method for a batch of images."""

    def __init__(self, asked: Asked, makes: Makes, maps: Tensor) -> None:
        self.asked, self.makes = asked, makes
        self.maps = maps  # (n, *grid)

    @property
    def x(self) -> Tensor:
        return self.asked.x

    @property
    def score(self) -> metrics.ScoreFunction:
        return self.asked.score

    @property
    def seed(self) -> int:
        return self.asked.seed

    @property
    def axes(self) -> int:
        """The number of spatial axes of a map."""
        return self.maps.ndim - 1

    @cached_property
    def masks(self) -> Tensor:
        """The maps as masks: negative values become 0, and the highest is 1. A map of ones stays one."""
        found = self.maps.clamp(min=0)
        highest = found.flatten(1).amax(1).reshape(-1, *(1,) * (found.ndim - 1))
        return torch.where(highest > 0, found / highest.clamp(min=torch.finfo(found.dtype).tiny), 0).clamp(max=1)

    def again(self, x: Tensor) -> Tensor:
        """The masks of other pictures, for the same targets."""
        return Judged(self.asked, self.makes, self.makes(x=x, target=self.asked.target)).masks

    def like_other(self) -> Tensor:
        """The rank correlation with the map of another class."""
        return self._like(self.makes(target=self.asked.other))

    def like_permuted(self) -> Tensor:
        """The rank correlation with the map of the network whose classes are permuted."""
        return self._like(self.makes(target=self.asked.target, state=self.asked.permuted))

    def _like(self, maps: Tensor) -> Tensor:
        return metrics.rank_correlation(self.maps, maps, spatial_ndim=self.axes)

    @cached_property
    def deletion(self) -> Curve:
        return metrics.deletion_curve(self.maps, self.x, self.score, seed=self.seed)

    def minus_random(self) -> Tensor:
        """The area of the deletion curve of random orders, which all maps share, less that of the map."""
        grid = tuple(self.maps.shape[1:])
        if grid not in self.asked.by_chance:
            curves = [
                metrics.deletion_curve(self.maps, self.x, self.score, order="random", seed=self.seed + turn)
                for turn in range(TURNS)
            ]
            self.asked.by_chance[grid] = torch.stack([curve.area for curve in curves]).mean(0)
        return self.asked.by_chance[grid] - self.deletion.area
