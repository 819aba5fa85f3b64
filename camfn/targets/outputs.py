"""Outputs of models: their parts, which part belongs to one image, and the logits and embeddings in them.

Which parts of an output have a row for each image cannot be read off one shape: with three images, a first axis of 3 may be
theirs, or that of three texts. Two outputs for different numbers of images tell: what follows the number belongs to the images,
and what stays is shared. A `Reading` holds what was found, and is good for outputs of any number of images.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from camfn import _compat
from camfn._errors import CamError

Reading: TypeAlias = "int | Literal['each'] | tuple[tuple[Any, Reading], ...] | None"
"""Which part of an output belongs to one image: a tensor's axis of images; `"each"` for a sequence with one entry for each
image; the readings of parts by key, for those that hold rows; `None` for what is shared as a whole. It is hashable."""

Another: TypeAlias = Callable[[], tuple[Any, int] | None]
"""A function that runs the model on another number of images: the output, and this number. `None` if the model fails."""


class Entries(tuple[Any, ...]):
    """One entry for each image. A pytree function takes it for a leaf."""


class Shared:
    """A value that is handed whole to all samples. A pytree function takes it for a leaf."""

    def __init__(self, value: Any) -> None:
        self.value = value


# ------------------------------------------------------------------------------------------------------- the parts


def is_record(output: Any) -> bool:
    """Return True for plain dataclasses, whose tensors torch's pytree functions do not see."""
    return dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping))


def fields_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, SimpleNamespace)) or is_record(value)


def _opens(value: Any, top: bool) -> bool:
    """Return True for a container, and for an object with tensors that is the whole output of a model."""
    attributes = vars(value).values() if top and not isinstance(value, (Tensor, type)) and hasattr(value, "__dict__") else ()
    return _is_container(value) or any(isinstance(part, Tensor) for part in attributes)


def _parts_of(value: Any) -> dict[Any, Any]:
    """Return the entries of a container, or the attributes of an object, by key."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return fields_of(value) if is_record(value) else dict(getattr(value, "__dict__", {}))


def _with_parts(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a value of the same type with these parts. A mapping that cannot be written to becomes a dict."""
    if isinstance(value, (list, tuple)):
        entries = list(parts.values())
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if type(value) is dict or (isinstance(value, Mapping) and not hasattr(value, "update")):
        return parts
    if _is_made_of_fields(value):
        return type(value)(**parts)
    made: Any = copy.copy(value)
    if is_record(value):
        for name, part in parts.items():
            object.__setattr__(made, name, part)  # the record may be frozen
    else:
        (made if isinstance(value, Mapping) else vars(made)).update(parts)
    return made


def _is_made_of_fields(value: Any) -> bool:
    """Return True for a dataclass that its fields alone make, and for a ModelOutput, which is a mapping too."""
    plain = isinstance(value, Mapping) or not hasattr(value, "__post_init__")
    return dataclasses.is_dataclass(value) and plain and all(field.init for field in dataclasses.fields(value))


