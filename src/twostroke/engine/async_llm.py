"""AsyncLLM: the asynchronous face of the engine, for servers.

It owns one running engine and carries its output to the event loops that asked for it: one wake-up
per event loop and delivery, however many streams it feeds. It must never block an event loop, and
never leave a request running whose stream was left: closed, dropped, or its task cancelled.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from twostroke.core.types import Request
from twostroke.engine.attribution import Attribution
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import OutputDelta, RequestTimings, join_deltas
from twostroke.engine.params import SamplingParams
from twostroke.engine.request import RequestState
from twostroke.engine.service import (
    NOBODY,
    EngineHealth,
    EngineLoad,
    EngineParts,
    EngineService,
    Message,
    Prompt,
    Sender,
    Tool,
    cancel_submitted,
)
from twostroke.spec.model import ModelSpec
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tool_calls import HERMES, ToolForm

# A request with more than this many characters or ids, of its prompt and of the stop strings of all
# its continuations, is prepared off the event loop.
MUCH_TEXT = 2000

Resumed = tuple[tuple[int, ...] | None, ...]


class _Channel:
    """Deltas of one request on their way to one consumer; lives on the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.has_ended = False
        self._pending: dict[int, list[OutputDelta]] = {}
        self._arrived = asyncio.Event()
        self._listener: Callable[[int], None] = self._wake

    def put(self, deltas: Sequence[OutputDelta], ended: bool) -> None:
        """Keep deltas until they are taken, and tell the listener."""
        if self.has_ended:  # the consumer has left
            return
        tokens = 0
        for delta in deltas:
            self._pending.setdefault(delta.index, []).append(delta)
            tokens += len(delta.tokens)
        self.has_ended = ended
        self._listener(tokens)

    def follow(self, listener: Callable[[int], None]) -> None:
        """Tell `listener` from now on, and now of what is here already."""
        self._listener = listener
        if self._pending or self.has_ended:
            unread = itertools.chain.from_iterable(self._pending.values())
            listener(sum(len(delta.tokens) for delta in unread))

    def take_ready(self) -> list[OutputDelta]:
        """What is pending, as one delta of each continuation."""
        ready = [join_deltas(deltas) for deltas in self._pending.values()]
        self._pending.clear()
        return ready

    async def take(self) -> OutputDelta | None:
        """The oldest pending delta, when there is one; None after the end."""
        while not self._pending:
            if self.has_ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return join_deltas(self._pending.pop(next(iter(self._pending))))

    def drop(self) -> None:
        """Forget what is pending and end."""
        self._pending.clear()
        self.has_ended = True
        self._listener(0)

    def _wake(self, tokens: int) -> None:
        self._arrived.set()


_Parcel = tuple[_Channel, Sequence[OutputDelta], bool]


class _Outbox:
    """Carries parcels from the engine's thread to event loops, one wake-up a loop and delivery."""

    def __init__(self) -> None:
        self._filling: dict[asyncio.AbstractEventLoop, list[_Parcel]] = {}

    def put(self, channel: _Channel, deltas: Sequence[OutputDelta], ended: bool) -> None:
        """On the engine's thread: add to this delivery."""
        self._filling.setdefault(channel.loop, []).append((channel, deltas, ended))

    def send(self) -> None:
        """On the engine's thread: the delivery is complete."""
        for loop, parcels in self._filling.items():
            try:
                loop.call_soon_threadsafe(_unpack, parcels)
            except RuntimeError:
                # The event loop was closed, and with it everybody who could take these; their
                # streams cancel their requests when they are dropped.
                continue
        self._filling.clear()


def _unpack(parcels: list[_Parcel]) -> None:
    for channel, deltas, ended in parcels:
        channel.put(deltas, ended)


