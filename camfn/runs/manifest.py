"""The manifest of a run: its settings, the weights and the versions. A run that is resumed must have the same settings."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camfn._errors import CamError
from camfn._version import __version__
from camfn.runs import shards
from camfn.runs.rows import arrow

FILE = "manifest.json"
FORMAT = 1


def weights_of(model: nn.Module) -> str:
    """The SHA-256 of a model's parameters and buffers, with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def agree(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the manifest of a new run, or compare it with that of the run to resume.

    **Raises** `CamError` that says which settings differ.
    """
    wanted = json.loads(json.dumps(dict(settings)))
    if not (out / FILE).exists():
        found = {"format": FORMAT, "settings": wanted, "versions": _versions()}
        with shards.whole(out / FILE) as file:
            file.write(json.dumps(found, indent=1).encode())
    there = read(out)["settings"]
    for key in dict.fromkeys([*there, *wanted]):
        if there.get(key) != wanted.get(key):
            raise CamError(
                f"{str(out)!r} has {key} {there.get(key)!r}, and this call has {wanted.get(key)!r}; "
                "use the same, or another folder"
            )


def read(out: Path) -> dict[str, Any]:
    """Read the manifest of a run. **Raises** `CamError` if there is none."""
    try:
        found = json.loads((out / FILE).read_bytes())
    except FileNotFoundError:
        raise CamError(f"{str(out)!r} holds no run: it has no {FILE}") from None
    except (OSError, ValueError) as error:
        raise CamError(f"{str(out / FILE)!r} cannot be read ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise CamError(f"{str(out / FILE)!r} is not the manifest of a run")
    if found.get("format") != FORMAT:
        raise CamError(f"{str(out)!r} has format {found.get('format')!r}, and this camfn reads format {FORMAT}")
    return found


def _versions() -> dict[str, str]:
    return {
        "camfn": __version__,
        "torch": torch.__version__,
        "pyarrow": arrow().__version__,
        "python": platform.python_version(),
    }
