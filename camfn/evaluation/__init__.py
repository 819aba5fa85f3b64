"""Evaluation: methods and controls, judged by metrics on many images, in one table."""

from camfn.evaluation.annotations import read_boxes, scenes
from camfn.evaluation.evaluate import evaluate
from camfn.evaluation.measures import MEASURES, Measure
from camfn.evaluation.result import Evaluation, Interval
from camfn.evaluation.stored import evaluate_run

__all__ = ["MEASURES", "Evaluation", "Interval", "Measure", "evaluate", "evaluate_run", "read_boxes", "scenes"]
