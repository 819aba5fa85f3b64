"""The methods, by family; each is a composition: look, resolve the target, weigh, draw the map."""

from camfn.methods.activation import cam
from camfn.methods.gradient import grad_cam
from camfn.methods.masked import is_cam, score_cam, ss_cam
from camfn.methods.sampled import rise
from camfn.methods.summed import group_cam, score_cam_pp
from camfn.methods.table import METHODS, Method, Outcome
from camfn.methods.transformers import ag_cam, attention_rollout, gradient_attention, legrad

__all__ = [
    "METHODS",
    "Method",
    "Outcome",
    "ag_cam",
    "attention_rollout",
    "cam",
    "grad_cam",
    "gradient_attention",
    "group_cam",
    "is_cam",
    "legrad",
    "rise",
    "score_cam",
    "score_cam_pp",
    "ss_cam",
]
