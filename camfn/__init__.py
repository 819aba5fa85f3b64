"""Class activation maps as pure functions of a model, a layer and an input.

camfn sets no hooks, wraps no model, changes no mode and keeps no state between calls. A CAM therefore composes like any other
function: `vmap` it, `grad` through it, compile it, or call it from several threads on one model.
"""

from camfn import figures, images, layouts, maps, metrics, targets, weights
from camfn._errors import CamError, CamWarning
from camfn.compose import augment, ensemble, fuse_layers, integrate, multi_scale, smooth
from camfn.concepts import Concepts, factorize
from camfn.explanation import Explanation, explain
from camfn.formulas.masks import RECIPES, Recipe
from camfn.methods import (
    METHODS,
    ablation_cam,
    ag_cam,
    attention_rollout,
    cam,
    cameras,
    eigen_cam,
    eigen_grad_cam,
    fem,
    full_grad,
    grad_cam,
    grad_cam_elementwise,
    grad_cam_pp,
    gradient_attention,
    group_cam,
    hires_cam,
    is_cam,
    kpca_cam,
    layer_cam,
    legrad,
    lift_cam,
    mean_cam,
    opti_cam,
    poly_cam,
    random_cam,
    recipro_cam,
    rise,
    score_cam,
    score_cam_pp,
    seg_eigen_cam,
    shapley_cam,
    smooth_grad_cam_pp,
    ss_cam,
    xgrad_cam,
)
from camfn.model.capture import Captured, pure, state_of, tap
from camfn.model.head import Head, head
from camfn.model.layers import Candidate, candidate_layers
from camfn.model.prepare import Prepared, prepare
from camfn.sweep.options import Sweep

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "RECIPES",
    "CamError",
    "CamWarning",
    "Candidate",
    "Captured",
    "Concepts",
    "Explanation",
    "Head",
    "Prepared",
    "Recipe",
    "Sweep",
    "ablation_cam",
    "ag_cam",
    "attention_rollout",
    "augment",
    "cam",
    "cameras",
    "candidate_layers",
    "eigen_cam",
    "eigen_grad_cam",
    "ensemble",
    "explain",
    "factorize",
    "fem",
    "figures",
    "full_grad",
    "fuse_layers",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "gradient_attention",
    "group_cam",
    "head",
    "hires_cam",
    "images",
    "integrate",
    "is_cam",
    "kpca_cam",
    "layer_cam",
    "layouts",
    "legrad",
    "lift_cam",
    "maps",
    "mean_cam",
    "metrics",
    "multi_scale",
    "opti_cam",
    "poly_cam",
    "prepare",
    "pure",
    "random_cam",
    "recipro_cam",
    "rise",
    "score_cam",
    "score_cam_pp",
    "seg_eigen_cam",
    "shapley_cam",
    "smooth",
    "smooth_grad_cam_pp",
    "ss_cam",
    "state_of",
    "tap",
    "targets",
    "weights",
    "xgrad_cam",
]
