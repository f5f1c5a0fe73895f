"""Promise 1 with a real model: 32 mixed requests give, to the last bit, what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from places import SHARED, get_model_path
from tiny_models import Answer, make_config, run_requests
from twostroke.core.types import Request, SamplingSpec, SequenceId
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import Draws, RunnerInfo, RunnerSizes
from twostroke.kernels.ops import F32, I32, Drawn, SamplingArrays, StepArrays
from twostroke.text.tokenizer import build_tokenizer
from twostroke.weights.load import OpenModel, open_model

pytestmark = pytest.mark.real_model

NUM_REQUESTS = 32
UNBOUNDED = 4096  # tokens: more than all prompts together
SIZES = RunnerSizes(threads=2, num_blocks=400, block_tokens=16, max_step_tokens=UNBOUNDED)


class ShuffledRunner:
    """A runner whose physical blocks are permuted behind the scheduler's back."""

    def __init__(self, runner: CpuRunner, order: I32) -> None:
        self._runner = runner
        self._order = order

    def describe(self) -> RunnerInfo:
        return self._runner.describe()

    def run_step(self, step: StepArrays, arrays: SamplingArrays) -> Drawn:
        tables = np.where(step.block_tables < 0, -1, self._order[step.block_tables])
        return self._runner.run_step(replace(step, block_tables=tables.astype(np.int32)), arrays)

    def get_logits(self, rows: I32) -> F32:
        return self._runner.get_logits(rows)

    def get_draws(self) -> Draws:
        return self._runner.get_draws()

    def view_kv(self) -> NDArray[np.uint8]:
        return self._runner.view_kv()


def make_requests(opened: OpenModel) -> list[Request]:
    """Real text cut to mixed lengths, greedy and sampled, log-probabilities on."""
    text = (SHARED / "DESIGN.md").read_text()
    ids = build_tokenizer(opened.vocabulary).encode(text)
    rng = np.random.default_rng(32)
    requests = []
    for index in range(NUM_REQUESTS):
        start, length = (int(value) for value in rng.integers([0, 1], [2000, 200]))
        sampling = SamplingSpec(logprobs=1)
        if index % 2:
            sampling = SamplingSpec(temperature=0.9, top_p=0.95, seed=index, logprobs=1)
        requests.append(
            Request(
                id=f"r{index}",
                prompt=tuple(ids[start : start + length]),
                max_new_tokens=int(rng.integers(2, 13)),
                sampling=sampling,
            )
        )
    return requests


@pytest.fixture(scope="module")
def opened() -> Iterator[OpenModel]:
    with open_model(get_model_path("smollm2-135m")) as model:
        yield model


@pytest.fixture(scope="module")
def alone(opened: OpenModel) -> dict[SequenceId, Answer]:
    """Each request by itself."""
    runner = CpuRunner(opened.spec, opened.tensors, SIZES)
    answers: dict[SequenceId, Answer] = {}
    for request in make_requests(opened):
        config = make_config(opened.spec, SIZES)
        answers.update(run_requests(runner, SIZES, [request], config).answers)
    return answers


@pytest.mark.parametrize("step_tokens", [16, 64, 512, UNBOUNDED])
def test_together_under_any_budget(
    opened: OpenModel, alone: dict[SequenceId, Answer], step_tokens: int
) -> None:
    runner = CpuRunner(opened.spec, opened.tensors, SIZES)
    config = replace(make_config(opened.spec, SIZES, step_tokens), max_rows=min(64, step_tokens))
    run = run_requests(runner, SIZES, make_requests(opened), config)
    assert run.answers == alone
    assert run.largest_step == step_tokens or step_tokens == UNBOUNDED


def test_together_in_shuffled_blocks(opened: OpenModel, alone: dict[SequenceId, Answer]) -> None:
    order = np.random.default_rng(1).permutation(SIZES.num_blocks).astype(np.int32)
    runner = ShuffledRunner(CpuRunner(opened.spec, opened.tensors, SIZES), order)
    config = make_config(opened.spec, SIZES, 512)
    assert run_requests(runner, SIZES, make_requests(opened), config).answers == alone


def test_together_on_one_thread(opened: OpenModel, alone: dict[SequenceId, Answer]) -> None:
    sizes = replace(SIZES, threads=1)
    runner = CpuRunner(opened.spec, opened.tensors, sizes)
    config = make_config(opened.spec, sizes, 512)
    assert run_requests(runner, sizes, make_requests(opened), config).answers == alone


def test_together_in_a_pool_too_small(opened: OpenModel, alone: dict[SequenceId, Answer]) -> None:
    sizes = replace(SIZES, num_blocks=14)
    runner = CpuRunner(opened.spec, opened.tensors, sizes)
    # Short prompts with long outputs outgrow the pool; their answers alone are made here.
    requests = [
        replace(request, prompt=request.prompt[:24], max_new_tokens=40)
        for request in make_requests(opened)
    ]
    squeezed = run_requests(runner, sizes, requests, make_config(opened.spec, sizes, 512))
    roomy = CpuRunner(opened.spec, opened.tensors, SIZES)
    expected: dict[SequenceId, Answer] = {}
    for request in requests:
        config = make_config(opened.spec, SIZES)
        expected.update(run_requests(roomy, SIZES, [request], config).answers)
    assert squeezed.preemptions > 0
    assert squeezed.answers == expected
