"""Laws of accounts: parts sum to the wall time, requests' accounts to their lives, on any run."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from fakes import FakeExecutor, make_parts
from tiny_models import TINY_SPECS
from twostroke.core.types import Row, RowResult, SamplingSpec, SequenceId, StepOutcome, StepPlan
from twostroke.engine.account_report import build_report
from twostroke.engine.accounts import (
    CAUSES,
    FLOOR_PARTS,
    WALL_PARTS,
    CauseSums,
    StepAccount,
    StepCounter,
    StepFloor,
    divide_wall,
    get_causes,
)
from twostroke.engine.attribution import Attribution, count_prompt
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.outputs import RequestTimings
from twostroke.engine.params import SamplingParams
from twostroke.engine.parts import INBOX, PARTS, PartTimes
from twostroke.spec.device import DeviceSpec
from twostroke.spec.step import STEP_PARTS
from twostroke.spec.work import (
    PARTS as WORK_PARTS,
)
from twostroke.spec.work import (
    RowShape,
    StepShape,
    StepTotals,
    get_floor_seconds,
    get_model_work,
)

SPEC = TINY_SPECS["gemma3"]
WORK = get_model_work(SPEC)
DEVICE = DeviceSpec("cpu", 1e10, (("int8", 1e12), ("fp32", 1e11)), 2, 2**33)


def draw_engine(chooser: random.Random) -> list[int]:
    return [chooser.choice((0, chooser.randrange(1000))) for _ in PARTS]


def draw_executor(chooser: random.Random) -> tuple[int, tuple[int, ...]]:
    parts = tuple(chooser.randrange(200) for _ in STEP_PARTS)
    return sum(parts), parts if chooser.random() < 0.7 else ()


def test_a_walls_parts_sum_to_it_whatever_the_executor_says() -> None:
    chooser = random.Random(3)
    for _ in range(2000):
        engine = draw_engine(chooser)
        executor_ns, part_ns = draw_executor(chooser)
        parts = divide_wall(engine, executor_ns, part_ns)
        assert len(parts) == len(WALL_PARTS)
        assert sum(parts) == sum(engine)
        assert min(parts) >= 0


def test_idle_time_is_nobodys_work() -> None:
    engine = [0] * len(PARTS)
    engine[PARTS.index("idle")] = 500
    parts = dict(zip(WALL_PARTS, divide_wall(engine, 300, ()), strict=True))
    assert parts["idle"] == 500
    assert sum(parts.values()) == 500


def test_an_executor_in_this_process_keeps_its_parts_exactly() -> None:
    engine = dict.fromkeys(PARTS, 10) | {"arrays": 5, "compute": 80, "results": 15}
    own = tuple(range(2, 2 + len(STEP_PARTS)))
    scale = 100 - sum(own)
    own = (*own[:-1], own[-1] + scale)
    parts = divide_wall(list(engine.values()), 100, own)
    assert parts[: len(STEP_PARTS)] == own


def test_the_causes_sum_to_the_wall_time() -> None:
    chooser = random.Random(4)
    for _ in range(500):
        parts = [chooser.randrange(1000) for _ in WALL_PARTS]
        floor = StepFloor(
            1,
            1,
            tuple(chooser.random() for _ in FLOOR_PARTS),
            tuple(chooser.random() < 0.5 for _ in FLOOR_PARTS),
        )
        for each in (floor, StepFloor(1, 1)):
            causes = get_causes(parts, each)
            assert tuple(causes) == CAUSES
            assert sum(causes.values()) == pytest.approx(sum(parts))


def test_the_causes_of_many_steps_are_those_of_each_together() -> None:
    chooser = random.Random(8)
    sums, wanted = CauseSums(), dict.fromkeys(CAUSES, 0.0)
    patterns = [tuple(chooser.random() < 0.5 for _ in FLOOR_PARTS) for _ in range(3)]
    for step in range(300):
        says_parts = chooser.random() < 0.7
        floor = StepFloor(
            1, 1, tuple(chooser.random() for _ in FLOOR_PARTS), chooser.choice(patterns)
        )
        parts = tuple(
            0 if says_parts == (name == "executor") else chooser.randrange(1000)
            for name in WALL_PARTS
        )
        account = StepAccount(step, 0, 0, sum(parts), 0, (), StepTotals(), floor, 0.0, parts)
        sums.add(account)
        for name, ns in account.causes.items():
            wanted[name] += ns
    assert sums.get_ns() == pytest.approx(wanted)


def test_every_part_that_is_counted_has_a_floor() -> None:
    assert ("embed", *FLOOR_PARTS) == WORK_PARTS


@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_a_steps_count_is_that_of_the_formulas(family: str) -> None:
    work = get_model_work(TINY_SPECS[family])
    counter = StepCounter(work, DEVICE)
    chooser = random.Random(5)
    for _ in range(100):
        rows = tuple(
            RowShape(
                new := chooser.randrange(1, 60), chooser.randrange(200), chooser.choice((0, new))
            )
            for _ in range(chooser.randrange(1, 5))
        )
        totals = [
            work.get_row_totals(row.new_tokens, row.context_before, row.sampled) for row in rows
        ]
        found = counter.count(type(totals[0])(*map(sum, zip(*totals, strict=True))))
        expected = work.get_step_work(StepShape(rows))
        floor = get_floor_seconds(expected, DEVICE)
        assert (found.flops, found.bytes) == (expected.flops, expected.bytes)
        assert found.ns == pytest.approx(floor.seconds * 1e9)


class Bench:
    """An Attribution driven by hand, on a clock that a test moves."""

    def __init__(self, device: DeviceSpec | None = DEVICE) -> None:
        self.now = 1000
        self.parts = PartTimes(self.now)
        self.attribution = Attribution(WORK, device)
        self.attribution.follow(self.parts)
        self.step = 0
        self.begun: set[str] = set()

    def run(self, *rows: Row, compute: int = 900, python: int = 30) -> None:
        """A round of the loop: the plan is made, then computed on the thread, then committed."""
        plan = StepPlan(self.step, rows)
        for row in rows:
            if row.sequence.request not in self.begun:
                self.begun.add(row.sequence.request)
                self.attribution.begin_request(row.sequence.request)
        self.step += 1
        self.parts.begin_pump(self.now)
        self.attribution.note_started(plan.step, self.now + python)
        self.now += python
        self.parts.note_pump((self.now - python, self.now, self.now), INBOX)
        self.now += compute
        self.parts.note_executor((0, compute, 0), self.now)
        own = (0, 0, compute // 2, 0, compute - compute // 2, 0, 0, 0, 0)
        results = tuple(RowResult(row.sequence, (1,) if row.sampling else ()) for row in rows)
        self.parts.begin_pump(self.now)
        self.attribution.note_committed(plan, StepOutcome(plan.step, results, compute, part_ns=own))

    def end(self, request: str, submitted: int, planned: int) -> RequestTimings:
        timings = RequestTimings(submitted, planned, 0, self.now, 0, 0, 0, 0)
        account = self.attribution.end_request(request, timings)
        assert account is not None
        return RequestTimings(submitted, planned, 0, self.now, 0, 0, 0, 0, account)


def make_row(request: str, tokens: int, start: int, *, drawn: bool = True) -> Row:
    sampling = SamplingSpec() if drawn else None
    return Row(SequenceId(request, 0), (1,) * tokens, start, (), sampling)


def sum_account(timings: RequestTimings) -> int:
    account = timings.account
    assert account is not None
    return (
        account.queued_ns
        + account.prefill_ns
        + account.decode_ns
        + account.others_ns
        + account.python_ns
        + account.waited_ns
    )


def test_steps_follow_one_another_without_a_gap() -> None:
    bench = Bench()
    for start in range(300):
        bench.run(make_row("a", 1, start), python=start)
    steps = bench.attribution.get_steps()
    assert steps[0].begin_ns == 1000
    assert steps[-1].ended_ns == bench.now
    assert all(a.ended_ns == b.begin_ns for a, b in pairwise(steps))
    assert all(sum(step.part_ns) == step.wall_ns for step in steps)
    assert bench.attribution.get_totals().steps == 300


def test_a_request_alone_spends_its_life_on_its_own_strokes() -> None:
    bench = Bench()
    bench.run(make_row("a", 50, 0))
    for start in range(50, 60):
        bench.run(make_row("a", 1, start))
    done = bench.end("a", 1000, 1030)
    account = done.account
    assert account is not None
    assert account.prefill_ns == 900
    assert account.decode_ns == 10 * 900
    assert account.others_ns == account.waited_ns == 0
    assert account.queued_ns == 30
    assert account.python_ns == 10 * 30
    assert sum_account(done) == bench.now - 1000
    assert account.limit_share is not None


def test_anothers_prompt_in_a_decodes_step_is_told_apart() -> None:
    bench = Bench()
    bench.run(make_row("a", 1, 5), make_row("b", 400, 0))
    account = bench.end("a", 1000, 1000).account
    assert account is not None
    assert account.others_ns > 0
    assert account.decode_ns > 0
    assert account.others_ns + account.decode_ns == pytest.approx(900, abs=1)
    own = bench.end("b", 1000, 1000).account
    assert own is not None
    assert own.prefill_ns == pytest.approx(900 * 400 / 401, abs=1)


def test_a_request_without_a_row_waits() -> None:
    bench = Bench()
    bench.run(make_row("a", 3, 0))
    bench.run(make_row("b", 3, 0))
    bench.run(make_row("a", 1, 3))
    account = bench.end("a", 1000, 1030).account
    assert account is not None
    assert account.waited_ns == 930


@pytest.mark.parametrize("seed", range(20))
def test_a_requests_account_sums_to_its_life(seed: int) -> None:
    chooser = random.Random(seed)
    bench = Bench(chooser.choice((None, DEVICE)))
    live = dict.fromkeys("abc", bench.now)
    for _ in range(60):
        rows = [
            make_row(name, chooser.choice((1, 1, 7)), chooser.randrange(100))
            for name in live
            if chooser.random() < 0.7
        ]
        if rows:
            bench.run(*rows, compute=chooser.randrange(2, 2000), python=chooser.randrange(60))
    for name, begin in live.items():
        done = bench.end(name, begin, begin + chooser.randrange(30))
        assert sum_account(done) == bench.now - begin, seed


def test_without_limits_work_is_counted_and_no_floor() -> None:
    bench = Bench(None)
    bench.run(make_row("a", 5, 0))
    (step,) = bench.attribution.get_steps()
    totals = bench.attribution.get_totals()
    assert totals.flops == step.floor.flops > 0
    assert totals.floor_seconds == 0
    assert totals.cause_seconds == {}
    assert bench.end("a", 1000, 1000).account is not None
    assert build_report(bench.attribution)["steps"][0]["floor_ns"] is None


def test_a_step_that_ends_behind_its_request_leaves_nothing_of_it() -> None:
    bench = Bench()
    bench.run(make_row("a", 3, 0))
    bench.end("a", 1000, 1000)
    bench.run(make_row("a", 1, 3))
    account = bench.end("a", 1000, 1000).account
    assert account is not None
    assert account.prefill_ns == account.decode_ns == 0


def test_only_the_last_steps_are_kept_and_all_are_counted() -> None:
    bench = Bench()
    bench.attribution = Attribution(WORK, DEVICE, steps_kept=10)
    bench.attribution.follow(bench.parts)
    for start in range(100):
        bench.run(make_row("a", 1, start))
    assert [step.step for step in bench.attribution.get_steps()] == list(range(90, 100))
    assert bench.attribution.get_totals().steps == 100


def test_a_report_of_one_request_holds_its_steps_alone() -> None:
    bench = Bench()
    for start in range(6):
        bench.run(make_row("ab-0" if start % 2 else "abc", 1, start))
    bench.end("ab-0", 1000, 1000)
    report = build_report(bench.attribution, "ab")
    assert [step["step"] for step in report["steps"]] == [1, 3, 5]
    assert [one["request"] for one in report["requests"]] == ["ab-0"]
    assert [step["step"] for step in build_report(bench.attribution, last=2)["steps"]] == [4, 5]


def test_a_chunk_that_draws_nothing_is_prompt_and_a_draft_is_not() -> None:
    assert count_prompt(make_row("a", 1, 0, drawn=False)) == 1
    assert count_prompt(make_row("a", 1, 5)) == 0
    assert count_prompt(make_row("a", 9, 0)) == 9
    drafted = Row(SequenceId("a", 0), (1, 2, 3), 5, (), SamplingSpec(), drafts=2)
    assert count_prompt(drafted) == 0


@pytest.mark.parametrize("behaviour", ["answer_now", "answer_threaded"])
def test_an_engines_steps_fill_the_time_of_its_thread(behaviour: str) -> None:
    begin_ns = time.monotonic_ns()
    executor = FakeExecutor(step_ns=1)
    executor.behave = getattr(executor, behaviour)
    with OfflineLLM(make_parts(executor)) as llm:
        outputs = llm.generate(["abc", "defg"], SamplingParams(max_tokens=6, temperature=0.0))
        steps = llm.attribution.get_steps()
        ended = llm.attribution.get_ended()
    assert sum(step.wall_ns for step in steps) <= time.monotonic_ns() - begin_ns
    assert all(sum(step.part_ns) == step.wall_ns for step in steps)
    assert len(ended) == 2
    for output in outputs:
        account = output.timings.account
        assert account is not None
        assert sum_account(output.timings) == output.timings.ended_ns - output.timings.submitted_ns
