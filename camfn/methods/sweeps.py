"""What the methods that sweep masked inputs share: one runner for all layers, and checks of what they are asked for."""

from collections.abc import Callable, Sequence

from torch import Tensor

from camfn._errors import CamError
from camfn.formulas.masks import Variation
from camfn.layouts import Read
from camfn.model.forward import Subject
from camfn.sweep.options import Sweep, checked, counter
from camfn.sweep.runner import runner_of
from camfn.sweep.scoring import Plan, Scoring, Swept, plan, sweep_all
from camfn.targets import Score


def sweep_layers(
    subject: Subject,
    score: Score,
    plans: Sequence[Plan],
    ways: Sequence[Callable[[Scoring], Swept]],
    rows: int,
    variation: Variation,
    sweep: Sweep,
    under: Tensor | None = None,
) -> list[Swept]:
    """Each layer's plan, swept its way, `rows` masked inputs in all; one runner for all of them."""
    runner, tick = runner_of(subject, score, sweep, rows), counter(sweep.progress, rows)
    found = [way(Scoring(subject, runner, score, todo, variation, sweep, tick, under)) for todo, way in zip(plans, ways)]
    tick(None)
    runner.room.tell()
    return found


def sweep_in_full(
    method: str,
    subject: Subject,
    score: Score,
    reads: Sequence[Read],
    variation: Variation,
    sweep: Sweep,
    under: Tensor | None = None,
) -> list[Swept]:
    """All masks of each layer, each one scored; for methods whose maps are not those of `camfn.sweep.low_precision`."""
    if checked(sweep).dtype is not None:
        raise CamError(
            f"Sweep(dtype={sweep.dtype}) is not for {method}: it needs channels that can be scored again, weighed as "
            "score_cam and its kin weigh them; leave dtype= out"
        )
    plans = [plan(read, variation) for read in reads]
    rows = sum(todo.rows_in_all for todo in plans)
    return sweep_layers(subject, score, plans, [sweep_all] * len(plans), rows, variation, sweep, under)
