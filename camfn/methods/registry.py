"""The table of methods, and the decorator that makes a public function and its row in the table."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor

from camfn import _compat
from camfn._errors import CamError, suggested, warn
from camfn._types import Maps, Weights
from camfn.formulas.diagnostics import Finding
from camfn.model.prepare import prepares
from camfn.targets import Score

P = ParamSpec("P")


class Outcome(NamedTuple):
    """A method's maps, with their origin and cost."""

    maps: Maps
    layers: tuple[str, ...]
    grids: tuple[tuple[int, ...], ...]  # the layers' grids
    classes: Tensor | None  # (n, t), for a target of classes
    scores: Tensor  # (n, t), of the clean input
    score: Score  # the score that was explained
    weights: tuple[Weights, ...]  # (n, t, c) for each layer, for methods with a weight per channel
    forwards: int  # forward passes, counted in inputs
    backwards: int  # gradients of an input's score
    findings: tuple[Finding, ...]  # warnings about the maps
    heads: int = 0  # activations that ran through the layers after the explained one only
    errors: tuple[Tensor | None, ...] = ()  # (n, t) for each layer: the error of an approximate normalized map
    remarks: tuple[Finding, ...] = ()  # findings that `explain` reports, and that raise no warning

    @property
    def single(self) -> bool:
        """Whether there is one map per image, without an axis of targets."""
        return self.score.single


class Need(str, Enum):
    """What a method needs of a model or an input."""

    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    MASKED_INPUTS = "masked inputs"
    HEAD = "head"
    LINEAR_HEAD = "linear head"
    ATTENTION = "attention"
    BIASES = "biases"
    ANY_SIZE = "any size"
    """Inputs of sizes other than that of x."""

    def __str__(self) -> str:
        return self.value


class Cost(NamedTuple):
    """The cost of a method with its defaults, for each image, layer and target.

    Forward passes that a call makes once, to inspect the model, are not included.

    >>> str(Cost(1, per_channel=35)), str(Cost(2, masked=32, backwards=1)), str(Cost(1, head=1, head_per_channel=1))
    ('35 x channels + 1', '32 + 2, 1 backward', '1, channels + 1 head')
    """

    forwards: int = 1
    """Forward passes of inputs that are not masked."""
    masked: int = 0
    """Masked inputs, for any number of channels."""
    per_channel: int = 0
    """Masked inputs for each channel."""
    backwards: int = 0
    """Gradients of one target's score."""
    head: int = 0
    """Activations through the layers after the explained one."""
    head_per_channel: int = 0
    head_per_position: int = 0

    def __str__(self) -> str:
        forwards = _sum(_times(self.per_channel, "channels"), self.masked, self.forwards)
        head = _sum(_times(self.head_per_channel, "channels"), _times(self.head_per_position, "positions"), self.head)
        parts = forwards, f"{self.backwards} backward" if self.backwards else "", f"{head} head" if head else ""
        return ", ".join(part for part in parts if part)


def _sum(*terms: int | str) -> str:
    return " + ".join(str(term) for term in terms if term)


def _times(count: int, what: str) -> str:
    return "" if not count else what if count == 1 else f"{count} x {what}"


class Method(NamedTuple):
    """A row of `camfn.METHODS`."""

    function: Callable[..., Maps]
    """The public function."""
    run: Callable[..., Outcome]
    """The same function with all of its outcome: maps, weights, scores, cost."""
    formula: Callable[..., Any]
    """The equation of its paper, a function of tensors in `camfn.formulas`."""
    needs: frozenset[Need]
    cost: Cost

    @property
    def of_layer(self) -> bool:
        """Whether the method explains a layer. Other methods require `None` for the layer."""
        return vars(self.function)["of_layer"]


_TABLE: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
"""Every method by name, with its function, formula, requirements and cost."""


def method(
    formula: Callable[..., Any], needs: tuple[Need, ...], cost: Cost = Cost()
) -> Callable[[Callable[P, Outcome]], Callable[P, Maps]]:
    """Make the public function, which returns only the maps, and add its row to the table."""

    def register(of: Callable[P, Outcome]) -> Callable[P, Maps]:
        function = published(of, Need.ACTIVATIONS in needs, needs)
        _TABLE[of.__name__] = Method(function, vars(function)["run"], formula, frozenset(needs), cost)
        return function

    return register


def published(of: Callable[P, Outcome], of_layer: bool, needs: Iterable[Need]) -> Callable[P, Maps]:
    """Make the public function of a method, which returns only the maps, and warns about them.

    Its attribute `run` returns the whole outcome, for compositions. Its attribute `of_layer` tells whether the method explains
    a layer, and `needs` what it needs.
    """

    @functools.wraps(of)
    def run(*args: P.args, **kwargs: P.kwargs) -> Outcome:
        with _compat.unnarrowed():
            return prepares(of)(*args, **kwargs)

    @functools.wraps(of)
    @_compat.eager
    def function(*args: P.args, **kwargs: P.kwargs) -> Maps:
        outcome = run(*args, **kwargs)
        for finding in outcome.findings:
            warn(finding.sentence)
        return outcome.maps

    # `functools.wraps` would show the signature of the inner function, which returns an Outcome.
    function.__annotations__ = {**of.__annotations__, "return": Maps}
    vars(function)["__signature__"] = inspect.signature(of).replace(return_annotation=Maps)
    vars(function).update(run=run, of_layer=of_layer, needs=frozenset(needs))
    return function


class Made(NamedTuple):
    """Any method: a row of `METHODS`, a user's own, or a composition."""

    name: str
    run: Callable[..., Outcome]
    of_layer: bool
    needs: frozenset[Need]


def method_of(method: str | Callable[..., Maps]) -> Made:
    """Return a method, given by its name in `METHODS` or as a function."""
    if not isinstance(method, str):
        return made(method)
    if method not in METHODS:
        raise CamError(f"no method named {method!r}{suggested(method, METHODS)}; all: {', '.join(METHODS)}")
    return made(METHODS[method].function)


def made(method: Callable[..., Maps]) -> Made:
    """Return a method, given as a function or as a `functools.partial` of one."""
    if isinstance(method, functools.partial):
        inner = made(method.func)
        return inner._replace(run=functools.partial(inner.run, *method.args, **method.keywords))
    held = getattr(method, "__dict__", {})
    if not {"run", "of_layer", "needs"} <= set(held):
        raise CamError(
            f"{method!r} is no method: give one of camfn (camfn.grad_cam), a functools.partial of one, which sets its options, "
            "a method of your own (camfn.method), or the result of camfn.smooth and the other compositions"
        )
    return Made(getattr(method, "__name__", "a method"), held["run"], held["of_layer"], held["needs"])
