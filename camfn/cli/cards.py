"""The lines on stdout about what was written."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from camfn._errors import CamError, escaped
from camfn.cli.files import FACTS, PICTURE, Source
from camfn.cli.options import one_line

Facts = dict[str, Any]
"""The facts about a map, as in its JSON file."""


class Written(NamedTuple):
    """The facts and files of a map."""

    facts: Facts
    base: Path  # the path of its files, without the extension
    picture: Path  # its picture, or the page of all maps

    @property
    def own(self) -> bool:
        """Whether the map has a picture of its own."""
        return self.picture == Path(f"{self.base}.{PICTURE}")


def lines(path: Source, found: Sequence[Written] | CamError, as_json: bool) -> Iterator[str]:
    """Yield the lines about a picture for stdout: one per class, and one for their page; or one JSON object per map."""
    if isinstance(found, CamError):
        if as_json:
            yield json.dumps({"image": str(path), "error": one_line(found)})
    elif as_json:
        for each in found:
            files = {PICTURE: str(each.picture), **{ending: f"{each.base}.{ending}" for ending in FACTS}}
            yield json.dumps({**each.facts, "files": files}, allow_nan=False)
    else:
        for index in dict.fromkeys(each.facts["class"] for each in found):
            own = [each for each in found if each.facts["class"] == index]
            yield f"{escaped(path)}: {_summary(own[0].facts)} -> {', '.join(map(_files, own))}"
        for page in dict.fromkeys(each.picture for each in found if not each.own):
            yield f"{escaped(path)}: all maps in one picture -> {escaped(page)}"


def _files(written: Written) -> str:
    endings = (PICTURE, *FACTS) if written.own else FACTS
    return f"{escaped(written.base)}.{{{','.join(endings)}}}"


def _summary(facts: Facts) -> str:
    name = f"{escaped(facts['class_name'])} (class {facts['class']})" if facts["class_name"] else f"class {facts['class']}"
    probability = "" if facts["probability"] is None else f", probability {facts['probability']:.3g}"
    return f"{name}, score {facts['score']:.4g}{probability}"
