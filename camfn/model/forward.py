"""What is explained: a model on inputs, checked, and captured once at the layers."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten

from camfn import _compat
from camfn._errors import CamError, RefusedError, warn
from camfn._types import Inputs, Layers, State
from camfn.model.agreement import is_close
from camfn.model.attention import unfused as written_out
from camfn.model.capture import Captured, pure_from, resolve_state, tap_from, watch
from camfn.model.gradients import Pull, Run, with_pull
from camfn.model.inputs import Key, Place, beside, check_inputs, key_of, pick, plain, rows_of, size_of, with_input
from camfn.model.layers import choose
from camfn.model.linear_head import is_convolution
from camfn.model.memory import is_exhausted
from camfn.model.ports import is_several, resolve_layers
from camfn.model.prepare import Call, Prepared, opened
from camfn.model.private_copy import Shell
from camfn.model.randomness import refusing_draws
from camfn.model.torch_errors import WITHOUT_GRADIENTS, quantised_in
from camfn.targets import logits_of


class Subject(NamedTuple):
    """A model and its inputs, and what one forward of them gave."""

    model: Call
    shell: Shell  # for its names: its layers have ports
    state: State
    x: Inputs
    key: Key  # which input has the pixels; None: x is the only one
    n: int
    layers: tuple[str, ...]
    several: bool  # the caller gave a sequence of layers and gets a tuple of maps
    output: Any
    seen: tuple[Tensor, ...]
    forwards: int
    facts: dict[Any, Any]  # what is found out of the model in this call
    pull: Pull | None = None  # where it was looked at with `graph=True`
    slopes: dict[Any, Any] | None = None  # where several methods share them
    beside: int | None = None  # inputs of so many rows have one for each image: n where it is not found to be 0

    @property
    def image(self) -> Tensor:
        """The input that has the pixels, `(n, k, *size)`."""
        return pick(self.x, self.key)

    @property
    def place(self) -> Place:
        """Where its pixels are among the inputs, and what goes with them."""
        return Place(self.key, self.n if self.beside is None else self.beside)

    @property
    def size(self) -> tuple[int, ...] | None:
        """Its spatial size, if it has one, and images of a list have the same."""
        return size_of(self.x, self.key)


def without_graph() -> AbstractContextManager[Any]:
    """In a plain call no graph is recorded; a transform needs all of it."""
    return nullcontext() if _compat.transformed() else torch.no_grad()


class Shared(Call):
    """A call in which several methods share the clean forward of these inputs, and the gradients there."""

    def __init__(self, prepared: Prepared, x: Inputs, graph: bool) -> None:
        super().__init__(prepared)
        self.x, self.graph = x, graph
        self.seen: dict[Any, Subject] = {}
        self.last: Subject | None = None

    def inner(self) -> AbstractContextManager["Shared"]:
        """A method's call: what it is lent is lent until all methods are done."""
        return nullcontext(self)

    def look(self, layer: Layers, x: Inputs, state: State | None, masked: Key, masks: bool, graph: bool, taps: bool) -> Subject:
        """Of other inputs, as a method makes that smooths another, nothing is shared; nor is what taps no layer."""
        if x is not self.x or not taps:
            return look(Call(self.prepared), layer, x, state, masked, masks=masks, graph=graph, taps=taps)
        given = plain(x)  # what another method has asked for may be less than this one needs
        check_inputs(given, key_of(given, masked, masks), {}, masks)
        layers = tuple(layer) if is_several(layer) else layer  # pyright: ignore[reportArgumentType]: it is a sequence then
        graph = graph or self.graph  # a sweep wants a gradient too, where it has a budget
        key = layers, masked, graph, masks and not graph  # with a `pull`, the maps have no graph either way
        if key not in self.seen:
            subject = _look(self, layer, x, state, masked, masks=masks, graph=graph, taps=True)
            self.seen[key] = subject._replace(slopes={})
        self.last = self.seen[key]
        return self.last


def look(
    model: nn.Module | Prepared | Call,
    layer: Layers,
    x: Inputs,
    state: State | None,
    masked: Key,
    *,
    masks: bool,
    graph: bool = False,
    taps: bool = True,
) -> Subject:
    """Check the arguments and run the clean forward.

    `masks`: the method masks an input, and its maps have no graph. `graph`: there is to be a `pull`, for gradients.
    `taps=False`: no layer is looked at.
    """
    if isinstance(model, Shared):
        return model.look(layer, x, state, masked, masks, graph, taps)
    return _look(opened(model), layer, x, state, masked, masks=masks, graph=graph, taps=taps)


