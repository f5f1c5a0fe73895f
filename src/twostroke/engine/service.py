"""EngineService: one running engine, which the offline and the asynchronous API both stand on.

It owns the loop, the request book, the metrics and the thread they run on, and turns prompts and
parameters into requests. Preparing runs on the caller's thread; everything that touches the
scheduler runs on the engine's. It must know nothing of asyncio, and of who receives the output
only a function to call.
"""

from __future__ import annotations

import logging
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from twostroke.core.admission import get_longest_prompt
from twostroke.core.ports import Clock, Executor
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import Rejected, Request
from twostroke.engine.attribution import Attribution
from twostroke.engine.constraints import Constraints
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.engine.metrics import EngineMetrics, EngineStats, Gauges
from twostroke.engine.params import ModelLimits, SamplingParams, to_request
from twostroke.engine.request import RequestBook, RequestState, Sink, TextRules
from twostroke.engine.thread import EngineThread
from twostroke.errors import InvalidParameter, InvalidRequest, PromptTooLong, TemplateError
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import ModelWork, get_model_work
from twostroke.text.chat import ChatTemplate
from twostroke.text.grammar import Grammar, GrammarCompiler
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tools import speaks_of_tools, tell_tools

_log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 256
MAX_PRIORITY = 2**31

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Submitted = Future[Sequence[RequestState]]


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends a request. tenant: whose share it counts for. cache_scope: KV of its prompt is
    reused only by requests of the same scope."""

    tenant: str = ""
    cache_scope: str = ""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is: continuations that wait and run now, requests ended so far."""

    waiting: int
    running: int
    ended: int


NOBODY = Sender()


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What the composition root puts together to make an engine.

    ttft_ns: target for the first token of every request; 0 for none. limits: of this machine, for
    the floors of steps; None counts none.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    scheduler: Scheduler
    executor: Executor
    clock: Clock
    model_name: str
    policy: LoopPolicy = field(default_factory=LoopPolicy)
    ttft_ns: int = 0
    limits: DeviceSpec | None = None


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine works: reason says why it is dead, and is None while it lives.

    live: requests accepted and not yet ended. stalled_s: seconds since a step was last committed,
    or since work last arrived at an idle engine; 0 with nothing live. stall: what holds up an
    engine that lives, with its age, as "step 812 has been running for 4.2 s" or "the executor is
    being replaced"; None while steps come as they should.
    """

    alive: bool
    reason: str | None
    live: int
    stalled_s: float
    stall: str | None = None

    @property
    def state(self) -> str:
        """In one word: "live", "stalled" or "dead"."""
        return "dead" if not self.alive else "live" if self.stall is None else "stalled"


class _EngineWork:
    """The Work of the engine's thread: everything here runs on it."""

    def __init__(
        self, parts: EngineParts, loop: EngineLoop, book: RequestBook, metrics: EngineMetrics
    ) -> None:
        self._parts = parts
        self._loop = loop
        self._book = book
        self._metrics = metrics

    @property
    def poll_for(self) -> tuple[int, int] | None:
        return self._loop.poll_for

    def pump(self) -> float | None:
        self._loop.pump()
        self._loop.lend_thread()
        if self._loop.has_answers:
            return 0
        due_ns = self._loop.next_wake_ns
        if due_ns is None:
            return None
        return max(0, due_ns - self._parts.clock.now_ns()) / 1e9

    def close(self) -> None:
        self._loop.close()

    def abandon(self, reason: str) -> None:
        self._book.abort_all(reason, self._parts.clock.now_ns())
        self._loop.abandon(reason)

    def submit(self, states: Sequence[RequestState]) -> Sequence[RequestState]:
        """Accept all or none: nothing was planned yet when one is refused."""
        for index, state in enumerate(states):
            where = f"prompt {index}: " if len(states) > 1 else ""
            try:
                self._submit(state, where)
            except InvalidRequest:
                for accepted in states[:index]:
                    self.cancel(accepted)
                raise
        return states

    def cancel(self, state: RequestState) -> None:
        if state.num_live:
            self._loop.cancel(state.request.id)

    def _submit(self, state: RequestState, where: str) -> None:
        request = state.request
        if request.id in self._book:
            raise InvalidParameter("request_id", f"{request.id!r} is the id of a live request")
        if request.sampling.grammar and state.grammar is None:
            raise InvalidRequest(f"{request.id}: its grammar was not compiled")
        answer = self._loop.submit(request)
        if isinstance(answer, Rejected):
            self._metrics.record_rejected()
            if answer.limit_tokens is not None:
                raise PromptTooLong(where + answer.reason, answer.limit_tokens)
            raise InvalidRequest(where + answer.reason)
        self._book.open(state, self._parts.clock.now_ns())
        if state.grammar is not None and self._loop.constraints is not None:
            self._loop.constraints.open(request, state.grammar)

    def record_gauges(self) -> None:
        """Note what is only read when asked for; these are plain counts, so any thread may ask."""
        scheduler = self._parts.scheduler
        memory = scheduler.memory
        total = scheduler.config.num_blocks
        self._metrics.set_gauges(
            Gauges(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                kv_blocks_used=total - scheduler.num_free_blocks,
                kv_blocks_total=total,
                preemptions=memory.num_preemptions,
                kv_blocks_cached=memory.num_cached_blocks,
                block_tokens=scheduler.config.block_tokens,
                held_tokens=scheduler.num_held_tokens,
                swaps=memory.num_swaps,
                prefix_queries=memory.prompt_tokens,
                prefix_hits=memory.cached_tokens,
                drafted=scheduler.num_drafted,
                accepted=scheduler.num_accepted,
            ),
            self._loop.parts.get_totals(),
        )


