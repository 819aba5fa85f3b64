"""A card as HTML: a table of photos and overlays for notebooks, and a page of its own. No script, no link to elsewhere."""

import base64
import io
import os
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
_ROW = 'style="display:flex;flex-wrap:wrap;gap:12px;margin:8px 0"'
_FIGURE = "margin:0;max-width:42vw;text-align:center"
_IMG = 'style="max-width:100%;height:auto"'
_CELL = 'style="text-align:left;padding:2px 12px 2px 0"'
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.4 system-ui,sans-serif;margin:1.5em}}</style></head>
<body>{body}</body></html>
"""


def fragment(card: Fields, most: int = IMAGES) -> str:
    """Describe a card by HTML: each photo with its maps beside it, a table of the targets, the findings, and the cost."""
    shown = range(min(len(card.scores), most))
    pictures = "".join(f"<div {_ROW}>{_figures(card, image)}</div>" for image in shown)
    rows = "".join(_row(card, image, target) for image in shown for target in range(card.scores.shape[1]))
    heads = "".join(f"<th {_CELL}>{head}</th>" for head in ("image", "class", "target and score"))
    more = f"<p>... and {len(card.scores) - most} more images</p>" if len(card.scores) > most else ""
    findings = "".join(f"<li>{escape(finding.sentence)}</li>" for finding in card.findings)
    check = "" if card.check is None else f"<p><b>Check</b>: {escape(card.check.sentence)}</p>"
    place = f" at {escape(', '.join(card.layers))}" if card.layers else ""
    return (
        f"<div><p><b>{escape(card.method)}</b>{place}</p>{pictures}<table><tr>{heads}</tr>{rows}</table>{more}"
        f"{f'<ul>{findings}</ul>' if findings else ''}{check}<p>{escape(cost(card))}</p></div>"
    )


def page(card: Fields) -> str:
    """A page of its own, with all images."""
    return _PAGE.format(title=escape(f"{card.method}, {len(card.scores)} images"), body=fragment(card, len(card.scores)))


def _row(card: Fields, image: int, target: int) -> str:
    cells = (_file(card, image) or str(image), class_name(card, image, target), label(card, image, target))
    return f"<tr>{''.join(f'<td {_CELL}>{escape(cell)}</td>' for cell in cells)}</tr>"


def _file(card: Fields, image: int) -> str:
    return os.path.basename(card.pictures[image].name) if card.pictures else ""


def _figures(card: Fields, image: int) -> str:
    """The photo and its maps, side by side where there is room."""
    drawn = [(_drawn(card, image, *part), _caption(card, image, *part)) for part in parts(card)]
    if card.pictures:
        drawn.insert(0, (reduced(card.pictures[image], _SIDE).image, escape(_file(card, image))))
    return "".join(_figure(each, text) for each, text in drawn if each)


def _figure(image: "Image", text: str) -> str:
    style = f'style="{_FIGURE};width:{image.width}px"'
    return f"<figure {style}>{_img(image)}<figcaption>{text}</figcaption></figure>"


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


def _caption(card: Fields, image: int, target: int, layer: int) -> str:
    several = isinstance(card.maps, tuple) and len(card.maps) > 1
    lines = [class_name(card, image, target) or card.targets[image][target], card.layers[layer] if several else ""]
    return "<br>".join(escape(line) for line in lines if line)


def _img(image: "Image") -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" alt="" {_IMG}>'
