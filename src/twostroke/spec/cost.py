"""StepCost: how long steps and copies take, as a scheduler, planner or simulator asks for it.

Owns the questions and no answer: a roofline over a DeviceSpec and a fit to measured steps both
fill this protocol (`plan/`), and tests have a fake. An answer depends on its arguments
alone: no clock, no state, the same integers in every process.
"""

from __future__ import annotations

from typing import Protocol

from twostroke.spec.work import StepTotals


class StepCost(Protocol):
    """Predicts times, in integer nanoseconds, from sums over a step's rows.

    get_row_totals: one row's share of a step, which the caller adds up (`add_totals`); new_tokens
    are computed at positions context_before and on, sampled of them need logits.
    predict_ns: time of one step; at least 1.
    predict_run_ns: times of `count` steps of which the first has totals `first` and each later one
    `growth` more than the one before. Exactly what predict_ns says of each, only quicker, so that
    steps may be taken in one stride. A decoding row grows evenly as long as no window of its layers
    fills up on the way.
    predict_copy_ns: moving kv_bytes bytes of keys and values between the pool and host memory, one
    way; 0 for 0.
    """

    def get_row_totals(self, new_tokens: int, context_before: int, sampled: int) -> StepTotals: ...

    def predict_ns(self, totals: StepTotals) -> int: ...

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]: ...

    def predict_copy_ns(self, kv_bytes: int) -> int: ...
