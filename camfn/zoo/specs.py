"""Models by name, or from a function in a file of the user, and targets in words."""

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
from camfn._errors import CamError, suggested
from camfn._specs import file_of, is_named
from camfn.model.capture import pure, state_of, tap
from camfn.model.ports import place_of
from camfn.model.prepare import Call, prepare
from camfn.targets import Top, logits_of
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


def load(spec: str, *, weights: Path | None = None, pretrained: bool = True) -> Loaded:
    """Load a model by name.

    - `spec`: `demo`, `torchvision:NAME[:WEIGHTS]`, `timm:NAME`, `hf:NAME` or `path/to/file.py:function`. A Python file is run.
    - `weights`: a weight file. By default, the published weights are used; a Python file decides about its own weights.
    - `pretrained`: if False, use random weights, the same in every run.

    **Raises** `CamError` for every failure, with a message of one sentence.
    """
    with opened(spec, weights=weights, pretrained=pretrained) as loaded:
        return loaded


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise CamError if the model has no such layer, or a layer is named twice. The message is for the command line."""
    known = Call(prepare(model)).borrow().modules
    for name in layers:
        if place_of(name, known) is None:
            raise CamError(
                f"no layer named {name!r} in {type(model).__name__}{suggested(name, known)}; "
                "`camfn layers --model SPEC` lists the layers"
            )
    tap(model, list(layers))


@contextmanager
def opened(spec: str, *, weights: Path | None = None, pretrained: bool = True) -> Iterator[Loaded]:
    """Load a model as `load` does. Within the context, modules in the folder of the user's file can be imported."""
    if is_named(spec):
        yield _by_name(spec, weights, pretrained)
        return
    file, function = file_of(spec)
    if not pretrained:
        raise CamError(f"--no-pretrained has no meaning with model {spec!r}: its function decides about the weights")
    checkpoint = weights and checkpoints.read(weights)
    with importable(file.parent):
        loaded = _from_file(spec, file, function)
        if checkpoint:
            checkpoints.fill(loaded.model, checkpoint)
        yield loaded


def _by_name(spec: str, weights: Path | None, pretrained: bool) -> Loaded:
    prefix, _, name = spec.partition(":")
    with told(f"model {spec!r}", None):
        checkpoint = checkpoints.read(weights) if weights else None
        try:
            parts = libraries.load(prefix, name, checkpoint, pretrained) if name else _demo(checkpoint, pretrained)
        except CamError as error:
            raise CamError(f"model {spec!r}: {error}") from error
        return Loaded(spec, None, *parts)


def _demo(weights: Checkpoint | None, pretrained: bool) -> libraries.Parts:
    from camfn import demo

    model = demo.network(pretrained=pretrained and weights is None)
    if weights:
        checkpoints.fill(model, weights)
    return libraries.Parts(model, demo.preprocess, tuple(demo.CLASSES))


# --------------------------------------------------------------------------------------------------- a Python file


def _from_file(spec: str, file: Path, name: str) -> Loaded:
    """Run the file that `spec` names and call its function."""
    with told(f"model {spec!r}", file):
        module = _run(file)
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise CamError(f"model {spec!r}: the file has no function {name!r}{suggested(name, own)}")
        _check_no_arguments(function, spec)
        return _loaded(spec, file, function())