def flatten(value: Any, top: bool = True) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves of an output, and the function that puts others in their place.

    It opens what torch's pytree functions open, and also what they do not know: records, other mappings, and the object that a
    model returns.
    """
    if not _opens(value, top):
        leaves, tree = tree_flatten(value)
        return leaves, lambda new: tree_unflatten(list(new), tree)
    inner = {key: flatten(part, False) for key, part in _parts_of(value).items()}

    def rebuilt(new: Iterable[Any]) -> Any:
        given = iter(new)
        return _with_parts(value, {key: made(islice(given, len(leaves))) for key, (leaves, made) in inner.items()})

    return [leaf for leaves, _ in inner.values() for leaf in leaves], rebuilt


def form_of(output: Any) -> Callable[[Iterable[Any]], Any]:
    """Return the second result of `flatten`, without the tensors of the output: it can be kept."""
    leaves, rebuilt = flatten(output)
    return flatten(rebuilt(map(_blank, leaves)))[1]


def _blank(leaf: Any) -> Any:
    """Return a tensor of the same shape, dtype and device that holds one number, since a container may check these."""
    return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def shown(value: Any, depth: int = 3) -> str:
    """Return the shapes of an output's parts, for an error message.

    >>> import torch
    >>> shown({"logits": torch.ones(2, 5), "loss": torch.ones(()), "cache": object()})
    '{logits: (2, 5), loss: (), cache: object}'
    """
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if value is None or not _is_container(value) or not depth:
        return "None" if value is None else type(value).__name__
    parts = [(key, shown(part, depth - 1)) for key, part in list(_parts_of(value).items())[:8]]
    rest = ["..."] if len(_parts_of(value)) > 8 else []
    if isinstance(value, (list, tuple)):
        return f"[{', '.join([text for _, text in parts] + rest)}]"
    return f"{{{', '.join([f'{key}: {text}' for key, text in parts] + rest)}}}"


# -------------------------------------------------------------------------------------- which part is whose


class Observed(NamedTuple):
    """The reading of an output."""

    reading: Reading
    remark: str = ""  # why the reading was not observed, where it is in doubt


def observe(output: Any, n: int, another: Another) -> Observed:
    """Find out which parts of an output belong to the n images one by one. The model runs again only where this is in doubt."""
    if isinstance(output, Tensor):
        return Observed(0 if output.ndim and len(output) == n else None)
    inside = list(_inside(output))
    sized = [part for part in inside if isinstance(part, Tensor) and n in part.shape]
    several = [part for part in inside if isinstance(part, (list, tuple)) and len(part) == n]
    if not sized and several and several[0] is output:
        return Observed("each")
    if len(sized) == 1 and not several:
        return Observed(_assumed(output, lambda tensor: tuple(tensor.shape).index(n) if n in tensor.shape else None, n))
    other = another()
    if other is not None:
        return Observed(compared(output, n, *other))
    first = _assumed(output, lambda tensor: 0 if tensor.ndim and len(tensor) == n else None, n)
    return Observed(first, f"each part of the output whose first axis is {n} was taken for one row for each image")


def _inside(value: Any, top: bool = True) -> Iterator[Any]:
    """Yield the value, and all that its containers hold. A model may return an object of its own, with tensors in it."""
    yield value
    if _opens(value, top):
        for part in _parts_of(value).values():
            yield from _inside(part, False)


def _assumed(value: Any, axis: Callable[[Tensor], int | None], n: int, top: bool = True) -> Reading:
    """Return the reading of an output from its shapes alone."""
    if isinstance(value, Tensor):
        return axis(value)
    if not _opens(value, top):
        return None
    if isinstance(value, list) and len(value) == n:
        return "each"
    return _without_shared((key, _assumed(part, axis, n, False)) for key, part in _parts_of(value).items())


def compared(value: Any, n: int, other: Any, m: int, top: bool = True) -> Reading:
    """Return the reading of an output for n images, from another one for m images."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        axes = enumerate(zip(value.shape, other.shape)) if value.ndim == other.ndim else ()
        return next((axis for axis, sides in axes if sides == (n, m)), None)
    if isinstance(value, Tensor) or type(value) is not type(other) or not _opens(value, top):
        return None
    if isinstance(value, (list, tuple)) and (len(value), len(other)) == (n, m):
        return "each"
    parts, others = _parts_of(value), _parts_of(other)
    return _without_shared((key, compared(part, n, others[key], m, False)) for key, part in parts.items() if key in others)


def _without_shared(readings: Iterator[tuple[Any, Reading]]) -> Reading:
    return tuple((key, reading) for key, reading in readings if reading is not None) or None


def rows_in(reading: Reading, output: Any) -> list[Any]:
    """Return the tensors that belong to the images, with the images first, and the `Entries`."""
    if reading is None:
        return []
    if reading == "each":
        return [Entries(output)]
    if isinstance(reading, int):
        return [output.movedim(reading, 0) if reading else output]
    parts = _parts_of(output)
    return [row for key, inner in reading for row in rows_in(inner, parts[key])]


def with_rows(reading: Reading, output: Any, rows: Iterator[Any]) -> Any:
    """Return the output with these in place of what `rows_in` returns. Without rows, it is the output itself."""
    if reading is None:
        return output
    if not isinstance(reading, tuple):
        return next(rows)
    parts = _parts_of(output)
    return _with_parts(output, {**parts, **{key: with_rows(inner, parts[key], rows) for key, inner in reading}})


def of_image(reading: Reading, output: Any, image: int) -> Any:
    """Return the output of one image as a batch of one."""
    if reading == "each":
        return output[image : image + 1]
    if isinstance(reading, int):
        return output.narrow(reading, image, 1)
    if reading is None:
        return output
    parts = _parts_of(output)
    return _with_parts(output, {**parts, **{key: of_image(inner, parts[key], image) for key, inner in reading}})


