"""What the scheduler leaves to others to choose: order, accounts, pace, drafts, how to preempt.

These are the protocols; the choices live in `policies/`, and only the plainest order is here. A
choice is deterministic, looks at no clock, and sees requests and steps, never the scheduler's own
memory. Whatever it answers every invariant holds: a choice can be unfair or slow, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from twostroke.core.types import Request, SequenceId, StepOutcome, StepPlan, Token

Rank = tuple[int, ...]


class Order(Protocol):
    """Who goes first when tokens or blocks are scarce.

    A request's rank, smaller first, with order of arrival behind it, decides who is admitted, who
    gets a chunk of the budget first and, read backwards, who is preempted. changes: ranks change
    while a request lives, so they are asked for again.
    """

    changes: bool

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """The rank of a continuation with so many tokens in the KV cache, and so many new ones."""

    def end(self, request: Request, new_tokens: int) -> None:
        """A continuation of `request` has ended, with so many new tokens."""


class PriorityThenArrival:
    """Smaller `Request.priority` first; equal priorities in order of arrival."""

    changes = False

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """The priority alone: the scheduler appends the order of arrival."""
        return (request.priority,)

    def end(self, request: Request, new_tokens: int) -> None:
        """Nothing to note."""


class Accounts(Protocol):
    """What each tenant has had: among those who wait, the tenant with the least goes first.

    Without accounts the order alone decides.
    """

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """`tenant`, who had nothing waiting, does now; `waiting` are the others who have."""

    def get_debt(self, tenant: str) -> int:
        """What `tenant` has had of the service."""

    def charge(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        """`tenant` was served so many tokens: a prompt when admitted, others when drawn."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pace may know when a step begins.

    decodes: position and request of each running sequence that draws a token in this step, or in
    one in flight. prefills: of all others that run. waiting: how many wait, first in order is
    head, submitted at oldest_ns (None and 0 when none does). free_blocks: of num_blocks.
    """

    decodes: Many[tuple[int, Request]]
    prefills: Many[tuple[int, Request]]
    waiting: int
    head: Request | None
    oldest_ns: int
    free_blocks: int
    num_blocks: int


class Room(Protocol):
    """What is left of one step for prompts.

    newcomers: most sequences that it may still admit. wake_ns: when a step may admit more although
    nothing happens until then; 0 for no such time.
    """

    newcomers: int
    wake_ns: int

    def get_tokens(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens one more row may have from position `start`; 0 when full."""

    def add(self, start: int, tokens: int) -> None:
        """A prompt's row was added, or a decode's with drafts."""


class Pace(Protocol):
    """How much of the prompts a step takes beside its decodes."""

    def open_step(self, load: Load, now: int) -> Room:
        """The room of the step that is being planned."""

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """A step was committed."""


class Drafter(Protocol):
    """Guesses tokens to verify together with the next one (Leviathan et al. 2023)."""

    def propose(self, id: SequenceId, tokens: Many[Token], most: int) -> tuple[Token, ...]:
        """At most `most` tokens that may follow `tokens`, all that are known of the sequence."""

    def settle(self, id: SequenceId, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens so many were what was drawn."""

    def forget(self, id: SequenceId) -> None:
        """The sequence has ended."""


@dataclass(frozen=True, slots=True)
class Policies:
    """All that is chosen for one scheduler.

    accounts: None treats tenants alike. pace: None fills every step up to the config's limits.
    drafter: None drafts nothing. prefers_swap: whether (tokens computed, blocks) of a preempted
    sequence are moved to host memory rather than computed again.
    """

    order: Order = field(default_factory=PriorityThenArrival)
    accounts: Accounts | None = None
    pace: Pace | None = None
    drafter: Drafter | None = None
    prefers_swap: Callable[[int, int], bool] = lambda tokens, blocks: True
