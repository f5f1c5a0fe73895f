"""A file of requests answered by an application, each line exactly once, however often it is begun.

Owns the batch lines that OpenAI's clients write and read: what a line of requests must hold, what a
line of answers holds, and which lines an output file has already. The whole input is checked before
anything runs. An answer is appended in one write when it is whole, so after whatever end the
next run goes on behind the last whole line. Nothing here knows of models or sockets: requests go
through the application as those of the network do, and are refused as they would be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Scope

from twostroke.errors import EngineClosed, InvalidParameter
from twostroke.server.durable import write_all

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
AT_ONCE = 64
MAX_ID_CHARS = 512
# Being told to come back is no answer: it is asked again after so many seconds. What is unavailable
# (503) stays so: only an engine that is closed or lost answers that.
_BUSY = 429
_BUSY_S = 2.0


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request: its number in the file, counted from 1, the caller's name for it, and what to
    send where; body is JSON."""

    number: int
    custom_id: str
    url: str
    model: str
    body: bytes


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Lines in all, of these answered before, answered now, and refused (of those now)."""

    total: int
    before: int
    answered: int
    refused: int


def read_batch(path: Path) -> list[BatchLine]:
    """Every line of a batch. Raises InvalidParameter, naming the first that is wrong."""
    lines: list[BatchLine] = []
    seen: dict[str, int] = {}
    for number, raw in _read_lines(path):
        line = _parse_line(path, number, raw)
        if line.custom_id in seen:
            raise _refuse(path, number, f"custom_id is that of line {seen[line.custom_id]}")
        seen[line.custom_id] = number
        lines.append(line)
    if not lines:
        raise InvalidParameter("input", f"{path} holds no request")
    return lines


def open_output(path: Path, lines: list[BatchLine]) -> tuple[int, set[str]]:
    """The output's descriptor, at its end, and the custom ids that it answers.

    What a killed run left behind the last whole line is cut off. Raises InvalidParameter where the
    file cannot be written, another process writes it, or it answers other requests.
    """
    import fcntl

    try:
        output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidParameter("output", f"cannot write {path}: {error.strerror}") from None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, output)
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidParameter("output", f"another process is writing {path}") from None
        done = _read_answered(path, {line.custom_id for line in lines})
        os.ftruncate(output, _find_whole(path))
        undo.pop_all()
    return output, done


async def run_batch(
    app: ASGIApp,
    lines: list[BatchLine],
    output: int,
    done: set[str],
    on_progress: Callable[[BatchProgress], None],
) -> BatchProgress:
    """Answer the lines that `done` lacks, many at once, in no order; returns the final count.

    output: a descriptor that answers are appended to. Raises an ExceptionGroup of EngineClosed when
    the engine died, of InvalidParameter when the output cannot be written: what is answered by then
    is written, and the next run does the rest.
    """
    left = iter([line for line in lines if line.custom_id not in done])
    counts = {"answered": 0, "refused": 0}

    def get_progress() -> BatchProgress:
        return BatchProgress(len(lines), len(done), counts["answered"], counts["refused"])

    async def work() -> None:
        for line in left:
            status, body = await _ask(app, line)
            if status >= 500:
                raise EngineClosed(f"line {line.number} was answered with {status}: {body!r:.300}")
            _append(output, _write_answer(line, status, body))
            counts["answered"] += 1
            counts["refused"] += status >= 400
            on_progress(get_progress())

    async with asyncio.TaskGroup() as workers:
        for _ in range(AT_ONCE):
            workers.create_task(work())
    os.fsync(output)
    return get_progress()


async def _ask(app: ASGIApp, line: BatchLine) -> tuple[int, bytes]:
    """Status and body of the application's answer; asked again while it is busy."""
    while True:
        status, body = await _call(app, line)
        if status != _BUSY:
            return status, body
        await asyncio.sleep(_BUSY_S)


async def _call(app: ASGIApp, line: BatchLine) -> tuple[int, bytes]:
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(line.body)).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 0),
    }
    waiting: list[Message] = [{"type": "http.request", "body": line.body, "more_body": False}]
    never = asyncio.Event()
    status, parts = 500, []

    async def receive() -> Message:
        if not waiting:  # nobody hangs up on a file
            await never.wait()
        return waiting.pop()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


def _append(output: int, answer: bytes) -> None:
    """A whole answer or nothing: others may still be appended behind it."""
    size = os.fstat(output).st_size
    try:
        write_all(output, answer)
    except OSError as error:
        os.ftruncate(output, size)
        raise InvalidParameter("output", f"cannot be written: {error.strerror}") from None


def _write_answer(line: BatchLine, status: int, body: bytes) -> bytes:
    response = {
        "status_code": status,
        "request_id": f"req_{uuid.uuid4().hex}",
        "body": json.loads(body),
    }
    answer = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": None,
    }
    return json.dumps(answer).encode() + b"\n"


def _parse_line(path: Path, number: int, raw: bytes) -> BatchLine:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, number, f"is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise _refuse(path, number, "must be a JSON object")
    custom_id, url, body = (fields.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise _refuse(path, number, f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters")
    if fields.get("method", "POST") != "POST":
        raise _refuse(path, number, 'method must be "POST"')
    if url not in ENDPOINTS:
        raise _refuse(path, number, f"url must be one of {', '.join(ENDPOINTS)}")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise _refuse(path, number, "body must be an object that names a model")
    if body.get("stream") or body.get("background"):
        raise _refuse(path, number, "body must ask neither for a stream nor for the background")
    return BatchLine(number, custom_id, url, body["model"], json.dumps(body).encode())


def _read_answered(path: Path, known: set[str]) -> set[str]:
    """Custom ids of the whole lines of an output."""
    done: set[str] = set()
    whole = _find_whole(path)
    read = 0
    for number, raw in _read_lines(path, keeps_blank=True):
        read += len(raw)
        if read > whole or not raw.strip():
            continue
        try:
            custom_id = json.loads(raw)["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InvalidParameter(
                "output", f"line {number} of {path} is no answer of a batch; name another file"
            ) from None
        if custom_id not in known:
            raise InvalidParameter(
                "output", f"line {number} of {path} answers another batch; name another file"
            )
        done.add(custom_id)
    return done


def _find_whole(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    whole = 0
    for _, raw in _read_lines(path, keeps_blank=True):
        whole += len(raw) if raw.endswith(b"\n") else 0
    return whole


def _read_lines(path: Path, keeps_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if keeps_blank or raw.strip():
                    yield number, raw
    except OSError as error:
        raise InvalidParameter("input", f"cannot read {path}: {error.strerror}") from None


def _refuse(path: Path, number: int, why: str) -> InvalidParameter:
    return InvalidParameter("input", f"line {number} of {path}: {why}")
