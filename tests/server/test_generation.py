"""Laws of one API request's output: merged in order of arrival, bounded, left when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from twostroke.core.types import Finished
from twostroke.engine.outputs import OutputDelta, RequestTimings, join_deltas
from twostroke.engine.params import SamplingParams
from twostroke.errors import SlowReader
from twostroke.server.generation import MAX_UNREAD_TOKENS, Batch, Generation, Submission


class Stream:
    """A stream whose output the test puts in."""

    seed = 0
    prompt_tokens = (1,)
    timings = RequestTimings(0, 0, 0, 0, 0, 0, 0, 0)
    closed_reason = None

    def __init__(self) -> None:
        self.has_ended = self.was_left = False
        self._pending: list[OutputDelta] = []
        self._listener: Callable[[int], None] = lambda tokens: None

    def put(self, tokens: int, ends: bool = False) -> None:
        ending = Finished("length") if ends else None
        self._pending.append(OutputDelta(0, "x" * tokens, (7,) * tokens, ending=ending))
        self.has_ended = ends
        self._listener(tokens)

    def follow(self, listener: Callable[[int], None]) -> None:
        self._listener = listener
        if self._pending:
            listener(sum(len(delta.tokens) for delta in self._pending))

    def take_ready(self) -> list[OutputDelta]:
        ready, self._pending = self._pending, []
        return [join_deltas(ready)] if ready else []

    def cancel(self) -> None:
        self.leave()

    def leave(self) -> None:
        self.was_left = True


def make(streams: int) -> tuple[list[Stream], Generation]:
    made = [Stream() for _ in range(streams)]
    submission = Submission("r", [[1]] * streams, SamplingParams(max_tokens=4))
    return made, Generation(made, submission)


def test_output_comes_in_the_order_of_its_arrival_however_many_streams_there_are() -> None:
    async def run() -> list[Batch]:
        streams, generation = make(3)
        streams[2].put(1)  # before anybody reads
        found = []
        async for batch in generation.batches():
            found.append(batch)
            if len(found) == 1:
                streams[1].put(2, ends=True)
                streams[2].put(1)
                streams[0].put(1, ends=True)
                streams[2].put(1, ends=True)
        assert all(stream.was_left for stream in streams)
        assert generation.get_usage()["completion_tokens"] == 6
        return found

    shapes = [[(choice, len(delta.tokens)) for choice, delta in b] for b in asyncio.run(run())]
    assert shapes == [[(2, 1)], [(1, 2), (2, 2), (0, 1)]]


def test_a_reader_too_far_behind_ends_its_request_and_no_other_does() -> None:
    async def read(generation: Generation, seconds: float) -> int:
        count = 0
        async for batch in generation.batches():
            count += sum(len(delta.tokens) for _, delta in batch)
            await asyncio.sleep(seconds)  # as while its client takes nothing
        return count

    async def run() -> None:
        (stuck,), behind = make(1)
        (prompt,), reader = make(1)
        tasks = [asyncio.ensure_future(each) for each in (read(behind, 0.05), read(reader, 0))]
        for _ in range(3):
            for stream in (stuck, prompt):
                stream.put(MAX_UNREAD_TOKENS // 2)
            for _ in range(5):
                await asyncio.sleep(0)
        assert not stuck.was_left
        for stream in (stuck, prompt):
            stream.put(1)
        prompt.put(1, ends=True)
        await asyncio.sleep(0)
        assert stuck.was_left
        with pytest.raises(SlowReader, match="read faster"):
            await tasks[0]
        assert await tasks[1] == 3 * (MAX_UNREAD_TOKENS // 2) + 2

    asyncio.run(run())
