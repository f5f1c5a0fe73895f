"""What a request hears of its own time, and what the engine's memory says in the metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes import FakeExecutor, make_config, make_parts
from loopback import run_server
from twostroke.core.scheduler import Scheduler
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.openapi import build_openapi
from twostroke.server.settings import ServerSettings, describe_served

BODY = {"model": "fake", "prompt": "a" * 40, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the real engine, with a prefix cache."""
    executor = FakeExecutor(block_tokens=4)
    config = replace(make_config(executor), cache_seed="fake")
    parts = replace(make_parts(executor), scheduler=Scheduler(config))
    with run_server(AsyncLLM(parts)) as url:
        yield url


def scrape(url: str) -> dict[str, float]:
    """The samples of the metrics page that have no labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {s.name: s.value for one in families for s in one.samples if not s.labels}


def test_a_reply_says_where_its_time_went_when_asked(url: str) -> None:
    plain = httpx.post(f"{url}/v1/completions", json=BODY).json()
    assert "timings" not in plain
    timings = httpx.post(f"{url}/v1/completions", json={**BODY, "timings": True}).json()["timings"]
    assert timings["decode_tokens"] == 6
    assert timings["prefill_tokens"] + timings["cached_tokens"] == 41  # with the begin token
    assert timings["preemptions"] == 0
    assert min(timings["queued_s"], timings["prefill_s"], timings["decode_s"]) >= 0
    assert timings["prefill_s"] + timings["decode_s"] > 0


@pytest.mark.parametrize("usage", [False, True])
def test_the_last_event_of_a_stream_has_them(url: str, usage: bool) -> None:
    body = {**BODY, "prompt": ["abc", "def"], "timings": True, "stream": True}
    text = httpx.post(
        f"{url}/v1/completions", json={**body, "stream_options": {"include_usage": usage}}
    ).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert events[-1]["choices"] == []
    assert events[-1]["timings"]["decode_tokens"] == 12
    assert ("usage" in events[-1]) is usage
    assert all("timings" not in event for event in events[:-1])


def test_the_prefix_cache_is_counted_in_tokens(url: str) -> None:
    body = {**BODY, "prompt": "b" * 40}
    before = scrape(url)
    httpx.post(f"{url}/v1/completions", json=body)
    httpx.post(f"{url}/v1/completions", json=body)
    after = scrape(url)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["twostroke_prefix_cache_queries_total"] == 82
    assert grown["twostroke_prefix_cache_hits_total"] == 40
    assert after["twostroke_kv_cache_blocks_cached"] > 0
    assert grown["twostroke_step_flops_total"] > 0
    assert 0 <= after["twostroke_kv_cache_waste_ratio"] <= 1


def test_the_fingerprint_follows_what_outputs_depend_on() -> None:
    engine = AsyncLLM(make_parts(FakeExecutor()))
    try:
        one, same, other = (
            describe_served(engine, ServerSettings(facts=facts)) for facts in ("a", "a", "b")
        )
        assert one.fingerprint == same.fingerprint != other.fingerprint
        assert build_openapi(one)["info"]["version"] == one.version
    finally:
        engine.close()
