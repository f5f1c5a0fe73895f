"""Laws of the scheduling that a real engine is composed with: choices change times, not tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import pytest

from model_files import make_tiny_llama
from twostroke.cli.compose import LLM
from twostroke.cli.settings import LLMOptions
from twostroke.engine.params import SamplingParams
from twostroke.errors import InvalidParameter
from twostroke.policies.names import ORDERS, PACES

PROMPTS = [[*([6, 7, 8, 9] * 8), 10 + index] for index in range(6)]
PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A tiny model."""
    return make_tiny_llama().write(tmp_path / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of another run is found."""
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "cache"))


def answer(
    model: Path, prompts: list[list[int]], **options: Unpack[LLMOptions]
) -> tuple[LLM, list[object]]:
    """The engine, closed, and the tokens of every answer."""
    chosen: LLMOptions = {"threads": 1, **options}
    with LLM(model, **chosen) as llm:
        outputs = llm.generate(prompts, PARAMS)
    return llm, [output.completions[0].tokens for output in outputs]


@pytest.fixture
def alone(model_file: Path) -> list[object]:
    """What each prompt gives when nobody shares the engine."""
    return [answer(model_file, [prompt])[1][0] for prompt in PROMPTS]


@pytest.mark.parametrize("policy", ORDERS)
def test_no_policy_changes_a_token(model_file: Path, alone: list[object], policy: str) -> None:
    assert answer(model_file, PROMPTS, policy=policy, max_rows=2)[1] == alone


@pytest.mark.parametrize("pace", PACES)
def test_no_pace_changes_a_token(model_file: Path, alone: list[object], pace: str) -> None:
    assert answer(model_file, PROMPTS, pace=pace, step_tokens=16, max_rows=4)[1] == alone


def test_a_target_between_tokens_asks_for_the_pace_that_keeps_it(model_file: Path) -> None:
    llm, _ = answer(model_file, PROMPTS[:1], itl_target_ms=1000.0)
    assert {choice.name: choice.value for choice in llm.built.settings.choices}["pace"] == "target"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_token(model_file: Path, temperature: float) -> None:
    # A greedy answer of a tiny model soon goes in circles, which lookup guesses.
    params = SamplingParams(max_tokens=80, temperature=temperature, seed=3, ignore_eos=True)
    with LLM(model_file, threads=1) as plain, LLM(model_file, threads=1, drafts=True) as drafting:
        pairs = zip(
            plain.generate(PROMPTS, params), drafting.generate(PROMPTS, params), strict=True
        )
    for one, other in pairs:
        assert one.completions[0].tokens == other.completions[0].tokens
    scheduler = drafting.built.parts.scheduler
    assert scheduler.num_drafted > 0
    assert scheduler.num_accepted > 0 or temperature > 0


def test_a_prefix_is_computed_once_and_changes_no_token(
    model_file: Path, alone: list[object]
) -> None:
    with LLM(model_file, threads=1) as llm:
        first = llm.generate([PROMPTS[0]], PARAMS)[0]
        again = llm.generate([PROMPTS[0]], PARAMS)[0]
    assert first.completions[0].tokens == again.completions[0].tokens == alone[0]
    assert (first.timings.cached_tokens, again.timings.cached_tokens) == (0, 32)


@pytest.mark.parametrize("host_blocks", [0, 64])
def test_preempted_sequences_give_the_tokens_they_give_alone(
    model_file: Path, host_blocks: int
) -> None:
    params = SamplingParams(max_tokens=90, temperature=1.0, seed=3, ignore_eos=True)
    with LLM(model_file, threads=1) as llm:
        alone = [llm.generate([prompt], params)[0].completions[0].tokens for prompt in PROMPTS]
        settings = llm.built.settings
    block_bytes = settings.kv_bytes // settings.num_blocks
    sizes: LLMOptions = {"kv_memory": 12 * block_bytes, "host_memory": host_blocks * block_bytes}
    with LLM(model_file, threads=1, **sizes) as llm:
        outputs = llm.generate(PROMPTS, params)
        memory = llm.built.parts.scheduler.memory
    assert [output.completions[0].tokens for output in outputs] == alone
    assert llm.built.settings.host_blocks == host_blocks
    assert memory.num_preemptions > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "lottery"),
        ("pace", "slow"),
        ("itl_target_ms", -1.0),
        ("itl_target_ms", float("nan")),
        ("itl_target_ms", 1e-9),
        ("ttft_target_ms", 0.0),
        ("host_memory", "some"),
        ("host_memory", -5),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(model_file: Path, name: str, value: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        answer(model_file, PROMPTS[:1], **{name: value})
    assert caught.value.parameter == name
