"""The maps of a batch of images, as rows."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from camfn import zoo
from camfn._errors import CamError
from camfn.formulas.probabilities import probabilities
from camfn.formulas.scaling import is_flat
from camfn.methods import METHODS, Need, Outcome
from camfn.model.forward import Shared, look
from camfn.model.prepare import opened, prepare
from camfn.runs.decoding import Decoded, sentence
from camfn.runs.job import Job, parameters, seed_of, words_of
from camfn.runs.rows import Row, checked
from camfn.runs.sources import text_of
from camfn.targets import logits_of, names
from camfn.zoo.networks import Network


class Maker:
    """Make the maps of images by a prepared model."""

    def __init__(self, job: Job, network: Network) -> None:
        self._job, self._network = job, network
        self._prepared = prepare(network.model)
        self._words = words_of(job, network.names)
        self._graph = any(Need.GRADIENTS in METHODS[name].needs for name in job.methods)
        self._drawn = tuple(name for name in job.methods if "seed" in parameters(name))
        tensors = itertools.chain(network.model.parameters(), network.model.buffers())
        self._like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))

    def rows(self, batch: Sequence[Decoded]) -> list[list[Row] | str]:
        """The rows of each image, or why it failed. Where a batch fails, its halves are tried, down to single images."""
        try:
            with zoo.told("the model", self._network.file):
                return list(self._rows(batch))
        except Exception as error:  # the model's code may raise anything
            if len(batch) == 1:
                return [sentence(error)]
        half = len(batch) // 2
        return [*self.rows(batch[:half]), *self.rows(batch[half:])]

    def _rows(self, batch: Sequence[Decoded]) -> Iterator[list[Row]]:
        x = torch.stack([torch.from_numpy(each.x) for each in batch]).to(self._like.device, self._like.dtype)
        shared = Shared(opened(self._prepared).prepared, x, graph=self._graph, several=len(self._job.methods) > 1)
        with shared:
            logits = self._logits(shared, x)
            target = self._target(logits)
            made = {name: self._made(shared, name, batch, (x, target)) for name in self._job.methods}
        known = None if logits is None else logits.detach().cpu()
        for number, each in enumerate(batch):
            own = None if known is None else known[number]
            parts = [_Part(name, *outcomes[number]) for name, outcomes in made.items()]
            yield list(self._of_image(each, own, parts))

    def _logits(self, shared: Shared, x: Tensor) -> Tensor | None:
        """The logits `(n, classes)` of the clean forward pass, which the methods share; `None` for another output."""
        layers = list(self._job.layers) if self._of_layers() else None
        forward = look(shared, layers, x, None, taps=layers is not None)
        try:
            found = logits_of(forward.output)
        except CamError:
            return None
        found = found[:, None] if found.ndim == 1 else found
        return found if found.ndim == 2 and len(found) == len(x) else None

    def _of_layers(self) -> bool:
        return any(METHODS[name].of_layer for name in self._job.methods)

    def _target(self, logits: Tensor | None) -> Any:
        if self._words is None:
            return self._job.target
        if logits is None:
            raise CamError("the model's output is not (n, classes): pass a target of camfn.targets")
        return torch.tensor([_classes(self._words, row) for row in logits.detach().cpu().float()])

    def _made(
        self, shared: Shared, name: str, batch: Sequence[Decoded], given: tuple[Tensor, Any]
    ) -> list[tuple[Outcome, int]]:
        """The outcome of a method for each image, and its place in it. Methods that draw random numbers run image by image."""
        (x, target), row = given, METHODS[name]
        layers = list(self._job.layers) if row.of_layer else None
        options = {key: value for key, value in self._job.options.items() if key in parameters(name)}
        options["normalize"] = False
        if name not in self._drawn:
            outcome = _on_cpu(row.run(shared, layers, x, target, **options))
            return [(outcome, number) for number in range(len(batch))]
        found = []
        for number, each in enumerate(batch):
            own = target[number : number + 1] if self._words else target
            seed = seed_of(self._job.seed, each.item.id)
            outcome = _on_cpu(row.run(self._prepared, layers, x[number : number + 1], own, seed=seed, **options))
            found.append((outcome, 0))
        return found

    def _of_image(self, image: Decoded, logits: Tensor | None, parts: Sequence["_Part"]) -> Iterator[Row]:
        """The rows of one image. A class that several targets name is there once."""
        plain = _about_image(image)._replace(predicted=None if logits is None else int(logits.argmax()))
        for part in parts:
            for layer, found in part.maps():
                rows = {}
                for target, map in enumerate(found):
                    name, known = part.named(target, logits, self._network.names, by_index=self._words is not None)
                    at = {"layer": layer, "method": part.method, "target": name, "map": map, **known}
                    rows[name] = plain._replace(**at, findings=part.findings(layer, map))
                yield from rows.values()


def _on_cpu(outcome: Outcome) -> Outcome:
    """Copy the results from the device once, since a row for each image reads them value by value."""
    read = (outcome.maps, outcome.scores, outcome.classes, outcome.errors)
    maps, scores, classes, errors = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, read)
    return outcome._replace(maps=maps, scores=scores, classes=classes, errors=errors)


class _Part(NamedTuple):
    """The outcome of a method, and the place of one image in it."""

    method: str
    outcome: Outcome
    number: int

    def maps(self) -> Iterator[tuple[str | None, Tensor]]:
        """Each layer with its maps `(t, *grid)`."""
        maps = self.outcome.maps if isinstance(self.outcome.maps, tuple) else (self.outcome.maps,)
        for layer, found in zip(self.outcome.layers or (None,), maps):
            own = checked(found[self.number])
            yield layer, own[None] if self.outcome.single else own

    def named(self, target: int, logits: Tensor | None, known: Sequence[str], *, by_index: bool) -> tuple[str, dict[str, Any]]:
        """The name of a target, which is the index of a class if it is no more than that, and its score and probability."""
        outcome, number = self.outcome, self.number
        error = next((each for each in outcome.errors if each is not None), None)
        facts: dict[str, Any] = {
            "score": float(outcome.scores[number, target]),
            "map_error": None if error is None else float(error[number, target]),
        }
        name = "" if by_index else names(outcome.score, outcome.scores.shape[1])[number][target]
        if outcome.classes is None:
            return name, facts
        index = int(outcome.classes[number, target])
        if logits is not None and index < len(logits):
            facts["probability"] = float(probabilities(logits.float())[index])
        facts["class_name"] = known[index] if index < len(known) else None
        return name or str(index), facts

    def findings(self, layer: str | None, map: Tensor) -> tuple[str, ...]:
        """The kinds of findings about one map. They are found anew, since an outcome tells about a batch."""
        lost = [each.kind for each in self.outcome.findings if each.kind == "no gradient" and each.layer == layer]
        finite = bool(torch.isfinite(map).all())
        flat = finite and bool(is_flat(map.min(), map.max(), map.dtype))
        return (*lost[:1], *([] if finite else ["non-finite map"]), *(["flat map"] if flat and not lost else []))


def _classes(words: Sequence[Any], logits: Tensor) -> list[int]:
    """The classes of one image. All images have as many, so a class that is named twice stays."""
    return [index for word in words for index in zoo.classes_of([word], logits)]


def _about_image(image: Decoded) -> Row:
    (width, height), (rows, columns) = image.photo or (None, None), image.x.shape[-2:] if image.x is not None else (None, None)
    source = text_of(image.item.source)
    return Row(image.item.id, source, width, height, columns, rows, image.view, label=image.item.label)


def failure(image: Decoded, why: str) -> Row:
    """The row of an image that failed."""
    return _about_image(image)._replace(view=None, error=why)
