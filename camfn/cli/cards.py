"""The facts about a map: for its JSON file, and as lines on stdout."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from camfn._errors import CamError, escaped
from camfn.cli.files import WRITTEN
from camfn.cli.options import one_line
from camfn.formulas import probabilities as formula

Facts = dict[str, Any]
Written = tuple[Facts, Path]
"""The facts about a map, and the path of its files without the extension."""


def probabilities(outputs: Tensor) -> Tensor:
    """Return the probabilities of the outputs, or the outputs themselves if they are probabilities already.

    A single output is a logit.
    """
    already = len(outputs) > 1 and bool((outputs >= 0).all()) and abs(float(outputs.sum()) - 1) < 1e-4
    return outputs if already else formula.probabilities(outputs)


def classes(card: Any, number: int, outputs: Tensor, names: Sequence[str]) -> Facts:
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


def lines(path: Path, found: Sequence[Written] | CamError, as_json: bool) -> Iterator[str]:
    """Yield the lines about a picture for stdout: one per class, or one JSON object per layer and class."""
    if isinstance(found, CamError):
        if as_json:
            yield json.dumps({"image": str(path), "error": one_line(found)})
    elif as_json:
        for facts, base in found:
            yield json.dumps({**facts, "files": {ending: f"{base}.{ending}" for ending in WRITTEN}}, allow_nan=False)
    else:
        for index in dict.fromkeys(facts["class"] for facts, _ in found):
            own = [(facts, base) for facts, base in found if facts["class"] == index]
            files = ", ".join(f"{escaped(base)}.{{{','.join(WRITTEN)}}}" for _, base in own)
            yield f"{escaped(path)}: {_summary(own[0][0])} -> {files}"


def _summary(facts: Facts) -> str:
    name = f"{escaped(facts['class_name'])} (class {facts['class']})" if facts["class_name"] else f"class {facts['class']}"
    probability = "" if facts["probability"] is None else f", probability {facts['probability']:.3g}"
    return f"{name}, score {facts['score']:.4g}{probability}"
