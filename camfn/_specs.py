"""The forms of a model's name, checked without torch: a library's model, or a function in a Python file."""

from pathlib import Path

from camfn._errors import CamError
from camfn._paths import kind

FORMS = "demo, torchvision:NAME[:WEIGHTS], timm:NAME, hf:NAME or path/to/file.py:function"
LIBRARIES = ("torchvision", "timm", "hf")


def is_named(spec: str) -> bool:
    """Whether a model is named by a library, or is the demo network."""
    prefix, _, name = spec.partition(":")
    return spec == "demo" or (prefix in LIBRARIES and bool(name))


def check(spec: str) -> None:
    """Raise CamError if a name has no known form, or names a file that is not there."""
    if not is_named(spec):
        file_of(spec)


def file_of(spec: str) -> tuple[Path, str]:
    """Return the file and the function of `path/to/file.py:function`."""
    path, _, name = spec.rpartition(":")
    if spec.endswith((".py", ".py:")):
        raise CamError(f"model {spec!r} does not name a function: write path/to/file.py:function")
    other = kind(path) if path else None
    if not name or not (path.endswith(".py") or other or Path(path).is_file()):
        raise CamError(f"model {spec!r} is none of {FORMS}")
    if other:
        raise CamError(f"model {spec!r}: {path!r} is {other}, not a Python file")
    if not Path(path).is_file():
        raise CamError(f"model {spec!r}: there is no file {path!r}")
    return Path(path).resolve(), name
