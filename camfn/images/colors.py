"""Color maps, without matplotlib."""

from typing import Any

import numpy as np

from camfn._errors import CamError, suggested


def _anchors(table: str) -> tuple[Any, ...]:
    colors = np.array([list(bytes.fromhex(color)) for color in table.split()]) / 255
    at = np.linspace(0, 1, len(colors))
    return tuple((at, colors[:, channel]) for channel in range(3))


_COLORMAPS = {
    "jet": (
        ((0.0, 0.35, 0.66, 0.89, 1.0), (0.0, 0.0, 1.0, 1.0, 0.5)),
        ((0.0, 0.125, 0.375, 0.64, 0.91, 1.0), (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)),
        ((0.0, 0.11, 0.34, 0.65, 1.0), (0.5, 1.0, 1.0, 0.0, 0.0)),
    ),
    "inferno": _anchors(
        "000004 050418 110a30 210d4a 33095f 450a6a 57106e 68166f 781c6d 89226a 9a2865 ab2f5e bb3755 "
        "ca404a d84b3f e45932 ed6925 f57a18 f98d09 fca006 fcb519 f9ca32 f4df51 f0f27b fcffa4"
    ),
    "berlin": _anchors(
        "9eb0ff 86adf4 6ca9e7 51a0d4 3c90bb 307ca0 286886 21556d 1a4256 14313f 102129 101418 180b09 "
        "240c01 310f00 401201 501703 64210c 7c321c 924632 a75949 bc6e61 d2827a e89893 ffadad"
    ),
    "turbo": _anchors(
        "30123d 3b3183 434fbd 466be3 4786fc 3ba1fe 2abbeb 19d3d0 19e5b7 30f298 55fb74 7fff52 a4fd3b "
        "bef433 d7e434 edd03a fabb38 fea02e fb8020 f26013 e44509 d23004 b91e00 9c0f00 7a0401"
    ),
    "viridis": _anchors(
        "440153 471063 481f70 472c7b 443982 404687 3a528a 355d8c 30688d 2c728d 287c8d 24868d 20908c "
        "1e9a89 20a485 27ae80 35b778 47c06e 5cc862 74d054 8fd643 aadc31 c7e01f e3e317 fde724"
    ),
}
COLORMAPS = tuple(_COLORMAPS)
"""The names that `colormap=` takes."""


def colorize(values: Any, colormap: str = "inferno") -> np.ndarray:
    """Map values in [0, 1], of any shape, to RGB colors `(*shape, 3)` in [0, 1].

    - `colormap`: `"inferno"` and `"viridis"`, which are perceptually uniform, grow lighter with the value, and stay readable in
      gray and with any color vision; `"berlin"`, for signed maps: dark at 0.5, light blue at 0, light red at 1; `"turbo"`, a
      rainbow; or `"jet"`, a rainbow with false edges, for comparison with other libraries.

    The colors are matplotlib's, exact for jet, and up to 1.1/255 for berlin, 1.4/255 for viridis, 1.8/255 for inferno and
    1.9/255 for turbo. They are interpolated between 25 fitted anchors. Raises `CamError` if the color map is unknown.

    >>> colorize([0.0, 1.0], "jet").tolist()
    [[0.0, 0.0, 0.5], [0.5, 0.0, 0.0]]
    """
    if colormap not in _COLORMAPS:
        raise CamError(f"no colormap named {colormap!r}{suggested(str(colormap), COLORMAPS)}; all: {', '.join(COLORMAPS)}")
    values = np.asarray(values, dtype=np.float64)
    return np.stack([np.interp(values, *lines) for lines in _COLORMAPS[colormap]], -1)
