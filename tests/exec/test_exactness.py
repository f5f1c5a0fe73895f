"""Promise 1 on the CPU: a request's tokens and log-probabilities do not depend, to the last bit, on
company, chunking, block placement, threads or preemption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tiny_models import TINY_SPECS, VOCAB, Run, make_config, make_tensors, run_requests
from twostroke.core.types import Request, SamplingSpec
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import RunnerSizes
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format

SIZES = RunnerSizes(threads=2, num_blocks=400, block_tokens=16, max_step_tokens=512)
FAMILIES = list(TINY_SPECS)


def make_requests(count: int = 12) -> list[Request]:
    """Mixed lengths and every kind of sampling, logprobs on."""
    rng = np.random.default_rng(11)
    kinds = [
        SamplingSpec(logprobs=2),
        SamplingSpec(temperature=0.8, top_k=20, seed=5, logprobs=0),
        SamplingSpec(temperature=1.1, top_p=0.9, min_p=0.02, seed=6, logprobs=1),
        SamplingSpec(
            temperature=0.7,
            seed=7,
            repetition_penalty=1.2,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            logit_bias=((3, -2.0), (9, 1.5)),
            logprobs=1,
        ),
    ]
    return [
        Request(
            id=f"r{index}",
            prompt=tuple(int(t) for t in rng.integers(0, VOCAB, int(rng.integers(1, 150)))),
            max_new_tokens=int(rng.integers(1, 24)),
            sampling=kinds[index % len(kinds)],
            n=1 + index % 3,
            prompt_logprobs=1 if index % 5 == 0 else None,
        )
        for index in range(count)
    ]


def make_runner(family: str, sizes: RunnerSizes = SIZES, format: Format = Format.Q4_0) -> CpuRunner:
    spec = TINY_SPECS[family]
    return CpuRunner(spec, make_tensors(spec, format), sizes)


def run_with(family: str, sizes: RunnerSizes = SIZES, step_tokens: int | None = None) -> Run:
    config = make_config(TINY_SPECS[family], sizes, step_tokens)
    return run_requests(make_runner(family, sizes), sizes, make_requests(), config)


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request: pytest.FixtureRequest) -> tuple[str, Run]:
    """Every request run by itself."""
    family: str = request.param
    runner = make_runner(family)
    together = Run()
    for one in make_requests():
        run = run_requests(runner, SIZES, [one], make_config(TINY_SPECS[family], SIZES))
        together.answers.update(run.answers)
    return family, together


def test_requests_together_give_what_they_give_alone(alone: tuple[str, Run]) -> None:
    family, expected = alone
    run = run_with(family)
    assert run.answers == expected.answers
    assert run.largest_step > 64  # they did share steps


@pytest.mark.parametrize("step_tokens", [16, 64])
def test_chunking_changes_nothing(alone: tuple[str, Run], step_tokens: int) -> None:
    family, expected = alone
    assert run_with(family, step_tokens=step_tokens).answers == expected.answers


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_nothing(alone: tuple[str, Run], threads: int) -> None:
    family, expected = alone
    assert run_with(family, replace(SIZES, threads=threads)).answers == expected.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_keys_and_values_change_with_nothing_either(family: str) -> None:
    sizes = replace(SIZES, kv_element=KvElement.INT8)
    runner, alone = make_runner(family, sizes), Run()
    for one in make_requests():
        run = run_requests(runner, sizes, [one], make_config(TINY_SPECS[family], sizes))
        alone.answers.update(run.answers)
    for threads, step_tokens in ((2, None), (3, 16), (1, 64)):
        run = run_with(family, replace(sizes, threads=threads), step_tokens)
        assert run.answers == alone.answers
    assert run_with(family).answers != alone.answers  # they are rounded


@pytest.mark.parametrize("element", [KvElement.F16, KvElement.INT8])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_changes_nothing(family: str, element: KvElement) -> None:
    spec, sizes = TINY_SPECS[family], replace(SIZES, kv_element=element)
    requests = [
        replace(one, prompt=one.prompt[:20], max_new_tokens=40 + 5 * index)
        for index, one in enumerate(make_requests(6))
    ]
    run = run_requests(make_runner(family, sizes), sizes, requests, make_config(spec, sizes))
    small = replace(sizes, num_blocks=9)
    squeezed = run_requests(make_runner(family, small), small, requests, make_config(spec, small))
    assert run.preemptions == 0
    assert squeezed.preemptions > 0
    assert squeezed.answers == run.answers


def test_every_instruction_set_gives_the_same_answers() -> None:
    from kernels_support import ISAS

    spec = TINY_SPECS["gemma3"]
    tensors = make_tensors(spec, Format.Q5_1)
    runs = [
        run_requests(
            CpuRunner(spec, tensors, SIZES, isa), SIZES, make_requests(4), make_config(spec, SIZES)
        )
        for isa in ISAS
    ]
    for run in runs[1:]:
        assert run.answers == runs[0].answers
