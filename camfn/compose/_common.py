"""Shared code of the compositions: call a method repeatedly with changed arguments, and combine the outcomes."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from camfn._types import Inputs, Layers, Layout, Maps, Size, State, Target
from camfn.formulas import maps
from camfn.methods._common import Drawing, explained, without_layer
from camfn.methods.registry import Made, Need, Outcome, published
from camfn.model.forward import another_batch, look
from camfn.model.inputs import Batch, Key
from camfn.targets import settled


class Question(NamedTuple):
    """The arguments that all methods share, with the method's own options."""

    model: nn.Module
    layer: Layers
    x: Inputs
    target: Target
    masked: Key
    axes: str | None
    state: State | None
    layout: Layout
    size: Size
    relu: bool | None  # None: the method's default
    normalize: bool
    own: dict[str, Any]

    def put_to(self, method: Made, **changes: Any) -> Outcome:
        """Call a method with these arguments, some of them changed."""
        own = {"axes": self.axes, "state": self.state, "layout": self.layout, "size": self.size}
        given: dict[str, Any] = {**self.own, **own, **changes}
        if self.relu is not None:
            given["relu"] = self.relu
        if self.masked is not None and "masked" in inspect.signature(method.run).parameters:
            given["masked"] = self.masked
        return method.run(self.model, self.layer, self.x, self.target, **given)


class Clean(NamedTuple):
    """A question whose target is resolved on the clean input, with the outcome of the clean forward pass."""

    question: Question
    batch: Batch
    outcome: Outcome  # without maps

    @property
    def image(self) -> Tensor:
        """The clean image."""
        return self.batch.image

    def put_to(self, method: Made, image: Tensor, **changes: Any) -> Outcome:
        """Call a method on another image."""
        return self.question._replace(x=self.batch.with_image(image).x).put_to(method, **changes)

    def axes_of(self, found: Tensor) -> int:
        """The number of spatial axes of a map."""
        return found.ndim - (1 if self.outcome.single else 2)


def look_at(question: Question) -> Clean:
    """Run the clean forward pass, and resolve the target. `None` becomes one class for all changed inputs."""
    model, _, x, target, masked, axes, state, layout, *_ = question
    forward = look(model, None, x, state, masked, axes, masks=True, taps=False)
    found = explained(forward, target, Drawing(False, None, False, layout, axes))
    outcome = Outcome((), (), (), found.score.classes, found.clean, found.score, (), forward.forwards, 0, ())
    fixed = settled(target, forward.output, forward.n, forward.image.device, functools.partial(another_batch, forward))
    return Clean(question._replace(x=forward.batch.x, target=fixed), forward.batch, outcome)


def composed(name: str, answer: Callable[[Question], Outcome], of_layer: bool, needs: Iterable[Need]) -> Callable[..., Maps]:
    """Make the public function of a composition."""

    def run(
        model: nn.Module,
        layer: Layers,
        x: Inputs,
        target: Target = None,
        *,
        masked: Key = None,
        axes: str | None = None,
        state: State | None = None,
        layout: Layout = "auto",
        size: Size = None,
        relu: bool | None = None,
        normalize: bool = True,
        **own: Any,
    ) -> Outcome:
        if not of_layer:
            without_layer(name, layer)
        return answer(Question(model, layer, x, target, masked, axes, state, layout, size, relu, normalize, own))

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"`{name}`: takes the arguments that all methods share, and those of the given method."
    return published(run, of_layer, needs)


def joined(found: Maps, parts: Sequence[Outcome], clean: Outcome) -> Outcome:
    """Return an outcome with these maps, the total cost of the parts, their findings, and the scores of `clean`."""
    every = {id(part): part for part in (*parts, clean)}.values()
    forwards, backwards, heads = (sum(costs) for costs in zip(*((p.forwards, p.backwards, p.heads) for p in every)))
    findings = {finding.sentence: finding for part in parts for finding in part.findings}
    at = parts[0].layers, parts[0].grids, clean.classes, clean.scores, clean.score
    return Outcome(found, *at, (), forwards, backwards, tuple(findings.values()), heads)


def each_layer(function: Callable[..., Tensor], *parts: Maps) -> Maps:
    """Apply a function to several maps, layer by layer if there are several layers."""
    counts = [len(part) for part in parts if not isinstance(part, Tensor)]
    if not counts:
        return function(*parts)
    # A map without a layer is paired with every layer.
    spread = [(part,) * counts[0] if isinstance(part, Tensor) else part for part in parts]
    return tuple(function(*some) for some in zip(*spread))


def scaled(found: Tensor, axes: int, wanted: bool) -> Tensor:
    """Apply min-max normalization over the last axes if `wanted`."""
    return maps.normalize(found, tuple(range(-axes, 0))) if wanted else found
