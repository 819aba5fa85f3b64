"""Metrics of maps: functions of tensors, and of a score."""

from camfn.metrics.localization import energy_pointing_game, pointing_game
from camfn.metrics.scoring import ScoreFunction, score_function

__all__ = ["ScoreFunction", "energy_pointing_game", "pointing_game", "score_function"]
