"""The steps of a measured run, each beside what its calibration says of the very same step.

Owns what tells a slow machine from a wrong simulation: where steps took longer than calibrated, all
that waits behind them did too. It predicts nothing and corrects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from twostroke.core.types import Row
from twostroke.sim.recorded import MeasuredStep
from twostroke.spec.cost import StepCost
from twostroke.spec.work import StepTotals, add_totals

WITH_PROMPTS, ALONE = "with prompts", "of decodes alone"

# So many parts of a run, of as many steps each, are looked at for how its pace changed.
_PARTS = 10


@dataclass(frozen=True, slots=True)
class StepPace:
    """How many times the predicted time steps of one kind took, all together.

    slowest, fastest: in one of ten parts of the run, those with enough of such steps to tell.
    """

    kind: str
    steps: int
    ratio: float
    fastest: float
    slowest: float


def sum_rows(rows: Sequence[Row], cost: StepCost) -> StepTotals:
    """Totals of a plan's rows."""
    totals = StepTotals()
    for row in rows:
        drawn = len(row.scored) + (0 if row.sampling is None else 1 + row.drafts)
        more = cost.get_row_totals(len(row.tokens), row.start, min(len(row.tokens), drawn))
        totals = add_totals(totals, more)
    return totals


def list_paces(steps: Sequence[MeasuredStep], cost: StepCost) -> Iterator[StepPace]:
    """Of all steps, of those with a prompt, and of those without; kinds that were are there."""
    times = [
        (step.duration_ns, cost.predict_ns(sum_rows(step.plan.rows, cost)), _has_prompt(step))
        for step in steps
    ]
    size = max(1, -(-len(times) // _PARTS))
    for kind, wanted in (
        ("all", (True, False)),
        (WITH_PROMPTS, (True,)),
        (ALONE, (False,)),
    ):
        parts = [
            [(ran, predicted) for ran, predicted, has in times[at : at + size] if has in wanted]
            for at in range(0, len(times), size)
        ]
        found = [each for part in parts for each in part]
        if not found:
            continue
        least = len(found) // (2 * _PARTS)  # half of its share
        ratios = [_get_ratio(part) for part in parts if part and len(part) >= least]
        yield StepPace(kind, len(found), _get_ratio(found), min(ratios), max(ratios))


def _get_ratio(times: Iterable[tuple[int, int]]) -> float:
    ran_ns, predicted_ns = map(sum, zip(*times, strict=True))
    return ran_ns / predicted_ns


def _has_prompt(step: MeasuredStep) -> bool:
    return any(len(row.tokens) - row.drafts > 1 for row in step.plan.rows)
