"""/v1/chat/completions: from messages to a prompt, and from output to replies and chunks.

The `developer` role is OpenAI's newer name of `system` and is given to the template as that; the
parts of a message are joined by newlines. A template that would leave out a tool call in silence
is an error, because the model would be asked about a conversation that it was not shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from twostroke.engine.outputs import OutputDelta
from twostroke.errors import TemplateError
from twostroke.server.events import ChunkFrame, dump
from twostroke.server.generation import Generation, Submission, build_params, get_finish_reason
from twostroke.server.logprobs import GetBytes, to_chat_logprobs
from twostroke.server.schemas import ChatRequest, Message
from twostroke.server.settings import Served
from twostroke.server.structured import join_tools, read_output_form, read_tool_use
from twostroke.text.tool_calls import (
    CallArguments,
    CallStarted,
    Content,
    ToolCallReader,
    ToolEvent,
    ToolForm,
)
from twostroke.text.tools import read_arguments

_EMPTY_CONTENT = '{"content":""}'


def build_chat_submission(served: Served, request: ChatRequest, request_id: str) -> Submission:
    """What a chat request asks of the engine.

    Raises: InvalidParameter; TemplateError when the template refuses the messages.
    """
    own, common = request.own, request.common
    new, old = "max_completion_tokens", "max_tokens"
    limit = common.max_tokens if own.max_completion_tokens is None else own.max_completion_tokens
    public = {"logprobs": "top_logprobs"}
    if own.max_completion_tokens is not None:
        public[old] = new
    engine, use = served.engine, read_tool_use(own)
    form = join_tools(read_output_form(common), use, engine.tool_form, engine.tokenizer)
    public |= form.public_names
    values = {
        "max_tokens": limit,
        "logprobs": (own.top_logprobs or 0) if own.logprobs else None,
        "structured_outputs": form.structured,
    }
    params = build_params(common, values, public)
    messages = [to_template_message(each) for each in own.messages]
    prompt = engine.render_chat(messages, [tool.write() for tool in use.shown] or None)
    _check_tool_calls_shown(own.messages, prompt)
    return Submission(
        request_id,
        [prompt],
        params,
        priority=common.priority,
        add_special=False,
        public_names=public,
    )


def find_call_form(served: Served, request: ChatRequest) -> ToolForm | None:
    """How calls are to be read out of the answer; None where none may be made."""
    return served.engine.tool_form if read_tool_use(request.own).callable else None


def to_template_message(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    role = "system" if message.role == "developer" else message.role
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    fields: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                **call.model_dump(),
                "function": {
                    "name": call.function.name,
                    "arguments": read_arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return fields


def _check_tool_calls_shown(messages: Sequence[Message], prompt: str) -> None:
    for message in messages:
        for call in message.tool_calls or ():
            if call.function.name not in prompt:
                raise TemplateError(
                    "this model's chat template leaves out tool calls; send the messages without"
                )


class _Choice:
    """The text of one choice, read as content and calls.

    A call's id is made of the reply's, so that whoever writes the reply again names it alike.
    """

    def __init__(self, reply_id: str, choice: int, form: ToolForm | None) -> None:
        self._name = f"{reply_id} {choice}"
        self._reader = None if form is None else ToolCallReader(form)
        self._has_calls = False

    def read(self, delta: OutputDelta) -> list[ToolEvent]:
        """What a delta adds."""
        if self._reader is None:
            return [Content(delta.text)] if delta.text else []
        events = self._reader.feed(delta.text)
        if delta.ending is not None:
            events += self._reader.finish()
        self._has_calls = self._has_calls or any(isinstance(each, CallStarted) for each in events)
        return events

    def get_finish_reason(self, delta: OutputDelta) -> str | None:
        """The reason after all that was read."""
        reason = get_finish_reason(delta)
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def build_call(self, event: CallStarted) -> dict[str, Any]:
        """A call as it begins, in OpenAI's shape."""
        digest = hashlib.sha256(f"{self._name} {event.index}".encode()).hexdigest()
        function = {"name": event.name, "arguments": ""}
        return {"id": f"call_{digest[:24]}", "type": "function", "function": function}


class ChatWriter:
    """Chunks of a streamed chat completion.

    form: how calls of tools are read out of the text; None where there can be none.

    Each choice opens with its role when its first output exists, not before: a client that times
    the first chunk times the first token.
    """

    def __init__(
        self,
        head: dict[str, Any],
        get_bytes: GetBytes,
        include_usage: bool,
        form: ToolForm | None = None,
    ) -> None:
        self._frame = ChunkFrame({**head, "object": "chat.completion.chunk"}, include_usage)
        self._get_bytes = get_bytes
        self._id = str(head["id"])
        self._form = form
        self._opened: dict[int, _Choice] = {}

    def write_delta(self, choice: int, delta: OutputDelta) -> str:
        """The events for one delta; mutates which choices were opened."""
        events = ""
        if choice not in self._opened:
            self._opened[choice] = _Choice(self._id, choice, self._form)
            role = '{"role":"assistant","content":"","refusal":null}'
            events += self._write(choice, role)
        own = self._opened[choice]
        said = [_build_delta(own, event) for event in own.read(delta)]
        logprobs = dump(_get_logprobs(delta, self._get_bytes))
        for text in said or ([_EMPTY_CONTENT] if delta.logprobs else []):
            events += self._write(choice, text, logprobs)
            logprobs = "null"
        reason = own.get_finish_reason(delta)
        if reason is not None:
            events += self._write(choice, "{}", finish=dump(reason))
        return events

    def write_last(self, fields: dict[str, Any]) -> str:
        """The event that has no choice, with these fields."""
        return self._frame.frame_last(fields)

    def _write(self, choice: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return self._frame.frame_choice(
            f'{{"index":{choice},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
        )


def build_chat_reply(
    head: dict[str, Any],
    generation: Generation,
    outputs: Sequence[OutputDelta],
    get_bytes: GetBytes,
    form: ToolForm | None = None,
) -> dict[str, Any]:
    """The reply that is not streamed, from each choice's whole output."""
    choices = []
    for choice, output in enumerate(outputs):
        own = _Choice(str(head["id"]), choice, form)
        message = _build_message(own, own.read(output))
        choices.append(
            {
                "index": choice,
                "message": message,
                "logprobs": _get_logprobs(output, get_bytes),
                "finish_reason": own.get_finish_reason(output),
            }
        )
    usage = generation.get_usage()
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage}


def _build_delta(own: _Choice, event: ToolEvent) -> str:
    """The `delta` of a chunk, as JSON text."""
    match event:
        case Content(text):
            return f'{{"content":{dump(text)}}}'
        case CallStarted(index):
            return dump({"tool_calls": [{"index": index, **own.build_call(event)}]})
        case CallArguments(index, text):
            return dump({"tool_calls": [{"index": index, "function": {"arguments": text}}]})


def _build_message(own: _Choice, events: Sequence[ToolEvent]) -> dict[str, Any]:
    """A whole answer in OpenAI's shape."""
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallStarted():
                calls.append(own.build_call(event))
            case CallArguments(index, text):
                calls[index]["function"]["arguments"] += text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    return {**message, "content": content or None, "tool_calls": calls} if calls else message


def _get_logprobs(delta: OutputDelta, get_bytes: GetBytes) -> dict[str, Any] | None:
    if not delta.logprobs:
        return None
    return to_chat_logprobs(delta.logprobs, delta.token_bytes, get_bytes)
