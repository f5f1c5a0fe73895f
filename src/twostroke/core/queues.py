"""The line of sequences that wait for blocks, in policy order.

It may be long and only its head is ever looked at, so it is a heap in which entries go stale
instead of being searched for. (Running sequences are few and read in order every step: those are
a sorted list in the scheduler.) It changes nothing of a sequence but its ticket.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from twostroke.core.sequence import Key, Sequence


class WaitingQueue:
    """Sequences without blocks, first in policy order at the head."""

    __slots__ = ("_heap", "_live", "_tickets")

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Sequence]] = []
        self._live = 0
        self._tickets = 0

    def __len__(self) -> int:
        return self._live

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        return (sequence for _, ticket, sequence in self._heap if sequence.ticket == ticket)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not waiting."""
        sequence.ticket = self._tickets
        self._tickets += 1
        self._live += 1
        heapq.heappush(self._heap, (sequence.key, sequence.ticket, sequence))

    def try_head(self) -> Sequence | None:
        """The first in policy order; None when nobody waits."""
        while self._heap and self._heap[0][2].ticket != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        assert sequence.ticket >= 0, f"{sequence.id} is not waiting"
        sequence.ticket = -1
        self._live -= 1
        # Stale entries deep in the heap would keep their prompts alive: sweep when they dominate.
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapq.heapify(self._heap)
