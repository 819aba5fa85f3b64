"""Maps with the scores, weights, cost and findings behind them."""

import inspect
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, closest
from camfn._types import Inputs, Layers, Maps, Target, Weights
from camfn._version import __version__
from camfn.formulas import diagnostics
from camfn.formulas.diagnostics import Finding
from camfn.methods import METHODS, Method, Need, Outcome
from camfn.methods._common import read_layer
from camfn.model.forward import Forward, Shared
from camfn.model.gradients import detached
from camfn.model.prepare import opened
from camfn.targets import Score, names


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


class Explanation(NamedTuple):
    """The result of `explain`: the maps, with scores, weights, settings, cost and findings.

    It can be pickled, copied, saved by `torch.save`, and returned by a worker of a `DataLoader`. The copy has no graph. A
    setting that cannot be pickled, such as a lambda, is replaced by its name.
    """

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
    forwards: int  # forward passes, counted in inputs; each method of a call counts the shared ones
    backwards: int  # backward passes: gradients of one input's score
    heads: int  # activations that ran through the layers after the explained one only
    seconds: float
    findings: tuple[Finding, ...]  # observations about the maps, such as that they are flat
    versions: Mapping[str, str]  # versions of Python and the packages

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentences of the findings."""
        return tuple(finding.sentence for finding in self.findings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Explanation, tuple(tree_map(detached, tuple(self)))


@overload
def explain(
    model: nn.Module, layer: Layers, x: Inputs, target: Target = None, *, method: str = "score_cam", **options: Any
) -> Explanation: ...
@overload
def explain(
    model: nn.Module, layer: Layers, x: Inputs, target: Target = None, *, method: Sequence[str], **options: Any
) -> tuple[Explanation, ...]: ...
def explain(
    model: nn.Module,
    layer: Layers,
    x: Inputs,
    target: Target = None,
    *,
    method: str | Sequence[str] = "score_cam",
    **options: Any,
) -> Explanation | tuple[Explanation, ...]:
    """Compute a method's maps by name, with classes, scores, weights, settings, cost and findings.

    Findings replace the warnings about maps. Several methods share the clean forward pass, and the gradients at a common layer.

    **Arguments**

    - `model`, `layer`, `x`, `target`: as in `camfn.score_cam`. `layer` is ignored for methods that take none.
    - `method`: a name in `camfn.METHODS`, or a sequence of names.
    - `options`: options of the methods. Each method gets those that it has. At least one method must have each option.

    **Returns** an `Explanation`, or a tuple of them for a sequence of methods.

    **Raises** `CamError` for an unknown method or option, and all errors of the methods.

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
    with prepared(model, layer, x, target, [method] if isinstance(method, str) else method, options) as makes:
        cards = tuple(make() for make in makes)
    return cards[0] if isinstance(method, str) else cards


@contextmanager
def prepared(
    model: nn.Module, layer: Layers, x: Inputs, target: Target, method: Sequence[str], options: Mapping[str, Any]
) -> Iterator[list[Callable[[], Explanation]]]:
    """Yield, for each method, a function that makes its explanation.

    The caller can continue after a method that fails, and show which method runs.
    """
    rows = {name: _row_of(name) for name in method}
    given = {name: {key: value for key, value in options.items() if key in _parameters(row)} for name, row in rows.items()}
    stray = [key for key in options if not any(key in own for own in given.values())]
    if stray:
        raise CamError(f"{', '.join(rows)} {'has' if len(rows) == 1 else 'have'} no option {', '.join(map(repr, stray))}")
    layers = {name: layer if row.of_layer else None for name, row in rows.items()}
    graph = any(Need.GRADIENTS in row.needs for row in rows.values())
    with Shared(opened(model).prepared, x, graph=graph, several=len(rows) > 1) as shared:
        yield [partial(_card, shared, name, rows[name], (layers[name], x, target), given[name]) for name in method]


def _row_of(name: str) -> Method:
    if name not in METHODS:
        raise CamError(f"no method named {name!r}; closest: {closest(name, METHODS)}; all: {', '.join(METHODS)}")
    return METHODS[name]


def _parameters(row: Method) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(row.run).parameters


def _card(shared: Shared, name: str, row: Method, arguments: tuple[Any, ...], options: dict[str, Any]) -> Explanation:
    """Run one method, and make its explanation."""
    start, shared.last = time.perf_counter(), None
    outcome = row.run(shared, *arguments, **options)
    seconds = time.perf_counter() - start
    named = [p for p in _parameters(row).values() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    settings = {p.name: options.get(p.name, p.default) for p in named}
    fields: dict[str, Any] = outcome._asdict()
    fields["targets"] = _named(fields.pop("score"), outcome.scores)
    found = [each for each in outcome.findings if each.kind != "no gradient" or Need.GRADIENTS in row.needs]  # of this method
    lost = {each.layer for each in found if each.kind == "no gradient"}
    about = [each for each in _about(outcome, row, settings, shared.last) if each.layer not in lost]
    fields["findings"] = (*found, *fields.pop("remarks"), *about)
    return Explanation(method=name, settings=ReadOnly(settings), seconds=seconds, versions=ReadOnly(_versions()), **fields)


def _named(score: Score, scores: Tensor) -> tuple[tuple[str, ...], ...]:
    """The names of each image's scores; empty under a transform."""
    return () if _compat.transformed() else names(score, scores.shape[1])


def _about(outcome: Outcome, row: Method, settings: Mapping[str, Any], forward: Forward | None) -> tuple[Finding, ...]:
    """Findings about weights, activations and gradients; none under a transform, where values cannot be read."""
    if _compat.transformed():
        return ()
    found = [Finding("about the target", "", 1.0, remark) for remark in outcome.score.remarks]
    if "recipe" in settings:
        found += diagnostics.about_weights([each.detach() for each in outcome.weights], outcome.layers)
    if forward is not None and Need.ACTIVATIONS in row.needs:
        reads = [read_layer(forward, *each, settings["layout"]) for each in zip(forward.layers, forward.activations)]
        found += diagnostics.about_activations([part.values for part in reads], forward.layers)
        gradients = next((value for key, value in forward.task.facts.items() if key[0] == "gradients"), None)
        if Need.GRADIENTS in row.needs and gradients is not None:
            found += diagnostics.about_gradients(gradients, forward.layers)
    return tuple(found)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "camfn": __version__}
