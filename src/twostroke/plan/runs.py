"""What step costs share: one expression for one step and for a run of steps.

Owns how a run's totals become arrays and nanoseconds become whole times. Nothing but additions,
products and maxima of float64 in one order may stand in such an expression: so a run's times are
those of its steps one by one, to the bit, on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twostroke.spec.work import StepTotals

# Shorter runs are quicker step by step than as arrays.
LEAST_ARRAY = 12

# A number of one step, or one for each step of a run.
Values = Any


def spread_totals(first: StepTotals, growth: StepTotals, count: int) -> StepTotals:
    """Totals of a run: arrays (count,) in place of those numbers that grow."""
    steps = np.arange(count)
    pairs = zip(first, growth, strict=True)
    return StepTotals._make(start + more * steps if more else start for start, more in pairs)


def get_longer(one: Values, other: Values) -> Values:
    """The longer of two times, each of one step or of many; arrays are slow for single numbers."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.maximum(one, other)
    return max(one, other)


def to_time(ns: float) -> int:
    """Whole nanoseconds, at least 1."""
    return max(1, round(ns))


def to_times(ns: Values, count: int) -> list[int]:
    """Whole times of `count` steps; a single number where all take the same."""
    if not isinstance(ns, np.ndarray) or ns.ndim == 0:
        return [to_time(float(ns))] * count
    times: list[int] = np.maximum(np.rint(ns), 1).astype(np.int64).tolist()
    return times
