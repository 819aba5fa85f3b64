"""Metrics of maps: functions of tensors, and of a score."""

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
from camfn.metrics.imputation import linear_imputation, road
from camfn.metrics.localization import energy_pointing_game, pointing_game
from camfn.metrics.scoring import ScoreFunction, score_function

__all__ = [
    "CIRCULAR",
    "Curve",
    "ScoreFunction",
    "adcc",
    "adcc_parts",
    "arcc",
    "arcc_parts",
    "average_drop",
    "average_gain",
    "coherency",
    "deletion",
    "deletion_curve",
    "energy_pointing_game",
    "increase_in_confidence",
    "infidelity",
    "insertion",
    "insertion_curve",
    "l1_complexity",
    "linear_imputation",
    "pointing_game",
    "road",
    "score_function",
    "sensitivity_n",
]
