"""The facts about a map, for its JSON file."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import camfn
from camfn.cli import catalog
from camfn.cli.cards import Facts
from camfn.cli.files import Source
from camfn.cli.job import Job, Map
from camfn.explanation import Picture
from camfn.formulas import probabilities as formula


def probabilities(outputs: Tensor) -> Tensor:
    """Return the probabilities of the outputs, or the outputs themselves if they are probabilities already.

    A single output is a logit.
    """
    already = len(outputs) > 1 and bool((outputs >= 0).all()) and abs(float(outputs.sum()) - 1) < 1e-4
    return outputs if already else formula.probabilities(outputs)


def facts_of_class(card: Any, number: int, outputs: Tensor, names: Sequence[str]) -> Facts:
    """Return the facts about the class of a map (by its number on the card), and about the predicted class.

    A single logit predicts its class if it is positive, and no class otherwise.
    """
    index, best = int(card.classes[0, number]), int(outputs.argmax())
    predicted = best if len(outputs) > 1 or float(outputs[0]) > 0 else None
    name, probability = dict(enumerate(names)).get, float(probabilities(outputs)[index])
    return {
        "class": index,
        "class_name": name(index),
        "score": float(card.scores[0, number]),
        "probability": probability if math.isfinite(probability) else None,
        "predicted_class": predicted,
        "predicted_class_name": None if predicted is None else name(predicted),
    }


def facts_of_run(job: Job, source: Source, x: Tensor) -> Facts:
    return {
        "image": str(source),
        "model": job.loaded.spec,
        "weights": None if job.wish.weights is None else str(job.wish.weights),
        "pretrained": not job.wish.no_pretrained,
        "device": str(x.device),
        "input": list(x.shape[1:]),
    }


def facts_of_picture(picture: Picture, photo: Any) -> Facts:
    """The size of the picture that is drawn on, and the affine map to its pixels from those of the input."""
    (width, height), view = picture.image.size, [list(row) for row in picture.view.matrix]
    return {"photo": [photo.height, photo.width], "picture": [height, width], "view": view}


def facts_of_map(job: Job, made: Map) -> Facts:
    card, raw, notes = made
    return {
        "layer": card.layers[0] if card.layers else None,
        "method": card.method,
        "seed": job.options.get("seed") if catalog.ROWS[card.method].seed else None,
        "grid": list(raw.shape[1:]),
        "seconds": card.seconds,
        "forwards": card.forwards,
        "backwards": card.backwards,
        "heads": card.heads,
        "findings": [finding._asdict() for finding in card.findings],
        "notes": list(notes),
        "check": None if card.check is None else card.check.sentence,
        "camfn": camfn.__version__,
        "torch": torch.__version__,
    }
