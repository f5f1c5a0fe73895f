"""One HTTP request's share of the engine: its prompts submitted, its output merged in order.

An API request may hold several prompts, each with n continuations; a *choice* is one continuation
of one prompt, numbered prompt by prompt. This module submits all prompts or none, merges what the
engine emits into batches by choice, and counts tokens. Whoever makes a `Generation` must cancel it
or run it to its end; nothing here knows of HTTP or JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from twostroke.core.types import Cancelled, Ending, Failed, Finished, Rejected, TokenLogprob
from twostroke.engine.outputs import OutputDelta, RequestTimings, join_deltas
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import NOBODY, Sender
from twostroke.errors import (
    EngineClosed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    SlowReader,
    TwostrokeError,
)
from twostroke.server.schemas import CommonFields
from twostroke.text.grammar import GRAMMAR_FAULT

if TYPE_CHECKING:
    from twostroke.engine.async_llm import AsyncLLM, RequestStream

MAX_CHOICES = 2048
# Tokens of one API request that its client has not taken. Its connection takes some more; a client
# that far behind reads nothing, and what it does not read may not fill the memory.
MAX_UNREAD_TOKENS = 8192

_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids"),
    *("ignore_eos", "skip_special_tokens"),
)

Batch = list[tuple[int, OutputDelta]]


def build_params(
    common: CommonFields, own: Mapping[str, Any], public_names: Mapping[str, str]
) -> SamplingParams:
    """The engine's parameters for a request's fields.

    Args: common: the shared fields; own: values of SamplingParams that the API names otherwise, by
    SamplingParams' names; public_names: what the API calls them. Fields left out keep the
    defaults of SamplingParams.
    Raises: InvalidParameter, with the API's name of the field.
    """
    values = {name: getattr(common, name) for name in _SAMPLING_FIELDS}
    values = {name: value for name, value in values.items() if value is not None}
    if common.logit_bias:
        values["logit_bias"] = {
            _parse_token(token): addend for token, addend in common.logit_bias.items()
        }
    try:
        return SamplingParams(**{**values, **own})
    except InvalidParameter as error:
        raise rename_parameter(error, public_names) from None


def rename_parameter(error: InvalidParameter, public_names: Mapping[str, str]) -> InvalidParameter:
    """The same error, about the field that its sender knows."""
    public = public_names.get(error.parameter, error.parameter)
    return InvalidParameter(public, str(error).removeprefix(f"{error.parameter}: "))


def _parse_token(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise InvalidParameter("logit_bias", f"keys must be token ids, not {text[:24]!r}")
    return int(text)


@dataclass(frozen=True, slots=True)
class Submission:
    """What to submit.

    prompts: texts or token ids. add_special: False for texts that bring their special tokens.
    prompt_only: report nothing of the output; max_tokens is then 1, the least an engine runs.
    sender: whose share of the engine it takes. public_names: what the API calls fields of
    SamplingParams, where it calls them otherwise.
    """

    request_id: str
    prompts: Sequence[str | Sequence[int]]
    params: SamplingParams
    priority: int = 0
    add_special: bool = True
    prompt_only: bool = False
    sender: Sender = NOBODY
    public_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Past:
    """What an earlier process has done of a request: tokens emitted, and of each prompt how many
    tokens were cached."""

    emitted: int = 0
    cached: Mapping[int, int] = field(default_factory=dict)


class TokenStream(Protocol):
    """One prompt's output; a RequestStream, or what is left of one that had ended."""

    @property
    def seed(self) -> int: ...

    @property
    def prompt_tokens(self) -> tuple[int, ...]: ...

    @property
    def timings(self) -> RequestTimings: ...

    @property
    def closed_reason(self) -> str | None: ...

    @property
    def has_ended(self) -> bool: ...

    def follow(self, listener: Callable[[int], None]) -> None: ...

    def take_ready(self) -> Sequence[OutputDelta]: ...

    def cancel(self) -> None: ...

    def leave(self) -> None: ...


class PromptSource(Protocol):
    """What is known of the prompts that the choices of a request continue."""

    def get_prompt_tokens(self, choice: int) -> tuple[int, ...]: ...

    def get_prompt_logprobs(self, choice: int) -> tuple[TokenLogprob, ...]: ...


