"""A model and its validated inputs, before the clean forward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from camfn import _compat
from camfn._errors import CamError
from camfn._types import Inputs, State
from camfn.model.capture import pure_from, resolve_state
from camfn.model.entrance import axes_of
from camfn.model.inputs import Batch, Key, check, plain, raw, sample, with_raw
from camfn.model.linear_head import first_convolution
from camfn.model.prepare import Call, Model, opened
from camfn.model.private_copy import PrivateCopy


class Task(NamedTuple):
    """A model and its validated inputs, before any forward pass."""

    model: Call
    private: PrivateCopy  # a private copy, which gets the ports
    state: State
    batch: Batch
    facts: dict[Any, Any]  # facts about the model that this call has found; see `once`
    graphed: bool = False  # whether the maps have a graph: see `has_graph`

    def with_image(self, image: Tensor) -> "Task":
        """The task with another image, and without the facts that depend on values."""
        kept = {key: fact for key, fact in self.facts.items() if key[:1] == ("forms",)}
        return self._replace(batch=self.batch.with_image(image), facts=kept)


def has_graph(x: Inputs, state: State | None) -> bool:
    """Whether the maps of a plain call have a graph: grad mode is on, and a tensor of `x` or `state` requires grad."""
    if _compat.transformed() or not torch.is_grad_enabled():
        return False
    leaves = tree_flatten((plain(x), plain(state)))[0]
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def begin(
    model: Model, x: Inputs, state: State | None, masked: Key = None, axes: str | None = None, *, masks: bool = False
) -> Task:
    """Validate the model and its inputs. `axes` names the axes of the input with the pixels; `None` finds them."""
    call = opened(model)
    private = call.borrow()
    full, graphed = resolve_state(private, state), has_graph(x, state)
    if graphed:
        full, x = _savable(full), _savable(x)
    batch = check(x, masked, axes, full, masks)
    if axes is None and not isinstance(batch.x, list):
        key = batch.pixels.key
        found = axes_of(private.module, raw(batch.x, key), _plain_run(call, batch.x, key))
        batch = batch._replace(pixels=batch.pixels._replace(axes=found))
    if masks and batch.pixels.axes.unclear:
        raise CamError(wrong_rank(batch.x, batch.pixels.key, private) or batch.pixels.axes.unclear)
    return Task(call, private, full, batch, {}, graphed)


def _savable(tree: Any) -> Any:
    """Clone tensors made in inference mode: autograd cannot save them, and none of them requires grad."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, plain(tree))


def _plain_run(call: Call, x: Inputs, key: Key) -> Callable[[Tensor], Any]:
    """The model with its own state, as a function of one of its inputs. It runs outside of transforms."""

    def run(value: Tensor) -> Any:
        private = call.borrow()
        return pure_from(private)(dict(private.tensors), with_raw(sample(x), key, value))

    return run


def once(task: Task, what: Any, find: Callable[[], Any]) -> Any:
    """Find a fact that depends on the values of this call, once for the call. It is not kept for another call."""
    if what not in task.facts:
        # Without inference mode: its tensors could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            task.facts[what] = find()
    return task.facts[what]


def wrong_rank(x: Inputs, key: Key, private: PrivateCopy) -> str:
    """A message if x has the wrong number of axes for the first convolution, else "". The model may still accept x."""
    first = first_convolution(private.module)
    if key is not None or first is None or raw(x, key).ndim == len(first.kernel_size) + 2:
        return ""
    return (
        f"x has shape {tuple(raw(x, key).shape)}, and {type(first).__name__} wants {len(first.kernel_size) + 2} axes: "
        "(n, channels, *size); is the batch axis missing? (x[None] adds one)"
    )
