"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.boxes import BoxAccuracy, box_ious, boxes_to_masks, max_box_acc
from camfn.metrics.localization import energy_pointing_game, iou, pixel_auc, pointing_game

__all__ = [
    "BoxAccuracy",
    "box_ious",
    "boxes_to_masks",
    "energy_pointing_game",
    "iou",
    "max_box_acc",
    "pixel_auc",
    "pointing_game",
]
