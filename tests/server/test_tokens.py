"""/tokenize, /detokenize and /ready."""

from __future__ import annotations

import httpx
import pytest

from loopback import Running
from scripted_llm import BOS, CONTEXT_TOKENS


def test_a_text_is_its_tokens_and_back(http: httpx.Client) -> None:
    reply = http.post("/tokenize", json={"prompt": "sea", "return_token_strs": True}).json()
    assert reply == {
        "count": 4,
        "max_model_len": CONTEXT_TOKENS,
        "tokens": [BOS, *b"sea"],
        "token_strs": ["<s>", "s", "e", "a"],
    }
    back = http.post("/detokenize", json={"model": "scripted", "tokens": list(b"sea")})
    assert back.json() == {"prompt": "sea"}


def test_special_tokens_are_left_out_on_request(http: httpx.Client) -> None:
    reply = http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()
    assert (reply["tokens"], reply["token_strs"]) == ([97], None)


def test_a_conversation_goes_through_the_template(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert bytes(http.post("/tokenize", json=body).json()["tokens"]) == b"<user>hi"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [999]}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


def test_no_tokens_are_no_text(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_an_engine_that_works_is_ready_and_one_that_died_is_not(
    server: Running, http: httpx.Client
) -> None:
    assert http.get("/ready").json() == {"status": "ready"}
    server.engine.dead = "it died"
    assert http.get("/ready").status_code == 503
