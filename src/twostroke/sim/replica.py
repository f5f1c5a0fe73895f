"""Replica: one engine of a simulated cluster, and what is recorded of it.

Owns a scheduler, the engine's loop and a simulated executor, the same loop that serves, and listens
to it. It decides nothing: requests, cancels and faults come from the cluster, steps from the
scheduler. It keeps what is known to happen to it as barriers, so that no stride of steps runs past
one, and counts by iterations, so that strides leave the same records as single steps.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from twostroke.core.policy import Policies
from twostroke.core.ports import ExecutorInfo
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Cancelled,
    Failed,
    Finished,
    Rejected,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.errors import ExecutorLost
from twostroke.exec.simulated import Draw, SimulatedExecutor, SimulatedFaults, draw_zero
from twostroke.sim.arrivals import Arrival, build_request
from twostroke.sim.clock import NEVER_NS, VirtualClock
from twostroke.sim.records import FATES, Life, Records, Sample
from twostroke.spec.cost import StepCost

_FATE_CODES = {
    Finished: FATES.index("finished"),
    Rejected: FATES.index("rejected"),
    Cancelled: FATES.index("cancelled"),
    Failed: FATES.index("failed"),
}


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What every replica of a cluster is made of.

    make_policies: called once for each, because policies remember. max_iterations: the longest
    stride; 1 steps one by one. restart_ns: how long it takes to replace a lost executor; None lets
    the replica end with it. step_deadline_ns, max_in_flight: as in LoopPolicy. is_computed: all of
    a prompt but its last token arrives with its keys and values, which are attached.
    """

    scheduler: SchedulerConfig
    info: ExecutorInfo
    cost: StepCost
    make_policies: Callable[[], Policies] = Policies
    draw: Draw = draw_zero
    max_iterations: int = 1
    max_in_flight: int = 1
    restart_ns: int | None = 0
    step_deadline_ns: int | None = None
    is_computed: bool = False


@dataclass(slots=True, eq=False)
class _Begun:
    """What was true when a step began, iterations or not."""

    time_ns: int
    waiting: int
    held_blocks: int


