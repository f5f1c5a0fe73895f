"""Connections that are slow, idle, rude or many: each ends in time, and nobody else notices."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import h11
import httpx
import pytest

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, ScriptedLLM
from twostroke.server.limits import Limits
from twostroke.server.protocol import _Connection
from twostroke.server.settings import ServerSettings

QUICK = Limits(
    connections=40, idle_s=0.3, header_s=0.3, body_s=0.5, stall_s=0.3, write_bytes=16 * 2**10
)
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def quick_server() -> Iterator[Running]:
    """A server whose deadlines are short."""
    engine = ScriptedLLM()
    with run_server(engine, ServerSettings(limits=QUICK)) as url:
        yield Running(url, engine)


@pytest.fixture
def quick(quick_server: Running) -> Running:
    """The same with its script reset."""
    quick_server.engine.reset()
    return quick_server


def connect(server: Running) -> socket.socket:
    """A bare connection."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(20)
    return connection


def build_request(body: bytes, **fields: str) -> bytes:
    """A POST of a completion."""
    headers = {"host": "a", "content-type": "application/json", "content-length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in {**headers, **fields}.items()]
    return "\r\n".join([f"POST {COMPLETIONS} HTTP/1.1", *lines, "", ""]).encode() + body


def ask(**fields: object) -> bytes:
    """The bytes of a valid request."""
    return build_request(json.dumps({"model": MODEL, "prompt": "a", **fields}).encode())


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an end too."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def count_connections(server: Running) -> float:
    """What the server says is open."""
    page = httpx.get(f"{server.url}/metrics").text
    line = next(one for one in page.splitlines() if one.startswith("twostroke_http_connections "))
    return float(line.split()[1])


def test_a_connection_without_a_request_is_closed(quick: Running) -> None:
    with connect(quick) as connection:
        assert read_all(connection) == b""


def test_a_head_that_does_not_end_is_408(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: ")
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_byte_now_and_then_does_not_put_the_deadline_off(quick: Running) -> None:
    sent = 0
    with connect(quick) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(0.05)
        for byte in b"GET /v1/models HTTP/1.1\r\nx: " + b"y" * 1000:
            connection.sendall(bytes([byte]))
            sent += 1
            with contextlib.suppress(TimeoutError):
                if b"408" in connection.recv(4096):
                    break
    assert sent < 100


def test_a_body_that_does_not_end_is_408(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(build_request(b'{"model', **{"content-length": "1000"}))
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    assert quick.engine.seen == []


def test_a_connection_is_used_again_and_closed_when_it_is_not(quick: Running) -> None:
    with connect(quick) as connection:
        for _ in range(2):
            connection.sendall(ask())
            received = b""
            while b'"usage"' not in received:
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200 ")
        assert read_all(connection) == b""


def test_two_requests_in_one_write_are_both_answered(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(ask() * 2)
        assert read_all(connection).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_is_400(quick: Running, raw: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(raw)
        reply = read_all(connection)
    # A reset may overtake the answer where bytes were left unread.
    assert reply == b"" or reply.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    assert httpx.get(f"{quick.url}/health").status_code == 200


def test_a_client_that_reads_nothing_is_closed_and_its_request_ended(
    quick: Running, caplog: pytest.LogCaptureFixture
) -> None:
    quick.engine.reply = "a word " * 2_000
    with connect(quick) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(ask(stream=True, max_tokens=1_000_000, logprobs=5))
        assert connection.recv(1) == b"H"
        quick.engine.reply = "a"
        assert httpx.post(f"{quick.url}{COMPLETIONS}", json={"model": MODEL, "prompt": "b"}).json()
        wait_until(lambda: not quick.engine.live)
        wait_until(lambda: count_connections(quick) <= 1)
    assert "read too little" in caplog.text


def test_a_client_that_reads_a_whole_answer_late_gets_it(quick: Running) -> None:
    quick.engine.reply = "a word " * 100
    with connect(quick) as connection:
        connection.sendall(ask(stream=True, max_tokens=1000))
        wait_until(lambda: bool(quick.engine.seen) and not quick.engine.live)
        assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_connections_beyond_the_limit_are_told_so(quick: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(QUICK.connections):
            stack.enter_context(connect(quick))
        reply = b""
        while not reply:  # the last of those above may not be accepted yet
            reply = read_all(stack.enter_context(connect(quick)))
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in reply
    wait_until(lambda: count_connections(quick) <= 1)


def count_descriptors() -> int:
    """Open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_idle_connections_disturb_nobody_and_leave_nothing(quick: Running) -> None:
    before = count_descriptors()
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(connect(quick))
            reply = httpx.post(f"{quick.url}{COMPLETIONS}", json={"model": MODEL, "prompt": "b"})
            assert reply.status_code == 200
    wait_until(lambda: count_connections(quick) <= 1)
    gc.collect()
    assert count_descriptors() <= before + 2


def test_rude_clients_leave_nothing_behind(quick: Running) -> None:
    draw = random.Random(seed := 11)
    print("seed", seed)
    request = ask(stream=True, max_tokens=1000)
    for _ in range(150):
        quick.engine.reply = "word " * draw.choice([1, 100])
        with connect(quick) as connection:
            connection.sendall(request[: draw.choice([0, 5, 60, len(request), len(request)])])
            if draw.random() < 0.5:
                connection.settimeout(0.02)
                with contextlib.suppress(TimeoutError):
                    connection.recv(draw.choice([1, 1000]))
            if draw.random() < 0.5:  # closed with a reset
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_until(lambda: not quick.engine.live)
    wait_until(lambda: count_connections(quick) <= 1)
    assert httpx.get(f"{quick.url}/health").status_code == 200


def make_connections(head: str) -> tuple[h11.Connection, h11.Connection]:
    """The server's kind and h11's own, both of which have received this request."""
    made = _Connection(), h11.Connection(h11.SERVER)
    for connection in made:
        connection.receive_data(head.encode())
        assert isinstance(connection.next_event(), h11.Request)
        assert isinstance(connection.next_event(), h11.EndOfMessage)
    return made


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("headers", [[], [("content-length", "7")], [("X-Chunked", "chunked")]])
def test_an_answer_is_framed_as_h11_frames_it(version, method, headers) -> None:
    draw = random.Random(5)
    ours, theirs = make_connections(f"{method} / HTTP/{version}\r\nhost: a\r\n\r\n")
    pieces = [b"", b"abc", b"", b"defg"] if headers and headers[0][0] == "content-length" else None
    if pieces is None:
        pieces = [draw.randbytes(draw.choice([0, 1, 15, 16, 300, 70_000])) for _ in range(30)]
    data = [] if method == "HEAD" else [h11.Data(data=piece) for piece in pieces]
    for event in (h11.Response(status_code=200, headers=headers), *data, h11.EndOfMessage()):
        assert ours.send(event) == theirs.send(event)
        assert ours.our_state is theirs.our_state
    for connection in (ours, theirs):
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(data=b"late"))
