"""The one place where the project's errors become HTTP.

Owns the OpenAI error shape `{"error": {"message", "type", "param", "code"}}` and the table from the
tree in `twostroke.errors` to status codes. Every answer that is not a success is made here, whether
a route raised, no route matched, or the framework refused the request. An unexpected exception is
logged with the request's id and its text is never shown to the client.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twostroke.errors import (
    EngineClosed,
    ExecutorLost,
    InvalidParameter,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    SlowReader,
    TemplateError,
    TwostrokeError,
    UnknownModel,
)
from twostroke.server.body import shorten
from twostroke.server.connection import ClientGone

logger = logging.getLogger("twostroke.server")

EVENT_STREAM = "text/event-stream"
CLIENT_GONE_STATUS = 499  # nobody reads it: the connection is closed
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    414: "path_too_long",
    415: "unsupported_media_type",
}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as the OpenAI API words it, with its status and extra headers."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The body."""
        inner = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": inner})

    def to_event(self) -> bytes:
        """The body as a server-sent event, for a stream that has begun."""
        return f"data: {self.to_json()}\n\n".encode()

    def to_response(self) -> Response:
        """The whole HTTP response."""
        return Response(self.to_json(), self.status, dict(self.headers), "application/json")


def describe_error(error: Exception, request_id: str) -> ErrorReply:
    """Map an exception to its HTTP answer.

    Args: error: what was raised; request_id: named in the answer to an unexpected one.
    Returns: the reply; an exception that nobody meant to raise becomes a 500 without its text.
    """
    message = str(error)
    match error:
        case PromptTooLong():
            return _refuse(message, code="context_length_exceeded")
        case InvalidParameter():
            return _refuse(message, param=error.parameter, code="invalid_value")
        case TemplateError():
            return _refuse(message, param="messages", code="invalid_messages")
        case InvalidRequest():
            return _refuse(message)
        case UnknownModel():
            return ErrorReply(404, message, "invalid_request_error", "model", "model_not_found")
        case Overloaded():
            wait = {"retry-after": str(math.ceil(error.retry_after_s))}
            return ErrorReply(429, message, "rate_limit_error", code=error.limit, headers=wait)
        case SlowReader():
            return ErrorReply(408, message, "invalid_request_error", code="slow_reader")
        case EngineClosed() | ExecutorLost():
            return ErrorReply(503, message, "server_error", code="engine_unavailable")
        case TwostrokeError():
            return ErrorReply(500, message, "server_error", code="request_failed")
        case HTTPException():
            return _describe_http(error)
        case RequestValidationError():
            return _refuse("the request's path or query is not valid")
    text = f"internal error; the server's log names it under request id {request_id}"
    return ErrorReply(500, text, "server_error", code="internal_error")


def _refuse(message: str, param: str | None = None, code: str | None = None) -> ErrorReply:
    return ErrorReply(400, message, "invalid_request_error", param, code)


def _describe_http(error: HTTPException) -> ErrorReply:
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    code = _HTTP_CODES.get(error.status_code)
    return ErrorReply(
        error.status_code, str(error.detail), kind, None, code, dict(error.headers or {})
    )


def get_request_id(request: Request) -> str:
    """The id the error boundary gave this HTTP request."""
    return str(request.scope.get("twostroke.request_id", "unknown"))


def note_refusal(request: Request, reply: ErrorReply) -> None:
    """Remember why a request was turned away, for its line in the log and for the counts."""
    request.scope["twostroke.refusal"] = reply.code or reply.type


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone | ClientDisconnect):
        return Response(status_code=CLIENT_GONE_STATUS)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = HTTPException(error.status_code, _name_route(request, error), error.headers)
    reply = describe_error(error, get_request_id(request))
    note_refusal(request, reply)
    if reply.status >= 500:
        logger.error("request %s: %s: %s", get_request_id(request), type(error).__name__, error)
    return reply.to_response()


def _name_route(request: Request, error: HTTPException) -> str:
    path = shorten(request.url.path)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{request.method} is not allowed on {path}; use {allowed}"
    if error.detail != "Not Found":
        return error.detail
    return f"there is no {path} here; see /v1/models, /v1/completions, /v1/chat/completions"


# Told of every request that is over: its scope, the status sent (None where nobody was there any
# more to send one to), and the seconds it took.
OnDone = Callable[[Scope, int | None, float], None]


class ErrorBoundary:
    """The outermost frame of every HTTP request: gives it an id and answers what nothing else did.

    It stands outside the framework's own exception handling, so that an unexpected exception is
    logged once, with the id, and answered in the one error shape. An id that the client sent is
    kept where it is harmless in a log.
    """

    def __init__(self, app: ASGIApp, on_done: OnDone) -> None:
        self._app = app
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one ASGI scope; only HTTP is given an id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _choose_id(Request(scope))
        scope["twostroke.request_id"] = request_id
        started_s = time.monotonic()
        media_type: str | None = None  # of the response, once it has started
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal media_type, status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                media_type = headers.get("content-type", "")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed unexpectedly", request_id)
            reply = describe_error(error, request_id)
            if media_type is None:
                await reply.to_response()(scope, receive, send_with_id)
            elif media_type.startswith(EVENT_STREAM):
                event = reply.to_event()
                await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            seen = None if status == CLIENT_GONE_STATUS else status
            self._on_done(scope, seen, time.monotonic() - started_s)


def _choose_id(request: Request) -> str:
    sent = request.headers.get("x-request-id", "")
    return sent if _HARMLESS_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"


def install_error_handlers(app: FastAPI, on_done: OnDone) -> None:
    """Give `app` the error shape for every refusal, and say what became of each request; mutates
    it. Middleware that is added later stands outside, where errors are not answered."""
    for kind in (
        TwostrokeError,
        HTTPException,
        RequestValidationError,
        ClientGone,
        ClientDisconnect,
    ):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(ErrorBoundary, on_done=on_done)
