"""Many rude clients of the real engine: nothing leaks, and others get their exact answers."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from fakes import FakeExecutor, make_parts
from loopback import run_server, wait_until
from twostroke.core.ports import OnDone
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import StepPlan
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.limits import Limits
from twostroke.server.settings import ServerSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc"),
]

COMPLETIONS = "/v1/completions"
NUM_BLOCKS, CONTEXT_TOKENS = 256, 512
LIMITS = Limits(idle_s=2.0, header_s=1.0, body_s=1.0, stall_s=1.0, write_bytes=4096)


@dataclass
class Soak:
    """A server over the real engine, and what could leak."""

    url: str
    scheduler: Scheduler
    descriptors: int

    def check_nothing_is_left(self) -> None:
        """No request, block, connection or descriptor of those that came."""
        wait_until(lambda: httpx.get(f"{self.url}/health").json()["live"] == 0)
        wait_until(lambda: self.scheduler.num_free_blocks == NUM_BLOCKS)
        wait_until(lambda: self.count_connections() <= 1)
        gc.collect()
        wait_until(lambda: count_descriptors() <= self.descriptors + 2)
        assert (self.scheduler.num_waiting, self.scheduler.num_running) == (0, 0)

    def count_connections(self) -> float:
        """What the server says is open."""
        page = httpx.get(f"{self.url}/metrics").text
        line = next(one for one in page.splitlines() if one.startswith("twostroke_http_conn"))
        return float(line.split()[1])

    def connect(self) -> socket.socket:
        """A bare connection."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.settimeout(20)
        return connection


def count_descriptors() -> int:
    """Open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def answer_slowly(executor: FakeExecutor) -> None:
    """Steps that take a millisecond on a thread, as long as those of a small model."""

    def behave(plan: StepPlan, on_done: OnDone) -> None:
        def answer() -> None:
            time.sleep(0.001)
            on_done(executor.compute(plan))

        threading.Thread(target=answer, daemon=True).start()

    executor.behave = behave


@pytest.fixture(scope="module")
def soak() -> Iterator[Soak]:
    """One server for all of these."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    executor = FakeExecutor(num_blocks=NUM_BLOCKS)
    answer_slowly(executor)
    parts = make_parts(executor, context_tokens=CONTEXT_TOKENS, step_tokens=64)
    try:
        with run_server(AsyncLLM(parts), ServerSettings(limits=LIMITS)) as url:
            httpx.get(f"{url}/health")
            yield Soak(url, parts.scheduler, count_descriptors())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ask(**fields: object) -> bytes:
    """The bytes of a valid request."""
    body = json.dumps(
        {"model": "fake", "prompt": "abc", "ignore_eos": True, "temperature": 0, **fields}
    ).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Bystander(threading.Thread):
    """An honest client that asks the same again and again, until it is told to stop."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._stopped = threading.Event()
        self.answers: list[str] = []
        self.longest_s = 0.0

    def run(self) -> None:
        """Collect whole answers."""
        body = {"model": "fake", "prompt": "hello", "max_tokens": 24, "ignore_eos": True}
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stopped.is_set() or not self.answers:
                begin = time.monotonic()
                reply = client.post(COMPLETIONS, json={**body, "temperature": 0})
                self.longest_s = max(self.longest_s, time.monotonic() - begin)
                self.answers.append(reply.json()["choices"][0]["text"])

    def stop(self) -> None:
        """All its answers are the same one."""
        self._stopped.set()
        self.join(60)
        assert not self.is_alive()
        assert len(set(self.answers)) == 1


@contextlib.contextmanager
def beside_a_bystander(soak: Soak) -> Iterator[Bystander]:
    """An honest client runs meanwhile."""
    bystander = Bystander(soak.url)
    bystander.start()
    try:
        yield bystander
    finally:
        bystander.stop()


def test_a_thousand_aborts_leave_nothing_behind(soak: Soak) -> None:
    draw = random.Random(seed := 5)
    print("seed", seed)
    with beside_a_bystander(soak):
        for _ in range(1000):
            request = ask(
                stream=draw.random() < 0.7,
                prompt="x" * draw.choice([3, 40, 400]),
                max_tokens=draw.choice([1, 50]),
                n=draw.choice([1, 1, 3]),
            )
            with soak.connect() as connection:
                kind = draw.choice(["connect", "part", "queued", "begun", "reset"])
                if kind == "part":
                    connection.sendall(request[: draw.randrange(len(request))])
                elif kind != "connect":
                    connection.sendall(request)
                if kind == "begun":
                    connection.recv(draw.choice([1, 2000]))
                if kind == "reset":
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    soak.check_nothing_is_left()


def test_five_hundred_idle_connections_disturb_nobody(soak: Soak) -> None:
    with contextlib.ExitStack() as stack, beside_a_bystander(soak) as bystander:
        idle = [stack.enter_context(soak.connect()) for _ in range(500)]
        assert soak.count_connections() >= 500
        done = len(bystander.answers)
        wait_until(lambda: len(bystander.answers) > done)
        for connection in idle:
            assert connection.recv(1) == b""  # closed by the server, in its time
    soak.check_nothing_is_left()


def test_readers_of_a_byte_a_time_are_closed_and_disturb_nobody(soak: Soak) -> None:
    request = ask(stream=True, max_tokens=400, logprobs=5, n=4)
    with contextlib.ExitStack() as stack, beside_a_bystander(soak):
        readers = []
        for _ in range(10):
            reader = stack.enter_context(soak.connect())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.sendall(request)
            readers.append(reader)
        for _ in range(40):
            for reader in readers:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    reader.settimeout(0.005)
                    reader.recv(1)
            time.sleep(0.02)
        wait_until(lambda: httpx.get(f"{soak.url}/health").json()["live"] <= 1)
    soak.check_nothing_is_left()


def test_slow_heads_and_bodies_are_closed_and_disturb_nobody(soak: Soak) -> None:
    request = ask(max_tokens=1)
    with contextlib.ExitStack() as stack, beside_a_bystander(soak):
        slow = [stack.enter_context(soak.connect()) for _ in range(100)]
        for place, connection in enumerate(slow):
            connection.sendall(request[: -1 if place % 2 else 20])
        for connection in slow:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    soak.check_nothing_is_left()
