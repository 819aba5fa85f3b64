"""Figures of many maps: labelled panels in a grid. Matplotlib is imported on use, without its global figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from camfn import images
from camfn._errors import CamError, escaped, shortened
from camfn.images import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


_PANEL = 1.5
"""The width of a panel in inches."""


class Panel(NamedTuple):
    """One picture of a grid, with its map, outline and caption."""

    image: Any  # an image that `camfn.images.overlay` takes
    map: Any = None  # drawn over the image, with a cross at the maximum
    outline: Any = None  # bools (h, w); a line is drawn around the object
    caption: str = ""
    view: View | None = None  # where the network's input lies on the image


def grid(
    panels: Sequence[Sequence[Panel | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    style: images.Style = "heat",
    alpha: float = images.ALPHA,
    colormap: str | None = None,
) -> "Image":
    """Draw panels in a grid, with a color bar for the maps, as an RGB image.

    The arguments are those of `camfn.figures.figure`, which draws with matplotlib.

    >>> import torch
    >>> picture = torch.rand(3, 8, 8)
    >>> grid([[Panel(picture), Panel(picture, map=torch.eye(4))]], columns=["picture", "map"]).mode
    'RGB'
    """
    options: dict[str, Any] = {"rows": rows, "columns": columns, "title": title, "note": note}
    return _render(figure(panels, **options, style=style, alpha=alpha, colormap=colormap))


def figure(
    panels: Sequence[Sequence[Panel | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    style: images.Style = "heat",
    alpha: float = images.ALPHA,
    colormap: str | None = None,
    side: float = _PANEL,
) -> "Figure":
    """Draw panels in a grid, with a color bar for the maps, as a figure of matplotlib that belongs to no window.

    **Arguments**

    - `panels`: rows of panels, all of the same length. `None` leaves a place empty.
    - `rows`, `columns`: the names of the rows and columns; none, or one for each.
    - `title`, `note`: the text above and below the grid.
    - `style`, `alpha`, `colormap`: as in `camfn.images.overlay`. All maps get the same color map: one for signed maps, if any
      map has negative values.
    - `side`: the width of a panel in inches.

    **Raises** `CamError` if rows differ in length, the number of names is wrong, or matplotlib is missing.

    >>> import torch
    >>> picture = torch.rand(3, 8, 8)
    >>> len(figure([[Panel(picture), Panel(picture, map=torch.eye(4))]]).axes)  # two panels and the color bar
    3
    """
    height, width = _check_grid(panels, rows, columns)
    how = _How(style, alpha, colormap or _common_colormap([panel for line in panels for panel in line if panel]))
    pictures = [[None if panel is None else _picture(panel, how) for panel in line] for line in panels]
    heights = [side * max((each.height / each.width for each in line if each), default=1) + 0.18 for line in pictures]
    size = (side * width + 1.1, sum(heights) + 0.75)
    drawn = empty()(figsize=size, dpi=120, layout="constrained")
    axes = drawn.subplots(height, width, squeeze=False, height_ratios=heights)
    for row, line in enumerate(panels):
        for axis, panel, picture in zip(axes[row], line, pictures[row]):
            _draw(axis, panel, picture, side) if panel and picture else _draw_empty(axis)
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(_plain(name), fontsize=10)
    for axis, name in zip(axes[0], columns):
        axis.set_title(_fitted(name, 10, side), fontsize=10)
    drawn.suptitle(_plain(title), fontsize=12)
    drawn.supxlabel(_plain(note), fontsize=8)
    if style == "heat" and any(panel and panel.map is not None for line in panels for panel in line):
        _color_bar(drawn, axes, how)
    return drawn


class _How(NamedTuple):
    """How maps are drawn."""

    style: images.Style
    alpha: float
    colormap: str


def _common_colormap(panels: Sequence[Panel]) -> str:
    """One color map for all maps, since they share a color bar."""
    found = {images.default_colormap(panel.map) for panel in panels if panel.map is not None}
    return images.SIGNED if images.SIGNED in found else images.UNSIGNED


def lines(panels: Sequence[Panel], width: int) -> list[list[Panel | None]]:
    """Arrange panels in rows of a width, for `grid`. The last row is padded with `None`.

    >>> import torch
    >>> [[panel is None for panel in line] for line in lines([Panel(torch.rand(3, 8, 8))] * 3, 2)]
    [[False, False], [False, True]]
    """
    filled = [*panels, *[None] * (-len(panels) % width)]
    return [filled[start : start + width] for start in range(0, len(filled), width)]


def _check_grid(panels: Sequence[Sequence[Panel | None]], rows: Sequence[str], columns: Sequence[str]) -> tuple[int, int]:
    lengths = {len(line) for line in panels}
    if len(lengths) != 1 or 0 in lengths:
        raise CamError(f"a grid needs a row, and all rows must have the same length; found {[len(line) for line in panels]}")
    height, width = len(panels), lengths.pop()
    for what, names, wanted in (("rows", rows, height), ("columns", columns, width)):
        if len(names) not in (0, wanted):
            raise CamError(f"{what} has {len(names)} names, and the grid has {wanted} {what}")
    return height, width


def empty() -> Any:
    """Matplotlib's `Figure`: one that is made of it belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CamError("a figure needs matplotlib: pip install 'camfn[cli]'") from error
    return Figure


