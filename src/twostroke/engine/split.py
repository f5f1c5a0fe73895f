"""A step run in parts, to find out which request's rows lose executors.

After a loss nobody knows whose rows were to blame, and mostly none were: the step is tried again as
it is. When it is lost again, the next one gives each suspect a part of its own, and all others one
together; what an executor dies of then is known. The parts' results make up the outcome of the step
as planned, bit for bit, because a row's result does not depend on who shares its step. Holds plans
and results only, and asks nobody for anything.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from twostroke.core.types import RowResult, StepOutcome, StepPlan


class SplitStep:
    """The parts of one plan, in order. part: the one to run now."""

    def __init__(self, plan: StepPlan, places: list[list[int]]) -> None:
        """places: for each part, which rows of the plan it holds."""
        self._plan = plan
        self._places = places
        self._results: dict[int, RowResult] = {}
        self._duration_ns = 0
        self._at = 0
        self.part = self._build_part()

    def take(self, outcome: StepOutcome) -> StepOutcome | None:
        """The outcome of the current part; returns that of the whole, or None while parts are left.

        One that does not fit its part ends the step, and does not fit the step either.
        """
        places = self._places[self._at]
        if outcome.step != self._plan.step or len(outcome.results) != len(places):
            return replace(outcome, results=())
        self._results.update(zip(places, outcome.results, strict=True))
        self._duration_ns += outcome.duration_ns
        self._at += 1
        if self._at < len(self._places):
            self.part = self._build_part()
            return None
        results = tuple(self._results[place] for place in range(len(self._plan.rows)))
        return StepOutcome(self._plan.step, results, self._duration_ns)

    def _build_part(self) -> StepPlan:
        rows = tuple(self._plan.rows[place] for place in self._places[self._at])
        # What moves blocks comes before all rows. Several iterations are of rows side by side; an
        # executor may always make fewer.
        part = replace(self._plan, rows=rows, iterations=1)
        return part if self._at == 0 else replace(part, copies=(), swaps_out=(), swaps_in=())


def try_split(plan: StepPlan, suspects: Container[str]) -> SplitStep | None:
    """The plan in parts, or None where it would be one; suspects: ids of requests."""
    parts: dict[str | None, list[int]] = {}
    for place, row in enumerate(plan.rows):
        request = row.sequence.request
        parts.setdefault(request if request in suspects else None, []).append(place)
    return SplitStep(plan, list(parts.values())) if len(parts) > 1 else None
