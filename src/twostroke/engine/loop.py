"""EngineLoop: plans steps, hands them to an executor, and commits what comes back.

It is a synchronous machine: time comes from the clock it is given, answers arrive in an inbox
that any thread may fill, and nothing happens but inside a call. A thread drives it in production
and a virtual clock in simulation. `pump` must never block, and must never ask the scheduler twice
about one answer: each belongs to one flight of one executor generation, and late, repeated or stray
answers are refused. It keeps true that every accepted request gets its endings, whatever the
executor does.
"""

from __future__ import annotations

import logging
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
from twostroke.engine.split import SplitStep, try_split
from twostroke.errors import BlamelessLoss, EngineClosed, EngineError, ExecutorLost

_log = logging.getLogger(__name__)

# A request whose rows were lost so often, with nothing of it committed in between, gets parts of
# steps for itself; lost alone then, it is taken to be what kills the executors, and fails.
MAX_LOSSES = 2

# A step is called stalled when it takes so much longer than twice the longest so far.
STALL_NS = 2 * 10**9

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


@runtime_checkable
class SupervisedExecutor(Protocol):
    """An Executor in another process, heard by whoever asks: `run_pending` takes in what has come.

    It never waits. poll_for: the descriptor and poll events that tell when it is due, or None;
    due_ns: when it is due although nothing came, or None. lost: why it answers no more plans, or
    None. is_ready: whether it could begin a plan.
    """

    @property
    def poll_for(self) -> tuple[int, int] | None: ...

    @property
    def due_ns(self) -> int | None: ...

    @property
    def lost(self) -> ExecutorLost | None: ...

    @property
    def is_ready(self) -> bool: ...

    def run_pending(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True, slots=True)
class LoopPolicy:
    """What the loop does beyond planning and committing.

    max_in_flight: steps running at once. max_iterations: most iterations of decodes in one step;
    nobody else is heard between them. replace_executor: makes the next executor after a loss,
    over the same KV bytes; without it a loss fails every live request and closes the loop.
    step_deadline_ns: a step unanswered for so long loses its executor; None waits for ever.
    on_closed: called when no executor will be asked for any more.
    """

    max_in_flight: int = 1
    max_iterations: int = 1
    replace_executor: ReplaceExecutor | None = None
    step_deadline_ns: int | None = None
    on_closed: Callable[[], None] = lambda: None


