"""A response of /v1/responses: the object, and the events that tell how it came to be.

Both are made by one writer from the same output, so what a client pieces together of the events is
what it is given when it asks for the whole. The writer reads the chunks of a chat completion, which
already tell text, calls and their ends apart. It keeps true that events are numbered from 0 without
gaps, and that what they say depends on the request and its output only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twostroke.engine.outputs import OutputDelta
from twostroke.server.durable_records import Accepted
from twostroke.server.errors import ErrorReply
from twostroke.server.events import Writer, dump

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


@dataclass(slots=True)
class _Item:
    """One output item as far as it has come. parts: the pieces of its text or its arguments."""

    place: int
    fields: dict[str, Any]
    parts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class ResponseWriter:
    """Writes the events of one response, and knows the response as it stands after them.

    chat: writes chunks of the chat completion that this is.
    """

    def __init__(self, accepted: Accepted, chat: Writer) -> None:
        self._id = accepted.id
        self._asked = accepted.facts["request"]
        self._head = accepted.head
        self._chat = chat
        self._next = 0
        self._items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._calls: dict[int, _Item] = {}
        self._finish = ""
        self._response: dict[str, Any] | None = None

    def open(self) -> str:
        """The events before there is any output."""
        response = self._build(IN_PROGRESS)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def write_delta(self, choice: int, delta: OutputDelta) -> str:
        """The events for new output."""
        events = ""
        for chunk in self._chat.write_delta(choice, delta).split("\n\n")[:-1]:
            one = json.loads(chunk.removeprefix("data: "))["choices"][0]
            said = one["delta"]
            logprobs = (one["logprobs"] or {}).get("content") or []
            hidden = logprobs and not self._asked.get("tools")
            if said.get("content") or (hidden and "content" in said):
                events += self._add_text(said["content"], logprobs)
            for call in said.get("tool_calls", ()):
                events += self._add_call(call)
            if one["finish_reason"] is not None:
                self._finish = one["finish_reason"]
        return events

    def write_last(self, fields: dict[str, Any]) -> str:
        """The events at the end; `fields` has the token counts."""
        is_whole = self._finish != "length"
        status = COMPLETED if is_whole else INCOMPLETE
        events = self._close(status)
        self._response = self._build(status, usage=fields["usage"])
        return events + self._event(f"response.{status}", response=self._response)

    def write_failure(self, status: str, reply: ErrorReply) -> str:
        """The event of a response that ends badly."""
        events = self._close(INCOMPLETE)
        error = {"code": "server_error", "message": reply.message} if status == FAILED else None
        self._response = self._build(status, error=error)
        return events + self._event("response.failed", response=self._response)

    def get_response(self) -> dict[str, Any]:
        """The response as it stands."""
        return self._response or self._build(IN_PROGRESS)

    def _build(
        self,
        status: str,
        usage: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response as it stands."""
        asked = self._asked
        output = [*self._items, *([self._view(self._open)] if self._open else [])]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._head["created"],
            "status": status,
            "background": bool(asked.get("background")),
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata") or {},
            "model": self._head["model"],
            "output": output,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": asked.get("previous_response_id"),
            "reasoning": None,
            "store": asked.get("store", True),
            "temperature": asked.get("temperature", 1.0),
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [],
            "top_logprobs": asked.get("top_logprobs", 0),
            "top_p": asked.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": _to_usage(usage),
            "user": asked.get("user"),
        }

    def _add_text(self, text: str, logprobs: list[Any]) -> str:
        events = ""
        item = self._open
        if item is None or item.fields["type"] != "message":
            events += self._close(COMPLETED)
            item = self._begin({"type": "message", "role": "assistant"}, "msg")
            events += self._event(
                "response.output_item.added", output_index=item.place, item=self._bare(item)
            )
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events += self._event("response.content_part.added", **self._where(item), part=part)
        item.parts.append(text)
        item.logprobs += logprobs
        return events + self._event(
            "response.output_text.delta", **self._where(item), delta=text, logprobs=logprobs
        )

    def _add_call(self, call: Mapping[str, Any]) -> str:
        events = ""
        item = self._calls.get(call["index"])
        if item is None:
            events += self._close(COMPLETED)
            name, call_id = call["function"]["name"], call["id"]
            item = self._begin({"type": "function_call", "call_id": call_id, "name": name}, "fc")
            self._calls[call["index"]] = item
            events += self._event(
                "response.output_item.added", output_index=item.place, item=self._bare(item)
            )
        arguments = call["function"].get("arguments", "")
        if not arguments:
            return events
        item.parts.append(arguments)
        return events + self._event(
            "response.function_call_arguments.delta",
            item_id=item.fields["id"],
            output_index=item.place,
            delta=arguments,
        )

    def _begin(self, fields: dict[str, Any], prefix: str) -> _Item:
        place = len(self._items)
        named = {"id": f"{prefix}_{self._id[5:]}_{place}", "status": IN_PROGRESS, **fields}
        self._open = _Item(place, named)
        return self._open

    def _close(self, status: str) -> str:
        """The events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return ""
        item.fields["status"] = status
        done, text = self._view(item), "".join(item.parts)
        self._items.append(done)
        self._open = None
        if done["type"] == "message":
            where = self._where(item)
            events = self._event(
                "response.output_text.done", **where, text=text, logprobs=item.logprobs
            )
            part = done["content"][0]
            events += self._event("response.content_part.done", **where, part=part)
        else:
            events = self._event(
                "response.function_call_arguments.done",
                item_id=done["id"],
                output_index=item.place,
                name=done["name"],
                arguments=text,
            )
        return events + self._event("response.output_item.done", output_index=item.place, item=done)

    def _where(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.fields["id"], "output_index": item.place, "content_index": 0}

    def _bare(self, item: _Item) -> dict[str, Any]:
        """An item before it has anything in it."""
        empty: dict[str, Any] = (
            {"content": []} if item.fields["type"] == "message" else {"arguments": ""}
        )
        return {**item.fields, **empty}

    def _view(self, item: _Item) -> dict[str, Any]:
        """An item as it stands."""
        text = "".join(item.parts)
        if item.fields["type"] != "message":
            return {**item.fields, "arguments": text}
        part = {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": list(item.logprobs),
        }
        return {**item.fields, "content": [part]}

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._next = self._next, self._next + 1
        data = dump({"type": kind, "sequence_number": number, **fields})
        return f"event: {kind}\ndata: {data}\n\n"


def _to_usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
