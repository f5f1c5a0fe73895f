"""Server-sent events: a stream of output as an HTTP response.

Owns the framing and the life of a stream: nothing is sent before the first event exists, so that
an error before it still has its own status; an error after it is an event, and the last one; a
client that goes away, at any moment, cancels the generation. However the response ends, nothing of
it is left running in the engine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twostroke.engine.outputs import OutputDelta
from twostroke.errors import TwostrokeError
from twostroke.server.connection import ClientGone, run_while_connected
from twostroke.server.errors import EVENT_STREAM, describe_error, get_request_id, logger
from twostroke.server.generation import Generation

DONE = b"data: [DONE]\n\n"


class Writer(Protocol):
    """Puts one API's output into events."""

    def write_delta(self, choice: int, delta: OutputDelta) -> str: ...

    def write_last(self, fields: dict[str, Any]) -> str: ...


class EventStream(Response):
    """A streamed reply.

    It is a Response because that is the framework's interface. The framework's own streaming
    response is not used: depending on the protocol version it notices a lost client only when it
    next sends, which during a long prefill is too late, and it may drop its source without
    starting it, which would leave the request running.
    """

    media_type = EVENT_STREAM

    def __init__(
        self,
        generation: Generation,
        writer: Writer,
        get_last: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """get_last: after the output, gives the fields of a last event, or none for no event."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._get_last = get_last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream, as long as the client is there."""
        try:
            request_id = get_request_id(Request(scope))
            await run_while_connected(receive, self._send_all(send, request_id))
        except ClientGone:
            return
        finally:
            self._generation.cancel()

    async def _send_all(self, send: Send, request_id: str) -> None:
        started = False
        async with contextlib.aclosing(self._events()) as events:
            try:
                async for event in events:
                    if not started:
                        await self._start(send)
                        started = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TwostrokeError as error:
                if not started:
                    raise
                reply = describe_error(error, request_id)
                logger.error("request %s ended its stream: %s", request_id, error)
                await send(
                    {"type": "http.response.body", "body": reply.to_event(), "more_body": True}
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": list(self.raw_headers),
            }
        )

    async def _events(self) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(self._generation.batches()) as batches:
            async for batch in batches:
                text = "".join(self._writer.write_delta(choice, delta) for choice, delta in batch)
                if text:
                    yield text.encode("utf-8")
        last = self._get_last()
        if last:
            yield self._writer.write_last(last).encode("utf-8")
        yield DONE


class ChunkFrame:
    """The parts that all chunks of one stream share, serialised once.

    A chunk is built by joining strings: one is sent for every step of every stream.
    """

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        self._start = "data: " + dump(head)[:-1] + ',"choices":['
        self._usage_null = ',"usage":null' if include_usage else ""

    def frame_choice(self, choice: str) -> str:
        """An event with one choice, given as JSON text."""
        return f"{self._start}{choice}]{self._usage_null}}}\n\n"

    def frame_last(self, fields: dict[str, Any]) -> str:
        """The event with no choice, and these fields: token counts, timings."""
        return f"{self._start}],{dump(fields)[1:]}\n\n"


def dump(value: Any) -> str:
    """Compact JSON text; a value JSON has no word for is our bug and raises ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
