"""A streaming client of the OpenAI completions API that costs little beside the server it measures.

Client and server share the machine's few cores, so this speaks HTTP/1.1 on a plain connection and
reads events without a library in between.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from twostroke.bench.served import Answer, Arrival
from twostroke.errors import EngineError

HOST = "127.0.0.1"
PATIENCE_S = 600


class BadReply(EngineError):
    """A server answered a request with something else than a stream of events."""


def get_model_id(port: int) -> str:
    """The name by which a server calls its model."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/v1/models", timeout=PATIENCE_S) as reply:
        return str(json.load(reply)["data"][0]["id"])


def is_healthy(port: int) -> bool:
    """True once a server says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


def send_load(port: int, arrivals: Sequence[Arrival], extra: Mapping[str, object]) -> list[Answer]:
    """Send every request when it is due, all streams at once. Raises BadReply.

    extra: fields of the body that only this server knows.
    """
    fields = {"model": get_model_id(port), **extra}

    async def run() -> list[Answer]:
        begin = time.perf_counter()
        return await asyncio.gather(*(send(port, one, fields, begin) for one in arrivals))

    return asyncio.run(run())


async def send(port: int, arrival: Arrival, fields: Mapping[str, object], begin: float) -> Answer:
    """One request; its times count from `begin`."""
    await asyncio.sleep(arrival.at - (time.perf_counter() - begin))
    body = {
        **fields,
        "prompt": list(arrival.prompt),
        "max_tokens": arrival.new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times: list[float] = []
    tokens = 0
    async for event in stream(port, "/v1/completions", json.dumps(body).encode()):
        if any(choice.get("text") for choice in event.get("choices", ())):
            times.append(time.perf_counter() - begin)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    return Answer(tuple(times), tokens)


async def stream(port: int, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The events of one reply, as they come. Raises BadReply."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=2**20)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            rest = await reader.read(2000)
            raise BadReply(f"{path}: {status.decode(errors='replace')}{rest.decode()}")
        left = b""
        async for piece in read_pieces(reader, b"chunked" in status.lower()):
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
    finally:
        writer.close()


async def read_pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes, without the sizes of chunks (RFC 9112, section 7.1)."""
    while not is_chunked:
        piece = await reader.read(2**16)
        if not piece:
            return
        yield piece
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()
