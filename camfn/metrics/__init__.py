"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.boxes import BoxAccuracy, box_ious, boxes_to_masks, max_box_acc
from camfn.metrics.complexity import entropy, gini
from camfn.metrics.confidence import (
    adcc,
    adcc_parts,
    arcc,
    arcc_parts,
    average_drop,
    average_gain,
    coherency,
    increase_in_confidence,
    l1_complexity,
)
from camfn.metrics.controls import (
    CONTROL_METHODS,
    CONTROLS,
    all_ones,
    centered_gaussian,
    input_edges,
    random_pixels,
)
from camfn.metrics.faithfulness import (
    CIRCULAR,
    Curve,
    deletion,
    deletion_curve,
    infidelity,
    insertion,
    insertion_curve,
    sensitivity_n,
)
from camfn.metrics.grids import DiFull, cell_energy, grid_of, grid_pointing_game
from camfn.metrics.imputation import linear_imputation, road
from camfn.metrics.localization import energy_pointing_game, iou, pixel_auc, pointing_game
from camfn.metrics.randomization import Randomization, model_randomization
from camfn.metrics.removal import (
    background_independence,
    deletion_check,
    distractibility,
    irrelevant,
    preservation_check,
    single_deletion,
    target_sensitivity,
)
from camfn.metrics.robustness import maximum_sensitivity
from camfn.metrics.scoring import ScoreFunction, score_function
from camfn.metrics.sensitivity import object_energy, other_object_energy
from camfn.metrics.similarity import rank_correlation, ssim
from camfn.metrics.states import permuted_classifier, random_classifier, randomized_states

__all__ = [
    "CIRCULAR",
    "CONTROLS",
    "CONTROL_METHODS",
    "BoxAccuracy",
    "Curve",
    "DiFull",
    "Randomization",
    "ScoreFunction",
    "adcc",
    "adcc_parts",
    "all_ones",
    "arcc",
    "arcc_parts",
    "average_drop",
    "average_gain",
    "background_independence",
    "box_ious",
    "boxes_to_masks",
    "cell_energy",
    "centered_gaussian",
    "coherency",
    "deletion",
    "deletion_check",
    "deletion_curve",
    "distractibility",
    "energy_pointing_game",
    "entropy",
    "gini",
    "grid_of",
    "grid_pointing_game",
    "increase_in_confidence",
    "infidelity",
    "input_edges",
    "insertion",
    "insertion_curve",
    "iou",
    "irrelevant",
    "l1_complexity",
    "linear_imputation",
    "max_box_acc",
    "maximum_sensitivity",
    "model_randomization",
    "object_energy",
    "other_object_energy",
    "permuted_classifier",
    "pixel_auc",
    "pointing_game",
    "preservation_check",
    "random_classifier",
    "random_pixels",
    "randomized_states",
    "rank_correlation",
    "road",
    "score_function",
    "sensitivity_n",
    "single_deletion",
    "ssim",
    "target_sensitivity",
]
