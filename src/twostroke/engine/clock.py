"""MonotonicClock: the engine's clock over real time.

It owns one timer thread, started by the first `call_at`, that runs due functions in order of
time. It never runs a function early, and never runs one after `close`.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class MonotonicClock:
    """The Clock protocol over `time.monotonic_ns`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    # Nanoseconds from an arbitrary start; never decreases. The function itself, because it is asked
    # several times a step.
    now_ns = staticmethod(time.monotonic_ns)

    def call_at(self, t_ns: int, fn: Callable[[], None]) -> None:
        """Run `fn` on the timer thread at or soon after `t_ns`; `fn` must be quick."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._heap, (t_ns, next(self._order), fn))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="twostroke-clock", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Drop what is not yet due and end the timer thread."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while (fn := self._wait_for_due()) is not None:
            fn()

    def _wait_for_due(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                if not self._heap:
                    self._changed.wait()
                    continue
                wait_ns = self._heap[0][0] - time.monotonic_ns()
                if wait_ns <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(wait_ns / 1e9)
            return None
