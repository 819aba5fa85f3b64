"""The methods, by family. Each runs the clean forward pass, resolves the target, and turns weights into maps."""

# A method is a row of the table when its file is imported: this order is the table's.
from camfn.methods.activation import cam, fem, mean_cam, random_cam
from camfn.methods.eigen import eigen_cam, eigen_grad_cam, kpca_cam, seg_eigen_cam
from camfn.methods.gradient import grad_cam, grad_cam_pp, shapley_cam, xgrad_cam
from camfn.methods.elementwise import grad_cam_elementwise, hires_cam, layer_cam
from camfn.methods.averaged import cameras, smooth_grad_cam_pp
from camfn.methods.full_grad import full_grad
from camfn.methods.ablation import ablation_cam, lift_cam, recipro_cam
from camfn.methods.score_cam import is_cam, score_cam, ss_cam
from camfn.methods.group_cam import group_cam, score_cam_pp
from camfn.methods.poly_cam import poly_cam
from camfn.methods.opti_cam import opti_cam
from camfn.methods.rise import rise
from camfn.methods.attention import ag_cam, attention_rollout, gradient_attention, legrad
from camfn.methods.custom import method
from camfn.methods.registry import METHODS, Cost, Method, Need, Outcome

__all__ = [
    "METHODS",
    "Cost",
    "Method",
    "Need",
    "Outcome",
    "ablation_cam",
    "ag_cam",
    "attention_rollout",
    "cam",
    "cameras",
    "eigen_cam",
    "eigen_grad_cam",
    "fem",
    "full_grad",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "gradient_attention",
    "group_cam",
    "hires_cam",
    "is_cam",
    "kpca_cam",
    "layer_cam",
    "legrad",
    "lift_cam",
    "mean_cam",
    "method",
    "opti_cam",
    "poly_cam",
    "random_cam",
    "recipro_cam",
    "rise",
    "score_cam",
    "score_cam_pp",
    "seg_eigen_cam",
    "shapley_cam",
    "smooth_grad_cam_pp",
    "ss_cam",
    "xgrad_cam",
]
