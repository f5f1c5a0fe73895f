"""/v1/chat/completions: from messages to a prompt, and from output to replies and chunks.

The `developer` role is OpenAI's newer name of `system` and is given to the template as that; the
parts of a message are joined by newlines. A template that would leave out a tool call in silence
is an error, because the model would be asked about a conversation that it was not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twostroke.engine.outputs import OutputDelta
from twostroke.errors import TemplateError
from twostroke.server.events import ChunkFrame, dump
from twostroke.server.generation import Generation, Submission, build_params, get_finish_reason
from twostroke.server.logprobs import GetBytes, to_chat_logprobs
from twostroke.server.schemas import ChatRequest, Message
from twostroke.server.settings import Served


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
    params = build_params(
        common,
        {"max_tokens": limit, "logprobs": (own.top_logprobs or 0) if own.logprobs else None},
        public,
    )
    prompt = served.engine.render_chat([to_template_message(each) for each in own.messages])
    _check_tool_calls_shown(own.messages, prompt)
    return Submission(request_id, [prompt], params, priority=common.priority, add_special=False)


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
        fields["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return fields


def _check_tool_calls_shown(messages: Sequence[Message], prompt: str) -> None:
    for message in messages:
        for call in message.tool_calls or ():
            if call.function.name not in prompt:
                raise TemplateError(
                    "this model's chat template leaves out tool calls; send the messages without"
                )


class ChatWriter:
    """Chunks of a streamed chat completion.

    Each choice opens with its role when its first output exists, not before: a client that times
    the first chunk times the first token.
    """

    def __init__(self, head: dict[str, Any], get_bytes: GetBytes, include_usage: bool) -> None:
        self._frame = ChunkFrame({**head, "object": "chat.completion.chunk"}, include_usage)
        self._get_bytes = get_bytes
        self._opened: set[int] = set()

    def write_delta(self, choice: int, delta: OutputDelta) -> str:
        """The events for one delta; mutates which choices were opened."""
        events = ""
        if choice not in self._opened:
            self._opened.add(choice)
            role = '{"role":"assistant","content":"","refusal":null}'
            events += self._write(choice, role)
        if delta.text or delta.logprobs:
            content = f'{{"content":{dump(delta.text)}}}'
            events += self._write(choice, content, dump(_get_logprobs(delta, self._get_bytes)))
        reason = get_finish_reason(delta)
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
) -> dict[str, Any]:
    """The reply that is not streamed, from each choice's whole output."""
    choices = [
        {
            "index": choice,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": _get_logprobs(output, get_bytes),
            "finish_reason": get_finish_reason(output),
        }
        for choice, output in enumerate(outputs)
    ]
    usage = generation.get_usage()
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage}


def _get_logprobs(delta: OutputDelta, get_bytes: GetBytes) -> dict[str, Any] | None:
    if not delta.logprobs:
        return None
    return to_chat_logprobs(delta.logprobs, delta.token_bytes, get_bytes)
