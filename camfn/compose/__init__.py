"""Functions that take one or several methods and return a method, which can be composed again."""

from camfn.compose.averages import augment, integrate, smooth
from camfn.compose.ensembles import ensemble, fuse_layers
from camfn.compose.multi_scale import multi_scale

__all__ = ["augment", "ensemble", "fuse_layers", "integrate", "multi_scale", "smooth"]
