"""`twostroke serve` with a real model, killed in the middle of a stream and started again."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from places import get_model_path

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
TOKENS, CUT = 48, 12
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me of the sea."}],
    "stream": True,
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "temperature": 0.8,
    "seed": 5,
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of its own, so that no other server's state is met, with the models of the real."""
    real = get_model_path(MODEL).parent.parent
    for name in ("models", "packed", "tokenizers", "digests", "calibration"):
        if (real / name).exists():
            (tmp_path / name).symlink_to(real / name)
    return tmp_path


def find_port() -> int:
    """A port that was free just now; on port 0 nobody would find the next server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(cache: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`twostroke serve`, until the end of the block or its own."""
    command = [sys.executable, "-m", "twostroke", "serve", MODEL, "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--max-rows", "4", "--kv-memory", "64MiB"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TWOSTROKE_CACHE": str(cache)},
    )
    with server:
        try:
            assert server.stderr is not None
            said = ""
            while (found := re.search(r"http://\S+", said)) is None:
                line = server.stderr.readline()
                assert line, said
                said += line
            yield server, found[0]
        finally:
            server.kill()


def read(text: str) -> tuple[str, list[int]]:
    """What was said, and the numbers of its events."""
    said, numbers = "", []
    for event in text.split("\n\n")[:-1]:
        number, data = event.split("\n")
        numbers.append(int(number.removeprefix("id: ")))
        if data != "data: [DONE]":
            said += json.loads(data.removeprefix("data: "))["choices"][0]["delta"].get(
                "content", ""
            )
    return said, numbers


def test_a_stream_goes_on_behind_a_server_that_was_killed(cache: Path) -> None:
    port, cut = find_port(), ""
    with httpx.Client(timeout=60, trust_env=False) as client:
        with serve(cache, port) as (server, url):
            try:
                with client.stream("POST", f"{url}/chat/completions", json=BODY) as reply:
                    for piece in reply.iter_text():
                        cut += piece
                        if cut.count("\n\n") >= CUT:
                            server.kill()
            except httpx.HTTPError:
                pass  # the end of a reply whose server is gone
        cut = cut[: cut.rfind("\n\n") + 2]
        first, numbers = read(cut)
        stream_id = json.loads(cut.split("data: ", 1)[1].split("\n")[0])["id"]
        with serve(cache, port) as (_, url):
            last = {"Last-Event-ID": str(numbers[-1])}
            rest, more = read(client.get(f"{url}/streams/{stream_id}", headers=last).text)
            whole, whole_numbers = read(client.post(f"{url}/chat/completions", json=BODY).text)
    assert CUT <= len(numbers) < len(whole_numbers)
    assert numbers + more == whole_numbers
    assert first + rest == whole
