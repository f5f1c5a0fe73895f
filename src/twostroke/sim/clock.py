"""VirtualClock: the engine's clock over simulated time.

Owns the only order in which things happen in a simulation: by time, and at one time in the order
they were asked for. It never moves but when told to, never backwards, and never runs a function
before its time. A jump makes everything that was due meanwhile late, as for a process that was
stopped.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

# Later than anything that happens.
NEVER_NS = 1 << 62


class VirtualClock:
    """The Clock protocol over a heap of due functions; num_run: how many it has run."""

    __slots__ = ("_heap", "_now_ns", "_order", "num_run")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._now_ns = self.num_run = 0
        self._order = itertools.count()

    @property
    def next_ns(self) -> int:
        """When the first of the due functions is due; NEVER_NS when there is none."""
        return self._heap[0][0] if self._heap else NEVER_NS

    def now_ns(self) -> int:
        """Nanoseconds since the start."""
        return self._now_ns

    def call_at(self, t_ns: int, fn: Callable[[], None]) -> None:
        """Run `fn` at `t_ns`, after what was asked for at that time before."""
        heapq.heappush(self._heap, (t_ns, next(self._order), fn))

    def run_next(self) -> None:
        """Move to the first due function, if that is not late already, and run it."""
        due_ns, _, fn = heapq.heappop(self._heap)
        self.num_run += 1
        self.move_to(due_ns)
        fn()

    def move_to(self, t_ns: int) -> None:
        """Move on to `t_ns`, with nothing due before it; a time in the past changes nothing."""
        if t_ns > self._now_ns:
            self._now_ns = t_ns

    def jump(self, by_ns: int) -> None:
        """Move on past whatever is due: it will run late."""
        self._now_ns += by_ns
