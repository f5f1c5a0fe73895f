"""What a caller of the engine receives while a request runs, and when it has ended.

All are frozen values. Joined in order, the deltas of one continuation are its Completion; a
continuation's last delta, and only that, carries its ending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twostroke.core.types import Ending, Finished, TokenLogprob


@dataclass(frozen=True, slots=True)
class RequestAccount:
    """What became of a request's time, in nanoseconds that sum to the time from its submission.

    queued_ns: until it was first planned. prefill_ns: in its prompt's steps, its share of them by
    tokens. decode_ns: in its decode steps. others_ns: in either, for other requests' prompts.
    python_ns: in the engine around those steps, waiting for an executor elsewhere included.
    waited_ns: planned before, with no row in the steps that ran.

    prefill_floor_ns, decode_floor_ns: the least time for the work of prefill_ns, and of decode_ns
    (all decodes of a step together); 0 where nobody knows the machine's limits.
    """

    queued_ns: int
    prefill_ns: int
    decode_ns: int
    others_ns: int
    python_ns: int
    waited_ns: int
    prefill_floor_ns: int
    decode_floor_ns: int

    @property
    def limit_share(self) -> float | None:
        """The least time of its work over the time from its submission; None where unknown."""
        floor_ns = self.prefill_floor_ns + self.decode_floor_ns
        parts = (self.queued_ns, self.prefill_ns, self.decode_ns, self.others_ns)
        life_ns = sum(parts) + self.python_ns + self.waited_ns
        return floor_ns / life_ns if floor_ns and life_ns else None


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Nanoseconds on the engine's clock; zero until the event happened.

    prefill_tokens: prompt tokens computed up to the first emitted token. decode_tokens: emitted, by
    all continuations. cached_tokens: of the prompt, not computed because their KV was there.
    first_planned_ns … first_token_ns is the prefill, first_token_ns … ended_ns the decode.
    account: where the time went, once it has ended.
    """

    submitted_ns: int
    first_planned_ns: int
    first_token_ns: int
    ended_ns: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    account: RequestAccount | None = None


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output of one continuation.

    index: which of the n. text: safe to show (whole characters, nothing a stop string may hide).
    tokens and logprobs: newly emitted, in order; they may run ahead of text. token_bytes: for
    each token, the bytes it stands for. token_texts: for each token, the part of text that it made
    safe to show; what is left of text came with the ending. prompt_logprobs: once, with the first
    delta, when asked. ending: set on the last delta of this continuation, else None.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    token_bytes: tuple[bytes, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ending: Ending | None = None
    token_texts: tuple[str, ...] = ()


def join_deltas(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Consecutive deltas of one continuation, at least one, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return OutputDelta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        token_bytes=tuple(data for delta in deltas for data in delta.token_bytes),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        ending=deltas[-1].ending,
        token_texts=tuple(text for delta in deltas for text in delta.token_texts),
    )


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
        """The OpenAI word: "stop" or "length"; else the ending's class name in lower case."""
        if isinstance(self.ending, Finished):
            return self.ending.reason
        return type(self.ending).__name__.lower()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request with its n continuations in order of index.

    prompt: the text, None when token ids were given. seed: the one drawn with, given or fresh.
    """

    request_id: str
    prompt: str | None
    prompt_tokens: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    completions: tuple[Completion, ...]
    timings: RequestTimings
    seed: int = 0
