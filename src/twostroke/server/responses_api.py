"""The routes of /v1/responses: create, retrieve, cancel, delete, list the input.

A response is a kept request of the journal: whoever asks for it later, or reads its events again,
is told what its output tells. It is stored unless `store` is false. In the background it runs with
no client, and only then can it be cancelled by another request.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from twostroke.errors import InvalidParameter, RequestFailed
from twostroke.server.body import read_json_object, shorten
from twostroke.server.chat import ChatWriter, build_chat_submission, find_call_form
from twostroke.server.connection import ClientGone, run_while_connected
from twostroke.server.durable_records import Accepted
from twostroke.server.errors import ErrorReply, describe_error
from twostroke.server.events import EventStream, Framing, dump
from twostroke.server.generation import (
    Generation,
    PromptSource,
    Submission,
    split_tokens,
    to_failure,
)
from twostroke.server.responses import FAILED, ResponseWriter
from twostroke.server.responses_input import build_chat_body, check_fields, to_items, to_messages
from twostroke.server.schemas import parse_chat_request
from twostroke.server.settings import Served
from twostroke.server.streams import CANCELLED, FINISHED, Entry, Journal
from twostroke.server.streams_api import Streams, parse_event_id
from twostroke.server.streams_replay import Replay

RESPONSE = "response"
MAX_LISTED = 100

Submit = Callable[[Request, dict[str, Any], Submission], Awaitable[Generation]]


class ResponseApi:
    """What a kept response was made of; see streams_resume.Api."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def build_submission(self, accepted: Accepted) -> Submission:
        """What was asked of the engine."""
        return build_chat_submission(self._served, parse_chat_request(accepted.body), accepted.id)

    def build_writer(self, accepted: Accepted, output: PromptSource) -> ResponseWriter:
        """What wrote the events."""
        get_bytes = self._served.engine.tokenizer.get_token_bytes
        form = find_call_form(self._served, parse_chat_request(accepted.body))
        return ResponseWriter(
            accepted, ChatWriter(dict(accepted.head), get_bytes, include_usage=False, form=form)
        )

    def build_last(self, accepted: Accepted, generation: Generation) -> dict[str, Any]:
        """What the reply ends with."""
        return {"usage": generation.get_usage()}


