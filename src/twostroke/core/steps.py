"""A step's life inside the scheduler: drafted, in flight, answered.

Owns the record of what a planned row changed, so that it can be undone, and the check of an
outcome against its plan. An executor is another process: an answer that does not fit is its fault,
never a request's, so the step counts as lost. Nothing here changes a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.core.sequence import Sequence
from twostroke.core.types import BlockId, Row, RowResult, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost


@dataclass(slots=True, eq=False)
class Placement:
    """A row and how to undo it: blocks its table grew by, and the block it split off from.

    arrives: its sequence's KV comes in from host memory in the same step.
    """

    sequence: Sequence
    row: Row
    grown: int
    source: BlockId | None
    arrives: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    """A step neither committed nor lost. moved_out: sequences whose KV it moves to host memory."""

    plan: StepPlan
    placements: list[Placement]
    moved_out: list[Sequence]


_INTS = {int}


def check_outcome(outcome: StepOutcome, plan: StepPlan, vocab_size: int) -> None:
    """Raise `ExecutorLost` unless `outcome` answers every row of `plan`, in order and in range."""
    if len(outcome.results) != len(plan.rows):
        counts = f"{len(outcome.results)} results for {len(plan.rows)} rows"
        raise ExecutorLost(f"step {plan.step}: {counts}")
    made = len(outcome.iteration_ns) or 1
    if made > plan.iterations:
        raise ExecutorLost(f"step {plan.step}: {made} iterations of {plan.iterations}")
    for row, result in zip(plan.rows, outcome.results, strict=True):
        fault = _find_fault(row, result, made, vocab_size)
        if fault:
            raise ExecutorLost(f"step {plan.step}, row of {row.sequence}: {fault}")


def _find_fault(row: Row, result: RowResult, made: int, vocab_size: int) -> str:
    """What is wrong with `result`, or an empty string."""
    # The plan's own id object usually comes back; identity spares a comparison of two strings.
    if result.sequence is not row.sequence and result.sequence != row.sequence:
        return f"the result is for {result.sequence}"
    tokens, accepted = result.tokens, result.accepted_drafts
    if not 0 <= accepted <= row.drafts:
        return f"{accepted} drafts accepted of {row.drafts}"
    if len(tokens) != (0 if row.sampling is None else accepted + made):
        return f"{len(tokens)} tokens with {accepted} drafts accepted in {made} iterations"
    if tokens and not (
        set(map(type, tokens)) == _INTS and 0 <= min(tokens) <= max(tokens) < vocab_size
    ):
        return f"tokens {tokens!r} are no integers in 0 … {vocab_size - 1}"
    if accepted and tokens[:-1] != row.tokens[-row.drafts :][:accepted]:
        return "accepted drafts differ from the drafted tokens"
    has_logprobs = row.sampling is not None and row.sampling.logprobs is not None
    if len(result.logprobs) != (len(tokens) if has_logprobs else 0):
        return f"{len(result.logprobs)} logprobs for {len(tokens)} tokens"
    if (row.scored or result.scored) and tuple(one.token for one in result.scored) != row.scored:
        return f"{len(result.scored)} scored tokens do not match the {len(row.scored)} asked for"
    return ""
