"""Chat messages: checked and brought to one shape before a template sees them.

A template is somebody else's program; it must only ever meet messages whose role is a known word
and whose content is a string. Whatever is wrong with a message is refused by its place and name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twostroke.errors import InvalidParameter
from twostroke.text.tokenizer import check_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages, each with a known role and a content that is one string.

    A list of text parts becomes their texts joined by newlines. An assistant's message that only
    calls tools may have no content. Other keys are kept as they are.
    Raises InvalidParameter, with the message's place.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidParameter("messages", f"must be a list, not {type(messages).__name__}")
    if not messages:
        raise InvalidParameter("messages", "must not be empty")
    return [_read_message(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _read_message(place: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidParameter(place, f"must be an object, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidParameter(f"{place}.role", f"must be one of {known}, not {_show(role)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    return {**message, "content": _read_content(f"{place}.content", content)}


def _read_content(place: str, content: object) -> str:
    if isinstance(content, str):
        check_text(place, content)
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        kind = type(content).__name__
        raise InvalidParameter(place, f"must be a string or a list of text parts, not {kind}")
    texts: list[str] = []
    for at, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = _show(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise InvalidParameter(
                f"{place}[{at}]", f"must be a part of type 'text', the only one known, not {kind}"
            )
        check_text(f"{place}[{at}].text", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _show(value: object) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 40 else type(value).__name__
