"""Compute methods by name, and make their cards."""

import functools
import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Inputs, Layers, Maps, Target
from camfn._version import __version__
from camfn.explanation import pictures
from camfn.explanation.card import Explanation
from camfn.explanation.check import checked, mean_correlations
from camfn.explanation.fields import ReadOnly
from camfn.formulas import diagnostics
from camfn.formulas.diagnostics import Finding
from camfn.methods import Need, Outcome
from camfn.methods._common import read_layer
from camfn.methods.registry import Made, method_of
from camfn.model.forward import Forward, Shared
from camfn.model.prepare import opened
from camfn.model.task import begin
from camfn.targets import Score, logits_of
from camfn.targets import names as names_of

Names: TypeAlias = Sequence[str] | Mapping[int, str] | None
AnyMethod: TypeAlias = str | Callable[..., Maps]
"""A name in `camfn.METHODS`, or a function: a method, a `functools.partial` of one, a composition, a method of the user."""


class Shown(NamedTuple):
    """The pictures of the inputs and the names of the classes, which a card shows beside the maps."""

    images: Any = None
    names: Names = None
    preprocess: Callable[[Any], Any] | None = None


@overload
def explain(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    method: AnyMethod = "score_cam",
    images: Any = None,
    names: Names = None,
    preprocess: Callable[[Any], Any] | None = None,
    check: bool = False,
    **options: Any,
) -> Explanation: ...
@overload
def explain(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    method: Sequence[AnyMethod],
    images: Any = None,
    names: Names = None,
    preprocess: Callable[[Any], Any] | None = None,
    check: bool = False,
    **options: Any,
) -> tuple[Explanation, ...]: ...
@_compat.eager
def explain(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    method: AnyMethod | Sequence[AnyMethod] = "score_cam",
    images: Any = None,
    names: Names = None,
    preprocess: Callable[[Any], Any] | None = None,
    check: bool = False,
    **options: Any,
) -> Explanation | tuple[Explanation, ...]:
    """Compute a method's maps by name, with classes, scores, weights, settings, cost and findings.

    Findings replace the warnings about maps. Several methods share the clean forward pass, and the gradients at a common layer.

    **Arguments**

    - `model`, `layer`, `x`, `target`: as in `camfn.score_cam`. `layer` is ignored for methods that take none.
    - `method`: a name in `camfn.METHODS`, or a method itself: one of camfn, a `functools.partial` of one, your own
      (`camfn.method`), or a composition. Or a sequence of these.
    - `images`: the pictures of the inputs before preprocessing, one for each: PIL images, arrays, tensors or paths. The card
      then draws the maps over them.
    - `names`: the names of the classes: a sequence, or a mapping from the indices, such as transformers' `id2label`.
    - `preprocess`: the function that made the inputs of the pictures, from a PIL image to `(channels, h, w)`, or an image
      processor of transformers. It is run on pictures of known positions (`camfn.images.view_of`) to find where the inputs lie
      on the pictures. Without it, a picture must have the proportions of its input, and the input must show all of it.
    - `check`: compare each map with controls: the map of the likeliest other class, `mean_cam`'s, and the removal of cells in
      random orders. The card has the result as `check`, and as one line of its text. It costs the method once more, and some
      fifty forward passes for each image; the card's `forwards` counts neither.
    - `options`: options of the methods. Each method gets those that it has. At least one method must have each option.

    **Returns** an `Explanation`, or a tuple of them for a sequence of methods.

    **Raises** `CamError` for an unknown method or option, for names or pictures that do not fit, and all errors of the methods.

    >>> import camfn, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> card = camfn.explain(model, "1", torch.randn(1, 3, 8, 8))
    >>> card.maps.shape, card.layers, card.grids, card.targets, card.forwards
    (torch.Size([1, 6, 6]), ('1',), ((6, 6),), (('logit 3',),), 5)
    >>> [card.backwards for card in camfn.explain(model, "1", torch.randn(1, 3, 8, 8), method=["grad_cam", "score_cam"])]
    [1, 0]
    """
    methods = [method] if isinstance(method, str) or callable(method) else method
    shown = Shown(images, names, preprocess)
    with prepared(model, layer, x, target, methods, options, shown=shown, check=check) as makes:
        cards = tuple(make() for make in makes)
    return cards if methods is method else cards[0]


