"""EngineLoop: plans steps, hands them to an executor, and commits what comes back.

It is a synchronous machine: time comes from the clock it is given, answers arrive in an inbox
that any thread may fill, and nothing happens but inside a call. A thread drives it in production
and a virtual clock in simulation. `pump` must never block, and must never ask the scheduler twice
about one answer: each belongs to one flight of one executor generation, and late, repeated or stray
answers are refused. It keeps true that every accepted request gets its endings, whatever the
executor does.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from twostroke.core.ports import Clock, Executor, ExecutorInfo, StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Accepted,
    Cancelled,
    Ending,
    Failed,
    Finished,
    Idle,
    Rejected,
    Request,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    Update,
)
from twostroke.engine.constraints import Constraints
from twostroke.engine.parts import IDLE, INBOX, WAIT, PartTimes
from twostroke.errors import EngineClosed, EngineError, ExecutorLost

# A request whose rows were lost so often, with nothing of it committed in between, is taken to be
# what kills the executors, and fails.
MAX_LOSSES = 3

CANCELLED = Cancelled()

ReplaceExecutor = Callable[[ExecutorLost], Executor]


class LoopListener(Protocol):
    """Hears what happens, on the thread that pumps.

    `updated` returns the sequences whose stop string was just completed; the loop ends them
    before it plans again. `deliver` is called after the next step was started, so that what it
    does runs beside that step.
    """

    def step_started(self, plan: StepPlan, now_ns: int) -> None: ...

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None: ...

    def executor_lost(self, lost: ExecutorLost) -> None: ...

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]: ...

    def deliver(self) -> None: ...


@runtime_checkable
class LentExecutor(Protocol):
    """An Executor without a thread of its own: steps started run when one is lent to it.

    `run_pending` computes and answers what was started, on the calling thread. It returns the
    nanoseconds that went into arrays, arithmetic and results.
    """

    def run_pending(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True, slots=True)
class LoopPolicy:
    """What the loop does beyond planning and committing.

    max_in_flight: steps running at once. max_iterations: most iterations of decodes in one step;
    nobody else is heard between them. replace_executor: makes the next executor after a loss,
    over the same KV bytes; without it a loss fails every live request and closes the loop.
    step_deadline_ns: a step unanswered for so long loses its executor; None waits for ever.
    """

    max_in_flight: int = 1
    max_iterations: int = 1
    replace_executor: ReplaceExecutor | None = None
    step_deadline_ns: int | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    """One step given to one executor. due_from_ns: when it was started, or its turn came."""

    plan: StepPlan
    generation: int
    due_from_ns: int
    answer: StepAnswer | None = None


class EngineLoop:
    """Drives one scheduler over one executor at a time; not thread-safe but for its inbox.

    wake: called, from any thread, when an answer has arrived and `pump` is due.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        listener: LoopListener,
        policy: LoopPolicy = LoopPolicy(),
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._use_executor(executor)
        self._clock = clock
        self._listener = listener
        self._policy = policy
        self._wake = wake
        self._inbox: deque[tuple[_Flight, StepAnswer]] = deque()
        self._in_flight: deque[_Flight] = deque()
        self._generation = 0
        self._is_lent = False
        self._idle_until_ns: int | None = None  # when the pace lets a waiting batch begin
        self.parts = PartTimes(clock.now_ns())
        self._live: dict[str, int] = {}  # request id → continuations that have not ended
        self.constraints: Constraints | None = None  # whose masks go into plans
        self._losses: Counter[str] = Counter()  # executors lost since its last committed row
        self._closed: str | None = None
        self._last_progress_ns = clock.now_ns()
        self.refused_answers = 0

    @property
    def closed_reason(self) -> str | None:
        """Why no request is accepted any more, or None."""
        return self._closed

    @property
    def num_live(self) -> int:
        """Requests accepted and not yet ended."""
        return len(self._live)

    @property
    def has_answers(self) -> bool:
        """True when `pump` has something to take in."""
        return bool(self._inbox)

    @property
    def last_progress_ns(self) -> int:
        """When a step was last committed, or work last arrived at an empty loop."""
        return self._last_progress_ns

    @property
    def next_wake_ns(self) -> int | None:
        """When to pump although nothing arrives, or None."""
        if not self._in_flight:
            return self._idle_until_ns
        if self._policy.step_deadline_ns is None:
            return None
        return self._in_flight[0].due_from_ns + self._policy.step_deadline_ns

    def describe_executor(self) -> ExecutorInfo:
        """What the executor in use offers."""
        return self._executor.describe()

    def submit(self, request: Request) -> Accepted | Rejected:
        """Queue a request, or say why it can never run. Raises EngineClosed."""
        if self._closed is not None:
            raise EngineClosed(self._closed)
        now_ns = self._clock.now_ns()
        answer = self._scheduler.submit(request, now_ns)
        if isinstance(answer, Accepted):
            if not self._live:
                self._last_progress_ns = now_ns
            self._live[request.id] = request.num_open
        return answer

    def cancel(
        self, request_id: str, *, index: int | None = None, ending: Ending = CANCELLED
    ) -> None:
        """End a request, or one continuation of it; nothing happens when it has ended already."""
        if request_id in self._live:
            now_ns = self._clock.now_ns()
            updates = self._scheduler.cancel(request_id, now_ns, index=index, ending=ending)
            self._tell(updates)

    def pump(self) -> None:
        """Take in the answers, start what can be started, then let the listener deliver."""
        now_ns = self._clock.now_ns
        self.parts.begin_pump(now_ns())
        self._take_answers()
        if self._policy.step_deadline_ns is not None:
            self._check_deadline()
        answered_ns = now_ns()
        self._start_steps()
        planned_ns = now_ns()
        self._listener.deliver()
        until_next = INBOX if self._inbox else WAIT if self._in_flight else IDLE
        self.parts.note_pump((answered_ns, planned_ns, now_ns()), until_next)

    def lend_thread(self) -> None:
        """Let an executor without a thread run, on this one, the steps that `pump` has started.

        Nobody needs to be woken for its answers: `has_answers` tells that `pump` is due again.
        """
        if self._run_pending is not None and self._in_flight:
            self._is_lent = True
            split_ns = self._run_pending()
            self._is_lent = False
            self.parts.note_executor(split_ns, self._clock.now_ns())

    def close(self, reason: str = "the engine was closed") -> None:
        """Fail what is live with `reason`, refuse what comes later, and close the executor."""
        if self._closed is None:
            self._give_up(reason)
            self._executor.close()
            self._listener.deliver()

    def abandon(self, reason: str) -> None:
        """Refuse what comes later and close the executor, without touching the scheduler again."""
        if self._closed is None:
            self._closed = reason
            self._generation += 1
            self._live.clear()
            self._in_flight.clear()
            self._executor.close()

    # ---- answers --------------------------------------------------------------------------------

    def _receive(self, flight: _Flight, answer: StepAnswer) -> None:
        """Called by executors, from any thread."""
        self._inbox.append((flight, answer))
        if not self._is_lent:
            self._wake()

    def _take_answers(self) -> None:
        while self._inbox:
            flight, answer = self._inbox.popleft()
            if flight.generation != self._generation or flight.answer is not None:
                self.refused_answers += 1
                continue
            flight.answer = answer
            if isinstance(answer, StepOutcome):
                self._commit_answered()
            elif isinstance(answer, ExecutorLost):
                self._lose_executor(answer)
            else:
                self._lose_executor(ExecutorLost(f"answered with {type(answer).__name__}"))

    def _commit_answered(self) -> None:
        """Commit, in the order they were planned, the steps whose outcome is here."""
        while self._in_flight and isinstance(self._in_flight[0].answer, StepOutcome):
            flight = self._in_flight[0]
            outcome = self._in_flight[0].answer
            now_ns = self._clock.now_ns()
            try:
                updates = self._scheduler.commit(outcome, now_ns)
            except ExecutorLost as lost:
                self._lose_executor(lost)
                return
            self._in_flight.popleft()
            self._last_progress_ns = now_ns
            if self._in_flight:
                self._in_flight[0].due_from_ns = now_ns
            for row in flight.plan.rows if self._losses else ():
                self._losses.pop(row.sequence.request, None)
            self._listener.step_committed(flight.plan, outcome)
            self._tell(updates)

    def _tell(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        for update in updates:
            if isinstance(update, SequenceEnded):
                self._count_ended(update.sequence.request)
        if self.constraints is not None:
            self.constraints.note(updates)
        for sequence in self._listener.updated(updates, self._clock.now_ns()):
            self.cancel(sequence.request, index=sequence.index, ending=Finished("stop"))

    def _count_ended(self, request_id: str) -> None:
        if self._live[request_id] == 1:
            del self._live[request_id]
            self._losses.pop(request_id, None)
        else:
            self._live[request_id] -= 1

    # ---- steps ----------------------------------------------------------------------------------

    def _start_steps(self) -> None:
        while self._closed is None and len(self._in_flight) < self._policy.max_in_flight:
            now_ns = self._clock.now_ns()
            plan = self._scheduler.plan(now_ns, self._policy.max_iterations)
            self._idle_until_ns = None
            if isinstance(plan, Idle):
                self._idle_until_ns = plan.wake_ns or None
                if self._live and not self._in_flight and not plan.wake_ns:
                    raise EngineError(f"nothing runs although {len(self._live)} requests are live")
                return
            broken: Sequence[tuple[SequenceId, str]] = ()
            if self.constraints is not None:
                plan, broken = self.constraints.apply(plan)
            flight = _Flight(plan, self._generation, now_ns)
            self._in_flight.append(flight)
            self._listener.step_started(plan, now_ns)
            try:
                self._executor.start(plan, partial(self._receive, flight))
            except ExecutorLost as lost:
                self._receive(flight, lost)
            for sequence, reason in broken:  # their rows' answers will find them ended
                self.cancel(sequence.request, index=sequence.index, ending=Failed(reason))

    def _check_deadline(self) -> None:
        due_ns = self.next_wake_ns
        if self._in_flight and due_ns is not None and self._clock.now_ns() >= due_ns:
            step = self._in_flight[0].plan.step
            self._lose_executor(ExecutorLost(f"step {step} was not answered in time"))

    # ---- loss -----------------------------------------------------------------------------------

    def _lose_executor(self, lost: ExecutorLost) -> None:
        """Undo what is in flight and go on with the next executor, or fail what is live."""
        self._listener.executor_lost(lost)
        suspect = self._in_flight[0].plan
        self._undo_steps(str(lost))
        self._executor.close()
        replace = self._policy.replace_executor
        if replace is None:
            self._give_up(f"the executor was lost: {lost}")
            return
        for request_id in dict.fromkeys(row.sequence.request for row in suspect.rows):
            self._losses[request_id] += request_id in self._live
            if self._losses[request_id] >= MAX_LOSSES:
                reason = f"its steps lost {MAX_LOSSES} executors in a row, the last: {lost}"
                self.cancel(request_id, ending=Failed(reason))
        try:
            self._use_executor(replace(lost))
        except ExecutorLost as error:
            self._give_up(f"the executor was lost: {lost}; and not replaced: {error}")

    def _use_executor(self, executor: Executor) -> None:
        self._executor = executor
        # Looked up once: asking a protocol takes longer than planning a row.
        self._run_pending: Callable[[], tuple[int, int, int]] | None = None
        if isinstance(executor, LentExecutor):
            self._run_pending = executor.run_pending

    def _undo_steps(self, reason: str) -> None:
        # From here on every answer of these flights is of an old generation and refused.
        self._generation += 1
        if self._in_flight:
            first = self._in_flight[0].plan.step
            self._in_flight.clear()
            self._tell(self._scheduler.lose(first, reason, self._clock.now_ns()))

    def _give_up(self, reason: str) -> None:
        self._closed = reason
        self._undo_steps(reason)
        for request_id in tuple(self._live):
            self.cancel(request_id, ending=Failed(reason))
