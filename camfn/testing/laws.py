"""What holds for every method, as functions of a method and a case.

A law takes a method (of camfn, a `functools.partial` of one, your own, a composition) and a case: the model, layer, input and
target. It raises an `AssertionError` that says in one sentence what does not hold, with the numbers. Where a law says
nothing of a method or a case (`speaks_of`), it holds. Signed and unscaled maps are compared, unless the law is about the scale.

- `units`: the units of rounding (see `camfn.testing.close`) by which maps that are computed in two ways may differ.

`check` checks all laws on a method, and `check_model` on a model.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from camfn._errors import CamError
from camfn._types import Maps, wide
from camfn.methods.registry import Made, Need, Outcome, method_of
from camfn.model.capture import state_of
from camfn.sweep.options import Sweep
from camfn.targets import is_plain, logits_of, resolve, score_rows
from camfn.testing import changes, closeness
from camfn.testing.strategies import Case, Drawn
from camfn.testing.threads import at_once
from camfn.testing.unchanged import unchanged

UNITS = 2**16
"""Units of rounding that a law allows: a map may be a small difference of large terms. Of nine thousand random examples the
worst was at 4,500 units, and examples get ten times as rare where they get ten times as bad."""

NARROW_UNITS = 32
"""The same for a model in float16 or bfloat16, in its own units. Of five methods on 24 small networks the worst was at 28, but
for `logit_shift` of Ablation-CAM, which does not promise it."""

CLASSES = 4
"""Classes that are compared, at most, of a model that has many."""


class Asked(NamedTuple):
    """A method, with the options by which the layers of a case's networks are read."""

    method: Made
    options: dict[str, Any]
    units: float
    narrow: torch.dtype | None = None  # that of a model in half precision

    def told(self, case: Case, **options: Any) -> Any:
        """The method's `Outcome`: all that it tells, not its maps alone."""
        layer = case.layer if self.method.of_layer else None
        return self.method.run(case.model, layer, case.x, case.target, **self.options, **options)

    def maps(self, case: Case, **options: Any) -> Any:
        return self.told(case, **options).maps

    def raw(self, case: Case, **options: Any) -> Any:
        """The signed map, unscaled."""
        return self.maps(case, relu=False, normalize=False, **options)

    def has(self, option: str) -> bool:
        return option in inspect.signature(self.method.run).parameters

    def close(self, found: Tensor, expected: Tensor, what: str = "") -> None:
        """The maps are equal up to rounding. What both have of NaN and infinity, `range` tells."""
        units = self.units
        if self.narrow is not None:
            units = max(units, NARROW_UNITS * torch.finfo(self.narrow).eps / torch.finfo(found.dtype).eps)
        closeness.close(*closeness.but_the_same(found, expected), what, units=units)

    def same(self, found: Tensor, expected: Tensor, what: str) -> None:
        """The maps are equal to the bit, NaN and infinity too."""
        closeness.assert_close(*closeness.but_the_same(found, expected), 0, what)


Law = Callable[..., None]
LAWS: dict[str, Law] = {}
"""Every law by name."""
_SPEAKS: dict[str, Callable[[Asked, Case], bool]] = {}


def asked(method: Callable[..., Maps] | str, case: Case, units: float = UNITS) -> Asked:
    """The method, put to a case. The layers of the strategies' networks are read as they are made, without a doubt."""
    one = method_of(method)
    drawn = isinstance(case.model, Drawn) and one.of_layer
    return Asked(one, {"layout": case.model.layout} if drawn else {}, units, _narrow(case))


def _narrow(case: Case) -> torch.dtype | None:
    tensors = [*(case.model.parameters() if isinstance(case.model, nn.Module) else ()), case.x]
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)


def speaks_of(law: str | Law, method: Callable[..., Maps] | str, case: Case) -> bool:
    """Whether a law says anything of a method and a case."""
    name = law if isinstance(law, str) else law.__name__
    return _SPEAKS[name](asked(method, case), case)


def own_dice() -> contextlib.AbstractContextManager[None]:
    """Torch's global random state on the CPU may move inside. Afterwards it is as before: a test must not change the next."""
    return torch.random.fork_rng(devices=[])


