"""The kept streams as the server's routes see them: what to keep, what to tell again.

`GET /v1/streams/{id}` sends the events of a stream behind the one that `Last-Event-ID` names, and
goes on with what comes (WHATWG, HTML, "Server-sent events"). Owns the journal of one application
and the APIs whose requests are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from twostroke.errors import InvalidParameter
from twostroke.server.body import shorten
from twostroke.server.chat import ChatWriter, build_chat_submission, find_call_form
from twostroke.server.completions import (
    CompletionChoices,
    CompletionWriter,
    build_completion_submission,
)
from twostroke.server.durable import DurableLog
from twostroke.server.durable_records import Accepted
from twostroke.server.events import EventStream, Framing, Writer
from twostroke.server.gate import get_key
from twostroke.server.generation import Generation, PromptSource, Submission
from twostroke.server.schemas import parse_chat_request, parse_completion_request
from twostroke.server.settings import Served
from twostroke.server.streams import Entry, Journal, Record
from twostroke.server.streams_replay import Replay
from twostroke.server.streams_resume import Api, read_entries, resume
from twostroke.server.timings import build_last_fields

CHAT, COMPLETION = "chat", "completion"
_NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class ChatApi:
    """Chat completions."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def build_submission(self, accepted: Accepted) -> Submission:
        """What was asked of the engine."""
        return build_chat_submission(self._served, parse_chat_request(accepted.body), accepted.id)

    def build_writer(self, accepted: Accepted, output: PromptSource) -> Writer:
        """What wrote the events."""
        parsed = parse_chat_request(accepted.body)
        get_bytes = self._served.engine.tokenizer.get_token_bytes
        form = find_call_form(self._served, parsed)
        return ChatWriter(dict(accepted.head), get_bytes, parsed.common.include_usage, form)

    def build_last(self, accepted: Accepted, generation: Generation) -> dict[str, Any]:
        """What the reply ends with."""
        return build_last_fields(parse_chat_request(accepted.body).common, generation)


class CompletionApi:
    """Completions."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def build_submission(self, accepted: Accepted) -> Submission:
        """What was asked of the engine."""
        return build_completion_submission(parse_completion_request(accepted.body), accepted.id)

    def build_writer(self, accepted: Accepted, output: PromptSource) -> Writer:
        """What wrote the events."""
        parsed = parse_completion_request(accepted.body)
        submission = build_completion_submission(parsed, accepted.id)
        choices = CompletionChoices(self._served, output, submission, parsed.own.echo)
        return CompletionWriter(dict(accepted.head), choices, parsed.common.include_usage)

    def build_last(self, accepted: Accepted, generation: Generation) -> dict[str, Any]:
        """What the reply ends with."""
        return build_last_fields(parse_completion_request(accepted.body).common, generation)


class Streams:
    """The kept streams of one application."""

    def __init__(self, served: Served, folder: Path | None) -> None:
        """folder: of the durable log; None keeps streams in memory only. Raises InvalidParameter
        when the folder cannot be had."""
        self._served = served
        self._log = None if folder is None else DurableLog(folder)
        self.journal = Journal(self._log)
        self.apis: dict[str, Api] = {CHAT: ChatApi(served), COMPLETION: CompletionApi(served)}

    def record(
        self,
        kind: str,
        head: Mapping[str, Any],
        body: Mapping[str, Any],
        generation: Generation,
        facts: Mapping[str, Any] = _NO_FACTS,
    ) -> Record:
        """Keep the stream of a request that was just submitted. facts: the API's own of it."""
        accepted = Accepted(
            kind,
            head,
            body,
            generation.get_prompts(),
            generation.get_seeds(),
            generation.sender.tenant,
            generation.sender.cache_scope,
            fingerprint=self._served.fingerprint,
            facts=facts,
        )
        return self.journal.open(accepted, generation)

    def note_reply(self, head: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Remember, while it runs, a request that nobody could come back for."""
        return self.journal.note_reply(Accepted("", {"id": head["id"]}, {}, is_kept=False))

    async def resume_all(self) -> None:
        """Go on with what an earlier process left; once, before anything else is accepted."""
        if self._log is None:
            return
        for entry in read_entries(self._log, self.journal):
            await resume(entry, self.apis[entry.accepted.kind], self._served, self.journal)

    def close(self) -> None:
        """Let go of the log; what has not ended is the next process's."""
        self.journal.close()

    def try_find(self, request: Request, stream_id: str) -> Entry | None:
        """A kept request, for whoever may see it."""
        entry = self.journal.get(stream_id)
        key = get_key(request)
        tenant = key.tenant if key is not None else ""
        is_hidden = entry is not None and entry.accepted.cache_scope not in ("", tenant)
        return None if is_hidden else entry

    def find(self, request: Request, stream_id: str, what: str) -> Entry:
        """The same. Raises: HTTPException 404."""
        entry = self.try_find(request, stream_id)
        if entry is None:
            raise HTTPException(404, f"there is no {what} {shorten(stream_id)!r}, or no longer")
        return entry

    def get_token_bytes(self, token: int) -> bytes:
        """The bytes a kept token stands for; none for one that pads the model's vocabulary."""
        tokenizer = self._served.engine.tokenizer
        return tokenizer.get_token_bytes(token) if token < tokenizer.vocab_size else b""

    async def get_stream(self, request: Request, stream_id: str) -> Response:
        """The events of a stream behind the one its reader has."""
        entry = self.find(request, stream_id, "stream")
        accepted = entry.accepted
        if accepted.kind not in (CHAT, COMPLETION):
            raise HTTPException(404, f"{shorten(stream_id)!r} is at /v1/responses")
        api = self.apis[accepted.kind]
        output = Replay(entry, int(accepted.body.get("n") or 1), self.get_token_bytes)
        framing = Framing(after=parse_event_id(request.headers.get("last-event-id")))
        return EventStream(
            output, api.build_writer(accepted, output), output.get_last, framing=framing
        )


def parse_event_id(text: str | None) -> int:
    """The number of an event; -1 for none. Raises InvalidParameter."""
    if text is None or text == "":
        return -1
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidParameter("Last-Event-ID", f"must be the id of an event, not {text[:24]!r}")
    return int(text)


def install_streams(app: FastAPI, served: Served, folder: Path | None) -> Streams:
    """Give `app` its kept streams, which its maker must resume before it serves, and close."""
    streams = Streams(served, folder)
    app.add_api_route(
        "/v1/streams/{stream_id}", streams.get_stream, methods=["GET"], response_model=None
    )
    app.state.streams = streams
    return streams
