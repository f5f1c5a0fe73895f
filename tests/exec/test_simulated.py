"""The simulated executor: it answers when the cost says, and dies on cue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fakes import ManualClock
from step_costs import LinearStepCost
from twostroke.core.ports import ExecutorInfo, StepAnswer
from twostroke.core.types import (
    PENDING,
    BlockCopy,
    BlockSwap,
    Row,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
    Token,
)
from twostroke.errors import ExecutorLost
from twostroke.exec.simulated import Draw, SimulatedExecutor, SimulatedFaults, draw_zero
from twostroke.spec.work import StepTotals

START_NS = 1_000_000_000
INFO = ExecutorInfo(
    device="simulated",
    backend="simulated",
    threads=1,
    num_blocks=8,
    block_tokens=4,
    kv_bytes=8 * 100,
    weight_bytes=0,
    max_step_tokens=64,
)


class WindowCost(LinearStepCost):
    """A cost whose rows see at most ten tokens, as a sliding window has it."""

    def get_row_totals(self, new_tokens: int, context_before: int, sampled: int) -> StepTotals:
        pairs = sum(min(10, context_before + at + 1) for at in range(new_tokens))
        return StepTotals(1, new_tokens, sampled, pairs, min(10, context_before))


def decode(request: str, start: int, token: Token = 5) -> Row:
    """A row of one token that draws the next."""
    return Row(SequenceId(request, 0), (token,), start, (0, 1, 2, 3), SamplingSpec())


class Bench:
    """An executor on a clock that is moved by hand, and its answers with their times."""

    def __init__(self, cost: LinearStepCost | None = None, draw: Draw = draw_zero) -> None:
        self.clock = ManualClock(START_NS)
        self.executor = SimulatedExecutor(INFO, cost or LinearStepCost(), self.clock, draw)
        self.answers: list[tuple[int, StepAnswer]] = []

    def start(self, *rows: Row, iterations: int = 1, step: int = 0) -> None:
        """Start a plan of these rows."""
        self.start_plan(StepPlan(step, rows, iterations=iterations))

    def start_plan(self, plan: StepPlan) -> None:
        """Start a plan."""
        self.executor.start(plan, self.note)

    def note(self, answer: StepAnswer) -> None:
        """Take an answer down."""
        self.answers.append((self.clock.now_ns() - START_NS, answer))

    def take_outcome(self) -> tuple[int, StepOutcome]:
        """The first answer, which must be an outcome, and its time."""
        at_ns, answer = self.answers.pop(0)
        assert isinstance(answer, StepOutcome)
        return at_ns, answer


def step_ns(*contexts: int) -> int:
    """Time of a step of decodes by the linear cost."""
    return 1_000 + sum(100 + context + 1 for context in contexts)


def test_a_step_answers_after_its_predicted_time_and_not_before() -> None:
    bench = Bench()
    bench.start(decode("a", 4), decode("b", 9))
    bench.clock.advance(step_ns(4, 9) - 1)
    assert bench.answers == []
    bench.clock.advance(1)
    at_ns, outcome = bench.take_outcome()
    assert at_ns == outcome.duration_ns == step_ns(4, 9)
    assert [result.tokens for result in outcome.results] == [(0,), (0,)]
    assert outcome.iteration_ns == ()


def test_an_unfinished_prompt_draws_nothing() -> None:
    bench = Bench()
    bench.start(replace(decode("a", 0), tokens=(1, 2, 3), sampling=None))
    bench.clock.advance(10_000)
    _, outcome = bench.take_outcome()
    assert outcome.results[0].tokens == ()
    assert outcome.duration_ns == 1_000 + 300 + 1 + 2 + 3


def draw_by_place(row: Row, last: Token, position: int) -> Token:
    """A token that depends on the one before and its position."""
    return (3 * last + position) % 50


@pytest.mark.parametrize("cost", [LinearStepCost(), WindowCost()])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_iterations_are_the_steps_one_by_one(cost: LinearStepCost, count: int) -> None:
    once = Bench(cost, draw_by_place)
    once.start(decode("a", 2), decode("b", 7), iterations=count)
    once.clock.advance(10**6)
    at_ns, outcome = once.take_outcome()

    single, last, times_ns = Bench(cost, draw_by_place), [5, 5], list[int]()
    drawn: list[list[Token]] = [[], []]
    for step in range(count):
        rows = [decode("a", 2 + step, last[0]), decode("b", 7 + step, last[1])]
        single.start(*rows)
        single.clock.advance(10**5)
        _, one = single.take_outcome()
        times_ns.append(one.duration_ns)
        last = [result.tokens[0] for result in one.results]
        for tokens, token in zip(drawn, last, strict=True):
            tokens.append(token)
    assert outcome.iteration_ns == (tuple(times_ns) if count > 1 else ())
    assert at_ns == outcome.duration_ns == sum(times_ns)
    assert [list(result.tokens) for result in outcome.results] == drawn


def test_an_interrupt_ends_with_the_iteration_it_falls_into() -> None:
    ends = [step_ns(4), step_ns(4) + step_ns(5), step_ns(4) + step_ns(5) + step_ns(6)]
    for at_ns, made in [(0, 1), (1, 1), (ends[0], 1), (ends[0] + 1, 2), (ends[1], 2), (ends[2], 3)]:
        bench = Bench()
        bench.start(decode("a", 4), iterations=9)
        bench.clock.call_at(START_NS + at_ns, bench.executor.interrupt)
        bench.clock.advance(10**6)
        # What comes at the very end of an iteration comes before its answer.
        answered_ns, outcome = bench.take_outcome()
        assert (answered_ns, len(outcome.iteration_ns)) == (ends[made - 1], made)
        assert outcome.results[0].tokens == (0,) * made
        assert bench.answers == []
        assert bench.executor.steps_done == made


def test_iterations_end_before_a_barrier_but_for_the_first() -> None:
    ends = [step_ns(4), step_ns(4) + step_ns(5)]
    for barrier_ns, made in [(0, 1), (ends[0], 1), (ends[1], 1), (ends[1] + 1, 2)]:
        bench = Bench()
        bench.executor.barrier_ns = START_NS + barrier_ns
        bench.start(decode("a", 4), iterations=9)
        bench.clock.advance(10**6)
        assert len(bench.take_outcome()[1].iteration_ns) == made


def test_a_second_plan_waits_for_the_first() -> None:
    bench = Bench()
    bench.start(decode("a", 4), step=1)
    bench.start(decode("b", 4), step=2)
    bench.clock.advance(10**6)
    assert [
        (at_ns, answer.step) for at_ns, answer in bench.answers if isinstance(answer, StepOutcome)
    ] == [(step_ns(4), 1), (2 * step_ns(4), 2)]


def test_a_pending_token_is_the_one_the_step_before_drew() -> None:
    bench = Bench(draw=draw_by_place)
    rows = [decode("a", 4), decode("b", 4, 7)]
    bench.start(*rows, step=1)
    bench.start(*(replace(row, tokens=(PENDING,), start=5) for row in rows[::-1]), step=2)
    bench.clock.advance(10**6)
    outcomes = [bench.take_outcome()[1] for _ in range(2)]
    drawn = [(3 * 5 + 4) % 50, (3 * 7 + 4) % 50]
    assert [one.tokens[0] for one in outcomes[0].results] == drawn
    assert [one.tokens[0] for one in outcomes[1].results[::-1]] == [
        (3 * one + 5) % 50 for one in drawn
    ]


def test_moves_take_their_time_before_the_first_iteration() -> None:
    moved = StepPlan(
        0,
        (decode("a", 4),),
        copies=(BlockCopy(0, 1),),
        swaps_out=(BlockSwap(2, 0), BlockSwap(3, 1)),
        swaps_in=(BlockSwap(4, 2),),
        iterations=2,
    )
    bench = Bench()
    bench.start_plan(moved)
    bench.clock.advance(10**6)
    assert bench.take_outcome()[1].iteration_ns == (step_ns(4) + 4 * 100, step_ns(5))


def test_drafts_are_accepted_while_they_are_what_would_be_drawn() -> None:
    first = draw_by_place(decode("a", 4), 5, 4)
    second = draw_by_place(decode("a", 4), first, 5)
    for drafts, accepted in [((first, second), 2), ((first, 49), 1), ((48, second), 0)]:
        bench = Bench(draw=draw_by_place)
        bench.start(replace(decode("a", 4), tokens=(5, *drafts), drafts=2))
        bench.clock.advance(10**6)
        result = bench.take_outcome()[1].results[0]
        assert result.accepted_drafts == accepted
        assert result.tokens[:accepted] == drafts[:accepted]
        assert len(result.tokens) == accepted + 1


def test_a_slow_executor_takes_the_share_longer_of_steps_that_begin_then() -> None:
    bench = Bench()
    bench.start(decode("a", 4), step=1)
    bench.executor.slow_percent = 250
    bench.start(decode("a", 4), step=2)
    bench.clock.advance(10**6)
    times = [bench.take_outcome()[1].duration_ns for _ in range(2)]
    assert times == [step_ns(4), step_ns(4) * 250 // 100]


def test_nothing_begins_before_it_is_ready() -> None:
    bench = Bench()
    bench.executor.ready_ns = START_NS + 500
    bench.start(decode("a", 4))
    bench.clock.advance(10**6)
    assert bench.take_outcome()[0] == 500 + step_ns(4)


def get_lost(answers: Sequence[tuple[int, StepAnswer]]) -> list[int]:
    """Times of answers that say that the executor is lost."""
    return [at_ns for at_ns, answer in answers if isinstance(answer, ExecutorLost)]


def test_a_lost_executor_answers_everything_with_its_loss_once() -> None:
    bench = Bench()
    bench.start(decode("a", 4), step=1)
    bench.start(decode("b", 4), step=2)
    bench.clock.advance(100)
    bench.executor.lose("it died")
    bench.start(decode("c", 4), step=3)
    bench.executor.close()
    bench.clock.advance(10**6)
    assert get_lost(bench.answers) == [100, 100, 100]
    assert len(bench.answers) == 3


def test_it_dies_half_way_through_the_step_that_it_was_told() -> None:
    bench = Bench()
    bench.executor.faults = SimulatedFaults(lost_at_step=3)
    bench.start(decode("a", 4), iterations=9)
    bench.clock.advance(10**5)
    assert len(bench.take_outcome()[1].iteration_ns) == 2
    bench.start(decode("a", 6))
    bench.clock.advance(10**5)
    assert get_lost(bench.answers) == [10**5 + step_ns(6) // 2]


def test_a_silent_executor_answers_when_it_is_closed() -> None:
    for told in (True, False):
        bench = Bench()
        if told:
            bench.executor.faults = SimulatedFaults(silent_at_step=1)
            bench.start(decode("a", 4), iterations=3)
        else:
            bench.start(decode("a", 4), iterations=3)
            bench.executor.silence()
        bench.start(decode("b", 4), step=1)
        bench.executor.interrupt()
        bench.clock.advance(10**6)
        assert bench.answers == []
        bench.executor.close()
        assert get_lost(bench.answers) == [10**6, 10**6]


def test_it_keeps_no_bytes_and_says_how_many_there_would_be() -> None:
    bench = Bench()
    assert bench.executor.describe() is INFO
    assert bench.executor.read_kv([1, 2]) == bytes(200)
    bench.executor.write_kv(bytes(200), [1, 2])
