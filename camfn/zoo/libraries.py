"""Models of torchvision, timm and transformers, with their own preprocessing and class names."""

import importlib
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from camfn._errors import CamError, suggested
from camfn._paths import kind
from camfn.zoo import checkpoints, downloads
from camfn.zoo.checkpoints import Checkpoint


class Parts(NamedTuple):
    """A model, its preprocessing, and the names of its classes."""

    model: nn.Module
    preprocess: Callable[[Any], Any]
    names: tuple[str, ...]


def load(prefix: str, name: str, weights: Checkpoint | None, pretrained: bool) -> Parts:
    """Load a model of a library, with the weights of a file, published weights or random weights.

    Random weights are the same in every run. The global random state is not changed.
    """
    try:
        with downloads.quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return LOADERS[prefix](name, weights, pretrained and weights is None)
    except ImportError as error:  # transformers imports its parts on first use
        raise _import_error({"hf": "transformers"}.get(prefix, prefix), error) from error


# ------------------------------------------------------------------------------------------------------ torchvision


def _torchvision(name: str, weights: Checkpoint | None, pretrained: bool) -> Parts:
    """Load `NAME[:WEIGHTS]`. WEIGHTS also define the preprocessing and classes, even if they are not loaded."""
    models = _import("torchvision.models")
    name, _, wanted = name.partition(":")
    known = models.list_models(module=models)
    if name not in known:
        raise CamError(f"torchvision has no image classifier {name!r}{suggested(name, known)}")
    kinds = {key: kind for key, kind in models.get_model_weights(name).__members__.items() if kind.meta.get("categories")}
    chosen = kinds.get(wanted or "DEFAULT")
    if chosen is None:
        raise CamError(
            f"torchvision has no weights {wanted or 'DEFAULT'!r} for {name}; there are: {', '.join(kinds) or 'none'}"
        )
    if pretrained:
        weights = checkpoints.read(downloads.downloaded(chosen.url))
    model = models.get_model(name, weights=None, **_meant(name, chosen.meta))
    if weights is not None:
        model = _fill(model, weights, lambda tensors: _by_torchvision(models, name, chosen, tensors))
    return Parts(model, chosen.transforms(), tuple(chosen.meta["categories"]))


