"""A card as a few lines of text."""

import os
from collections.abc import Iterator

from camfn import _compat
from camfn._errors import escaped, shortened
from camfn.explanation.fields import Fields, class_name, label

IMAGES, TARGETS, FINDINGS = 4, 5, 4
"""The most images, targets and findings that the text lists."""
NAME = 30
"""The length to which names of classes and files are cut."""


def summary(card: Fields) -> str:
    """Describe a card: the method and layer, the targets of each image with their scores, the findings, and the cost."""
    return "\n".join(_lines(card))


def _lines(card: Fields) -> Iterator[str]:
    maps = card.maps if isinstance(card.maps, tuple) else (card.maps,)
    shapes = " and ".join(str(tuple(each.shape)) for each in maps)
    place = f" at {', '.join(map(repr, card.layers))}" if card.layers else ""
    yield f"Explanation: {card.method}{place}, maps {shapes}"
    if card.targets and not _compat.transformed():
        yield from limited(
            [f"image {i}{_file(card, i)}: {_targets(card, i)}" for i in range(len(card.targets))], IMAGES, "images"
        )
    yield from limited([f"finding: {finding.sentence}" for finding in card.findings], FINDINGS, "findings")
    if card.check is not None:
        yield f"  check: {card.check.sentence}"
    yield f"  cost: {cost(card)}"


def limited(lines: list[str], most: int, what: str) -> list[str]:
    """Indent the first lines, and say how many more there are."""
    more = len(lines) - most
    return [f"  {line}" for line in lines[:most]] + ([f"  ... and {more} more {what}"] if more > 0 else [])


def _file(card: Fields, image: int) -> str:
    name = os.path.basename(card.pictures[image].name) if card.pictures else ""
    return f" ({shortened(escaped(name), NAME)})" if name else ""


def _targets(card: Fields, image: int) -> str:
    told = [_target(card, image, target) for target in range(len(card.targets[image]))]
    more = len(told) - TARGETS
    return ", ".join(told[:TARGETS]) + (f", ... and {more} more targets" if more > 0 else "")


def _target(card: Fields, image: int, target: int) -> str:
    name = shortened(escaped(class_name(card, image, target)), NAME)
    return f"{name} ({label(card, image, target)})" if name else label(card, image, target)


def cost(card: Fields) -> str:
    """The number of forward passes, gradients and runs of the head, and the time."""
    counts = ((card.forwards, "forward"), (card.backwards, "backward"), (card.heads, "head"))
    told = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts if count]
    return f"{', '.join(told)} in {card.seconds:.3g} s"