def _law(about: Callable[[Asked, Case], bool] = lambda ask, case: True) -> Callable[[Callable[[Asked, Case], None]], Law]:
    """Make a law of a function. `about` tells of what it speaks."""

    def register(function: Callable[[Asked, Case], None]) -> Law:
        name = function.__name__
        sentence = " ".join((function.__doc__ or "").split("\n\n")[0].split())

        def law(method: Callable[..., Maps] | str, case: Case, *, units: float = UNITS) -> None:
            ask = asked(method, case, units)
            with own_dice():
                if not about(ask, case):
                    return
                try:
                    function(ask, case)
                except AssertionError as error:
                    raise AssertionError(f"{name} does not hold for {ask.method.name}. {sentence} Found: {error}") from None

        law.__name__ = law.__qualname__ = name
        law.__doc__ = function.__doc__
        LAWS[name], _SPEAKS[name] = law, about
        return law

    return register


def _of_channels(ask: Asked, case: Case) -> bool:
    """Whether the method is of a layer whose channels can be put in another order, and be read back.

    That takes a module with a parent, whose output is a tensor: not the model itself, one of several calls, or a part.
    """
    if not ask.method.of_layer or case.layer not in dict(changes.copied(case.model).named_modules()) or not case.layer:
        return False
    return isinstance(changes.activation(case), Tensor) and _head_can_change(ask, case)


def _head_can_change(ask: Asked, case: Case) -> bool:
    """Whether a method that reads the last linear layer finds it in a changed network."""
    return Need.LINEAR_HEAD not in ask.method.needs or changes.head_of(case) is not None


def _of_tensors(ask: Asked, case: Case) -> bool:
    """Whether the input is one tensor of images."""
    return isinstance(case.x, Tensor) and case.x.is_floating_point()


def _of_classes(ask: Asked, case: Case) -> bool:
    """Whether the model has a row of logits for each image, and there are two classes or more."""
    return _classes_of(case) > 1 and _of_tensors(ask, case)


def _of_own_logits(ask: Asked, case: Case) -> bool:
    """Whether there are classes whose logits the network can give in another way."""
    return _of_classes(ask, case) and changes.has_logits(_output_of(case)) and _head_can_change(ask, case)


def _classes_of(case: Case) -> int:
    try:
        logits = logits_of(_output_of(case))
    except CamError:
        return 0
    return logits.shape[1] if logits.ndim == 2 else 0


def _output_of(case: Case) -> Any:
    return changes.evaluated(changes.copied(case.model), case.x)


def _dice(case: Case) -> torch.Generator:
    """A generator of random numbers. Each call for the same case gives one that draws the same numbers."""
    return torch.Generator().manual_seed(case.model.spec.seed if isinstance(case.model, Drawn) else 0)


def _shuffled(count: int, case: Case) -> Tensor:
    return torch.randperm(count, generator=_dice(case))


# ------------------------------------------------------------------------------------------------------ what is promised


@_law()
def pure(ask: Asked, case: Case) -> None:
    """A call changes neither its arguments, nor what they hold, nor the process."""
    with unchanged(case.model, case.x, case.target if isinstance(case.target, Tensor) else None):
        ask.maps(case)


@_law()
def deterministic(ask: Asked, case: Case) -> None:
    """The same call gives the same map to the bit, whatever is drawn in between, and draws nothing from the global state."""
    first = ask.raw(case)
    torch.rand(1)
    state = torch.get_rng_state()
    second = ask.raw(case)
    assert torch.equal(torch.get_rng_state(), state), "the global random state has moved"
    ask.same(second, first, "the second call against the first")


@_law(_of_tensors)
def thread_safe(ask: Asked, case: Case) -> None:
    """Threads that call the method at once on one model get the maps that they get one after the other."""
    n = len(case.x)
    orders = [torch.arange(n).roll(i) for i in range_(4)]
    others = [
        case._replace(x=(1 - 0.1 * i) * case.x[o], target=changes.for_images(case.target, o)) for i, o in enumerate(orders)
    ]
    serial = [ask.raw(other) for other in others]
    found = at_once([functools.partial(ask.raw, other) for other in others])
    for i, pair in enumerate(zip(found, serial)):
        ask.close(*pair, f"thread {i} against the serial call")


