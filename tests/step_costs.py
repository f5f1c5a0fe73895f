"""LinearStepCost: the fake of StepCost, with round numbers that a test can add up by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke.spec.work import StepTotals, grow_totals


@dataclass(frozen=True, slots=True)
class LinearStepCost:
    """A fixed time a step and further times a token, an attention pair and a byte copied.

    One layer without a window: a row's pairs and keys can be counted on fingers.
    """

    step_ns: int = 1_000
    token_ns: int = 100
    pair_ns: int = 1
    copied_byte_ns: int = 1
    asked: list[StepTotals] = field(default_factory=list, compare=False)

    def get_row_totals(self, new_tokens: int, context_before: int, sampled: int) -> StepTotals:
        pairs = sum(context_before + at + 1 for at in range(new_tokens))
        decoded = (pairs, context_before) if new_tokens == 1 else (0, 0)
        return StepTotals(1, new_tokens, sampled, pairs, context_before, *decoded)

    def predict_ns(self, totals: StepTotals) -> int:
        self.asked.append(totals)
        return self.step_ns + self.token_ns * totals.tokens + self.pair_ns * totals.pairs

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        return [self.predict_ns(grow_totals(first, growth, step)) for step in range(count)]

    def predict_copy_ns(self, kv_bytes: int) -> int:
        return self.copied_byte_ns * kv_bytes
