"""What the server writes to its log, and how: one line an event, JSON unless a person is reading.

Owns the fields of a request's line. It keeps true that a line holds no text of a prompt or an
answer, and no control character whatever a client sends: JSON escapes them, and so does the plain
form, so nobody can write a line of their own or talk to a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from starlette.types import Scope

from twostroke.server.body import shorten
from twostroke.server.generation import Generation
from twostroke.server.keys import Key
from twostroke.server.timings import build_timings

requests_log = logging.getLogger("twostroke.requests")

# Asked for every few seconds by machines: their lines would hide the others.
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time (Unix seconds), level, logger, message, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainFormatter(logging.Formatter):
    """A record for people: time, level, message and fields, in one line but for exceptions."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with control characters written out."""
        fields = getattr(record, "fields", {})
        words = [
            time.strftime("%H:%M:%S", time.localtime(record.created)),
            record.levelname.lower(),
            record.getMessage(),
            *(f"{name}={_round(value)}" for name, value in fields.items()),
        ]
        line = " ".join(words).translate(_ESCAPES)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(stream: TextIO = sys.stderr) -> None:
    """Send every logger's lines to `stream`: JSON, or plain where it is a terminal."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter() if stream.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("twostroke").setLevel(logging.INFO)


def log_request(scope: Scope, status: int | None, seconds: float) -> None:
    """Write the line of a request that is over; status: None where the client had gone."""
    if not requests_log.isEnabledFor(logging.INFO):
        return
    if scope["path"] in QUIET_PATHS and status is not None and status < 500:
        return
    key: Key | None = scope.get("twostroke.key")
    fields: dict[str, Any] = {
        "request_id": scope.get("twostroke.request_id", ""),
        "method": shorten(scope["method"]),
        "path": shorten(scope["path"]),
        "status": status,
        "seconds": round(seconds, 6),
    }
    if key is not None and key.tenant:
        fields["tenant"] = key.tenant
    if "twostroke.refusal" in scope:
        fields["refusal"] = scope["twostroke.refusal"]
    generation: Generation | None = scope.get("twostroke.generation")
    if generation is not None:
        usage = generation.get_usage()
        fields["prompt_tokens"] = usage["prompt_tokens"]
        fields["completion_tokens"] = usage["completion_tokens"]
        fields.update(build_timings(generation))
    outcome = "its client has gone" if status is None else f"answered {status}"
    requests_log.info("%s %s", fields["method"], outcome, extra={"fields": fields})


def _round(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
