"""RequestBook: what the engine remembers of each live request, and how its output leaves.

It owns the streaming decoders, the timings and the undelivered output of every live request. It
runs on the one thread that pumps the loop and must never call back into it: a completed stop
string is reported as a return value. It keeps true that what was delivered of a continuation,
joined, is its whole output, that its ending is delivered last and once, and that nothing follows
the token that completed a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from twostroke.core.types import (
    Cancelled,
    Ending,
    Failed,
    Finished,
    Preempted,
    Request,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
    TokensEmitted,
    Update,
)
from twostroke.engine.attribution import Attribution
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.outputs import OutputDelta, RequestAccount, RequestTimings
from twostroke.errors import ExecutorLost
from twostroke.text.grammar import Grammar
from twostroke.text.stream import StreamDecoder
from twostroke.text.tokenizer import Tokenizer

# Receives new deltas of one request, and whether all its continuations have now ended.
Sink = Callable[[Sequence[OutputDelta], bool], None]


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a request become text; the scheduler need not know.

    in_one: output is delivered when a continuation has ended. Text made token by token costs ten
    times as much, because a step of native code leaves nothing of ours in the caches.
    grammar: what the request's SamplingSpec asks its text to match, compiled.
    """

    tokenizer: Tokenizer
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    in_one: bool = False
    grammar: Grammar | None = None


