"""How a stream is framed, how it fails, and that a lost client frees what it held."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from loopback import Running
from scripted_llm import MODEL
from twostroke.core.types import Cancelled, Failed, Rejected

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "a"},
    CHAT: {"model": MODEL, "messages": HELLO},
}


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails when `condition` has not come true after a time that no working server needs."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def open_request(server: Running, path: str, **fields: Any) -> socket.socket:
    """Send a request and leave its answer unread."""
    body = json.dumps({**BODIES[path], **fields}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_is_server_sent_events_up_to_done(http: httpx.Client, path: str) -> None:
    reply = http.post(path, json={**BODIES[path], "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    events = reply.text.split("\n\n")
    assert events.pop() == ""
    for number, event in enumerate(events, 1):
        assert event.startswith(f"id: {number}\ndata: ")
    assert events.pop().endswith("\ndata: [DONE]")
    for event in events:
        assert "usage" not in json.loads(event.split("data: ", 1)[1])


def test_output_that_waited_together_is_sent_together(server: Running, http: httpx.Client) -> None:
    reply = http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "stream": True})
    assert reply.text.count("data: {") == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stroke", ["prefill", "decode"])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_goes_frees_its_request(
    server: Running,
    path: str,
    stream: bool,
    stroke: str,
    choices: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = server.engine.gate if stroke == "prefill" else server.engine.step_gate
    gate.clear()
    fields: dict[str, Any] = {"n": choices}
    if path == COMPLETIONS and choices > 1:
        fields = {"prompt": ["a"] * choices}
    with open_request(server, path, stream=stream, **fields) as connection:
        wait_until(lambda: bool(server.engine.live))
        received = b""
        while stream and stroke == "decode" and b"data: " not in received:
            received += connection.recv(65536)
    wait_until(lambda: not server.engine.live)
    assert caplog.records == []


def test_a_client_that_goes_before_its_request_is_whole_disturbs_nobody(
    server: Running, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f'{head}content-length: 100\r\n\r\n{{"model'.encode())
        assert http.get("/health").status_code == 200
    for _ in range(3):
        assert http.get("/health").status_code == 200
    assert caplog.records == []


def test_the_official_client_may_leave_a_stream(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    server.engine.step_gate.clear()
    stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    wait_until(lambda: not server.engine.live)


def test_a_client_that_goes_disturbs_no_other(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    server.engine.step_gate.clear()
    connection = open_request(server, CHAT, stream=True)
    with client.chat.completions.create(model=model, messages=HELLO, stream=True) as stream:
        wait_until(lambda: len(server.engine.live) == 2)
        connection.close()
        wait_until(lambda: len(server.engine.live) == 1)
        server.engine.step_gate.set()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == server.engine.reply


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Failed("the worker died"), 500),
        (Cancelled("closing"), 503),
        (Rejected("too long", 7), 400),
        (Rejected("never"), 400),
        (Failed("the grammar is too complex: too many states"), 400),
    ],
)
def test_a_request_that_ends_badly_is_an_error(
    server: Running, http: httpx.Client, path: str, ending: Any, status: int
) -> None:
    server.engine.ending = ending
    reply = http.post(path, json=BODIES[path])
    assert reply.status_code == status
    assert ending.reason in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_error_before_the_first_event_has_its_status(
    server: Running, http: httpx.Client, path: str
) -> None:
    server.engine.ending, server.engine.reply = Failed("the worker died"), "x"
    reply = http.post(path, json={**BODIES[path], "stream": True})
    assert reply.status_code == 500
    assert "the worker died" in reply.json()["error"]["message"]


@pytest.mark.parametrize("breakdown", [None, ZeroDivisionError("a secret")])
def test_an_error_after_the_first_event_is_the_last_event(
    server: Running, client: openai.OpenAI, model: str, breakdown: Exception | None
) -> None:
    server.engine.step_gate.clear()
    server.engine.ending = Failed("the worker died")
    with client.chat.completions.create(model=model, messages=HELLO, stream=True) as stream:
        next(iter(stream))
        server.engine.breakdown = breakdown
        server.engine.step_gate.set()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert "secret" not in str(caught.value)
    assert ("internal error" if breakdown else "the worker died") in str(caught.value)
    assert server.engine.live == set()


def test_a_broken_stream_says_no_done(server: Running, http: httpx.Client) -> None:
    server.engine.step_gate.clear()
    server.engine.ending = Failed("the worker died")
    body = {**BODIES[CHAT], "stream": True}
    with http.stream("POST", CHAT, json=body) as reply:
        lines = (line for line in reply.iter_lines() if not line.startswith("id: "))
        assert next(lines).startswith("data: {")
        server.engine.step_gate.set()
        events = [line for line in lines if line]
    assert "[DONE]" not in "".join(events)
    assert set(json.loads(events[-1].removeprefix("data: "))) == {"error"}
