"""Weight files: read tensors by name without running code, and load them into a model."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from camfn._errors import CamError
from camfn._paths import kind

CONTAINERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
"""The keys under which training scripts store the tensors in a checkpoint. The first key found is used."""

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""The prefixes that DataParallel, `torch.compile` and Lightning add to all names."""


class Checkpoint(NamedTuple):
    """The tensors of a weight file, by name."""

    file: Path
    tensors: dict[str, Tensor]


def read(file: Path) -> Checkpoint:
    """Read a weight file: `.safetensors`, or a `state_dict` written by `torch.save`.

    The `state_dict` may be stored under one of `CONTAINERS`. Pickles are always read with `weights_only=True`, so no code is
    run.

    **Raises** `CamError` if the file does not exist, or holds anything but tensors by name.
    """
    file = Path(file)
    other = kind(file)
    if other or not file.is_file():
        raise CamError(f"weights file {str(file)!r} is {f'{other}, not a file' if other else 'not there'}")
    try:
        if not file.stat().st_size:
            raise CamError(f"weights file {str(file)!r} is empty")
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
    except OSError as error:
        raise CamError(f"weights file {str(file)!r} cannot be read: {error.strerror or error}") from error
    return Checkpoint(file, _tensors(found, file))


def _safetensors(file: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CamError(f"weights file {str(file)!r} needs safetensors: pip install 'camfn[cli]'") from error
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CamError(f"weights file {str(file)!r} is damaged, or not a safetensors file ({error})") from error


def _pickle(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns before it raises
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error)) or re.search("(TorchScript)", str(error))
        save = "torch.save(model.state_dict(), FILE)"
        if found is None:
            raise CamError(
                f"weights file {str(file)!r} is damaged, or not a checkpoint of torch: write it with {save}"
            ) from error
        raise CamError(
            f"weights file {str(file)!r} holds more than tensors ({found[1]}), and reading that would run code from the file: "
            f"save the tensors alone, with {save}"
        ) from error


def _tensors(found: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(found, dict):
        found = next((found[key] for key in CONTAINERS if isinstance(found.get(key), dict)), found)
    if isinstance(found, dict) and found:
        others = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
        if not others:
            return found
        what = f"a dict in which {_some([*map(repr, others)])} {'is no tensor' if len(others) == 1 else 'are no tensors'}"
    else:
        what = "an empty dict" if isinstance(found, dict) else f"a {type(found).__name__}"
    places = ", ".join(map(repr, CONTAINERS))
    raise CamError(f"weights file {str(file)!r} must hold tensors by name, at the top or under {places}; found {what}")


# --------------------------------------------------------------------------------------------------------- loading


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the tensors into the model, converted to its dtypes. All names and shapes must match.

    **Raises** `CamError` with the names that do not match. The model may then be partly overwritten.
    """
    own = model.state_dict()
    tensors = _strip_prefixes(checkpoint.tensors, own.keys())
    try:
        model.load_state_dict(tensors)
    except Exception as error:
        subject = f"weights file {str(checkpoint.file)!r} does not fit {type(model).__name__}"
        shapes = {name: (tensors[name].shape, own[name].shape) for name in own if name in tensors}
        misshaped = {name: (found, wanted) for name, (found, wanted) in shapes.items() if found != wanted}
        if not isinstance(error, RuntimeError):
            raise CamError(f"{subject} ({type(error).__name__}: {error})") from error
        # Ask torch for the missing names, since it allows old files to lack some.
        missing, unexpected = model.load_state_dict(_copy(tensors, misshaped), strict=False)
        raise CamError(f"{subject}: {misfit(set(missing) - misshaped.keys(), unexpected, misshaped)}") from error


def _strip_prefixes(tensors: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Strip prefixes that all names share, if the model knows more of the stripped names."""
    best = tensors
    while prefix := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)), None):
        tensors = _copy(tensors)
        consume_prefix_in_state_dict_if_present(tensors, prefix)
        best = max(best, tensors, key=lambda tensors: len(tensors.keys() & wanted))
    return best


def _copy(tensors: Mapping[str, Tensor], leave_out: Collection[str] = ()) -> OrderedDict[str, Tensor]:
    copied: Any = OrderedDict((name, tensor) for name, tensor in tensors.items() if name not in leave_out)
    if hasattr(tensors, "_metadata"):  # the versions of the modules, which torch uses to load old files
        copied._metadata = OrderedDict(tensors._metadata)  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def misfit(missing: Collection[str], unexpected: Collection[str], misshaped: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe the missing, unknown and misshaped names: the number of each, and the first three."""
    shapes = [f"{name!r} is {tuple(found)}, not {tuple(wanted)}" for name, (found, wanted) in misshaped.items()]
    groups = {
        "missing": sorted(map(repr, missing)),
        "unknown to the model": sorted(map(repr, unexpected)),
        "of another shape": sorted(shapes),
    }
    return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in groups.items() if names)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