@contextmanager
def prepared(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target,
    method: Sequence[AnyMethod],
    options: Mapping[str, Any],
    *,
    shown: Shown = Shown(),
    check: bool = False,
) -> Iterator[list[Callable[[], Explanation]]]:
    """Yield, for each method, a function that makes its explanation.

    The caller can continue after a method that fails, and show which method runs.
    """
    rows = [method_of(each) for each in method]
    given = [{key: value for key, value in options.items() if takes(row, key)} for row in rows]
    stray = [key for key in options if not any(key in own for own in given)]
    if stray:
        named = dict.fromkeys(row.name for row in rows)
        raise CamError(f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no option {', '.join(map(repr, stray))}")
    if check and _compat.transformed():
        raise CamError("check=True reads values: call camfn.explain outside of transforms of torch.func")
    graph = any(Need.GRADIENTS in row.needs for row in rows)
    with Shared(opened(model).prepared, x, graph=graph, several=len(rows) > 1) as shared:
        complete = _shown(shared, x, options, shown)

        def make(row: Made, own: dict[str, Any]) -> Explanation:
            return complete(_card(shared, row, (layer if row.of_layer else None, x, target), own, check))

        yield [functools.partial(make, *pair) for pair in zip(rows, given)]


def _shown(shared: Shared, x: Inputs, options: Mapping[str, Any], shown: Shown) -> Callable[[Explanation], Explanation]:
    """Check the pictures and names, and return the function that adds them to a card."""
    if shown.preprocess is not None and shown.images is None:
        raise CamError("preprocess= says where the inputs lie on their pictures: pass the pictures as images=")
    if _compat.transformed() and shown.images is not None:
        raise CamError("images= has no meaning under a transform of torch.func: call camfn.explain outside of it")
    taken, findings = (), ()
    if shown.images is not None:
        state, masked, axes = (options.get(name) for name in ("state", "masked", "axes"))
        image = begin(shared, x, state, masked, axes).batch.image
        taken, findings = pictures.taken(shown.images, image, shown.preprocess)
    named = _names(shown.names)

    def complete(card: Explanation) -> Explanation:
        _check_names(named, card, shared.last)
        return card._replace(pictures=taken, names=named, findings=(*card.findings, *findings))

    return complete


def _names(given: Names) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        raise CamError(f"names must have a name for each class; found the string {given!r}")
    if isinstance(given, Mapping):
        indices = sorted(map(int, given))
        if indices != list(range(len(given))):
            raise CamError(
                f"names must name the classes 0 to {len(given) - 1}; found {', '.join(map(repr, list(given)[:5]))}, ..."
            )
        by_index = {int(index): name for index, name in given.items()}
        return tuple(str(by_index[index]) for index in indices)
    return tuple(map(str, given))


def _check_names(named: tuple[str, ...], card: Explanation, forward: Forward | None) -> None:
    """Raise CamError if there is not one name for each class."""
    if not named or card.classes is None or _compat.transformed():
        return
    largest, count = int(card.classes.max()), _classes_of(forward)
    if count is not None and count != len(named):
        raise CamError(f"names has {len(named)} names, and the model has {count} classes")
    if largest >= len(named):
        raise CamError(f"names has {len(named)} names, and the card explains class {largest}: pass a name for each class")


def _classes_of(forward: Forward | None) -> int | None:
    """The number of classes of the clean output, if it has a row of logits for each image."""
    try:
        logits = None if forward is None else logits_of(forward.output)
    except CamError:  # an output that only a target of its own reads
        return None
    return logits.shape[1] if logits is not None and logits.ndim == 2 else None


def _parameters(row: Made) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(row.run).parameters


def takes(row: Made, option: str) -> bool:
    """Whether a method has an option. A composition hands all others to its method."""
    own = _parameters(row)
    return option in own or any(p.kind == inspect.Parameter.VAR_KEYWORD for p in own.values())


def _card(shared: Shared, row: Made, arguments: tuple[Any, ...], options: dict[str, Any], check: bool) -> Explanation:
    """Run one method, and make its explanation."""
    start, shared.last = time.perf_counter(), None
    outcome = row.run(shared, *arguments, **options)
    seconds, forward = time.perf_counter() - start, shared.last
    named = [p for p in _parameters(row).values() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    settings = {p.name: p.default for p in named} | options
    fields: dict[str, Any] = outcome._asdict()
    fields["targets"] = _named(fields.pop("score"), outcome.scores)
    found = [each for each in outcome.findings if each.kind != "no gradient" or Need.GRADIENTS in row.needs]  # of this method
    lost = {each.layer for each in found if each.kind == "no gradient"}
    about = [each for each in _about(outcome, row, settings, forward) if each.layer not in lost]
    fields["findings"] = (*found, *fields.pop("remarks"), *about)
    fields["check"] = checked(shared, row, arguments, options, outcome, settings.get("layout")) if check else None
    return Explanation(method=row.name, settings=ReadOnly(settings), seconds=seconds, versions=ReadOnly(_versions()), **fields)


def _named(score: Score, scores: Tensor) -> tuple[tuple[str, ...], ...]:
    """The names of each image's scores; empty under a transform."""
    return () if _compat.transformed() else names_of(score, scores.shape[1])


def _about(outcome: Outcome, row: Made, settings: Mapping[str, Any], forward: Forward | None) -> tuple[Finding, ...]:
    """Findings about weights, activations and gradients; none under a transform, where values cannot be read."""
    if _compat.transformed():
        return ()
    found = [Finding("about the target", "", 1.0, remark) for remark in outcome.score.remarks]
    if "recipe" in settings:
        found += diagnostics.about_weights([each.detach() for each in outcome.weights], outcome.layers)
    layout = settings.get("layout", "auto")
    if forward is not None and Need.ACTIVATIONS in row.needs:
        reads = [read_layer(forward, *each, layout) for each in zip(forward.layers, forward.activations)]
        found += diagnostics.about_activations([part.values for part in reads], forward.layers)
        if row.name != "mean_cam":
            found += diagnostics.about_agreement(mean_correlations(outcome.maps, forward, layout), forward.layers)
        gradients = next((value for key, value in forward.task.facts.items() if key[0] == "gradients"), None)
        if Need.GRADIENTS in row.needs and gradients is not None:
            found += diagnostics.about_gradients(gradients, forward.layers)
    return tuple(found)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "camfn": __version__}