def _run(file: Path) -> types.ModuleType:
    name = "_camfn_model_" + re.sub(r"\W", "_", file.stem)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CamError(f"{file.name!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up their module there
    spec.loader.exec_module(module)
    return module


def _check_no_arguments(function: Callable[..., Any], spec: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CamError(f"model {spec!r}: the function must take no argument ({error})") from None
    except ValueError:  # some callables have no signature
        return


def _loaded(spec: str, file: Path, made: Any) -> Loaded:
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    model, preprocess, names = (*parts, None, None, None)[:3]
    listed = names is None or (isinstance(names, Sequence) and not isinstance(names, str))
    if len(parts) > 3 or not isinstance(model, nn.Module) or not (preprocess is None or callable(preprocess)) or not listed:
        found = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise CamError(
            f"model {spec!r}: the function must return the model, (model, preprocess) or (model, preprocess, class names); "
            f"found {found}"
        )
    return Loaded(spec, file, model, preprocess or as_it_is, tuple(map(str, names or ())))


# --------------------------------------------------------------------------------------------- inputs and outputs


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
        raise CamError(f"model {loaded.spec!r} gives {len(loaded.names)} class names, and the model has {y.shape[1]} classes")
    return y[0].cpu().double()  # not every device has float64


# ------------------------------------------------------------------------------------------------ targets in words


LISTED = 10
"""The number of classes that a message lists, at most."""


def targets_of(texts: Sequence[str], names: Sequence[str], what: str = "target") -> tuple[int | Top, ...]:
    """Read targets in words: each is a class, as `class_of` reads it, or `topK`: the K classes with the highest output.

    - `what`: the subject of error messages.

    >>> targets_of(["top3", "tabby", "1"], ["tench, Tinca tinca", "goldfish", "tabby, tabby cat"])
    (Top(k=3), 2, 1)
    """
    best = [re.fullmatch(r"top([1-9]\d*)", text.strip(), re.IGNORECASE) for text in texts]
    return tuple(Top(int(top[1])) if top else class_of(text, names, what) for text, top in zip(texts, best))


def class_of(text: str, names: Sequence[str], what: str = "target") -> int:
    """Read a class in words. Case does not matter.

    It is, and the first of these that fits a class decides: an index; a whole name; one of the synonyms in a name, which
    commas separate; words of a name; a part of a name.

    **Raises** `CamError` if no class fits, or several do. It lists them, or those that are close.

    >>> [class_of(text, ["tabby, tabby cat", "tiger cat", "tiger, Panthera tigris"]) for text in ("tabby", "TIGER", "panth")]
    [0, 2, 2]
    """
    if re.fullmatch(r"-?\d+", text.strip()):
        return int(text)
    wanted, plain = _plain(text), [_plain(name) for name in names]
    kinds = (_is_name, _is_synonym, _has_words, _has_part) if re.search(r"\w", wanted) else (_is_name,)
    for fits in kinds:
        found = [index for index, name in enumerate(plain) if fits(wanted, name)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = [f"{index} {names[index]!r}" for index in found[:LISTED]]
            more = [f"{len(found) - LISTED} more"] if len(found) > LISTED else []
            raise CamError(f"{what} {text!r} fits {len(found)} classes: {', '.join([*listed, *more])}; give the index")
    known = [part for name in names for part in dict.fromkeys([name, *name.split(", ")])]
    none = "give the index" if names else "the model has no class names, so give the index"
    why = suggested(text, known) or f"; {none}"
    raise CamError(f"{what} {text!r} is not a class{why}")


def _plain(name: str) -> str:
    """A name for comparison: in one case, with single spaces. Some lists of classes have underscores for them."""
    return " ".join(name.casefold().replace("_", " ").split())


def _is_name(wanted: str, name: str) -> bool:
    return wanted == name


def _is_synonym(wanted: str, name: str) -> bool:
    return wanted in (part.strip() for part in name.split(","))


def _has_words(wanted: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", name) is not None


def _has_part(wanted: str, name: str) -> bool:
    return wanted in name


def classes_of(targets: Sequence[int | Top], outputs: Tensor, what: str = "target") -> tuple[int, ...]:
    """Return the classes of one image that targets of `targets_of` name, in their order, each once.

    No target is the class with the highest output.

    - `outputs`: the model's outputs for the image, `(classes,)`.

    >>> classes_of([0, Top(2), 0], torch.tensor([1.0, 3.0, 2.0]))
    (0, 1, 2)
    """
    count, found = len(outputs), []
    for target in targets or [Top(1)]:
        if isinstance(target, Top):
            if target.k > count:
                raise CamError(f"{what} top{target.k} needs {target.k} classes: the model has {count}")
            found += outputs.topk(target.k).indices.tolist()
        elif 0 <= target < count:
            found.append(target)
        else:
            raise CamError(f"{what} {target} is not a class: the model has classes 0 to {count - 1}")
    return tuple(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------- a user's code


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
