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
from twostroke.spec.step import PENDING as PENDING
from twostroke.spec.step import Row as Row
from twostroke.spec.step import RowResult as RowResult
from twostroke.spec.step import StepOutcome as StepOutcome


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
