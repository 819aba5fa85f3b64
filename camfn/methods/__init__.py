"""The methods, by family; each is a composition: look, resolve the target, weigh, draw the map."""

from camfn.methods.activation import cam
from camfn.methods.gradient import grad_cam
from camfn.methods.masked import is_cam, score_cam, ss_cam
from camfn.methods.table import METHODS, Method, Outcome

__all__ = ["METHODS", "Method", "Outcome", "cam", "grad_cam", "is_cam", "score_cam", "ss_cam"]
