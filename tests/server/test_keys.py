"""Keys: their file, their check, and that no route is forgotten behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, ScriptedLLM
from twostroke.errors import InvalidParameter
from twostroke.server.app import create_app
from twostroke.server.gate import OPEN_PATHS
from twostroke.server.keys import Key, KeyRing, format_line, hash_key, make_key, read_key_file
from twostroke.server.limits import Limits
from twostroke.server.settings import ServerSettings

RIGHT, SLOW, ANONYMOUS = "sk-right", "sk-slow", "sk-anonymous"
KEYS = (
    Key("alice", hash_key(RIGHT)),
    Key("bob", hash_key(SLOW), per_minute=2),
    Key("", hash_key(ANONYMOUS)),
)
BODIES = {
    "/v1/completions": {"model": MODEL, "prompt": "a"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
}
# Every route of the application, as it says itself.
ROUTES = sorted(
    (method, route.path.replace("{name:path}", MODEL))
    for route in create_app(ScriptedLLM(), ServerSettings()).routes
    for method in route.methods - {"HEAD"}
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server that asks for keys."""
    engine = ScriptedLLM()
    settings = ServerSettings(keys=KEYS, limits=Limits(streams_per_key=2))
    with run_server(engine, settings) as url:
        yield Running(url, engine)


def call(
    guarded: Running, method: str, path: str, key: str | None, **fields: object
) -> httpx.Response:
    """One request with a key, or with none."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {**BODIES.get(path, {}), **fields} if method == "POST" else None
    return httpx.request(method, guarded.url + path, json=body, headers=headers, timeout=20)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_asks_for_a_key(guarded: Running, method: str, path: str) -> None:
    expected = 200 if path in OPEN_PATHS else 401
    for key in (None, "sk-wrong", RIGHT + "x", RIGHT[:-1]):
        reply = call(guarded, method, path, key)
        assert reply.status_code == expected, key
        if expected == 401:
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_opens_to_a_right_key(guarded: Running, method: str, path: str) -> None:
    if "{" in path:
        assert call(guarded, method, path, RIGHT).status_code == 404
    else:
        assert call(guarded, method, path, RIGHT).status_code in (200, 400)


def test_only_health_is_open() -> None:
    assert {"/health"} == OPEN_PATHS


def test_a_path_nobody_serves_tells_nothing_without_a_key(guarded: Running) -> None:
    assert call(guarded, "GET", "/v2/secrets", None).status_code == 401
    assert call(guarded, "GET", "/v2/secrets", RIGHT).status_code == 404
    assert call(guarded, "OPTIONS", "/v1/models", None).status_code == 401


@pytest.mark.parametrize("header", ["Basic sk-right", "sk-right", "Bearer", "Bearer sk-right x"])
def test_a_key_is_presented_one_way(guarded: Running, header: str) -> None:
    url = f"{guarded.url}/v1/models"
    assert httpx.get(url, headers={"authorization": header}).status_code == 401


def test_a_local_server_answers_to_names_of_this_machine_only() -> None:
    with run_server(ScriptedLLM(), ServerSettings(is_local=True)) as url:

        def call_as(host: str) -> int:
            return httpx.get(f"{url}/v1/models", headers={"host": host}).status_code

        assert call_as("localhost:8000") == call_as("127.0.0.1") == call_as("[::1]:80") == 200
        assert call_as("evil.example") == call_as("localhost.evil.example:8000") == 403
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 200


def test_a_key_is_never_part_of_an_answer(guarded: Running) -> None:
    assert "sk-wrong" not in call(guarded, "GET", "/v1/models", "sk-wrong").text


def test_the_key_names_the_tenant_and_keeps_prefixes_apart(guarded: Running) -> None:
    guarded.engine.reset()
    call(guarded, "POST", "/v1/completions", RIGHT, user="somebody else")
    call(guarded, "POST", "/v1/completions", ANONYMOUS, user="carol")
    alice, carol = guarded.engine.senders
    assert (alice.tenant, alice.cache_scope) == ("alice", "alice")
    assert (carol.tenant, carol.cache_scope) == ("carol", "")


def test_a_key_over_its_rate_hears_when_to_come_back(guarded: Running) -> None:
    statuses = [call(guarded, "POST", "/tokenize", SLOW).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = call(guarded, "POST", "/tokenize", SLOW)
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["code"] == "rate"
    assert call(guarded, "POST", "/tokenize", RIGHT).status_code == 200


def test_a_key_has_so_many_requests_at_once(guarded: Running) -> None:
    guarded.engine.reset()
    guarded.engine.gate.clear()
    headers = {"authorization": f"Bearer {RIGHT}"}
    url = f"{guarded.url}/v1/completions"
    body = {**BODIES["/v1/completions"], "stream": True}
    with httpx.Client(headers=headers, timeout=20) as client:
        held = [threading.Thread(target=client.post, args=(url,), kwargs={"json": body})]
        held += [threading.Thread(target=client.post, args=(url,), kwargs={"json": body})]
        for thread in held:
            thread.start()
        wait_until(lambda: len(guarded.engine.live) == 2)
        refused = client.post(url, json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "streams"
        assert call(guarded, "POST", "/v1/completions", ANONYMOUS, max_tokens=0).status_code == 400
        guarded.engine.gate.set()
        for thread in held:
            thread.join(20)
        assert client.post(url, json=body).status_code == 200


def test_a_key_file_is_read(tmp_path: Path) -> None:
    key = make_key()
    path = tmp_path / "keys"
    lines = ["# ours", "", format_line("alice", key), format_line("b.o-b_1", "x", 60) + "  # slow"]
    path.write_text("\n".join(lines))
    alice, bob = read_key_file(path)
    assert alice == Key("alice", hash_key(key))
    assert (bob.tenant, bob.per_minute) == ("b.o-b_1", 60)
    ring = KeyRing([alice, bob])
    assert ring.find(f"bearer {key}") == alice
    assert ring.find(f"Bearer {key[:-1]}") is None
    assert ring.find(None) is None
    assert ring.find("Bearer \udcff") is None


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice sha256:123",
        "alice " + "0" * 64,
        "al ice sha256:" + "0" * 64,
        "alice sha256:" + "0" * 64 + " rate=0",
        "alice sha256:" + "0" * 64 + " rate=1 more",
        "alice sha256:" + "0" * 64 + "\nbob sha256:" + "0" * 64,
        "# nothing",
    ],
)
def test_a_bad_key_file_is_refused_without_its_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(line)
    with pytest.raises(InvalidParameter, match="key_file") as caught:
        read_key_file(path)
    assert "alice" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="key_file"):
        read_key_file(tmp_path / "none")


def test_fresh_keys_differ() -> None:
    assert len({make_key() for _ in range(100)}) == 100
