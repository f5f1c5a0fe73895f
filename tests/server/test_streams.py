"""Laws of kept streams: told again they are the same, and a next process goes on with them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from fakes import FakeExecutor, make_parts
from loopback import run_server
from twostroke.core.ports import OnDone
from twostroke.core.types import StepPlan
from twostroke.engine.async_llm import AsyncLLM
from twostroke.errors import EngineClosed
from twostroke.server.durable import MAGIC, DurableLog, frame, read_records
from twostroke.server.durable_records import Accepted, write_accepted, write_record
from twostroke.server.generation import Batch, Generation
from twostroke.server.settings import ServerSettings
from twostroke.server.streams import FINISHED, End, Entry, Journal
from twostroke.text.chat import ChatTemplate

# One for all: making a client reads the machine's certificates.
CLIENT = httpx.Client(timeout=20, trust_env=False)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
CHAT_BODY: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "max_tokens": 12,
    "stream_options": {"include_usage": True},
}
COMPLETION_BODY: dict[str, Any] = {
    "model": "fake",
    "prompt": "hey",
    "stream": True,
    "max_tokens": 12,
}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, CHAT_BODY),
    "sampled": (CHAT, {**CHAT_BODY, "seed": 7, "logprobs": True, "top_logprobs": 2}),
    "unseeded": (CHAT, {**CHAT_BODY, "temperature": 1.0}),
    "three": (CHAT, {**CHAT_BODY, "seed": 8, "n": 3}),
    "stop": (CHAT, {**CHAT_BODY, "seed": 9, "max_tokens": 40, "stop": ["aa", "b", "zc"]}),
    "echo": (COMPLETIONS, {**COMPLETION_BODY, "echo": True, "logprobs": 1}),
    "prompts": (COMPLETIONS, {**COMPLETION_BODY, "prompt": ["a", "bc"], "n": 2}),
}


def make_engine(context_tokens: int = 96) -> AsyncLLM:
    """An engine whose tokens depend on all before them, and on nothing of its process."""
    parts = make_parts(
        FakeExecutor(), chat_template=ChatTemplate(TEMPLATE), context_tokens=context_tokens
    )
    return AsyncLLM(parts)


def serve(folder: Path | None, context_tokens: int = 96) -> Any:
    """A server over a folder; leaving it is an end like any other."""
    return run_server(make_engine(context_tokens), ServerSettings(state=folder))


def split(text: str) -> list[tuple[int, str]]:
    """Events by their ids."""
    events = []
    for event in text.split("\n\n")[:-1]:
        number, data = event.split("\n")
        events.append((int(number.removeprefix("id: ")), data.removeprefix("data: ")))
    return events


def get_id(events: Sequence[tuple[int, str]]) -> str:
    """The id that every chunk carries."""
    return str(json.loads(events[0][1])["id"])


def by_choice(events: Sequence[tuple[int, str]]) -> dict[int | None, list[str]]:
    """What was said of each choice, in order; of what belongs to none, under None."""
    said: dict[int | None, list[str]] = {}
    for _, data in events:
        chunk = json.loads(data) if data != "[DONE]" else {}
        choices = chunk.get("choices") or [{"index": None}]
        said.setdefault(choices[0]["index"], []).append(data)
    return said


def post(address: str, body: dict[str, Any]) -> str:
    """A whole stream."""
    return CLIENT.post(address, json=body).text


def read_rest(url: str, stream_id: str, last: int | None) -> list[tuple[int, str]]:
    """The events behind the last one."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    reply = CLIENT.get(f"{url}/v1/streams/{stream_id}", headers=headers)
    assert reply.status_code == 200, reply.text
    return split(reply.text)


@pytest.fixture(scope="module", autouse=True)
def _closed_client() -> Iterator[None]:
    yield
    CLIENT.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, list[Any]]]:
    """The log of a server that told each stream, one after the other, and what it told."""
    folder = tmp_path_factory.mktemp("state")
    with serve(folder) as url:
        events = {name: split(post(url + path, body)) for name, (path, body) in BODIES.items()}
    return (folder / "log").read_bytes(), events


