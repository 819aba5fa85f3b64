"""One picture of many maps, that fits a page: panels in rows, with captions that are cut to the width of their panel."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from camfn import images
from camfn._errors import escaped, shortened

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

COLUMNS = 6
"""The most panels side by side."""
WIDTH = 1800
"""The width of a page of small panels, in pixels: 150 for each inch of a sheet of A4, without pictures that are larger."""
NARROWEST = 300
"""The least width of a panel: smaller photos are enlarged, so that captions are readable."""
TALLEST = 1.6
"""The greatest height of a panel, relative to its width."""


class Cell(NamedTuple):
    """A panel of the page, with its caption."""

    image: "Image"
    caption: Sequence[str] = ()  # lines


class Bar(NamedTuple):
    """How the color bar of a page is drawn."""

    alpha: float
    colormap: str


def columns_of(count: int, group: int, aspect: float) -> int:
    """Return the number of panels side by side, for a page that is as square as can be, or else rather wide.

    - `group`: the number of panels that belong together, the classes of one map. They are not torn apart if they fit a row.
    - `aspect`: the height of a panel with its caption, relative to its width.

    >>> [columns_of(count, 1, 1.0) for count in (1, 2, 3, 4, 5, 12, 33)], columns_of(3, 3, 1.0), columns_of(64, 2, 1.0)
    ([1, 2, 2, 2, 3, 4, 6], 3, 6)
    """
    step = group if group <= COLUMNS else 1
    fitting = range(step, min(max(count, step), COLUMNS) + 1, step)

    def distance(columns: int) -> float:
        return abs(math.log(math.ceil(count / columns) * aspect / columns))

    return min(reversed(fitting), key=lambda columns: round(distance(columns), 6))


def panel_size(photo: tuple[int, int], columns: int) -> tuple[int, int]:
    """Return the (width, height) of a photo in a panel. It keeps its proportions.

    >>> panel_size((3000, 2000), 3), panel_size((32, 32), 3), panel_size((100, 1000), 3)
    ((600, 400), (300, 300), (96, 960))
    """
    widest = min(max(photo[0], NARROWEST), WIDTH // columns)
    factor = min(widest / photo[0], TALLEST * WIDTH / columns / photo[1])
    return max(1, round(photo[0] * factor)), max(1, round(photo[1] * factor))


def drawn(cells: Sequence[Cell], columns: int, title: Sequence[str] = (), bar: Bar | None = None) -> "Image":
    """Draw the page, as an RGB image. Text that is wider than its place is cut in the middle."""
    from PIL import Image, ImageDraw

    width = max(NARROWEST // 2, *(cell.image.width for cell in cells))
    font, heading = _font(max(11, min(30, width // 15))), _font(max(13, min(36, width // 12)))
    line, gap = _height(font), max(4, width // 30)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.image.height + line * len(cell.caption) for cell in row) for row in rows]
    across = min(columns, len(cells))
    total = across * width + (across + 1) * gap
    top = gap + _height(heading) * len(title) + (gap if title else 0)
    foot = line + gap if bar else 0
    page = Image.new("RGB", (total, top + sum(heights) + gap * len(rows) + foot), "white")
    draw = ImageDraw.Draw(page)
    for number, text in enumerate(title):
        _write(draw, text, heading, (gap, gap + number * _height(heading), total - 2 * gap))
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            left = gap + column * (width + gap)
            page.paste(cell.image, (left + (width - cell.image.width) // 2, top))
            for number, text in enumerate(cell.caption):
                _write(draw, text, font, (left, top + cell.image.height + number * line, width), centered=True)
        top += height + gap
    if bar:
        _draw_bar(page, bar, font, (gap, top, min(total - 2 * gap, 2 * width)))
    return page


def fitted(text: str, font: "FreeTypeFont", width: int) -> str:
    """Cut a text in the middle until it is as wide as there is room for."""
    text = escaped(text)
    most = len(text)
    while most > 2 and font.getlength(shortened(text, most)) > width:
        most -= 1
    return shortened(text, most)


def _font(size: int) -> "FreeTypeFont":
    """The font of matplotlib, which has more letters than that of Pillow."""
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _height(font: "FreeTypeFont") -> int:
    return sum(font.getmetrics()) + 2


def _write(draw: object, text: str, font: "FreeTypeFont", place: tuple[int, int, int], *, centered: bool = False) -> None:
    """Write a line at (left, top, width)."""
    left, top, width = place
    text = fitted(text, font, width)
    start = left + (width - font.getlength(text)) / 2 if centered else left
    draw.text((start, top + 1), text, font=font, fill="black")  # pyright: ignore[reportAttributeAccessIssue]


def _draw_bar(page: "Image", bar: Bar, font: "FreeTypeFont", place: tuple[int, int, int]) -> None:
    """Draw the colors of lowest to highest values, as they are over mid-gray, at (left, top, width)."""
    from PIL import Image, ImageDraw

    left, top, width = place
    words, height = ("lowest", "highest"), _height(font)
    before, after = (math.ceil(font.getlength(f" {word}")) + 1 for word in words)
    length = max(1, width - before - after)
    gray, values = np.full((1, length, 3), 0.5), np.linspace(0, 1, length)[None]
    colors = np.rint(images.blended(gray, values, *bar) * 255).clip(0, 255).astype(np.uint8)
    page.paste(Image.fromarray(colors).resize((length, height * 2 // 3)), (left + before, top + height // 6))
    draw = ImageDraw.Draw(page)
    _write(draw, words[0], font, (left, top, before))
    _write(draw, f" {words[1]}", font, (left + before + length, top, after))