def _look(
    model: Call, layer: Layers, x: Inputs, state: State | None, masked: Key, *, masks: bool, graph: bool, taps: bool
) -> Subject:
    subject = introduced(model, x, state, masked, masks=masks, named=taps and layer is not None)
    shell, full, x, n = subject.shell, subject.state, subject.x, subject.n
    if is_several(layer) and not layer:
        raise CamError("layer is an empty sequence: name one layer at least, or pass None to have one chosen")
    names, forwards = [], n
    if taps:
        names = _choose(subject.model, full, x, subject.key, n) if layer is None else resolve_layers(shell, layer)
        forwards = n if layer is not None else 2 * n
    distinct = list(dict.fromkeys(names))

    # Under a transform, what a model writes to has to be made inside it.
    run = tapped(subject, distinct, None if _compat.transformed() else shell)
    if graph or (masks and _compat.is_differentiated(subject.image)):
        check_slopes(shell)
    if graph:
        captured, pull = with_pull(run, full, x, distinct)
    else:
        with without_graph() if masks else nullcontext():
            captured, pull = run(full, x), None
    seen = tuple(captured.seen[distinct.index(name)] for name in names)
    told: dict[str, Any] = {"layers": tuple(names), "several": is_several(layer), "forwards": forwards}
    subject = subject._replace(output=captured.output, seen=seen, pull=pull, **told)
    return subject._replace(beside=_rows_beside(subject))


def _rows_beside(subject: Subject) -> int:
    """Has an input of n rows one for each image, or only as many, as two texts for two images? A batch of the first image
    twice tells, where the logits can be read: both have those that it had."""
    n, x, key = subject.n, subject.x, subject.key
    if _compat.transformed() or not beside(x, key, n):
        return n

    def find() -> int:
        call, twice = pure_from(subject.model.shell()), torch.zeros(2, dtype=torch.long, device=subject.image.device)
        for rows in (n, 0):
            try:
                expected = logits_of(subject.output)[twice]
                found = logits_of(call(subject.state, rows_of(x, Place(key, rows), twice, subject.image[twice])))
                if found.shape == expected.shape and bool(((found - expected).abs() <= 0.01 * expected.abs().amax()).all()):
                    return rows
            except Exception as error:
                if is_exhausted(error) or isinstance(error, RefusedError):
                    raise
        return n

    return once(subject, ("rows beside", n), find)


def once(subject: Subject, what: Any, find: Callable[[], Any]) -> Any:
    """A fact that hangs on the values of this call: found once in it, and not kept for another."""
    if what not in subject.facts:
        # Not in inference mode, whose tensors a model may not write to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            subject.facts[what] = find()
    return subject.facts[what]


def tapped(subject: Subject, names: Sequence[str], shell: Shell | None = None) -> Run:
    """The model with ports at these layers; in this shell, which is then for one run, or for each run in one of its own."""

    def run(state: State, x: Inputs, nudge: Any = None) -> Captured:
        return run_checked(tap_from(shell or subject.model.shell(), names), subject, state, x, nudge)

    return run


def again(subject: Subject, image: Tensor, *, unfused: bool = False) -> Subject:
    """Another image in the place of its own, looked at with a `pull`; `unfused`: with attention written out."""
    other = subject._replace(x=with_input(subject.x, subject.key, image), slopes=None, facts={})
    names = list(dict.fromkeys(subject.layers))
    check_slopes(subject.shell)
    run = tapped(other, names)

    def openly(state: State, x: Inputs, nudge: Any = None) -> Captured:
        return written_out(lambda: run(state, x, nudge))

    captured, pull = with_pull(openly if unfused else run, other.state, other.x, names)
    return other._replace(
        output=captured.output, seen=tuple(captured.seen[names.index(name)] for name in other.layers), pull=pull
    )


def introduced(
    model: nn.Module | Prepared | Call,
    x: Inputs,
    state: State | None,
    masked: Key = None,
    *,
    masks: bool = False,
    named: bool = False,
) -> Subject:
    """The model and its inputs, checked; nothing has run. `named`: with a layer, and a layout comes with it if need be."""
    call = opened(model)
    shell = call.shell()
    full = resolve_state(shell, state)
    x = plain(x)
    key = key_of(x, masked, masks)
    n = check_inputs(x, key, full, masks)
    if masks or not named:
        _check_frames(shell, pick(x, key))
    return Subject(call, shell, full, x, key, n, (), False, None, (), 0, {})


