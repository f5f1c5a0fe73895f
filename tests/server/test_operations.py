"""What operators use: health, metrics, starting and stopping."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, ScriptedLLM
from twostroke.engine.outputs import RequestTimings
from twostroke.errors import InvalidParameter
from twostroke.server.serve import ServeOptions, listen, run

TESTS = Path(__file__).resolve().parents[1]


def scrape(http: httpx.Client) -> dict[str, Metric]:
    """The metrics page, parsed."""
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {one.name: one for one in text_string_to_metric_families(reply.text)}


def test_health_follows_the_engine(server: Running, http: httpx.Client) -> None:
    reply = http.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {"status": "live", "live": 0, "stalled_s": 0.0, "reason": None}
    server.engine.dead = "its executor died three times"
    reply = http.get("/health")
    assert reply.status_code == 503
    assert "its executor died three times" in reply.json()["error"]["message"]


def test_an_engine_that_is_held_up_says_by_what_and_is_not_ready(
    server: Running, http: httpx.Client
) -> None:
    server.engine.stall = "the executor is being replaced"
    health = http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "stalled"
    assert health.json()["reason"] == server.engine.stall
    ready = http.get("/ready")
    assert ready.status_code == 503
    assert server.engine.stall in ready.json()["error"]["message"]


def test_an_engine_that_makes_no_steps_is_stalled_and_not_ready(
    server: Running, http: httpx.Client
) -> None:
    server.engine.stalled_s = 61.0
    for path in ("/health", "/ready"):
        reply = http.get(path)
        assert reply.status_code == 503
        assert "stalled: no step for 61.0 s" in reply.json()["error"]["message"]


def test_a_dead_engine_is_unavailable(server: Running, client: openai.OpenAI, model: str) -> None:
    server.engine.dead = "its executor died three times"
    with pytest.raises(openai.InternalServerError, match="died three times") as caught:
        client.completions.create(model=model, prompt="a")
    assert caught.value.status_code == 503


def test_metrics_are_the_engine_s_numbers(server: Running, http: httpx.Client) -> None:
    second = 1_000_000_000
    metrics = server.engine.metrics
    metrics.record_accepted()
    metrics.record_step(40, 38, second // 4)
    metrics.record_emitted(3, [second // 10, second // 5])
    metrics.record_ended("stop", RequestTimings(1, second, 3 * second, 7 * second, 38, 3, 0, 0), 1)
    found = scrape(http)
    assert all(name.startswith("twostroke_") for name in found)
    values = {sample.name: sample.value for one in found.values() for sample in one.samples}
    assert values["twostroke_prompt_tokens_total"] == 38
    assert values["twostroke_generation_tokens_total"] == 3
    assert values["twostroke_preemptions_total"] == 0
    assert values["twostroke_requests_running"] == 0
    assert values["twostroke_requests_waiting"] == 0
    assert values["twostroke_kv_cache_usage_ratio"] == 0
    assert values["twostroke_time_to_first_token_seconds_sum"] == pytest.approx(3)
    assert values["twostroke_request_queue_time_seconds_sum"] == pytest.approx(1)
    assert values["twostroke_request_prefill_time_seconds_sum"] == pytest.approx(2)
    assert values["twostroke_request_decode_time_seconds_sum"] == pytest.approx(4)
    assert values["twostroke_e2e_request_latency_seconds_count"] == 1
    assert values["twostroke_inter_token_latency_seconds_count"] == 2
    assert values["twostroke_step_tokens_sum"] == 40
    reasons = {
        sample.labels["finished_reason"]: sample.value
        for sample in found["twostroke_request_success"].samples
    }
    assert reasons == {"stop": 1, "length": 0}


def test_histogram_buckets_accumulate(server: Running, http: httpx.Client) -> None:
    for tokens in (1, 5, 10**6):
        server.engine.metrics.record_step(tokens, 0, 1)
    samples = scrape(http)["twostroke_step_tokens"].samples
    buckets = [one.value for one in samples if one.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[-2], buckets[-1]) == (1, 2, 3)


def test_a_free_port_is_taken_and_told_and_the_engine_closed() -> None:
    engine = ScriptedLLM()
    with run_server(engine) as url:
        assert int(url.rsplit(":", 1)[1]) > 0
        assert httpx.get(f"{url}/health").status_code == 200
        assert engine.closed_times == 0
    assert engine.closed_times >= 1


def test_a_port_in_use_is_named_and_the_engine_closed() -> None:
    engine = ScriptedLLM()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidParameter, match=f"127.0.0.1:{port}"):
            run(engine, ServeOptions(port=port))  # type: ignore[arg-type]
    assert engine.closed_times == 1


def test_a_host_nobody_has_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"cannot listen on 192\.0\.2\.1"):
        run(ScriptedLLM(), ServeOptions(host="192.0.2.1", port=0))  # type: ignore[arg-type]


def test_small_writes_are_not_delayed() -> None:
    # asyncio turns the delay off on connections whose listener says that it is TCP.
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="port"):
        run(ScriptedLLM(), ServeOptions(port=65536))  # type: ignore[arg-type]


def test_requests_still_running_at_the_end_are_told_so() -> None:
    engine = ScriptedLLM()
    engine.step_gate.clear()
    body = {"model": MODEL, "prompt": "a", "stream": True}
    with contextlib.ExitStack() as streams:
        with run_server(engine) as url:
            reply = streams.enter_context(
                httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20)
            )
            lines = (line for line in reply.iter_lines() if line.startswith("data: "))
            assert next(lines).startswith("data: {")
        last = list(lines)[-1]
    assert "the engine was closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert engine.live == set()


def test_a_whole_reply_that_the_end_of_the_server_cuts_off_is_503() -> None:
    engine = ScriptedLLM()
    engine.step_gate.clear()
    replies: list[httpx.Response] = []
    with run_server(engine) as url:

        def post() -> None:
            body = {"model": MODEL, "prompt": "a"}
            replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=20))

        client = threading.Thread(target=post)
        client.start()
        wait_until(lambda: bool(engine.live))
    client.join(20)
    assert replies[0].status_code == 503
    assert "the engine was closed; send it again later" in replies[0].text


SERVE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from scripted_llm import ScriptedLLM
from twostroke.server.serve import ServeOptions, listen, run

engine = ScriptedLLM()
run(engine, ServeOptions(port=0), lambda host, port: print(port, flush=True))
print("closed", engine.closed_times)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_closes_the_engine(number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert (out.strip(), err, child.returncode) == ("closed 1", "", 0)
