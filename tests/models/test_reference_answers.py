"""Token ids and log-probabilities against independent engines' answers from the same files.

The reference answers are teacher-forced: each prompt with its greedy continuation is scored in one
request, through the real scheduler and executor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from places import get_model_path, get_reference
from tiny_models import make_config, run_requests
from twostroke.cli.kv_accuracy import MEASURED_ERRORS
from twostroke.core.types import Request, SequenceId, TokenLogprob
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import Runner, RunnerSizes
from twostroke.exec.reference import ReferenceRunner
from twostroke.spec.kv import KvElement
from twostroke.text.tokenizer import build_tokenizer
from twostroke.weights.load import OpenModel, open_model

pytestmark = pytest.mark.real_model

MODELS = ["smollm2-135m", "gemma3-270m"]
SIZES = RunnerSizes(threads=2, num_blocks=128, block_tokens=16, max_step_tokens=512)


@dataclass(frozen=True, slots=True)
class Scored:
    """One prompt's reference continuation as we score it, and as the reference did."""

    name: str
    ours: tuple[TokenLogprob, ...]
    answer: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Against the reference: share of equal most likely tokens, mean |log-probability difference|,
    and perplexity as a multiple of the reference's."""

    agreed: float
    error: float
    perplexity: float


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, OpenModel]]:
    with open_model(get_model_path(request.param)) as opened:
        yield request.param, opened


def score(runner: Runner, model: tuple[str, OpenModel]) -> list[Scored]:
    """Every reference answer, scored by this runner."""
    name, opened = model
    answers = get_reference(name)
    requests = [
        Request(
            id=key,
            prompt=tuple(answer["token_ids"] + answer["greedy_token_ids"]),
            max_new_tokens=1,
            prompt_logprobs=5,
        )
        for key, answer in answers.items()
    ]
    run = run_requests(runner, SIZES, requests, make_config(opened.spec, SIZES))
    scored = []
    for key, answer in answers.items():
        entries = run.answers[SequenceId(key, 0)].prompt_scored
        first = len(answer["token_ids"]) - 1  # entry i scores token i + 1
        ours = entries[first : first + len(answer["greedy_token_ids"])]
        assert [entry.token for entry in ours] == answer["greedy_token_ids"]
        scored.append(Scored(key, ours, answer))
    return scored


def get_differences(scored: list[Scored]) -> np.ndarray:
    """Our log-probability minus the reference's for every continuation token."""
    return np.concatenate(
        [
            np.array([entry.logprob for entry in one.ours]) - one.answer["greedy_logprobs"]
            for one in scored
        ]
    )


def test_token_ids_are_the_reference_ids(model: tuple[str, OpenModel]) -> None:
    name, opened = model
    tokenizer = build_tokenizer(opened.vocabulary)
    for key, answer in get_reference(name).items():
        assert tokenizer.encode(answer["prompt"]) == answer["token_ids"], key


def test_reference_backend_agrees_with_the_reference_engines(model: tuple[str, OpenModel]) -> None:
    _, opened = model
    sizes = replace(SIZES, kv_element=KvElement.F32)
    scored = score(ReferenceRunner(opened.spec, opened.tensors, sizes), model)
    for one in scored:
        margins = one.answer["greedy_margins"]
        for entry, margin in zip(one.ours, margins, strict=True):
            if margin > 1e-3:
                assert entry.top[0][0] == entry.token, one.name
    assert np.abs(get_differences(scored)).max() <= 1e-3


def test_cpu_backend_stays_close_to_the_reference_engines(model: tuple[str, OpenModel]) -> None:
    accuracy = measure_accuracy(model, KvElement.F16)
    assert accuracy.agreed >= 0.97, accuracy
    assert accuracy.error <= 0.03, accuracy
    assert abs(accuracy.perplexity - 1) <= 0.01, accuracy


def test_int8_keys_and_values_cost_what_the_start_says(model: tuple[str, OpenModel]) -> None:
    half, small = (measure_accuracy(model, element) for element in (KvElement.F16, KvElement.INT8))
    said = MEASURED_ERRORS[model[0]]
    assert abs(half.error - said[KvElement.F16]) <= 0.001, half
    assert abs(small.error - said[KvElement.INT8]) <= 0.001, small
    assert small.error <= 1.25 * half.error, (small, half)
    assert small.agreed >= half.agreed - 0.02, (small, half)
    assert abs(small.perplexity - 1) <= 0.01, small


def measure_accuracy(model: tuple[str, OpenModel], element: KvElement) -> Accuracy:
    """The CPU backend's, with keys and values stored so; printed too."""
    name, opened = model
    sizes = replace(SIZES, kv_element=element)
    scored = score(CpuRunner(opened.spec, opened.tensors, sizes), model)
    differences = get_differences(scored)
    agreed = float(
        np.mean([entry.top[0][0] == entry.token for one in scored for entry in one.ours])
    )
    # Perplexity is e to the mean negative log-probability: its ratio follows from the mean shift.
    found = Accuracy(agreed, float(np.abs(differences).mean()), float(np.exp(-differences.mean())))
    print(f"\n{name}, KV in {element.value}: of {differences.size} tokens {found.agreed:.1%} are")
    print(f"the likeliest, mean difference {found.error:.4f}, perplexity × {found.perplexity:.4f}")
    return found