def has_entries(reading: Reading) -> bool:
    """Return True if a part is a sequence with one entry for each image."""
    return reading == "each" or (isinstance(reading, tuple) and any(has_entries(inner) for _, inner in reading))


def repeats(output: Any, n: int, other: Any, m: int) -> bool:
    """Return True if an output for m times the first image has, for each of them, what the output for n images has for it.

    All floating-point tensors that belong to the images are compared. A part that is shared tells nothing.
    """
    return _repeats(output, n, other, m) and _repeats(similarities(output), n, similarities(other), m, True)


def _repeats(output: Any, n: int, other: Any, m: int, empty: bool = False) -> bool:
    reading = compared(output, n, other, m)
    rows, others = rows_in(reading, output), rows_in(reading, other)
    if not rows:
        return empty
    return all(_equal(pair) for image in range(m) for pair in zip(_floats(rows, 0), _floats(others, image)))


def _floats(rows: list[Any], image: int) -> list[Tensor]:
    leaves = flatten([row[image] for row in rows])[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _equal(pair: tuple[Tensor, Tensor]) -> bool:
    expected, found = pair
    if expected.shape != found.shape:
        return False
    return not expected.numel() or bool(((found - expected).abs() <= 0.01 * expected.abs().amax()).all())


# ------------------------------------------------------------------------------------------------ what targets read


_LOGITS = ("logits", "out", "logits_per_image")


def found_in(output: Any, keys: tuple[str, ...]) -> Tensor | None:
    """Return the tensor in an output: itself, the first of these keys or attributes, or that of its first element.

    Quantized tensors are dequantized.
    """
    if isinstance(output, Tensor):
        return output.dequantize() if _compat.is_quantized(output) else output
    found = next((value for key in keys if isinstance(value := _named(output, key), Tensor)), None)
    if found is not None:
        return found_in(found, ())
    return found_in(output[0], keys) if isinstance(output, (tuple, list)) and output else None


def _named(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a batch or sample.

    They are the output itself, its `logits`, `out` or `logits_per_image`, the similarities of image and text features, or the
    first element.
    """
    named = isinstance(output, Tensor) or any(isinstance(_named(output, key), Tensor) for key in _LOGITS)
    found = None if named else similarities(output)
    found = found_in(output, _LOGITS) if found is None else found
    if found is None:
        text = f", {shown(output)}" if _is_container(output) else ""
        raise CamError(
            f"the model returns a {type(output).__name__} without logits in it{text}; pass a callable target that "
            f"reads it{other_targets(output)}"
        )
    return found


def similarities(output: Any) -> Tensor | None:
    """Return the similarities of images and texts, `scale * image @ text.T (+ bias)`, or `None` for other outputs.

    They are read from `(image_features, text_features, logit_scale)`, with or without a `logit_bias`, or from these names, as
    in open_clip: two matrices of equal width and one number, or two.
    """
    if isinstance(output, (tuple, list)):
        parts = list(output) if len(output) in (3, 4) else []
        numbers = all(isinstance(part, Tensor) and part.ndim == 0 for part in parts[2:])
    else:
        parts = [_named(output, key) for key in ("image_features", "text_features", "logit_scale", "logit_bias")]
        parts = parts[:3] if parts[3] is None else parts
        numbers = all(isinstance(part, Tensor) and part.numel() == 1 for part in parts[2:])
    if not parts or not numbers or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        return None
    image, text, scale, *bias = parts
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        return None
    return sum(bias, scale * image @ text.mT)


def is_detections(output: Any) -> bool:
    """Return True for a list with boxes, labels and scores for each image."""
    keys = {"boxes", "labels", "scores"}
    return isinstance(output, list) and bool(output) and all(isinstance(one, Mapping) and keys <= set(one) for one in output)


def other_targets(output: Any) -> str:
    """Return the end of an error message: the target that fits the output, if one does."""
    if is_detections(output) or is_detections([output]):
        return "; targets.boxes() explains detections"
    found = found_in(output, _LOGITS)
    if found is None or not found.is_floating_point():
        return ""
    if found.ndim > 3 or (found.ndim == 3 and isinstance(output, Tensor)):
        return "; targets.segmentation(c=...) explains a class over the pixels of an output (n, classes, *grid)"
    return "; targets.regression(...) explains an output that is not a class"