class Replica:
    """One replica on a virtual clock; also the LoopListener of its loop.

    dies_at: steps of its life, ascending, that its executor does not survive. on_end: called with
    each request that has ended. on_due: called when `pump` is due.
    """

    def __init__(
        self,
        index: int,
        spec: ReplicaSpec,
        clock: VirtualClock,
        records: Records,
        on_end: Callable[[int, Arrival], None],
        on_due: Callable[[Replica], None],
    ) -> None:
        self.index = index
        self._spec = spec
        self._clock = clock
        self._records = records
        self._totals = records.totals[index]
        self._on_end = on_end
        self._on_due = partial(on_due, self)
        self._lives: dict[str, Life] = {}
        self._unplanned: dict[str, Life] = {}
        self._parked: deque[Life] = deque()  # whose KV is here and has no room in the pool
        self._begun: list[_Begun] = []
        self._iteration_ns: tuple[int, ...] = ()
        self._next_sample_ns = 0
        self._dies_at: list[int] = []
        self._steps_before = 0  # done by executors that are gone
        self._barriers: list[int] = []
        self._armed_ns = NEVER_NS
        self._scheduler = Scheduler(spec.scheduler, spec.make_policies())
        self.executor = self._make_executor()
        policy = LoopPolicy(
            max_in_flight=spec.max_in_flight,
            replace_executor=None if spec.restart_ns is None else self._replace_executor,
            step_deadline_ns=spec.step_deadline_ns,
            max_iterations=spec.max_iterations,
        )
        self._loop = EngineLoop(
            self._scheduler, self.executor, clock, self, policy, wake=self._on_due
        )

    @property
    def is_closed(self) -> bool:
        """True once its executor is lost for good."""
        return self._loop.closed_reason is not None

    @property
    def scheduler(self) -> Scheduler:
        """Its scheduler, to be looked at."""
        return self._scheduler

    # ---- what the cluster does to it ------------------------------------------------------------

    def submit(self, arrival: Arrival, index: int) -> None:
        """Take arrival number `index`; the step that is running, if any, is the last planned."""
        request = build_request(arrival, index, self._spec.scheduler.vocab_size)
        life = Life(index, arrival, self.index)
        if self._spec.is_computed:
            self._parked.append(life)
            self._on_due()
            return
        answer = self._loop.submit(request)
        if isinstance(answer, Rejected):
            self._end(life, _FATE_CODES[Rejected])
            return
        self._lives[request.id] = self._unplanned[request.id] = life
        self.executor.interrupt()
        self._on_due()

    def cancel(self, index: int) -> None:
        """The caller of request number `index` gives up; nothing happens when it has ended."""
        self._loop.cancel(str(index))
        self._on_due()

    def add_barrier(self, time_ns: int) -> None:
        """Something will happen to it then: let no stride run into it."""
        heapq.heappush(self._barriers, time_ns)
        self.executor.barrier_ns = self._barriers[0]

    def pass_barriers(self, time_ns: int) -> None:
        """What was to happen up to then has; what a jump made late is still to come."""
        while self._barriers and self._barriers[0] <= time_ns:
            heapq.heappop(self._barriers)
        self.executor.barrier_ns = self._barriers[0] if self._barriers else NEVER_NS

    def die_at(self, steps: Sequence[int]) -> None:
        """Let its executors die in these steps of its life, from 1; before anything has begun."""
        self._dies_at = sorted(steps)
        self.executor.faults = self._get_next_faults()

    def pump(self) -> None:
        """Let the loop take in what has arrived and start what can be started."""
        while self._parked and self._attach(self._parked[0]):
            self._parked.popleft()
        self._loop.pump()
        wake_ns = self._loop.next_wake_ns
        if wake_ns is not None and wake_ns < self._armed_ns:
            self._arm(wake_ns)

    # ---- LoopListener ---------------------------------------------------------------------------

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """Note what is true at its begin, and who was never planned before."""
        held_blocks = self._spec.info.num_blocks - self._scheduler.num_free_blocks
        self._begun.append(_Begun(now_ns, self._scheduler.num_waiting, held_blocks))
        if self._unplanned:
            for row in plan.rows:
                life = self._unplanned.pop(row.sequence.request, None)
                if life is not None:
                    life.planned_ns = now_ns
                    life.cached_tokens = row.start

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Count a step, or each of its iterations; their times are kept for `updated`."""
        begun, now_ns, totals = self._begun.pop(0), self._clock.now_ns(), self._totals
        made = len(outcome.iteration_ns) or 1
        tokens = prefill_tokens = len(plan.rows)
        if made == 1:
            tokens = plan.num_tokens
            prefill_tokens = sum(len(row.tokens) for row in plan.rows if len(row.tokens) > 1)
        else:
            prefill_tokens = 0
        totals.busy_ns += outcome.duration_ns
        totals.steps += made
        totals.step_rows += made * len(plan.rows)
        totals.step_tokens += made * tokens
        totals.prefill_tokens += prefill_tokens
        if plan.swaps_out or plan.swaps_in:
            totals.swapped_blocks += len(plan.swaps_out) + len(plan.swaps_in)
        self._iteration_ns = outcome.iteration_ns
        if now_ns > self._next_sample_ns:
            self._sample(plan, outcome, begun, (tokens, prefill_tokens))

    def executor_lost(self, lost: ExecutorLost) -> None:
        """Steps in flight are undone."""
        self._begun.clear()
        self._totals.lost_executors += 1

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        """Note tokens and endings; nobody is stopped early."""
        lives, later_ns, first_gaps = self._lives, self._iteration_ns[1:], dict[int, int]()
        first_ns, worst_ns = now_ns, 0
        if later_ns:
            first_ns, worst_ns = now_ns - sum(later_ns), max(later_ns)
        drawing = extra = 0
        for update in updates:
            if type(update) is TokensEmitted:
                life, count = lives[update.sequence.request], len(update.tokens)
                drawing += 1
                extra += count - 1
                life.new_tokens += count
                if life.first_token_ns == 0:
                    life.first_token_ns = first_ns
                else:
                    gap_ns = first_ns - life.last_token_ns
                    first_gaps[gap_ns] = first_gaps.get(gap_ns, 0) + 1
                    if gap_ns > life.worst_gap_ns:
                        life.worst_gap_ns = gap_ns
                if worst_ns > life.worst_gap_ns:
                    life.worst_gap_ns = worst_ns
                life.last_token_ns = now_ns
            elif type(update) is SequenceEnded:
                life = lives.pop(update.sequence.request)
                self._unplanned.pop(update.sequence.request, None)
                self._end(life, _FATE_CODES[type(update.ending)])
            else:
                lives[update.sequence.request].preemptions += 1
        gaps = self._records.gaps
        for gap_ns, weight in first_gaps.items():
            gaps.add(gap_ns, weight)
        if later_ns:
            gaps.add_many(later_ns, drawing)
        elif extra:
            gaps.add(0, extra)
        return ()

    def deliver(self) -> None:
        """Nothing to do: everything is noted as it comes."""

    def _attach(self, life: Life) -> bool:
        """Give the loop a request with its computed KV; False while the pool has no room for it.

        What is running is left two blocks each to grow into, and the pool a fiftieth, so that the
        scheduler has room where this says so; where it has not, the prompt is computed here.
        """
        spec, arrival = self._spec, life.arrival
        computed, id = arrival.prompt_tokens - 1, str(life.index)
        kept = 2 * self._scheduler.num_running + spec.scheduler.num_blocks // 50
        room = (self._scheduler.num_free_blocks - kept) * spec.scheduler.block_tokens
        if self._loop.num_live and computed > room:
            return False
        answer = self._loop.submit(build_request(arrival, life.index, spec.scheduler.vocab_size))
        if isinstance(answer, Rejected):
            self._end(life, _FATE_CODES[Rejected])
            return True
        self._lives[id] = self._unplanned[id] = life
        blocks = self._scheduler.attach(id, (), computed)
        if blocks:
            self._scheduler.attach(id, blocks, computed)
        self.executor.interrupt()
        return True

    # ---- records --------------------------------------------------------------------------------

    def _end(self, life: Life, fate: int) -> None:
        self._records.end(life, self._clock.now_ns(), fate)
        self._on_end(self.index, life.arrival)

    def _sample(
        self, plan: StepPlan, outcome: StepOutcome, begun: _Begun, tokens: tuple[int, int]
    ) -> None:
        """Keep the state at every instant of the grid within a step that was just committed.

        Blocks that a stride took for its later iterations count from those on.
        """
        samples, now_ns, held = self._records.samples, self._clock.now_ns(), begun.held_blocks
        begins_ns, starts, early = [begun.time_ns], list[int](), 0
        if plan.iterations > 1:
            # A step that was run in parts made one iteration, whatever was planned.
            times_ns = outcome.iteration_ns or (outcome.duration_ns,)
            begins_ns = [*accumulate(times_ns, initial=now_ns - outcome.duration_ns)][:-1]
            begins_ns[0] = begun.time_ns
            starts = [row.start for row in plan.rows]
            held -= sum([len(row.blocks) for row in plan.rows])
        at_ns = -(-begun.time_ns // samples.period_ns) * samples.period_ns
        while at_ns < now_ns:
            if starts:
                early = self._count_blocks(starts, bisect_right(begins_ns, at_ns))
            state = (len(plan.rows), begun.waiting, held + early)
            samples.add(Sample(at_ns, self.index, *state, *tokens))
            at_ns = (at_ns // samples.period_ns + 1) * samples.period_ns
        self._next_sample_ns = at_ns

    def _count_blocks(self, starts: list[int], tokens: int) -> int:
        """Blocks of sequences that have computed so many tokens each, counted from `starts`."""
        size, reserved = self._spec.info.block_tokens, self._spec.scheduler.reserve_tokens
        if reserved:
            return sum([-(-max(start + tokens, reserved) // size) for start in starts])
        return sum([-(-(start + tokens) // size) for start in starts])

    # ---- executors ------------------------------------------------------------------------------

    def _make_executor(self) -> SimulatedExecutor:
        spec = self._spec
        executor = SimulatedExecutor(spec.info, spec.cost, self._clock, spec.draw)
        executor.faults = self._get_next_faults()
        executor.barrier_ns = self._barriers[0] if self._barriers else NEVER_NS
        if spec.step_deadline_ns is not None:
            executor.stride_ns = spec.step_deadline_ns
        return executor

    def _replace_executor(self, lost: ExecutorLost) -> SimulatedExecutor:
        """A new executor that begins its first step when it has been started."""
        assert self._spec.restart_ns is not None
        self._steps_before += self.executor.steps_done
        while self._dies_at and self._dies_at[0] <= self._steps_before + 1:
            del self._dies_at[0]
        self.executor = self._make_executor()
        self.executor.ready_ns = self._clock.now_ns() + self._spec.restart_ns
        return self.executor

    def _get_next_faults(self) -> SimulatedFaults:
        if not self._dies_at:
            return SimulatedFaults()
        return SimulatedFaults(lost_at_step=self._dies_at[0] - self._steps_before)

    def _arm(self, wake_ns: int) -> None:
        """See to it that the loop is pumped at `wake_ns`."""
        self._armed_ns = wake_ns
        self._clock.call_at(wake_ns, partial(self._wake, wake_ns))

    def _wake(self, wake_ns: int) -> None:
        """The time that was armed has come; what the loop waits for may be later by now."""
        if self._armed_ns != wake_ns:
            return
        self._armed_ns, next_ns = NEVER_NS, self._loop.next_wake_ns
        if next_ns is None:
            return
        if next_ns > self._clock.now_ns():
            self._arm(next_ns)
        else:
            # Behind every answer that is due: one that comes in time must count, also after a jump.
            self._clock.call_at(self._clock.now_ns(), self._wake_now)

    def _wake_now(self) -> None:
        next_ns = self._loop.next_wake_ns
        if next_ns is not None and next_ns <= self._clock.now_ns():
            self._on_due()
        elif next_ns is not None and self._armed_ns == NEVER_NS:
            self._arm(next_ns)