@pytest.mark.parametrize("name", BODIES)
def test_a_stream_told_again_is_the_same_from_any_event(name: str) -> None:
    path, body = BODIES[name]
    with serve(None) as url:
        events = split(post(url + path, body))
        assert [number for number, _ in events] == list(range(1, len(events) + 1))
        assert read_rest(url, get_id(events), None) == events
        for last in range(0, len(events) + 1, 3):
            assert read_rest(url, get_id(events), last) == events[last:]


@pytest.mark.parametrize("name", BODIES)
def test_from_any_record_on_the_next_process_tells_the_same(
    name: str, told: tuple[bytes, dict[str, list[Any]]], tmp_path: Path
) -> None:
    data, all_events = told
    events = all_events[name]
    own = [one for one in read_records(data)[0] if json.loads(one)[1] == get_id(events)]
    for count in range(1, len(own) + 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "log").write_bytes(MAGIC + b"".join(map(frame, own[:count])))
        with serve(folder) as url:
            again = read_rest(url, get_id(events), None)
            assert [number for number, _ in again] == list(range(1, len(events) + 1))
            # Choices may take other turns than they did, but each says what it said.
            assert by_choice(again) == by_choice(events)
            if len(by_choice(events)) <= 2:
                assert again == events
            half = len(events) // 2
            assert read_rest(url, get_id(events), half) == again[half:]


def test_a_stop_leaves_what_runs_to_the_next_process(tmp_path: Path) -> None:
    executor = FakeExecutor()
    parts = make_parts(executor, chat_template=ChatTemplate(TEMPLATE), context_tokens=96)

    def answer_five(plan: StepPlan, on_done: OnDone) -> None:
        (executor.answer_now if len(executor.plans) < 6 else executor.answer_held)(plan, on_done)

    executor.behave = answer_five
    with run_server(AsyncLLM(parts), ServerSettings(state=tmp_path)) as url:
        pool = ThreadPoolExecutor(1)
        reply = pool.submit(post, url + CHAT, CHAT_BODY)
        while not executor.held:
            time.sleep(0.002)
    cut = reply.result().split("\n\n")
    pool.shutdown()
    assert "engine_unavailable" in cut[-2]
    first = split("\n\n".join([*cut[:-2], ""]))
    with serve(tmp_path) as url:
        rest = read_rest(url, get_id(first), first[-1][0])
        assert first + rest == read_rest(url, get_id(first), None)
    assert json.loads(rest[-2][1])["usage"]["completion_tokens"] == 12


def test_a_request_that_did_not_stream_ends_with_its_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.dumps(
        [
            "accepted",
            "chatcmpl-1",
            {"kind": "", "head": {"id": "chatcmpl-1"}, "body": {}, "is_kept": False},
        ]
    )
    (tmp_path / "log").write_bytes(MAGIC + frame(record.encode()))
    with caplog.at_level(logging.WARNING), serve(tmp_path):
        pass
    assert "1 requests ended with the earlier server" in caplog.text
    caplog.clear()
    with serve(tmp_path):
        pass
    assert caplog.text == ""


def test_a_stream_of_another_model_does_not_go_on(
    told: tuple[bytes, dict[str, list[Any]]], tmp_path: Path
) -> None:
    data, events = told
    own = [one for one in read_records(data)[0] if json.loads(one)[1] == get_id(events["greedy"])]
    (tmp_path / "log").write_bytes(MAGIC + b"".join(map(frame, own[:2])))
    with serve(tmp_path, context_tokens=95) as url:
        rest = read_rest(url, get_id(events["greedy"]), None)
    assert rest[:-1] == events["greedy"][: len(rest) - 1]
    assert "another model" in json.loads(rest[-1][1])["error"]["message"]


