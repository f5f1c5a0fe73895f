"""Structured outputs and tools of a real model, through the official client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from loopback import run_server
from twostroke.cli.compose import build_engine
from twostroke.cli.settings import EngineSettings
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.settings import ServerSettings

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
ASK: Any = [{"role": "user", "content": "What is the weather in Paris today?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"$ref": "#/$defs/none",
        "$defs": {"none": {"type": "object", "properties": {}, "additionalProperties": False}}}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    built = build_engine(EngineSettings(model=MODEL))
    with contextlib.closing(built.model):
        engine = AsyncLLM(built.parts)
        with (
            run_server(engine, ServerSettings()) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
        ):
            yield made


class Animal(BaseModel):
    """What the model is to describe."""

    kind: Literal["cat", "dog", "bird"]
    legs: int = Field(ge=0, le=8)
    tags: list[Literal["wild", "tame"]] = Field(min_length=1, max_length=2)


def test_the_client_parses_an_answer_into_its_own_class(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a parrot."}],
        response_format=Animal,
        temperature=0,
    )
    assert isinstance(reply.choices[0].message.parsed, Animal)
    assert reply.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_the_same_json(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Describe a dog."}],
        "response_format": Animal,
        "seed": 3,
    }
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == client.chat.completions.parse(**asked).choices[0].message.parsed


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_call_that_must_be_made_is_valid_streamed_or_not(
    client: openai.OpenAI, choice: Any
) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 1,
    }
    reply = client.chat.completions.create(**asked).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None
    (call,) = reply.message.tool_calls or ()
    schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), schema[call.function.name])
    name = arguments = ""
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or ():
                assert part.function is not None
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_what_a_tool_answered_is_told_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    told: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12:30"},
    ]
    reply = client.chat.completions.create(
        model=MODEL, messages=told, tools=TOOLS, max_tokens=16, temperature=0
    )
    assert reply.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_costly_grammar_is_refused_and_others_are_served(client: openai.OpenAI) -> None:
    for regex in ("(.{1,1000}){1,1000}", "((a{0,100}){0,100}){0,100}"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model=MODEL,
                prompt="a",
                max_tokens=8,
                extra_body={"structured_outputs": {"regex": regex}},
            )
        assert caught.value.param == "structured_outputs"
    reply = client.completions.create(
        model=MODEL, prompt="a", extra_body={"structured_outputs": {"regex": "[a-z]{3}"}}
    )
    assert len(reply.choices[0].text) == 3


def make_schemas() -> list[dict[str, Any]]:
    """Schemas of which every text is short."""
    word = {"type": "string", "maxLength": 8}
    values: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "integer", "minimum": -5, "maximum": 500},
        {"enum": ["red", "green", 7, None]},
        {"const": {"a": [1, "b"]}},
        {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
        {"type": "string", "format": "date"},
        word,
        {"anyOf": [{"type": "null"}, word]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        {"$ref": "#/$defs/node", "$defs": {"node": {"enum": [1, 2, 3]}}},
    ]
    inner = values[:-1]
    objects = [
        {
            "type": "object",
            "properties": {"first": first, "second": second},
            "required": ["first"] if place % 2 else ["first", "second"],
            "additionalProperties": False,
        }
        for place, first in enumerate(inner)
        for second in (inner[(place + 1) % len(inner)], inner[(place + 4) % len(inner)])
    ]
    tuples = [
        {"type": "array", "prefixItems": [one, {"const": place}], "items": False, "minItems": 2}
        for place, one in enumerate(inner)
    ]
    return [*values, *objects, *tuples]


@pytest.mark.slow
def test_every_answer_of_200_validates(client: openai.OpenAI) -> None:
    schemas = make_schemas()

    def ask(place: int) -> None:
        schema = schemas[place % len(schemas)]
        form = {"name": "value", "schema": schema, "strict": True}
        reply = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Give me value {place}."}],
            response_format={"type": "json_schema", "json_schema": form},
            temperature=1.0 if place % 3 else 0.0,
            seed=place,
            max_tokens=128,
        )
        choice = reply.choices[0]
        assert choice.finish_reason == "stop", (schema, choice.message.content)
        jsonschema.validate(json.loads(choice.message.content or ""), schema)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(ask, range(200)))) == 200


def test_alone_or_together_a_grammar_gives_the_same_tokens(client: openai.OpenAI) -> None:
    def ask(place: int) -> str | None:
        form = {"name": "animal", "schema": Animal.model_json_schema()}
        reply = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Describe animal {place}."}],
            response_format={"type": "json_schema", "json_schema": form},
            seed=place,
        )
        return reply.choices[0].message.content

    alone = [ask(place) for place in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
