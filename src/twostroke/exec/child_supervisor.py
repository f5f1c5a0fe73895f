"""ChildSupervisor: keeps one child running steps, and a second one ready to take its place.

It owns the memory that children work on, the thread they are started from, and the rule of
replacing: a new child gets the memory only when the old one is certainly dead; children that die
one after the other without having answered a step are replaced more and more slowly, and in the end
not at all. The second child, the spare, has made its executor and waits: replacing takes no longer
than noticing. It is started when the first has answered a step, so a start does not wait for it.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from twostroke import errors
from twostroke.errors import DeviceError, ExecutorLost, ModelError
from twostroke.exec.child_executor import START_NS, ChildExecutor, Deadline
from twostroke.exec.child_memory import MemorySizes, SharedMemory
from twostroke.exec.child_process import ChildProcess, ChildSetup
from twostroke.exec.step_wire import Broken

_log = logging.getLogger(__name__)

# So many children in a row may die without having answered a step. A request that kills them fails
# at its second, so only an executor that can do nothing at all gets here.
MOST_IN_A_ROW = 16
FREE_IN_A_ROW = 3  # of them are replaced at once
_FIRST_DELAY_S = 0.1
_MOST_DELAY_S = 1.0


class ChildSupervisor:
    """Makes executors over one memory, one after the other; `replace` and `open` on one thread."""

    def __init__(self, setup: ChildSetup, sizes: MemorySizes, get_deadline_ns: Deadline) -> None:
        self._setup = setup
        self._get_deadline_ns = get_deadline_ns
        self._memory = SharedMemory(sizes)
        # Not the caller's thread: children live no longer than the thread that starts them.
        self._threads = ThreadPoolExecutor(1, "twostroke-children")
        self._closing = threading.Event()
        self._spare: ChildProcess | None = None
        self._current: ChildExecutor | None = None
        self._in_a_row = 0
        self.num_replaced = 0

    def open(self) -> ChildExecutor:
        """The first executor, ready.

        Raises DeviceError, or the ModelError that the child met; no process is left then.
        """
        try:
            executor = self._make_executor(self._start_child())
        except OSError as error:
            self.close()
            raise DeviceError(f"the executor's process cannot be started: {error}") from error
        self._threads.submit(self._reserve)
        while not executor.is_ready and executor.lost is None:
            waited_for = executor.poll_for
            assert waited_for is not None
            poll = select.poll()
            poll.register(*waited_for)
            poll.poll(100)
            executor.run_pending()
        if executor.lost is not None:
            self.close()
            raise _name_error(executor.broken, executor.lost)
        return executor

    def replace(self, lost: ExecutorLost) -> ChildExecutor:
        """The next executor, over the same memory; it need not be ready yet.

        Raises ExecutorLost, with nothing left running, when there will be none.
        """
        assert self._current is not None
        self._current.close()
        self._in_a_row += 1
        if not self._current.is_dead:
            self.close()
            raise ExecutorLost(f"process {self._current.child.pid} cannot be killed")
        if self._in_a_row > MOST_IN_A_ROW:
            self.close()
            raise ExecutorLost(f"{MOST_IN_A_ROW} in a row died before they answered a step")
        self.num_replaced += 1
        _log.warning("the executor is being replaced: %s", lost)
        spare, self._spare = self._spare, None
        try:
            return self._make_executor(spare or self._start_child())
        except OSError as error:
            self.close()
            raise ExecutorLost(f"no process could be started: {error}") from error

    def close(self) -> None:
        """Ends every child and lets go of the memory; again does nothing."""
        self._closing.set()
        if self._current is not None:
            self._current.close()
        if self._spare is not None:
            self._spare.kill(START_NS / 1e9)
            self._spare.end.close()
            self._spare = None
        self._threads.shutdown()
        self._memory.close()

    def _make_executor(self, child: ChildProcess) -> ChildExecutor:
        self._current = ChildExecutor(child, self._memory, self._get_deadline_ns, self._note_answer)
        return self._current

    def _start_child(self) -> ChildProcess:
        late = self._in_a_row - FREE_IN_A_ROW
        if late > 0:
            delay_s = min(_FIRST_DELAY_S * 2 ** (late - 1), _MOST_DELAY_S)
            self._threads.submit(self._closing.wait, delay_s)  # in front of what starts it
        return ChildProcess(self._setup, self._memory, self._threads)

    def _note_answer(self) -> None:
        self._in_a_row = 0
        if self._spare is None and not self._closing.is_set():
            try:
                self._spare = self._start_child()
            except OSError as error:
                _log.warning("no spare could be started, until the next answer: %s", error)

    def _reserve(self) -> None:
        begin_s = time.monotonic()
        try:
            self._memory.reserve(lambda: not self._closing.is_set())
        except OSError as error:
            _log.warning("the KV pool is larger than the memory there is now: %s", error)
        _log.debug("the KV pool was reserved in %.2f s", time.monotonic() - begin_s)


def _name_error(broken: Broken | None, lost: ExecutorLost) -> Exception:
    """What a child's failure at the start is raised as: a model's fault stays one."""
    if broken is not None:
        found = getattr(errors, broken.kind, None)
        if isinstance(found, type) and issubclass(found, ModelError | DeviceError):
            error: Callable[[str], Exception] = found
            return error(broken.text)
    return DeviceError(f"the executor's process did not start: {lost}")
