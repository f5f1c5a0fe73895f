"""Laws of the engine thread's time: the parts follow one another and sum to what passed."""

from __future__ import annotations

import random
import time

from fakes import FakeExecutor, make_parts
from twostroke.core.ports import OnDone
from twostroke.core.types import StepPlan
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.params import SamplingParams
from twostroke.engine.parts import IDLE, INBOX, OVERHEAD, PARTS, WAIT, PartTimes


class LentFake(FakeExecutor):
    """A FakeExecutor that computes only on a thread that is lent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.behave = self.answer_held
        self.lent = 0

    def run_pending(self) -> tuple[int, int, int]:
        while self.held:
            self.lent += 1
            self.release()
        return 1, 2, 3

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        super().start(plan, on_done)
        assert self.is_closed or len(self.held) == 1


def test_the_parts_sum_to_the_time_that_passed() -> None:
    chooser, now = random.Random(1), 1000
    parts = PartTimes(now)
    for _ in range(300):
        marks = [now := now + chooser.randrange(50) for _ in range(4)]
        parts.begin_pump(marks[0])
        assert sum(parts.get_values()) == marks[0] - 1000
        parts.note_pump((marks[1], marks[2], marks[3]), chooser.choice((INBOX, WAIT, IDLE)))
        if chooser.random() < 0.7:
            split = (chooser.randrange(20), chooser.randrange(20), chooser.randrange(20))
            now += sum(split) + chooser.randrange(30)
            parts.note_executor(split, now)
        assert sum(parts.get_totals().values()) == now - 1000
        assert min(parts.get_totals().values()) >= 0


def test_every_part_is_overhead_or_arithmetic_or_waiting() -> None:
    assert set(PARTS) == {*OVERHEAD, "compute", "wait", "idle"}


def test_an_executor_without_a_thread_runs_on_the_engines() -> None:
    executor = LentFake()
    with OfflineLLM(make_parts(executor)) as llm:
        (output,) = llm.generate("abc", SamplingParams(max_tokens=5, temperature=0.0))
        stats = llm.stats()
    assert len(output.completions[0].tokens) == 5
    assert executor.lent == stats.steps > 0
    nanoseconds = {name: round(seconds * 1e9) for name, seconds in stats.part_seconds.items()}
    assert nanoseconds["arrays"] == stats.steps
    assert nanoseconds["compute"] == 2 * stats.steps
    assert nanoseconds["results"] == 3 * stats.steps
    assert nanoseconds["wait"] == 0


def test_the_parts_of_an_engine_are_no_longer_than_its_life() -> None:
    begin_ns = time.monotonic_ns()
    executor = FakeExecutor()
    executor.behave = executor.answer_threaded
    with OfflineLLM(make_parts(executor)) as llm:
        llm.generate("abc", SamplingParams(max_tokens=5))
        parts = llm.stats().part_seconds
    assert 0 < sum(parts.values()) * 1e9 <= time.monotonic_ns() - begin_ns
