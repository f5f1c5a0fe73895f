"""The scheduler's mutable memory of requests and their sequences.

A sequence is one of the n continuations of a request. Its tokens split at two marks:

    0 ........ computed ........ planned ........ len(tokens)
      KV lasting      KV in flight       the gap a plan closes

`computed` moves when a step commits, `planned` when a step is planned or lost. With nothing in
flight the two are equal. The last known token's KV is always missing while a sequence lives:
computing it is what draws the next token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from twostroke.core.types import PENDING, Request, Row, SequenceId, Token, TokenLogprob
from twostroke.kv.blocks import BlockTable
from twostroke.kv.memory import KeptKV

Key = tuple[tuple[int, ...], int, int]  # policy's rank, order of arrival, index


class State(enum.Enum):
    """Where a sequence stands (see roster.py)."""

    UNBORN = "unborn"  # shares the request's sequence that computes the prompt, until the fork
    WAITING = "waiting"
    RESERVED = "reserved"  # its KV is being written from outside (see Scheduler.attach)
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Group:
    """A request and what its sequences share.

    arrived_ns: when it was submitted. most_tokens: of prompt and output that one sequence may have.
    live: sequences not ended. unborn: those of them in state UNBORN. charged: its prompt was
    charged to the tenant. scored: log-probabilities of prompt[1:], as far as committed;
    scored_planned counts those in flight too.
    """

    request: Request
    arrived_ns: int
    most_tokens: int
    live: int
    unborn: int
    needs_history: bool
    charged: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    scored: list[TokenLogprob] = field(default_factory=list)
    scored_planned: int = 0
    scored_emitted: bool = False

    def take_scored(self) -> tuple[TokenLogprob, ...]:
        """All of `scored` the first time, then nothing."""
        emitted, self.scored_emitted = self.scored_emitted, True
        return () if emitted else tuple(self.scored)


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation; `key` orders it among all others, smaller first.

    rows_in_flight: rows in steps neither committed nor lost.
    """

    id: SequenceId
    group: Group
    key: Key
    tokens: list[Token]
    table: BlockTable
    kept: KeptKV
    state: State = State.UNBORN
    computed: int = 0
    planned: int = 0
    rows_in_flight: int = 0

    @property
    def num_new_tokens(self) -> int:
        """Known tokens that are not of the prompt."""
        return len(self.tokens) - len(self.group.request.prompt)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn behind the known ones; at least 1 while it lives."""
        return self.group.most_tokens - len(self.tokens)

    @property
    def gap(self) -> int:
        """Tokens that could be planned now.

        Before the fork the last prompt token is left out: each continuation computes it as its
        own row, and so draws from its own logits. A row in flight that samples leaves no gap;
        one planned ahead of its token leaves -1.
        """
        return len(self.tokens) - (1 if self.group.unborn else 0) - self.planned

    @property
    def can_run_ahead(self) -> bool:
        """True when only a token being drawn is missing for one more row, and is not the last."""
        group = self.group
        return self.gap == 0 and self.num_left > 1 and not (group.unborn or group.needs_history)

    @property
    def is_scored(self) -> bool:
        """True when log-probabilities of the prompt are wanted; sequence 0 reports them."""
        return self.group.request.prompt_logprobs is not None and self.id.index == 0

    def get_chunk(self, limit: int) -> int:
        """Tokens of the next row: the gap, cut to `limit`.

        No position is scored twice: a row lies before or behind the first that is not scored.
        """
        count = min(self.gap, limit)
        edge = self.group.scored_planned
        if self.planned < edge < len(self.group.request.prompt) - 1 and self.is_scored:
            count = min(count, edge - self.planned)
        return count

    def build_row(self, count: int, drafts: tuple[Token, ...] = ()) -> Row:
        """The row of the next `count` tokens, or PENDING, and `drafts`; the table has room."""
        group, start, end = self.group, self.planned, self.planned + count
        request = group.request
        samples = end >= len(self.tokens)
        shows_history = samples and group.needs_history
        scores = start == group.scored_planned and self.is_scored
        return Row(
            self.id,
            (*(self.tokens[start:end] or (PENDING,)), *drafts),
            start,
            self.table.get_blocks(),
            request.sampling if samples else None,
            tuple(self.tokens) if shows_history else (),
            len(request.prompt) if shows_history else 0,
            len(drafts),
            request.prompt[start + 1 : end + 1] if scores else (),
            request.prompt_logprobs or 0 if scores else 0,
        )

    def forget_kv(self) -> None:
        """Drop all blocks; everything known has to be computed again."""
        self.table.clear()
        self.computed = self.planned = self.kept.named = 0
