"""The inputs of a model: their kinds, the one with the pixels, and their validation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from camfn import _compat
from camfn._axes import Axes, checked_axes, usual
from camfn._errors import CamError
from camfn._types import Inputs, State

Key = str | int | None
"""The key of the input with the pixels; `None` if x is the only input."""


class Pixels(NamedTuple):
    """The input with the pixels: its key, and the order of its axes."""

    key: Key  # None if x is the only input
    axes: Axes


class Companions(NamedTuple):
    """The input with the pixels, and how the companion inputs belong to the images."""

    pixels: Pixels
    rows: int  # batch size of the companion inputs; 0 if all images share them


class Batch(NamedTuple):
    """The validated inputs of one call."""

    x: Inputs
    pixels: Pixels
    n: int  # number of images

    @property
    def image(self) -> Tensor:
        """The input with the pixels, `(n, k, *size)`."""
        return pick(self.x, self.pixels)

    @property
    def size(self) -> tuple[int, ...] | None:
        """The spatial size of the pixels. `None` without spatial axes, and for a list of images of several sizes."""
        return size_of(self.x, self.pixels)

    def with_image(self, image: Tensor) -> "Batch":
        """The batch with its pixels replaced by `image`."""
        return self._replace(x=with_input(self.x, self.pixels, image))


def check(x: Any, masked: Key, axes: str | None, state: State, masks: bool) -> Batch:
    """Validate the inputs. `masks` says that the method masks the pixels."""
    x = plain(x)
    key = key_of(x, masked, masks)
    n = check_inputs(x, key, state, masks and axes is None)
    return Batch(x, Pixels(key, _named_axes(x, key, axes)), n)


def _named_axes(x: Inputs, key: Key, axes: str | None) -> Axes:
    found = raw(x, key)
    return usual(found.ndim) if axes is None else checked_axes(axes, found.ndim, _name_of(key))


def _name_of(key: Key) -> str:
    return "x" if key is None else f"x[{key!r}]"


def plain(x: Any) -> Any:
    """Convert a mapping to a dict: pytrees do not know every mapping."""
    return dict(x) if isinstance(x, Mapping) else x


def sample(x: Inputs) -> Inputs:
    """The inputs without the wrappers of transforms, for forward passes outside of them."""
    return tree_map(lambda leaf: _compat.sample_of(leaf).detach() if isinstance(leaf, Tensor) else leaf, x)


def raw(x: Inputs, key: Key) -> Tensor:
    """The input at `key`, as the model takes it. For a list, its images stacked, or the first one if they differ in size."""
    if isinstance(x, list):
        return torch.stack(x) if _one_size(x) else x[0][None]
    several: Any = x
    return several if key is None else several[key]


def pick(x: Inputs, pixels: Pixels) -> Tensor:
    """The input with the pixels, `(n, k, *size)`."""
    return pixels.axes.first(raw(x, pixels.key))


def _count(x: Inputs, key: Key) -> int:
    """Number of images."""
    return len(x) if isinstance(x, list) else raw(x, key).shape[0]


def with_input(x: Inputs, pixels: Pixels, image: Tensor) -> Inputs:
    """`x` with its pixels replaced by an image `(n, k, *size)`."""
    return with_raw(x, pixels.key, pixels.axes.back(image))


def with_raw(x: Inputs, key: Key, value: Tensor) -> Inputs:
    """`x` with one input replaced, as the model takes it."""
    if isinstance(x, list):
        return list(value.unbind(0))
    if key is None:
        return value
    if isinstance(x, Mapping):
        return {**x, str(key): value}
    return tuple(value if i == key else item for i, item in enumerate(x))


def companions_of(x: Inputs, key: Key) -> list[Tensor]:
    """The tensors of the companion inputs."""
    leaves = [] if key is None else tree_flatten(_without(x, key))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def beside(x: Inputs, key: Key, rows: int) -> list[Tensor]:
    """The companion inputs with this many rows."""
    return [leaf for leaf in companions_of(x, key) if _has_rows(leaf, rows)]


def rows_of(x: Inputs, companions: Companions, image: Tensor, masked: Tensor) -> Inputs:
    """The inputs of a chunk: the masked images, and copies of the companion inputs, or of their rows for the same images."""
    pixels = companions.pixels
    if pixels.key is None:
        return with_input(x, pixels, masked)

    def pick(leaf: Any) -> Any:
        if companions.rows and _has_rows(leaf, companions.rows):
            return leaf.index_select(0, image)
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return with_input(tree_map(pick, _without(x, pixels.key)), pixels, masked)


def _without(x: Inputs, key: Key) -> Inputs:
    """Replace the pixels by an empty tensor, so that functions of the companion inputs do not copy them."""
    return with_raw(x, key, torch.empty(()))


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def size_of(x: Inputs, pixels: Pixels) -> tuple[int, ...] | None:
    """The spatial size of the pixels. `None` without one, for images of several sizes, and if the axes are not known."""
    if (isinstance(x, list) and not _one_size(x)) or not pixels.axes.spatial:
        return None
    return tuple(pick(x, pixels).shape[2:])


def _one_size(images: list[Tensor]) -> bool:
    return len({image.shape for image in images}) == 1


# ---------------------------------------------------------------------------------------------------------- checks


def key_of(x: Inputs, masked: Key, masks: bool) -> Key:
    """The key of the input with the pixels: `masked`, or the only floating-point input with spatial axes.

    Methods that do not mask the pixels fall back to the first such input, or else to the first tensor.
    """
    if isinstance(x, (Tensor, list)):
        if masked is not None:
            kind = "a single tensor" if isinstance(x, Tensor) else "a list of images"
            raise CamError(f"masked={masked!r} names one of several inputs, and x is {kind}")
        return None
    if not isinstance(x, (tuple, Mapping)):
        raise CamError(
            f"x must be a tensor, a tuple of inputs or a mapping of them; found {type(x).__name__} "
            "(the order is model, layer, x)"
        )
    items: dict[Any, Any] = dict(x) if isinstance(x, Mapping) else dict(enumerate(x))
    if masked is not None:
        if masked not in items or not isinstance(items[masked], Tensor):
            raise CamError(f"masked={masked!r} is not a tensor of x, which has {', '.join(map(repr, items))}")
        return masked
    found = [key for key, item in items.items() if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 2]
    if len(found) == 1:
        return found[0]
    if masks:
        names, which = (", ".join(map(repr, keys)) for keys in (items, found))
        raise CamError(
            f"masked= must say which input to mask; x has {names or 'nothing in it'}, and "
            f"{which or 'none'} {'are' if len(found) > 1 else 'is'} floating-point with spatial axes"
        )
    tensors = [key for key, item in items.items() if isinstance(item, Tensor)]
    if not tensors:
        raise CamError(f"x holds no tensor: {', '.join(f'{key!r}: {type(item).__name__}' for key, item in items.items())}")
    return (found or tensors)[0]


def check_inputs(x: Inputs, key: Key, state: State, masks: bool) -> int:
    """Validate the inputs, and return the number of samples."""
    if isinstance(x, list):
        _check_list(x, masks)
    image, where = raw(x, key), _name_of(key)
    shape = tuple(image.shape)
    if not image.is_floating_point():
        raise CamError(
            f"{where} is {image.dtype}: a map needs a floating-point input; preprocess it as in training "
            "(a picture: x.float() / 255, then mean and standard deviation)"
        )
    if image.ndim == 0:
        raise CamError(f"{where} has shape (): it needs a batch, (n, channels, *size)")
    if image.shape[0] == 0:
        raise CamError(f"{where} is an empty batch, {shape}: there is nothing to explain")
    if masks and image.ndim < 3:
        raise CamError(
            f"{where} has shape {shape}: masking needs (n, channels, *size), with at least one spatial axis; if there are no "
            'channels, pass axes=, such as axes="nt" for raw sound'
        )
    _check_devices(x, state)
    if not _compat.transformed():
        for i, part in enumerate(x if isinstance(x, list) else [image]):
            if not bool(torch.isfinite(part).all()):
                name = f"x[{i}]" if isinstance(x, list) else where
                raise CamError(f"{name} is not finite: it has {int((~torch.isfinite(part)).sum())} NaN or infinite values")
    return _count(x, key)


def _check_list(x: list[Any], masks: bool) -> None:
    one = "x is a list, which is one argument of the model: a detector's images, (channels, *size) each"
    if not x:
        raise CamError("x is an empty list: there is nothing to explain")
    for i, image in enumerate(x):
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim < 2:
            is_tensor = isinstance(image, Tensor)
            found = f"{image.dtype} of shape {tuple(image.shape)}" if is_tensor else f"a {type(image).__name__}"
            raise CamError(f"{one}; x[{i}] is {found} (a tuple is several arguments)")
    if masks and not _one_size(x):
        sizes = ", ".join(str(tuple(image.shape)) for image in x[:3])
        raise CamError(f"{one}; this method masks them all at once and they have several sizes, {sizes}: pass one at a time")


def _check_devices(x: Inputs, state: State) -> None:
    here = {leaf.device for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)}
    away = [name for name, tensor in state.items() if tensor.device not in here]
    if any(device.type == "meta" for device in here) and (not away or len(here) > 1):
        raise CamError("x is on the meta device, which holds shapes and no values: there is nothing to explain")
    if not away or len(here) > 1:
        return  # a model may be spread over devices, with inputs on each
    there = ", ".join(sorted({str(state[name].device) for name in away}))
    who = "the model is" if len(away) == len(state) else f"{', '.join(map(repr, away[:3]))} of the model's state is"
    raise CamError(f"{who} on {there} and x is on {', '.join(map(str, here))}; move one to the other")