def _plain(name: str) -> str:
    """Escape dollar signs, which would begin a formula, and control characters, which have no glyph."""
    return "\n".join(map(escaped, name.split("\n"))).replace("$", r"\$")


def _fitted(text: str, fontsize: float, side: float) -> str:
    """Cut lines longer than a panel in the middle, so that texts side by side do not overlap."""
    from matplotlib.textpath import TextPath

    def width(line: str) -> float:
        return TextPath((0, 0), _plain(line), size=fontsize).get_extents().width / 72 if line.strip() else 0.0

    lines = []
    for line in text.split("\n"):
        most = len(line)
        while most > 3 and width(shortened(line, most)) > side:
            most -= 1
        lines.append(_plain(shortened(line, most)))
    return "\n".join(lines)


def _picture(panel: Panel, how: _How) -> "Image":
    """The image of a panel with its map."""
    if panel.map is None:
        return images.image_of(panel.image)
    return images.overlay(panel.image, panel.map, view=panel.view, **how._asdict())


def _draw(axis: Any, panel: Panel, picture: "Image", side: float) -> None:
    axis.imshow(picture, interpolation="antialiased")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(_fitted(panel.caption, 8, side), fontsize=8, labelpad=2)
    if panel.outline is not None:
        inside = _array(panel.outline).astype(float)
        axis.contour(inside, levels=[0.5], colors="black", linewidths=2.2)
        axis.contour(inside, levels=[0.5], colors="white", linewidths=1.2)
    if panel.map is not None:
        _cross(axis, _array(panel.map), panel.view or images.whole(picture.size, picture.size))


def _draw_empty(axis: Any) -> None:
    """Draw an empty square panel, which keeps the names beside and above it in place."""
    axis.set(xticks=[], yticks=[], frame_on=False, box_aspect=1)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _cross(axis: Any, map: np.ndarray, view: View) -> None:
    """Draw a cross at the center of the map's highest cell."""
    row, column = np.unravel_index(map.argmax(), map.shape)
    x, y = view.to_photo((np.array([column, row]) + 0.5) / map.shape[::-1] * view.size) - 0.5
    axis.plot([x], [y], "+", color="black", markersize=9, markeredgewidth=3)
    axis.plot([x], [y], "+", color="white", markersize=8, markeredgewidth=1.4)


def _color_bar(figure: Any, axes: Any, how: _How) -> None:
    """Draw a color bar with the colors as blended with mid-gray."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    signed = how.colormap == images.SIGNED
    colors = images.blended(np.full((1, 256, 3), 0.5), np.linspace(-1 if signed else 0, 1, 256)[None], how.alpha, how.colormap)
    ticks, labels = ([0, 0.5, 1], ["against", "0", "for"]) if signed else ([0, 1], ["lowest", "highest"])
    bar = figure.colorbar(ScalarMappable(cmap=ListedColormap(colors[0])), ax=axes, shrink=0.6, aspect=35, ticks=ticks)
    bar.ax.set_yticklabels(labels, fontsize=8)


def _render(figure: Any) -> "Image":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
