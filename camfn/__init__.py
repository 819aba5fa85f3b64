"""Class activation maps as pure functions: a model, a layer and an input go in, maps come out.

Nothing is hooked, wrapped, switched or remembered, so a CAM composes like any other function: `vmap` it, `grad` through it,
compile it, call it from eight threads on one model.
"""

from camfn import figures, images, layouts, maps, metrics, targets, weights
from camfn._errors import CamError, CamWarning
from camfn.capture import Captured, pure, state_of, tap
from camfn.compose import augment, ensemble, fuse_layers, integrate, multi_scale, smooth
from camfn.concepts import Concepts, factorize
from camfn.execution import Sweep
from camfn.explanation import Explanation, explain
from camfn.heads import Head, head
from camfn.layers import Candidate, candidate_layers
from camfn.masks import RECIPES, Recipe
from camfn.methods import (
    METHODS,
    ablation_cam,
    ag_cam,
    attention_rollout,
    cam,
    eigen_cam,
    eigen_grad_cam,
    fem,
    grad_cam,
    gradient_attention,
    group_cam,
    is_cam,
    kpca_cam,
    legrad,
    lift_cam,
    mean_cam,
    opti_cam,
    random_cam,
    recipro_cam,
    rise,
    score_cam,
    score_cam_pp,
    seg_eigen_cam,
    ss_cam,
)

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
    "Recipe",
    "Sweep",
    "ablation_cam",
    "ag_cam",
    "attention_rollout",
    "augment",
    "cam",
    "candidate_layers",
    "eigen_cam",
    "eigen_grad_cam",
    "ensemble",
    "explain",
    "factorize",
    "fem",
    "figures",
    "fuse_layers",
    "grad_cam",
    "gradient_attention",
    "group_cam",
    "head",
    "images",
    "integrate",
    "is_cam",
    "kpca_cam",
    "layouts",
    "legrad",
    "lift_cam",
    "maps",
    "mean_cam",
    "metrics",
    "multi_scale",
    "opti_cam",
    "pure",
    "random_cam",
    "recipro_cam",
    "rise",
    "score_cam",
    "score_cam_pp",
    "seg_eigen_cam",
    "smooth",
    "ss_cam",
    "state_of",
    "tap",
    "targets",
    "weights",
]