@_law(_of_tensors)
def shape(ask: Asked, case: Case) -> None:
    """There is a map for each image (and target), on the layer's grid or at the size asked for, in float32 or wider."""
    outcome = ask.told(case)
    grid, several = _grid(outcome, case), () if outcome.single else (outcome.scores.shape[1],)
    for size, sides in ((None, grid), ("input", case.x.shape[2:]), ([2] * len(grid), (2,) * len(grid))):
        found, wanted = ask.maps(case, size=size), (len(case.x), *several, *sides)
        # A method without weights for a layer's channels may have the input's size.
        fine = size is None and not outcome.weights and found.shape == (*wanted[: -len(sides)], *case.x.shape[2:])
        assert found.shape == wanted or fine, f"shape {tuple(found.shape)} in the place of {wanted}, for size={size!r}"
        # Of a float64 model, float64: of one in half precision, float32.
        assert found.dtype == wide(case.x.dtype), f"{found.dtype} of inputs in {case.x.dtype}"
    if isinstance(case.model, Drawn):  # another model may hold tensors that `float` does not convert
        single = case._replace(model=changes.copied(case.model).float(), x=case.x.float())
        assert ask.maps(single).dtype == torch.float32, "a float32 model has maps in another dtype"
    if ask.method.of_layer:
        (alone,) = ask.maps(case._replace(layer=[case.layer]))
        ask.same(alone, outcome.maps, "a list of one layer against the layer")


def _grid(outcome: Outcome, case: Case) -> tuple[int, ...]:
    """The layer's grid, as the strategies' networks have it; of another network, as camfn reads it."""
    if not isinstance(case.model, Drawn) or not outcome.layers:
        return tuple(outcome.grids[0]) if outcome.layers else tuple(case.x.shape[2:])
    model: Drawn = case.model
    return tuple(changes.activation(case).shape[2:]) if model.layout == "channels_first" else model.grid


# `range` is a law here; the function of that name is `range_`.
range_ = range


@_law()
def range(ask: Asked, case: Case) -> None:
    """A map is finite, lies in [0, 1] and reaches both ends, unless it is flat: then it is zero."""
    for relu in (True, False):
        outcome = ask.told(case, relu=relu)
        finite = outcome.maps.isfinite()
        assert bool(finite.all()), f"{int((~finite).sum())} of {finite.numel()} values are NaN or infinite, for relu={relu}"
        values = outcome.maps.flatten(2 - outcome.single)
        low, high = (edge(values, -1) for edge in (torch.amin, torch.amax))
        good = (low == 0) & ((high == 1) | (high == 0))
        assert bool(good.all()), f"maps from {low.tolist()} to {high.tolist()}, for relu={relu}"


# ----------------------------------------------------------------------------------------------------------- symmetries


@_law(_of_tensors)
def batch_independent(ask: Asked, case: Case) -> None:
    """An image has the map that it has without the others of its batch."""
    together = ask.raw(case)
    for i in range_(len(case.x)):
        only = torch.tensor([i])
        alone = ask.raw(case._replace(x=case.x[only], target=changes.for_images(case.target, only)))
        ask.close(alone, together[only], f"image {i} alone against the batch")


@_law(_of_tensors)
def image_permutation(ask: Asked, case: Case) -> None:
    """The maps of the same images in another order are the same maps in that order."""
    order = _shuffled(len(case.x), case)
    other = case._replace(x=case.x[order], target=changes.for_images(case.target, order))
    ask.close(ask.raw(other), ask.raw(case)[order], f"images {order.tolist()}")


@_law(_of_channels)
def channel_permutation(ask: Asked, case: Case) -> None:
    """The order of the layer's channels, and of what reads them, does not matter."""
    seen, told = changes.activation(case), ask.told(case, relu=False, normalize=False)
    axis = _axis_of_channels(tuple(seen.shape), told.grids[0])
    order = _shuffled(seen.shape[axis], case)
    back = order.argsort()
    read = Need.LINEAR_HEAD in ask.method.needs
    other = changes.retapped(case, lambda z: z.index_select(axis, order), lambda z: z if read else z.index_select(axis, back))
    other = changes.with_columns(case, other, lambda w: w[:, order]) if read else other
    permuted = ask.told(other, relu=False, normalize=False)
    ask.close(permuted.maps, told.maps, f"channels {order.tolist()}")
    if told.weights:
        ask.close(permuted.weights[0], told.weights[0][:, :, order], f"weights of channels {order.tolist()}")


