"""What a caller of the engine receives while a request runs, and when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.core.types import Ending, TokenLogprob


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Nanoseconds on the engine's clock; zero until the event happened.

    prefill_tokens and decode_tokens are counts of tokens computed as prompt and emitted;
    cached_tokens were not computed because their KV was there.
    """

    submitted_ns: int
    first_planned_ns: int
    first_token_ns: int
    ended_ns: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output of one continuation.

    index: which of the n. text: safe to show (whole characters, nothing a stop string may hide).
    tokens and logprobs: newly emitted, in order; they may run ahead of text. token_texts: for
    each token, the bytes it stands for. prompt_logprobs: once, with the first delta, when asked.
    ending: set on the last delta of this continuation, else None.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    token_bytes: tuple[bytes, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    ending: Ending

    @property
    def finish_reason(self) -> str:
        """The OpenAI word: "stop" or "length"; other endings give their class name in lower case."""
        reason = getattr(self.ending, "reason", "")
        return reason if reason in ("stop", "length") else type(self.ending).__name__.lower()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request with its n continuations in order of index."""

    request_id: str
    prompt: str | None
    prompt_tokens: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    completions: tuple[Completion, ...]
    timings: RequestTimings
