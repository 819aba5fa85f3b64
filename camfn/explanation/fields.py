"""The fields of a card, and the names of its targets."""

import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from camfn._errors import CamError
from camfn._types import Maps, Weights
from camfn.formulas.diagnostics import ALIKE, Finding
from camfn.images import View
from camfn.model.gradients import detached

if TYPE_CHECKING:
    from PIL.Image import Image


class ReadOnly(Mapping[str, Any]):
    """A mapping that cannot be changed. Unlike `types.MappingProxyType`, it can be pickled.

    In a pickle, a tensor has no graph, and the name of a value stands for the value if it cannot be pickled (a lambda).

    >>> import pickle
    >>> settings = ReadOnly({"steps": 3, "layout": lambda activation: activation})
    >>> pickle.loads(pickle.dumps(settings))
    {'steps': 3, 'layout': '<lambda>'}
    """

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (tree_map(_picklable, self._items),)


def _picklable(leaf: Any) -> Any:
    """A tensor without its graph, another value as it is, or the name of a value that cannot be pickled."""
    if isinstance(leaf, Tensor):
        return detached(leaf)
    try:
        pickle.dumps(leaf)
    except Exception:  # each type has its own error
        return getattr(leaf, "__name__", repr(leaf))
    return leaf


class Picture(NamedTuple):
    """The picture of an input, and where the input lies on it."""

    image: "Image"  # RGB
    view: View
    name: str = ""  # its file


class Check(NamedTuple):
    """A card's maps beside their controls, `(n, t, layers)`. NaN where a control does not apply."""

    other: Tensor  # the rank correlation with the map of the likeliest other class
    mean: Tensor  # the rank correlation with `mean_cam`'s map
    random: Tensor  # the share of random orders that, as cells are removed, set the score less apart than the map's two orders
    orders: int  # the number of comparisons with random orders

    @property
    def passed(self) -> Tensor:
        """Which maps are better than all controls that apply."""
        return ~(self.other >= ALIKE) & ~(self.mean >= ALIKE) & (self.random == 1)

    @property
    def sentence(self) -> str:
        """One line for people."""
        count, failed = self.passed.numel(), int((~self.passed).sum())
        least = round(float(self.random.min()) * self.orders)
        other, mean = (float(each.nan_to_num(-2).max()) for each in (self.other, self.mean))
        another, channels = f"map of another class (correlation {other:.2f})", f"mean of the channels (correlation {mean:.2f})"
        if not failed:
            whole = "the map passes the check: it beats" if count == 1 else f"all {count} maps pass the check: they beat"
            orders = f"{whole} {self.orders} of {self.orders} random orders of the cells"
            unlike = " and ".join(f"the {name}" for name, each in ((another, other), (channels, mean)) if each > -2)
            return f"{orders}, and {'is' if count == 1 else 'are'} unlike {unlike}" if unlike else orders
        worst = f"random orders of the cells ({'it' if count == 1 else 'the worst'} beats {least} of {self.orders})"
        reasons = (
            (self.random < 1, "does not beat", "do not beat", worst),
            (self.other >= ALIKE, "is like", "are like", f"the {another}"),
            (self.mean >= ALIKE, "is like", "are like", f"the {channels}"),
        )
        found = [(int(bad.sum()), *words) for bad, *words in reasons if bad.any()]
        if count == 1:
            *first, last = [f"it {one} {what}" for _, one, _, what in found]
            return f"the map fails the check: {', '.join(first)}{', and ' if first else ''}{last}"
        told = "; ".join(f"{n} {one if n == 1 else many} {what}" for n, one, many, what in found)
        return f"{failed} of {count} maps {'fails' if failed == 1 else 'fail'} the check: {told}"


class Fields(NamedTuple):
    """The fields of `Explanation`."""

    maps: Maps
    method: str
    settings: Mapping[str, Any]  # every option of the method, given or default
    layers: tuple[str, ...]
    grids: tuple[tuple[int, ...], ...]  # the layers' grids
    classes: Tensor | None  # (n, t) class indices, for a target of classes
    scores: Tensor  # (n, t): the target's scores of the clean input
    targets: tuple[tuple[str, ...], ...]  # the names of each image's scores: "logit 281"; empty under a transform
    weights: tuple[Weights, ...]  # (n, t, c) or (n, t, c, positions) for each layer; empty if the method has none
    errors: tuple[Tensor | None, ...]  # (n, t) for each layer: the estimated error of an approximate normalized map
    forwards: int  # forward passes, counted in inputs, without those of `check`; shared ones count for each method
    backwards: int  # backward passes: gradients of one input's score
    heads: int  # activations that ran through the layers after the explained one only
    seconds: float
    findings: tuple[Finding, ...]  # observations about the maps, such as that they are flat
    versions: Mapping[str, str]  # versions of Python and the packages
    pictures: tuple[Picture, ...] = ()  # of each input, if `images=` was given
    names: tuple[str, ...] = ()  # the names of the classes, if `names=` was given
    check: Check | None = None  # the comparison with controls, if `check=True` was given


def class_name(card: Fields, image: int, target: int) -> str:
    """The name of the class that a target is about, or ""."""
    return "" if card.classes is None or not card.names else card.names[int(card.classes[image, target])]


def label(card: Fields, image: int, target: int) -> str:
    """A target and its score, such as `"logit 281 = 9.21"`."""
    return f"{card.targets[image][target]} = {float(card.scores[image, target]):.4g}"


def map_of(card: Fields, image: int, target: int, layer: int = 0) -> Tensor:
    """One map `(*sides)` of a card.

    **Raises** `CamError` if the card has no such image, target or layer.
    """
    maps = card.maps if isinstance(card.maps, tuple) else (card.maps,)
    n, t = card.scores.shape
    for what, index, count in (("image", image, n), ("target", target, t), ("layer", layer, len(maps))):
        if not isinstance(index, int):
            raise CamError(f"{what}= is an index from 0 to {count - 1}; found {index!r}")
        if not -count <= index < count:
            raise CamError(f"there is no {what} {index}: the card has {count}, and the first is 0")
    own = maps[layer][image]
    return own[target] if has_targets(card) else own


def has_targets(card: Fields) -> bool:
    """Whether the maps have an axis of targets: `(n, t, *sides)`, with as many sides as the layer's grid."""
    maps = card.maps[0] if isinstance(card.maps, tuple) else card.maps
    sides = len(card.grids[0]) if card.grids else 2
    return maps.ndim == sides + 2
