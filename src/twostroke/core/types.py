"""The messages that cross the scheduler's boundary: requests, plans, outcomes, updates.

All are frozen and slotted; a plan is complete in itself, so an executor needs to remember nothing
about a request but the KV bytes in its blocks, and what a PENDING token was. Nothing here may hold
a tensor, a clock or a callback. What lies further inside (spec, kv) is named here too, for those
who see only this.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.kv.moves import BlockCopy as BlockCopy
from twostroke.kv.moves import BlockId as BlockId
from twostroke.kv.moves import BlockSwap as BlockSwap
from twostroke.spec.request import Cancelled as Cancelled
from twostroke.spec.request import Ending as Ending
from twostroke.spec.request import Failed as Failed
from twostroke.spec.request import Finished as Finished
from twostroke.spec.request import Rejected as Rejected
from twostroke.spec.request import Request as Request
from twostroke.spec.request import SamplingSpec as SamplingSpec
from twostroke.spec.request import SequenceId as SequenceId
from twostroke.spec.request import Token as Token
from twostroke.spec.request import TokenLogprob as TokenLogprob

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

    With `plans_ahead`, `tokens` may be (PENDING,): the one token that the same sequence's row in
    plan `step` - 1 draws, which has neither drafts nor iterations and may still be running.
    """

    sequence: SequenceId
    tokens: tuple[Token, ...]
    start: int
    blocks: tuple[BlockId, ...]
    sampling: SamplingSpec | None
    history: tuple[Token, ...] = ()
    history_prompt: int = 0
    drafts: int = 0
    scored: tuple[Token, ...] = ()
    scored_top: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything an executor needs for one step; rows in the order results must come back.

    Before the rows compute, KV moves out to host memory, then in from it, then within the pool.
    `iterations` above 1 asks for so many steps in one go when every row holds one token: each goes
    on from the tokens the one before drew, in `blocks` that have room for all. An executor may
    make fewer.
    """

    step: int
    rows: tuple[Row, ...]
    copies: tuple[BlockCopy, ...] = ()
    swaps_out: tuple[BlockSwap, ...] = ()
    swaps_in: tuple[BlockSwap, ...] = ()
    iterations: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(len(row.tokens) for row in self.rows)


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

    iteration_ns: when there were several iterations, the time of each that was made.
    """

    step: int
    results: tuple[RowResult, ...]
    duration_ns: int
    iteration_ns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing can be planned now. `waiting` requests are queued, `in_flight` steps are running.

    wake_ns: when to ask again although nothing has happened; 0 when there is no such time.
    """

    waiting: int
    in_flight: int
    wake_ns: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is queued."""

    request: str


@dataclass(frozen=True, slots=True)
class TokensEmitted:
    """New tokens of one sequence, in order; `prompt_scored` comes once, complete, before them."""

    sequence: SequenceId
    tokens: tuple[Token, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_scored: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """The last word on one sequence. Every accepted sequence gets exactly one."""

    sequence: SequenceId
    ending: Ending


@dataclass(frozen=True, slots=True)
class Preempted:
    """A running sequence lost its blocks; it waits to be recomputed, or moved in from the host."""

    sequence: SequenceId
    swapped: bool = False


Update = TokensEmitted | SequenceEnded | Preempted


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes the scheduler works within.

    num_blocks: KV blocks in the pool; block_tokens: tokens a block holds; step_tokens: most tokens
    in one step; max_rows: most rows in one step; context_tokens: the model's limit; vocab_size:
    token ids must be below it. host_blocks: room in host memory for blocks of preempted sequences.
    watermark_blocks: free blocks that newcomers leave to the sequences that run. reserve_tokens:
    room that every sequence takes when it is admitted, whatever it needs; 0 pages on demand.
    cache_seed: names the model in prefix hashes; an empty one turns the prefix cache off.
    plans_ahead: plan decodes while the tokens before them are drawn, for an executor that passes
    those on by itself (see PENDING).
    """

    num_blocks: int
    block_tokens: int
    step_tokens: int
    max_rows: int
    context_tokens: int
    vocab_size: int
    host_blocks: int = 0
    watermark_blocks: int = 0
    reserve_tokens: int = 0
    cache_seed: str = ""
    plans_ahead: bool = False
