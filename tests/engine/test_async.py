"""Laws of the asynchronous face: streams are whole, and leaving one frees its blocks."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from fakes import FakeExecutor, make_parts
from twostroke.core.ports import OnDone
from twostroke.core.types import Cancelled, Ending, Failed, Finished, StepPlan
from twostroke.engine import async_llm
from twostroke.engine.async_llm import AsyncLLM, RequestStream
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.loop import LoopPolicy
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.errors import (
    EngineClosed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    TemplateError,
)

Result = TypeVar("Result")
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(max_tokens=100, n=2)


def run(
    test: Callable[[AsyncLLM], Awaitable[Result]],
    executor: FakeExecutor | None = None,
    **sizes: Any,
) -> Result:
    """Run `test` with an engine that is closed afterwards."""

    async def main() -> Result:
        llm = AsyncLLM(make_parts(executor or FakeExecutor(), **sizes))
        try:
            return await test(llm)
        finally:
            llm.close()

    return asyncio.run(main())


async def collect(stream: RequestStream) -> list[OutputDelta]:
    return [delta async for delta in stream]


async def settle(llm: AsyncLLM) -> None:
    """Wait until the engine's thread has done all that was asked of it so far, and delivered."""
    for _ in range(2):
        await asyncio.wrap_future(llm._service._thread.call(lambda: None))
    await asyncio.sleep(0)


def get_text(deltas: list[OutputDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_a_stream_gives_what_the_offline_face_gives() -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=20, stop=["ab"], logprobs=1, prompt_logprobs=1)
    with OfflineLLM(make_parts(FakeExecutor())) as llm:
        whole = llm.generate("hello", params)[0]

    async def test(llm: AsyncLLM) -> tuple[RequestStream, list[OutputDelta]]:
        stream = await llm.submit("hello", params)
        return stream, await collect(stream)

    stream, deltas = run(test)
    assert stream.prompt_tokens == whole.prompt_tokens
    assert stream.timings.decode_tokens == sum(len(one.tokens) for one in whole.completions)
    assert [one for delta in deltas for one in delta.prompt_logprobs] == list(whole.prompt_logprobs)
    for completion in whole.completions:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert get_text(own, completion.index) == completion.text
        assert tuple(token for delta in own for token in delta.tokens) == completion.tokens
        assert tuple(one for delta in own for one in delta.logprobs) == completion.logprobs
        assert sum(len(delta.token_bytes) for delta in own) == len(completion.tokens)
        assert [delta.ending for delta in own if delta.ending] == [completion.ending]


def test_concurrent_streams_get_what_each_gets_alone() -> None:
    async def test(llm: AsyncLLM) -> None:
        prompts = [f"prompt {number}" for number in range(10)]
        alone = [await collect(await llm.submit(prompt, GREEDY)) for prompt in prompts]
        streams = [await llm.submit(prompt, GREEDY) for prompt in prompts]
        together = await asyncio.gather(*map(collect, streams))
        assert [get_text(one) for one in together] == [get_text(one) for one in alone]

    executor = FakeExecutor()
    executor.behave = executor.answer_threaded
    run(test, executor)


def test_a_late_consumer_gets_one_delta_a_continuation() -> None:
    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("ab", LONG)
        while llm.stats().live:
            await asyncio.sleep(0.001)
        await settle(llm)
        deltas = await collect(stream)
        assert [len(delta.tokens) for delta in deltas] == [100, 100]
        assert [delta.ending for delta in deltas] == [Finished("length")] * 2

    run(test)


def test_one_step_wakes_the_event_loop_once_for_all_its_streams() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        streams = [await llm.submit(f"{number}", LONG) for number in range(4)]
        await settle(llm)
        loop = asyncio.get_running_loop()
        wakes = []
        original = async_llm._unpack
        async_llm._unpack = lambda parcels: (wakes.append(len(parcels)), original(parcels))
        try:
            for _ in range(6):  # the prompts are computed in the first of these
                executor.release()
                await settle(llm)
        finally:
            async_llm._unpack = original
        assert loop is asyncio.get_running_loop()
        assert len(wakes) <= 6
        assert wakes[-1] == 4
        for stream in streams:
            await stream.aclose()

    run(test, executor)


async def leave_by_aclose(stream: RequestStream) -> None:
    async for _ in stream:
        break
    await stream.aclose()
    assert await collect(stream) == []


async def leave_by_context(stream: RequestStream) -> None:
    async with stream:
        await anext(stream)


async def leave_by_dropping(stream: RequestStream) -> None:
    await anext(stream)


async def leave_by_cancelling_the_task(stream: RequestStream) -> None:
    await anext(stream)
    task = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_unread(stream: RequestStream) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_aclose,
        leave_by_context,
        leave_by_dropping,
        leave_by_cancelling_the_task,
        leave_unread,
    ],
)
def test_leaving_a_stream_frees_its_blocks_with_the_step_that_runs(
    leave: Callable[[RequestStream], Awaitable[None]],
) -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("ab", LONG)
        for _ in range(3):
            await settle(llm)
            executor.release()
        await settle(llm)
        await leave(stream)
        del stream
        await settle(llm)
        stats = llm.stats()
        assert (stats.live, stats.ended["cancelled"]) == (0, 1)
        executor.release()  # the one step that was running
        await settle(llm)
        assert llm.stats().gauges.kv_blocks_used == 0
        assert not executor.held

    run(test, executor)


