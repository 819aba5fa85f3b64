"""Networks by name: from a photo to its card in one call."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from camfn import images, targets
from camfn._errors import CamError
from camfn._types import Layers, Target
from camfn.explanation import AnyMethod, Explanation, explain
from camfn.zoo import specs

Words = Target | str | Sequence[str]
"""A target, or classes in words."""


class Network(specs.Loaded):
    """A model with its preprocessing and class names.

    Its fields are `spec`, `file` (the user's Python file, if any), `model`, `preprocess` and `names`.
    """

    __slots__ = ()

    @overload
    def explain(
        self, pictures: Any, target: Words = None, *, layer: Layers = None, method: AnyMethod = "grad_cam", **options: Any
    ) -> Explanation: ...
    @overload
    def explain(
        self, pictures: Any, target: Words = None, *, layer: Layers = None, method: Sequence[AnyMethod], **options: Any
    ) -> tuple[Explanation, ...]: ...
    def explain(
        self,
        pictures: Any,
        target: Words = None,
        *,
        layer: Layers = None,
        method: AnyMethod | Sequence[AnyMethod] = "grad_cam",
        **options: Any,
    ) -> Explanation | tuple[Explanation, ...]:
        """Explain photos: preprocess them, compute the maps, and return a card that can draw them over the photos.

        **Arguments**

        - `pictures`: a photo or a sequence of photos: paths, PIL images, arrays or tensors. Photos are turned upright by their
          EXIF tag first.
        - `target`: as in `camfn.score_cam`, or in words: a class by its name, by a synonym or by a part of its name; several
          classes; or `"top3"`. By default, the predicted class of each photo.
        - `layer`: as in `camfn.score_cam`. By default, it is chosen, and a warning names it.
        - `method`: as in `camfn.explain`.
        - `options`: options of the methods.

        **Returns** an `Explanation`, or a tuple of them for a sequence of methods.

        **Raises** `CamError` if a photo cannot be read, the photos' inputs differ in shape, a class is not known or not clear,
        and all errors of `camfn.explain`.

        >>> import camfn
        >>> net = camfn.open("demo")
        >>> card = net.explain(camfn.demo.scene(3, objects=2).image, "ring", layer="features")
        >>> card.overlay().size
        (96, 96)
        """
        some = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        with specs.importable(self.file.parent) if self.file else contextlib.nullcontext():
            x = self._inputs(some)
            wanted = _target(target, self.names, len(some))
            with specs.told("the model", self.file):
                shown: dict[str, Any] = {"images": some, "names": self.names or None, "preprocess": self.preprocess}
                return explain(self.model, layer, x, wanted, method=method, **shown, **options)

    def _inputs(self, pictures: Sequence[Any]) -> Tensor:
        """The inputs of photos, on the model's device."""
        if not pictures:
            raise CamError("pictures is empty: explain needs a photo or more")
        inputs = []
        for picture in pictures:
            with images.random_states_kept():
                inputs.append(specs.input_of(self, images.upright(picture)[0]))
        shapes = {tuple(x.shape[1:]) for x in inputs}
        if len(shapes) != 1:
            told = " and ".join(map(str, sorted(shapes)))
            raise CamError(f"the inputs of the photos must have one shape; found {told}: explain the photos one by one")
        return torch.cat(inputs)


def _target(target: Words, names: Sequence[str], n: int) -> Target:
    """Read classes in words. Several are a table with a row for each of n images."""
    texts = [target] if isinstance(target, str) else target
    if not isinstance(texts, (list, tuple)) or not any(isinstance(text, str) for text in texts):
        return target  # pyright: ignore[reportReturnType]
    found = specs.targets_of([str(text) for text in texts], names)
    if len(found) == 1:
        return targets.top(found[0].k) if isinstance(found[0], targets.Top) else found[0]
    if any(isinstance(each, targets.Top) for each in found):
        raise CamError(f"topK stands alone as a target, since its classes differ from image to image; found {list(texts)!r}")
    return [list(found)] * n


def open_network(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
) -> Network:
    """Load a model by name, with its preprocessing and class names. It is `camfn.open`.

    - `spec`: `demo`, `torchvision:NAME[:WEIGHTS]`, `timm:NAME`, `hf:NAME` or `path/to/file.py:function`. A Python file is run.
    - `weights`: a weight file (`.safetensors`, or a state_dict from `torch.save`). By default, the published weights.
    - `pretrained`: if False, use random weights, the same in every run, and download nothing.
    - `device`: where to move the model.

    **Returns** a `Network`: `network.explain("photo.jpg")` makes a card.

    **Raises** `CamError` if the model is not known or cannot be loaded.

    >>> import camfn
    >>> camfn.open("demo").names[:3]
    ('disc', 'square', 'triangle')
    """
    loaded = specs.load(spec, weights=None if weights is None else Path(weights), pretrained=pretrained)
    model = loaded.model if device is None else loaded.model.to(device)
    return Network(*loaded._replace(model=model))
