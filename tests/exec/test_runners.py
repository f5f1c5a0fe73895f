"""The CPU runner's whole forward pass against the reference runner, and the executor's promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kernels_support import RowCase, make_step
from tiny_models import TINY_SPECS, make_tensors
from twostroke.cli.settings import KV_ELEMENTS
from twostroke.core.ports import StepAnswer
from twostroke.core.types import BlockCopy, Row, SamplingSpec, SequenceId, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost, UnsupportedModel
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import LocalExecutor, RunnerSizes
from twostroke.exec.reference import ReferenceRunner
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format
from twostroke.spec.work import RowShape, StepShape, get_step_work

SIZES = RunnerSizes(threads=2, num_blocks=64, block_tokens=16, max_step_tokens=512)


@pytest.mark.parametrize("element", KV_ELEMENTS["cpu"])
@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_float_weights_give_the_reference_logits(family: str, element: KvElement) -> None:
    spec = TINY_SPECS[family]
    sizes = replace(SIZES, kv_element=element)
    tensors = make_tensors(spec, Format.F32)
    runners = (CpuRunner(spec, tensors, sizes), ReferenceRunner(spec, tensors, sizes))
    rng = np.random.default_rng(1)
    first = make_step([RowCase(0, 130), RowCase(0, 3)], rng, 20)
    rows = np.arange(120, 133, dtype=np.int32)
    results = []
    for runner in runners:
        runner.run_layers(first)
        results.append(np.array(runner.get_logits(rows)))
    # A last bit of f32 may round a value up in one and down in the other: by a whole step.
    steps = {KvElement.F32: 1e-5, KvElement.F16: 2**-10, KvElement.INT8: 1 / 127}
    assert np.abs(results[0] - results[1]).max() <= 4 * steps[element] * np.abs(results[1]).max()


@pytest.mark.parametrize("format", list(Format))
def test_every_format_runs_near_the_reference(format: Format) -> None:
    # Superblock formats need inputs that are multiples of 256.
    spec = replace(
        TINY_SPECS["llama"], width=256, ffn_width=512, num_heads=4, num_kv_heads=2, head_dim=64
    )
    tensors = make_tensors(spec, format)
    step = make_step([RowCase(0, 20)], np.random.default_rng(2), 20)
    rows = np.arange(20, dtype=np.int32)
    logits = []
    for runner in (CpuRunner(spec, tensors, SIZES), ReferenceRunner(spec, tensors, SIZES)):
        runner.run_layers(step)
        logits.append(np.array(runner.get_logits(rows)))
    assert np.isfinite(logits[0]).all()
    error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1])
    assert error <= 0.05  # 8-bit activations over two layers


def make_executor(element: KvElement = KvElement.F16, backend: str = "cpu") -> LocalExecutor:
    spec, sizes = TINY_SPECS["llama"], replace(SIZES, kv_element=element)
    make = CpuRunner if backend == "cpu" else ReferenceRunner
    return LocalExecutor(make(spec, make_tensors(spec, Format.Q4_0), sizes), sizes)


def make_row(tokens: tuple[int, ...], start: int, blocks: tuple[int, ...]) -> Row:
    return Row(SequenceId("r", 0), tokens, start, blocks, SamplingSpec(logprobs=0))


def run_plan(executor: LocalExecutor, plan: StepPlan) -> StepAnswer:
    answers: list[StepAnswer] = []
    executor.start(plan, answers.append)
    executor.run_pending()
    assert len(answers) == 1
    return answers[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("element", KV_ELEMENTS["cpu"])
def test_the_pool_is_as_large_as_the_work_formulas_say(element: KvElement, backend: str) -> None:
    spec = TINY_SPECS["llama"]
    info = make_executor(element, backend).describe()
    pool_tokens = SIZES.num_blocks * SIZES.block_tokens
    assert info.kv_bytes == pool_tokens * spec.get_kv_bytes_per_token(element)
    step = StepShape((RowShape(pool_tokens, 0, 1),))
    assert info.kv_bytes == get_step_work(spec, step, element).kv_bytes_written


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("element", KV_ELEMENTS["cpu"])
def test_copied_and_moved_blocks_hold_the_same_keys_and_values(
    element: KvElement, backend: str
) -> None:
    executor = make_executor(element, backend)
    prompt = tuple(range(30))
    run_plan(executor, StepPlan(0, (make_row(prompt, 0, (3, 4)),)))
    expected = run_plan(executor, StepPlan(1, (make_row((7,), 30, (3, 4)),)))
    copied = run_plan(executor, StepPlan(2, (make_row((7,), 30, (3, 9)),), (BlockCopy(4, 9),)))
    handle = executor.read_kv([3, 4])
    assert len(handle) == 2 * executor.describe().kv_bytes // SIZES.num_blocks
    executor.write_kv(handle, [21, 20])
    assert executor.read_kv([21, 20]) == handle
    moved = run_plan(executor, StepPlan(3, (make_row((7,), 30, (21, 20)),)))
    executor.close()
    assert isinstance(expected, StepOutcome)
    assert isinstance(copied, StepOutcome)
    assert isinstance(moved, StepOutcome)
    assert expected.results == copied.results == moved.results


@pytest.mark.parametrize(
    "row",
    [
        make_row((500,), 0, (1,)),  # a token beyond the vocabulary
        make_row((1,), 0, (64,)),  # a block beyond the pool
        make_row((1,), 16, (1,)),  # a block table too short
        make_row((1,), 10**6, (1,)),  # a position beyond the rope tables
        make_row((1,) * 600, 0, tuple(range(40))),  # more tokens than a step may hold
    ],
)
def test_an_impossible_plan_answers_lost_and_the_executor_lives_on(row: Row) -> None:
    executor = make_executor()
    assert isinstance(run_plan(executor, StepPlan(0, (row,))), ExecutorLost)
    answer = run_plan(executor, StepPlan(1, (make_row((1, 2), 0, (5,)),)))
    assert isinstance(answer, StepOutcome)
    executor.close()


def test_a_closed_executor_answers_lost() -> None:
    executor = make_executor()
    executor.close()
    executor.close()
    answer = run_plan(executor, StepPlan(0, (make_row((1,), 0, (1,)),)))
    assert isinstance(answer, ExecutorLost)


def test_plans_queued_at_close_are_all_answered() -> None:
    executor = make_executor()
    answers: list[StepAnswer] = []
    for step in range(20):
        executor.start(StepPlan(step, (make_row((1,), 0, (1,)),)), answers.append)
    executor.close()
    assert len(answers) == 20


def test_an_odd_head_size_is_refused_with_the_way_out() -> None:
    spec = replace(TINY_SPECS["llama"], head_dim=24)
    with pytest.raises(UnsupportedModel, match="--backend reference"):
        CpuRunner(spec, make_tensors(spec, Format.F32), SIZES)
