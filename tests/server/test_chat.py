"""/v1/chat/completions through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from loopback import Running
from scripted_llm import REPLY

HELLO: Any = [{"role": "user", "content": "hi"}]


def test_a_message_is_answered_and_counted(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=HELLO)
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert reply.system_fingerprint is not None
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert reply.usage is not None
    # The template's text brings its own special tokens: none is added before it.
    assert reply.usage.prompt_tokens == len("<user>hi")


def test_the_answer_is_as_long_as_the_context_allows(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    client.chat.completions.create(model=model, messages=HELLO)
    client.chat.completions.create(model=model, messages=HELLO, max_tokens=3)
    client.chat.completions.create(model=model, messages=HELLO, max_completion_tokens=4)
    assert [params.max_tokens for _, params, _ in server.engine.seen] == [None, 3, 4]


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_opens_with_the_role_and_ends_with_the_reason(
    client: openai.OpenAI, model: str, n: int
) -> None:
    with client.chat.completions.create(model=model, messages=HELLO, stream=True, n=n) as stream:
        chunks = list(stream)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    for index in range(n):
        own = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert all(one.delta.role is None for one in own[1:])
        assert "".join(one.delta.content or "" for one in own) == REPLY
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["stop"]


def test_usage_comes_last_in_a_stream_that_asks(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.create(
        model=model, messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode())


def test_logprobs_carry_bytes_and_alternatives(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=HELLO, logprobs=True, top_logprobs=2, n=2
    )
    for choice in reply.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert bytes(byte for one in content for byte in one.bytes or ()).decode() == REPLY
        assert (content[0].token, content[2].token) == ("G", "\\xc3")
        assert [len(one.top_logprobs) for one in content] == [2] * len(content)
        assert content[0].top_logprobs[1].logprob == -1.5


def test_logprobs_alone_report_the_chosen_tokens_only(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=HELLO, logprobs=True)
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content
    assert all(one.top_logprobs == [] for one in content)


def test_streamed_logprobs_joined_are_those_of_the_reply(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=HELLO, logprobs=True)
    with client.chat.completions.create(
        model=model, messages=HELLO, logprobs=True, stream=True
    ) as stream:
        joined = [
            entry
            for chunk in stream
            for one in chunk.choices
            if one.logprobs is not None
            for entry in one.logprobs.content or ()
        ]
    assert whole.choices[0].logprobs is not None
    assert joined == whole.choices[0].logprobs.content


def test_messages_reach_the_template_in_its_words(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}] * 2},
        {"role": "assistant", "content": "yes", "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "7", "content": "42"},
    ]
    client.chat.completions.create(model=model, messages=messages)
    assert server.engine.rendered == [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\na", "name": "ann"},
            {"role": "assistant", "content": "yes"},
            {"role": "tool", "content": "42", "tool_call_id": "7"},
        ]
    ]


def test_a_reply_sent_back_as_it_came_is_understood(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    reply = client.chat.completions.create(model=model, messages=HELLO)
    said: Any = reply.choices[0].message.model_dump()
    client.chat.completions.create(model=model, messages=[*HELLO, said, *HELLO])
    reply_seen = {"role": "assistant", "content": said["content"]}
    assert server.engine.rendered[-1] == [*HELLO, reply_seen, *HELLO]


def test_tools_the_model_may_not_call_are_not_shown_to_it(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
    client.chat.completions.create(model=model, messages=HELLO, tools=[tool], tool_choice="none")
    assert server.engine.rendered == [HELLO]


def test_a_tool_call_that_the_template_leaves_out_is_refused(
    client: openai.OpenAI, model: str
) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="leaves out tool calls"):
        client.chat.completions.create(model=model, messages=messages)


def test_every_reply_has_its_own_id(client: openai.OpenAI, model: str) -> None:
    ids = {client.chat.completions.create(model=model, messages=HELLO).id for _ in range(5)}
    assert len(ids) == 5
