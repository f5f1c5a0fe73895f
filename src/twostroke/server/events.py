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
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twostroke.engine.outputs import OutputDelta
from twostroke.errors import EngineClosed, TwostrokeError
from twostroke.server.connection import ClientGone, run_while_connected
from twostroke.server.errors import (
    EVENT_STREAM,
    ErrorReply,
    describe_error,
    get_request_id,
    logger,
)
from twostroke.server.generation import Batch, split_tokens

DONE = "data: [DONE]\n\n"


class Output(Protocol):
    """Where the output of a stream comes from: a Generation, or what is kept of one."""

    def batches(self) -> AsyncGenerator[Batch, None]: ...

    def cancel(self) -> None: ...


class Pen(Protocol):
    """Enters output before it is sent, and how it ended (streams.py)."""

    def append(self, batch: Batch) -> None: ...

    def finish(self, last: dict[str, Any]) -> None: ...

    def fail(self, error: TwostrokeError) -> None: ...

    def cancel(self, why: str) -> None: ...

    def leave(self) -> None: ...


class Writer(Protocol):
    """Puts one API's output into events."""

    def write_delta(self, choice: int, delta: OutputDelta) -> str: ...

    def write_last(self, fields: dict[str, Any]) -> str: ...


def _write_plain_error(reply: ErrorReply) -> str:
    return reply.to_event().decode()


@dataclass(frozen=True, slots=True)
class Framing:
    """What a stream has around its output.

    opening, done: events before and after it. first_id: of the first event. after: the last event
    the client has already, so that it is sent those behind it.
    """

    opening: str = ""
    done: str = DONE
    first_id: int = 1
    after: int = -1
    write_error: Callable[[ErrorReply], str] = _write_plain_error


class EventStream(Response):
    """A streamed reply. Its events are numbered, one a token of each choice where tokens have text
    of their own, so that a client can come back and name the last it has.

    It is a Response because that is the framework's interface. The framework's own streaming
    response is not used: depending on the protocol version it notices a lost client only when it
    next sends, which during a long prefill is too late, and it may drop its source without
    starting it, which would leave the request running.
    """

    media_type = EVENT_STREAM

    def __init__(
        self,
        output: Output,
        writer: Writer,
        get_last: Callable[[], dict[str, Any]] = dict,
        pen: Pen | None = None,
        framing: Framing = Framing(),
    ) -> None:
        """get_last: after the output, gives the fields of a last event, or none for no event."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._output = output
        self._writer = writer
        self._get_last = get_last
        self._pen = pen
        self._framing = framing
        self._next_id = framing.first_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream, as long as the client is there."""
        try:
            request_id = get_request_id(Request(scope))
            await run_while_connected(receive, self._send_all(send, request_id))
        except ClientGone:
            if self._pen is not None:
                self._pen.cancel("its client has gone")
        finally:
            self._output.cancel()
            if self._pen is not None:
                self._pen.leave()

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
                if self._pen is not None:
                    self._pen.fail(error)
                if not started:
                    raise
                logger.error("request %s ended its stream: %s", request_id, error)
                event = self._write_error(error, request_id)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write_error(self, error: TwostrokeError, request_id: str) -> bytes:
        """The last event. That the engine was closed is no part of the stream: it has no number."""
        reply = describe_error(error, request_id)
        if isinstance(error, EngineClosed):
            return reply.to_event()
        return self._number(self._framing.write_error(reply))

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": list(self.raw_headers),
            }
        )

    async def _events(self) -> AsyncGenerator[bytes, None]:
        if self._framing.opening:
            yield self._number(self._framing.opening)
        async with contextlib.aclosing(self._output.batches()) as batches:
            async for batch in batches:
                if self._pen is not None:
                    self._pen.append(batch)
                text = "".join(
                    self._writer.write_delta(choice, part)
                    for choice, delta in batch
                    for part in split_tokens(delta)
                )
                if text:
                    yield self._number(text)
        last = self._get_last()
        if self._pen is not None:
            self._pen.finish(last)
        ending = self._writer.write_last(last) if last else ""
        yield self._number(ending + self._framing.done)

    def _number(self, events: str) -> bytes:
        """Events with their ids, but for those that the client has."""
        parts = events.split("\n\n")[:-1]
        first, after = self._next_id, self._framing.after
        self._next_id += len(parts)
        shown = [
            f"id: {number}\n{part}\n\n"
            for number, part in enumerate(parts, first)
            if number > after
        ]
        return "".join(shown).encode()


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


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump(value: Any) -> str:
    """Compact JSON text; a value JSON has no word for is our bug and raises ValueError."""
    return "null" if value is None else _ENCODER.encode(value)
