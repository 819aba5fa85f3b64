"""Models of the command line: `--model` and `--weights`."""

import importlib.util
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from camfn import images
from camfn._errors import CamError, closest
from camfn._paths import kind
from camfn.model.capture import pure, state_of
from camfn.targets import logits_of
from camfn.zoo import checkpoints, libraries
from camfn.zoo.checkpoints import Checkpoint


class Loaded(NamedTuple):
    """A loaded model, with its preprocessing and class names."""

    spec: str
    file: Path | None  # the user's Python file, if any
    model: nn.Module
    preprocess: Callable[[Any], Any]
    names: tuple[str, ...]  # the names of the classes; empty if unknown


def as_it_is(picture: Any) -> Tensor:
    """The default preprocessing: a picture as `(3, h, w)` in [0, 1], neither resized nor normalized."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


FORMS = "demo, torchvision:NAME[:WEIGHTS], timm:NAME, hf:NAME or path/to/file.py:function"


def load(spec: str, *, weights: Path | None = None, pretrained: bool = True) -> Loaded:
    """Load a model by name.

    - `spec`: `demo`, `torchvision:NAME[:WEIGHTS]`, `timm:NAME`, `hf:NAME` or `path/to/file.py:function`. A Python file is run.
    - `weights`: a weight file. By default, the published weights are used; a Python file decides about its own weights.
    - `pretrained`: if False, use random weights, the same in every run.

    **Raises** `CamError` for every failure, with a message of one sentence.
    """
    with opened(spec, weights=weights, pretrained=pretrained) as loaded:
        return loaded


@contextmanager
def opened(spec: str, *, weights: Path | None = None, pretrained: bool = True) -> Iterator[Loaded]:
    """Load a model as `load` does. Within the context, modules in the folder of the user's file can be imported."""
    prefix, _, name = spec.partition(":")
    if spec == "demo" or (prefix in libraries.LOADERS and name):
        yield _by_name(spec, weights, pretrained)
        return
    file, function = file_of(spec)
    if not pretrained:
        raise CamError(f"--no-pretrained has no meaning with --model {spec!r}: its function decides about the weights")
    checkpoint = weights and checkpoints.read(weights)
    with importable(file.parent):
        loaded = _from_file(spec, file, function)
        if checkpoint:
            checkpoints.fill(loaded.model, checkpoint)
        yield loaded


def _by_name(spec: str, weights: Path | None, pretrained: bool) -> Loaded:
    prefix, _, name = spec.partition(":")
    with told(f"--model {spec!r}", None):
        checkpoint = checkpoints.read(weights) if weights else None
        try:
            parts = libraries.load(prefix, name, checkpoint, pretrained) if name else _demo(checkpoint, pretrained)
        except CamError as error:
            raise CamError(f"--model {spec!r}: {error}") from error
        return Loaded(spec, None, *parts)


def _demo(weights: Checkpoint | None, pretrained: bool) -> libraries.Parts:
    from camfn import demo

    model = demo.network(pretrained=pretrained and weights is None)
    if weights:
        checkpoints.fill(model, weights)
    return libraries.Parts(model, demo.preprocess, tuple(demo.CLASSES))


# --------------------------------------------------------------------------------------------------- a Python file


def file_of(spec: str) -> tuple[Path, str]:
    """Return the file and the function of `path/to/file.py:function`."""
    path, _, name = spec.rpartition(":")
    if spec.endswith((".py", ".py:")):
        raise CamError(f"--model {spec!r} does not name a function: write path/to/file.py:function")
    other = kind(path) if path else None
    if not name or not (path.endswith(".py") or other or Path(path).is_file()):
        raise CamError(f"--model {spec!r} is none of {FORMS}")
    if other:
        raise CamError(f"--model {spec!r}: {path!r} is {other}, not a Python file")
    if not Path(path).is_file():
        raise CamError(f"--model {spec!r}: there is no file {path!r}")
    return Path(path).resolve(), name


def _from_file(spec: str, file: Path, name: str) -> Loaded:
    """Run the file that `spec` names and call its function."""
    with told(f"--model {spec!r}", file):
        module = _run(file)
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise CamError(f"--model {spec!r}: the file has no function {name!r}; closest: {closest(name, own)}")
        _check_no_arguments(function, spec)
        return _loaded(spec, file, function())


