"""A step's life inside the scheduler: drafted, in flight, answered.

Owns the record of what a planned row changed, so that it can be undone, and the check of an
outcome against its plan. An executor is another process or machine: an answer that does not fit
is its fault, never a request's, so it raises `ExecutorLost` and the engine treats the step as
lost. Nothing here changes a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from twostroke.core.policy import Room
from twostroke.core.sequence import Sequence, State
from twostroke.core.types import (
    BlockCopy,
    BlockId,
    BlockSwap,
    Row,
    RowResult,
    StepOutcome,
    StepPlan,
)
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


@dataclass(slots=True, eq=False)
class StepDraft:
    """A step being planned: what is left of its budgets, and its rows and block copies so far.

    slack: free blocks that newcomers may count on; None until somebody asks. room: what the pace
    leaves to prompts; None for all there is.
    """

    tokens_left: int
    rows_left: int
    room: Room | None = None
    iterations: int = 1
    placements: list[Placement] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    swaps_out: list[BlockSwap] = field(default_factory=list)
    swaps_in: list[BlockSwap] = field(default_factory=list)
    moved_out: list[Sequence] = field(default_factory=list)
    slack: int | None = None
    _candidates: list[Sequence] | None = None

    @property
    def has_room(self) -> bool:
        """True while another row of at least one token fits."""
        return self.tokens_left > 0 and self.rows_left > 0

    def get_tokens(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens a prompt's row from position `start` may have."""
        wanted = min(wanted, self.tokens_left)
        return wanted if self.room is None else min(wanted, self.room.get_tokens(start, wanted))

    def add(self, placement: Placement) -> None:
        """Append a row."""
        self.placements.append(placement)
        self.rows.append(placement.row)
        self.tokens_left -= len(placement.row.tokens)
        self.rows_left -= 1

    def try_take_victim(self, needy: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """The last of `running` behind `needy` with no row in flight; None when there is none.

        Whoever is passed over for a row in flight keeps it until the plan is complete, so the list
        is walked once per plan, however many ask.
        """
        if self._candidates is None:
            self._candidates = list(running)
        while self._candidates and self._candidates[-1].key > needy.key:
            candidate = self._candidates.pop()
            if candidate.state is State.RUNNING and not candidate.rows_in_flight:
                return candidate
        return None

    def build(self, step: int) -> StepPlan:
        """The finished plan."""
        return StepPlan(
            step,
            tuple(self.rows),
            tuple(self.copies),
            tuple(self.swaps_out),
            tuple(self.swaps_in),
            self.iterations,
        )


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
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            return f"token {token!r} is no integer in 0 … {vocab_size - 1}"
    if accepted and tokens[:-1] != row.tokens[-row.drafts :][:accepted]:
        return "accepted drafts differ from the drafted tokens"
    has_logprobs = row.sampling is not None and row.sampling.logprobs is not None
    if len(result.logprobs) != (len(tokens) if has_logprobs else 0):
        return f"{len(result.logprobs)} logprobs for {len(tokens)} tokens"
    if (row.scored or result.scored) and tuple(one.token for one in result.scored) != row.scored:
        return f"{len(result.scored)} scored tokens do not match the {len(row.scored)} asked for"
    return ""
