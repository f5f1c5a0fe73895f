"""Laws of the loop: every accepted request gets its endings, whatever the executor does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import FakeExecutor
from loop_bench import Bench, replace_with
from twostroke.core.ports import OnDone
from twostroke.core.types import Cancelled, Failed, Finished, SequenceId, StepPlan
from twostroke.engine.loop import MAX_LOSSES, LoopPolicy
from twostroke.errors import BlamelessLoss, EngineClosed, ExecutorLost


def test_a_request_runs_to_its_length() -> None:
    bench = Bench()
    bench.submit("a", tokens=5)
    bench.run()
    sequence = SequenceId("a", 0)
    assert len(bench.recorder.tokens[sequence]) == 5
    assert bench.recorder.endings == {sequence: Finished("length")}
    assert bench.loop.num_live == 0


def test_a_step_is_started_before_the_last_ones_output_is_delivered() -> None:
    bench = Bench()
    bench.submit("a", tokens=2)
    bench.loop.pump()
    bench.loop.pump()
    assert bench.recorder.log == ["started", "delivered", "committed", "started", "delivered"]


def test_no_more_steps_are_in_flight_than_the_policy_allows() -> None:
    bench = Bench()
    bench.executor.behave = bench.executor.answer_held
    for id in "abc":
        bench.submit(id)
        bench.loop.pump()
    assert len(bench.executor.held) == 1


def test_two_steps_in_flight_give_the_tokens_of_one() -> None:
    alone, paired = Bench(), Bench(policy=LoopPolicy(max_in_flight=2))
    for bench in (alone, paired):
        bench.executor.behave = bench.executor.answer_held
        for id in "abc":
            bench.submit(id)
            bench.loop.pump()
        while bench.executor.held:
            bench.executor.release()
            bench.run()
    assert alone.recorder.tokens == paired.recorder.tokens
    assert alone.recorder.endings == paired.recorder.endings


def test_a_stop_string_ends_its_sequence_before_the_next_step_is_planned() -> None:
    bench = Bench(FakeExecutor(next_token=lambda tokens, sampling, index: len(tokens)), stop_at=5)
    bench.submit("a", tokens=50)
    bench.run()
    assert bench.recorder.tokens[SequenceId("a", 0)] == [3, 4, 5]
    assert bench.recorder.endings[SequenceId("a", 0)] == Finished("stop")
    assert len(bench.executor.plans) == 3


def test_a_cancelled_request_ends_at_once_and_its_blocks_return_with_the_step() -> None:
    bench = Bench()
    bench.executor.behave = bench.executor.answer_held
    free = bench.scheduler.num_free_blocks
    bench.submit("a")
    bench.loop.pump()
    bench.loop.cancel("a")
    assert bench.recorder.endings == {SequenceId("a", 0): Cancelled()}
    bench.executor.release()
    bench.run()
    assert bench.scheduler.num_free_blocks == free
    assert bench.loop.num_live == 0


def test_cancelling_what_has_ended_does_nothing() -> None:
    bench = Bench()
    bench.submit("a")
    bench.run()
    endings = dict(bench.recorder.endings)
    bench.loop.cancel("a")
    bench.loop.cancel("never heard of")
    assert bench.recorder.endings == endings


@pytest.mark.parametrize(
    "behaviour", ["answer_lost", "answer_malformed", "answer_wrong_step", "answer_bad_token"]
)
def test_without_a_replacement_a_lost_executor_fails_every_live_request(behaviour: str) -> None:
    bench = Bench()
    bench.executor.behave = getattr(bench.executor, behaviour)
    bench.submit("a", n=2)
    bench.submit("b")
    bench.run()
    assert len(bench.recorder.endings) == 3
    assert all(isinstance(ending, Failed) for ending in bench.recorder.endings.values())
    assert "the executor was lost" in bench.recorder.endings[SequenceId("b", 0)].reason
    assert bench.executor.is_closed
    with pytest.raises(EngineClosed, match="the executor was lost"):
        bench.submit("c")


@pytest.mark.parametrize(
    "behaviour", ["answer_lost", "answer_malformed", "answer_wrong_step", "answer_bad_token"]
)
def test_a_replaced_executor_goes_on_without_losing_a_token(behaviour: str) -> None:
    undisturbed = Bench()
    undisturbed.submit("a", tokens=9)
    undisturbed.run()

    first = FakeExecutor()
    second = FakeExecutor(pool=first.pool)
    bench = Bench(first, replace_with([second]))
    bench.submit("a", tokens=9)
    for _ in range(4):
        bench.loop.pump()
    first.behave = getattr(first, behaviour)
    bench.run()
    assert bench.recorder.tokens == undisturbed.recorder.tokens
    assert bench.recorder.endings == undisturbed.recorder.endings
    assert len(bench.recorder.losses) == 1
    assert first.is_closed
    assert second.plans


def test_late_answers_of_a_lost_executor_are_refused() -> None:
    first = FakeExecutor()
    second = FakeExecutor(pool=first.pool)
    deadline = LoopPolicy(
        replace_executor=replace_with([second]).replace_executor, step_deadline_ns=1_000
    )
    bench = Bench(first, deadline)
    first.behave = first.answer_held
    bench.submit("a")
    bench.loop.pump()
    late = first.held[0]
    bench.clock.advance(1_000)
    bench.run()  # the deadline loses `first`; `second` runs the request to its end
    committed = list(bench.recorder.committed)
    late.on_done(first.compute(late.plan))
    bench.run()
    assert bench.recorder.committed == committed
    assert bench.loop.refused_answers == 2  # `close` answered the held step, and then `late` did
    assert bench.recorder.endings == {SequenceId("a", 0): Finished("length")}


def test_a_second_answer_to_a_step_is_refused() -> None:
    bench = Bench()
    bench.executor.behave = bench.executor.answer_twice
    bench.submit("a")
    bench.run()
    assert bench.recorder.endings == {SequenceId("a", 0): Finished("length")}
    assert bench.recorder.committed == list(range(5))
    assert bench.loop.refused_answers == 5


def test_an_executor_that_never_answers_is_lost_at_the_deadline() -> None:
    bench = Bench(policy=LoopPolicy(step_deadline_ns=1_000))
    bench.executor.behave = bench.executor.answer_held
    bench.submit("a")
    bench.loop.pump()
    due_ns = bench.loop.next_wake_ns
    assert due_ns is not None
    bench.clock.advance(due_ns - bench.clock.now_ns() - 1)
    bench.run()
    assert bench.recorder.endings == {}
    bench.clock.advance(1)
    bench.run()
    assert isinstance(bench.recorder.endings[SequenceId("a", 0)], Failed)


def test_a_request_that_kills_every_executor_fails_and_no_other() -> None:
    executors = [FakeExecutor()]
    executors += [FakeExecutor(pool=executors[0].pool) for _ in range(MAX_LOSSES)]
    bench = Bench(executors[0], replace_with(executors[1:]))
    for executor in executors[:MAX_LOSSES]:
        executor.behave = executor.answer_lost
    bench.submit("poison")
    bench.run()
    assert isinstance(bench.recorder.endings[SequenceId("poison", 0)], Failed)
    bench.submit("b")
    bench.run()
    assert bench.recorder.endings[SequenceId("b", 0)] == Finished("length")


def test_among_others_the_request_that_kills_executors_fails_alone() -> None:
    undisturbed = Bench()
    for id in "abcd":
        undisturbed.submit(id, tokens=9)
    undisturbed.run()

    executors = [FakeExecutor()]
    executors += [FakeExecutor(pool=executors[0].pool) for _ in range(MAX_LOSSES + 1)]
    for executor in executors:

        def behave(plan: StepPlan, on_done: OnDone, executor: FakeExecutor = executor) -> None:
            poisoned = any(row.sequence.request == "c" and row.start > 4 for row in plan.rows)
            (executor.answer_lost if poisoned else executor.answer_now)(plan, on_done)

        executor.behave = behave
    bench = Bench(executors[0], replace_with(executors[1:]))
    for id in "abcd":
        bench.submit(id, tokens=9)
    bench.run()
    poison = SequenceId("c", 0)
    ending = bench.recorder.endings.pop(poison)
    assert isinstance(ending, Failed)
    assert len(bench.recorder.losses) == MAX_LOSSES + 1  # the last alone
    told, expected = bench.recorder.tokens.pop(poison), undisturbed.recorder.tokens.pop(poison)
    assert told == expected[: len(told)]
    assert bench.recorder.tokens == undisturbed.recorder.tokens
    assert set(bench.recorder.endings.values()) == {Finished("length")}


def test_who_was_to_run_a_step_that_was_not_begun_is_not_blamed() -> None:
    executors = [FakeExecutor()]
    executors += [FakeExecutor(pool=executors[0].pool) for _ in range(3 * MAX_LOSSES)]
    for executor in executors[:-1]:
        executor.behave = lambda plan, on_done: on_done(BlamelessLoss("it died before"))
    bench = Bench(executors[0], replace_with(executors[1:]))
    bench.submit("a")
    bench.run()
    assert bench.recorder.endings == {SequenceId("a", 0): Finished("length")}


def test_losses_are_counted_until_a_row_is_committed() -> None:
    executors = [FakeExecutor()]
    executors += [FakeExecutor(pool=executors[0].pool) for _ in range(2 * MAX_LOSSES)]
    for place, executor in enumerate(executors):
        # Each but the first commits a row before it dies; only the last lives on.
        behaviours = [executor.answer_lost] * (place < 2 * MAX_LOSSES)
        behaviours += [executor.answer_now] * (99 if place == 2 * MAX_LOSSES else 0)
        if place:
            behaviours.insert(0, executor.answer_now)
        executor.behave = lambda plan, on_done, left=behaviours: left.pop(0)(plan, on_done)
    bench = Bench(executors[0], replace_with(executors[1:]))
    bench.submit("a", tokens=30)
    bench.run()
    assert len(bench.recorder.losses) == 2 * MAX_LOSSES
    assert bench.recorder.endings[SequenceId("a", 0)] == Finished("length")


def test_rows_lost_with_an_earlier_step_are_not_blamed() -> None:
    executors = [FakeExecutor()]
    executors += [FakeExecutor(pool=executors[0].pool) for _ in range(MAX_LOSSES)]
    for executor in executors:
        executor.behave = executor.answer_held
    bench = Bench(executors[0], replace(replace_with(executors[1:]), max_in_flight=2), max_rows=1)
    bench.submit("poison")
    bench.submit("b")
    for executor in executors[:MAX_LOSSES]:
        bench.run()
        assert [plan.rows[0].sequence.request for plan in executor.plans] == ["poison", "b"]
        executor.release_with(ExecutorLost("it died"))
    bench.run()
    assert [one.request for one in bench.recorder.endings] == ["poison"]
    assert isinstance(bench.recorder.endings[SequenceId("poison", 0)], Failed)


def test_a_failed_replacement_fails_every_live_request() -> None:
    bench = Bench(policy=replace_with([]))
    bench.executor.behave = bench.executor.answer_lost
    bench.submit("a")
    bench.run()
    ending = bench.recorder.endings[SequenceId("a", 0)]
    assert isinstance(ending, Failed)
    assert "none left" in ending.reason


def test_closing_fails_what_is_live_and_closes_the_executor() -> None:
    bench = Bench()
    bench.executor.behave = bench.executor.answer_held
    bench.submit("running")
    bench.loop.pump()
    bench.submit("waiting")
    bench.loop.close()
    assert {one.request for one in bench.recorder.endings} == {"running", "waiting"}
    assert bench.executor.is_closed
    with pytest.raises(EngineClosed):
        bench.submit("late")
    bench.loop.pump()  # the answer that closing the executor brought is refused
    assert bench.recorder.committed == []


def test_progress_stands_still_while_an_executor_does() -> None:
    bench = Bench()
    bench.executor.behave = bench.executor.answer_held
    bench.clock.advance(500)
    bench.submit("a")
    bench.loop.pump()
    submitted_ns = bench.clock.now_ns()
    bench.clock.advance(700)
    assert bench.loop.last_progress_ns == submitted_ns
    bench.executor.release()
    bench.run()
    assert bench.loop.last_progress_ns == submitted_ns + 700
