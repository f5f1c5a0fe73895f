"""The OpenAPI document: whole, and true of what the server does."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from loopback import Running, run_server, wait_until
from scripted_llm import ScriptedLLM
from twostroke.server.app import create_app
from twostroke.server.keys import Key, hash_key
from twostroke.server.settings import ServerSettings

APP = create_app(ScriptedLLM(), ServerSettings())


def test_every_route_is_described_and_nothing_else(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    described = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    served = {
        (method, route.path.replace(":path}", "}"))
        for route in APP.routes
        for method in route.methods - {"HEAD"}
    }
    assert described == served


def test_every_refusal_has_the_one_shape(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for item in document["paths"].values():
        for operation in item.values():
            assert {"200", "400", "401", "404", "503"} <= operation["responses"].keys()
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}


def test_keys_are_in_it_where_they_are_asked_for() -> None:
    with run_server(ScriptedLLM(), ServerSettings(keys=(Key("a", hash_key("sk-right")),))) as url:
        headers = {"authorization": "Bearer sk-right"}
        document = httpx.get(f"{url}/openapi.json", headers=headers).json()
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]


@pytest.fixture(scope="module")
def described() -> Iterator[Running]:
    """A server whose answers are held against its document."""
    engine = ScriptedLLM()
    with run_server(engine) as url:
        yield Running(url, engine)


# What a schema cannot say is refused although the data fits it: a name that is not served, a token
# beyond the vocabulary, stream_options without stream.
UNSAYABLE = [checks.positive_data_acceptance]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_server_does_what_its_document_says(described: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{described.url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong with it
        count += 1

        @settings(
            max_examples=80,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def hold(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=UNSAYABLE, timeout=20)

        hold()
    assert count >= 4
    assert httpx.get(f"{described.url}/health").json()["live"] == 0
    assert not described.engine.live


HOSTILE_INPUTS: list[Any] = [
    "a" * 1_000_000,
    [{"role": "user", "content": "a"}] * 10_000,
    [{"role": "user", "content": [{"type": "input_text", "text": "a"}] * 100_000}],
    [{"type": "function_call", "call_id": None, "name": [], "arguments": {}}],
    [{"type": "function_call_output", "call_id": 1, "output": None}],
    [{"id": {}, "type": [], "role": 1, "content": 2}],
    [None],
]
HOSTILE = [
    b"",
    b"{",
    b'{"model": "scripted", "prompt": "a"',
    b"[" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"model":"scripted","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model":"scripted","prompt":"\\ud800"}',
    b'{"model":"scripted","prompt":"a","seed":NaN}',
    b'{"model":"scripted","prompt":"a","temperature":Infinity}',
    b'{"model":"scripted","prompt":"a","seed":' + b"9" * 100_000 + b"}",
    b'{"model":"scripted","prompt":"a","temperature":1e999999}',
    b'{"model":"scripted","prompt":"a","n":1e3}',
    b'{"model":"scripted","prompt":"\xff\xfe"}',
    json.dumps({"model": "scripted", "prompt": "a", "user": "\x00\x1b"}).encode(),
    json.dumps({"model": "scripted", "prompt": ["a"] * 100_000}).encode(),
    json.dumps({"model": "scripted", **{f"field{i}": i for i in range(10_000)}}).encode(),
    json.dumps({"tokens": [-1, 2**63, 10**19]}).encode(),
    json.dumps({"tokens": [2**32] * 100_000}).encode(),
    json.dumps({"prompt": "a" * 1_000_000}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a"}] * 10_000}).encode(),
    # Stored, they would be kept for a day, as asked.
    *(
        json.dumps({"model": "scripted", "input": value, "store": False}).encode()
        for value in HOSTILE_INPUTS
    ),
]


POSTS = sorted(route.path for route in APP.routes if "POST" in route.methods)


def count_live_blocks() -> int:
    """Pieces of memory that Python objects of this process take, server and client together.

    Not its resident bytes: how much an allocator holds back depends on all that ran before.
    """
    gc.collect()
    return sys.getallocatedblocks()


def test_hostile_bodies_are_refused_and_leave_no_memory_behind(
    described: Running, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=described.url, timeout=20, headers=headers) as client:

        def send_all() -> int:
            sent = 0
            for path in POSTS:
                if "{" in path:
                    continue
                for body in HOSTILE:
                    reply = client.post(path, content=body)
                    assert reply.status_code < 500, (path, body[:60], reply.text)
                    sent += 1
            return sent

        # What is left behind is left behind by every round: an object a request, say.
        counts = []
        for _ in range(5):
            sent = send_all()
            wait_until(lambda: not described.engine.live)
            described.engine.reset()  # it notes all that it is asked
            caplog.clear()
            counts.append(count_live_blocks())
        assert min(later - earlier for earlier, later in itertools.pairwise(counts)) < sent
