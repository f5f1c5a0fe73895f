"""What is taken on at most: the queue, its age, rates; on a clock of the tests."""

from __future__ import annotations

import contextlib

import httpx
import pytest

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, ScriptedLLM
from twostroke.engine.outputs import RequestTimings
from twostroke.engine.service import EngineLoad
from twostroke.errors import EngineClosed, Overloaded
from twostroke.server.keys import Key
from twostroke.server.limits import Admission, Limits, ServiceRate, Traffic
from twostroke.server.settings import ServerSettings

BODY = {"model": MODEL, "prompt": "a"}


class Scene:
    """An Admission over an engine whose counts, and a clock whose time, a test sets."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.now_s = 1000.0
        self.load = EngineLoad(0, 0, 0)
        self.traffic = Traffic()
        self.admission = Admission(
            limits or Limits(), self.traffic, lambda: self.load, lambda: self.now_s
        )

    def check_at(self, now_s: float, waiting: int, ended: int) -> None:
        self.now_s = 1000.0 + now_s
        self.load = EngineLoad(waiting, 1, ended)
        self.admission.check_queue()


def test_a_full_queue_refuses_and_estimates_from_the_rate_it_is_served_at() -> None:
    scene = Scene(Limits(queue=20))
    scene.check_at(0, waiting=10, ended=0)
    scene.check_at(10, waiting=19, ended=5)  # one every two seconds
    with pytest.raises(Overloaded) as caught:
        scene.check_at(10, waiting=20, ended=5)
    assert caught.value.limit == "queue_length"
    assert caught.value.retry_after_s == 40


def test_nobody_is_let_in_who_would_wait_too_long() -> None:
    scene = Scene(Limits(queue_s=30))
    scene.check_at(0, waiting=10, ended=0)
    scene.check_at(10, waiting=14, ended=5)
    with pytest.raises(Overloaded, match="about 32 s") as caught:
        scene.check_at(10, waiting=16, ended=5)
    assert (caught.value.limit, caught.value.retry_after_s) == ("queue_wait", 32)


def test_an_idle_time_is_no_slow_service() -> None:
    scene = Scene(Limits(queue_s=30))
    scene.check_at(0, waiting=5, ended=0)
    scene.check_at(50, waiting=0, ended=1)
    scene.check_at(51, waiting=100, ended=2)  # a burst: nobody knows yet how fast it will go
    scene.check_at(54, waiting=100, ended=2)


def test_a_rate_forgets_what_is_long_past() -> None:
    rate = ServiceRate()
    for second in range(0, 200, 10):
        rate.note(EngineLoad(5, 1, second * 10 if second < 100 else 1000), float(second))
    assert rate.get_wait_s(EngineLoad(5, 1, 1000), 190.0) is None  # nothing ended for a minute
    assert rate.get_wait_s(EngineLoad(5, 1, 1055), 190.0) is not None


def test_without_a_known_rate_there_is_still_a_time_to_come_back() -> None:
    scene = Scene(Limits(queue=1))
    with pytest.raises(Overloaded) as caught:
        scene.check_at(0, waiting=1, ended=0)
    assert 1 <= caught.value.retry_after_s <= 600


def test_a_bucket_holds_a_minute_and_refills_evenly() -> None:
    scene, key = Scene(), Key("a", b"d" * 32, per_minute=60)

    def count_let_in(tries: int) -> int:
        passed = 0
        for _ in range(tries):
            with contextlib.suppress(Overloaded), scene.admission.count(key):
                passed += 1
        return passed

    assert count_let_in(100) == 60
    with pytest.raises(Overloaded) as caught:
        scene.admission.count(key).__enter__()
    assert (caught.value.limit, caught.value.retry_after_s) == ("rate", 1)
    scene.now_s += 2.5
    assert count_let_in(100) == 2
    scene.now_s += 0.5
    assert count_let_in(100) == 1
    scene.now_s += 10_000
    assert count_let_in(100) == 60


def test_what_a_key_runs_is_counted_whatever_becomes_of_it() -> None:
    scene, key = Scene(Limits(streams_per_key=1)), Key("a", b"d" * 32)
    with contextlib.suppress(KeyError), scene.admission.count(key):
        with pytest.raises(Overloaded, match="1 requests running"):
            scene.admission.count(key).__enter__()
        raise KeyError
    assert not scene.traffic.requests
    with scene.admission.count(key):
        pass


def test_a_draining_server_takes_nothing_on() -> None:
    scene = Scene()
    scene.traffic.is_draining = True
    with pytest.raises(EngineClosed, match="shutting down"), scene.admission.count(None):
        pass


def test_a_full_queue_is_429_with_the_time_to_come_back(
    server: Running, http: httpx.Client
) -> None:
    server.engine.waiting = 10_000
    reply = http.post("/v1/completions", json=BODY)
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["code"] == "queue_length"
    assert server.engine.seen == []
    assert 'requests_refused_total{reason="queue_length"} 1.0' in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_not_begun_in_time_is_429(stream: bool) -> None:
    engine = ScriptedLLM()
    engine.gate.clear()
    with run_server(engine, ServerSettings(limits=Limits(queue_s=0.05))) as url:
        reply = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": stream}, timeout=20)
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "queue_age"
        assert int(reply.headers["retry-after"]) >= 1
        wait_until(lambda: not engine.live)


def test_a_request_that_was_begun_may_take_its_time() -> None:
    engine = ScriptedLLM()
    engine.gate.clear()
    engine.timings = RequestTimings(1, 2, 0, 0, 0, 0, 0, 0)
    with run_server(engine, ServerSettings(limits=Limits(queue_s=0.05))) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=BODY, timeout=0.3)
        wait_until(lambda: not engine.live)  # because its client went, not because of its age
        engine.gate.set()
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_the_user_is_the_tenant_where_no_key_is(server: Running, http: httpx.Client) -> None:
    http.post("/v1/completions", json={**BODY, "user": "carol"})
    assert [(one.tenant, one.cache_scope) for one in server.engine.senders] == [("carol", "")]
    assert http.post("/v1/completions", json={**BODY, "user": 5}).status_code == 400
    assert http.post("/v1/completions", json={**BODY, "user": "a" * 257}).status_code == 400
