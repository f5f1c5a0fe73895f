"""The application: routes over one engine.

Owns the paths and what each does with the engine. A route reads its body, submits, and answers;
errors are raised and become HTTP in `errors.py`. Both APIs go the same way: parse, submit, then a
stream or a whole reply, always beside a watch on the client's connection. Around the routes stand,
from the outside: the error boundary, the gate that asks for keys, the framework.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from twostroke.engine.account_report import build_report
from twostroke.engine.service import Sender
from twostroke.errors import EngineClosed, InvalidParameter
from twostroke.server.body import read_json_object
from twostroke.server.chat import (
    ChatWriter,
    build_chat_reply,
    build_chat_submission,
    find_call_form,
)
from twostroke.server.completions import (
    CompletionChoices,
    CompletionWriter,
    build_completion_reply,
    build_completion_submission,
)
from twostroke.server.connection import run_while_connected
from twostroke.server.errors import install_error_handlers
from twostroke.server.events import EventStream, dump
from twostroke.server.gate import Gate, get_key
from twostroke.server.generation import Generation, Submission, submit
from twostroke.server.keys import KeyRing
from twostroke.server.limits import Admission, Traffic
from twostroke.server.logs import log_request
from twostroke.server.metrics import CONTENT_TYPE, EngineCollector, render_metrics
from twostroke.server.openapi import build_openapi
from twostroke.server.responses_api import install_responses
from twostroke.server.schemas import parse_chat_request, parse_completion_request
from twostroke.server.settings import Served, ServerSettings, describe_served
from twostroke.server.streams_api import CHAT, COMPLETION, Streams, install_streams
from twostroke.server.timings import build_last_fields, build_timings
from twostroke.server.tokens import detokenize, tokenize

if TYPE_CHECKING:
    from twostroke.engine.async_llm import AsyncLLM


MAX_USER_CHARS = 256
STEPS_TOLD = 100
# No step of a machine that works takes so long, but the first of a shape on a GPU, compiled once.
STALLED_S = 60.0


def create_app(
    engine: AsyncLLM, settings: ServerSettings, traffic: Traffic | None = None
) -> FastAPI:
    """The OpenAI-compatible application over a running engine, which it does not close.

    traffic: shared with whoever accepts the connections.
    """
    app = FastAPI(title="twostroke", openapi_url=None, redirect_slashes=False)
    traffic = traffic or Traffic()
    served = describe_served(engine, settings)
    admission = Admission(settings.limits, traffic, engine.load)
    streams = install_streams(app, served, settings.state)
    api = _Api(served, traffic, admission, streams)
    install_responses(app, served, streams, api.submit)
    for method, path, endpoint in (
        ("GET", "/v1/models", api.list_models),
        ("GET", "/v1/models/{name:path}", api.get_model),
        ("POST", "/v1/completions", api.complete),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/openapi.json", api.get_openapi),
        ("GET", "/ready", api.check_ready),
        ("GET", "/health", api.check_health),
        ("GET", "/metrics", api.get_metrics),
        ("GET", "/v1/steps", api.get_steps),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    ring = KeyRing(settings.keys)
    app.add_middleware(Gate, keys=ring, admission=admission, is_local=settings.is_local)
    install_error_handlers(app, _build_on_done(settings, traffic))
    return app


def _build_on_done(
    settings: ServerSettings, traffic: Traffic
) -> Callable[[Scope, int | None, float], None]:
    """What is noted of every request that is over: why it was refused, its line, its trace."""

    def note(scope: Scope, status: int | None, seconds: float) -> None:
        if "twostroke.refusal" in scope:
            traffic.refusals[scope["twostroke.refusal"]] += 1
        log_request(scope, status, seconds)
        if settings.tracer is not None:
            settings.tracer.record(scope, status, seconds)

    return note


class _Api:
    """The endpoints of one application."""

    def __init__(
        self, served: Served, traffic: Traffic, admission: Admission, streams: Streams
    ) -> None:
        self._served = served
        self._traffic = traffic
        self._admission = admission
        self._streams = streams
        self._collector = EngineCollector(served, traffic)

    async def list_models(self) -> Response:
        models = [self._describe_model(name) for name in self._served.names]
        return _reply({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        self._served.check_model(name)
        return _reply(self._describe_model(name))

    async def complete(self, request: Request) -> Response:
        body = await self._read(request)
        parsed = parse_completion_request(body)
        self._served.check_model(parsed.common.model)
        head = self._build_head("cmpl", parsed.common.model)
        submission = build_completion_submission(parsed, head["id"])
        generation = await self.submit(request, body, submission)
        choices = CompletionChoices(self._served, generation, submission, parsed.own.echo)
        if parsed.common.stream:
            writer = CompletionWriter(head, choices, parsed.common.include_usage)
            get_last = partial(build_last_fields, parsed.common, generation)
            record = self._streams.record(COMPLETION, head, body, generation)
            return EventStream(generation, writer, get_last, record)
        with self._streams.note_reply(head):
            outputs = await run_while_connected(request.receive, generation.collect())
        reply = build_completion_reply(head, generation, outputs, choices)
        if parsed.common.timings:
            reply["timings"] = build_timings(generation)
        return _reply(reply)

    async def chat(self, request: Request) -> Response:
        body = await self._read(request)
        parsed = parse_chat_request(body)
        self._served.check_model(parsed.common.model)
        head = self._build_head("chatcmpl", parsed.common.model)
        # A template runs for as long as the messages make it; other streams must not wait for it.
        submission = await asyncio.to_thread(
            build_chat_submission, self._served, parsed, head["id"]
        )
        generation = await self.submit(request, body, submission)
        get_bytes = self._served.engine.tokenizer.get_token_bytes
        form = find_call_form(self._served, parsed)
        if parsed.common.stream:
            writer = ChatWriter(head, get_bytes, parsed.common.include_usage, form)
            get_last = partial(build_last_fields, parsed.common, generation)
            record = self._streams.record(CHAT, head, body, generation)
            return EventStream(generation, writer, get_last, record)
        with self._streams.note_reply(head):
            outputs = await run_while_connected(request.receive, generation.collect())
        reply = build_chat_reply(head, generation, outputs, get_bytes, form)
        if parsed.common.timings:
            reply["timings"] = build_timings(generation)
        return _reply(reply)

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request)
        return _reply(await asyncio.to_thread(tokenize, self._served, body))

    async def detokenize(self, request: Request) -> Response:
        body = await self._read(request)
        return _reply(await asyncio.to_thread(detokenize, self._served, body))

    async def get_openapi(self) -> Response:
        return _reply(build_openapi(self._served))

    async def check_ready(self) -> Response:
        if self._traffic.is_draining:
            raise EngineClosed("the server is shutting down")
        await self.check_health()
        stall = self._served.engine.health().stall
        if stall is not None:
            raise EngineClosed(f"the engine is stalled: {stall}")
        return _reply({"status": "ready"})

    async def check_health(self) -> Response:
        health = self._served.engine.health()
        if not health.alive:
            raise EngineClosed(f"the engine is dead: {health.reason}")
        if health.stalled_s > STALLED_S:
            waiting = f"{health.live} requests wait"
            raise EngineClosed(
                f"the engine is stalled: no step for {health.stalled_s:.1f} s, {waiting}"
            )
        told = {"status": health.state, "live": health.live, "stalled_s": health.stalled_s}
        return _reply({**told, "reason": health.stall})

    async def get_metrics(self) -> Response:
        return Response(render_metrics(self._collector), media_type=CONTENT_TYPE)

    async def get_steps(self, request: str = "", last: int = STEPS_TOLD) -> Response:
        attribution = self._served.engine.attribution
        return _reply(await asyncio.to_thread(build_report, attribution, request, last))

    async def _read(self, request: Request) -> dict[str, Any]:
        return await read_json_object(request, self._served.settings.limits.body_bytes)

    async def submit(
        self, request: Request, body: dict[str, Any], submission: Submission
    ) -> Generation:
        """Give a request to the engine in its sender's name, if the queue has room for it."""
        self._admission.check_queue()
        submission = replace(submission, sender=_get_sender(request, body))
        generation = await run_while_connected(
            request.receive, submit(self._served.engine, submission)
        )
        request.scope["twostroke.generation"] = generation
        self._admission.watch(generation)
        return generation

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


def _get_sender(request: Request, body: dict[str, Any]) -> Sender:
    """The key's tenant, who reuses only its own cached prefixes; else whom the body names."""
    user = body.get("user")
    if user is not None and (not isinstance(user, str) or len(user) > MAX_USER_CHARS):
        raise InvalidParameter("user", f"must be a string of at most {MAX_USER_CHARS} characters")
    key = get_key(request)
    if key is not None and key.tenant:
        return Sender(key.tenant, key.tenant)
    return Sender(user or "")


def _reply(value: dict[str, Any]) -> Response:
    return Response(dump(value), media_type="application/json")
