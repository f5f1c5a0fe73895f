"""The same server over the real engine: scheduler, text and threads, with a fake executor."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes import VOCAB_SIZE, FakeExecutor, make_parts
from loopback import run_server
from twostroke.core.ports import OnDone
from twostroke.core.types import StepPlan
from twostroke.engine.async_llm import AsyncLLM
from twostroke.text.chat import ChatTemplate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
HELLO: Any = [{"role": "user", "content": "hi"}]
CONTEXT_TOKENS = 96
POOL_TOKENS = 64


@dataclass
class Stack:
    """A server, its engine and what the engine runs on."""

    executor: FakeExecutor
    engine: AsyncLLM
    url: str
    http: httpx.Client
    client: openai.OpenAI
    steps_before_hold: int | None = None

    def behave(self, plan: StepPlan, on_done: OnDone) -> None:
        """Answer, or hold when `steps_before_hold` steps were answered."""
        if self.steps_before_hold == 0:
            self.executor.answer_held(plan, on_done)
            return
        if self.steps_before_hold is not None:
            self.steps_before_hold -= 1
        self.executor.answer_now(plan, on_done)


@contextlib.contextmanager
def run_stack() -> Iterator[Stack]:
    """The whole of it, with a pool smaller than the context."""
    executor = FakeExecutor(num_blocks=POOL_TOKENS // 4, block_tokens=4)
    parts = make_parts(
        executor, chat_template=ChatTemplate(TEMPLATE), context_tokens=CONTEXT_TOKENS
    )
    engine = AsyncLLM(parts)
    with (
        run_server(engine) as url,
        httpx.Client(base_url=url, timeout=20) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stack = Stack(executor, engine, url, http, client)
        executor.behave = stack.behave
        yield stack


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[Stack]:
    """For the tests that leave it as it was."""
    with run_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: Stack) -> Stack:
    """The shared stack, answering every step."""
    shared_stack.steps_before_hold = None
    return shared_stack


@pytest.fixture
def fresh_stack() -> Iterator[Stack]:
    """One for this test alone."""
    with run_stack() as stack:
        yield stack


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails when `condition` has not come true after a time that no working server needs."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_stream_gives_what_the_reply_gives(stack: Stack) -> None:
    asked: Any = {"model": "fake", "messages": HELLO, "seed": 5, "max_tokens": 20, "n": 2}
    whole = stack.client.chat.completions.create(**asked)
    texts = ["", ""]
    with stack.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    for chunk in chunks[:-1]:
        for one in chunk.choices:
            texts[one.index] += one.delta.content or ""
    assert texts == [one.message.content for one in whole.choices]
    assert texts[0] != texts[1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert chunks[-1].usage == whole.usage


def test_a_chat_brings_its_own_special_tokens(stack: Stack) -> None:
    completion = stack.client.completions.create(model="fake", prompt="<user>hi<assistant>")
    chat = stack.client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2)
    assert completion.usage is not None
    assert chat.usage is not None
    assert completion.usage.prompt_tokens == chat.usage.prompt_tokens + 1


def test_echo_scores_every_prompt_token_of_every_choice(stack: Stack) -> None:
    reply = stack.client.completions.create(
        model="fake", prompt=["hey", "the"], echo=True, logprobs=2, n=2, max_tokens=3
    )
    for choice, prompt in zip(reply.choices, ("hey", "hey", "the", "the"), strict=True):
        assert choice.text.startswith(prompt)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert "".join(logprobs.tokens) == "<bos>" + choice.text
        assert [score is None for score in logprobs.token_logprobs] == [True] + [False] * (
            len(logprobs.tokens) - 1
        )


def test_the_answer_ends_where_the_context_does(stack: Stack) -> None:
    reply = stack.client.chat.completions.create(model="fake", messages=HELLO)
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("num_tokens", [POOL_TOKENS + 1, CONTEXT_TOKENS, 10_000])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_prompt_that_cannot_fit_is_refused(stack: Stack, path: str, num_tokens: int) -> None:
    body: dict[str, Any] = {"model": "fake", "prompt": [97] * num_tokens}
    if path == CHAT:
        content = "a" * num_tokens
        body = {"model": "fake", "messages": [{"role": "user", "content": content}]}
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": ["a", ""]}, None),
        ({"prompt": [[97], []]}, None),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"priority": 2**40}, "priority"),
    ],
)
def test_what_only_the_engine_can_judge_is_refused(
    stack: Stack, fields: dict[str, Any], param: str | None
) -> None:
    reply = stack.http.post(COMPLETIONS, json={"model": "fake", "prompt": "a", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    wait_until(lambda: stack.engine.health().live == 0)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_client_that_goes_frees_its_blocks(
    stack: Stack, path: str, stream: bool, steps: int
) -> None:
    stack.steps_before_hold = steps
    cancelled = stack.engine.stats().ended["cancelled"]
    body = {"model": "fake", "stream": stream, "max_tokens": 40}
    body |= {"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO}
    request = stack.http.build_request("POST", path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        wait_until(lambda: bool(stack.executor.held))
        assert stack.engine.health().live == 1
    wait_until(lambda: stack.engine.health().live == 0)
    stack.executor.release()
    wait_until(lambda: stack.engine.stats().gauges.running == 0)
    wait_until(lambda: stack.engine.stats().gauges.kv_blocks_used == 0)
    assert stack.engine.stats().ended["cancelled"] == cancelled + 1


def test_a_lost_executor_fails_the_request_and_the_health(fresh_stack: Stack) -> None:
    fresh_stack.executor.behave = fresh_stack.executor.answer_lost
    with pytest.raises(openai.InternalServerError):
        fresh_stack.client.completions.create(model="fake", prompt="a")
    assert fresh_stack.http.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError) as caught:
        fresh_stack.client.completions.create(model="fake", prompt="a")
    assert caught.value.status_code == 503


def test_metrics_conserve_requests(fresh_stack: Stack) -> None:
    fresh_stack.client.completions.create(model="fake", prompt=["a", "b"], max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        fresh_stack.client.completions.create(model="fake", prompt=[97] * 90)
    page = fresh_stack.http.get("/metrics").text
    values = {
        sample.name: sample.value
        for one in text_string_to_metric_families(page)
        for sample in one.samples
        if sample.labels.get("finished_reason") != "stop"
    }
    assert values["twostroke_requests_submitted_total"] == 3
    assert values["twostroke_requests_rejected_total"] == 1
    assert values["twostroke_request_success_total"] == 2
    assert values["twostroke_requests_live"] == 0
    assert values["twostroke_generation_tokens_total"] == 6
    assert values["twostroke_prompt_tokens_total"] == 4


def test_many_clients_at_once_get_what_each_gets_alone(stack: Stack) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(model="fake", prompt=f"p{i}", temperature=0)
                    for i in range(12)
                )
            )
            return [reply.choices[0].text for reply in replies]

    alone = [
        stack.client.completions.create(model="fake", prompt=f"p{i}", temperature=0)
        for i in range(12)
    ]
    assert asyncio.run(ask_all()) == [reply.choices[0].text for reply in alone]
