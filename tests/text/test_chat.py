"""Chat templates: what they render, what they refuse, and that none runs away."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from places import get_reference
from twostroke.errors import InvalidParameter, TemplateError
from twostroke.text import guard
from twostroke.text.chat import ChatTemplate, build_chat_template
from twostroke.text.templates import CHATML, GEMMA, LLAMA3, MISTRAL
from twostroke.text.tokenizer import build_tokenizer
from vocabularies import make_byte_bpe

USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ITALY = [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}]
# The template SmolLM2-135M-Instruct carries.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, messages: Any = USER, **extra: Any) -> str:
    """The messages under a template."""
    return ChatTemplate(source, {"eos_token": "</s>"}).render(messages, **extra)


def test_templates_give_the_prompts_of_the_reference_answers() -> None:
    smollm2, gemma3 = get_reference("smollm2-135m"), get_reference("gemma3-270m")
    haiku = [{"role": "user", "content": "Write a haiku about the sea."}]
    assert render(SMOLLM2, ITALY) == smollm2["chat"]["prompt"]
    assert render(CHATML, haiku) == smollm2["chat2"]["prompt"]
    assert render(GEMMA, ITALY) == gemma3["chat"]["prompt"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
        ),
        (
            GEMMA,
            "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n",
        ),
        (
            LLAMA3,
            "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        ),
        (MISTRAL, "[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"),
    ],
    ids=["chatml", "gemma", "llama-3", "mistral"],
)
def test_default_templates_write_what_their_family_knows(source: str, text: str) -> None:
    assert render(source, TALK, add_generation_prompt=False) == text
    assert render(source, TALK).startswith(text)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("<start_of_turn>", "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
        ("[INST]", "[INST] Hi [/INST]"),
    ],
)
def test_a_model_without_a_template_gets_its_familys(token: str, text: str) -> None:
    vocabulary = make_byte_bpe(user_defined=[token], control=("<s>", "</s>"))
    template = build_chat_template(vocabulary, build_tokenizer(vocabulary))
    assert template.render(USER) == text


def test_a_model_of_no_known_family_is_told_to_take_plain_prompts() -> None:
    vocabulary = make_byte_bpe(control=("<s>", "</s>"))
    with pytest.raises(TemplateError, match="plain text"):
        build_chat_template(vocabulary, build_tokenizer(vocabulary))


def test_a_models_own_template_comes_first_and_sees_its_special_tokens() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    vocabulary = replace(make_byte_bpe(), chat_template=source)
    template = build_chat_template(vocabulary, build_tokenizer(vocabulary))
    assert template.render(USER) == "<|im_start|>Hi<|im_end|>"


def test_templates_find_what_hugging_face_gives_them() -> None:
    assert render("{% if true %}\n  a\n{% endif %}\nb") == "  a\nb"
    assert render("{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}")
    assert render("{{ {'a': ['<é>', 1]} | tojson }}") == '{"a": ["<é>", 1]}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert render("{{ tools is none }}{{ flag }}", flag=3) == "True3"
    assert render("a{% generation %}b{%- endgeneration %}") == "ab"
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}") == "2"
    assert render("{{ 'a-b'.split('-') | join('+') ~ 1 }}{{ ['x', 'y'] | last }}") == "a+b1y"
    assert render("{{ '%s %d' % ('a', 2) }} {{ '{}!'.format('b') }}") == "a 2 b!"
    assert (
        render("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}{{ messages[1:] }}") == "<a>[]"
    )
    now = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert now.render(USER) == "26 Jul 2024"


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


def test_a_call_of_tools_needs_no_content() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert render("{{ messages[0].tool_calls[0].id }}", [message]) == "1"


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (None, "messages"),
        ({"role": "user"}, "messages"),
        (["Hi"], r"messages\[0\]"),
        ([*USER, {"content": "Hi"}], r"messages\[1\].role"),
        ([{"role": "pope", "content": "Hi"}], r"messages\[0\].role.*'pope'"),
        ([{"role": ["user"], "content": "Hi"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": None}], r"messages\[0\].content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content.*int"),
        ([{"role": "user", "content": {"text": "Hi"}}], r"messages\[0\].content"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content.*surrogate"),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\].content\[0\].*str"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\].*'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text"),
    ],
)
def test_messages_of_the_wrong_shape_are_refused_by_place(messages: Any, place: str) -> None:
    with pytest.raises(InvalidParameter, match=place):
        render(CHATML, messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "line 1"),
        ("{{ 'a' | nosuch }}", "nosuch"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "compile"),
        ("{{ raise_exception('only users, please') }}", "only users, please"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% include 'file' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
    ],
)
def test_a_template_that_fails_says_how(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


DOUBLE = "{% set ns = namespace(v=START) %}{% for i in range(60) %}STEP{% endfor %}{{ ns.v }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{% for a in range(99999) %}{{ n() }}{% endfor %}{% endmacro %}"
        "{% macro n() %}{% for a in range(99999) %}{% endfor %}{% endmacro %}{{ m() }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) %}{{ 'a' * 100 }}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 9**(9**9) }}",
        "{{ ('f' * 8000) | int(base=16) // 3 }}",
        DOUBLE.replace("START", "'a'").replace("STEP", "{% set ns.v = ns.v ~ ns.v %}"),
        DOUBLE.replace("START", "'a'").replace("STEP", "{% set ns.v = ns.v + ns.v %}"),
        DOUBLE.replace("START", "'a'").replace(
            "STEP", "{% set ns.v %}{{ ns.v }}{{ ns.v }}{% endset %}"
        ),
        DOUBLE.replace("START", "[1]").replace("STEP", "{% set ns.v = [ns.v, ns.v] %}"),
        DOUBLE.replace("START", "[1]").replace("STEP", "{% set ns.v = dict(a=ns.v, b=ns.v) %}"),
        DOUBLE.replace("START", "[1]").replace("STEP", "{% set ns.v = ns.v * 2 %}"),
        DOUBLE.replace("START", "[1]").replace("STEP", "{% set ns.v = namespace(a=ns.v) %}"),
        "{{ ('a' * 5000).join(['b'] * 5000) }}",
        "{{ ['b'] * 5000 | join('a' * 5000) }}",
        "{{ (['b'] * 5000) | join('a' * 5000) }}",
        "{{ ('a' * 5000).replace('a', 'b' * 5000) }}",
        "{{ ('a' * 5000) | replace('a', 'b' * 5000) }}",
        "{{ ('a\n' * 90000) | indent('x' * 90000) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a' | attr('zfill') }}{{ ('a' | attr('zfill'))(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.encode().center(10**9) }}",
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{{ 1.5 | round(10**9, 'ceil') }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ ('%(a)s' * 50000) % {'a': 'b' * 50000} }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ ('{0}' * 50000).format('b' * 50000) }}",
        "{{ strftime_now('%c' * 999999) }}",
    ],
)
def test_no_template_runs_away(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The bounds are lowered to keep the test quick; they are never lifted.
    monkeypatch.setattr(guard, "MAX_STEPS", 20_000)
    monkeypatch.setattr(guard, "MAX_VALUE_CHARS", 400_000)
    monkeypatch.setattr("twostroke.text.chat.MAX_OUTPUT_CHARS", 400_000)
    with pytest.raises(TemplateError):
        render(source)


def test_slow_templates_meet_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateError, match="ran for more than"):
        render("{% for a in range(9) %}{% endfor %}")


def test_a_template_that_ran_away_still_renders_sound_messages() -> None:
    template = ChatTemplate("{{ 'a' * messages | length * messages[0].n }}")
    with pytest.raises(TemplateError, match="characters"):
        template.render([{**USER[0], "n": 10**9}])
    assert template.render([{**USER[0], "n": 3}]) == "aaa"


def test_long_conversations_are_within_the_bounds() -> None:
    talk = [{"role": role, "content": "word " * 200} for role in ("user", "assistant")] * 500
    assert len(render(SMOLLM2, talk)) > 1_000_000
