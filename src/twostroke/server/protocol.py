"""One HTTP/1.1 connection, with the time-outs and the bounds that the web server leaves out.

Owns the deadlines of a connection: to send a request's head, then its body, and to take what was
written to it. It keeps true that a connection which neither sends nor takes anything is closed,
whatever state it is in, and that a client which is slow slows nobody else. The protocol of uvicorn
is inherited from because that is the library's interface for it.

    no request ──head begins──▶ head ──complete──▶ body ──complete──▶ answer ──▶ no request
     idle_s                     header_s            body_s             stall_s while writing waits
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from twostroke.server.errors import ErrorReply
from twostroke.server.limits import Limits, Traffic

logger = logging.getLogger("twostroke.server")

_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
_NOT_HTTP = ErrorReply(400, "this is not valid HTTP/1.1", "invalid_request_error", code="bad_http")
_TOO_SLOW = ErrorReply(
    408, "the request did not arrive in time", "invalid_request_error", code="request_timeout"
)
_TOO_MANY = ErrorReply(
    503,
    "too many connections are open",
    "server_error",
    code="connections",
    headers={"retry-after": "1"},
)


def build_protocol(limits: Limits, traffic: Traffic) -> Callable[..., asyncio.Protocol]:
    """What makes the protocol of each new connection, as uvicorn asks for it."""
    return partial(GuardedProtocol, limits, traffic)


class _Connection(h11.Connection):
    """h11's connection, whose own checks of a chunk take as long as the rest of writing it.

    Pieces of a body sent in chunks are framed here, where h11 would take one; all else is h11's.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._is_chunked = False

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """The bytes of an event; raises h11.LocalProtocolError as h11 does."""
        if self._is_chunked and isinstance(event, h11.Data) and self.our_state is h11.SEND_BODY:
            return [b"%x\r\n%b\r\n" % (len(event.data), event.data)] if event.data else []
        parts = super().send_with_data_passthrough(event)
        if isinstance(event, h11.Response):
            head = b"".join(parts or ()).lower()
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in head
        return parts


class GuardedProtocol(H11Protocol):
    """A connection with deadlines. traffic: counts it while it is open, and why it was refused."""

    def __init__(self, limits: Limits, traffic: Traffic, **given: Any) -> None:
        super().__init__(**given)
        self.conn = _Connection()
        self._limits = limits
        self._traffic = traffic
        self._reading: asyncio.TimerHandle | None = None
        self._awaited: str | None = None  # the limit that `_reading` keeps
        self._writing: asyncio.TimerHandle | None = None
        self._is_counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, or turn it away."""
        # The library names the kind of transport that a stream has, asyncio any kind.
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.write_bytes)
        if self._traffic.connections >= self._limits.connections:
            self._refuse(_TOO_MANY)
            return
        self._traffic.connections += 1
        self._is_counted = True
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget every deadline."""
        self._stop_reading()
        self._stop_writing()
        if self._is_counted:
            self._is_counted = False
            self._traffic.connections -= 1
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a deadline runs from the first byte of what is incomplete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_reading()

    def pause_writing(self) -> None:
        """The client takes less than is written to it: its stream waits, for so long."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    def on_response_complete(self) -> None:
        """An answer is written; what the client has not taken of it has a deadline too."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_writing()
        self._watch_reading()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has begun in time."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def shutdown(self) -> None:
        """The server stops: as uvicorn does, but nobody holds it up who takes nothing."""
        super().shutdown()
        if self.transport.is_closing():
            self._watch_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the one error shape."""
        self._refuse(_NOT_HTTP)

    def _refuse(self, reply: ErrorReply) -> None:
        """Say why and close; whoever runs for this connection hears that it is gone."""
        self._traffic.refusals[reply.code or reply.type] += 1
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_to_bytes(reply))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._watch_writing()

    def _watch_reading(self) -> None:
        """Set the deadline of what is awaited from the client, unless it runs already."""
        awaited = self._find_awaited()
        if awaited == self._awaited:
            return
        self._stop_reading()
        if awaited is not None:
            self._awaited = awaited
            wait_s = getattr(self._limits, awaited)
            self._reading = self.loop.call_later(wait_s, self._give_up_reading)

    def _find_awaited(self) -> str | None:
        """The limit that is running, by its name; None while nothing is awaited."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.SEND_BODY:
            return "body_s"
        if self.conn.their_state is h11.IDLE:
            return "header_s" if self.conn.trailing_data[0] else "idle_s"
        return None

    def _give_up_reading(self) -> None:
        if self._awaited == "idle_s":
            self.transport.close()
            self._watch_writing()
        else:
            self._refuse(_TOO_SLOW)

    def _stop_reading(self) -> None:
        self._awaited = None
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _watch_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self._limits.stall_s, self._give_up_writing)

    def _give_up_writing(self) -> None:
        self._writing = None
        if self.transport.is_closing() or self.flow.write_paused:
            if self.transport.get_write_buffer_size():
                self._traffic.refusals["slow_reader"] += 1
                logger.warning("a client read too little for %g s: closed", self._limits.stall_s)
            self.transport.abort()

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def _to_bytes(reply: ErrorReply) -> bytes:
    """A whole HTTP response that ends its connection."""
    body = reply.to_json().encode()
    lines = [f"HTTP/1.1 {reply.status} {_PHRASES[reply.status]}", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
