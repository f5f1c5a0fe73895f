"""ScriptedLLM: an engine for tests of the server, which answers every prompt with one text.

It has AsyncLLM's interface; a token is a byte. `gate` holds every request before its first token,
`step_gate` before every later one; both are open after `reset`. It keeps true that `live` counts
the requests that were submitted and have neither ended nor been cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

from tiny_models import TINY_SPECS
from twostroke.core.types import Ending, Failed, Finished, TokenLogprob
from twostroke.engine.attribution import Attribution
from twostroke.engine.metrics import EngineMetrics, EngineStats, Gauges
from twostroke.engine.outputs import OutputDelta, RequestTimings, join_deltas
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import NOBODY, EngineLoad, Sender
from twostroke.errors import (
    EngineClosed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    TemplateError,
)
from twostroke.spec.work import get_model_work
from twostroke.text.tool_calls import HERMES

MODEL = "scripted"
VOCAB_SIZE = 256
CONTEXT_TOKENS = 512
BOS = 0
REPLY = "Grüße, sea! 🌊"
_POLL_S = 0.002
get_index = attrgetter("index")


@dataclass(frozen=True)
class ScriptedSpec:
    """The part of a ModelSpec that the server reads."""

    context_tokens: int = CONTEXT_TOKENS
    vocab_size: int = VOCAB_SIZE


@dataclass(frozen=True)
class ScriptedHealth:
    """The part of an EngineHealth that the server reads."""

    alive: bool
    reason: str | None
    live: int
    stalled_s: float = 0.0
    stall: str | None = None

    @property
    def state(self) -> str:
        return "live" if self.stall is None else "stalled"


class ByteTokenizer:
    """A token is a byte; BOS is a control token that `encode` puts first."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [BOS] * add_special + list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.get_token_bytes, tokens)).decode("utf-8", errors="replace")

    def get_token_bytes(self, token: int) -> bytes:
        return b"<s>" if token == BOS else bytes([token])

    def is_control(self, token: int) -> bool:
        return token == BOS


class ScriptedStream:
    """One request's output, one token of every continuation at a time."""

    def __init__(self, engine: ScriptedLLM, request_id: str, deltas: Iterator[OutputDelta]) -> None:
        self._engine = engine
        self._deltas = deltas
        self._started = self._ended = False
        self._ready: list[OutputDelta] = []
        self._playing: asyncio.Future[None] | None = None
        self.has_ended = False
        self.request_id = request_id
        self.prompt_tokens: tuple[int, ...] = ()
        self.timings = replace(engine.timings, cached_tokens=engine.cached_tokens)

    def follow(self, listener: Callable[[int], None]) -> None:
        self._playing = asyncio.ensure_future(self._play(listener))

    async def _play(self, listener: Callable[[int], None]) -> None:
        while (delta := await self._next()) is not None:
            self._ready.append(delta)
            listener(len(delta.tokens))
        self.has_ended = True
        listener(0)

    def take_ready(self) -> list[OutputDelta]:
        if self._engine.breakdown is not None:
            raise self._engine.breakdown
        ready, self._ready = self._ready, []
        ready.sort(key=get_index)
        return [join_deltas(list(own)) for _, own in groupby(ready, get_index)]

    def leave(self) -> None:
        self.cancel()
        if self._playing is not None:
            self._playing.cancel()

    async def _next(self) -> OutputDelta | None:
        gate = self._engine.step_gate if self._started else self._engine.gate
        while not gate.is_set() and self.request_id in self._engine.live:
            await asyncio.sleep(_POLL_S)
        self._started = True
        if self.request_id not in self._engine.live:
            if self._engine.closed_times and not self._ended:
                self._ended = True
                return OutputDelta(0, "", (), ending=Failed("the engine was closed"))
            return None
        if self._engine.breakdown is not None:
            return None
        delta = next(self._deltas, None)
        if delta is None:
            self.cancel()
            return None
        return delta

    seed = 0

    @property
    def closed_reason(self) -> str | None:
        return "the engine was closed" if self._engine.closed_times else None

    def cancel(self) -> None:
        self._engine.live.discard(self.request_id)


