"""Tools and structured outputs through the official client, over an engine that plays a script."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from loopback import Running

HELLO: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call>'


def get_grammar(server: Running) -> str:
    return server.engine.seen[-1][1].grammar


def test_a_call_in_the_text_is_a_call_of_the_message(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    server.engine.reply = "Let me look.\n" + CALL
    reply = client.chat.completions.create(model=model, messages=HELLO, tools=[LOOK])
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    calls: Any = choice.message.tool_calls
    assert [(one.type, one.function.name) for one in calls] == [("function", "look")]
    assert calls[0].function.arguments == '{"city": "Paris"}'
    assert calls[0].id.startswith("call_")


def test_a_streamed_call_is_the_same_in_parts(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    server.engine.reply = f"Hm. {CALL}\n{CALL}"
    with client.chat.completions.create(
        model=model, messages=HELLO, tools=[LOOK], stream=True
    ) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert "".join(one.delta.content or "" for one in choices) == "Hm."
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    ids = set()
    for part in [part for one in choices for part in one.delta.tool_calls or ()]:
        if part.id:
            ids.add(part.id)
            assert part.type == "function"
            names[part.index] = part.function.name
        arguments[part.index] = arguments.get(part.index, "") + part.function.arguments
    assert names == {0: "look", 1: "look"}
    assert arguments == {0: '{"city": "Paris"}', 1: '{"city": "Paris"}'}
    assert len(ids) == 2
    assert choices[-1].finish_reason == "tool_calls"
    assert len([one for one in choices if one.delta.tool_calls]) >= 4


def test_without_tools_a_call_is_text(server: Running, client: openai.OpenAI, model: str) -> None:
    server.engine.reply = CALL
    reply = client.chat.completions.create(model=model, messages=HELLO)
    assert reply.choices[0].message.content == CALL
    assert reply.choices[0].finish_reason == "stop"


def test_an_answer_cut_short_says_so(server: Running, client: openai.OpenAI, model: str) -> None:
    server.engine.reply = CALL
    reply = client.chat.completions.create(
        model=model, messages=HELLO, tools=[LOOK], max_tokens=len(CALL) - 20
    )
    assert reply.choices[0].finish_reason == "length"


def test_a_named_function_is_the_only_one_the_grammar_lets_through(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    other: Any = {"type": "function", "function": {"name": "other"}}
    client.chat.completions.create(
        model=model,
        messages=HELLO,
        tools=[LOOK, other],
        tool_choice={"type": "function", "function": {"name": "look"}},
    )
    assert "look" in get_grammar(server)
    assert "other" not in get_grammar(server)
    client.chat.completions.create(
        model=model, messages=HELLO, tools=[LOOK, other], tool_choice="required"
    )
    assert "other" in get_grammar(server)
    assert "TEXT" not in get_grammar(server)


def test_response_formats_become_grammars(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    def ask(**fields: Any) -> str:
        client.chat.completions.create(model=model, messages=HELLO, **fields)
        return get_grammar(server)

    assert ask(response_format={"type": "text"}) == ""
    assert ask(response_format={"type": "json_object"}) == 'json_schema:{"type":"object"}'
    schema = {"name": "a", "schema": {"const": 1}}
    assert (
        ask(response_format={"type": "json_schema", "json_schema": schema})
        == 'json_schema:{"const":1}'
    )
    assert ask(extra_body={"structured_outputs": {"regex": "a+"}}) == "regex:a+"
    assert ask(extra_body={"structured_outputs": {"choice": ["a", "b"]}}) == 'ebnf:start: "a" | "b"'
    client.completions.create(
        model=model, prompt="a", extra_body={"structured_outputs": {"grammar": 'start: "a"'}}
    )
    assert get_grammar(server) == 'ebnf:start: "a"'


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_structured_outputs_beside_tools_are_refused(
    client: openai.OpenAI, model: str, choice: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model,
            messages=HELLO,
            tools=[LOOK],
            tool_choice=choice,
            extra_body={"structured_outputs": {"regex": "a"}},
        )
    assert caught.value.param == "structured_outputs"
