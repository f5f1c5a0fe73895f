"""What clients may send: the fields of both APIs, their types, and what is done with the rest.

Values are checked by `SamplingParams`; here stand names and types. Types are strict: a string is
not a number and 1.5 is not an integer. `null` means the same as leaving the field out.

A field that would change the answer and that this server does not implement is refused by name,
and so is a name nobody knows: most of those are misspelt, and to ignore `max_token` or
`response_format` is to give a wrong answer in silence. Fields that clients commonly send and that
cannot change the text (`IGNORED`) are accepted without effect. So are unimplemented fields set to
the value that asks for nothing (`best_of` equal to `n`).

Pydantic's models are inherited from because that is the library's interface; what the two APIs
share is one model beside, not above, what differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twostroke.errors import InvalidParameter
from twostroke.server.body import shorten

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# In place of pydantic's list of every branch a union could have taken.
_UNION_HINTS = {
    "prompt": "must be a string, an array of strings, an array of token ids, "
    "or an array of arrays of token ids",
    "stop": "must be a string or an array of strings",
    "content": "must be a string or an array of text parts",
    "tool_choice": "must be a string or an object",
}

Prompt = str | list[str] | list[int] | list[list[int]]
Model = TypeVar("Model", bound=BaseModel)


class StreamOptions(BaseModel):
    """`stream_options`; obfuscation pads chunks against traffic analysis and is not done."""

    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(BaseModel):
    """A schema as `response_format` has it; name and description are for people."""

    model_config = STRICT
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`: free text, any JSON object, or JSON that a schema describes."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class CommonFields(BaseModel):
    """What both APIs take."""

    model_config = STRICT
    model: str
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    priority: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None  # vLLM's: json, regex, grammar or choice
    timings: bool = False  # ours: where the time of this request went

    @property
    def include_usage(self) -> bool:
        """True when the stream is to end with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionFields(BaseModel):
    """What only /v1/completions takes."""

    model_config = STRICT
    prompt: Prompt
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class TextPart(BaseModel):
    """One part of a message's content; this server reads text only."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class ToolCallFunction(BaseModel):
    """The function an assistant called in an earlier turn; `arguments` is JSON text."""

    model_config = STRICT
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call an assistant made in an earlier turn."""

    model_config = STRICT
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class Message(BaseModel):
    """One message of a conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # An assistant's message is often sent back as it came, with fields that were null or empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = None


class ChatFields(BaseModel):
    """What only /v1/chat/completions takes."""

    model_config = STRICT
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked body of /v1/completions."""

    common: CommonFields
    own: CompletionFields


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked body of /v1/chat/completions."""

    common: CommonFields
    own: ChatFields


def parse_completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Check names and types of a completion's body.

    Args: body: the JSON object. Raises: InvalidParameter naming the first field that is wrong.
    """
    common, own = _split(body, CompletionFields)
    request = CompletionRequest(validate(CommonFields, common), validate(CompletionFields, own))
    _check_streaming(request.common)
    if request.own.suffix:
        raise InvalidParameter("suffix", "is not implemented; put the text into the prompt")
    if request.own.best_of is not None and request.own.best_of != request.common.n:
        raise InvalidParameter(
            "best_of", f"is not implemented unless it equals n, {request.common.n}"
        )
    return request


def parse_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Check names and types of a chat completion's body.

    Args: body: the JSON object. Raises: InvalidParameter naming the first field that is wrong.
    """
    common, own = _split(body, ChatFields)
    request = ChatRequest(validate(CommonFields, common), validate(ChatFields, own))
    _check_streaming(request.common)
    _check_lengths(request)
    if not request.own.messages:
        raise InvalidParameter("messages", "is empty; send at least one message")
    if request.own.top_logprobs and not request.own.logprobs:
        raise InvalidParameter("top_logprobs", "needs logprobs to be true")
    for place, message in enumerate(request.own.messages):
        if message.content is None and not message.tool_calls:
            raise InvalidParameter(f"messages.{place}.content", "is missing")
        if message.tool_calls and message.role != "assistant":
            raise InvalidParameter(f"messages.{place}.tool_calls", "only an assistant has them")
    return request


def _check_streaming(common: CommonFields) -> None:
    if common.stream_options is not None and not common.stream:
        raise InvalidParameter("stream_options", "needs stream to be true")


def _check_lengths(request: ChatRequest) -> None:
    old, new = request.common.max_tokens, request.own.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidParameter(
            "max_tokens", f"is {old} but max_completion_tokens is {new}; send one of them"
        )


def _split(body: Mapping[str, Any], own: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of CommonFields, and those of `own`; refuses names that are neither."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in CommonFields.model_fields:
            parts[0][name] = value
        elif name in own.model_fields:
            parts[1][name] = value
        else:
            _refuse_name(name, [*CommonFields.model_fields, *own.model_fields])
    return parts


def _refuse_name(name: str, known: list[str]) -> None:
    shown = shorten(name)
    close = difflib.get_close_matches(shown, known, n=1, cutoff=0.75)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InvalidParameter(shown, f"is not a field this server implements{hint}")


def validate(model: type[Model], fields: Mapping[str, Any]) -> Model:
    """`fields` as a checked value of `model`.

    Raises: InvalidParameter naming the first field that is wrong.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _describe(first["loc"], first["type"], first["msg"]) from None


def _describe(loc: tuple[int | str, ...], kind: str, message: str) -> InvalidParameter:
    """pydantic's place and words as ours; a union's branches are left out of the place."""
    words = message[0].lower() + message[1:]
    if kind == "missing":
        words = "is missing"
    if kind == "extra_forbidden":
        words = "is not a field this server implements"
    for end, part in enumerate(loc):
        if part in _UNION_HINTS and not (kind == "missing" and end + 1 == len(loc)):
            loc, words = loc[: end + 1], _UNION_HINTS[str(part)]
            break
    return InvalidParameter(".".join(shorten(str(each)) for each in loc), words)
