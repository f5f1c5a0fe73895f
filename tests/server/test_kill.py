"""`kill -9` of the server, or of its executor as well, at tokens of streams: the rest is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TOKENS = 48
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "tell me of the sea"}],
    "stream": True,
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 12, "maxLength": 18},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {**BODY, "temperature": 0.0},
    "sampled": {**BODY, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2},
    "three": {**BODY, "seed": 6, "n": 3},
    "logprobs": {**BODY, "seed": 7, "logprobs": True, "top_logprobs": 3},
    "json": {
        **BODY,
        "seed": 8,
        "ignore_eos": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": SCHEMA},
        },
    },
}


@contextmanager
def start(state: Path, is_isolated: bool = False) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server; it is killed in the end."""
    paths, kind = [str(HERE), str(HERE.parent)], ["isolated"] if is_isolated else []
    process = subprocess.Popen(
        [sys.executable, str(HERE / "kill_server.py"), str(state), "0", *kind],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        assert process.stdout is not None
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def read(client: httpx.Client, url: str, body: dict[str, Any]) -> str:
    """A stream for as long as its server lives."""
    text = ""
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            for piece in reply.iter_text():
                text += piece
    except httpx.HTTPError:
        pass
    return text[: text.rfind("\n\n") + 2]


def parse(text: str) -> list[tuple[int, Any]]:
    """Events by number, without what differs between two requests for the same."""
    events = []
    for event in text.split("\n\n")[:-1]:
        number, data = event.split("\n")
        chunk = data.removeprefix("data: ")
        value = json.loads(chunk) if chunk != "[DONE]" else chunk
        if isinstance(value, dict):
            value.pop("id")
            value.pop("created")
            if value.get("usage"):
                value["usage"].pop("prompt_tokens_details")
        events.append((int(number.removeprefix("id: ")), value))
    return events


def by_choice(events: list[tuple[int, Any]]) -> dict[int | None, list[Any]]:
    """What was said of each choice, in order."""
    said: dict[int | None, list[Any]] = {}
    for _, value in events:
        choices = value["choices"] if isinstance(value, dict) else []
        said.setdefault(choices[0]["index"] if choices else None, []).append(value)
    return said


def read_all(client: httpx.Client, url: str, bodies: dict[str, dict[str, Any]]) -> dict[str, str]:
    """All streams at once."""
    texts: dict[str, str] = {}

    def run(name: str) -> None:
        texts[name] = read(client, url, bodies[name])

    threads = [threading.Thread(target=run, args=(name,)) for name in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


@dataclass(frozen=True)
class Undisturbed:
    """What is asked for, and what it gives when nobody is killed."""

    bodies: dict[str, dict[str, Any]]
    whole: dict[str, list[tuple[int, Any]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """One stream more than BODIES: it stops at a text of the greedy one."""
    with (
        httpx.Client(timeout=60, trust_env=False) as client,
        start(tmp_path_factory.mktemp("whole")) as (_, url),
    ):
        whole = {name: parse(text) for name, text in read_all(client, url, BODIES).items()}
        greedy = "".join(
            value["choices"][0]["delta"].get("content", "")
            for _, value in whole["greedy"]
            if isinstance(value, dict) and value["choices"]
        )
        bodies = {**BODIES, "stop": {**BODIES["greedy"], "stop": [greedy[14:24]]}}
        whole["stop"] = parse(read(client, url, bodies["stop"]))
    assert 14 < len(whole["stop"]) < len(whole["greedy"])
    return Undisturbed(bodies, whole)


def check_rest(client: httpx.Client, url: str, texts: dict[str, str], expected: Undisturbed) -> int:
    """Every stream that was cut off, joined with its rest, is the undisturbed one.

    Returns how many were cut off.
    """
    cut_short = 0
    for name, text in texts.items():
        first, whole = parse(text), expected.whole[name]
        if not first:
            continue  # killed before its client knew its id
        cut_short += len(first) < len(whole)
        stream_id = json.loads(text.split("data: ", 1)[1].split("\n")[0])["id"]
        last = {"Last-Event-ID": str(first[-1][0])}
        reply = client.get(f"{url}/v1/streams/{stream_id}", headers=last)
        joined = first + parse(reply.text)
        assert [number for number, _ in joined] == list(range(1, len(joined) + 1))
        if name != "three":
            assert joined == whole, name
        assert by_choice(joined) == by_choice(whole), name
    return cut_short


def test_killed_at_any_token_every_stream_goes_on_exactly(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    when = range(1, TOKENS + 5, int(os.environ.get("KILL_STRIDE", "6")))
    cut_short = 0
    with httpx.Client(timeout=60, trust_env=False) as client:
        for steps in when:
            print(f"killed after {steps} steps")
            (tmp_path / "steps").write_text(str(steps))
            with start(tmp_path) as (process, url):
                killer = threading.Thread(target=kill_when_held, args=(process,))
                killer.start()
                texts = read_all(client, url, undisturbed.bodies)
                process.kill()
                killer.join()
            (tmp_path / "steps").unlink()
            with start(tmp_path) as (_, url):
                cut_short += check_rest(client, url, texts, undisturbed)
    assert cut_short > len(when)


def test_server_and_executor_killed_together_lose_nothing(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    when = range(3, TOKENS, int(os.environ.get("KILL_STRIDE", "15")))
    cut_short = 0
    with httpx.Client(timeout=60, trust_env=False) as client:
        for steps in when:
            print(f"both killed after {steps} steps")
            (tmp_path / "steps").write_text(str(steps))
            with start(tmp_path, is_isolated=True) as (process, url):
                texts = read_all(client, url, undisturbed.bodies)
                assert process.wait(60) == -signal.SIGKILL
            (tmp_path / "steps").unlink()
            with start(tmp_path, is_isolated=True) as (_, url):
                cut_short += check_rest(client, url, texts, undisturbed)
    assert cut_short > len(when)


def kill_when_held(process: subprocess.Popen[str]) -> None:
    """Kill a server once it stands still, or when it has ended otherwise."""
    assert process.stdout is not None
    if process.stdout.readline().strip() == "held":
        os.kill(process.pid, signal.SIGKILL)
