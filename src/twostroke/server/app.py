"""The application: routes over one engine.

Owns the paths and what each does with the engine. A route reads its body, submits, and answers;
errors are raised and become HTTP in `errors.py`. Both APIs go the same way: parse, submit, then a
stream or a whole reply, always beside a watch on the client's connection.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from twostroke.errors import EngineClosed
from twostroke.server.body import read_json_object
from twostroke.server.chat import ChatWriter, build_chat_reply, build_chat_submission
from twostroke.server.completions import (
    CompletionChoices,
    CompletionWriter,
    build_completion_reply,
    build_completion_submission,
)
from twostroke.server.connection import run_while_connected
from twostroke.server.errors import install_error_handlers
from twostroke.server.events import EventStream, dump
from twostroke.server.generation import submit
from twostroke.server.metrics import CONTENT_TYPE, EngineCollector, render_metrics
from twostroke.server.schemas import parse_chat_request, parse_completion_request
from twostroke.server.settings import Served, ServerSettings, describe_served
from twostroke.server.timings import build_last_fields, build_timings

if TYPE_CHECKING:
    from twostroke.engine.async_llm import AsyncLLM


def create_app(engine: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """The OpenAI-compatible application over a running engine, which it does not close."""
    app = FastAPI(title="twostroke", openapi_url=None, redirect_slashes=False)
    api = _Api(describe_served(engine, settings))
    for method, path, endpoint in (
        ("GET", "/v1/models", api.list_models),
        ("GET", "/v1/models/{name:path}", api.get_model),
        ("POST", "/v1/completions", api.complete),
        ("POST", "/v1/chat/completions", api.chat),
        ("GET", "/health", api.check_health),
        ("GET", "/metrics", api.get_metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    install_error_handlers(app)
    return app


class _Api:
    """The endpoints of one application."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._collector = EngineCollector(served)

    async def list_models(self) -> Response:
        models = [self._describe_model(name) for name in self._served.names]
        return _reply({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        self._served.check_model(name)
        return _reply(self._describe_model(name))

    async def complete(self, request: Request) -> Response:
        body = await read_json_object(request, self._served.settings.max_body_bytes)
        parsed = parse_completion_request(body)
        self._served.check_model(parsed.common.model)
        head = self._build_head("cmpl", parsed.common.model)
        submission = build_completion_submission(parsed, head["id"])
        generation = await run_while_connected(
            request.receive, submit(self._served.engine, submission)
        )
        choices = CompletionChoices(self._served, generation, submission, parsed.own.echo)
        if parsed.common.stream:
            include_usage = parsed.common.include_usage
            writer = CompletionWriter(head, choices, include_usage)
            get_last = partial(build_last_fields, parsed.common, generation)
            return EventStream(generation, writer, get_last)
        outputs = await run_while_connected(request.receive, generation.collect())
        reply = build_completion_reply(head, generation, outputs, choices)
        if parsed.common.timings:
            reply["timings"] = build_timings(generation)
        return _reply(reply)

    async def chat(self, request: Request) -> Response:
        body = await read_json_object(request, self._served.settings.max_body_bytes)
        parsed = parse_chat_request(body)
        self._served.check_model(parsed.common.model)
        head = self._build_head("chatcmpl", parsed.common.model)
        # A template runs for as long as the messages make it; other streams must not wait for it.
        submission = await asyncio.to_thread(
            build_chat_submission, self._served, parsed, head["id"]
        )
        generation = await run_while_connected(
            request.receive, submit(self._served.engine, submission)
        )
        get_bytes = self._served.engine.tokenizer.get_token_bytes
        if parsed.common.stream:
            include_usage = parsed.common.include_usage
            writer = ChatWriter(head, get_bytes, include_usage)
            get_last = partial(build_last_fields, parsed.common, generation)
            return EventStream(generation, writer, get_last)
        outputs = await run_while_connected(request.receive, generation.collect())
        reply = build_chat_reply(head, generation, outputs, get_bytes)
        if parsed.common.timings:
            reply["timings"] = build_timings(generation)
        return _reply(reply)

    async def check_health(self) -> Response:
        health = self._served.engine.health()
        if not health.alive:
            raise EngineClosed(f"the engine is dead: {health.reason}")
        return _reply({"status": "ok", "live": health.live, "stalled_s": health.stalled_s})

    async def get_metrics(self) -> Response:
        return Response(render_metrics(self._collector), media_type=CONTENT_TYPE)

    def _describe_model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "twostroke",
            "root": self._served.names[0],
            "max_model_len": self._served.engine.spec.context_tokens,
        }

    def _build_head(self, prefix: str, model: str) -> dict[str, Any]:
        """What a reply and all chunks of a stream begin with; the id is new."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self._served.fingerprint,
        }


def _reply(value: dict[str, Any]) -> Response:
    return Response(dump(value), media_type="application/json")
