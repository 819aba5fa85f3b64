"""Judge methods and controls on batches of images."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from camfn._errors import CamError
from camfn._types import Layer, State, Target
from camfn.evaluation.judged import OF_SCORES, Asked, Images, Judged, Makes
from camfn.evaluation.measures import Measure, chosen
from camfn.evaluation.result import Evaluation, Gathered
from camfn.explanation import AnyMethod, explain
from camfn.explanation.explain import takes
from camfn.methods import METHODS
from camfn.methods.registry import method_of
from camfn.metrics.controls import CONTROL_METHODS, CONTROLS
from camfn.model.prepare import Prepared, prepare

SIGNED: Mapping[str, Any] = {"relu": False, "normalize": False}
"""Maps are judged signed and unscaled. A metric that wants masks in [0, 1] makes them of these."""


def evaluate(
    model: nn.Module | Prepared,
    layer: Layer | None,
    batches: Iterable[Mapping[str, Any]],
    *,
    methods: str | Sequence[AnyMethod] | Mapping[str, AnyMethod],
    metrics: str | Sequence[str] | None = None,
    controls: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Judge methods on images, beside controls that do not depend on the class.

    The forward pass and the gradients of a batch are shared by the methods, and its scores by all metrics.

    **Arguments**

    - `model`, `layer`: as in `camfn.grad_cam`: one layer.
    - `batches`: mappings with the inputs `"x"` and, where you have them, `"target"`: one target for each image, the predicted
      class by default; `"masks"`, bools `(n, h, w)` of the explained object, of the input's size; `"boxes"`, for each image
      `(k, 4)` numbers x0, y0, x1, y1 in pixels of the input; `"others"`, bools `(n, h, w)` of the objects of other classes. A
      generator will do: each batch is read once.
    - `methods`: names in `camfn.METHODS`, functions, as of `camfn.method` or `camfn.smooth`, or `"all"`. A mapping gives them
      names of your own: `{"paper": functools.partial(camfn.score_cam, recipe="paper"), ...}`.
    - `metrics`: names in `camfn.evaluation.MEASURES`, or `"all"`. By default, those that are cheap and that the annotation
      allows.
    - `controls`: whether `camfn.metrics.CONTROLS`, `mean_cam` and `random_cam` are judged too.
    - `seed`: the seed of random orders, of noise, of the permuted classes and of the intervals.
    - `progress`: is called with the name of each method, for each batch, after it is judged.
    - `options`: options of the methods. `state`, `axes` and `masked` hold for the scores too.

    **Returns** an `Evaluation`: a table with intervals, and a picture. A method that fails on some batch is left out, with the
    reason in `skipped`, also if your own code raised the error.

    **Raises** `CamError` for an unknown method, metric or option, for two methods of one name, for a batch that lacks what the
    first has, or if all methods fail.

    >>> import camfn
    >>> from camfn import demo
    >>> scenes = [demo.scene(seed) for seed in range(4)]
    >>> x, masks = torch.stack([demo.preprocess(s.image) for s in scenes]), torch.stack([s.masks[0] for s in scenes])
    >>> found = camfn.evaluate(demo.network(), "features", [{"x": x, "masks": masks}], methods=["grad_cam"], metrics=["energy"])
    >>> found.interval("grad_cam", "energy").mean > found.interval("mean_cam", "energy").mean
    True
    """
    given = _Methods(prepare(model), layer, methods, controls, options)
    return judge(given, batches, metrics, seed, progress or (lambda name: None))


class Given(Protocol):
    """Where the maps of an evaluation come from."""

    model: Prepared
    options: Mapping[str, Any]
    """The options of the methods."""
    note: str
    """What the maps are, if they are not signed and unscaled."""
    origins: Mapping[str, str]
    """The method of each name, where they differ."""
    names: tuple[str, ...]
    """The methods and controls."""
    controls: tuple[str, ...]

    def judged(self, about: Asked, gathered: Gathered) -> Iterator[tuple[str, Judged]]:
        """The maps of each method for a batch, and then those of each control."""
        ...


