"""Whatever JSON a client sends, the server answers it, and blames nobody but the sender."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopback import Running
from scripted_llm import MODEL
from twostroke.server.schemas import IGNORED, ChatFields, CommonFields, CompletionFields

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

NAMES = st.sampled_from(
    sorted(
        {
            *CommonFields.model_fields,
            *CompletionFields.model_fields,
            *ChatFields.model_fields,
            *IGNORED,
        }
    )
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 3, -1, 255, 256])
    | st.floats()
    | st.text(max_size=4)
    | st.text(st.characters(categories=["Cs"]), min_size=1, max_size=1)
    | st.sampled_from([MODEL, "none", "auto", "user", "tool"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "7", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
SOUND: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "a"},
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
}


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from([COMPLETIONS, CHAT]), fields=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_json_is_answered(
    server: Running, http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    body = json.dumps({**SOUND[path], **fields}).encode()
    reply = http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert server.engine.live == set()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=40))
def test_any_bytes_are_answered(server: Running, http: httpx.Client, body: bytes) -> None:
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
