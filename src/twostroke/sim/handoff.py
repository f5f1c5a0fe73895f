"""Handoff: how keys and values get from the replicas that prefill to those that decode.

A pure state machine: no clock, no randomness, no bytes. A request is offered when its prompt is
computed, waits for its sender's link, which moves one request at a time in the order they were
offered, has arrived when its last byte has, and is attached or dropped by the replica that decodes.
Kept true: a link is never given two requests at once, no request is lost or attached twice, and
what has arrived comes out in the order in which it did.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from dataclasses import dataclass, field

from twostroke.errors import InvalidParameter


class HandoffState(enum.Enum):
    """Where a request is on its way."""

    QUEUED = "queued"
    MOVING = "moving"
    ARRIVED = "arrived"
    ATTACHED = "attached"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One sender's link: bytes a second, and nanoseconds before the first byte arrives."""

    bandwidth: float
    latency_ns: int = 0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or self.latency_ns < 0:
            raise InvalidParameter("kv_link", "must be above 0 bytes a second")

    def get_move_ns(self, kv_bytes: int) -> int:
        """Time of moving so many bytes alone."""
        return self.latency_ns + round(kv_bytes * 1e9 / self.bandwidth)


@dataclass(slots=True)
class _Link:
    queue: deque[tuple[int, int]] = field(default_factory=deque)  # request, bytes
    moving: int | None = None
    busy_ns: int = 0


class Handoff:
    """All requests on their way from `senders` replicas. Times are integer nanoseconds, and never
    go back."""

    def __init__(self, senders: int, link: LinkSpec) -> None:
        self._spec = link
        self._links = [_Link() for _ in range(senders)]
        self._states: dict[int, HandoffState] = {}
        self._arrivals: list[tuple[int, int, int]] = []  # end of a move, sender, request
        self._now_ns = 0
        self.moved_bytes = 0

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None while nothing moves."""
        return self._arrivals[0][0] if self._arrivals else None

    def get_state(self, request: int) -> HandoffState:
        """Where a request is that was offered."""
        return self._states[request]

    def get_busy_ns(self, sender: int) -> int:
        """How long a sender's link has been and will be moving what was begun."""
        return self._links[sender].busy_ns

    def count(self, state: HandoffState) -> int:
        """Requests in a state."""
        return sum(each is state for each in self._states.values())

    def offer(self, request: int, sender: int, kv_bytes: int, now_ns: int) -> None:
        """The prompt of `request` is computed at `sender`. Raises InvalidParameter for one that was
        offered before, or a time before what was heard last."""
        if request in self._states:
            raise InvalidParameter("request", f"{request} was offered before")
        if now_ns < self._now_ns or (self.next_ns is not None and self.next_ns < now_ns):
            raise InvalidParameter("now_ns", "something arrived before, which must be taken first")
        self._now_ns = now_ns
        self._states[request] = HandoffState.QUEUED
        link = self._links[sender]
        link.queue.append((request, kv_bytes))
        self._begin(sender, now_ns)

    def take_arrived(self, now_ns: int) -> list[tuple[int, int]]:
        """(time, request) of all that has arrived up to `now_ns`, in that order."""
        taken = []
        while self._arrivals and self._arrivals[0][0] <= now_ns:
            time_ns, sender, request = heapq.heappop(self._arrivals)
            self._now_ns = time_ns
            self._states[request] = HandoffState.ARRIVED
            self._links[sender].moving = None
            taken.append((time_ns, request))
            self._begin(sender, time_ns)
        self._now_ns = max(self._now_ns, now_ns)
        return taken

    def attach(self, request: int) -> None:
        """A replica decodes it from the keys and values that have arrived."""
        self._end(request, HandoffState.ATTACHED)

    def drop(self, request: int) -> None:
        """Nobody takes what has arrived."""
        self._end(request, HandoffState.DROPPED)

    def _begin(self, sender: int, now_ns: int) -> None:
        link = self._links[sender]
        if link.moving is not None or not link.queue:
            return
        request, kv_bytes = link.queue.popleft()
        link.moving = request
        self._states[request] = HandoffState.MOVING
        move_ns = self._spec.get_move_ns(kv_bytes)
        link.busy_ns += move_ns
        self.moved_bytes += kv_bytes
        heapq.heappush(self._arrivals, (now_ns + move_ns, sender, request))

    def _end(self, request: int, state: HandoffState) -> None:
        if self._states.get(request) is not HandoffState.ARRIVED:
            raise InvalidParameter("request", f"{request} has not arrived, or is gone")
        self._states[request] = state
