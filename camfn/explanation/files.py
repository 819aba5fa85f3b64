"""Cards as files: tensors and photos as arrays, all other facts as JSON. Nothing is pickled."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camfn._errors import CamError, first_line
from camfn._paths import kind
from camfn.explanation.fields import Check, Fields, Picture, ReadOnly
from camfn.formulas.diagnostics import Finding
from camfn.images import View

FORMAT = "camfn card 1"
_PLAIN = ("method", "layers", "grids", "targets", "forwards", "backwards", "heads", "seconds", "names")
"""The fields of strings and numbers."""
_CHECK = ("other", "mean", "random")
"""The tensors of a check."""


def write(card: Fields, path: Path) -> None:
    """Write a card to `.npz` or `.safetensors`."""
    tensors, facts = _tensors(card), json.dumps(_facts(card))
    if path.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {name: _array(tensor) for name, tensor in tensors.items()}
        np.savez_compressed(path, camfn=np.array(facts), **arrays)
    else:
        path.write_bytes(_safetensors().save(tensors, {"camfn": facts}))


def read(path: str | os.PathLike[str]) -> Fields:
    """Read a card.

    **Raises** `CamError` if the file is not a card in `.npz` or `.safetensors`.
    """
    name, other = repr(os.fspath(path)), kind(path)
    if other:
        raise CamError(f"{name} is {other}, not a card")
    suffix = Path(path).suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise CamError(f"{name} is not a card: cards that can be loaded end in .npz or .safetensors")
    if not os.path.exists(path):
        raise CamError(f"there is no file {name}")
    try:
        facts, tensors = _from_npz(path) if suffix == ".npz" else _from_safetensors(path)
        if facts["format"] != FORMAT:
            raise CamError(f"{name} is a card of another version of camfn ({facts['format']})")
        return _card(facts, tensors)
    except CamError:
        raise
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise CamError(f"{name} is not a card that camfn saved: {first_line(error)}") from error
    except Exception as error:  # safetensors has errors of its own
        raise CamError(f"{name} cannot be read: {first_line(error)}") from error


def _from_npz(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with np.load(path, allow_pickle=False) as file:
        facts = json.loads(str(file["camfn"]))
        return facts, {name: torch.from_numpy(file[name]) for name in file.files if name != "camfn"}


def _from_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _safe_open()(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["camfn"])
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CamError("cards in .safetensors need safetensors: pip install 'camfn[cli]'") from error
    return safetensors.torch


def _safe_open() -> Any:
    _safetensors()
    from safetensors import safe_open

    return safe_open


# ----------------------------------------------------------------------------------------------------------- fields


def _tensors(card: Fields) -> dict[str, Tensor]:
    """The tensors by name: `maps` or `maps.0`, `maps.1`, ... of several layers."""
    maps = {f"maps.{i}": each for i, each in enumerate(card.maps)} if isinstance(card.maps, tuple) else {"maps": card.maps}
    found = {**maps, "scores": card.scores}
    found |= {} if card.classes is None else {"classes": card.classes}
    found |= {f"weights.{i}": each for i, each in enumerate(card.weights)}
    found |= {f"errors.{i}": each for i, each in enumerate(card.errors) if each is not None}
    found |= {} if card.check is None else {f"check.{name}": getattr(card.check, name) for name in _CHECK}
    found |= {f"pictures.{i}": torch.from_numpy(np.array(each.image)) for i, each in enumerate(card.pictures)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()  # NumPy has no bfloat16


def _facts(card: Fields) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": FORMAT, **{name: getattr(card, name) for name in _PLAIN}}
    facts |= {"settings": {key: _jsonable(value) for key, value in card.settings.items()}, "versions": dict(card.versions)}
    facts |= {"findings": [tuple(finding) for finding in card.findings], "errors": [each is not None for each in card.errors]}
    facts |= {} if card.check is None else {"orders": card.check.orders}
    return facts | {"pictures": [(picture.view, picture.name) for picture in card.pictures]}


def _jsonable(value: Any) -> Any:
    """A setting as JSON has it, or its text."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return getattr(value, "__name__", repr(value))


def _card(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fields:
    from PIL import Image

    views = [View(*map(_tuples, view)) for view, _ in facts["pictures"]]
    photos = [Image.fromarray(tensors[f"pictures.{i}"].numpy()) for i in range(len(views))]
    plain = {name: _tuples(facts[name]) for name in _PLAIN}
    compared: dict[str, Any] = {name: tensors.get(f"check.{name}") for name in _CHECK}
    check = Check(**compared, orders=facts["orders"]) if "orders" in facts else None
    return Fields(
        **plain,
        maps=tensors["maps"] if "maps" in tensors else _numbered(tensors, "maps"),
        settings=ReadOnly(facts["settings"]),
        classes=tensors.get("classes"),
        scores=tensors["scores"],
        weights=_numbered(tensors, "weights"),
        errors=tuple(tensors[f"errors.{i}"] if known else None for i, known in enumerate(facts["errors"])),
        findings=tuple(Finding(*finding) for finding in facts["findings"]),
        versions=ReadOnly(facts["versions"]),
        pictures=tuple(Picture(photo, view, name) for photo, view, (_, name) in zip(photos, views, facts["pictures"])),
        check=check,
    )


def _numbered(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return tuple(tensors[f"{name}.{i}"] for i in range(count))


def _tuples(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
