"""Pictures: read files, overlay maps, and find where a network's input lies on its photo. Pillow is imported on use."""

from camfn.images.colors import COLORMAPS, colorize
from camfn.images.observing import Views, view_of
from camfn.images.overlays import ALPHA, SIGNED, STYLES, UNSIGNED, Style, blended, default_colormap, overlay
from camfn.images.pictures import image_of
from camfn.images.preprocessing import pixels_of, random_states_kept
from camfn.images.reading import ENLARGED, LARGEST, check_input, check_narrow, read
from camfn.images.seen import as_seen
from camfn.images.turns import turned, upright
from camfn.images.views import View, whole

__all__ = [
    "ALPHA",
    "COLORMAPS",
    "ENLARGED",
    "LARGEST",
    "SIGNED",
    "STYLES",
    "UNSIGNED",
    "Style",
    "View",
    "Views",
    "as_seen",
    "blended",
    "check_input",
    "check_narrow",
    "colorize",
    "default_colormap",
    "image_of",
    "overlay",
    "pixels_of",
    "random_states_kept",
    "read",
    "turned",
    "upright",
    "view_of",
    "whole",
]
