"""Laws of the executor's own time: its parts are named, none is lost, and they sum to the step."""

from __future__ import annotations

import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.core.ports import StepAnswer
from twostroke.core.types import Row, SamplingSpec, SequenceId, StepOutcome, StepPlan
from twostroke.exec.cpu import CpuRunner, number_parts
from twostroke.exec.local import RUNNER_PARTS, LocalExecutor, RunnerSizes
from twostroke.exec.reference import ReferenceRunner
from twostroke.spec.quant import Format
from twostroke.spec.step import STEP_PARTS

SIZES = RunnerSizes(threads=2, num_blocks=64, block_tokens=16, max_step_tokens=512)
SPEC = TINY_SPECS["llama"]


def run(executor: LocalExecutor, *rows: Row) -> StepOutcome:
    answers: list[StepAnswer] = []
    executor.start(StepPlan(0, rows), answers.append)
    executor.run_pending()
    (answer,) = answers
    assert isinstance(answer, StepOutcome), answer
    return answer


def make_row(tokens: int, sampling: SamplingSpec | None = None) -> Row:
    return Row(SequenceId("a", 0), tuple(range(tokens)), 0, tuple(range(8)), sampling)


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor(CpuRunner(SPEC, make_tensors(SPEC, Format.Q4_1), SIZES), SIZES)


def test_the_parts_of_a_step_sum_to_its_time(executor: LocalExecutor) -> None:
    for tokens in (1, 17, 100):
        outcome = run(executor, make_row(tokens, SamplingSpec()))
        assert len(outcome.part_ns) == len(STEP_PARTS)
        assert sum(outcome.part_ns) == outcome.duration_ns
        assert min(outcome.part_ns) >= 0


def test_a_step_that_draws_nothing_has_no_head(executor: LocalExecutor) -> None:
    parts = dict(zip(STEP_PARTS, run(executor, make_row(20)).part_ns, strict=True))
    assert parts["head"] == parts["sampling"] == 0
    assert min(parts["projections"], parts["attention"], parts["ffn"], parts["elementwise"]) > 0


def test_what_a_failed_step_took_is_no_part_of_the_next(executor: LocalExecutor) -> None:
    bad = Row(SequenceId("a", 0), (0,), 0, (SIZES.num_blocks + 5,), SamplingSpec())
    answers: list[StepAnswer] = []
    executor.start(StepPlan(0, (bad,)), answers.append)
    executor.run_pending()
    assert not isinstance(answers[0], StepOutcome)
    outcome = run(executor, make_row(1, SamplingSpec()))
    assert sum(outcome.part_ns) == outcome.duration_ns
    assert min(outcome.part_ns) >= 0


def test_a_runner_that_cannot_tell_says_nothing() -> None:
    executor = LocalExecutor(ReferenceRunner(SPEC, make_tensors(SPEC, Format.F32), SIZES), SIZES)
    assert run(executor, make_row(3, SamplingSpec())).part_ns == ()


def test_all_ops_of_the_head_belong_to_it_but_the_draws() -> None:
    ops = ["embed", "rms_norm", "q", "attention", "gate+up", "take_rows", "rms_norm", "head"]
    names = [RUNNER_PARTS[number] for number in number_parts([*ops, "draw"])]
    assert names == [
        *("elementwise", "elementwise", "projections", "attention", "ffn", "head", "head", "head"),
        "sampling",
    ]