class EngineService:
    """A running engine. `on_delivered` is called on the engine's thread after each delivery."""

    def __init__(self, parts: EngineParts, on_delivered: Callable[[], None] = lambda: None) -> None:
        self.parts = parts
        self._metrics = EngineMetrics()
        self._thread = EngineThread()
        self.attribution = Attribution(_count_work(parts), parts.limits)
        book = RequestBook(parts.tokenizer, self._metrics, on_delivered, self.attribution)
        self._loop = EngineLoop(
            parts.scheduler, parts.executor, parts.clock, book, parts.policy, self._thread.wake
        )
        self.attribution.follow(self._loop.parts)
        self._constraints = self._loop.constraints = Constraints(GrammarCompiler(parts.tokenizer))
        self._work = _EngineWork(parts, self._loop, book, self._metrics)
        self._limits = ModelLimits(
            stop_ids=parts.tokenizer.stop_ids,
            vocab_size=parts.scheduler.config.vocab_size,
            context_tokens=parts.scheduler.config.context_tokens,
            ttft_ns=parts.ttft_ns,
        )
        self._thread.start(self._work)

    def encode(self, prompt: Prompt, *, add_special: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, checked; from any thread, and slow for a long one.

        add_special: let the tokenizer add its begin token, where the text does not bring it.
        Raises InvalidRequest; PromptTooLong, before any tokenizing, for a text of more characters
        than as many of the longest token as fit.
        """
        if not isinstance(prompt, str):
            return check_tokens(prompt, self._limits.vocab_size)
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        self._check_chars(len(prompt))
        tokens = self.parts.tokenizer.encode(prompt, add_special=add_special)
        return check_tokens(tokens, self._limits.vocab_size)

    def _check_chars(self, chars: int) -> None:
        limit = get_longest_prompt(self.parts.scheduler.config)
        if chars <= limit:  # not worth looking at the vocabulary for
            return
        most = self.parts.tokenizer.most_token_chars
        if chars > limit * most:
            raise PromptTooLong(
                f"prompt: {chars} characters are more than {limit} tokens of up to {most} can "
                "hold, and no more tokens fit the context and the KV pool",
                limit,
            )

    def make_request(
        self,
        params: SamplingParams,
        request_id: str,
        tokens: tuple[int, ...],
        priority: int = 0,
        sender: Sender = NOBODY,
    ) -> Request:
        """The scheduler's request, with a fresh seed where none was given.

        Raises InvalidParameter.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidParameter("params", f"must be SamplingParams, not {type(params).__name__}")
        if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidParameter(
                "request_id", f"must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters"
            )
        if type(priority) is not int or abs(priority) > MAX_PRIORITY:
            raise InvalidParameter(
                "priority", f"must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            )
        request = to_request(
            params,
            request_id,
            tokens,
            seed=secrets.randbits(63),
            limits=self._limits,
            priority=priority,
        )
        if sender == NOBODY:
            return request
        return replace(request, tenant=sender.tenant, cache_scope=sender.cache_scope)

    def make_state(
        self, request: Request, params: SamplingParams, sink: Sink, *, in_one: bool = False
    ) -> RequestState:
        """A request ready to be submitted, whose output will go to `sink`.

        in_one: the output of a continuation is wanted when it has ended, not as it is made.
        """
        rules = TextRules(
            self.parts.tokenizer,
            params.stop_strings,
            params.skip_special_tokens,
            in_one,
            self.compile_grammar(request.sampling.grammar).result() if params.grammar else None,
        )
        return RequestState(request, rules, sink)

    def prepare_grammars(self) -> None:
        """Begin what the first grammar would hold up other requests for, where there can be any.

        What stands in the way is logged.
        """
        if self.closed_reason is None and self._has_grammars():
            self._constraints.prepare().add_done_callback(_log_fault)

    def _has_grammars(self) -> bool:
        return self._loop.describe_executor().device == "cpu"

    def compile_grammar(self, text: str) -> Future[Grammar]:
        """What `make_state` would wait for, up to seconds, where a request has this grammar.

        Raises InvalidParameter, at once or from the future; Overloaded.
        """
        if not self._has_grammars():
            device = self._loop.describe_executor().device
            raise InvalidParameter(
                "structured_outputs", f"need the model on a CPU; this one runs on {device}"
            )
        return self._constraints.compile(text)

    def submit(self, states: Sequence[RequestState]) -> Submitted:
        """Submit all of them, or none if one is refused, before anything of them runs.

        The future raises InvalidParameter, PromptTooLong, InvalidRequest or EngineClosed.
        """
        return self._thread.call(partial(self._work.submit, states))

    def cancel(self, states: Sequence[RequestState]) -> None:
        """End these requests soon, where they have not ended; never waits."""
        for state in states:
            self._thread.post(partial(self._work.cancel, state))

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation, special tokens included.

        Raises TemplateError, and InvalidParameter for messages of the wrong shape.
        """
        template = self.parts.chat_template
        if template is None:
            name = self.parts.model_name
            raise TemplateError(f"{name} has no chat template: use generate with a plain prompt")
        if not template.knows_tools and (tools or any(map(speaks_of_tools, messages))):
            messages, tools = tell_tools(messages, tools or ()), None
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def get_stats(self) -> EngineStats:
        """Counters and histograms so far."""
        self._work.record_gauges()
        return replace(self._metrics.get_stats(), attribution=self.attribution.get_totals())

    @property
    def closed_reason(self) -> str | None:
        """Why nothing is accepted any more, or None."""
        return self._thread.closed_reason or self._loop.closed_reason

    def get_load(self) -> EngineLoad:
        """How busy the engine is; reads three counts, so it may be asked for every request."""
        scheduler = self.parts.scheduler
        ended = self._metrics.num_ended
        return EngineLoad(scheduler.num_waiting, scheduler.num_running, ended)

    def get_health(self) -> EngineHealth:
        """Whether the engine works; reads only, so it answers even when the engine hangs."""
        reason = self._thread.closed_reason or self._loop.closed_reason
        live, now_ns = self._loop.num_live, self.parts.clock.now_ns()
        stalled_ns = now_ns - self._loop.last_progress_ns if live else 0
        stall = self._loop.describe_stall(now_ns) if reason is None else None
        return EngineHealth(reason is None, reason, live, max(0, stalled_ns) / 1e9, stall)

    def close(self) -> None:
        """Fail what is live, close the executor and wait for the thread; again does nothing."""
        self._thread.stop()
        self._constraints.close()


def _count_work(parts: EngineParts) -> ModelWork:
    """The model's counts, with keys and values of the size that its executor keeps them in."""
    work, info = get_model_work(parts.spec), parts.executor.describe()
    positions = info.num_blocks * info.block_tokens * parts.spec.num_layers
    return replace(work, kv_layer_bytes=info.kv_bytes // positions)


def _log_fault(prepared: Future[None]) -> None:
    """What stood in the way will be told to whoever asks for a grammar; here it is only noted."""
    fault = None if prepared.cancelled() else prepared.exception()
    if fault is not None:
        _log.warning("grammars could not be prepared: %s", fault)


def cancel_submitted(service: EngineService, future: Submitted) -> None:
    """End what a submission has started; for a caller that went away before it heard of it."""
    if not future.cancelled() and future.exception() is None:
        service.cancel(future.result())


def check_tokens(tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The ids as a tuple of ints; raises InvalidRequest for none, or naming the first bad one."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, bytes):
        raise InvalidParameter("prompt", f"must be a text or a list of token ids, not {tokens!r}")
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise InvalidParameter(
                "prompt", f"token id at position {position} must be an integer, not {token!r}"
            )
        if not 0 <= token < vocab_size:
            raise InvalidParameter(
                "prompt",
                f"token id at position {position} must be from 0 to {vocab_size - 1}, not {token}",
            )
    if not len(tokens):
        raise InvalidRequest("the prompt is empty")
    return tuple(int(token) for token in tokens)
