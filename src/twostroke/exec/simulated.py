"""SimulatedExecutor: answers plans after the time they would take, on any clock; computes nothing.

Owns predicted time and made-up tokens. Step times come from a StepCost and nothing else, tokens
from a rule that is a pure function of a row, so a run repeats exactly and does not depend on how
its steps were grouped: a plan of several iterations takes the sum of the times of its steps, one by
one, and may be cut short at any step's end. It keeps no KV bytes. It can be made to die, stay
silent or become slow, as executors do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import sub

from twostroke.core.ports import Clock, ExecutorInfo, OnDone, StepAnswer
from twostroke.core.types import (
    PENDING,
    BlockId,
    Row,
    RowResult,
    SequenceId,
    StepOutcome,
    StepPlan,
    Token,
)
from twostroke.errors import ExecutorLost
from twostroke.spec.cost import StepCost
from twostroke.spec.work import StepTotals, grow_totals

# row, last token, its position → the token behind it
Draw = Callable[[Row, Token, int], Token]


def draw_zero(row: Row, last: Token, position: int) -> Token:
    """Always token 0: lengths are all that most simulations need."""
    return 0


@dataclass(frozen=True, slots=True)
class SimulatedFaults:
    """Steps of an executor's life that go wrong, counted from 1, iterations one by one; 0: none.

    lost_at_step: it dies half-way through. silent_at_step: it never answers.
    """

    lost_at_step: int = 0
    silent_at_step: int = 0

    def count_safe_steps(self, done: int) -> int:
        """How many steps go well behind the first `done`; -1 when there is no end to them."""
        ends = [step - 1 - done for step in (self.lost_at_step, self.silent_at_step) if step > done]
        return min(ends, default=-1)


@dataclass(slots=True, eq=False)
class _Run:
    """A plan that was started: when its iterations end, once it is its turn."""

    plan: StepPlan
    on_done: OnDone
    ends_ns: list[int]
    times_ns: list[int]
    ticket: int = 0


class SimulatedExecutor:
    """An Executor on `clock` whose steps take what `cost` predicts; one runs at a time, in order.

    draw: how tokens come about; a draft is accepted while it is what would be drawn.

    These may be set at any time and hold for steps that begin later. ready_ns: no step begins
    before. barrier_ns: iterations but the first of a plan end before, so that what is known to
    happen then falls into a step of its own. stride_ns: so do they before the plan has lasted so
    long. slow_percent: of the predicted time. faults: steps that go wrong.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        cost: StepCost,
        clock: Clock,
        draw: Draw = draw_zero,
    ) -> None:
        self.ready_ns = 0
        self.barrier_ns = 1 << 62
        self.stride_ns = 1 << 62
        self.slow_percent = 100
        self.steps_done = 0
        self._info = info
        self._cost = cost
        self._clock = clock
        self._draw = draw
        self.faults = SimulatedFaults()
        self._runs: deque[_Run] = deque()
        self._drawn: dict[SequenceId, Token] = {}  # by the step that ended last
        self._gone = ""  # why it answers nothing any more
        self._block_bytes = info.kv_bytes // info.num_blocks

    # ---- Executor -------------------------------------------------------------------------------

    def describe(self) -> ExecutorInfo:
        """What it was made with."""
        return self._info

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """Schedule the answer to `plan`, behind those started before it."""
        if self._gone:
            on_done(ExecutorLost(self._gone))
            return
        self._runs.append(_Run(plan, on_done, [], []))
        if len(self._runs) == 1:
            self._begin()

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """As many bytes as the blocks have; it knows none of them."""
        return bytes(self._block_bytes * len(blocks))

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Takes the bytes of `blocks` and forgets them."""
        assert len(handle) == self._block_bytes * len(blocks), "bytes of another number of blocks"

    def close(self) -> None:
        """End it: what runs answers `ExecutorLost` now."""
        self.lose("the executor was closed")

    # ---- what a simulation does to it -----------------------------------------------------------

    def interrupt(self) -> None:
        """Make the iteration that is running, or that ends just now, the last of its plan."""
        if self._runs and self._runs[0].ends_ns:
            run = self._runs[0]
            made = bisect_left(run.ends_ns, self._clock.now_ns()) + 1
            if made < len(run.ends_ns):
                del run.ends_ns[made:]
                self._schedule(run)

    def lose(self, reason: str) -> None:
        """Let it die: every plan started answers `ExecutorLost` now, and so do later ones."""
        if not self._gone:
            self._gone = reason
            while self._runs:
                run = self._runs.popleft()
                run.ticket += 1
                run.on_done(ExecutorLost(reason))

    def silence(self) -> None:
        """Never answer again, neither what runs nor what is started later, until it is closed."""
        for run in self._runs:
            run.ticket += 1
            run.ends_ns = []
        self.faults = SimulatedFaults(silent_at_step=self.steps_done + 1)

    # ---- time -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Time the first of the started plans from now on."""
        run, now_ns = self._runs[0], self._clock.now_ns()
        safe = self.faults.count_safe_steps(self.steps_done)
        if safe == 0 and self.faults.silent_at_step == self.steps_done + 1:
            return
        begin_ns = max(now_ns, self.ready_ns)
        count = run.plan.iterations if safe < 0 else min(run.plan.iterations, max(1, safe))
        times_ns = self._predict_ns(run.plan, count)
        if safe == 0:
            dies_ns = begin_ns + times_ns[0] // 2
            self._clock.call_at(dies_ns, partial(self.lose, "the executor died"))
            return
        ends_ns = list(accumulate(times_ns, initial=begin_ns))[1:]
        last_ns = min(self.barrier_ns, now_ns + self.stride_ns)
        if len(ends_ns) > 1 and ends_ns[-1] >= last_ns:
            del ends_ns[max(1, bisect_left(ends_ns, last_ns)) :]
        run.ends_ns, run.times_ns = ends_ns, times_ns
        self._schedule(run)

    def _schedule(self, run: _Run) -> None:
        run.ticket += 1
        self._clock.call_at(run.ends_ns[-1], partial(self._finish, run, run.ticket))

    def _finish(self, run: _Run, ticket: int) -> None:
        """Answer, unless it was decided otherwise in the meantime."""
        if run.ticket != ticket:
            return
        self._runs.popleft()
        made = len(run.ends_ns)
        self.steps_done += made
        times_ns = tuple(run.times_ns[:made])
        results = tuple([self._answer_row(row, made) for row in run.plan.rows])
        if self._draw is not draw_zero:
            self._drawn = {one.sequence: one.tokens[-1] for one in results if one.tokens}
        iteration_ns = times_ns if run.plan.iterations > 1 else ()
        answer: StepAnswer = StepOutcome(run.plan.step, results, sum(times_ns), iteration_ns)
        if self._runs:
            self._begin()
        run.on_done(answer)

    def _predict_ns(self, plan: StepPlan, count: int) -> list[int]:
        """Times of the first `count` iterations of `plan`, the first with what is moved before."""
        times_ns = self._predict_run_ns(plan.rows, 0, count)
        if plan.swaps_out or plan.swaps_in or plan.copies:
            for moves in (plan.swaps_out, plan.swaps_in, plan.copies):
                times_ns[0] += self._cost.predict_copy_ns(len(moves) * self._block_bytes)
        if self.slow_percent != 100:
            times_ns = [max(1, time_ns * self.slow_percent // 100) for time_ns in times_ns]
        return times_ns

    def _predict_run_ns(self, rows: Sequence[Row], skipped: int, count: int) -> list[int]:
        """Times of `count` iterations behind `skipped` others.

        Rows grow evenly but where an attention window fills up, and more slowly from there on. So
        a run is even when it has grown from begin to end as much as its first step says; one that
        has not is halved until its parts are.
        """
        first = self._sum_totals(rows, skipped)
        if count == 1:
            return [self._cost.predict_ns(first)]
        second = self._sum_totals(rows, skipped + 1)
        growth = StepTotals._make(map(sub, second, first))
        if count > 2:
            last = self._sum_totals(rows, skipped + count - 1)
            if last != grow_totals(first, growth, count - 1):
                half = count // 2
                times_ns = self._predict_run_ns(rows, skipped, half)
                return times_ns + self._predict_run_ns(rows, skipped + half, count - half)
        return self._cost.predict_run_ns(first, growth, count)

    def _sum_totals(self, rows: Sequence[Row], skipped: int) -> StepTotals:
        """Totals of a step's rows, when `skipped` iterations have gone before."""
        get_row_totals = self._cost.get_row_totals
        tokens = sampled = pairs = keys = decode_pairs = decode_keys = 0
        for row in rows:
            drawn = 0 if row.sampling is None else row.drafts + 1
            totals = get_row_totals(len(row.tokens), row.start + skipped, drawn)
            _, row_tokens, _, row_pairs, row_keys, row_decode_pairs, row_decode_keys = totals
            tokens += row_tokens
            sampled += drawn
            pairs += row_pairs
            keys += row_keys
            decode_pairs += row_decode_pairs
            decode_keys += row_decode_keys
        return StepTotals(len(rows), tokens, sampled, pairs, keys, decode_pairs, decode_keys)

    # ---- tokens ---------------------------------------------------------------------------------

    def _answer_row(self, row: Row, made: int) -> RowResult:
        if row.sampling is None:
            return RowResult(row.sequence)
        if row.drafts:
            return self._verify_drafts(row)
        if self._draw is draw_zero:
            return RowResult(row.sequence, (0,) * made)
        last = row.tokens[-1] if row.tokens[-1] != PENDING else self._drawn[row.sequence]
        tokens, position = [last], row.start + len(row.tokens) - 1
        for at in range(made):
            tokens.append(self._draw(row, tokens[-1], position + at))
        return RowResult(row.sequence, tuple(tokens[1:]))

    def _verify_drafts(self, row: Row) -> RowResult:
        """Drafts up to the first that would not be drawn, and what is drawn there."""
        tokens: list[Token] = []
        first = len(row.tokens) - row.drafts
        for at in range(first - 1, len(row.tokens)):
            tokens.append(self._draw(row, row.tokens[at], row.start + at))
            if at + 1 < len(row.tokens) and row.tokens[at + 1] != tokens[-1]:
                break
        return RowResult(row.sequence, tuple(tokens), len(tokens) - 1)