class Responses:
    """The endpoints."""

    def __init__(self, served: Served, streams: Streams, submit: Submit) -> None:
        self._served = served
        self._streams = streams
        self._submit = submit
        self._api = ResponseApi(served)
        streams.apis[RESPONSE] = self._api

    async def create(self, request: Request) -> Response:
        """POST /v1/responses."""
        body = await read_json_object(request, self._served.settings.limits.body_bytes)
        fields = check_fields(body)
        self._served.check_model(fields["model"])
        response_id = f"resp_{uuid.uuid4().hex}"
        items = to_items(fields["input"], response_id)
        history = await self._get_history(request, fields.get("previous_response_id"))
        chat_body = build_chat_body(fields, items, history)
        head = {"id": response_id, "created": int(time.time()), "model": fields["model"]}
        submission = await asyncio.to_thread(
            build_chat_submission, self._served, parse_chat_request(chat_body), response_id
        )
        generation = await self._submit(request, body, submission)
        asked = {name: value for name, value in fields.items() if name != "input"}
        is_stored = fields.get("store", True)
        facts = {"request": asked, "items": items, "stored": is_stored}
        is_streamed, is_background = bool(fields.get("stream")), bool(fields.get("background"))
        if is_stored or is_streamed:
            journal = self._streams.journal
            record = self._streams.record(RESPONSE, head, chat_body, generation, facts)
            entry = journal.entries[response_id]
            if is_streamed and not is_background:
                writer = self._api.build_writer(entry.accepted, generation)
                get_last = partial(self._api.build_last, entry.accepted, generation)
                return EventStream(
                    generation, writer, get_last, record, self._frame(entry, writer, after=-1)
                )
            journal.run(
                entry, generation, partial(self._api.build_last, entry.accepted, generation)
            )
            if is_streamed:
                return self._tell(entry, after=-1)
            return await self._answer(request, journal, entry, waits=not is_background)
        accepted = Accepted(RESPONSE, head, chat_body, facts=facts)
        journal = Journal()
        with self._streams.note_reply(head):
            journal.open(accepted, generation)
            entry = journal.entries[response_id]
            journal.run(entry, generation, partial(self._api.build_last, accepted, generation))
            return await self._answer(request, journal, entry, waits=True)

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """GET /v1/responses/{id}, or its events with ?stream=true&starting_after=N."""
        entry = self._find(request, response_id)
        if request.query_params.get("stream") == "true":
            after = request.query_params.get("starting_after")
            if after is not None and not _is_number(after):
                raise InvalidParameter("starting_after", "must be the number of an event")
            return self._tell(entry, parse_event_id(after or request.headers.get("last-event-id")))
        self._check_stored(entry)
        return _reply(await asyncio.to_thread(self._build, entry))

    async def cancel(self, request: Request, response_id: str) -> Response:
        """POST /v1/responses/{id}/cancel."""
        entry = self._find(request, response_id)
        if not entry.accepted.facts["request"].get("background"):
            raise InvalidParameter("response_id", "only a response in the background is cancelled")
        self._streams.journal.cancel(entry, "the response was cancelled")
        return _reply(await asyncio.to_thread(self._build, entry))

    async def delete(self, request: Request, response_id: str) -> Response:
        """DELETE /v1/responses/{id}; what still runs of it is cancelled."""
        entry = self._find(request, response_id)
        self._streams.journal.cancel(entry, "the response was deleted")
        self._streams.journal.forget(response_id)
        return _reply({"id": response_id, "object": "response", "deleted": True})

    async def list_input(self, request: Request, response_id: str) -> Response:
        """GET /v1/responses/{id}/input_items."""
        entry = self._find(request, response_id)
        self._check_stored(entry)
        items = [_show_item(item) for item in entry.accepted.facts["items"]]
        if request.query_params.get("order", "desc") == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        after, limit = request.query_params.get("after"), request.query_params.get("limit", "20")
        if not _is_number(limit) or not 1 <= int(limit) <= MAX_LISTED:
            raise InvalidParameter("limit", f"must be from 1 to {MAX_LISTED}")
        if after is not None and after not in ids:
            raise InvalidParameter("after", "must be the id of an item")
        begin = ids.index(after) + 1 if after is not None else 0
        shown = items[begin : begin + int(limit)]
        return _reply(
            {
                "object": "list",
                "data": shown,
                "first_id": shown[0]["id"] if shown else None,
                "last_id": shown[-1]["id"] if shown else None,
                "has_more": begin + len(shown) < len(items),
            }
        )

    async def _answer(
        self, request: Request, journal: Journal, entry: Entry, waits: bool
    ) -> Response:
        """The response as it is, or once it is over; a client that goes while it waits ends it."""
        if waits:
            try:
                await run_while_connected(request.receive, entry.wait())
            except ClientGone:
                journal.cancel(entry, "its client has gone")
                raise
            if entry.interrupted is not None:
                raise entry.interrupted
            assert entry.end is not None
            if entry.end.how == FAILED:
                raise to_failure(entry.end.message)
        return _reply(await asyncio.to_thread(self._build, entry))

    def _tell(self, entry: Entry, after: int) -> EventStream:
        """The events of a response behind the one its reader has, and those to come."""
        output = Replay(entry, 1, self._streams.get_token_bytes)
        writer = self._api.build_writer(entry.accepted, output)
        framing = self._frame(entry, writer, after)
        return EventStream(output, writer, output.get_last, framing=framing)

    def _frame(self, entry: Entry, writer: ResponseWriter, after: int) -> Framing:
        def write_error(reply: ErrorReply) -> str:
            return writer.write_failure(_get_bad_status(entry), reply)

        return Framing(writer.open(), "", 0, after, write_error)

    def _build(self, entry: Entry) -> dict[str, Any]:
        """The response as it stands. Takes seconds for a long one with log-probabilities, so it
        has a thread, and the end is read first: all output is there when there is an end."""
        end = entry.end
        get_bytes = self._streams.get_token_bytes
        writer = self._api.build_writer(entry.accepted, Replay(entry, 1, get_bytes))
        for batch in entry.read(get_bytes):
            for choice, delta in batch:
                for part in split_tokens(delta):
                    writer.write_delta(choice, part)
        if end is not None and end.how == FINISHED:
            writer.write_last(end.last)
        elif end is not None:
            reply = describe_error(RequestFailed(end.message), "")
            writer.write_failure(_get_bad_status(entry), reply)
        return writer.get_response()

    async def _get_history(self, request: Request, response_id: str | None) -> list[Any]:
        """The messages of the conversation that a response ended, without its instructions."""
        if response_id is None:
            return []
        entry = self._streams.try_find(request, response_id)
        if entry is None or entry.accepted.kind != RESPONSE or not entry.accepted.facts["stored"]:
            words = f"there is no response {shorten(response_id)!r}, or no longer"
            raise InvalidParameter("previous_response_id", words)
        if entry.end is None or entry.end.how != FINISHED:
            raise InvalidParameter("previous_response_id", "that response has not finished")
        messages = list(entry.accepted.body["messages"])
        if entry.accepted.facts["request"].get("instructions"):
            del messages[0]
        response = await asyncio.to_thread(self._build, entry)
        return [*messages, *to_messages(response["output"])]

    def _find(self, request: Request, response_id: str) -> Entry:
        entry = self._streams.find(request, response_id, "response")
        if entry.accepted.kind != RESPONSE:
            raise HTTPException(404, f"{shorten(response_id)!r} is no response")
        return entry

    def _check_stored(self, entry: Entry) -> None:
        if not entry.accepted.facts["stored"]:
            raise HTTPException(404, f"the response {entry.accepted.id!r} was not stored")


def _is_number(text: str) -> bool:
    """True for digits that `int` reads; it refuses thousands of them, and not all in Unicode."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _get_bad_status(entry: Entry) -> str:
    return "cancelled" if entry.end is not None and entry.end.how == CANCELLED else FAILED


def _show_item(item: Mapping[str, Any]) -> dict[str, Any]:
    content = item.get("content")
    if item["type"] == "message" and isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        content = [{"type": kind, "text": content}]
        return {"status": "completed", **item, "content": content}
    return dict(item)


def _reply(value: dict[str, Any]) -> Response:
    return Response(dump(value), media_type="application/json")


def install_responses(app: FastAPI, served: Served, streams: Streams, submit: Submit) -> None:
    """Give `app` the routes of responses. submit: gives a request to the engine, if it may run."""
    api = Responses(served, streams, submit)
    one = "/v1/responses/{response_id}"
    for method, path, endpoint in (
        ("POST", "/v1/responses", api.create),
        ("GET", one, api.retrieve),
        ("DELETE", one, api.delete),
        ("POST", f"{one}/cancel", api.cancel),
        ("GET", f"{one}/input_items", api.list_input),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