@contextmanager
def deterministic(again: Callable[[], Any]) -> Iterator[list[Any]]:
    """Around a forward, whose output is put into the list: where Python's or NumPy's generator has moved, `again` has to give
    the same."""
    if _compat.compiling():
        yield []
        return
    before, told = _generators(), []
    yield told
    moved = [name for name, state in _generators().items() if state != before[name]]
    if "torch" in moved:  # by another thread, or by what a torch-function mode does not see
        with refusing_draws():
            again()
        moved.remove("torch")
    if not moved:
        return
    pairs = list(zip(*(_plain_tensors(output) for output in (told[0], again()))))
    if not all(is_close(a, b, 1000) for a, b in pairs):
        raise RefusedError(
            f"the model draws random numbers in eval mode (from the generator of {' and '.join(moved)}, which has moved): its "
            "scores would differ from forward to forward; make the code that draws obey self.training"
        )


def _generators() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()  # noqa: NPY002, since it is the generator that a model shares with its caller
    with _compat.outside_transforms():
        torchs = torch.get_rng_state().numpy().tobytes()
    return {"Python's random": random.getstate(), "NumPy's random": (np.asarray(keys).tobytes(), *rest), "torch": torchs}


def _plain_tensors(output: Any) -> list[Tensor]:
    leaves = (_compat.unwrapped(leaf) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def run_checked(tap: Callable[..., Captured], subject: Subject, state: State, x: Inputs, nudge: Any = None) -> Captured:
    """The clean forward; a convolution that did not like the number of axes speaks of the batch."""
    key = subject.key
    wrong = _wrong_rank(x, key, subject.shell)
    try:
        with deterministic(lambda: pure_from(subject.model.shell())(state, x)) as told:
            captured = tap(state, x, nudge)
            told.append(captured.output)
    except (AttributeError, TypeError) as error:
        if isinstance(x, list):
            raise CamError(_NO_LIST) from error
        raise
    except (RuntimeError, ValueError) as error:
        if wrong and not isinstance(error, CamError):
            raise CamError(wrong) from error
        raise
    if wrong and any(value.ndim < pick(x, key).ndim + 1 for value in captured.seen):  # torch took it for one sample
        raise CamError(wrong)
    return captured


def _check_frames(shell: Shell, image: Tensor) -> None:
    """Frames before channels look like channels and three spatial axes, and masks would go over the wrong ones."""
    first = _first_convolution(shell)
    if image.ndim == 5 and first is not None and image.shape[1] != first.in_channels == image.shape[2]:
        raise CamError(
            f"x has shape {tuple(image.shape)}, and {type(first).__name__} wants {len(first.kernel_size) + 2} axes, the second "
            f"of {first.in_channels} channels: if frames come before channels, pass a module that takes (n, channels, *size) "
            "and hands on x.transpose(1, 2); or is there a batch axis too many?"
        )


def _first_convolution(shell: Shell) -> _ConvNd | None:
    return next(filter(is_convolution, shell.module.modules()), None)


_NO_LIST = (
    "x is a list, as a detector's images are, and the model does not take one; "
    "pass a tensor with the batch first, a tuple of inputs or a mapping of them"
)


def _wrong_rank(x: Inputs, key: Key, shell: Shell) -> str:
    """A sentence, where x has not as many axes as a batch for the first convolution. A model may mend that itself."""
    first = _first_convolution(shell)
    if key is not None or first is None or pick(x, key).ndim == len(first.kernel_size) + 2:
        return ""
    return (
        f"x has shape {tuple(pick(x, key).shape)}, and {type(first).__name__} wants {len(first.kernel_size) + 2} axes: "
        "(n, channels, *size); is the batch axis missing? (x[None] adds one)"
    )


def check_slopes(shell: Shell) -> None:
    """Raise where a gradient could not come through the model."""
    quantised = quantised_in(shell.distinct())
    if quantised:
        raise CamError(
            f"the model is quantised ({quantised}), and no gradient comes through what computes in integers: "
            f"{WITHOUT_GRADIENTS}"
        )


def _choose(model: Call, state: State, x: Inputs, key: Key, n: int) -> list[str]:
    name, why = choose(model, state, x, size_of(x, key), n)
    if not _compat.transformed():
        warn(f"layer=None: {name!r} was chosen, the {why}; name it to be sure")
    return [name]


def first_nonfinite(model: Call, state: State, x: Inputs) -> str:
    """The layer, in the order of execution, whose output is the first that is not finite, for the end of a sentence."""
    found: list[str] = []

    def see(name: str, args: tuple[Any, ...], out: Any) -> None:
        leaves = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not found and not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            found.append(name)

    with torch.no_grad():
        watch(model, state, x, see)
    return f"it first appears in the output of layer {found[0]!r}" if found and found[0] else "no layer's output shows it"