def _axis_of_channels(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """1, or the last for tokens and for an activation whose other axes are the grid. A grid may be larger, as CAMERAS's is."""
    first, last = shape[2:], shape[1:-1]
    return len(shape) - 1 if len(first) != len(grid) or (first != grid and last == grid) else 1


@_law(lambda ask, case: _of_own_logits(ask, case) and changes.can_be_renamed(case.target))
def class_permutation(ask: Asked, case: Case) -> None:
    """The order of the classes, in the last layer and in the target, does not matter."""
    order = _shuffled(_classes_of(case), case)
    before = ask.raw(case)
    if isinstance(case.target, str):  # "all": the maps come in the order of the classes
        before = before[:, order]
    other = changes.with_classes_permuted(case, order)
    target = changes.renamed(case.target, order.argsort())
    ask.close(ask.raw(other._replace(target=target)), before, f"classes {order.tolist()}")


def _of_logits(ask: Asked, case: Case) -> bool:
    """Whether the score moves as its logits do, or the method takes differences of scores alone."""
    if not _of_own_logits(ask, case) or (not is_plain(case.target) and ask.method.name in _PROBABLE):
        return False
    return is_plain(case.target) or _differs_alike(case)


def _differs_alike(case: Case) -> bool:
    """Whether a constant added to every logit leaves all differences of scores: not if the target squares a logit."""
    output = _output_of(case)
    score = resolve(case.target, output, len(case.x), case.x.device)
    logits = logits_of(output)
    step = torch.randn(logits.shape, generator=_dice(case), dtype=torch.float64).to(logits)

    def at(shift: Any) -> Tensor:
        return score_rows(score.of, changes.with_logits(output, lambda y: y + shift), score.rows)

    plain, shifted = at(step) - at(0), at(step + 3) - at(3)
    return bool(((plain - shifted).abs() <= 0.01 * plain.abs().max()).all())


_PROBABLE = {"score_cam_pp", "rise", "poly_cam"}
"""Methods whose weights are scores: of a class the probability, which no constant changes; of another target what it is."""


@_law(_of_logits)
def logit_shift(ask: Asked, case: Case) -> None:
    """A constant added to every logit does not change the map."""
    ask.close(ask.raw(changes.with_logits_shifted(case, 3.0)), ask.raw(case), "logits + 3")


@_law(lambda ask, case: isinstance(case.model, Drawn))
def flip(ask: Asked, case: Case) -> None:
    """The flipped network's map of the flipped input is the map, flipped along one axis."""
    axis = 2 if case.model.spec.seed % 2 else case.x.ndim - 1
    other = case._replace(model=case.model.flipped(axis), x=case.x.flip(axis))
    ask.close(ask.raw(other), ask.raw(case).flip(axis - case.x.ndim), f"axis {axis} of the input")


# ------------------------------------------------------------------------------------------------------------ execution


@_law(lambda ask, case: ask.has("sweep"))
def chunk_independent(ask: Asked, case: Case) -> None:
    """How many masked inputs go through the model at once, as a batch or one by one, does not matter."""
    default = ask.raw(case)
    for sweep in (*(Sweep(chunk=chunk) for chunk in (1, 2, 5, 1000)), *(Sweep(fold=False, chunk=c) for c in (None, 1, 3))):
        ask.close(ask.raw(case, sweep=sweep), default, f"Sweep(chunk={sweep.chunk}, fold={sweep.fold})")


@_law(_of_classes)
def target_independent(ask: Asked, case: Case) -> None:
    """Several targets of one call have the maps that each has of a call of its own."""
    n, classes = len(case.x), torch.arange(_classes_of(case))
    rows = torch.stack([classes.roll(i)[:CLASSES] for i in range_(n)])  # every image has its own order
    together = ask.raw(case._replace(target=rows))
    for t in range_(rows.shape[1]):
        ask.close(ask.raw(case._replace(target=rows[:, t])), together[:, t], f"classes {rows[:, t].tolist()}")
    if len(classes) <= CLASSES:
        every = ask.raw(case._replace(target="all"))
        ask.close(torch.stack([maps[row] for maps, row in zip(every, rows)]), together, 'target="all"')


@_law(lambda ask, case: ask.method.of_layer and isinstance(case.model, Drawn) and len(case.model.layers) > 1)
def layer_independent(ask: Asked, case: Case) -> None:
    """Several layers have the maps that each has of a call of its own."""
    names = case.model.layers
    other = names[0] if case.layer != names[0] else names[-2]
    for layers in ((other, case.layer), (case.layer, other)):
        for layer, found in zip(layers, ask.raw(case._replace(layer=layers))):
            ask.close(found, ask.raw(case._replace(layer=layer)), f"layer {layer!r} of {layers}")


@_law(_of_classes)
def vmap_equals_loop(ask: Asked, case: Case) -> None:
    """`vmap` over inputs and targets gives the maps of the batch, and over stacked states those of each model."""
    classes = _shuffled(_classes_of(case), case).repeat(len(case.x))[: len(case.x)]

    def alone(one: Tensor, c: Tensor) -> Tensor:
        return ask.raw(case._replace(x=one[None], target=c[None]))[0]

    ask.close(vmap(alone)(case.x, classes), ask.raw(case._replace(target=classes)), "inputs")
    models = [case.model, _jittered(case)]
    states = [state_of(model) for model in models]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    together = vmap(lambda state: ask.raw(case, state=state))(stacked)
    for i, model in enumerate(models):
        ask.close(together[i], ask.raw(case._replace(model=model)), f"state {i}")


def _jittered(case: Case) -> Any:
    """The model with other weights; zeros stay zeros."""
    model, generator = changes.copied(case.model), _dice(case)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                factor = 1 - 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.mul_(factor.to(tensor))
    return model


# ------------------------------------------------------------------------------------------------------ the derivative

STEP = 1e-5
ROUGH = closeness.UNITS * torch.finfo(torch.float64).eps / STEP
"""Of differences divided by a step: the rounding of what is compared, divided by it too. A tenth of this is seen."""


def slope(function: Callable[[Any], Tensor], at: dict[str, Tensor], along: dict[str, Tensor], step: float = STEP) -> Tensor:
    """The derivative along a direction by central differences of the fourth order."""

    def moved(t: float) -> Tensor:
        return function({name: tensor + t * along[name] for name, tensor in at.items()})

    near, far = (moved(step) - moved(-step)) / (2 * step), (moved(2 * step) - moved(-2 * step)) / (4 * step)
    return (4 * near - far) / 3


@_law(lambda ask, case: _of_tensors(ask, case) and case.x.dtype == torch.float64)
def gradcheck(ask: Asked, case: Case) -> None:
    """The derivative of the map by the input, by `grad` and by `jvp`, is that of finite differences.

    At a kink, where two steps disagree, it says nothing.
    """
    case = case._replace(x=case.x.clone())  # jvp refuses an expanded tensor
    along = torch.randn(case.x.shape, generator=_dice(case), dtype=torch.float64)

    def maps(x: Tensor) -> Tensor:
        return ask.raw(case._replace(x=x))

    def at(given: dict[str, Tensor]) -> Tensor:
        return maps(given["x"])

    found = jvp(maps, (case.x,), (along,))[1]
    expected, wider = (slope(at, {"x": case.x}, {"x": along}, step) for step in (STEP, 4 * STEP))
    size = max(1.0, float(expected.abs().max()), float(maps(case.x).abs().max()))
    if not float((expected - wider).abs().max()) <= 0.1 * ROUGH * size:
        return
    closeness.assert_close(found / size, expected / size, ROUGH, "jvp against finite differences")
    weighing = torch.randn(expected.shape, generator=_dice(case), dtype=torch.float64)
    gradient = grad(lambda x: (maps(x) * weighing).sum())(case.x)
    size = max(1.0, float((gradient * along).abs().sum()), float((expected * weighing).abs().sum()))
    closeness.assert_close(
        (gradient * along).sum() / size, (expected * weighing).sum() / size, ROUGH * math.sqrt(expected.numel()), "grad"
    )


# ------------------------------------------------------------------------------------------------------------ the class

_CLASS_READERS = frozenset({Need.GRADIENTS, Need.MASKED_INPUTS, Need.HEAD, Need.LINEAR_HEAD, Need.ATTENTION, Need.BIASES})


@_law(lambda ask, case: _of_classes(ask, case) and bool(_CLASS_READERS & ask.method.needs))
def knows_the_class(ask: Asked, case: Case) -> None:
    """The map depends on the class that it explains.

    Of a small network two classes can have one map by chance. `check` requires one case in which it depends on the class.
    """
    rows = torch.arange(_classes_of(case))[:CLASSES].expand(len(case.x), -1)
    found = ask.raw(case._replace(target=rows))
    if not bool(found.isfinite().all()):  # `range` tells that
        return
    spread = float((found - found[:, :1]).abs().max())
    # The targets of one call are computed alike: maps that do not depend on the class differ by a few units at most.
    room = closeness.UNITS * torch.finfo(found.dtype).eps * float(found.abs().max())
    assert spread > room, f"the maps of classes {rows[0].tolist()} differ by {spread:.3g}, which is rounding (up to {room:.3g})"
