"""What users of OpenAI's client rely on beside the answers: its errors, headers and time-outs.

The answers themselves are in test_chat.py, test_completions.py, test_tools.py, test_responses.py
and, of real models, in test_structured_real.py and test_agents.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, REPLY, ScriptedLLM
from twostroke.errors import EngineClosed
from twostroke.server.keys import Key, hash_key
from twostroke.server.settings import ServerSettings

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A server with a key that may send two requests a minute."""
    keys = (Key("a", hash_key("sk-slow"), per_minute=2),)
    with run_server(ScriptedLLM(), ServerSettings(keys=keys)) as url:
        yield f"{url}/v1"


def test_a_wrong_key_is_an_authentication_error(guarded: str) -> None:
    with (
        openai.OpenAI(base_url=guarded, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_key_over_its_rate_is_a_rate_limit_error(guarded: str) -> None:
    with openai.OpenAI(base_url=guarded, api_key="sk-slow", max_retries=0) as client:
        for _ in range(2):
            client.completions.create(model=MODEL, prompt="a")
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="a")
    assert caught.value.code == "rate"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_an_engine_that_is_gone_is_an_error_of_the_server(
    server: Running, client: openai.OpenAI
) -> None:
    server.engine.refusal = EngineClosed("gone")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI)
    assert caught.value.status_code == 503
    assert caught.value.code == "engine_unavailable"


def test_the_client_tries_again_by_itself(server: Running) -> None:
    replies = []

    def note(response: httpx.Response) -> None:
        replies.append(response.status_code)
        server.engine.refusal = None

    server.engine.refusal = EngineClosed("not yet")
    with (
        httpx.Client(event_hooks={"response": [note]}) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client,
    ):
        reply = client.chat.completions.create(model=MODEL, messages=HI)
    assert replies == [503, 200]
    assert reply.choices[0].message.content == REPLY


def test_a_client_that_waits_no_longer_frees_its_request(
    server: Running, client: openai.OpenAI
) -> None:
    server.engine.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model=MODEL, messages=HI)
    wait_until(lambda: not server.engine.live)


def test_the_raw_answer_carries_the_id_of_the_request(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "mine-1"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.request_id


def test_streamed_choices_are_told_apart(client: openai.OpenAI) -> None:
    texts = ["", ""]
    with client.chat.completions.create(model=MODEL, messages=HI, n=2, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [REPLY, REPLY]


def test_the_helper_pieces_a_stream_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=HI,
        logprobs=True,
        top_logprobs=2,
        stop="!",
        seed=7,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    (choice,) = final.choices
    assert choice.message.content == REPLY.split("!")[0]
    assert choice.finish_reason == "stop"
    assert final.usage is not None
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or ()) == final.usage.completion_tokens


def test_the_client_of_coroutines_streams_many_at_once(server: Running) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask() -> str:
                stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask() for _ in range(16)))

    texts = asyncio.run(main())
    assert set(texts) == {REPLY.encode()[:16].decode("utf-8", errors="ignore")}


def test_pages_of_models_are_walked(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "twostroke"
