"""What all compositions share: a question, put to a method again and again, and an outcome made of the answers."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Inputs, Layers, Layout, Maps, Size, State, Target
from camfn.formulas import maps
from camfn.methods._common import Drawing, explained, without_layer
from camfn.methods.registry import Outcome, published
from camfn.model.forward import look
from camfn.model.inputs import Batch, Key
from camfn.targets import Clean as Output
from camfn.targets import named


class Made(NamedTuple):
    """A method, as a composition uses it."""

    name: str
    run: Callable[..., Outcome]
    of_layer: bool


def made(method: Callable[..., Maps]) -> Made:
    """A method of camfn, a `functools.partial` of one, or a composition."""
    if isinstance(method, functools.partial):
        inner = made(method.func)
        return inner._replace(run=functools.partial(inner.run, *method.args, **method.keywords))
    held = getattr(method, "__dict__", {})
    if "run" not in held or "of_layer" not in held:
        raise CamError(
            f"{method!r} is no method: give one of camfn (camfn.grad_cam), a functools.partial of one, which sets its options, "
            "or what camfn.smooth and its like return"
        )
    return Made(getattr(method, "__name__", "a method"), held["run"], held["of_layer"])


class Question(NamedTuple):
    """The arguments that all methods share, and options of the method asked."""

    model: nn.Module
    layer: Layers
    x: Inputs
    target: Target
    masked: Key
    state: State | None
    layout: Layout
    size: Size
    relu: bool | None  # None: as the method has it
    normalize: bool
    own: dict[str, Any]

    def put_to(self, method: Made, **changes: Any) -> Outcome:
        """What the method says, asked the same but for some options."""
        given: dict[str, Any] = {**self.own, "state": self.state, "layout": self.layout, "size": self.size, **changes}
        if self.relu is not None:
            given["relu"] = self.relu
        if self.masked is not None and "masked" in inspect.signature(method.run).parameters:
            given["masked"] = self.masked
        return method.run(self.model, self.layer, self.x, self.target, **given)


class Clean(NamedTuple):
    """A question with its target settled on the clean input, and what one forward of that told."""

    question: Question
    batch: Batch
    outcome: Outcome  # without maps

    @property
    def image(self) -> Tensor:
        """The clean image."""
        return self.batch.image

    def put_to(self, method: Made, image: Tensor, **changes: Any) -> Outcome:
        """The question about another image in the place of the clean one."""
        return self.question._replace(x=self.batch.with_image(image).x).put_to(method, **changes)

    def axes_of(self, found: Tensor) -> int:
        """How many axes of a map are spatial."""
        return found.ndim - (1 if self.outcome.single else 2)


def look_at(question: Question) -> Clean:
    """The clean forward: from here on `None` is one class, whatever is made of x."""
    model, _, x, target, masked, state, layout, *_ = question
    forward = look(model, None, x, state, masked, masks=True, taps=False)
    found = explained(forward, target, Drawing(False, None, False, layout))
    outcome = Outcome((), (), (), found.score.classes, found.clean, found.score, (), forward.forwards, 0, ())
    settled = named(target).settled(Output(forward.output, forward.n, forward.image.device))
    return Clean(question._replace(x=forward.batch.x, target=settled), forward.batch, outcome)


def composed(name: str, answer: Callable[[Question], Outcome], of_layer: bool) -> Callable[..., Maps]:
    """The public function of a composition."""

    def run(
        model: nn.Module,
        layer: Layers,
        x: Inputs,
        target: Target = None,
        *,
        masked: Key = None,
        state: State | None = None,
        layout: Layout = "auto",
        size: Size = None,
        relu: bool | None = None,
        normalize: bool = True,
        **own: Any,
    ) -> Outcome:
        if not of_layer:
            without_layer(name, layer)
        return answer(Question(model, layer, x, target, masked, state, layout, size, relu, normalize, own))

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"`{name}`, of the arguments that all methods share, and those of the method that it was given."
    return published(run, of_layer)


def joined(found: Maps, parts: Sequence[Outcome], clean: Outcome) -> Outcome:
    """An outcome with these maps, for what the parts told and cost. `clean`, one of them or not, has the scores that count."""
    every = {id(part): part for part in (*parts, clean)}.values()
    forwards, backwards, heads = (sum(costs) for costs in zip(*((p.forwards, p.backwards, p.heads) for p in every)))
    told = {finding.sentence: finding for part in parts for finding in part.findings}
    at = parts[0].layers, parts[0].grids, clean.classes, clean.scores, clean.score
    return Outcome(found, *at, (), forwards, backwards, tuple(told.values()), heads)


def each_layer(function: Callable[..., Tensor], *parts: Maps) -> Maps:
    """A function of several maps; for each layer, where there are several."""
    counts = [len(part) for part in parts if not isinstance(part, Tensor)]
    if not counts:
        return function(*parts)
    spread = [(part,) * counts[0] if isinstance(part, Tensor) else part for part in parts]  # a map of no layer goes with all
    return tuple(function(*some) for some in zip(*spread))


def scaled(found: Tensor, axes: int, wanted: bool) -> Tensor:
    """Min-max over the last axes, if it is wanted."""
    return maps.normalize(found, tuple(range(-axes, 0))) if wanted else found
