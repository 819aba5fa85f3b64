"""A card as HTML: a table of photos and overlays for notebooks, and a page of its own. No script, no link to elsewhere."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from camfn import images
from camfn.explanation.fields import Fields, class_name, label, map_of
from camfn.explanation.pictures import overlay, parts, reduced, scaled
from camfn.explanation.text import cost

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = 8
"""The most images that a notebook shows. A page shows all."""
_SIDE = 320
_CELL = 'style="text-align:center;vertical-align:top;padding:4px 8px"'
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.4 system-ui,sans-serif;margin:1.5em}}img{{height:auto}}</style></head>
<body>{body}</body></html>
"""


def fragment(card: Fields, most: int = IMAGES) -> str:
    """Describe a card by HTML: a row for each image, with its photo and its maps, and below them the findings and the cost."""
    n = len(card.scores)
    rows = "".join(_row(card, image) for image in range(min(n, most)))
    more = f"<p>... and {n - most} more images</p>" if n > most else ""
    findings = "".join(f"<li>{escape(finding.sentence)}</li>" for finding in card.findings)
    place = f" at {escape(', '.join(card.layers))}" if card.layers else ""
    return (
        f"<div><p><b>{escape(card.method)}</b>{place}</p>"
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{rows}</table></div>{more}'
        f"{f'<ul>{findings}</ul>' if findings else ''}<p>{escape(cost(card))}</p></div>"
    )


def page(card: Fields) -> str:
    """A page of its own, with all images."""
    return _PAGE.format(title=escape(f"{card.method}, {len(card.scores)} images"), body=fragment(card, len(card.scores)))


def _row(card: Fields, image: int) -> str:
    cells = [_cell(_drawn(card, image, target, layer), _said(card, image, target, layer)) for target, layer in parts(card)]
    if card.pictures:
        cells.insert(0, _cell(reduced(card.pictures[image], _SIDE).image, escape(card.pictures[image].name)))
    return f"<tr>{''.join(cells)}</tr>"


def _drawn(card: Fields, image: int, target: int, layer: int) -> "Image | None":
    """The overlay, the map by itself if the card has no pictures, or nothing for the map of a series or a volume."""
    if map_of(card, image, target, layer).ndim != 2:
        return None
    if card.pictures:
        own = card.pictures[image]
        return overlay(card._replace(pictures=(*card.pictures[:image], reduced(own, _SIDE))), image, target, layer)
    map = scaled(card, map_of(card, image, target, layer))
    factor = max(1, 160 // max(map.shape))
    return images.overlay(np.zeros([side * factor for side in map.shape]), map, alpha=1)


def _said(card: Fields, image: int, target: int, layer: int) -> str:
    several = isinstance(card.maps, tuple) and len(card.maps) > 1
    lines = [class_name(card, image, target), label(card, image, target), card.layers[layer] if several else ""]
    return "<br>".join(escape(line) for line in lines if line)


def _cell(image: "Image | None", text: str) -> str:
    picture = "" if image is None else f"{_img(image)}<br>"
    return f"<td {_CELL}>{picture}<small>{text}</small></td>"


def _img(image: "Image") -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" alt="">'
