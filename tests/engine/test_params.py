"""Laws of SamplingParams: whatever is absurd is refused by name, and what passes is normal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from twostroke.core.scheduler import Scheduler
from twostroke.core.types import Rejected, Request, SchedulerConfig
from twostroke.engine.params import ModelLimits, SamplingParams, to_request
from twostroke.errors import InvalidParameter

LIMITS = ModelLimits(stop_ids=frozenset({7}), vocab_size=100, context_tokens=50)


def make_request(prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> Request:
    return to_request(SamplingParams(**params), "r", prompt, seed=11, limits=LIMITS)


NAN, INF = math.nan, math.inf
ABSURD: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, -1, 129, 1.0, True, "2", None)],
    *[("temperature", value) for value in (-0.1, NAN, INF, 101, "hot", None, True, 10**400)],
    *[("top_p", value) for value in (-0.5, 1.01, NAN, INF, "1", False)],
    *[("top_k", value) for value in (-2, 2**20 + 1, 10**30, 1.5, NAN, "5", True)],
    *[("min_p", value) for value in (-0.1, 1.1, NAN, "x", True)],
    *[("repetition_penalty", value) for value in (0, -1, 101, NAN, INF, "x", True)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, NAN, -INF, "x", True)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, NAN, INF, [], True)],
    *[("seed", value) for value in (2**64, -(2**63) - 1, 10**40, 1.0, "1", True)],
    *[("max_tokens", value) for value in (0, -5, 2**31, 1.0, NAN, "9", True)],
    *[("min_tokens", value) for value in (-1, 17, 2.0, "1", True, None)],
    *[
        ("stop", value)
        for value in ("", ["a", ""], ["x"] * 17, [1], 5, b"x", "s" * 257, {"a": 1}, "\ud800")
    ],
    *[("stop_token_ids", value) for value in ([-1], [1.0], ["1"], [True], 5, "12", [0] * 257)],
    *[("ignore_eos", value) for value in (1, 0, None, "yes")],
    *[("skip_special_tokens", value) for value in (1, "no", None)],
    *[("logprobs", value) for value in (-1, 21, 1.0, True, "5")],
    *[("prompt_logprobs", value) for value in (-1, 21, 2.0, True, "5")],
    *[("logit_bias", {1: value}) for value in (NAN, INF, 101, -101, "1", None, True)],
    *[("logit_bias", value) for value in ({-1: 1.0}, {"1": 1.0}, {True: 1.0}, [1], 5, "x")],
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
]


@pytest.mark.parametrize(("name", "value"), ABSURD, ids=lambda value: repr(value)[:30])
def test_an_absurd_value_is_refused_by_the_name_of_its_parameter(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert len(str(caught.value)) < 3000


def test_a_refusal_of_a_number_names_the_valid_range() -> None:
    with pytest.raises(InvalidParameter, match=r"^temperature: must be from 0 to 100, not -1$"):
        SamplingParams(temperature=-1)
    with pytest.raises(InvalidParameter, match=r"^logprobs: must be from 0 to 20, not 21$"):
        SamplingParams(logprobs=21)


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), top_k=np.int32(-1))
    assert (params.n, params.temperature, params.top_k) == (2, 0.5, -1)
    assert type(params.n) is int
    assert type(params.temperature) is float


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")
    assert SamplingParams().stop_strings == ()


def test_equal_params_are_equal_however_they_were_spelled() -> None:
    assert SamplingParams(stop="a", stop_token_ids=[2, 1]) == SamplingParams(
        stop=["a"], stop_token_ids=(1, 2)
    )


def test_both_ways_to_turn_top_k_off_are_one() -> None:
    assert make_request(top_k=-1).sampling == make_request(top_k=0).sampling
    assert make_request(top_k=-1).sampling.top_k == 0


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert make_request(temperature=1e-9).sampling.temperature == 0.0
    assert make_request(temperature=1e-3).sampling.temperature == 1e-3


def test_open_max_tokens_becomes_what_the_context_leaves() -> None:
    assert make_request(max_tokens=None).max_new_tokens == 47
    assert make_request((1,) * 60, max_tokens=None).max_new_tokens == 1


def test_ignored_end_tokens_leave_only_the_callers_own() -> None:
    assert make_request(stop_token_ids=[3]).stop_tokens == {3, 7}
    assert make_request(stop_token_ids=[3], ignore_eos=True).stop_tokens == {3}


def test_the_fresh_seed_is_used_only_where_none_was_given() -> None:
    assert make_request().sampling.seed == 11
    assert make_request(seed=5).sampling.seed == 5
    assert make_request(seed=-1).sampling.seed == 2**64 - 1


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_a_token_outside_the_vocabulary_is_refused_by_name(name: str) -> None:
    value: Any = {100: 1.0} if name == "logit_bias" else [100]
    with pytest.raises(InvalidParameter, match="from 0 to 99, not 100"):
        make_request(**{name: value})


EXTREMES: list[dict[str, Any]] = [
    {"n": 128, "temperature": 100, "top_k": 2**20, "top_p": 0.0, "min_p": 1.0},
    {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2},
    {"seed": 2**64 - 1, "max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1},
    {"seed": -(2**63), "logprobs": 20, "prompt_logprobs": 20, "max_tokens": None},
    {"logit_bias": {99: -100, 0: 100, 5: 0}, "stop_token_ids": [99], "min_tokens": 3},
]


@pytest.mark.parametrize("params", EXTREMES)
def test_what_passes_here_passes_admission(params: dict[str, Any]) -> None:
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=64,
            block_tokens=4,
            step_tokens=16,
            max_rows=8,
            context_tokens=50,
            vocab_size=100,
        )
    )
    assert not isinstance(scheduler.submit(make_request(**params), 0), Rejected)