def test_cancelling_ends_the_stream_with_what_was_made() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("ab", LONG)
        for _ in range(3):
            await settle(llm)
            executor.release()
        await settle(llm)
        stream.cancel()
        await settle(llm)
        deltas = await collect(stream)
        assert [delta.ending for delta in deltas] == [Cancelled(), Cancelled()]
        assert all(delta.tokens for delta in deltas)
        assert stream.timings.ended_ns > 0

    run(test, executor)


def test_a_submission_whose_task_was_cancelled_leaves_nothing_live() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        gate = threading.Event()
        llm._service._thread.post(lambda: gate.wait(10) and None)
        tasks = [asyncio.create_task(llm.submit("ab", LONG)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await settle(llm)
        await settle(llm)
        stats = llm.stats()
        assert stats.live == 0
        assert stats.submitted == stats.ended["cancelled"]

    run(test, executor)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": ""}, InvalidRequest, "empty"),
    ({"prompt": []}, InvalidRequest, "empty"),
    ({"prompt": [5, 999]}, InvalidParameter, "position 1"),
    ({"prompt": "x" * 200}, PromptTooLong, "context"),
    ({"prompt": "x" * 5000}, PromptTooLong, "context"),
    ({"prompt": [1] * 5000 + [-1]}, InvalidParameter, "position 5000"),
    ({"prompt": None}, InvalidParameter, "prompt"),
    ({"prompt": "a", "params": 5}, InvalidParameter, "params"),
    ({"prompt": "a", "request_id": ""}, InvalidParameter, "request_id"),
    ({"prompt": "a", "request_id": 5}, InvalidParameter, "request_id"),
    ({"prompt": "a", "priority": 2**40}, InvalidParameter, "priority"),
    ({"prompt": "a", "priority": "1"}, InvalidParameter, "priority"),
    ({"prompt": "a", "params": SamplingParams(logit_bias={300: 1})}, InvalidParameter, "300"),
    ({"prompt": "\ud800"}, InvalidParameter, "surrogate"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_a_bad_submission_is_refused_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(error, match=message):
            await llm.submit(**arguments)
        assert llm.stats().live == 0
        assert await collect(await llm.submit("fine", GREEDY))

    run(test)


def test_the_id_of_a_live_request_cannot_be_used_again() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        first = await llm.submit("ab", LONG, request_id="mine")
        assert first.request_id == "mine"
        with pytest.raises(InvalidParameter, match="request_id"):
            await llm.submit("ab", LONG, request_id="mine")
        assert llm.stats().live == 1
        await first.aclose()
        await settle(llm)
        assert (await llm.submit("ab", LONG, request_id="mine")).request_id == "mine"

    run(test, executor)


def test_smaller_priorities_run_first() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        running = await llm.submit("run", GREEDY)
        streams = {
            priority: await llm.submit("a" * 30, GREEDY, priority=priority)
            for priority in (2, 0, 1)
        }
        await settle(llm)
        while executor.held:
            executor.release()
            await settle(llm)
        assert await collect(running)
        planned = {one: stream.timings.first_planned_ns for one, stream in streams.items()}
        assert planned[0] < planned[1] < planned[2]

    run(test, executor)


def test_a_lost_executor_ends_streams_and_health() -> None:
    executor = FakeExecutor()

    def die_at_third(plan: StepPlan, on_done: OnDone) -> None:
        (executor.answer_lost if len(executor.plans) == 3 else executor.answer_now)(plan, on_done)

    executor.behave = die_at_third

    async def test(llm: AsyncLLM) -> None:
        assert llm.health().alive
        deltas = await collect(await llm.submit("ab", GREEDY))
        assert isinstance(deltas[-1].ending, Failed)
        assert "it died" in deltas[-1].ending.reason
        assert not llm.health().alive
        assert "it died" in str(llm.health().reason)
        assert llm.stats().executor_losses == 1
        with pytest.raises(EngineClosed, match="it died"):
            await llm.submit("ab", GREEDY)

    run(test, executor)


def test_health_tells_how_long_nothing_has_moved_while_work_is_pending() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        assert llm.health().stalled_s == 0.0
        stream = await llm.submit("ab", GREEDY)
        first = llm.health()
        await asyncio.sleep(0.002)
        second = llm.health()
        assert 0 <= first.stalled_s < second.stalled_s
        assert second.alive
        assert second.live == 1
        await stream.aclose()
        await settle(llm)
        assert llm.health().stalled_s == 0.0

    run(test, executor)


def test_closing_ends_every_stream_as_failed() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held

    async def test(llm: AsyncLLM) -> None:
        streams = [await llm.submit("ab", LONG) for _ in range(3)]
        await asyncio.to_thread(llm.close)
        for stream in streams:
            endings = [delta.ending for delta in await collect(stream)]
            assert endings == [Failed("the engine was closed")] * 2
        with pytest.raises(EngineClosed):
            await llm.submit("ab", GREEDY)

    run(test, executor)
    assert executor.is_closed


def test_an_event_loop_that_ended_does_not_harm_the_engine() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held
    llm = AsyncLLM(make_parts(executor))
    kept = []

    async def submit_and_go() -> None:
        kept.append(await llm.submit("ab", LONG))
        await settle(llm)

    asyncio.run(submit_and_go())
    executor.behave = executor.answer_now
    executor.release()

    async def use() -> str:
        return get_text(await collect(await llm.submit("ab", GREEDY)))

    assert len(asyncio.run(use())) == 8
    assert llm.health().alive
    llm.close()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_callers_and_executors_do_every_request_ends_once(seed: int) -> None:
    print(f"seed {seed}")
    chooser = random.Random(seed)

    def make_executor(pool: list[list[int]] | None = None) -> FakeExecutor:
        executor = FakeExecutor(num_blocks=24, pool=pool)

        def behave(plan: StepPlan, on_done: OnDone) -> None:
            wrong = chooser.random() < 0.05
            (executor.answer_lost if wrong else executor.answer_threaded)(plan, on_done)

        executor.behave = behave
        executors.append(executor)
        return executor

    executors: list[FakeExecutor] = []
    policy = LoopPolicy(replace_executor=lambda lost: make_executor(executors[-1].pool))

    async def use(llm: AsyncLLM, number: int) -> None:
        params = SamplingParams(n=chooser.choice([1, 3]), max_tokens=12, stop=["q"], seed=number)
        stream = await llm.submit(f"prompt {number}", params)
        patience = chooser.choice([0, 1, 3, 1000, 1000])
        endings: dict[int, Ending] = {}
        async for delta in stream:
            assert delta.index not in endings
            if delta.ending is not None:
                endings[delta.index] = delta.ending
            patience -= 1
            if patience <= 0:
                stream.cancel() if chooser.random() < 0.5 else await stream.aclose()
        if patience > 0:
            assert len(endings) == params.n

    async def test(llm: AsyncLLM) -> None:
        await asyncio.gather(*(use(llm, number) for number in range(40)))
        await settle(llm)
        while executors[-1].is_busy:
            await asyncio.sleep(0.001)
        await settle(llm)
        stats = llm.stats()
        assert stats.submitted == 40
        assert stats.live == 0
        assert stats.gauges.kv_blocks_used == 0
        assert llm.health().alive

    run(test, make_executor(), policy=policy)


def test_stats_conserve_requests() -> None:
    async def test(llm: AsyncLLM) -> None:
        streams = [await llm.submit("ab", GREEDY) for _ in range(5)]
        with pytest.raises(PromptTooLong):
            await llm.submit("x" * 500, GREEDY)
        streams.pop()
        await asyncio.gather(*map(collect, streams))
        await settle(llm)
        stats = llm.stats()
        assert (stats.submitted, stats.rejected, stats.live) == (6, 1, 0)
        assert sum(stats.ended.values()) == 5
        assert stats.generation_tokens >= 32
        assert stats.steps == stats.step_seconds.count > 0
        assert stats.gauges.kv_blocks_used == 0
        assert stats.gauges.kv_blocks_total == 64

    run(test)


def test_without_a_template_rendering_is_refused() -> None:
    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(TemplateError, match="fake has no chat template"):
            llm.render_chat([{"role": "user", "content": "hi"}])
        assert llm.model_name == "fake"
        assert llm.tokenizer.vocab_size < llm.spec.vocab_size

    run(test)
