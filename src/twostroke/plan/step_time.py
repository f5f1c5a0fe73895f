"""MeasuredCost: the time of a step on the machine it was measured on.

Fills `spec.cost.StepCost` from a step's seven sums, as `plan/roofline_cost.py` does from data
sheets. It never counts work (spec/work.py does) and never measures. One step and a run of steps go
through the same expression; see `plan/runs.py`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.plan.runs import LEAST_ARRAY, Values, spread_totals, to_time, to_times
from twostroke.spec.work import ModelWork, StepTotals, grow_totals


@dataclass(frozen=True, slots=True)
class StepFit:
    """A machine's step times as fitted to measured steps (see plan/fit.py); times in nanoseconds.

    token_knots, token_ns: time of a step's layers at so many tokens, linear between and beyond.
    sampled_knots, sampled_ns: the same for drawn tokens, from (0, 0). row_ns: for each row.
    decode_pair_ns: for each (query, key) pair of rows of one token; prompt_pair_ns, prompt_key_ns:
    for each pair and earlier key of other rows. copy_byte_ns: for each byte copied. engine_step_ns,
    engine_row_ns: outside the executor, from one step to the next, and for each of its rows.
    """

    token_knots: tuple[int, ...]
    token_ns: tuple[float, ...]
    sampled_knots: tuple[int, ...]
    sampled_ns: tuple[float, ...]
    row_ns: float
    decode_pair_ns: float
    prompt_pair_ns: float
    prompt_key_ns: float
    copy_byte_ns: float
    engine_step_ns: float = 0.0
    engine_row_ns: float = 0.0

    def to_json(self) -> str:
        """As text that `from_json` reads back exactly."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> StepFit:
        """A fit that was stored. Raises InvalidParameter naming what is wrong with it."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidParameter("step_fit", f"is no JSON: {error}") from None
        names = [field.name for field in fields(StepFit)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise InvalidParameter("step_fit", f"must be an object with {', '.join(names)}")
        for name in names:
            is_curve = name.endswith("_knots") or name in ("token_ns", "sampled_ns")
            kind = "numbers" if is_curve else "a number"
            numbers = values[name] if is_curve else [values[name]]
            if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
                raise InvalidParameter("step_fit", f"{name} must be {kind}")
            if is_curve:
                values[name] = tuple(numbers)
        for curve in ("token", "sampled"):
            knots = values[f"{curve}_knots"]
            whole = all(isinstance(knot, int) for knot in knots)
            if len(knots) < 2 or not whole or list(knots) != sorted(set(knots)):
                raise InvalidParameter("step_fit", f"{curve}_knots must be whole and rising")
            if len(values[f"{curve}_ns"]) != len(knots):
                raise InvalidParameter("step_fit", f"{curve}_ns must match {curve}_knots")
        return StepFit(**values)


# A step of fewer tokens reads weights, one of more computes; between them both count.
_FEW, _MANY = 16, 64


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times as long as calibrated steps take: those that read, and those that compute.

    What slows a machine's memory need not slow its arithmetic.
    """

    decode: float = 1.0
    prefill: float = 1.0

    def get(self, tokens: int) -> float:
        """Of a step with so many tokens."""
        share = min(max((tokens - _FEW) / (_MANY - _FEW), 0.0), 1.0)
        return self.decode + share * (self.prefill - self.decode)


class MeasuredCost:
    """The time of a step on the machine it was measured on. See `StepCost` for the methods.

    It is the executor's time, as outcomes say it; `add_engine` gives that from step to step.
    """

    def __init__(self, work: ModelWork, fit: StepFit) -> None:
        """work: the model's counts, with the KV format that was measured."""
        self.fit = fit
        self._work = work
        self.get_row_totals = work.get_row_totals
        self._num_layers = work.num_layers
        self._tokens = _Curve(fit.token_knots, fit.token_ns)
        self._sampled = _Curve(fit.sampled_knots, fit.sampled_ns)

    def add_engine(self) -> MeasuredCost:
        """The same with what the engine takes around each step: for simulating a whole engine."""
        fit = self.fit
        whole = replace(
            fit,
            token_ns=tuple(each + fit.engine_step_ns for each in fit.token_ns),
            row_ns=fit.row_ns + fit.engine_row_ns,
            engine_step_ns=0.0,
            engine_row_ns=0.0,
        )
        return MeasuredCost(self._work, whole)

    def slow_down(self, pace: Pace) -> MeasuredCost:
        """The same on a machine of another pace; not what is around its steps."""
        fit = self.fit
        slower = replace(
            fit,
            token_ns=tuple(
                pace.get(tokens) * each
                for tokens, each in zip(fit.token_knots, fit.token_ns, strict=True)
            ),
            sampled_ns=tuple(pace.decode * each for each in fit.sampled_ns),
            row_ns=pace.decode * fit.row_ns,
            decode_pair_ns=pace.decode * fit.decode_pair_ns,
            prompt_pair_ns=pace.prefill * fit.prompt_pair_ns,
            prompt_key_ns=pace.prefill * fit.prompt_key_ns,
        )
        return MeasuredCost(self._work, slower)

    def predict_ns(self, totals: StepTotals) -> int:
        """Time of one step."""
        layers_ns, head_ns = self._tokens.get(totals.tokens), self._sampled.get(totals.sampled)
        return to_time(self._evaluate(totals, layers_ns, head_ns))

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        """Times of `count` steps, the first with `first`, each `growth` more than the last."""
        if count < LEAST_ARRAY:
            return [self.predict_ns(grow_totals(first, growth, step)) for step in range(count)]
        totals = spread_totals(first, growth, count)
        layers_ns = self._tokens.get_all(totals.tokens)
        head_ns = self._sampled.get_all(totals.sampled)
        return to_times(self._evaluate(totals, layers_ns, head_ns), count)

    def predict_copy_ns(self, kv_bytes: int) -> int:
        """Time of a copy within this machine's memory."""
        return round(kv_bytes * self.fit.copy_byte_ns)

    def _evaluate(self, totals: StepTotals, layers_ns: Values, head_ns: Values) -> Values:
        fit = self.fit
        decode_ns = totals.decode_pairs * fit.decode_pair_ns
        pairs_ns = (totals.pairs - totals.decode_pairs) * fit.prompt_pair_ns
        keys_ns = (totals.keys - totals.decode_keys) * fit.prompt_key_ns
        return layers_ns + head_ns + totals.rows * fit.row_ns + decode_ns + pairs_ns + keys_ns


class _Curve:
    """Straight lines through (knot, value) points; the last goes on."""

    def __init__(self, knots: tuple[int, ...], values: tuple[float, ...]) -> None:
        self._knots, self._values = knots, values
        self._slopes = tuple(
            (values[at + 1] - values[at]) / (knots[at + 1] - knots[at])
            for at in range(len(knots) - 1)
        )
        self._arrays = tuple(np.array(each) for each in (knots, values, self._slopes))

    def get(self, where: int) -> float:
        """Value at one place."""
        at = min(max(bisect_right(self._knots, where) - 1, 0), len(self._slopes) - 1)
        return self._values[at] + self._slopes[at] * (where - self._knots[at])

    def get_all(self, where: Values) -> NDArray[np.float64]:
        """Values at many places (steps,), each as `get` has it."""
        knots, values, slopes = self._arrays
        at = np.clip(np.searchsorted(knots, where, side="right") - 1, 0, len(slopes) - 1)
        result: NDArray[np.float64] = values[at] + slopes[at] * (where - knots[at])
        return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
