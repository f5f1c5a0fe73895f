"""What a synchronous caller gathers while its requests run: whole outputs, or a stream of deltas.

Both are filled on the engine's thread and read on the caller's. A `DeltaStream` must never leave
its request running when it is dropped, closed or left early.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from twostroke.core.types import Ending, Failed, Request, TokenLogprob
from twostroke.engine.outputs import Completion, OutputDelta, RequestOutput
from twostroke.engine.request import RequestState
from twostroke.engine.service import Prompt
from twostroke.errors import RequestFailed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call has come: requests ended of how many, and tokens emitted so far."""

    done: int
    total: int
    generated_tokens: int


@dataclass(slots=True)
class _Collected:
    """The output of one continuation so far."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ending: Ending | None = None


class Collector:
    """Gathers the deltas of one call; written on the engine's thread, read when all is done."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.collected = [[_Collected() for _ in range(one.n)] for one in requests]
        self.changed = threading.Event()
        self._done = 0
        self._generated_tokens = 0

    @property
    def is_done(self) -> bool:
        """True when every request has ended."""
        return self._done == len(self.collected)

    def take(self, request: int, deltas: Sequence[OutputDelta], ended: bool) -> None:
        """The sink of the request at this place of the call."""
        for delta in deltas:
            into = self.collected[request][delta.index]
            into.text.append(delta.text)
            into.tokens.extend(delta.tokens)
            into.logprobs.extend(delta.logprobs)
            into.prompt_logprobs = into.prompt_logprobs or delta.prompt_logprobs
            into.ending = delta.ending
            self._generated_tokens += len(delta.tokens)
        self._done += ended
        self.changed.set()

    def get_progress(self) -> Progress:
        """How far the call has come."""
        return Progress(self._done, len(self.collected), self._generated_tokens)


class DeltaStream:
    """The deltas of one request, in order; raises RequestFailed after the last of a failed one."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Sequence[OutputDelta], bool]] = queue.SimpleQueue()
        self._ready: deque[OutputDelta] = deque()
        self._failed: Failed | None = None
        self._has_ended = False
        self._cancel: Callable[[], None] | None = None

    def get_sink(self) -> Callable[[Sequence[OutputDelta], bool], None]:
        """Where the engine puts deltas; it does not keep this stream alive."""
        arrived = self._arrived
        return lambda deltas, ended: arrived.put((deltas, ended))

    def own(self, cancel: Callable[[], None]) -> None:
        """Call `cancel` when this stream is left before its end."""
        self._cancel = cancel

    def __iter__(self) -> DeltaStream:
        return self

    def __next__(self) -> OutputDelta:
        while not self._ready:
            if self._has_ended:
                failed, self._failed = self._failed, None
                if failed is not None:
                    raise RequestFailed(failed.reason)
                raise StopIteration
            deltas, self._has_ended = self._arrived.get()
            self._ready.extend(deltas)
        delta = self._ready.popleft()
        if isinstance(delta.ending, Failed):
            self._failed = delta.ending
        return delta

    def close(self) -> None:
        """Cancel the request if it has not ended, and give no more deltas."""
        if not self._has_ended and self._cancel is not None:
            self._cancel()
        self._has_ended = True
        self._failed = None
        self._ready.clear()

    def __enter__(self) -> DeltaStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def build_output(prompt: Prompt, state: RequestState, collected: list[_Collected]) -> RequestOutput:
    """The finished request that `collected` holds, one entry a continuation, all ended."""
    completions = []
    for index, one in enumerate(collected):
        assert one.ending is not None, f"{state.request.id}: continuation {index} has no ending"
        completions.append(
            Completion(index, "".join(one.text), tuple(one.tokens), tuple(one.logprobs), one.ending)
        )
    return RequestOutput(
        request_id=state.request.id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_tokens=state.request.prompt,
        prompt_logprobs=next((one.prompt_logprobs for one in collected if one.prompt_logprobs), ()),
        completions=tuple(completions),
        timings=state.timings,
        seed=state.request.sampling.seed,
    )


def raise_failed(outputs: list[RequestOutput]) -> None:
    """Raise RequestFailed for the first continuation that the engine could not finish."""
    for index, output in enumerate(outputs):
        for completion in output.completions:
            if isinstance(completion.ending, Failed):
                where = f"prompt {index}: " if len(outputs) > 1 else ""
                raise RequestFailed(where + completion.ending.reason)
