"""The served trace: the same requests for every engine, and what their lives add up to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes import FakeExecutor, make_config
from twostroke.bench.gpu.served import run_trace
from twostroke.bench.gpu.traces import (
    Lifetime,
    TraceShape,
    describe_trace,
    make_requests,
    summarise_lives,
)
from twostroke.errors import TwostrokeError

SHAPE = TraceShape(requests=5, rate=500.0, most_prompt=20, most_new=6, vocab_size=250)


def test_requests_are_the_same_every_time_and_within_bounds() -> None:
    shape = TraceShape(requests=200)
    requests = make_requests(shape, None)
    assert requests == make_requests(shape, None)
    assert max(len(one.prompt) for one in requests) == shape.most_prompt
    assert all(1 <= one.new_tokens <= shape.most_new for one in requests)
    assert [one.at_s for one in requests] == sorted(one.at_s for one in requests)
    assert requests[-1].at_s == pytest.approx(200 / shape.rate, rel=0.3)


def test_lengths_come_from_a_trace_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,12,3\n"
        "2023-11-16 18:15:47.6805900,99,44\n"
    )
    requests = make_requests(SHAPE, path)
    assert [(len(one.prompt), one.new_tokens) for one in requests] == [(12, 3), (20, 6)]
    assert "trace.csv" in describe_trace(SHAPE, path, requests)


def test_a_life_is_summed_from_its_due_time_to_its_last_token() -> None:
    lives = [Lifetime(1.0, 3, [1.5, 1.7, 1.9]), Lifetime(2.0, 4, [4.0]), Lifetime(3.0, 2)]
    summary = summarise_lives(lives)
    assert summary["output_tokens"] == 4
    assert summary["output_tokens_per_s"] == pytest.approx(1.0)
    assert summary["finished"] == 1
    assert summary["ttft_s_mean"] == pytest.approx((0.5 + 2.0) / 2)
    assert summary["tpot_s_mean"] == pytest.approx(0.2)


def test_nothing_done_in_time_is_no_throughput() -> None:
    assert summarise_lives([Lifetime(0.0, 3)])["output_tokens_per_s"] == 0.0


def test_every_request_gets_its_tokens_from_our_engine() -> None:
    executor = FakeExecutor()
    requests = make_requests(SHAPE, None)
    lives, listener = run_trace(executor, make_config(executor), requests, 20.0, 1)
    assert [len(life.token_times_s) for life in lives] == [one.new_tokens for one in requests]
    assert all(life.token_times_s[0] >= life.at_s for life in lives)
    assert sum(tokens for _, _, tokens in listener.commits) >= sum(
        len(one.prompt) for one in requests
    )


def test_a_run_that_is_cut_off_keeps_what_it_has() -> None:
    executor = FakeExecutor()
    requests = make_requests(SHAPE, None)
    lives, _ = run_trace(executor, make_config(executor), requests, 0.0, 1)
    assert sum(len(life.token_times_s) for life in lives) < sum(one.new_tokens for one in requests)


def test_a_request_that_cannot_be_served_measures_nothing() -> None:
    executor = FakeExecutor()
    requests = make_requests(TraceShape(1, 1.0, 4096, 4, 250), None)
    with pytest.raises(TwostrokeError, match="rejected"):
        run_trace(executor, make_config(executor), requests, 5.0, 1)