def _meant(name: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that torchvision's constructors set when they are given weights."""
    meant: dict[str, Any] = {"num_classes": len(meta["categories"])}
    if name in ("googlenet", "inception_v3"):
        meant |= {"transform_input": True, "aux_logits": name == "inception_v3"}
    elif name.startswith("vit_"):
        meant |= {"image_size": meta["min_size"][0]}
    elif name == "maxvit_t":
        meant |= {"input_size": meta["min_size"]}
    return meant


def _by_torchvision(models: Any, name: str, chosen: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Let torchvision load the tensors like its own download, since it renames or drops keys of old files."""
    kind = type(chosen)
    kind.get_state_dict = lambda *_, **__: tensors
    try:
        return models.get_model(name, weights=chosen)
    finally:
        del kind.get_state_dict


# ------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, weights: Checkpoint | None, pretrained: bool) -> Parts:
    """Load a model of timm by name (with or without tag), `hf-hub:NAME`, `local-dir:FOLDER` or folder."""
    timm = _import("timm")
    if Path(name).is_dir() and name not in timm.list_models():
        name = f"local-dir:{name}"
    hosted, local = name.startswith(("hf-hub:", "hf_hub:")), name.startswith("local-dir:")
    if local:
        _check_folder(name.partition(":")[2])
    if not (hosted or local):
        _check_name(timm, name, pretrained)
    hint = "give timm:FOLDER" if hosted else "give a weight file, or random weights (--no-pretrained)"
    with downloads.hub(name, hint) if hosted or (pretrained and not local) else nullcontext():
        model = timm.create_model(name, pretrained=pretrained)
    if weights is not None:
        model = _fill(model, weights, lambda tensors: _by_timm(timm, name, tensors))
    if not model.num_classes:
        raise CamError("the model has no classifier: its outputs are features")
    config = timm.data.resolve_model_data_config(model)
    return Parts(model, timm.data.create_transform(**config, is_training=False), _timm_names(timm, model))


def _check_name(timm: Any, name: str, pretrained: bool) -> None:
    if not timm.is_model(name):
        raise CamError(f"timm has no model {name!r}, nor is it a folder{suggested(name, timm.list_models())}")
    tagged = timm.models.get_arch_pretrained_cfgs(name)
    if "." in name and name not in tagged:
        raise CamError(f"timm has no model {name!r}{suggested(name, tagged)}")
    if pretrained and tagged and not any(config.has_weights for key, config in tagged.items() if key.startswith(name)):
        raise CamError(f"timm has no weights for {name!r}: give a weight file, or random weights (--no-pretrained)")


def _by_timm(timm: Any, name: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Let timm load the tensors like its own download, since it renames and reshapes tensors of old files."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"source": "", "state_dict": tensors})


def _timm_names(timm: Any, model: Any) -> tuple[str, ...]:
    """Return the model's own class names, or ImageNet's if the number of classes is that of one of its sets."""
    own = model.pretrained_cfg.get("label_names") or ()
    if isinstance(own, Mapping):
        own = [name for _, name in sorted(own.items(), key=lambda item: int(item[0]))]
    if len(own) == model.num_classes:
        return tuple(own)
    subset = timm.data.infer_imagenet_subset(model)
    return tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else ()


# ----------------------------------------------------------------------------------------------------- transformers


def _transformers(name: str, weights: Checkpoint | None, pretrained: bool) -> Parts:
    """Load a model by its name on the hub or its folder. Weights are read from safetensors only."""
    library, remote = _import("transformers"), not Path(name).is_dir()
    if remote and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CamError(f"there is no folder {name!r}, and a model on the hub has a name like microsoft/resnet-50")
    if not remote:
        _check_folder(name)
    with downloads.bars(library.utils.logging, remote):
        config, processor, model = _load_transformers(library, name, pretrained, remote)
        if weights is not None:
            model = _fill(model, weights, lambda tensors: _by_transformers(model, config, tensors))
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = []
    return Parts(model, lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0], tuple(names))


_MESSAGES = {
    "trust_remote_code=True": "it needs code from its repository, which is not run: write path/to/file.py:function instead",
    "Can't load image processor": "it has no preprocessor_config.json, or none that transformers can use",
    "file named model.safetensors": "its weights are not in safetensors: give their file as --weights FILE",
    "Unrecognized configuration class": "transformers has no image classifier of its kind",
}
"""Phrases of transformers' errors, with the messages that replace them. transformers advises to run remote code."""


def _load_transformers(library: Any, name: str, pretrained: bool, remote: bool) -> tuple[Any, Any, nn.Module]:
    try:
        with downloads.hub(name, "give hf:FOLDER") if remote else nullcontext():
            config = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
            processor = library.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            return config, processor, _classifier(library.AutoModelForImageClassification, name, config, pretrained)
    except CamError:
        raise
    except (OSError, ValueError) as error:
        for phrase, sentence in _MESSAGES.items():
            if phrase in str(error):
                raise CamError(sentence) from error
        raise


_RETURN_MISMATCHES = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options that return mismatched keys instead of printing them."""


def _classifier(auto: Any, name: str, config: Any, pretrained: bool) -> nn.Module:
    safe: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    if not pretrained:
        return auto.from_config(config, **safe)
    return _check_complete(auto.from_pretrained(name, config=config, use_safetensors=True, **_RETURN_MISMATCHES, **safe))


def _check_complete(made: tuple[nn.Module, Mapping[str, Any]], strict: bool = False) -> nn.Module:
    """Return the model, or raise CamError if tensors are missing, which transformers would draw at random.

    Only if `strict`, the file must not have additional tensors.
    """
    model, info = made
    misshaped = {name: (found, wanted) for name, found, wanted in info["mismatched_keys"]}
    what = checkpoints.misfit(info["missing_keys"], info["unexpected_keys"] if strict else (), misshaped)
    if what:
        raise CamError(f"the weights do not fit {type(model).__name__}: {what}")
    return model


def _by_transformers(model: Any, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Let transformers load the tensors like its own download, since it renames tensors of old files."""
    made = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32, **_RETURN_MISMATCHES)
    return _check_complete(made, strict=True)


LOADERS: dict[str, Callable[[str, Checkpoint | None, bool], Parts]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


# ----------------------------------------------------------------------------------------------------------- common


def _import(module: str) -> Any:
    """Import a library, or raise CamError. A torchvision built for another torch breaks all three, in several ways."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _import_error(package, error) from error
        raise CamError(f"{package} is not installed: pip install {package}") from None
    except Exception as error:
        raise _import_error(package, error) from error


def _check_folder(name: str) -> None:
    """Raise CamError for pipes and devices in a model's folder, on which the libraries would block."""
    for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        if kind(path) not in (None, "a folder"):
            raise CamError(f"{str(path)!r} is {kind(path)}, not a file: copy it to a file first")


def _import_error(package: str, error: BaseException) -> CamError:
    cause = list(downloads.chain(error))[-1]
    rest = "torch" if package == "torchvision" else "torch and torchvision"
    return CamError(f"{package} cannot be imported ({downloads.line(cause)}): install a release that goes with that of {rest}")


def _fill(model: nn.Module, weights: Checkpoint, otherwise: Callable[[dict[str, Tensor]], nn.Module]) -> nn.Module:
    """Load the tensors of a file into the model. If the names do not match, let the library try (`otherwise`)."""
    try:
        checkpoints.fill(model, weights)
    except CamError:
        with suppress(Exception):
            return otherwise(dict(weights.tensors))
        raise
    return model
