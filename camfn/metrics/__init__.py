"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.boxes import BoxAccuracy, box_ious, boxes_to_masks, max_box_acc
from camfn.metrics.complexity import entropy, gini
from camfn.metrics.controls import (
    CONTROL_METHODS,
    CONTROLS,
    all_ones,
    centered_gaussian,
    input_edges,
    random_pixels,
)
from camfn.metrics.localization import energy_pointing_game, iou, pixel_auc, pointing_game
from camfn.metrics.robustness import maximum_sensitivity
from camfn.metrics.similarity import rank_correlation, ssim

__all__ = [
    "CONTROLS",
    "CONTROL_METHODS",
    "BoxAccuracy",
    "all_ones",
    "box_ious",
    "boxes_to_masks",
    "centered_gaussian",
    "energy_pointing_game",
    "entropy",
    "gini",
    "input_edges",
    "iou",
    "max_box_acc",
    "maximum_sensitivity",
    "pixel_auc",
    "pointing_game",
    "random_pixels",
    "rank_correlation",
    "ssim",
]