def test_a_request_that_takes_server_after_server_with_it_ends(
    told: tuple[bytes, dict[str, list[Any]]], tmp_path: Path
) -> None:
    data, events = told
    stream_id = get_id(events["greedy"])
    own = [one for one in read_records(data)[0] if json.loads(one)[1] == stream_id][:2]
    own += [json.dumps(["resumed", stream_id, None]).encode()] * 3
    (tmp_path / "log").write_bytes(MAGIC + b"".join(map(frame, own)))
    with serve(tmp_path) as url:
        rest = read_rest(url, stream_id, None)
    assert "died 3 times" in json.loads(rest[-1][1])["error"]["message"]


def test_what_is_no_kept_stream_is_not_found() -> None:
    with serve(None) as url:
        assert CLIENT.get(f"{url}/v1/streams/nobody").status_code == 404
        events = split(post(url + CHAT, CHAT_BODY))
        address = f"{url}/v1/streams/{get_id(events)}"
        reply = CLIENT.get(address, headers={"Last-Event-ID": "-1"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "Last-Event-ID"


def restore(journal: Journal, request_id: str) -> Entry:
    """A request without output that `journal` keeps."""
    accepted = Accepted("", {"id": request_id}, {})
    entry = Entry(accepted, [])
    journal.restore(entry)
    journal.enter(entry, write_accepted(accepted))
    return entry


def test_a_log_made_shorter_loses_nothing_of_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostroke.server.streams.COMPACT_BYTES", 0)

    async def run() -> None:
        log = DurableLog(tmp_path)
        journal = Journal(log)
        live, old = restore(journal, "live"), restore(journal, "old")
        with journal.note_reply(Accepted("", {"id": "reply"}, {}, is_kept=False)):
            journal.enter(old, write_record("output", "old", "x" * 10_000))
            journal.end(old, End(FINISHED, "", {}, time.time()))
            journal.forget("old")
            journal.get("live")  # finds the log too long
            journal.enter(live, write_record("output", "live", "in the same turn"))
            await asyncio.sleep(0)
            assert log.is_compacting
            journal.enter(live, write_record("output", "live", "meanwhile"))
            while log.is_compacting:
                await asyncio.sleep(0.001)
            journal.enter(live, write_record("output", "live", "after"))
            journal.close()

    asyncio.run(run())
    log = DurableLog(tmp_path)
    log.close()
    assert [json.loads(record)[:2] for record in log.recovered] == [
        ["accepted", "live"],
        ["output", "live"],
        ["accepted", "reply"],
        ["output", "live"],
        ["output", "live"],
    ]


def test_a_log_closed_while_it_is_made_shorter_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("twostroke.server.streams.COMPACT_BYTES", 0)

    async def run() -> None:
        log = DurableLog(tmp_path)
        journal = Journal(log)
        old = restore(journal, "old")
        journal.end(old, End(FINISHED, "", {}, time.time()))
        journal.forget("old")
        journal.get("old")
        await asyncio.sleep(0)
        assert log.is_compacting
        journal.close()
        while log.is_compacting:
            await asyncio.sleep(0.001)

    asyncio.run(run())
    assert caplog.text == ""
    log = DurableLog(tmp_path)
    log.close()
    assert [json.loads(record)[0] for record in log.recovered] == ["accepted", "ended", "ended"]


def test_a_fault_of_ours_leaves_nobody_waiting() -> None:
    class Faulty:
        async def batches(self) -> AsyncGenerator[Batch, None]:
            raise RuntimeError("our fault")
            yield []

    async def run() -> Entry:
        journal = Journal()
        entry = restore(journal, "r")
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        journal.run(entry, cast(Generation, Faulty()), dict)
        await asyncio.wait_for(entry.wait(), 10)
        return entry

    assert isinstance(asyncio.run(run()).interrupted, EngineClosed)
