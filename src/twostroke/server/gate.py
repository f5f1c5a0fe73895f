"""The gate: nothing behind it is reached without a key, where keys are asked for.

Owns which paths are open and what a refusal looks like. It stands before routing, so a route that
is added later is behind it without anybody thinking of it, and an unknown path tells nothing. A
request that passes carries its key; its limits are held until its answer is complete. A server for
this machine alone, which asks for no keys, answers only to names of this machine: a web page can
make its own name lead here (DNS rebinding), and would then be of the same origin.
"""

from __future__ import annotations

import contextlib
import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twostroke.errors import TwostrokeError
from twostroke.server.errors import ErrorReply, describe_error, get_request_id, note_refusal
from twostroke.server.keys import Key, KeyRing
from twostroke.server.limits import Admission

# Said to whoever asks: whether the process works, and nothing about what it does.
OPEN_PATHS = frozenset({"/health"})

_WRONG_KEY = ErrorReply(
    401,
    "send a valid key in the header `Authorization: Bearer KEY`",
    "invalid_request_error",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


_WRONG_HOST = ErrorReply(
    403,
    "this server is asked for by the names of this machine only, such as localhost",
    "invalid_request_error",
    code="invalid_host",
)


class Gate:
    """The middleware that checks keys and counts requests against them.

    is_local: only requests to localhost, or to an address, are answered.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, admission: Admission, is_local: bool = False
    ) -> None:
        self._app = app
        self._keys = keys
        self._admission = admission
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        key = self._keys.find(request.headers.get("authorization"))
        refusal = None
        if self._is_local and not is_local_name(request.url.hostname or ""):
            refusal = _WRONG_HOST
        elif len(self._keys) and key is None:
            refusal = _WRONG_KEY
        if refusal is not None:
            note_refusal(request, refusal)
            await refusal.to_response()(scope, receive, send)
            return
        scope["twostroke.key"] = key
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            with contextlib.ExitStack() as counted:
                counted.enter_context(self._admission.count(key))

                async def send_and_release(message: Message) -> None:
                    # Before the client hears the last of it: it may send the next at once.
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        counted.close()
                    await send(message)

                await self._app(scope, receive, send_and_release)
        except TwostrokeError as error:
            reply = describe_error(error, get_request_id(request))
            note_refusal(request, reply)
            await reply.to_response()(scope, receive, send)


def is_local_name(host: str) -> bool:
    """Whether no name server can have a say in where `host` leads: an address, or localhost."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def get_key(request: Request) -> Key | None:
    """The key a request came with; None where none is asked for."""
    key: Key | None = request.scope.get("twostroke.key")
    return key
