"""Policies: who goes first when tokens or blocks are scarce.

A policy turns a request into a rank, once, when it is accepted; smaller ranks go first and order
of arrival breaks ties, so the order is total and never changes while a request lives. The same
order decides who is admitted, who gets a chunk of the budget first, and, read backwards, who is
preempted. A fixed rank lets the scheduler keep its queues sorted instead of sorting every step;
a policy that shares fairly or works to deadlines gives its tags at arrival and may keep state for
that. A policy must be deterministic and must not look at a clock.
"""

from __future__ import annotations

from typing import Protocol

from twostroke.core.types import Request


class Policy(Protocol):
    """Ranks requests; `rank` is called exactly once for each accepted request."""

    def rank(self, request: Request, now: int) -> tuple[int, ...]: ...


class PriorityThenArrival:
    """Smaller `Request.priority` first; equal priorities in order of arrival."""

    def rank(self, request: Request, now: int) -> tuple[int, ...]:
        """The priority alone: the scheduler appends the order of arrival."""
        return (request.priority,)
