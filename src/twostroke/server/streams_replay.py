"""What is kept of a request in the place of one that runs: its output again, its ended prompts.

Streams and writers read a Replay as they read a Generation, so an event is written by the same code
the second time. Nothing here runs anything or changes an entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.core.types import TokenLogprob
from twostroke.engine.outputs import OutputDelta, RequestTimings
from twostroke.server.generation import Batch
from twostroke.server.logprobs import GetBytes
from twostroke.server.streams import Entry

_NO_TIMINGS = RequestTimings(0, 0, 0, 0, 0, 0, 0, 0)


class Replay:
    """The output of a kept request, from the beginning, as streams and writers read it."""

    def __init__(self, entry: Entry, choices_each: int, get_bytes: GetBytes) -> None:
        self._entry = entry
        self._n = choices_each
        self._get_bytes = get_bytes
        self._prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}

    def get_prompt_tokens(self, choice: int) -> tuple[int, ...]:
        """Token ids of the prompt that `choice` continues."""
        return tuple(self._entry.accepted.prompts[choice // self._n])

    def get_prompt_logprobs(self, choice: int) -> tuple[TokenLogprob, ...]:
        """What the model says of that prompt's tokens, once output has come."""
        return self._prompt_logprobs.get(choice // self._n, ())

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """All output as it was entered, and as it comes. Raises: TwostrokeError at a bad end."""
        async for batch in self._entry.batches(self._get_bytes):
            for choice, delta in batch:
                if delta.prompt_logprobs:
                    self._prompt_logprobs[choice // self._n] = delta.prompt_logprobs
            yield batch
            # What was kept comes without waiting, and a long stream must not hold up the others.
            await asyncio.sleep(0)

    def get_last(self) -> dict[str, Any]:
        """What the reply ends with, after its output."""
        end = self._entry.end
        return {} if end is None else end.last

    def cancel(self) -> None:
        """A reader has gone; the request goes on without it."""


@dataclass(frozen=True, slots=True)
class EndedStream:
    """A prompt's place in a generation when all its continuations had ended before."""

    prompt_tokens: tuple[int, ...]
    seed: int
    timings: RequestTimings = _NO_TIMINGS
    closed_reason: str | None = None

    has_ended: bool = True

    def follow(self, listener: Callable[[int], None]) -> None:
        """Nothing comes."""

    def take_ready(self) -> Sequence[OutputDelta]:
        """Nothing is here."""
        return ()

    def cancel(self) -> None:
        """Nothing runs."""

    def leave(self) -> None:
        """Nothing is left."""
