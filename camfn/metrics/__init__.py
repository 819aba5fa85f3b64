"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.localization import energy_pointing_game, iou, pixel_auc, pointing_game

__all__ = [
    "energy_pointing_game",
    "iou",
    "pixel_auc",
    "pointing_game",
]