def judge(
    given: Given,
    batches: Iterable[Mapping[str, Any]],
    metrics: str | Sequence[str] | None,
    seed: int,
    progress: Callable[[str], None],
) -> Evaluation:
    """Ask all metrics about all maps."""
    gathered, measures, left = Gathered(given.names, given.controls), {}, {}
    for number, batch in enumerate(_checked(batches)):
        if number == 0:
            there = {name for name in ("masks", "boxes", "others") if getattr(batch, name) is not None}
            measures, left = chosen(metrics, there)
            if not measures:
                told = "; ".join(f"{name}: {why}" for name, why in left.items()) or "none was asked"
                raise CamError(f"no metric can be computed: {told}")
        for name, judged in given.judged(Asked(given.model, batch, seed, given.options), gathered):
            _measure(name, judged, measures, gathered)
            progress(name)
    return gathered.result(measures, left, seed)._replace(note=given.note, origins=given.origins)


def _measure(name: str, judged: Judged, measures: Mapping[str, Measure], gathered: Gathered) -> None:
    for metric, measure in measures.items():
        try:
            found = measure.of(judged).detach().cpu()
            if metric == "deletion":
                gathered.add_curve(name, judged.deletion)
        except Exception as error:  # a method of the user's may raise anything
            found = None
            gathered.cannot(metric, name, error)
        gathered.add(name, metric, found, len(judged.x))


def _checked(batches: Iterable[Mapping[str, Any]]) -> Iterator[Images]:
    first: set[str] = set()
    if isinstance(batches, (Mapping, Tensor)):
        raise CamError(f"batches must be several mappings, such as [{{'x': x}}], found one {type(batches).__name__}")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise CamError(f"batch {number} is a {type(batch).__name__}: it must be a mapping, such as {{'x': x, 'target': y}}")
        unknown = set(batch) - set(Images._fields)
        if "x" not in batch or unknown:
            raise CamError(
                f"batch {number} has the keys {', '.join(map(repr, batch))}: it must have 'x', and may have "
                f"{', '.join(map(repr, Images._fields[1:]))}"
            )
        _check_masks(number, batch)
        given = {name for name, value in batch.items() if value is not None}
        first = first or given
        if given != first:
            raise CamError(f"batch {number} has {', '.join(sorted(given))}, and the first {', '.join(sorted(first))}")
        yield Images(**batch)
    if not first:
        raise CamError("batches is empty: pass at least one image")


def _check_masks(number: int, batch: Mapping[str, Any]) -> None:
    for name in ("masks", "others"):
        found = batch.get(name)
        if found is not None and not (isinstance(found, Tensor) and found.dtype == torch.bool):
            kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise CamError(f"{name} of batch {number} are {kind}: they must be a tensor of bools, (n, *size)")


def _named(methods: str | Sequence[AnyMethod] | Mapping[str, AnyMethod], controls: bool) -> dict[str, AnyMethod]:
    """The methods by name, and the controls that are methods."""
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    else:
        given = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) or callable(methods) else methods
        pairs = [(method_of(each).name, each) for each in given]
    found = dict(pairs)
    own = [name for name in found if not controls or name not in CONTROL_METHODS]
    if not own:
        raise CamError(
            f"methods has only controls ({', '.join(found)}): name a method, or pass controls=False"
            if found
            else "methods is empty"
        )
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    taken = [name for name in own if controls and name in CONTROLS]
    taken += [name for name in found if name not in own and found[name] not in (name, METHODS[name].function)]
    if twice or taken:
        why = "two methods are" if twice else "a control is"
        raise CamError(f"{why} called {(twice + taken)[0]!r}: pass a mapping, methods={{'a name': method, ...}}")
    return {**found, **{name: name for name in CONTROL_METHODS if controls}}


