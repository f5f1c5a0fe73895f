"""What clients may send to /v1/responses, and the chat request it amounts to.

A response is a chat completion told in other words: its items become messages, its tools and text
format those of a chat request, which is then checked and run as one. Fields that would change the
answer and are not implemented are refused by name, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twostroke.errors import InvalidParameter
from twostroke.server.body import shorten

LOGPROBS = "message.output_text.logprobs"
# Cannot change the text of an answer.
_IGNORED = frozenset(
    (
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("service_tier", "stream_options"),
    )
)
_PASSED = (
    *("model", "temperature", "top_p", "seed", "stop", "user", "priority"),
    "parallel_tool_calls",
)
_KNOWN = frozenset(
    (
        *_PASSED,
        *("input", "instructions", "previous_response_id", "max_output_tokens", "text", "tools"),
        *("tool_choice", "store", "background", "stream", "metadata", "include", "top_logprobs"),
        "truncation",
    )
)
_TYPES: Mapping[str, tuple[type, str]] = {
    "model": (str, "a string"),
    "instructions": (str, "a string"),
    "previous_response_id": (str, "a string"),
    "store": (bool, "true or false"),
    "background": (bool, "true or false"),
    "stream": (bool, "true or false"),
    "parallel_tool_calls": (bool, "true or false"),
    "metadata": (dict, "an object of strings"),
    "include": (list, "an array of strings"),
    "tools": (list, "an array of tools"),
    "text": (dict, "an object"),
}


def check_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that count, of the right types. Raises InvalidParameter naming the first wrong."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in _IGNORED:
            continue
        if name not in _KNOWN:
            raise InvalidParameter(shorten(name), "is not a field this server implements")
        kind, words = _TYPES.get(name, (object, ""))
        if not isinstance(value, kind):
            raise InvalidParameter(name, f"must be {words}")
    if "model" not in fields:
        raise InvalidParameter("model", "is missing")
    if "input" not in fields:
        raise InvalidParameter("input", "is missing")
    if fields.get("background") and fields.get("store") is False:
        raise InvalidParameter(
            "store", "must be true in the background, or nobody could ask for it"
        )
    if fields.get("truncation", "disabled") != "disabled":
        raise InvalidParameter("truncation", 'is not implemented; send "disabled" or leave it out')
    for name in fields.get("include", ()):
        if name != LOGPROBS:
            raise InvalidParameter("include", f"{shorten(str(name))!r} is not implemented")
    _check_metadata(fields.get("metadata", {}))
    return {name: value for name, value in fields.items() if name not in _IGNORED}


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    pairs = list(metadata.items())
    if len(pairs) > 16 or any(
        not isinstance(value, str) or len(key) > 64 or len(value) > 512 for key, value in pairs
    ):
        raise InvalidParameter(
            "metadata", "must be at most 16 strings of 512 characters, under names of 64"
        )


def build_chat_body(
    fields: Mapping[str, Any], items: Sequence[Mapping[str, Any]], history: Sequence[Any]
) -> dict[str, Any]:
    """The body of the chat request that answers these items after the messages of `history`."""
    instructions = fields.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    body: dict[str, Any] = {name: fields[name] for name in _PASSED if name in fields}
    body["messages"] = [*system, *history, *to_messages(items)]
    body["stream"] = True
    if "max_output_tokens" in fields:
        body["max_completion_tokens"] = fields["max_output_tokens"]
    if "top_logprobs" in fields or LOGPROBS in fields.get("include", ()):
        body["logprobs"] = True
        body["top_logprobs"] = fields.get("top_logprobs", 0)
    form = fields.get("text", {})
    if set(form) - {"format", "verbosity"} or form.get("verbosity", "medium") != "medium":
        raise InvalidParameter("text.verbosity", "is not implemented; leave it out")
    form = form.get("format") or {"type": "text"}
    if form != {"type": "text"}:
        body["response_format"] = _to_response_format(form)
    if fields.get("tools"):
        body["tools"] = [_to_chat_tool(tool) for tool in fields["tools"]]
    choice = fields.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None and (fields.get("tools") or choice not in ("auto", "none")):
        body["tool_choice"] = choice
    return body


def _to_response_format(form: Any) -> Any:
    if not isinstance(form, Mapping) or form.get("type") != "json_schema":
        return form
    schema = {name: value for name, value in form.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _to_chat_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise InvalidParameter("tools", "only functions are implemented")
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def to_items(value: Any, response_id: str) -> list[dict[str, Any]]:
    """`input` as a list of items, each with an id. Raises InvalidParameter."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidParameter("input", "must be a string or an array of items")
    items = []
    for place, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise InvalidParameter(f"input.{place}", "must be an object")
        kind = item.get("type", "message")
        if kind not in ("message", "function_call", "function_call_output"):
            raise InvalidParameter(f"input.{place}.type", f"{shorten(str(kind))!r} is not served")
        items.append({"id": f"in_{response_id[5:]}_{place}", "type": kind, **item})
    return items


def to_messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as the messages of a chat; calls one after the other are of one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "function_call":
            function = {name: item.get(name) for name in ("name", "arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "tool_calls": [call]})
        elif item["type"] == "function_call_output":
            content = _to_text(item.get("output"))
            call_id = item.get("call_id")
            messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        else:
            role = item.get("role", "user")
            messages.append({"role": role, "content": _to_text(item.get("content"))})
    return messages


def _to_text(content: Any) -> Any:
    """Content whose parts are text, as one string; anything else as it is, to be refused."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(
            part.get("text"), str
        ):
            raise InvalidParameter("input", f"content of type {shorten(str(kind))!r} is not served")
        texts.append(part["text"])
    return "\n".join(texts)
