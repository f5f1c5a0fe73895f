"""The messages that cross the scheduler's boundary: requests, plans, outcomes, updates.

All are frozen and slotted; a plan is complete in itself, so an executor needs to remember nothing
about a request but the KV bytes in its blocks. Token ids are ints, times are integer nanoseconds
on the engine's clock. Nothing here may hold a tensor, a clock or a callback.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.kv.moves import BlockCopy as BlockCopy
from twostroke.kv.moves import BlockId as BlockId
from twostroke.kv.moves import BlockSwap as BlockSwap

Token = int


@dataclass(frozen=True, slots=True, order=True)
class SequenceId:
    """One of the `n` continuations of a request; `index` runs from 0."""

    request: str
    index: int


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the next token is drawn from logits; every field is data, so a replay draws the same.

    Applied in this order: penalties and bias on the logits, temperature, top-k, top-p, min-p.
    temperature: 0 means greedy. top_k: 0 means off. top_p, min_p: 1.0 and 0.0 mean off.
    repetition_penalty: 1.0 means off (Keskar et al. 2019, §4.1); over prompt and output.
    presence_penalty, frequency_penalty: 0.0 means off; over the output only.
    seed: of the counter-based generator; the draw depends on (seed, sequence index, position).
    logit_bias: (token, addend) pairs in ascending token order.
    logprobs: None for none, else how many of the most likely tokens to report beside the chosen
    one. They are of the model's own distribution, before any of the above.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[Token, float], ...] = ()
    logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """True when the draw depends on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the scheduler.

    stop_tokens end a sequence (the stop token itself is emitted last, flagged by the finish
    reason); they are not obeyed before `min_new_tokens`. `n` continuations share the prompt's
    blocks. `prompt_logprobs`: None, else report each prompt token's log-probability with that many
    alternatives. `priority`: smaller is more urgent. `tenant`: who shares are counted for.
    `cache_scope`: adapter and tenant salt; a prefix is reused within one scope only. `ttft_ns`,
    `itl_ns`: targets for the first token and between tokens; 0 means none. `expected_tokens`: the
    output's length as the caller predicts it; 0 means unknown.
    """

    id: str
    prompt: tuple[Token, ...]
    max_new_tokens: int
    sampling: SamplingSpec = SamplingSpec()
    n: int = 1
    stop_tokens: frozenset[Token] = frozenset()
    min_new_tokens: int = 0
    prompt_logprobs: int | None = None
    priority: int = 0
    tenant: str = ""
    cache_scope: str = ""
    ttft_ns: int = 0
    itl_ns: int = 0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step.

    The tokens occupy positions start … start + len(tokens) - 1; their KV goes to `blocks`, the
    sequence's full block table in order. `sampling` is None when the row only computes KV (an
    unfinished prompt). `history` is all known tokens and `history_prompt` how many of those are
    prompt, given only when sampling needs them. `drafts` is the number of trailing `tokens` that
    are drafted and to be verified. `scored` is empty, or the known next token of each of the
    row's positions that has one, whose log-probabilities are wanted with `scored_top` alternatives.
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
class TokenLogprob:
    """Log-probability (natural log) of `token`, with the most likely alternatives, best first."""

    token: Token
    logprob: float
    top: tuple[tuple[Token, float], ...] = ()


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


# ---- how requests end, and what the scheduler says about them -----------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """Ended as asked: reason is "stop" (stop token or string) or "length"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Could never run; `limit_tokens` is the longest prompt that would, where that is the cause."""

    reason: str
    limit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Ended because the caller asked."""

    reason: str = "cancelled"


@dataclass(frozen=True, slots=True)
class Failed:
    """Ended because the engine could not go on with it."""

    reason: str


Ending = Finished | Rejected | Cancelled | Failed


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
