"""The log: a line for each request, in JSON or for people, without their text or control bytes."""

from __future__ import annotations

import io
import json
import logging
import sys

import httpx
import pytest

from loopback import Running, wait_until
from twostroke.server.logs import JsonFormatter, PlainFormatter, configure_logging

BODY = {"model": "scripted", "prompt": "a secret"}
FORMATTERS = [JsonFormatter(), PlainFormatter()]


def find_lines(caplog: pytest.LogCaptureFixture, request_id: str) -> list[dict[str, object]]:
    """The fields of the lines of this request; servers of other tests may still be ending."""
    lines = [vars(one)["fields"] for one in caplog.records if one.name == "twostroke.requests"]
    return [line for line in lines if line["request_id"] == request_id]


def test_a_request_has_one_line_without_its_text(
    server: Running, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "twostroke.requests"):
        reply = http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
        wait_until(lambda: bool(find_lines(caplog, "mine-1")))
    assert reply.headers["x-request-id"] == "mine-1"
    (line,) = find_lines(caplog, "mine-1")
    assert (line["request_id"], line["status"], line["path"]) == ("mine-1", 200, "/v1/completions")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (9, 16)
    text = "".join(formatter.format(one) for one in caplog.records for formatter in FORMATTERS)
    assert "secret" not in text
    assert "sea" not in text


def test_a_refusal_is_named_and_quiet_paths_are_quiet(
    server: Running, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "twostroke.requests"):
        named = {"x-request-id": "mine-2"}
        http.get("/health", headers=named)
        http.get("/metrics", headers=named)
        http.post("/v1/completions", json={**BODY, "model": "x\x1b[31m"}, headers=named)
        wait_until(lambda: bool(find_lines(caplog, "mine-2")))
    (line,) = find_lines(caplog, "mine-2")
    assert (line["status"], line["refusal"]) == (404, "model_not_found")


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a\x1b[0m", "ä"])
def test_an_id_that_could_do_harm_is_replaced(
    server: Running, http: httpx.Client, sent: str
) -> None:
    reply = http.get("/health", headers={"x-request-id": sent.encode("latin-1")})
    assert reply.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_control_characters_are_written_out(formatter: logging.Formatter) -> None:
    fields = {"path": "/\x1b[2J\n{}\x7f\x9b"}
    record = logging.makeLogRecord({"msg": "a\r\nb\x00", "levelname": "INFO", "fields": fields})
    line = formatter.format(record)
    assert all(character.isprintable() for character in line)
    assert line.isascii() or isinstance(formatter, PlainFormatter)


def test_a_line_is_json_unless_a_terminal_reads_it() -> None:
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ours = logging.getLogger("twostroke")
    level_of_ours = ours.level
    try:
        configure_logging(stream)
        ours.info("hello %s", "you", extra={"fields": {"n": 1}})
        try:
            raise KeyError("lost")
        except KeyError:
            ours.exception("it failed")
    finally:
        root.handlers[:], root.level = handlers, level
        ours.setLevel(level_of_ours)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["level"], first["n"]) == ("hello you", "info", 1)
    assert "KeyError: 'lost'" in second["exception"]
    assert sys.stderr is not stream
