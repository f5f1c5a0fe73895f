"""PartTimes: where the time of the engine's thread goes, counted all the time.

It owns the division of that thread's life into parts that follow one another without a gap, so
that their sum is the time that passed. It must cost little: some reads of the clock a step and one
call, because a step leaves none of this code in the caches.
"""

from __future__ import annotations

# commit: answers taken in, and their tokens booked. plan: the next step planned and handed over.
# deliver: text made and given to callers. arrays, compute, results: the executor's share, when it
# runs on this thread. inbox: requests and cancels, and the thread's own way round. wait: for an
# executor elsewhere. idle: nothing was live.
PARTS = ("commit", "plan", "deliver", "arrays", "compute", "results", "inbox", "wait", "idle")
COMMIT, PLAN, DELIVER, ARRAYS, COMPUTE, RESULTS, INBOX, WAIT, IDLE = range(len(PARTS))

# What of a step is neither its arithmetic nor waiting.
OVERHEAD = ("commit", "plan", "deliver", "arrays", "results", "inbox")


class PartTimes:
    """Nanoseconds spent in each of PARTS; written by one thread, read by any."""

    __slots__ = ("_last_ns", "_next", "_totals")

    def __init__(self, now_ns: int) -> None:
        self._totals = [0] * len(PARTS)
        self._last_ns = now_ns
        self._next = IDLE

    @property
    def last_ns(self) -> int:
        """Up to when the time was noted."""
        return self._last_ns

    def begin_pump(self, begin_ns: int) -> None:
        """A round of the loop begins: what came before it is noted."""
        self._totals[self._next] += begin_ns - self._last_ns
        self._last_ns = begin_ns

    def note_pump(self, marks_ns: tuple[int, int, int], until_next: int) -> None:
        """The round of the loop that had begun: when answers, plan and delivery were done.

        until_next: the part that the time until the next round belongs to.
        """
        totals = self._totals
        answered_ns, planned_ns, end_ns = marks_ns
        totals[COMMIT] += answered_ns - self._last_ns
        totals[PLAN] += planned_ns - answered_ns
        totals[DELIVER] += end_ns - planned_ns
        self._last_ns = end_ns
        self._next = until_next

    def note_executor(self, split_ns: tuple[int, int, int], end_ns: int) -> None:
        """An executor has used this thread since the round's end, for arrays, compute and results.

        What is left of that time, and what comes until the next round, is counted as inbox.
        """
        totals = self._totals
        arrays_ns, compute_ns, results_ns = split_ns
        totals[ARRAYS] += arrays_ns
        totals[COMPUTE] += compute_ns
        totals[RESULTS] += results_ns
        totals[INBOX] += end_ns - self._last_ns - arrays_ns - compute_ns - results_ns
        self._last_ns = end_ns
        self._next = INBOX

    def get_values(self) -> tuple[int, ...]:
        """Nanoseconds in the order of PARTS; they sum to the time up to `last_ns`."""
        return tuple(self._totals)

    def get_totals(self) -> dict[str, int]:
        """Nanoseconds by name, in the order of PARTS; they sum to the time noted so far."""
        return dict(zip(PARTS, tuple(self._totals), strict=True))
