"""The GPU executor, whole: tiny models against the reference, and what must not change answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuda_models import Setup, make_cuda_config, make_device, make_executor, run_cuda
from tiny_models import TINY_SPECS, VOCAB, Run, make_config, make_tensors, run_requests
from twostroke.core.types import Request, SamplingSpec
from twostroke.exec.local import RunnerSizes
from twostroke.exec.reference import ReferenceRunner
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format

# Rows that pad a step hold anything, and NumPy, which the interpreter computes with, minds.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(invalid|overflow).*encountered:RuntimeWarning"),
]

SETUP = Setup(step_tokens=64, max_rows=4, rungs=(1, 2, 4), num_blocks=24)
# Log-probabilities differ from float32 ones by less; half of it is seen in the interpreter.
ERROR = 0.008


def make_requests(count: int, new_tokens: int = 4) -> list[Request]:
    """Short prompts, one longer than a step, with log-probabilities."""
    rng = np.random.default_rng(3)
    lengths = (5, 90, 1, 33, 17)
    kinds = [
        SamplingSpec(logprobs=2),
        SamplingSpec(temperature=0.8, top_k=20, seed=5, logprobs=0),
        SamplingSpec(temperature=1.1, top_p=0.9, seed=6, logprobs=1),
    ]
    return [
        Request(
            id=f"r{index}",
            prompt=tuple(int(t) for t in rng.integers(0, VOCAB, lengths[index % len(lengths)])),
            max_new_tokens=new_tokens,
            sampling=kinds[index % len(kinds)],
        )
        for index in range(count)
    ]


def run_family(
    family: str,
    requests: list[Request],
    setup: Setup,
    device: str,
    format: Format = Format.F32,
) -> Run:
    """These requests through a fresh executor."""
    spec = TINY_SPECS[family]
    executor = make_executor(spec, make_tensors(spec, format), setup, make_device(device))
    try:
        config = make_cuda_config(spec, setup)
        return run_cuda(executor, requests, config, setup.in_flight)
    finally:
        executor.close()


def run_reference(family: str, requests: list[Request], format: Format = Format.F32) -> Run:
    """The same through the NumPy backend, float32 throughout."""
    spec = TINY_SPECS[family]
    sizes = RunnerSizes(1, 128, 16, 64, KvElement.F32)
    runner = ReferenceRunner(spec, make_tensors(spec, format), sizes)
    return run_requests(runner, sizes, requests, make_config(spec, sizes))


@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_log_probabilities_are_those_of_the_reference(family: str, device: str) -> None:
    prompts = [replace(one, sampling=SamplingSpec(logprobs=0)) for one in make_requests(3, 1)]
    prompts = [replace(one, prompt_logprobs=0, prompt=one.prompt[:40]) for one in prompts]
    ours, theirs = run_family(family, prompts, SETUP, device), run_reference(family, prompts)
    for id, answer in theirs.answers.items():
        scored = [entry.logprob for entry in ours.answers[id].prompt_scored]
        expected = [entry.logprob for entry in answer.prompt_scored]
        assert np.allclose(scored, expected, atol=ERROR)


@pytest.mark.parametrize(("element", "error"), [(KvElement.INT8, 0.015), (KvElement.FP8, 0.08)])
def test_eight_bit_keys_and_values_cost_little(
    element: KvElement, error: float, device: str
) -> None:
    request = replace(make_requests(1, 1)[0], prompt=tuple(range(1, 41)), prompt_logprobs=0)
    expected = run_reference("llama", [request]).answers
    found = run_family("llama", [request], replace(SETUP, element=element), device).answers
    for id, answer in expected.items():
        pairs = zip(found[id].prompt_scored, answer.prompt_scored, strict=True)
        assert np.mean([abs(ours.logprob - theirs.logprob) for ours, theirs in pairs]) <= error


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *((family, Format.F32) for family in TINY_SPECS),
        ("llama", Format.Q4_1),
        ("qwen3", Format.Q8_0),
    ],
)
def test_decodes_have_the_reference_log_probabilities(
    family: str, format: Format, device: str
) -> None:
    """Tokens drawn one by one, scored by the reference in one go."""
    drawn = replace(make_requests(1, 5)[0], sampling=SamplingSpec(logprobs=0))
    [(id, ours)] = run_family(family, [drawn], SETUP, device, format).answers.items()
    whole = replace(drawn, prompt=drawn.prompt + tuple(ours.tokens), max_new_tokens=1)
    whole = replace(whole, prompt_logprobs=0)
    theirs = run_reference(family, [whole], format).answers[id].prompt_scored[-len(ours.tokens) :]
    assert [entry.token for entry in theirs] == ours.tokens
    found, expected = ([one.logprob for one in each] for each in (ours.logprobs, theirs))
    assert np.allclose(found, expected, atol=ERROR), np.subtract(found, expected)


def test_two_steps_in_flight_draw_what_one_does(device: str) -> None:
    requests = make_requests(3)
    ahead = run_family("llama", requests, SETUP, device)
    assert (
        ahead.answers == run_family("llama", requests, replace(SETUP, in_flight=1), device).answers
    )


def test_captured_decodes_draw_what_launched_ones_do(device: str) -> None:
    requests = make_requests(3)
    launched = replace(SETUP, rungs=(), token_rungs=(), capture=False)
    captured = run_family("llama", requests, SETUP, device)
    assert captured.answers == run_family("llama", requests, launched, device).answers


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_exact_answers_do_not_depend_on_company(family: str, device: str) -> None:
    setup = replace(SETUP, exact=True)
    requests = make_requests(4)
    together = run_family(family, requests, setup, device)
    for request in requests:
        alone = run_family(family, [request], replace(setup, step_tokens=48), device)
        for id, answer in alone.answers.items():
            assert together.answers[id] == answer
