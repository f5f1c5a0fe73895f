"""ChildExecutor: runs steps in one child process, and tells when that child is lost.

It is one generation: when its child is lost it answers every plan with ExecutorLost and makes
certain that the child is dead, because the next one writes to the same KV memory. Not thread-safe:
one thread starts plans, waits on `poll_for` until `due_ns`, and calls `run_pending`, which never
waits for a living child.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import BlockId, StepOutcome, StepPlan
from twostroke.errors import BlamelessLoss, ExecutorLost
from twostroke.exec.child_memory import Bytes, SharedMemory
from twostroke.exec.child_process import ChildProcess
from twostroke.exec.child_wire import Message, Ready, encode
from twostroke.exec.step_wire import Broken, StepLost

# How often a child that owes an answer is looked at. Stopped at two looks in a row, it is lost.
LOOK_NS = 100 * 10**6
# Weights are read, or packed anew where packed ones are not kept.
START_NS = 600 * 10**9
_DEATH_S = 30.0  # a killed process is gone in milliseconds, unless the system itself hangs

# A plan → the nanoseconds after which its answer will not come any more.
Deadline = Callable[[StepPlan], int]


@dataclass(slots=True, eq=False)
class _Flight:
    plan: StepPlan
    on_done: OnDone
    started_ns: int


class ChildExecutor:
    """Runs steps in `child` (see core.ports.Executor, engine.loop.SupervisedExecutor).

    get_deadline_ns: for each plan, counted from when the child could begin it. on_answer: called
    when a step was answered.
    """

    def __init__(
        self,
        child: ChildProcess,
        memory: SharedMemory,
        get_deadline_ns: Deadline,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._child = child
        self._memory = memory
        self._get_deadline_ns = get_deadline_ns
        self._on_answer = on_answer
        self._info: ExecutorInfo | None = None
        self._flights: deque[_Flight] = deque()
        self._lost: ExecutorLost | None = None
        self._broken: Broken | None = None
        self._is_dead = False
        self._was_stopped = False
        now_ns = time.monotonic_ns()
        self._free_ns = now_ns  # since when the child has had nothing before its first flight
        self._look_ns = now_ns + LOOK_NS

    @property
    def child(self) -> ChildProcess:
        """The process."""
        return self._child

    @property
    def lost(self) -> ExecutorLost | None:
        """Why it answers no more plans, or None."""
        return self._lost

    @property
    def broken(self) -> Broken | None:
        """What its child said when it could not go on, if it did."""
        return self._broken

    @property
    def is_ready(self) -> bool:
        """True once the child can take steps."""
        return self._info is not None

    @property
    def is_dead(self) -> bool:
        """True when the process is certainly gone, after `close` or a loss."""
        return self._is_dead

    @property
    def poll_for(self) -> tuple[int, int] | None:
        """The descriptor and the poll events to wait for; None when nothing can come."""
        if self._lost is not None:
            return None
        unsent = select.POLLOUT if self._child.end.has_unsent else 0
        return self._child.end.fileno(), select.POLLIN | unsent

    @property
    def due_ns(self) -> int | None:
        """When to call `run_pending` although nothing came, by the monotonic clock, or None."""
        if self._lost is not None or (self.is_ready and not self._flights):
            return None
        return self._look_ns

    def describe(self) -> ExecutorInfo:
        """What the child offers, once it is ready."""
        assert self._info is not None, "the child is not ready"
        return self._info

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """Sends a plan; `on_done` is called by `run_pending` or `close`, or here if lost."""
        if self._lost is not None:
            on_done(self._lost)
            return
        now_ns = time.monotonic_ns()
        if not self._flights:
            self._free_ns = now_ns
            if self.is_ready:
                self._look_ns = now_ns + LOOK_NS
        self._flights.append(_Flight(plan, on_done, now_ns))
        with contextlib.suppress(OSError):  # it is gone, which reading shows
            self._child.end.send(encode(plan))

    def run_pending(self) -> tuple[int, int, int]:
        """Takes what the child says and looks whether it lives.

        Returns nanoseconds as an executor on the caller's thread would: none.
        """
        if self._lost is None:
            try:
                if self._child.end.has_unsent:
                    with contextlib.suppress(OSError):
                        self._child.end.flush()
                for message in self._child.end.receive():
                    self._take(message)
                due_ns = self.due_ns
                if due_ns is not None and time.monotonic_ns() >= due_ns:
                    self._look()
            except (EOFError, OSError):
                self._lose(ExecutorLost(self._explain_end()))
            except (ValueError, TypeError) as error:
                self._lose(ExecutorLost(f"it sent what cannot be read: {error}"))
            except ExecutorLost as lost:
                self._lose(lost)
        return 0, 0, 0

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of whole blocks, in order; no step may be running."""
        return self._view_blocks()[list(blocks)].tobytes()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv` into `blocks`; no step may be running."""
        view = self._view_blocks()
        view[list(blocks)] = np.frombuffer(handle, np.uint8).reshape(len(blocks), -1)

    def close(self) -> None:
        """Kills the child and waits for its death; plans still running answer ExecutorLost."""
        self._lose(ExecutorLost("the executor is closed"))

    def _view_blocks(self) -> Bytes:
        assert not self._flights, "a step is running"
        return self._memory.mapped.kv.reshape(self.describe().num_blocks, -1)

    # ---- what the child says --------------------------------------------------------------------

    def _take(self, message: Message) -> None:
        """Raises ExecutorLost."""
        now_ns = time.monotonic_ns()
        match message:
            case StepOutcome():
                if not self._flights or self._flights[0].plan.step != message.step:
                    raise ExecutorLost(f"it answered step {message.step} out of turn")
                flight = self._flights.popleft()
                self._free_ns = now_ns
                self._look_ns = now_ns + LOOK_NS
                self._was_stopped = False
                flight.on_done(message)
                self._on_answer()
            case Ready(info):
                self._info = ExecutorInfo(*info)
                self._free_ns = now_ns
                self._look_ns = now_ns + LOOK_NS
            case StepLost(_, reason):
                raise ExecutorLost(reason)
            case Broken():
                self._broken = message
                raise ExecutorLost(f"it cannot go on: {message.kind}: {message.text}")
            case _:
                raise ExecutorLost(f"it sent {type(message).__name__}, which nobody asked for")

    def _look(self) -> None:
        """Whether the child still works on what it owes. Raises ExecutorLost."""
        now_ns = time.monotonic_ns()
        self._look_ns = now_ns + LOOK_NS
        what = f"step {self._flights[0].plan.step}" if self._flights else "its start"
        if self._child.is_stopped():
            if self._was_stopped:
                raise BlamelessLoss(f"somebody stopped it (SIGSTOP) during {what}")
            self._was_stopped = True
            return
        self._was_stopped = False
        limit_ns = START_NS
        if self.is_ready:
            limit_ns = self._get_deadline_ns(self._flights[0].plan)
        if now_ns - self._free_ns > limit_ns:
            raise ExecutorLost(f"{what} was not done in {limit_ns / 1e9:.0f} s: it hangs")

    def _explain_end(self) -> str:
        during = f" during step {self._flights[0].plan.step}" if self._flights else ""
        if not self.is_ready:
            during = " while it started"
        return self._child.describe_end() + during

    def _lose(self, lost: ExecutorLost) -> None:
        """Ends it for good: the child is dead before anybody hears of it."""
        if self._lost is not None:
            return
        self._is_dead = self._child.kill(_DEATH_S)
        self._child.end.close()
        if self._flights and self._memory.mapped.get_begun() != self._flights[0].plan.step:
            lost = BlamelessLoss(f"{lost}, which it had not begun")
        self._lost = lost
        while self._flights:
            self._flights.popleft().on_done(lost)
