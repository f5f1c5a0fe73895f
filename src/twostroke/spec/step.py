"""A sequence's share of a step, and what comes back: the rows of plans, and outcomes.

All is frozen data that crosses processes: a row is complete in itself, and a result answers one.
Blocks of the KV pool and token ids are ints, times integer nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.spec.request import SamplingSpec, SequenceId, Token, TokenLogprob

# Where an executor's time of a step goes, in order. arrays: the plan made into them. elementwise:
# embedding, norms, rotations, sums, quantised activations. projections, attention, ffn, head: as in
# work.PARTS. sampling: draws. launch: the rest of the arithmetic's call, as checks and waking
# threads. results: the answer built.
STEP_PARTS = (
    *("arrays", "elementwise", "projections", "attention", "ffn", "head", "sampling", "launch"),
    "results",
)
PENDING: Token = -1  # in a row's tokens: what its sequence draws in the step before


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step.

    The tokens occupy positions start … start + len(tokens) - 1; their KV goes to `blocks`, the
    sequence's full block table in order. `sampling` is None when the row only computes KV (an
    unfinished prompt). `history` is all known tokens and `history_prompt` how many of those are
    prompt, given only when sampling needs them. `drafts` is the number of trailing `tokens` that
    are drafted and to be verified. `scored` is empty, or the known next token of each of the
    row's positions that has one, whose log-probabilities are wanted with `scored_top` alternatives.
    `mask` is empty, or says which tokens the row may draw at its one sampled position: token t when
    bit t % 8 of byte t // 8 is set, and none beyond its bytes. It is filled in by the engine, not
    by the scheduler, for a row whose sampling has a grammar; such a row has no drafts.

    With `plans_ahead`, `tokens` may be (PENDING,): the one token that the same sequence's row in
    plan `step` - 1 draws, which has neither drafts nor iterations and may still be running.
    """

    sequence: SequenceId
    tokens: tuple[Token, ...]
    start: int
    blocks: tuple[int, ...]
    sampling: SamplingSpec | None
    history: tuple[Token, ...] = ()
    history_prompt: int = 0
    drafts: int = 0
    scored: tuple[Token, ...] = ()
    scored_top: int = 0
    mask: bytes = b""


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row's answer: drawn tokens (accepted drafts first), and what was asked beside them.

    tokens: empty when the row had no sampling, else one more than accepted drafts, or one of each
    iteration made. logprobs: one per token when asked, else empty.
    scored: one per entry of Row.scored.
    """

    sequence: SequenceId
    tokens: tuple[Token, ...] = ()
    accepted_drafts: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    scored: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The answer to a StepPlan: one result per row, in order, and the measured time.

    iteration_ns: when there were several iterations, the time of each that was made. part_ns: the
    step's time divided into STEP_PARTS, which sum to duration_ns; empty where nobody measured them.
    """

    step: int
    results: tuple[RowResult, ...]
    duration_ns: int
    iteration_ns: tuple[int, ...] = ()
    part_ns: tuple[int, ...] = ()
