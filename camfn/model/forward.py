"""The clean forward pass: validated arguments, the model's output, the layers' activations, and their gradients on demand."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from camfn import _compat
from camfn._errors import CamError, RefusedError, layer_called, warn
from camfn._types import Inputs, Layers, State
from camfn.model.agreement import is_close
from camfn.model.attention import unfused as attention_written_out
from camfn.model.capture import Captured, pure_from, tap_from, watch
from camfn.model.gradients import Lost, Pullback, Run, reason_at, total_of, ungraphed, with_pullback
from camfn.model.graph_ends import Reason
from camfn.model.inputs import Batch, Companions, Key, beside, check_inputs, key_of, plain, rows_of
from camfn.model.layers import Site, choose
from camfn.model.memory import is_exhausted
from camfn.model.ports import is_several, resolve_layers
from camfn.model.prepare import Call, Model, Prepared, opened
from camfn.model.private_copy import PrivateCopy
from camfn.model.randomness import refusing_draws
from camfn.model.task import Task, begin, has_graph, once, wrong_rank
from camfn.model.torch_errors import WITHOUT_GRADIENTS, quantized_in
from camfn.targets import Score, flatten, repeats


class Forward(NamedTuple):
    """The clean forward pass: the output of the model, and the activations of the layers."""

    task: Task
    layers: tuple[str, ...]
    several: bool  # whether the caller named a sequence of layers, and gets a tuple of maps
    output: Any
    activations: tuple[Tensor, ...]  # in the layers' own shapes
    companions: Companions
    forwards: int  # forward passes so far, counted in images

    @property
    def batch(self) -> Batch:
        """The inputs."""
        return self.task.batch

    def moved(self, state: State, x: Inputs) -> "Forward":
        """The same forward pass with other tensors for the state and the inputs, of the same values."""
        return self._replace(task=self.task._replace(state=state, batch=self.batch._replace(x=x)))

    @property
    def n(self) -> int:
        """Number of images."""
        return self.task.batch.n

    @property
    def image(self) -> Tensor:
        """The input that has the pixels, `(n, k, *size)`."""
        return self.task.batch.image

    @property
    def size(self) -> tuple[int, ...] | None:
        """The spatial size of the pixels."""
        return self.task.batch.size


def from_output(task: Task, output: Any) -> Forward:
    """The forward pass of a method that explains no layer, and has run the model itself."""
    return Forward(task, (), False, output, (), Companions(task.batch.pixels, task.batch.n), task.batch.n)


def without_graph(x: Inputs, state: State | None) -> AbstractContextManager[Any]:
    """Disable the autograd graph in a call whose maps have none. A transform needs it."""
    return nullcontext() if _compat.transformed() or has_graph(x, state) else torch.no_grad()


class Shared(Call):
    """A call in which several methods share the clean forward pass of one input, and its gradients."""

    def __init__(self, prepared: Prepared, x: Inputs, *, graph: bool, several: bool) -> None:
        super().__init__(prepared)
        self.x, self.graph = x, graph
        self.several = several  # whether there are several methods: one that fails should not end the others
        self.seen: dict[Any, tuple[Forward, Pullback | None]] = {}
        self.last: Forward | None = None

    def inner(self) -> AbstractContextManager["Shared"]:
        """The call of one method. Private copies stay lent until all methods are done."""
        return nullcontext(self)

    def look(self, question: "_Question") -> tuple[Forward, Pullback | None]:
        """Answer from the shared forward pass, unless the question has another input (as in smoothing) or no layer."""
        if question.x is not self.x or not question.taps:
            return _look(Call(self.prepared), question)
        given = plain(self.x)  # validate again: this method may need more than the one that ran the forward pass
        check_inputs(given, key_of(given, question.masked, question.masks), {}, question.masks)
        question = question._replace(graph=question.graph or self.graph)  # a sweep with a budget needs gradients too
        key = (
            question.layers,
            question.masked,
            question.axes,
            question.graph,
            question.masks and not question.graph,
            question.needed,
            question.site if question.layer is None else None,
        )
        if key not in self.seen:
            self.seen[key] = _look(self, question)
        self.last = self.seen[key][0]
        return self.seen[key]


class _Question(NamedTuple):
    """The arguments of a forward pass."""

    layer: Layers
    x: Inputs
    state: State | None
    masked: Key
    axes: str | None
    masks: bool  # whether the method masks an input
    graph: bool = False  # whether gradients are needed
    taps: bool = True  # whether a layer is explained
    needed: bool = True  # whether gradients that do not reach the layer are an error
    site: Site = "block"  # where `layer=None` is

    @property
    def layers(self) -> Any:
        """The layers as a hashable value."""
        return tuple(self.layer) if is_several(self.layer) else self.layer  # pyright: ignore[reportArgumentType]: a sequence


def look(
    model: Model,
    layer: Layers,
    x: Inputs,
    state: State | None,
    masked: Key = None,
    axes: str | None = None,
    *,
    masks: bool = False,
    taps: bool = True,
    site: Site = "block",
) -> Forward:
    """Validate the arguments and run the clean forward pass.

    `masks` says that the method masks an input; `taps=False` that it has no layer; `site` where `layer=None` is.
    """
    return _answered(model, _Question(layer, x, state, masked, axes, masks, taps=taps, site=site))[0]


def look_with_gradients(
    model: Model,
    layer: Layers,
    x: Inputs,
    state: State | None,
    masked: Key = None,
    axes: str | None = None,
    *,
    masks: bool = False,
    needed: bool = True,
    site: Site = "block",
) -> tuple[Forward, Pullback]:
    """Like `look`, and return the pullback from the output to the layers.

    `needed=False`: the gradients are a guess that may be zero, as those that guide a budget, and no map is made of them.
    """
    question = _Question(layer, x, state, masked, axes, masks, graph=True, needed=needed, site=site)
    forward, pullback = _answered(model, question)
    assert pullback is not None
    return forward, pullback


def _answered(model: Model, question: _Question) -> tuple[Forward, Pullback | None]:
    return model.look(question) if isinstance(model, Shared) else _look(opened(model), question)


def _look(model: Call, question: _Question) -> tuple[Forward, Pullback | None]:
    layer, x, state, masked, axes, masks, graph, taps, needed, site = question
    task = begin(model, x, state, masked, axes, masks=masks)
    names, forwards = _layers_of(task, layer, site) if taps else ((), task.batch.n)
    distinct = list(dict.fromkeys(names))
    # Under a transform, tensors that the model writes to must be created inside it: each run then makes its own copy.
    run = tapped(task, distinct, None if _compat.transformed() else task.private)
    if graph or task.graphed or (masks and _compat.is_differentiated(task.batch.image)):
        check_differentiable(task.private)
    pullback = None
    if graph:
        captured, pullback = with_pullback(
            run,
            task.state,
            task.batch.x,
            distinct,
            lost_at(task, len(distinct) > 1) if needed else _ignored,
            graphed=task.graphed,
        )
    else:
        with without_graph(x, state) if masks else nullcontext():
            captured = run(task.state, task.batch.x)
    activations = tuple(captured.seen[distinct.index(name)] for name in names)
    companions = _companions(task, captured.output)
    return Forward(task, names, is_several(layer), captured.output, activations, companions, forwards), pullback


def _layers_of(task: Task, layer: Layers, site: Site) -> tuple[tuple[str, ...], int]:
    """The names of the layers, and the number of forward passes, including the clean one that follows."""
    if is_several(layer) and not layer:
        raise CamError("layer is an empty sequence: name one layer or more, or pass None to have one chosen")
    if layer is not None:
        return tuple(resolve_layers(task.private, layer)), task.batch.n
    name, why, forwards = choose(task, site)
    if not _compat.transformed():
        warn(f"layer=None: {name!r} was chosen, the {why}; name it to be sure")
    return (name,), (1 + forwards) * task.batch.n


def _companions(task: Task, output: Any) -> Companions:
    """Find out whether companion inputs with n rows belong to the images one by one, or are shared, as two texts by two images.

    The test runs a batch of copies of the first image, with the companion inputs repeated and then shared. The right choice
    gives all of them the output of the first image. The number of copies is not n, so that what is shared keeps its shape.
    """
    x, pixels, n = task.batch
    if _compat.transformed() or not beside(x, pixels.key, n):
        return Companions(pixels, n)

    def find() -> int:
        for rows in (n, 0):
            found = _of_copies(task, Companions(pixels, rows))
            if found is not None and repeats(output, n, *found):
                return rows
        return n

    return Companions(pixels, once(task, ("companion rows", n), find))


def _of_copies(task: Task, companions: Companions) -> tuple[Any, int] | None:
    """The output for two copies of the first image, or three where n is two, and their number. `None` if the model fails."""
    image, copies = task.batch.image, 3 if task.batch.n == 2 else 2
    which = torch.zeros(copies, dtype=torch.long, device=image.device)
    try:
        with torch.no_grad():
            x = rows_of(task.batch.x, companions, which, image.index_select(0, which))
            return pure_from(task.model.borrow())(task.state, x), copies
    except Exception as error:
        if is_exhausted(error) or isinstance(error, RefusedError):
            raise
        return None


def another_batch(forward: Forward) -> tuple[Any, int] | None:
    """The output for another number of images than n, and this number. The shapes tell what belongs to the images."""
    find = partial(_of_copies, forward.task, forward.companions)
    return find() if _compat.transformed() else once(forward.task, "another batch", find)


def _ignored(names: Sequence[str], why: Callable[[str, str], Reason]) -> None:
    """Take a missing gradient for zeros."""


def lost_at(task: Task, several: bool, called: Callable[[str], str] = layer_called) -> Lost:
    """What to do at a layer that no gradient reaches: raise an error, or, in a call of several layers or methods, note it.

    The map of such a layer is zeros, and `lost_layers` tells the reason.
    """

    def lost(names: Sequence[str], why: Callable[[str, str], Reason]) -> None:
        for name in names:
            reason = task.facts.get((_LOST, name)) or why(name, called(name)).sentence
            if reason and not several and not (isinstance(task.model, Shared) and task.model.several):
                raise CamError(reason)
            task.facts[_LOST, name] = reason

    return lost


def tell_lost(forward: Forward, name: str, score: Score) -> None:
    """Do the same for a layer whose weights were found without a gradient, and are zeros, if no gradient reaches it."""
    task = forward.task
    with torch.inference_mode(False), torch.enable_grad():
        state, x = tree_map(ungraphed, (task.state, task.batch.x))
        run, of = tapped(task, [name]), total_of(forward.output, score)
        why = partial(reason_at, lambda nudge: of(run(state, x, nudge).output), [name])
        lost_at(task, len(set(forward.layers)) > 1)([name], why)


def lost_layers(forward: Forward) -> dict[str, str]:
    """The layers that no gradient of this call has reached, each with the reason in a sentence."""
    found = {key[1]: sentence for key, sentence in forward.task.facts.items() if isinstance(key, tuple) and key[0] == _LOST}
    return {name: found[name] for name in forward.layers if found.get(name)}


_LOST = "no gradient"


def tapped(task: Task, names: Sequence[str], private: PrivateCopy | None = None) -> Run:
    """The model with ports at these layers. A given private copy serves the first run; every other run gets a new one."""
    given = [] if private is None else [private]

    def run(state: State, x: Inputs, nudge: Any = None) -> Captured:
        return run_checked(tap_from(given.pop() if given else task.model.borrow(), names), task, (state, x), nudge)

    return run


def again(forward: Forward, image: Tensor, *, unfused: bool = False) -> tuple[Forward, Pullback]:
    """Run the forward pass of another image, with its pullback. `unfused` avoids fused attention kernels."""
    task = forward.task.with_image(image)
    names = list(dict.fromkeys(forward.layers))
    check_differentiable(task.private)
    run = tapped(task, names)

    def openly(state: State, x: Inputs, nudge: Any = None) -> Captured:
        return attention_written_out(lambda: run(state, x, nudge))

    lost = lost_at(forward.task, len(names) > 1)
    captured, pullback = with_pullback(openly if unfused else run, task.state, task.batch.x, names, lost, graphed=task.graphed)
    activations = tuple(captured.seen[names.index(name)] for name in forward.layers)
    return forward._replace(task=task, output=captured.output, activations=activations), pullback


@contextmanager
def deterministic(again: Callable[[], Any]) -> Iterator[list[Any]]:
    """Check that a forward pass is deterministic. The caller appends its output to the list that the context gives.

    If the state of Python's or NumPy's generator has changed, `again()` must give the same output. Otherwise `RefusedError` is
    raised.
    """
    before, outputs = _generators(), []
    yield outputs
    moved = [name for name, state in _generators().items() if state != before[name]]
    if "torch" in moved:  # another thread drew, or a draw that a torch-function mode does not see
        with refusing_draws():
            again()
        moved.remove("torch")
    if not moved:
        return
    pairs = list(zip(*(_plain_tensors(output) for output in (outputs[0], again()))))
    if not all(is_close(a, b, 1000) for a, b in pairs):
        raise RefusedError(
            f"the model draws random numbers in eval mode (the generator of {' and '.join(moved)} has advanced): its scores "
            "would differ between forward passes; make the code that draws obey self.training"
        )


def _generators() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()  # noqa: NPY002, since it is the generator that a model shares with its caller
    with _compat.outside_transforms():
        torchs = torch.get_rng_state().numpy().tobytes()
    return {"Python's random": random.getstate(), "NumPy's random": (np.asarray(keys).tobytes(), *rest), "torch": torchs}


def _plain_tensors(output: Any) -> list[Tensor]:
    leaves = (_compat.unwrapped(leaf) for leaf in flatten(output)[0] if isinstance(leaf, Tensor))
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def run_checked(tap: Callable[..., Captured], task: Task, given: tuple[State, Inputs], nudge: Any = None) -> Captured:
    """Run the clean forward pass. Turn a convolution's rank error into a message about the missing batch axis."""
    state, x = given
    try:
        with deterministic(lambda: pure_from(task.model.borrow())(state, x)) as outputs:
            captured = tap(state, x, nudge)
            outputs.append(captured.output)
    except (AttributeError, TypeError) as error:
        if isinstance(x, list):
            raise CamError(_NO_LIST) from error
        raise
    except (RuntimeError, ValueError) as error:
        wrong = wrong_rank(x, task.batch.pixels.key, task.private)
        if wrong and not isinstance(error, CamError):
            raise CamError(wrong) from error
        raise
    return captured


_NO_LIST = (
    "x is a list, as a detector's images are, and the model does not take one; "
    "pass a tensor with the batch first, a tuple of inputs or a mapping of them"
)


def check_differentiable(private: PrivateCopy) -> None:
    """Raise `CamError` if the model is quantized: it has no gradient."""
    quantized = quantized_in(private.distinct())
    if quantized:
        raise CamError(
            f"the model is quantized ({quantized}), and no gradient comes through what computes in integers: "
            f"{WITHOUT_GRADIENTS}"
        )


def first_nonfinite(task: Task, x: Inputs) -> str:
    """Describe, for an error message, the first layer in the order of execution whose output is not finite."""
    found: list[str] = []

    def see(name: str, args: tuple[Any, ...], out: Any) -> None:
        leaves = [leaf for leaf in flatten(out)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not found and not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            found.append(name)

    with torch.no_grad():
        watch(task.model, task.state, x, see)
    return f"it first appears in the output of layer {found[0]!r}" if found and found[0] else "no layer's output shows it"
