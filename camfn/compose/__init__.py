"""Method in, method out: functions that make a method of a method, or of several. What they give can be composed again."""

from camfn.compose.inputs import augment, integrate, smooth
from camfn.compose.scales import multi_scale
from camfn.compose.several import ensemble, fuse_layers

__all__ = ["augment", "ensemble", "fuse_layers", "integrate", "multi_scale", "smooth"]
