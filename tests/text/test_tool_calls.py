"""Laws of tool calls: what comes out of a text does not depend on how it is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from twostroke.text.tool_calls import (
    HERMES,
    LLAMA3,
    MISTRAL,
    CallArguments,
    CallStarted,
    Content,
    ToolCallReader,
    ToolForm,
    find_tool_form,
)

ARGUMENTS = {"city": 'Par"is}\\', "deep": {"list": [1, {"a": "]"}]}, "empty": ""}
TEXT = json.dumps(ARGUMENTS)


def read(form: ToolForm, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and each call's name and arguments."""
    reader = ToolCallReader(form)
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish()
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStarted):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert isinstance(event, CallArguments)
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert reader.num_calls <= len(calls)
    return content, calls


def call(name: str = "f", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {TEXT}}}'


BOTH = [("f", TEXT), ("g", TEXT)]
CASES = {
    "plain text": (HERMES, "Hello,  world.\n", ("Hello,  world.\n", [])),
    "nothing": (HERMES, "", ("", [])),
    "one": (HERMES, f"<tool_call>\n{call()}\n</tool_call>", ("", BOTH[:1])),
    "two": (
        HERMES,
        f"<tool_call>\n{call()}\n</tool_call>\n<tool_call>\n{call('g')}\n</tool_call>\n",
        ("", BOTH),
    ),
    "after text": (
        HERMES,
        f"Let me look.\n<tool_call>{call()}</tool_call>",
        ("Let me look.", BOTH[:1]),
    ),
    "before text": (HERMES, f"<tool_call>{call()}</tool_call>\nDone", ("\nDone", BOTH[:1])),
    "never closed": (HERMES, f"<tool_call>{call()}", ("", BOTH[:1])),
    "closed by the next": (HERMES, f"<tool_call>{call()}\n<tool_call>{call('g')}", ("", BOTH)),
    "almost an opener": (HERMES, "a <tool_cal> b <", ("a <tool_cal> b <", [])),
    "no object": (HERMES, "<tool_call>none</tool_call>", ("<tool_call>none</tool_call>", [])),
    "no name": (HERMES, '<tool_call>{"a": 1}', ('<tool_call>{"a": 1}', [])),
    "arguments first": (
        HERMES,
        f'<tool_call>{{"arguments": {TEXT}, "name": "f"}}</tool_call>',
        ("", BOTH[:1]),
    ),
    "arguments as text": (
        HERMES,
        f'<tool_call>{{"name": "f", "arguments": {json.dumps(TEXT)}}}</tool_call>',
        ("", BOTH[:1]),
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    "cut in its arguments": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "b',
        ("", [("f", '{"a": "b')]),
    ),
    "cut in its name": (HERMES, '<tool_call>{"name": "f', ('<tool_call>{"name": "f', [])),
    "llama": (LLAMA3, call(key="parameters"), ("", BOTH[:1])),
    "llama with its token": (LLAMA3, f"<|python_tag|>{call(key='parameters')}", ("", BOTH[:1])),
    "llama with two": (LLAMA3, f"{call()}; {call('g')}", ("", BOTH)),
    "llama's other json": (LLAMA3, '{"answer": {"name": "f"}}', ('{"answer": {"name": "f"}}', [])),
    "llama's text": (LLAMA3, 'So: {"name": "f"}', ('So: {"name": "f"}', [])),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{call()}, {call('g')}]", ("", BOTH)),
    "mistral without its token": (MISTRAL, f" [{call()}]", ("", BOTH[:1])),
    "mistral's text": (MISTRAL, "[1] is a note", ("[1] is a note", [])),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_and_content_are_told_apart(case: str) -> None:
    form, text, expected = CASES[case]
    assert read(form, [text]) == expected


@pytest.mark.parametrize("case", CASES)
def test_no_split_of_the_text_changes_what_comes_out(case: str) -> None:
    form, text, expected = CASES[case]
    assert read(form, list(text)) == expected
    for at in range(len(text)):
        assert read(form, [text[:at], text[at:]]) == expected
    for seed in range(20):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(form, pieces) == expected, f"seed {seed}"


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
def test_no_text_is_too_broken_to_read(form: ToolForm) -> None:
    parts = [form.opener, form.closer, '{"name": "f"', ', "arguments": ', "{", "}", "[", "]"]
    parts += [call(), "\\", '"', ":", ",", " ", "\n", "text", ";", form.opener[:4], "null", "é"]
    for seed in range(400):
        choices = random.Random(seed)
        text = "".join(choices.choices(parts, k=choices.randrange(12)))
        whole = read(form, [text])
        assert read(form, list(text)) == whole, f"seed {seed}"


def test_content_is_passed_on_as_soon_as_it_is_no_call() -> None:
    reader = ToolCallReader(HERMES)
    assert reader.feed("Hello <tool") == [Content("Hello")]
    assert reader.feed("box") == [Content(" <toolbox")]


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = ToolCallReader(HERMES)
    assert reader.feed('<tool_call>{"name": "f", "arguments": {"a": ') == [
        CallStarted(0, "f"),
        CallArguments(0, '{"a": '),
    ]
    assert reader.feed("12") == [CallArguments(0, "12")]


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}<|python_tag|>{% endif %}", LLAMA3),
        ("{% if tools %}{{ tools }}{% endif %}", HERMES),
        ("{{ messages }}", HERMES),
    ],
)
def test_the_form_is_the_templates(source: str, form: ToolForm) -> None:
    assert find_tool_form(source) is form


def test_a_name_nested_too_deep_to_read_is_content() -> None:
    text = '<tool_call>{"name": ' + "[" * 20_000 + "]" * 20_000 + "}</tool_call>"
    assert read(HERMES, [text]) == (text, [])
