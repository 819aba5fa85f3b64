"""Figures of many maps: labelled panels in a grid. Matplotlib is imported on use, without its global figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from camfn import images
from camfn._errors import CamError, escaped

if TYPE_CHECKING:
    from PIL.Image import Image


class Panel(NamedTuple):
    """One picture of a grid, with its map, outline and caption."""

    image: Any  # an image that `camfn.images.overlay` takes
    map: Any = None  # drawn over the image, with a cross at the maximum
    outline: Any = None  # bools (h, w); a line is drawn around the object
    caption: str = ""


def grid(
    panels: Sequence[Sequence[Panel | None]],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    note: str = "",
    alpha: float = 0.5,
    colormap: str = "turbo",
) -> "Image":
    """Draw panels in a grid, with a color bar for the maps, as an RGB image.

    **Arguments**

    - `panels`: rows of panels, all of the same length. `None` leaves a place empty.
    - `rows`, `columns`: the names of the rows and columns; none, or one for each.
    - `title`, `note`: the text above and below the grid.
    - `alpha`, `colormap`: as in `camfn.images.overlay`.

    **Raises** `CamError` if rows differ in length, the number of names is wrong, or matplotlib is missing.

    >>> import torch
    >>> picture = torch.rand(3, 8, 8)
    >>> grid([[Panel(picture), Panel(picture, map=torch.eye(4))]], columns=["picture", "map"]).mode
    'RGB'
    """
    height, width = _check_grid(panels, rows, columns)
    figure = _figure()(figsize=(1.5 * width + 1.1, 1.68 * height + 0.75), dpi=120, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for row, line in enumerate(panels):
        for column, panel in enumerate(line):
            _draw(axes[row, column], panel, alpha, colormap) if panel else _draw_empty(axes[row, column])
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(_plain(name), fontsize=10)
    for axis, name in zip(axes[0], columns):
        axis.set_title(_plain(name), fontsize=10)
    figure.suptitle(_plain(title), fontsize=12)
    figure.supxlabel(_plain(note), fontsize=8)
    if any(panel and panel.map is not None for line in panels for panel in line):
        _color_bar(figure, axes, alpha, colormap)
    return _render(figure)


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


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CamError("a grid of pictures needs matplotlib: pip install 'camfn[cli]'") from error
    return Figure


def _plain(name: str) -> str:
    """Escape dollar signs, which would begin a formula, and control characters, which have no glyph."""
    return "\n".join(map(escaped, name.split("\n"))).replace("$", r"\$")


def _draw(axis: Any, panel: Panel, alpha: float, colormap: str) -> None:
    map = torch.zeros(1, 1) if panel.map is None else panel.map
    picture = images.overlay(panel.image, map, alpha=0 if panel.map is None else alpha, colormap=colormap)
    axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(_plain(panel.caption), fontsize=8, labelpad=2)
    if panel.outline is not None:
        inside = _array(panel.outline).astype(float)
        axis.contour(inside, levels=[0.5], colors="black", linewidths=2.2)
        axis.contour(inside, levels=[0.5], colors="white", linewidths=1.2)
    if panel.map is not None:
        _cross(axis, _array(panel.map), picture.size)


def _draw_empty(axis: Any) -> None:
    """Draw an empty square panel, which keeps the names beside and above it in place."""
    axis.set(xticks=[], yticks=[], frame_on=False, box_aspect=1)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _cross(axis: Any, map: np.ndarray, size: tuple[int, int]) -> None:
    """Draw a cross at the center of the map's highest cell."""
    y, x = (np.unravel_index(map.argmax(), map.shape) + np.full(2, 0.5)) / map.shape * size[::-1] - 0.5
    axis.plot([x], [y], "+", color="black", markersize=9, markeredgewidth=3)
    axis.plot([x], [y], "+", color="white", markersize=8, markeredgewidth=1.4)


def _color_bar(figure: Any, axes: Any, alpha: float, colormap: str) -> None:
    """Draw a color bar with the colors as blended with mid-gray."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    colors = (1 - alpha) * 0.5 + alpha * images.colorize(np.linspace(0, 1, 256), colormap)
    bar = figure.colorbar(ScalarMappable(cmap=ListedColormap(colors)), ax=axes, shrink=0.6, aspect=35, ticks=[0, 1])
    bar.ax.set_yticklabels(["lowest", "highest"], fontsize=8)


def _render(figure: Any) -> "Image":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
