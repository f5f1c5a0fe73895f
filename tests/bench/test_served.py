"""Served loads: what is sent, what is counted, and the client that sends it."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import numpy as np
import pytest

from bench_support import DEVICE
from loopback import run_server
from scripted_llm import REPLY, ScriptedLLM
from tiny_models import TINY_SPECS
from twostroke.bench.client import (
    BadReply,
    get_model_id,
    is_healthy,
    read_pieces,
    send_load,
)
from twostroke.bench.served import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Answer,
    Arrival,
    get_load_floor,
    make_burst,
    make_poisson,
    summarise_answers,
)
from twostroke.bench.servers import find_port

SPEC = TINY_SPECS["llama"]


def test_a_load_is_the_same_for_every_engine() -> None:
    assert make_burst(SPEC, 8) == make_burst(SPEC, 8)
    assert make_poisson(SPEC, 2.0, 10) == make_poisson(SPEC, 2.0, 10)
    assert len({one.prompt for one in make_burst(SPEC, 8)}) == 8


def test_sizes_are_within_their_ranges_and_spread() -> None:
    arrivals = make_burst(SPEC, 200)
    for sizes, (low, high) in (
        ([len(one.prompt) for one in arrivals], PROMPT_TOKENS),
        ([one.new_tokens for one in arrivals], NEW_TOKENS),
    ):
        assert low <= min(sizes) < low + (high - low) / 4
        assert high - (high - low) / 4 < max(sizes) <= high


def test_arrivals_are_a_poisson_process() -> None:
    times = [one.at for one in make_poisson(SPEC, 5.0, 400.0)]
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert max(times) < 400.0
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.2, rel=0.1)  # as an exponential's is its mean


def test_times_count_from_when_a_request_was_due() -> None:
    arrivals = [Arrival(0.0, (1,), 3), Arrival(1.0, (1,), 3)]
    answers = [Answer((0.5, 0.6, 0.8), 3), Answer((1.5, 1.6, 1.8), 3)]
    summary = summarise_answers(arrivals, answers)
    assert summary["ttft_s_p50"] == summary["ttft_s_p99"] == pytest.approx(0.5)
    assert summary["tpot_ms_p50"] == pytest.approx(150)
    assert summary["itl_ms_p50"] == pytest.approx(150)
    assert summary["itl_ms_p99"] == pytest.approx(200, rel=0.02)
    assert summary["output_tokens_per_s"] == pytest.approx(6 / 1.8)


def test_a_request_that_wrote_too_little_is_counted_as_failed_and_nowhere_else() -> None:
    arrivals = [Arrival(0.0, (1,), 3), Arrival(0.0, (1,), 9)]
    summary = summarise_answers(arrivals, [Answer((1.0, 2.0), 3), Answer((7.0,), 4)])
    assert summary["failed"] == 1
    assert summary["output_tokens"] == 3
    assert summary["seconds"] == 2.0
    assert summarise_answers(arrivals[1:], [Answer((), 0)]) == {"requests": 1, "failed": 1}


def test_at_the_limit_a_load_takes_less_than_its_requests_one_by_one() -> None:
    arrivals = make_burst(SPEC, 16)
    floor = get_load_floor(SPEC, arrivals, DEVICE)
    seconds = sum(one.new_tokens for one in arrivals) / floor["output_tokens_per_s"]
    one_by_one = sum(
        one.new_tokens / get_load_floor(SPEC, [one], DEVICE)["output_tokens_per_s"]
        for one in arrivals
    )
    assert 0 < seconds < one_by_one
    assert 0 < floor["ttft_s_p50"] < floor["tpot_ms_p50"]  # seconds, milliseconds


def test_the_client_counts_what_our_server_sends() -> None:
    tokens = len(REPLY.encode())
    with run_server(ScriptedLLM()) as url:
        port = urlsplit(url).port
        assert port is not None
        assert is_healthy(port)
        assert get_model_id(port) == "scripted"
        arrivals = [Arrival(at, (1, 2, 3), tokens) for at in (0.0, 0.0, 0.05)]
        answers = send_load(port, arrivals, {})
        with pytest.raises(BadReply, match="no_such_field"):
            send_load(port, arrivals[:1], {"no_such_field": 1})
    for arrival, answer in zip(arrivals, answers, strict=True):
        assert answer.tokens == tokens
        assert arrival.at < answer.times[0] <= answer.times[-1]
    assert not is_healthy(find_port())


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_body_is_read_whole_however_it_is_cut(is_chunked: bool) -> None:
    pieces = [b"data: {}\n\nda", b"ta: 1", b"\n\n"]

    async def read() -> bytes:
        reader = asyncio.StreamReader()
        for piece in pieces:
            reader.feed_data(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            reader.feed_data(b"0\r\n\r\n")
        reader.feed_eof()
        return b"".join([piece async for piece in read_pieces(reader, is_chunked)])

    assert asyncio.run(read()) == b"".join(pieces)