def _check_layer(layer: Layer | None) -> None:
    if isinstance(layer, (list, tuple)):
        raise CamError(f"layer={layer!r} must be one layer: evaluate one layer at a time")


class _Methods:
    """The methods and controls of an evaluation, by name."""

    def __init__(
        self,
        model: Prepared,
        layer: Layer | None,
        methods: str | Sequence[AnyMethod] | Mapping[str, AnyMethod],
        controls: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self._layer, self.options, self.note = model, layer, options, ""
        self._rows = _named(methods, controls)
        of = {name: method_of(each).name for name, each in self._rows.items()}
        self.origins: Mapping[str, str] = MappingProxyType({name: origin for name, origin in of.items() if name != origin})
        _check_layer(layer)
        self._check_options()
        self.controls = (*(CONTROL_METHODS if controls else ()), *(CONTROLS if controls else ()))
        self.names = (*self._rows, *(CONTROLS if controls else ()))
        self._seen = 0

    def _check_options(self) -> None:
        rows = [method_of(each) for each in self._rows.values()]
        stray = [key for key in self.options if key not in OF_SCORES and not any(takes(row, key) for row in rows)]
        if stray:
            raise CamError(f"no method of {', '.join(self._rows)} has an option {', '.join(map(repr, stray))}")
        fixed = [key for key in self.options if key in ("x", "target", *SIGNED)]
        if fixed:
            raise CamError(
                f"evaluate has no option {fixed[0]}=: inputs and targets are in the batches, and maps are signed and unscaled"
            )

    def judged(self, about: Asked, gathered: Gathered) -> Iterator[tuple[str, Judged]]:
        """The maps of each method, and then of each control, on the grid of the methods."""
        yield from in_turn(
            {name: self._makes(row, about) for name, row in self._rows.items()}, self, about, self._seen, gathered
        )
        self._seen += len(about.x)

    def _makes(self, row: AnyMethod, about: Asked) -> Makes:
        own = {key: value for key, value in {**self.options, **SIGNED}.items() if takes(method_of(row), key)}

        def makes(x: Tensor | None = None, target: Target = None, state: State | None = None) -> Tensor:
            given = own if state is None else {**own, "state": state}
            if state is not None and not takes(method_of(row), "state"):
                raise CamError(f"{method_of(row).name} has no option state=")
            model: Any = self.model
            inputs = about.images.x if x is None else about.whole(x)
            maps = explain(model, self._layer, inputs, target, method=row, **given).maps
            if not isinstance(maps, Tensor):
                raise CamError(f"the method gives maps of {len(maps)} layers: evaluate one layer at a time")
            return maps.detach()

        return makes


def in_turn(
    methods: Mapping[str, Makes], given: Given, about: Asked, seen: int, gathered: Gathered
) -> Iterator[tuple[str, Judged]]:
    """The maps of each method, but of those that failed, and then of each control that no method makes."""
    grid: tuple[int, ...] | None = None
    for name, makes in methods.items():
        if name in gathered.skipped:
            continue
        try:
            maps = makes(target=about.target)
        except Exception as error:  # a method of the user's may raise anything
            gathered.skip(name, error)
            continue
        grid = grid or tuple(maps.shape[1:])
        yield name, Judged(about, makes, maps)
    for name, makes in drawn(given.controls, grid, about, seen):
        yield name, Judged(about, makes, makes())


def drawn(names: Sequence[str], grid: Sequence[int] | None, about: Asked, seen: int) -> Iterator[tuple[str, Makes]]:
    """The controls that no method makes, on the grid of the methods. Images are counted, so that a batch changes no map."""

    def makes(name: str, x: Tensor | None = None, target: Target = None, state: State | None = None) -> Tensor:
        pictures = about.x if x is None else x
        each = [CONTROLS[name](own, grid or (), about.seed + seen + i) for i, own in enumerate(pictures.split(1))]
        return torch.cat(each)

    for name in names if grid else ():
        if name in CONTROLS:
            yield name, functools.partial(makes, name)