class Generation:
    """The running streams of one API request."""

    def __init__(
        self, streams: Sequence[TokenStream], submission: Submission, past: Past = Past()
    ) -> None:
        self._streams = tuple(streams)
        self._n = submission.params.n
        self._prompt_only = submission.prompt_only
        self.sender = submission.sender
        self._emitted = past.emitted
        self._cached = past.cached
        self._ready: dict[int, None] = {}  # streams with something to take, in order of arrival
        self._unread = 0  # tokens of them
        self._is_over = False
        self._error: TwostrokeError | None = None
        self._wake = asyncio.Event()
        self._prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}

    @property
    def num_choices(self) -> int:
        """Continuations over all prompts."""
        return len(self._streams) * self._n

    @property
    def choices_each(self) -> int:
        """Continuations of one prompt."""
        return self._n

    def get_prompt_tokens(self, choice: int) -> tuple[int, ...]:
        """Token ids of the prompt that `choice` continues."""
        return self._streams[choice // self._n].prompt_tokens

    def get_prompt_logprobs(self, choice: int) -> tuple[TokenLogprob, ...]:
        """What the model says of that prompt's tokens from the second on, once output has come.

        The engine reports it once for a prompt, with the first delta of any continuation.
        """
        return self._prompt_logprobs.get(choice // self._n, ())

    def get_prompts(self) -> list[tuple[int, ...]]:
        """Token ids of each prompt."""
        return [stream.prompt_tokens for stream in self._streams]

    def get_seeds(self) -> list[int]:
        """What the draws of each prompt's continuations begin from, given or fresh."""
        return [stream.seed for stream in self._streams]

    def get_usage(self) -> dict[str, Any]:
        """Token counts so far, in OpenAI's shape."""
        prompt = sum(len(stream.prompt_tokens) for stream in self._streams)
        cached = sum(
            self._cached.get(place, stream.timings.cached_tokens)
            for place, stream in enumerate(self._streams)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._emitted,
            "total_tokens": prompt + self._emitted,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def get_timings(self) -> list[RequestTimings]:
        """The timings so far of each prompt's request."""
        return [stream.timings for stream in self._streams]

    def end(self, error: TwostrokeError) -> None:
        """Cancel what still runs, and let `error` be what its consumer hears of it."""
        if not self._is_over and self._error is None:
            self._error = error
            self._wake.set()
            for stream in self._streams:
                stream.cancel()

    def cancel(self) -> None:
        """End every continuation that still runs; does nothing after the end."""
        if self._is_over:
            return
        self._is_over = True
        for stream in self._streams:
            stream.cancel()

    async def collect(self) -> list[OutputDelta]:
        """Run to the end. Returns each choice's whole output as one delta, in order of choice.

        Raises: as `batches`. However it ends, nothing is left running.
        """
        parts: list[list[OutputDelta]] = [[] for _ in range(self.num_choices)]
        async with contextlib.aclosing(self.batches()) as batches:
            async for batch in batches:
                for choice, delta in batch:
                    parts[choice].append(delta)
        return [join_deltas(part) for part in parts]

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """All output as it comes: everything that arrived since the last batch, one delta a choice.

        Raises: InvalidRequest, RequestFailed or EngineClosed when a continuation ends other than
        finished, SlowReader when too much was not taken, and what `end` was given. Closing the
        iterator early cancels the request.
        """
        for place, stream in enumerate(self._streams):
            stream.follow(partial(self._hear, place))
        try:
            while True:
                if self._error is not None:
                    raise self._error
                self._wake.clear()
                if batch := self._take():
                    yield batch
                elif all(stream.has_ended for stream in self._streams):
                    return
                else:
                    await self._wake.wait()
        finally:
            self._is_over = True
            self._leave()

    def _hear(self, place: int, tokens: int) -> None:
        """Output of a stream has come, or its end."""
        self._ready[place] = None
        self._unread += tokens
        self._wake.set()
        if self._unread > MAX_UNREAD_TOKENS:  # whoever still reads takes it now
            asyncio.get_running_loop().call_soon(self._check_unread)

    def _check_unread(self) -> None:
        if self._unread > MAX_UNREAD_TOKENS:
            self.end(SlowReader(f"{self._unread} tokens were not read; read faster"))
            self._leave()

    def _leave(self) -> None:
        for stream in self._streams:
            stream.leave()

    def _take(self) -> Batch:
        """All that has come, one delta of each choice. Raises as `batches` for an ending."""
        ready, self._ready, self._unread = self._ready, {}, 0
        batch = [
            (place * self._n + delta.index, delta)
            for place in ready
            for delta in self._streams[place].take_ready()
        ]
        for choice, delta in batch:
            if delta.ending is not None:
                _check_ending(delta.ending, self._streams[choice // self._n].closed_reason)
            if delta.prompt_logprobs:
                self._prompt_logprobs[choice // self._n] = delta.prompt_logprobs
        if self._prompt_only:
            return [(choice, _without_output(delta)) for choice, delta in batch]
        self._emitted += sum(len(delta.tokens) for _, delta in batch)
        return batch


async def submit(engine: AsyncLLM, submission: Submission) -> Generation:
    """Submit every prompt, or none.

    Returns: the running generation, which the caller must run or cancel.
    Raises: whatever the engine says of the first prompt it refuses.
    """
    count = len(submission.prompts) * submission.params.n
    if count > MAX_CHOICES:
        raise InvalidParameter("n", f"times the prompts is {count}, more than {MAX_CHOICES}")
    streams: list[RequestStream] = []
    try:
        for place, prompt in enumerate(submission.prompts):
            suffix = f"-{place}" if len(submission.prompts) > 1 else ""
            stream = await engine.submit(
                prompt,
                submission.params,
                request_id=submission.request_id + suffix,
                priority=submission.priority,
                add_special=submission.add_special,
                sender=submission.sender,
            )
            streams.append(stream)
    except InvalidParameter as error:
        raise rename_parameter(error, submission.public_names) from None
    finally:
        if len(streams) < len(submission.prompts):
            for stream in streams:
                stream.cancel()
    return Generation(streams, submission)


def get_finish_reason(delta: OutputDelta) -> str | None:
    """The OpenAI word for a delta's ending; None while the choice goes on."""
    return delta.ending.reason if isinstance(delta.ending, Finished) else None


def to_failure(message: str) -> TwostrokeError:
    """The error of a request that failed: the client's where its grammar proved too much."""
    is_own = message.startswith(GRAMMAR_FAULT)
    return InvalidRequest(message) if is_own else RequestFailed(message)


def _check_ending(ending: Ending | None, closed_reason: str | None) -> None:
    match ending:
        case Rejected(reason, None):
            raise InvalidRequest(reason)
        case Rejected(reason, int(limit)):
            raise PromptTooLong(reason, limit)
        case Failed(reason) if closed_reason is not None:
            raise EngineClosed(f"the server ended the request: {reason}; send it again later")
        case Failed(reason) if reason.startswith(GRAMMAR_FAULT):
            raise to_failure(reason)
        case Failed(reason):
            raise RequestFailed(f"the request failed: {reason}")
        case Cancelled(reason):
            raise EngineClosed(f"the server ended the request: {reason}")


def split_tokens(delta: OutputDelta) -> list[OutputDelta]:
    """The same output as one delta a token, where the part of each in the text is known.

    So what a stream is made of does not depend on what happened to arrive together.
    """
    count = len(delta.tokens)
    if count < 2 or len(delta.token_texts) != count:
        return [delta]
    rest = delta.text[sum(map(len, delta.token_texts)) :]
    parts = [
        OutputDelta(
            index=delta.index,
            text=delta.token_texts[place],
            tokens=delta.tokens[place : place + 1],
            token_bytes=delta.token_bytes[place : place + 1],
            logprobs=delta.logprobs[place : place + 1],
            token_texts=delta.token_texts[place : place + 1],
        )
        for place in range(count)
    ]
    parts[0] = replace(parts[0], prompt_logprobs=delta.prompt_logprobs)
    parts[-1] = replace(parts[-1], text=parts[-1].text + rest, ending=delta.ending)
    return parts


def _without_output(delta: OutputDelta) -> OutputDelta:
    ending = None if delta.ending is None else Finished("length")
    return OutputDelta(delta.index, "", (), ending=ending)