class RequestStream:
    """The deltas of one request, an async iterator that ends when all continuations have.

    Who reads several together may `follow` each and take what is ready, without a task for each.
    Endings come as the `ending` of deltas; nothing is raised for a failed request. Leaving the
    stream early cancels the request: `aclose`, `async with`, the last reference dropped, or the
    awaiting task cancelled. Belongs to the event loop it was made on.
    """

    def __init__(self, service: EngineService, state: RequestState, channel: _Channel) -> None:
        self._service = service
        self._state = state
        self._channel = channel

    @property
    def request_id(self) -> str:
        """The id the request was submitted under."""
        return self._state.request.id

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self._state.request.prompt

    @property
    def seed(self) -> int:
        """The seed drawn with, given or fresh."""
        return self._state.request.sampling.seed

    @property
    def timings(self) -> RequestTimings:
        """The timings so far."""
        return self._state.timings

    @property
    def closed_reason(self) -> str | None:
        """Why the engine accepts nothing any more, or None; its live requests end Failed."""
        return self._service.closed_reason

    @property
    def has_ended(self) -> bool:
        """True when nothing comes any more; what came may still be there to take."""
        return self._channel.has_ended

    def follow(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with the number of its tokens whenever output comes, and at the end.

        What has come before is told at once. The stream cannot be iterated any more.
        """
        self._channel.follow(listener)

    def take_ready(self) -> list[OutputDelta]:
        """What has come and was not taken, as one delta of each continuation; never waits."""
        return self._channel.take_ready()

    def leave(self) -> None:
        """Cancel the request if it has not ended, and give no more deltas."""
        if not self._channel.has_ended:
            self.cancel()
        self._channel.drop()

    def cancel(self) -> None:
        """End the request soon; its deltas still come, the last of them Cancelled."""
        self._service.cancel([self._state])

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> OutputDelta:
        try:
            delta = await self._channel.take()
        except asyncio.CancelledError:
            self.leave()
            raise
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Cancel the request if it has not ended, and give no more deltas."""
        self.leave()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.leave()

    def __del__(self) -> None:
        if not self._channel.has_ended:
            self.cancel()


class AsyncLLM:
    """Serves one model to any number of concurrent requests."""

    def __init__(self, parts: EngineParts) -> None:
        self._outbox = _Outbox()
        self._service = EngineService(parts, self._outbox.send)
        # Closes the engine also when this object is dropped or the interpreter ends.
        self._close = weakref.finalize(self, self._service.close)

    @property
    def spec(self) -> ModelSpec:
        """The model's description."""
        return self._service.parts.spec

    @property
    def model_name(self) -> str:
        """The name the model is served under."""
        return self._service.parts.model_name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._service.parts.tokenizer

    @property
    def tool_form(self) -> ToolForm:
        """How this model writes calls of tools."""
        template = self._service.parts.chat_template
        return HERMES if template is None else template.tool_form

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special: bool = True,
        sender: Sender = NOBODY,
    ) -> RequestStream:
        """Check and queue one request; it runs from here on, whether its stream is read or not.

        prompt: text or token ids. request_id: fresh when not given. priority: smaller runs first.
        add_special: False for a text from `render_chat`, which has its special tokens already.
        sender: whose share of the engine it takes, and whose cached prefixes it may reuse.
        Raises InvalidRequest, InvalidParameter, PromptTooLong or EngineClosed.
        """
        service = self._service
        own = params or SamplingParams()
        fresh_id = request_id if request_id is not None else f"request-{secrets.token_hex(8)}"

        def make() -> Request:
            tokens = service.encode(prompt, add_special=add_special)
            return service.make_request(own, fresh_id, tokens, priority, sender)

        return await self._start(make, own, _has_much_text(prompt, own))

    async def resume(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        resumed: Resumed,
        *,
        request_id: str,
        priority: int = 0,
        sender: Sender = NOBODY,
    ) -> RequestStream:
        """Go on with a request of an earlier run; what comes is the rest of that run.

        prompt, params: those of that run, with its seed. resumed: what it emitted of each
        continuation (see Request.resumed). Raises as `submit`.
        """
        service = self._service

        def make() -> Request:
            tokens = service.encode(prompt)
            request = service.make_request(params, request_id, tokens, priority, sender)
            return replace(request, resumed=resumed)

        return await self._start(make, params, is_slow=True)

    async def _start(
        self, make: Callable[[], Request], own: SamplingParams, is_slow: bool
    ) -> RequestStream:
        """Submit what `make` makes, off the event loop where that is slow."""
        service = self._service
        channel = _Channel(asyncio.get_running_loop())
        sink = partial(self._outbox.put, channel)

        def prepare() -> RequestState:
            return service.make_state(make(), own, sink)

        if isinstance(own, SamplingParams) and own.grammar:
            await asyncio.wrap_future(service.compile_grammar(own.grammar))
        state = await asyncio.to_thread(prepare) if is_slow else prepare()
        future = service.submit([state])
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(partial(cancel_submitted, service))
            raise
        return RequestStream(service, state, channel)

    def prepare_grammars(self) -> None:
        """Begin what the first structured output would hold up other streams for; never waits."""
        self._service.prepare_grammars()

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; submit it with add_special=False.

        Raises TemplateError, and InvalidParameter for messages of the wrong shape.
        """
        return self._service.render_chat(
            messages, tools, add_generation_prompt=add_generation_prompt
        )

    @property
    def attribution(self) -> Attribution:
        """Where the time of its steps and requests went."""
        return self._service.attribution

    def stats(self) -> EngineStats:
        """Counters and histograms so far; never waits for the engine."""
        return self._service.get_stats()

    def load(self) -> EngineLoad:
        """How busy the engine is now; cheap enough to ask before every request."""
        return self._service.get_load()

    def health(self) -> EngineHealth:
        """Whether the engine works; never waits for it."""
        return self._service.get_health()

    def close(self) -> None:
        """End the engine; live requests end Failed. Again does nothing."""
        self._close()


def _has_much_text(prompt: Prompt, params: SamplingParams) -> bool:
    # Wrong types are still to be refused, so nothing may be taken for granted here.
    chars = len(prompt) if isinstance(prompt, Sequence) else 0
    if isinstance(params, SamplingParams):
        chars += params.n * sum(map(len, params.stop_strings))
    return chars > MUCH_TEXT