@dataclass(slots=True, eq=False)
class _Flight:
    """One step given to one executor. due_from_ns: when it was started, or its turn came.

    split: runs it in parts, to find out whose rows lose executors; None runs it in one.
    """

    plan: StepPlan
    generation: int
    due_from_ns: int
    split: SplitStep | None = None
    answer: StepAnswer | None = None

    @property
    def running(self) -> StepPlan:
        """What the executor was given of it."""
        return self.plan if self.split is None else self.split.part


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
        self._longest_ns = 0  # that a committed step took
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
        due = [None if self._supervised is None else self._supervised.due_ns]
        if not self._in_flight:
            due.append(self._idle_until_ns)
        elif self._policy.step_deadline_ns is not None:
            due.append(self._in_flight[0].due_from_ns + self._policy.step_deadline_ns)
        return min((each for each in due if each is not None), default=None)

    @property
    def poll_for(self) -> tuple[int, int] | None:
        """A descriptor and poll events to pump at, beside being woken; None when there are none."""
        return None if self._supervised is None else self._supervised.poll_for

    def describe_stall(self, now_ns: int) -> str | None:
        """What holds up the steps, or None; reads only, so any thread may ask."""
        supervised = self._supervised
        if supervised is not None and not supervised.is_ready:
            return "the executor is being replaced"
        flights = tuple(self._in_flight)
        waited_ns = now_ns - flights[0].due_from_ns if flights else 0
        if waited_ns > STALL_NS + 2 * self._longest_ns:
            return f"step {flights[0].plan.step} has been running for {waited_ns / 1e9:.1f} s"
        return None

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
        if self._supervised is not None:
            self._hear_supervised(self._supervised)
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
            self._policy.on_closed()

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
            if flight.split is not None and isinstance(answer, StepOutcome):
                whole = flight.split.take(answer)
                if whole is None:
                    self._start_flight(flight)
                    continue
                answer = whole
            flight.answer = answer
            if isinstance(answer, StepOutcome):
                self._commit_answered()
            elif isinstance(answer, ExecutorLost):
                self._lose_executor(answer)
            else:
                self._lose_executor(ExecutorLost(f"answered with {type(answer).__name__}"))

    def _commit_answered(self) -> None:
        """Commit, in the order they were planned, the steps whose outcome is here."""
        while self._in_flight:
            flight = self._in_flight[0]
            outcome = flight.answer
            if not isinstance(outcome, StepOutcome):
                return
            now_ns = self._clock.now_ns()
            try:
                updates = self._scheduler.commit(outcome, now_ns)
            except ExecutorLost as lost:
                self._lose_executor(lost)
                return
            self._in_flight.popleft()
            self._last_progress_ns = now_ns
            self._longest_ns = max(self._longest_ns, outcome.duration_ns)
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
            # Parts of a step planned ahead could not find what the step before drew: while somebody
            # is suspected, and steps may be cut into parts, none is planned ahead.
            is_cut = self._losses and self._scheduler.config.plans_ahead
            if self._in_flight and (is_cut or self._in_flight[0].split is not None):
                return
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
            split = None
            if self._losses:
                often = [one for one, lost in self._losses.items() if lost >= MAX_LOSSES]
                split = try_split(plan, often)
            flight = _Flight(plan, self._generation, now_ns, split)
            self._in_flight.append(flight)
            self._listener.step_started(plan, now_ns)
            self._start_flight(flight)
            for sequence, reason in broken:  # their rows' answers will find them ended
                self.cancel(sequence.request, index=sequence.index, ending=Failed(reason))

    def _start_flight(self, flight: _Flight) -> None:
        """Give the executor a step, or its next part."""
        try:
            self._executor.start(flight.running, partial(self._receive, flight))
        except ExecutorLost as lost:
            self._receive(flight, lost)

    def _check_deadline(self) -> None:
        deadline_ns = self._policy.step_deadline_ns
        if not self._in_flight or deadline_ns is None:
            return
        if self._clock.now_ns() >= self._in_flight[0].due_from_ns + deadline_ns:
            step = self._in_flight[0].plan.step
            self._lose_executor(ExecutorLost(f"step {step} was not answered in time"))

    # ---- loss -----------------------------------------------------------------------------------

    def _lose_executor(self, lost: ExecutorLost) -> None:
        """Undo what is in flight and go on with the next executor, or fail what is live."""
        self._listener.executor_lost(lost)
        is_blamed = self._in_flight and not isinstance(lost, BlamelessLoss)
        suspects = self._in_flight[0].running.rows if is_blamed else ()
        self._undo_steps(str(lost))
        self._executor.close()
        replace = self._policy.replace_executor
        if replace is None:
            self._give_up(f"the executor was lost: {lost}")
            return
        self._blame(tuple(dict.fromkeys(row.sequence.request for row in suspects)), lost)
        try:
            self._use_executor(replace(lost))
        except ExecutorLost as error:
            self._give_up(f"the executor was lost: {lost}; and not replaced: {error}")

    def _blame(self, request_ids: Sequence[str], lost: ExecutorLost) -> None:
        """Note a loss of these requests; one that was alone and has had too many fails."""
        for request_id in request_ids:
            if request_id not in self._live:
                continue
            self._losses[request_id] += 1
            if self._losses[request_id] >= MAX_LOSSES and len(request_ids) == 1:
                reason = f"its steps lost {self._losses[request_id]} executors in a row: {lost}"
                _log.error("request %r failed: %s", request_id, reason)
                self.cancel(request_id, ending=Failed(reason))

    def _hear_supervised(self, executor: SupervisedExecutor) -> None:
        """Take in what it says; one that is lost with nothing to do is replaced at once."""
        self._is_lent = True  # this thread need not be woken for what it hears itself
        executor.run_pending()
        self._is_lent = False
        if executor.lost is not None and not self._in_flight and self._closed is None:
            self._lose_executor(executor.lost)

    def _use_executor(self, executor: Executor) -> None:
        self._executor = executor
        self._supervised = executor if isinstance(executor, SupervisedExecutor) else None
        # Looked up once: asking a protocol takes longer than planning a row.
        self._run_pending: Callable[[], tuple[int, int, int]] | None = None
        if self._supervised is None and isinstance(executor, LentExecutor):
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
        self._idle_until_ns = None  # nobody will plan then, so nobody need be woken
        self._policy.on_closed()
        self._undo_steps(reason)
        for request_id in tuple(self._live):
            self.cancel(request_id, ending=Failed(reason))
