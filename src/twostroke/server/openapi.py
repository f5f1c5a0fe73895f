"""/openapi.json: what may be sent to each route, and what comes back.

Bodies are described by the models that check them, so the document cannot promise what a check
refuses; answers by schemas kept here. It keeps true that every route of the application is in it:
a test asks the application. What a schema cannot say (a model's name, a token id below the
vocabulary's size) is answered with a 4xx that is in the document too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from twostroke.server.schemas import IGNORED, ChatFields, CommonFields, CompletionFields
from twostroke.server.settings import Served
from twostroke.server.tokens import DetokenizeFields, TokenizeFields

Schema = dict[str, Any]

_REFUSALS = {
    400: "the request cannot be served as it stands",
    401: "no valid key",
    404: "no such model, object or path",
    408: "the request did not arrive, or its answer was not read, in time",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "a limit is reached; Retry-After says when to ask again",
    500: "the request failed",
    503: "the engine is not available",
}
_OF_GET = (400, 401, 404, 503)

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _describe_object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _describe_list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


_USAGE = _describe_object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    prompt_tokens_details=_describe_object({"cached_tokens": _COUNT}),
)
_SECONDS: Schema = {"type": "number", "minimum": 0}
_TIMINGS = _describe_object(
    {
        "queued_s": _SECONDS,
        "prefill_s": _SECONDS,
        "decode_s": _SECONDS,
        "prefill_tokens": _COUNT,
        "decode_tokens": _COUNT,
        "cached_tokens": _COUNT,
        "preemptions": _COUNT,
        "limit_share": {"type": ["number", "null"]},
    }
)
_MODEL = _describe_object(
    {"id": _TEXT, "object": _TEXT, "created": _COUNT, "owned_by": _TEXT},
    root=_TEXT,
    max_model_len=_COUNT,
)
_HEALTH = _describe_object({"status": _TEXT})


def _describe_reply(choice: Schema) -> Schema:
    """A completion's reply, of either API."""
    return _describe_object(
        {
            "id": _TEXT,
            "object": _TEXT,
            "created": _COUNT,
            "model": _TEXT,
            "choices": _describe_list(choice),
            "usage": _USAGE,
        },
        system_fingerprint=_TEXT,
        timings=_TIMINGS,
    )


_COMPLETION = _describe_reply(_describe_object({"index": _COUNT, "text": _TEXT}))
_CHAT = _describe_reply(_describe_object({"index": _COUNT, "message": {"type": "object"}}))


_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_INTEGER: Schema = {"type": "integer"}
_LIST: Schema = {"type": "array"}
_MAP: Schema = {"type": "object"}
_RESPONSE = _describe_object({"id": _TEXT, "object": _TEXT, "status": _TEXT, "output": _LIST})
# Checked by responses_input.py, which has no model to describe it.
_RESPONSE_FIELDS: dict[str, Schema] = {
    "user": {"type": "string", "maxLength": 256},
    **dict.fromkeys(("instructions", "previous_response_id", "truncation"), _TEXT),
    **dict.fromkeys(("stream", "store", "background"), _FLAG),
    **dict.fromkeys(("temperature", "top_p"), _NUMBER),
    **dict.fromkeys(("max_output_tokens", "top_logprobs", "seed", "priority"), _INTEGER),
    **dict.fromkeys(("text", "metadata"), _MAP),
    **dict.fromkeys(("tools", "include"), _LIST),
    **dict.fromkeys(("stop", "tool_choice"), Schema()),
}
_RESPONSE_IGNORED = (
    *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "stream_options"),
)
_RESPONSE_BODY: Schema = {
    "type": "object",
    "required": ["model", "input"],
    "additionalProperties": False,
    "properties": {
        "model": _TEXT,
        "input": {"anyOf": [_TEXT, _LIST]},
        **{name: {"anyOf": [of, {"type": "null"}]} for name, of in _RESPONSE_FIELDS.items()},
        **{name: {} for name in _RESPONSE_IGNORED},
    },
}


def build_openapi(served: Served) -> Schema:
    """The document of one server, an OpenAPI 3.1 object."""
    secured = bool(served.settings.keys)
    paths = _describe_paths()
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "twostroke", "version": served.version},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if secured:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return document


