"""EngineThread: one daemon thread that owns the engine's state and sleeps when nothing is due.

Everything of the engine runs on it, so nothing of the engine needs a lock: other threads send it
functions to run and may wait for their results. It must never poll. It keeps true that every
function sent is either run or refused with EngineClosed, also after the thread has died.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from twostroke.errors import EngineClosed, TwostrokeError

Result = TypeVar("Result")


class Work(Protocol):
    """What the thread does between functions.

    `pump` does what is due and returns the seconds until it must be called again although nobody
    woke the thread, or None. `poll_for` is a descriptor and poll events to call it at as well, or
    None. The last call is `close`, or `abandon` when anything has raised: then nothing may be
    relied upon, and all that is left to do is to tell those who wait.
    """

    @property
    def poll_for(self) -> tuple[int, int] | None: ...

    def pump(self) -> float | None: ...

    def close(self) -> None: ...

    def abandon(self, reason: str) -> None: ...


class EngineThread:
    """Runs `work` and the functions sent to it, one at a time, on a thread of its own."""

    def __init__(self) -> None:
        # Not the obvious deque with a lock and a condition: a finaliser of a dropped stream sends
        # too, and may run inside any allocation, also one made under that lock.
        # `SimpleQueue.put` is reentrant.
        self._sent: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed_reason: str | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        # Written to by those who send while the thread sleeps on descriptors and not on the queue.
        # Closed when nobody who could still write has this object.
        self._wake_fd = -1
        self._is_polling = False

    @property
    def closed_reason(self) -> str | None:
        """Why nothing more is run, or None."""
        return self._closed_reason

    def start(self, work: Work) -> None:
        """Start the thread over `work`; once."""
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="twostroke-engine", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Have `pump` called soon; from any thread."""
        self._put(_do_nothing)

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` on the thread, in order of sending; the future has what it returns."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except TwostrokeError as error:
                future.set_exception(error)
            finally:
                # Anything else is a bug of ours and ends the engine, but leaves nobody waiting.
                if not future.done():
                    future.set_exception(EngineClosed("the engine failed while it handled this"))

        if not self._send(run):
            future.set_exception(EngineClosed(self._closed_reason))
        return future

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread if it still runs; nobody waits for it."""
        self._send(function)

    def stop(self) -> None:
        """Run what was sent, end the work, and wait for the thread to be gone."""
        self._stopping = True
        self.wake()
        # A finaliser may run on the engine's own thread, which cannot wait for itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _send(self, function: Callable[[], None]) -> bool:
        if self._closed_reason is not None:
            return False
        self._put(function)
        if self._closed_reason is not None:
            # The thread ended in between and may not have seen it. All it can do is be refused.
            _run_all(self._take_sent(0))
        return True

    def _put(self, function: Callable[[], None]) -> None:
        self._sent.put(function)
        if self._is_polling:
            os.eventfd_write(self._wake_fd, 1)

    def _run(self, work: Work) -> None:
        reason = "the engine was closed"
        taken: deque[Callable[[], None]] = deque()
        try:
            while not self._stopping:
                if taken:
                    _run_all(taken)
                wait_s = work.pump()
                if wait_s != 0 or not self._sent.empty():
                    awaited = work.poll_for
                    if awaited is not None:
                        self._sleep_on(awaited, wait_s)
                        wait_s = 0
                    taken = self._take_sent(wait_s)
            _run_all(taken)
            work.close()
        except Exception as error:  # the outermost frame of the loop
            logging.getLogger(__name__).exception("the engine's loop failed")
            reason = f"the engine's loop failed: {type(error).__name__}: {error}"
            work.abandon(reason)
        finally:
            self._closed_reason = reason
            # What was sent before that line is now refused by the closed work.
            _run_all(taken)
            _run_all(self._take_sent(0))

    def _sleep_on(self, awaited: tuple[int, int], wait_s: float | None) -> None:
        """Sleep until something is sent, the descriptor has news, or the time is over."""
        if self._wake_fd < 0:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            weakref.finalize(self, os.close, self._wake_fd)
        # Said before the queue is looked at: who sends after that sees it and writes.
        self._is_polling = True
        if self._sent.empty():
            poll = select.poll()
            poll.register(self._wake_fd, select.POLLIN)
            poll.register(*awaited)
            poll.poll(None if wait_s is None else math.ceil(wait_s * 1e3))
        self._is_polling = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _take_sent(self, wait_s: float | None) -> deque[Callable[[], None]]:
        """What is there now, or once the first has come.

        No more than that: functions that keep coming must not keep the work from its turn.
        """
        taken: deque[Callable[[], None]] = deque()
        try:
            taken.append(self._sent.get(wait_s != 0, wait_s))
            for _ in range(self._sent.qsize()):
                taken.append(self._sent.get_nowait())
        except queue.Empty:
            return taken
        return taken


def _run_all(functions: deque[Callable[[], None]]) -> None:
    """Run them in order, each taken out first: one that raises leaves those behind it."""
    while functions:
        functions.popleft()()


def _do_nothing() -> None:
    """Sent to wake the thread."""
