"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.boxes import BoxAccuracy, box_ious, boxes_to_masks, max_box_acc
from camfn.metrics.complexity import entropy, gini
from camfn.metrics.localization import energy_pointing_game, iou, pixel_auc, pointing_game
from camfn.metrics.robustness import maximum_sensitivity
from camfn.metrics.similarity import rank_correlation, ssim

__all__ = [
    "BoxAccuracy",
    "box_ious",
    "boxes_to_masks",
    "energy_pointing_game",
    "entropy",
    "gini",
    "iou",
    "max_box_acc",
    "maximum_sensitivity",
    "pixel_auc",
    "pointing_game",
    "rank_correlation",
    "ssim",
]