def _describe_paths() -> dict[str, dict[str, Schema]]:
    return {
        "/v1/models": {"get": _get("The models served here", _describe_models())},
        "/v1/models/{name}": {"get": _get_model()},
        "/v1/completions": {
            "post": _post(
                "Continue a text", _merge(CommonFields, CompletionFields), _COMPLETION, streams=True
            )
        },
        "/v1/chat/completions": {
            "post": _post(
                "Answer a conversation", _merge(CommonFields, ChatFields), _CHAT, streams=True
            )
        },
        "/tokenize": {"post": _post("A text's tokens", _merge(TokenizeFields), _TOKENS)},
        "/detokenize": {
            "post": _post(
                "The text of tokens", _merge(DetokenizeFields), _describe_object({"prompt": _TEXT})
            )
        },
        "/health": {"get": _get("Whether the engine works", _HEALTH)},
        "/ready": {"get": _get("Whether to send requests here", _HEALTH)},
        "/metrics": {"get": _get("Prometheus metrics", _TEXT, media_type="text/plain")},
        "/v1/streams/{stream_id}": {"get": _get_stream()},
        **_describe_responses_api(),
        "/v1/steps": {"get": _get_steps()},
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
    }


_TOKENS = _describe_object(
    {
        "count": _COUNT,
        "max_model_len": _COUNT,
        "tokens": _describe_list(_COUNT),
        "token_strs": {"type": ["array", "null"], "items": _TEXT},
    }
)


def _describe_models() -> Schema:
    return _describe_object({"object": _TEXT, "data": _describe_list(_MODEL)})


def _get_model() -> Schema:
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    return {**_get("One model", _MODEL), "parameters": [name]}


def _describe_responses_api() -> dict[str, dict[str, Schema]]:
    name = {"name": "response_id", "in": "path", "required": True, "schema": _TEXT}
    query = [
        {"name": each, "in": "query", "schema": _TEXT}
        for each in ("stream", "starting_after", "order", "after", "limit")
    ]
    one, items = "/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items"
    retrieve = _get("A stored response, or its events", _RESPONSE, streams=True)
    cancel = _post("End a response in the background", None, _RESPONSE)
    delete = _get("Forget a response", _describe_object({"id": _TEXT}))
    listing = _get("What a response was asked", _describe_object({"data": {"type": "array"}}))
    return {
        "/v1/responses": {
            "post": _post("Answer, and keep the answer", _RESPONSE_BODY, _RESPONSE, streams=True)
        },
        one: {
            "get": {**retrieve, "parameters": [name, *query[:2]]},
            "delete": {**delete, "parameters": [name]},
        },
        f"{one}/cancel": {"post": {**cancel, "parameters": [name]}},
        items: {"get": {**listing, "parameters": [name, *query[2:]]}},
    }


def _get_stream() -> Schema:
    name = {"name": "stream_id", "in": "path", "required": True, "schema": _TEXT}
    after = {"name": "Last-Event-ID", "in": "header", "schema": _TEXT}
    described = _get("The rest of a stream, by its id", _TEXT, media_type="text/event-stream")
    return {**described, "parameters": [name, after]}


def _get_steps() -> Schema:
    text = {"name": "request", "in": "query", "schema": _TEXT}
    last = {"name": "last", "in": "query", "schema": {"type": "integer"}}
    described = _get("Where the time of steps went", {"type": "object"})
    return {**described, "parameters": [text, last]}


def _get(
    summary: str, reply: Schema, media_type: str = "application/json", streams: bool = False
) -> Schema:
    responses = _describe_responses(reply, media_type, _OF_GET)
    if streams:
        responses["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    return {"summary": summary, "responses": responses}


def _post(summary: str, body: Schema | None, reply: Schema, streams: bool = False) -> Schema:
    responses = _describe_responses(reply, "application/json", tuple(_REFUSALS))
    if streams:
        responses["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    described: Schema = {"summary": summary, "responses": responses}
    if body is not None:
        content = {"application/json": {"schema": body}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _describe_responses(reply: Schema, media_type: str, refusals: Sequence[int]) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {
        str(status): {"description": _REFUSALS[status], "content": error} for status in refusals
    }
    served = {"description": "done", "content": {media_type: {"schema": reply}}}
    return {"200": served, **refused}


def _merge(*models: type[BaseModel]) -> Schema:
    """One closed object with the fields of all `models`, each of which may also be null."""
    properties: Schema = {}
    required: list[str] = []
    definitions: Schema = {}
    for model in models:
        schema = model.model_json_schema()
        properties.update(schema["properties"])
        required += schema.get("required", [])
        definitions.update(schema.get("$defs", {}))
    for name in properties.keys() - set(required):
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    if CommonFields in models:
        properties.update({name: {} for name in sorted(IGNORED)})
        properties["user"] = {"type": ["string", "null"], "maxLength": 256}
    body: Schema = {
        "type": "object",
        "properties": _inline(properties, definitions),
        "required": required,
        "additionalProperties": False,
    }
    return body


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """`schema` with what it refers to in its place; no body here refers to itself."""
    if isinstance(schema, list):
        return [_inline(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in schema.items()}
