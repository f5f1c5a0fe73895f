"""Reads a request body into a JSON object, refusing everything JSON parsers disagree about.

It keeps the process safe from any bytes a client may send: the size is bounded before the body is
held, nesting before anything recurses over it, integers before anything multiplies them. NaN,
infinities, integers beyond 64 bits and lone surrogates are refused, so that no later layer meets a
value that cannot be tokenised or written back out.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from twostroke.errors import InvalidRequest

MAX_DEPTH = 64
MIN_INTEGER = -(2**63)
MAX_INTEGER = 2**64 - 1
# A refused body is still read up to this many times the limit: closing a connection with unread
# data resets it, and the client would see the reset in place of the refusal.
DRAIN_FACTOR = 8

MAX_SHOWN_CHARS = 64

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def shorten(text: str) -> str:
    """Words of a client, short enough to be sent back in an error."""
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read and parse the body of a POST.

    Args: request: not read yet; max_bytes: longest body accepted.
    Returns: the JSON object. Raises: HTTPException 413 or 415; InvalidRequest.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A browser sends any other type across origins without asking, so this also keeps
        # foreign pages from using a server on the loopback interface.
        sent = f"not {shorten(kind)!r}" if kind else "and none was sent"
        raise HTTPException(415, f"the content-type must be application/json, {sent}")
    return parse_json_object(await _read_bytes(request, max_bytes))


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= max_bytes:
            chunks.append(chunk)
        elif size > DRAIN_FACTOR * max_bytes:
            break
    if size > max_bytes:
        raise HTTPException(
            413, f"the body is larger than {max_bytes} bytes", {"connection": "close"}
        )
    return b"".join(chunks)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON text strictly.

    Args: raw: the whole body. Returns: its top-level object.
    Raises: InvalidRequest, saying what is wrong and where that is known.
    """
    if not raw.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    try:
        value = json.loads(
            text,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    _check_depth(value)
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


def _parse_int(text: str) -> int:
    # The length first: converting a very long numeral is quadratic, and Python refuses it anyway.
    value = int(text) if len(text) <= 20 else MAX_INTEGER + 1
    if not MIN_INTEGER <= value <= MAX_INTEGER:
        raise InvalidRequest(f"the body holds an integer beyond 64 bits: {text[:24]}")
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(f"the body holds a number too large to represent: {text[:24]}")
    return value


def _refuse_constant(name: str) -> float:
    raise InvalidRequest(f"the body holds {name}, which JSON does not have")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InvalidRequest(
            f"the body holds a lone surrogate, \\u{code:04x}, which is no character"
        ) from None
