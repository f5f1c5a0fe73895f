"""Every row of bad input is the sender's error, in the one shape, and holds nothing afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from loopback import Running
from scripted_llm import CONTEXT_TOKENS, MODEL, VOCAB_SIZE, ScriptedLLM
from twostroke.server.app import create_app
from twostroke.server.settings import ServerSettings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hi"}]
CALL = {"id": "7", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@dataclass(frozen=True)
class Row:
    """A request, and the answer it must have; None leaves param or code open."""

    name: str
    path: str
    body: bytes
    status: int = 400
    param: str | None = None
    code: str | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: JSON)


def completion(name: str, param: Any = None, code: Any = None, **fields: Any) -> Row:
    """A completion that is right but for `fields`."""
    body = {"model": MODEL, "prompt": "a", **fields}
    return Row(name, COMPLETIONS, json.dumps(body).encode(), param=param, code=code)


def chat(name: str, param: Any = None, code: Any = None, **fields: Any) -> Row:
    """A chat completion that is right but for `fields`."""
    body = {"model": MODEL, "messages": HELLO, **fields}
    return Row(name, CHAT, json.dumps(body).encode(), param=param, code=code)


def message(name: str, param: str, **fields: Any) -> Row:
    """A chat completion whose second message is `fields`."""
    return chat(name, f"messages.1{param}", messages=[*HELLO, fields])


def raw(name: str, text: bytes, status: int = 400) -> list[Row]:
    """The same bytes to both routes."""
    return [Row(f"{name} ({path})", path, text, status) for path in (COMPLETIONS, CHAT)]


def with_value(text: str) -> bytes:
    """A completion whose temperature is `text`, as it stands."""
    return f'{{"model": "{MODEL}", "prompt": "a", "temperature": {text}}}'.encode()


PROMPTS = [
    completion("no prompt", "prompt", prompt=None),
    completion("empty prompt", prompt=""),
    completion("no prompts", "prompt", prompt=[]),
    completion("one of the prompts is empty", prompt=["a", ""]),
    completion("no token ids in one prompt", prompt=[[1], []]),
    completion("prompt too long", None, "context_length_exceeded", prompt="a" * CONTEXT_TOKENS),
    completion("token ids too many", None, "context_length_exceeded", prompt=[1] * CONTEXT_TOKENS),
    completion("token id too large", "prompt", prompt=[VOCAB_SIZE]),
    completion("token id negative", "prompt", prompt=[1, -1]),
    completion("token id huge", "prompt", prompt=[2**63]),
    completion("token id a float", "prompt", prompt=[1.5]),
    completion("token id a bool", "prompt", prompt=[True]),
    completion("text and token ids", "prompt", prompt=["a", 1]),
    completion("prompt an object", "prompt", prompt={"text": "a"}),
    completion("prompt a number", "prompt", prompt=7),
    completion("prompts nested too far", "prompt", prompt=[[["a"]]]),
    completion("too many choices", "n", prompt=["a"] * 100, n=100),
]

PARAMETERS = [
    completion(f"{name} {value!r}", name, **{name: value})
    for name, values in {
        "n": (0, -1, 129, 10**9, 1.5, "1", True),
        "temperature": (-0.1, 1e9, "hot", True, [1]),
        "top_p": (-1, 1.1, "1"),
        "top_k": (-2, 2**40, 1.5),
        "min_p": (-0.1, 1.5),
        "repetition_penalty": (0, -1, 1e9),
        "presence_penalty": (-2.1, 2.1, "0"),
        "frequency_penalty": (-3, 3),
        "seed": (2**64 - 1 + 0.5, "7", 1.5),
        "max_tokens": (0, -1, 2**40, 1.5, "9", False),
        "min_tokens": (-1, 17),
        "stop": (7, [7], {"a": 1}, [""], ["a"] * 17, "a" * 300),
        "stop_token_ids": ([-1], ["a"], 7, [2**40]),
        "ignore_eos": (1, "true"),
        "logprobs": (-1, 21, True, "1"),
        "logit_bias": ({"x": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, [1], {"1" * 40: 1}),
        "echo": (1, "yes"),
        "stream": (1, "yes"),
        "priority": ("high", 1.5),
        "suffix": ("end",),
        "best_of": (2, "1"),
        "model": (7, ["a"]),
        "max_token": (5,),
        "guided_json": ({"type": "object"},),
    }.items()
    for value in values
] + [
    completion("stream options without stream", "stream_options", stream_options={}),
    completion(
        "stream options unknown", "stream_options.x", stream=True, stream_options={"x": True}
    ),
    completion("a very long name", **{"a" * 5000: 1}),
    completion("a very long key", "logit_bias", logit_bias={"a" * 5000: "b"}),
]

CHATS = [
    chat("no messages", "messages", messages=None),
    chat("empty messages", "messages", messages=[]),
    chat("messages a string", "messages", messages="hi"),
    chat("message a string", "messages.0", messages=["hi"]),
    chat("template refuses", "messages", "invalid_messages", messages=[
        {"role": "tool", "content": "1"}
    ]),
    chat("prompt too long", None, "context_length_exceeded", messages=[
        {"role": "user", "content": "a" * CONTEXT_TOKENS}
    ]),
    message("no role", ".role", content="a"),
    message("unknown role", ".role", role="robot", content="a"),
    message("role a number", ".role", role=7, content="a"),
    message("no content", ".content", role="user"),
    message("content a number", ".content", role="user", content=7),
    message("a picture", ".content", role="user", content=[{"type": "image_url", "image_url": {}}]),
    message("a part without text", ".content", role="user", content=[{"type": "text"}]),
    message("tool calls of a user", ".tool_calls", role="user", content="a", tool_calls=[CALL]),
    message("a field nobody knows", ".mood", role="user", content="a", mood="good"),
    chat("max tokens twice", "max_tokens", max_tokens=3, max_completion_tokens=4),
    chat("max completion tokens", "max_completion_tokens", max_completion_tokens=0),
    chat("logprobs a number", "logprobs", logprobs=1),
    chat("top logprobs alone", "top_logprobs", top_logprobs=1),
    chat("top logprobs too many", "top_logprobs", logprobs=True, top_logprobs=21),
    chat("an unknown format", "response_format.type", response_format={"type": "xml"}),
    chat("no JSON schema", "response_format.json_schema", response_format={"type": "json_schema"}),
    chat("two formats", "structured_outputs", response_format={"type": "json_object"},
         structured_outputs={"regex": "a"}),
    chat("no structure", "structured_outputs", structured_outputs={}),
    chat("two structures", "structured_outputs", structured_outputs={"regex": "a", "json": {}}),
    chat("an unknown structure", "structured_outputs", structured_outputs={"xml": "a"}),
    chat("a long regex", "structured_outputs", structured_outputs={"regex": "a" * 20_000}),
    chat("a long schema", "response_format", response_format={"type": "json_schema",
         "json_schema": {"name": "a", "schema": {"const": "a" * 300_000}}}),
    chat("no end token beside a structure", "ignore_eos", ignore_eos=True,
         structured_outputs={"regex": "a"}),
    chat("tools", "tools", tools=[{"type": "function"}]),
    chat("a tool's odd name", "tools.0.function.name", tools=[
        {"type": "function", "function": {"name": "a b"}}
    ]),
    chat("a tool that is not there", "tool_choice", tool_choice={
        "type": "function", "function": {"name": "a"}
    }),
    chat("an odd choice", "tool_choice", tool_choice="some"),
    chat("a required tool", "tool_choice", tool_choice="required"),
    chat("a field of the other API", "prompt", prompt="a"),
    chat("functions", "functions", functions=[]),
]  # fmt: skip

BODIES = [
    *raw("empty", b""),
    *raw("blanks", b" \n "),
    *raw("not JSON", b"hello"),
    *raw("half", b'{"model": "scrip'),
    *raw("an array", b"[]"),
    *raw("null", b"null"),
    *raw("an empty object", b"{}"),
    *raw("not UTF-8", b'{"model": "\xff"}'),
    *raw("UTF-16", '{"model": "a"}'.encode("utf-16")),
    *raw("a byte order mark", b"\xef\xbb\xbf{}"),
    *raw("a zero byte", b'{"model": "a\x00"}'),
    *raw("100,000 arrays deep", b"[" * 100_000),
    *raw("100,000 objects deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    *raw("100 arrays deep", b'{"tools": ' + b"[" * 100 + b"]" * 100 + b"}"),
    *raw("half a character", b'{"model": "\\ud83d"}'),
    *raw("half a character as a name", b'{"\\udc00": 1}'),
    *raw("too large", b'{"model": "' + b"a" * 2**20 + b'"}', 413),
    *(
        Row(f"a number like {text[:12]}", COMPLETIONS, with_value(text))
        for text in (
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "9" * 30,
            "-" + "9" * 5000,
            "01",
            "+1",
        )
    ),
    Row("form data", COMPLETIONS, b"model=a", 415, headers={"content-type": "text/plain"}),
    Row("no content type", COMPLETIONS, b"{}", 415, headers={}),
]

ROUTES = [
    completion("no model", "model", model=None),
    *(
        Row(
            f"unknown model {path}",
            path,
            json.dumps(body).encode(),
            404,
            "model",
            "model_not_found",
        )
        for path, body in (
            (COMPLETIONS, {"model": "nobody", "prompt": "a"}),
            (CHAT, {"model": "", "messages": HELLO}),
        )
    ),
    *(
        Row(f"{method} {path}", path, b"", status, method=method, headers={})
        for method, path, status in (
            ("GET", COMPLETIONS, 405),
            ("PUT", CHAT, 405),
            ("DELETE", "/v1/models", 405),
            ("POST", "/health", 405),
            ("POST", "/metrics", 405),
            ("GET", "/", 404),
            ("GET", "/" + "a" * 5000, 404),
            ("GET", "/v1/models/" + "a" * 5000, 404),
            ("GET", "/v1/models/nobody", 404),
            ("GET", "/v1/models/", 404),
            ("GET", "/v1/models/a%2Fb%00", 404),
            ("POST", COMPLETIONS + "/", 404),
            ("GET", "/docs", 404),
        )
    ),
]

ROWS = [*PROMPTS, *PARAMETERS, *CHATS, *BODIES, *ROUTES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_refused_in_the_one_shape(
    server: Running, http: httpx.Client, row: Row
) -> None:
    reply = http.request(row.method, row.path, content=row.body, headers=row.headers)
    assert reply.status_code == row.status, reply.text
    check_shape(reply)
    error = reply.json()["error"]
    if row.param is not None:
        # A part of the field is a closer place: "stop_token_ids.0".
        assert f"{error['param']}.".startswith(f"{row.param}."), error
    if row.code is not None:
        assert error["code"] == row.code, error
    assert len(error["message"]) < 400
    assert server.engine.live == set()


def check_shape(reply: httpx.Response) -> None:
    """Assert that a reply is an error as the OpenAI API words it."""
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req-")
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "server_error")


def find_routes() -> dict[str, set[str]]:
    """The paths of an application, with the methods that each takes."""
    app = create_app(ScriptedLLM(), ServerSettings())  # type: ignore[arg-type]
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes) >= 6
    methods: dict[str, set[str]] = {}
    for route in routes:
        methods.setdefault(route.path, set()).update(route.methods or ())
    return methods


@pytest.mark.parametrize(("path", "taken"), find_routes().items())
def test_every_route_refuses_what_it_does_not_take(
    http: httpx.Client, path: str, taken: set[str]
) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - taken:
        reply = http.request(method, path.replace("{name:path}", "x"), content=b"{}", headers=JSON)
        assert reply.status_code == 405
        assert set(reply.headers["allow"].split(", ")) <= taken
        check_shape(reply)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_unexpected_failure_is_named_only_in_the_log(
    server: Running, http: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.refusal = ZeroDivisionError("a secret")
    body = {"model": MODEL, ("prompt" if path == COMPLETIONS else "messages"): HELLO}
    if path == COMPLETIONS:
        body["prompt"] = "a"
    reply = http.post(path, json=body)
    assert reply.status_code == 500
    check_shape(reply)
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"] in reply.text
    assert reply.headers["x-request-id"] in caplog.text
    assert "a secret" in caplog.text


def test_a_misspelt_field_is_answered_with_the_right_name(http: httpx.Client) -> None:
    reply = http.post(COMPLETIONS, json={"model": MODEL, "prompt": "a", "max_token": 5})
    assert "did you mean max_tokens?" in reply.json()["error"]["message"]


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=model, prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt="a" * CONTEXT_TOKENS)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="a")
    assert unknown.value.code == "model_not_found"


def test_a_refused_prompt_takes_the_others_with_it(server: Running, http: httpx.Client) -> None:
    server.engine.gate.clear()
    reply = http.post(COMPLETIONS, json={"model": MODEL, "prompt": ["a", "b", ""]})
    assert reply.status_code == 400
    assert len(server.engine.seen) == 2
    assert server.engine.live == set()