def _run(file: Path) -> types.ModuleType:
    name = "_camfn_model_" + re.sub(r"\W", "_", file.stem)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CamError(f"--model: {file.name!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up their module there
    spec.loader.exec_module(module)
    return module


def _check_no_arguments(function: Callable[..., Any], spec: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CamError(f"--model {spec!r}: the function must take no argument ({error})") from None
    except ValueError:  # some callables have no signature
        return


def _loaded(spec: str, file: Path, made: Any) -> Loaded:
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    model, preprocess, names = (*parts, None, None, None)[:3]
    listed = names is None or (isinstance(names, Sequence) and not isinstance(names, str))
    if len(parts) > 3 or not isinstance(model, nn.Module) or not (preprocess is None or callable(preprocess)) or not listed:
        found = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise CamError(
            f"--model {spec!r}: the function must return the model, (model, preprocess) or (model, preprocess, class names); "
            f"found {found}"
        )
    return Loaded(spec, file, model, preprocess or as_it_is, tuple(map(str, names or ())))


# --------------------------------------------------------------------------------------------- inputs, outputs, classes


def input_of(loaded: Loaded, picture: Any) -> Tensor:
    """Preprocess a picture to a batch of one, on the model's device and in its dtype."""
    images.check_narrow(loaded.preprocess, picture.size)
    with told("preprocess", loaded.file):
        x = loaded.preprocess(picture)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (3, 4) or (x.ndim == 4 and len(x) != 1):
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise CamError(f"preprocess must return a tensor of floats, of shape (channels, height, width); found {found}")
    images.check_input(x, picture.size)
    tensors = itertools.chain(loaded.model.parameters(), loaded.model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), x)
    x = x.detach().to(like.device, like.dtype)
    return x if x.ndim == 4 else x[None]


def outputs_of(loaded: Loaded, x: Tensor) -> Tensor:
    """Return the model's outputs for one picture, `(classes,)`."""
    hint = "; without preprocess the picture is neither resized nor normalized: return (model, preprocess)"
    hint = hint if loaded.preprocess is as_it_is else ""
    with told(f"the model, on an input of shape {tuple(x.shape)},", loaded.file, hint), torch.no_grad():
        y = logits_of(pure(loaded.model)(state_of(loaded.model), x))
    y = y[:, None] if y.ndim == 1 else y  # a single logit
    if y.ndim != 2 or y.shape[0] != 1:
        raise CamError(f"the model's output has shape {tuple(y.shape)}: the command explains classes, and needs (1, classes)")
    if loaded.names and len(loaded.names) != y.shape[1]:
        raise CamError(f"--model {loaded.spec!r} gives {len(loaded.names)} class names, and the model has {y.shape[1]} classes")
    return y[0].cpu().double()  # not every device has float64


def class_of(target: str | None, names: Sequence[str]) -> int | None:
    """Parse a class of `--target`: a number is an index, anything else a name, case-insensitive."""
    if target is None:
        return None
    if re.fullmatch(r"-?\d+", target.strip()):
        return int(target)
    found = [str(index) for index, name in enumerate(names) if name.lower() == target.strip().lower()]
    if len(found) > 1:
        raise CamError(f"--target {target!r} is the name of the classes {', '.join(found)}: pass the number")
    if not found:
        why = f"closest: {closest(target, names)}" if names else "--model has no class names, so pass the number"
        raise CamError(f"--target {target!r} is not a class; {why}")
    return int(found[0])


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the modules in a folder importable, as for a script in it."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def told(what: str, file: Path | None, hint: str = "") -> Iterator[None]:
    """Turn an exception in the user's code into a CamError that names the line of the user's file."""
    try:
        yield
    except CamError:
        raise
    except (Exception, SystemExit) as error:
        raise CamError(f"{what} failed{_where(error, file)}: {_short(error)}{hint}") from error


def _where(error: BaseException, file: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f" at line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" at line {frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _short(error: BaseException) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text if len(text) <= 500 else text[:500] + ' ...'}"
