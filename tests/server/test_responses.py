"""/v1/responses through the official client, over the real engine with a fake executor."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes import FakeExecutor, make_parts
from loopback import run_server
from twostroke.core.ports import OnDone
from twostroke.core.types import StepPlan
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.responses_input import build_chat_body
from twostroke.server.settings import ServerSettings
from twostroke.server.streams_api import Streams
from twostroke.text.chat import ChatTemplate

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@dataclass
class Stack:
    """A server, its client, and the executor below; `hold_from` steps on, steps wait."""

    executor: FakeExecutor
    client: openai.OpenAI
    http: httpx.Client
    hold_from: int | None = None

    def behave(self, plan: StepPlan, on_done: OnDone) -> None:
        """Answer, or never."""
        held = self.hold_from is not None and len(self.executor.plans) > self.hold_from
        (self.executor.answer_held if held else self.executor.answer_now)(plan, on_done)

    def wait_held(self) -> None:
        """Return once a step waits."""
        while not self.executor.held:
            time.sleep(0.002)


def run_stack(folder: Path | None = None) -> Iterator[Stack]:
    """A server over a folder."""
    executor = FakeExecutor(num_blocks=200)
    template = ChatTemplate(TEMPLATE)
    engine = AsyncLLM(make_parts(executor, chat_template=template, context_tokens=400))
    with (
        run_server(engine, ServerSettings(state=folder)) as url,
        httpx.Client(base_url=url, timeout=20, trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        stack = Stack(executor, client, http)
        executor.behave = stack.behave
        yield stack


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    """For tests that let everything run."""
    yield from run_stack()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Stack]:
    """One for this test alone, with a durable log."""
    yield from run_stack(tmp_path)


def create(stack: Stack, **fields: Any) -> Any:
    return stack.client.responses.create(
        **{"model": "fake", "input": "hi", "max_output_tokens": 8, **fields}
    )


def test_a_response_is_what_it_is_when_retrieved(shared: Stack) -> None:
    made = create(shared, instructions="be short", metadata={"a": "b"})
    assert made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens"
    assert len(made.output_text) == 8
    assert made.usage.output_tokens == 8
    assert shared.client.responses.retrieve(made.id) == made


def test_the_answer_is_that_of_the_same_chat(shared: Stack) -> None:
    made = create(shared, instructions="be short", temperature=0.0)
    chat = shared.client.chat.completions.create(
        model="fake",
        messages=[{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}],
        max_tokens=8,
        temperature=0.0,
    )
    assert made.output_text == chat.choices[0].message.content


def test_events_are_numbered_and_end_with_the_response(shared: Stack) -> None:
    events = list(create(shared, stream=True, include=["message.output_text.logprobs"]))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:12] == ["output_text.delta"] * 8
    assert kinds[12:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert final.output_text == text
    assert len(final.output[0].content[0].logprobs) == 8
    assert shared.client.responses.retrieve(final.id) == final


def test_a_reader_gets_the_rest_behind_the_event_it_names(shared: Stack) -> None:
    events = list(create(shared, stream=True))
    response_id = events[0].response.id
    for last in range(len(events)):
        rest = shared.client.responses.retrieve(response_id, stream=True, starting_after=last)
        assert list(rest) == events[last + 1 :]


def test_a_conversation_goes_on_from_a_response(shared: Stack) -> None:
    first = create(shared, instructions="once", temperature=0.0)
    second = create(shared, input="more", previous_response_id=first.id, temperature=0.0)
    chat = shared.client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "more"},
        ],
        max_tokens=8,
        temperature=0.0,
    )
    assert second.output_text == chat.choices[0].message.content
    assert second.previous_response_id == first.id


def test_the_input_is_listed_page_by_page(shared: Stack) -> None:
    items: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}]},
    ]
    made = create(shared, input=items)
    listed = list(shared.client.responses.input_items.list(made.id, order="asc", limit=2))
    assert [item.content[0].text for item in listed] == ["a", "b", "c"]


def test_what_is_deleted_or_not_stored_is_not_found(shared: Stack) -> None:
    made = create(shared)
    shared.client.responses.delete(made.id)
    unstored = create(shared, store=False)
    for response_id in (made.id, unstored.id, "resp_nobody"):
        with pytest.raises(openai.NotFoundError):
            shared.client.responses.retrieve(response_id)


def test_a_background_response_is_polled(shared: Stack) -> None:
    made = create(shared, background=True)
    while made.status in ("queued", "in_progress"):
        made = shared.client.responses.retrieve(made.id)
    assert len(made.output_text) == 8


def test_a_background_response_is_cancelled(fresh: Stack) -> None:
    fresh.hold_from = 3
    made = create(fresh, background=True)
    assert made.status == "in_progress"
    fresh.wait_held()
    cancelled = fresh.client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert fresh.client.responses.retrieve(made.id).status == "cancelled"
    fresh.hold_from = None
    while fresh.executor.held:
        fresh.executor.release()
    assert create(fresh).status == "incomplete"


def test_a_background_response_goes_on_in_the_next_process(tmp_path: Path) -> None:
    before = run_stack(tmp_path)
    stack = next(before)
    stack.hold_from = 4
    made = create(stack, background=True, temperature=0.0)
    stack.wait_held()
    before.close()
    after = run_stack(tmp_path)
    stack = next(after)
    again = stack.client.responses.retrieve(made.id)
    while again.status == "in_progress":
        again = stack.client.responses.retrieve(made.id)
    assert again.output_text == create(stack, temperature=0.0).output_text
    after.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input.0.type"),
        ({"inputs": "a"}, "inputs"),
        ({"store": "yes"}, "store"),
        ({"store": False, "background": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_what_is_wrong_is_refused_by_name(shared: Stack, fields: Any, param: str) -> None:
    reply = shared.http.post("/v1/responses", json={"model": "fake", "input": "hi", **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "", "1.5"])
def test_a_number_in_a_query_is_digits(shared: Stack, number: str) -> None:
    path = f"/v1/responses/{create(shared).id}"
    for query in ({"stream": "true", "starting_after": number}, {"limit": number}):
        where = path if "stream" in query else f"{path}/input_items"
        reply = shared.http.get(where, params=query)
        assert reply.status_code == 400, (where, reply.text[:200])
        assert reply.json()["error"]["param"] in query


def test_calls_one_at_a_time_are_asked_of_the_chat(shared: Stack) -> None:
    fields = {"model": "fake", "parallel_tool_calls": False}
    assert build_chat_body(fields, [], [])["parallel_tool_calls"] is False
    assert create(shared, parallel_tool_calls=False).parallel_tool_calls is False
    assert create(shared).parallel_tool_calls is True


def test_who_asks_for_a_response_holds_up_nobody(
    shared: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create(shared)
    begun, answered = threading.Event(), threading.Event()
    get_bytes = Streams.get_token_bytes

    def get_slowly(streams: Streams, token: int) -> bytes:
        begun.set()
        assert answered.wait(20)
        return get_bytes(streams, token)

    monkeypatch.setattr(Streams, "get_token_bytes", get_slowly)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(shared.client.responses.retrieve, made.id)
        assert begun.wait(20)
        assert shared.http.get("/health").status_code == 200
        answered.set()
        assert again.result(20) == made


def test_a_stream_in_the_background_is_read_again_after_its_reader_went(fresh: Stack) -> None:
    fresh.hold_from = 4
    with create(fresh, background=True, stream=True) as stream:
        first = [next(iter(stream)) for _ in range(3)]
    response_id = first[0].response.id
    fresh.wait_held()
    fresh.hold_from = None
    fresh.executor.release()
    rest = list(fresh.client.responses.retrieve(response_id, stream=True, starting_after=2))
    assert [event.sequence_number for event in rest] == list(range(3, 3 + len(rest)))
    assert rest[-1].type == "response.incomplete"
    assert fresh.client.responses.retrieve(response_id) == rest[-1].response