class ScriptedLLM:
    """AsyncLLM's interface over a script."""

    model_name = MODEL

    def __init__(self) -> None:
        self.spec = ScriptedSpec()
        self.attribution = Attribution(get_model_work(TINY_SPECS["llama"]))
        self.tokenizer = ByteTokenizer()
        self.gate, self.step_gate = threading.Event(), threading.Event()
        self.closed_times = 0
        self.reset()

    def reset(self) -> None:
        """Back to the beginning of the script."""
        self.gate.set()
        self.step_gate.set()
        self.live: set[str] = set()
        self.reply = REPLY
        self.ending: Ending | None = None  # in place of the natural one
        self.breakdown: Exception | None = None  # raised by streams
        self.refusal: Exception | None = None  # raised by submit
        self.dead: str | None = None
        self.stalled_s = 0.0
        self.stall: str | None = None
        self.cached_tokens = 0
        self.timings = RequestTimings(0, 0, 0, 0, 0, 0, 0, 0)
        self.seen: list[tuple[Any, SamplingParams, int]] = []
        self.senders: list[Sender] = []
        self.waiting = 0  # what `load` says of others
        self.rendered: list[list[dict[str, Any]]] = []
        self.metrics = EngineMetrics()

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special: bool = True,
        sender: Sender = NOBODY,
    ) -> ScriptedStream:
        if self.dead:
            raise EngineClosed(self.dead)
        if self.refusal is not None:
            raise self.refusal
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        tokens = (
            list(prompt)
            if not isinstance(prompt, str)
            else self.tokenizer.encode(prompt, add_special=add_special)
        )
        for token in (*tokens, *(params.logit_bias or ())):
            if not 0 <= token < VOCAB_SIZE:
                raise InvalidParameter("prompt", f"token ids must be below 256, not {token}")
        if len(tokens) >= CONTEXT_TOKENS:
            limit = CONTEXT_TOKENS - 1
            raise PromptTooLong(f"the prompt has {len(tokens)} tokens, at most {limit} fit", limit)
        assert request_id is not None
        assert request_id not in self.live
        self.live.add(request_id)
        self.senders.append(sender)
        self.seen.append((prompt, params, priority))
        stream = ScriptedStream(self, request_id, self._play(tuple(tokens), params))
        stream.prompt_tokens = tuple(tokens)
        return stream

    def _play(self, prompt: tuple[int, ...], params: SamplingParams) -> Iterator[OutputDelta]:
        text = self.reply
        stopped = [text.index(stop) for stop in params.stop_strings if stop in text]
        if stopped:
            text = text[: min(stopped)]
        data = text.encode("utf-8")[: params.max_tokens]
        natural = "length" if params.max_tokens == len(data) else "stop"
        for place, token in enumerate(data):
            shown = _decode_whole(data[: place + 1])[len(_decode_whole(data[:place])) :]
            for index in range(params.n):
                delta = OutputDelta(index, shown, (token,), (bytes([token]),))
                if params.logprobs is not None:
                    delta = replace(delta, logprobs=(_score(token, params.logprobs),))
                if params.prompt_logprobs is not None and place == 0 and index == 0:
                    scored = tuple(_score(each, params.prompt_logprobs) for each in prompt[1:])
                    delta = replace(delta, prompt_logprobs=scored)
                if place == len(data) - 1:
                    delta = replace(delta, ending=self.ending or Finished(natural))
                yield delta

    tool_form = HERMES

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        if messages[0]["role"] == "tool":
            raise TemplateError("a conversation cannot begin with a tool's answer")
        self.rendered.append([dict(message) for message in messages])
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    def stats(self) -> EngineStats:
        self.metrics.set_gauges(Gauges(running=len(self.live), kv_blocks_total=8))
        return self.metrics.get_stats()

    def load(self) -> EngineLoad:
        return EngineLoad(self.waiting, len(self.live), self.metrics.num_ended)

    def health(self) -> ScriptedHealth:
        live = len(self.live)
        return ScriptedHealth(self.dead is None, self.dead, live, self.stalled_s, self.stall)

    def close(self) -> None:
        self.closed_times += 1
        self.live.clear()


def _decode_whole(data: bytes) -> str:
    return data.decode("utf-8", errors="ignore")


def _score(token: int, count: int) -> TokenLogprob:
    top = tuple(((token + place) % VOCAB_SIZE, -0.5 - place) for place in range(count))
    return TokenLogprob(token, -0.5, top)
