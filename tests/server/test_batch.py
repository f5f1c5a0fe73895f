"""Laws of batches: each line is answered once, however often the file is begun."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from fakes import FakeExecutor, make_parts
from twostroke.engine.async_llm import AsyncLLM
from twostroke.errors import EngineClosed, InvalidParameter
from twostroke.server.app import create_app
from twostroke.server.batch import BatchProgress, open_output, read_batch, run_batch
from twostroke.server.settings import ServerSettings

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Echo:
    """An application that answers with what it was sent; `statuses` are taken first."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.seen: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        body = (await receive())["body"]
        await asyncio.sleep(0)
        status = self.statuses.pop(0) if self.statuses else 200
        if status < 429:
            self.seen.append(json.loads(body)["prompt"])
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def write_input(path: Path, count: int = 5) -> Path:
    """A batch of completions whose prompts are their numbers."""
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": str(number)},
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(app: ASGIApp, source: Path, target: Path) -> BatchProgress:
    """A whole run."""
    lines = read_batch(source)
    output, done = open_output(target, lines)
    try:
        return asyncio.run(run_batch(app, lines, output, done, lambda progress: None))
    finally:
        os.close(output)


def read_answers(path: Path) -> dict[str, Any]:
    """Answers by the caller's names; each name once."""
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({each["custom_id"] for each in answers}) == len(answers)
    return {each["custom_id"]: each for each in answers}


def test_every_line_is_answered_under_its_name(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    progress = run(Echo(), source, target)
    answers = read_answers(target)
    assert (progress.total, progress.answered, progress.refused) == (200, 200, 0)
    assert {name: answer["response"]["body"]["prompt"] for name, answer in answers.items()} == {
        f"r{number}": str(number) for number in range(200)
    }


def test_cut_at_every_byte_the_next_run_answers_the_rest_once(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run(Echo(), source, target)
    whole = target.read_bytes()
    for end in range(len(whole)):
        target.write_bytes(whole[:end])
        app = Echo()
        progress = run(app, source, target)
        assert len(app.seen) == 3 - whole[:end].count(b"\n") == progress.answered
        assert set(read_answers(target)) == {"r0", "r1", "r2"}


def test_a_finished_batch_asks_for_nothing(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    run(Echo(), source, target)
    app = Echo()
    assert run(app, source, target).before == 5
    assert app.seen == []


def test_a_refused_line_is_answered_with_its_status(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    progress = run(Echo(400), source, target)
    assert progress.refused == 1
    assert read_answers(target)["r0"]["response"]["status_code"] == 400


def test_a_busy_application_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostroke.server.batch._BUSY_S", 0.0)
    source, target = write_input(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    run(Echo(429, 429, 200), source, target)
    assert read_answers(target)["r0"]["response"]["status_code"] == 200


@pytest.mark.parametrize("status", [500, 503])
def test_a_failure_of_ours_is_no_answer(tmp_path: Path, status: int) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    with pytest.raises(ExceptionGroup) as caught:
        run(Echo(status), source, target)
    assert caught.group_contains(EngineClosed)
    assert target.read_bytes() == b""


def test_a_closed_engine_ends_the_batch(tmp_path: Path) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    source.write_text(source.read_text(encoding="utf-8").replace('"m"', '"fake"'), encoding="utf-8")
    engine = AsyncLLM(make_parts(FakeExecutor()))
    engine.close()
    with pytest.raises(ExceptionGroup) as caught:
        run(create_app(engine, ServerSettings()), source, target)
    assert caught.group_contains(EngineClosed, match="answered with 503")


def test_a_full_disk_ends_the_batch_and_leaves_no_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_input(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    write = os.write
    left = [3]

    def write_some(number: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, data[:20] if left[0] == 0 else data)

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(ExceptionGroup) as caught:
        run(Echo(), source, target)
    assert caught.group_contains(InvalidParameter, match="No space left")
    monkeypatch.undo()
    assert len(read_answers(target)) == 2
    assert run(Echo(), source, target).answered == 1


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    lines = read_batch(write_input(tmp_path / "in.jsonl"))
    output, _ = open_output(tmp_path / "out.jsonl", lines)
    try:
        with pytest.raises(InvalidParameter, match="another process"):
            open_output(tmp_path / "out.jsonl", lines)
    finally:
        os.close(output)


def test_the_output_of_another_batch_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text('{"custom_id": "theirs"}\n', encoding="utf-8")
    with pytest.raises(InvalidParameter, match=r"line 1 .* answers another batch"):
        run(Echo(), write_input(tmp_path / "in.jsonl"), target)
    assert target.read_text(encoding="utf-8") == '{"custom_id": "theirs"}\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "must be a JSON object"),
        ("{}", "custom_id must be"),
        ('{"custom_id": "a", "url": "/health"}', "url must be one of"),
        ('{"custom_id": "a", "method": "GET"}', "method must be"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {}}', "names a model"),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {"model": "m", "stream": true}}',
            "stream",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, why: str) -> None:
    source = write_input(tmp_path / "in.jsonl", 2)
    source.write_text(source.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")
    with pytest.raises(InvalidParameter, match=f"line 3 of .*{why}"):
        read_batch(source)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 1)
    source.write_text(source.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(InvalidParameter, match=r"line 2 .* that of line 1"):
        read_batch(source)


def test_an_empty_batch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InvalidParameter, match="holds no request"):
        read_batch(tmp_path / "in.jsonl")
