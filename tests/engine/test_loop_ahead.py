"""Laws of the loop with two steps in flight, the later planned ahead of the earlier's tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import FakeExecutor
from loop_bench import Bench, replace_with
from twostroke.core.types import PENDING, Finished, SequenceId
from twostroke.engine.loop import LoopPolicy
from twostroke.errors import ExecutorLost

TWO = LoopPolicy(max_in_flight=2)
A = SequenceId("a", 0)


def build_ahead(
    executor: FakeExecutor | None = None, policy: LoopPolicy = TWO, stop_at: int = -1
) -> Bench:
    """A bench whose scheduler plans ahead and whose executor answers when it is told to."""
    bench = Bench(executor, policy, stop_at, plans_ahead=True)
    bench.executor.behave = bench.executor.answer_held
    return bench


def run(bench: Bench) -> None:
    """Answer step after step until nothing is left to do."""
    bench.run()
    while bench.loop.num_live:
        bench.executor.release()
        bench.run()


def run_alone(*submitted: tuple[str, int, int], stop_at: int = -1) -> Bench:
    """The same requests with one step in flight."""
    bench = Bench(stop_at=stop_at)
    for id, tokens, n in submitted:
        bench.submit(id, tokens, n)
    bench.run()
    return bench


def test_the_next_step_runs_while_the_last_ones_output_is_delivered() -> None:
    bench = build_ahead()
    bench.submit("a", tokens=9)
    bench.loop.pump()
    assert bench.recorder.log == ["started", "started", "delivered"]
    assert [plan.rows[0].tokens for plan in bench.executor.plans] == [(1, 2, 3), (PENDING,)]
    for _ in range(5):
        bench.recorder.log.clear()
        bench.executor.release()
        bench.loop.pump()
        assert bench.recorder.log == ["committed", "started", "delivered"]
        assert len(bench.executor.held) == 2


def test_one_step_is_in_flight_when_the_last_token_is_being_drawn() -> None:
    bench = build_ahead()
    bench.submit("a", tokens=5)
    run(bench)
    assert bench.recorder.endings == {A: Finished("length")}
    assert len(bench.executor.plans) == 5
    assert not bench.executor.held


def test_requests_that_come_and_go_get_the_tokens_they_would_have_alone() -> None:
    submitted = [("a", 30, 1), ("b", 3, 2), ("c", 17, 3), ("d", 1, 1)]
    alone, ahead = run_alone(*submitted), build_ahead()
    for one in submitted:
        ahead.submit(*one)
        if ahead.executor.held:
            ahead.executor.release()
        ahead.run()
    run(ahead)
    assert ahead.recorder.tokens == alone.recorder.tokens
    assert ahead.recorder.endings == alone.recorder.endings
    assert ahead.scheduler.num_free_blocks == ahead.scheduler.config.num_blocks


def test_a_stop_string_ends_its_sequence_with_a_row_ahead_in_flight() -> None:
    executor = FakeExecutor(next_token=lambda tokens, sampling, index: len(tokens))
    bench = build_ahead(executor, stop_at=5)
    bench.submit("a", tokens=50)
    run(bench)
    assert bench.recorder.tokens == {A: [3, 4, 5]}
    assert bench.recorder.endings == {A: Finished("stop")}
    assert len(executor.plans) == 4
    assert bench.scheduler.num_free_blocks < bench.scheduler.config.num_blocks
    executor.release()
    bench.run()
    assert bench.recorder.tokens == {A: [3, 4, 5]}
    assert bench.scheduler.num_ignored_results == 1
    assert bench.scheduler.num_free_blocks == bench.scheduler.config.num_blocks


def test_two_answers_in_the_inbox_are_committed_in_order() -> None:
    executor = FakeExecutor(next_token=lambda tokens, sampling, index: len(tokens))
    bench = build_ahead(executor, stop_at=5)
    bench.submit("a", tokens=50)
    bench.loop.pump()
    while bench.loop.num_live:
        executor.compute_held()
        while executor.held:
            last = executor.held.pop()
            assert last.outcome is not None
            last.on_done(last.outcome)
        bench.run()
    assert bench.recorder.tokens == {A: [3, 4, 5]}
    assert bench.recorder.committed == [0, 1, 2, 3]


def test_a_step_that_waits_for_its_turn_is_not_late_yet() -> None:
    bench = build_ahead(policy=LoopPolicy(max_in_flight=2, step_deadline_ns=1_000))
    bench.submit("a", tokens=9)
    bench.loop.pump()
    bench.clock.advance(999)
    bench.executor.release()
    bench.loop.pump()
    bench.clock.advance(999)
    bench.loop.pump()
    assert bench.recorder.losses == []
    bench.clock.advance(1)
    bench.loop.pump()
    assert bench.recorder.losses == ["step 1 was not answered in time"]


@pytest.mark.parametrize("answered", range(9))
@pytest.mark.parametrize("fault", ["dies", "lies", "late"])
def test_a_loss_with_two_steps_in_flight_costs_no_token(answered: int, fault: str) -> None:
    submitted = [("a", 9, 1), ("b", 6, 2)]
    alone = run_alone(*submitted)
    first = FakeExecutor()
    second = FakeExecutor(pool=first.pool)
    second.behave = second.answer_held
    policy = replace(replace_with([second]), max_in_flight=2, step_deadline_ns=1_000)
    bench = build_ahead(first, policy)
    for one in submitted:
        bench.submit(*one)
    bench.run()
    for _ in range(answered):
        first.release()
        bench.run()
    late = list(first.held)
    if fault == "dies":
        first.release_with(ExecutorLost("it died"))
    elif fault == "lies":
        first.compute_held()
        outcome = late[0].outcome
        assert outcome is not None
        first.release_with(replace(outcome, results=outcome.results[1:]))
    else:
        bench.clock.advance(1_000)
    bench.run()
    assert len(bench.recorder.losses) == 1
    assert PENDING not in second.plans[0].rows[0].tokens
    bench.executor = second
    for step in late:
        step.on_done(ExecutorLost("long gone"))
    run(bench)
    assert bench.recorder.tokens == alone.recorder.tokens
    assert bench.recorder.endings == alone.recorder.endings