@dataclass(slots=True, eq=False)
class _Continuation:
    """One of the n; the lists hold what was emitted and not yet delivered.

    text: what each token made safe to show, as far as they are decoded.
    """

    id: SequenceId
    decoder: StreamDecoder
    has_stops: bool
    num_texts: int  # ids from here on pad the model's vocabulary and stand for no text
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    num_decoded: int = 0  # of `tokens`, how many have become text already
    last_emitted_ns: int = 0
    stopped: bool = False
    ending: Ending | None = None
    is_closed: bool = False  # the ending was delivered

    def emit(self, update: TokensEmitted) -> int:
        """Take new tokens in; returns how many belong to the output."""
        if self.stopped:
            return 0
        tokens = update.tokens
        if self.has_stops:
            tokens = self._decode_until_stop(tokens)
            self.num_decoded += len(tokens)
        self.tokens.extend(tokens)
        self.logprobs.extend(update.logprobs[: len(tokens)])
        return len(tokens)

    def end(self, ending: Ending) -> None:
        """Record the ending; a completed stop string goes before whatever else ended it."""
        self.ending = Finished("stop") if self.stopped else ending

    def prime(self, tokens: tuple[int, ...]) -> None:
        """What an earlier run emitted comes before; it was shown then, and is not shown again."""
        for token in tokens:
            self._feed(token)
        self.stopped = self.decoder.stopped
        self.text.clear()

    def take_text(self) -> tuple[str, tuple[str, ...]]:
        """The text that became safe to show since the last call, and each token's part of it."""
        if self.num_decoded < len(self.tokens):
            for token in self.tokens[self.num_decoded :]:
                self._feed(token)
            self.num_decoded = len(self.tokens)
        parts = tuple(self.text)
        self.text.clear()
        rest = self.decoder.finish() if self.ending is not None and not self.stopped else ""
        return "".join(parts) + rest, parts

    def _decode_until_stop(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for count, token in enumerate(tokens, start=1):
            self._feed(token)
            if self.decoder.stopped:
                self.stopped = True
                return tokens[:count]
        return tokens

    def _feed(self, token: int) -> None:
        self.text.append(self.decoder.feed(token) if token < self.num_texts else "")


class RequestState:
    """One request from before its submission to its end; callers keep it as their handle.

    Making one is slow when there are many continuations and long stop strings, and touches nothing
    else: it belongs on the caller's thread. From its submission on, the engine's thread owns it
    and others may only read the request and the timings.
    """

    def __init__(self, request: Request, rules: TextRules, sink: Sink) -> None:
        tokenizer = rules.tokenizer
        self.request = request
        self.grammar = rules.grammar
        self.sink = sink
        self.in_one = rules.in_one
        self.continuations = [
            _Continuation(
                SequenceId(request.id, index),
                StreamDecoder(tokenizer, rules.stop_strings, rules.skip_special_tokens),
                bool(rules.stop_strings),
                tokenizer.vocab_size,
            )
            for index in range(request.n)
        ]
        self.num_live = request.num_open
        for one, resumed in zip(self.continuations, request.resumed, strict=False):
            if resumed is None:
                one.is_closed = True
            else:
                one.prime(resumed)
        self.prompt_scored: tuple[TokenLogprob, ...] = ()
        self.submitted_ns = 0
        self.first_planned_ns = 0
        self.first_token_ns = 0
        self.ended_ns = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.account: RequestAccount | None = None

    @property
    def timings(self) -> RequestTimings:
        """The timings so far; may be read from any thread."""
        return RequestTimings(
            submitted_ns=self.submitted_ns,
            first_planned_ns=self.first_planned_ns,
            first_token_ns=self.first_token_ns,
            ended_ns=self.ended_ns,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            account=self.account,
        )

    @property
    def how_ended(self) -> str:
        """One of `metrics.ENDINGS`: the worst of the continuations' endings."""
        endings = [one.ending for one in self.continuations]
        if any(isinstance(ending, Failed) for ending in endings):
            return "failed"
        if any(isinstance(ending, Cancelled) for ending in endings):
            return "cancelled"
        return "length" if Finished("length") in endings else "stop"

    def take_deltas(self, tokenizer: Tokenizer) -> list[OutputDelta]:
        """What is new, one delta a continuation; takes it out of the state."""
        deltas = []
        for one in self.continuations:
            if one.is_closed or not (one.tokens or one.ending or self.prompt_scored):
                continue
            text, token_texts = one.take_text()
            deltas.append(
                OutputDelta(
                    index=one.id.index,
                    text=text,
                    tokens=tuple(one.tokens),
                    token_bytes=tuple(
                        [
                            tokenizer.get_token_bytes(token) if token < one.num_texts else b""
                            for token in one.tokens
                        ]
                    ),
                    logprobs=tuple(one.logprobs),
                    prompt_logprobs=self.prompt_scored,
                    ending=one.ending,
                    token_texts=token_texts,
                )
            )
            self.prompt_scored = ()
            one.tokens.clear()
            one.logprobs.clear()
            one.num_decoded = 0
            one.is_closed = one.ending is not None
        return deltas


class RequestBook:
    """The LoopListener of the engine: turns updates into deltas, timings and metrics.

    on_delivered: called after each delivery that had anything in it, once. attribution: keeps the
    accounts of steps and requests; None keeps none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: EngineMetrics,
        on_delivered: Callable[[], None],
        attribution: Attribution | None = None,
    ) -> None:
        self._attribution = attribution
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._on_delivered = on_delivered
        self._live: dict[str, RequestState] = {}
        self._undelivered: dict[str, RequestState] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._live or request_id in self._undelivered

    def open(self, state: RequestState, now_ns: int) -> None:
        """Begin to follow a request that the scheduler has accepted."""
        state.submitted_ns = now_ns
        self._live[state.request.id] = state
        if self._attribution is not None:
            self._attribution.begin_request(state.request.id)
        self._metrics.record_accepted()

    # ---- LoopListener ---------------------------------------------------------------------------

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """Note when each request was first planned, and what of it needed no computing."""
        if self._attribution is not None:
            self._attribution.note_started(plan.step, now_ns)
        for row in plan.rows:
            state = self._live[row.sequence.request]
            if not state.first_planned_ns:
                state.first_planned_ns = now_ns
                state.cached_tokens = row.start

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Count the step, and the prompt tokens it computed."""
        if self._attribution is not None:
            self._attribution.note_committed(plan, outcome)
        step_tokens = prompt_tokens = drafts = 0
        for row in plan.rows:
            step_tokens += len(row.tokens)
            drafts += row.drafts > 0
            state = self._live.get(row.sequence.request)
            if state is None:  # ended while the step ran
                continue
            left = len(state.request.prompt) - row.start
            if left > 0:
                computed = min(left, len(row.tokens))
                prompt_tokens += computed
                # What a preemption makes us compute again later is no part of the time to the
                # first token, so it is not counted beside it.
                if not state.first_token_ns:
                    state.prefill_tokens += computed
        self._metrics.record_step(step_tokens, prompt_tokens, outcome.duration_ns, drafts)

    def executor_lost(self, lost: ExecutorLost) -> None:
        """Count the loss."""
        self._metrics.record_loss()

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        """Take updates in; returns the continuations that a stop string has ended just now."""
        stopped: list[_Continuation] = []
        intervals_ns: list[int] = []
        num_emitted = 0
        for update in updates:
            state = self._live[update.sequence.request]
            one = state.continuations[update.sequence.index]
            if isinstance(update, TokensEmitted):
                was_stopped = one.stopped
                num_emitted += self._emit(state, update, now_ns, intervals_ns)
                if one.stopped and not was_stopped:
                    stopped.append(one)
            elif isinstance(update, SequenceEnded):
                one.end(update.ending)
                self._end_one(state, now_ns)
            elif isinstance(update, Preempted):
                state.preemptions += 1
        if num_emitted:
            self._metrics.record_emitted(num_emitted, intervals_ns)
        return [one.id for one in stopped if one.ending is None]

    def deliver(self) -> None:
        """Hand every request's new output to its sink."""
        if self._undelivered:
            self._hand_out()
        if self._attribution is not None:
            self._attribution.catch_up()

    def _hand_out(self) -> None:
        # A state leaves the table only once its output is out: should decoding raise, what is
        # left here still gets its endings from `abort_all`.
        for request_id, state in tuple(self._undelivered.items()):
            deltas = state.take_deltas(self._tokenizer)
            del self._undelivered[request_id]
            if deltas:
                state.sink(deltas, not state.num_live)
        self._on_delivered()

    # ---- the rest -------------------------------------------------------------------------------

    def abort_all(self, reason: str, now_ns: int) -> None:
        """Fail everything at once, decoding nothing: for an engine that can no longer go on."""
        for state in tuple({**self._undelivered, **self._live}.values()):
            deltas = []
            for one in state.continuations:
                if one.is_closed:
                    continue
                if one.ending is None:
                    one.end(Failed(reason))
                    self._end_one(state, now_ns)
                one.is_closed = True
                deltas.append(OutputDelta(one.id.index, "", (), ending=one.ending))
            state.sink(deltas, True)
        self._undelivered.clear()
        self._on_delivered()

    def _emit(
        self, state: RequestState, update: TokensEmitted, now_ns: int, intervals_ns: list[int]
    ) -> int:
        one = state.continuations[update.sequence.index]
        if update.prompt_scored:
            state.prompt_scored = update.prompt_scored
        count = one.emit(update)
        if count:
            state.decode_tokens += count
            if not state.first_token_ns:
                state.first_token_ns = now_ns
            if one.last_emitted_ns:
                intervals_ns.append(now_ns - one.last_emitted_ns)
            one.last_emitted_ns = now_ns
        if (count or update.prompt_scored) and not state.in_one:
            self._undelivered[state.request.id] = state
        return count

    def _end_one(self, state: RequestState, now_ns: int) -> None:
        self._undelivered[state.request.id] = state
        state.num_live -= 1
        if not state.num_live:
            state.ended_ns = now_ns
            del self._live[state.request.id]
            if self._attribution is not None:
                state.account = self._attribution.end_request(state.request.id, state.timings)
            self._metrics.record_ended(state.how_ended, state.timings, state.request.num_open)
