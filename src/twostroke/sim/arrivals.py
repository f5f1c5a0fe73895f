"""Arrival: one request as a workload or trace gives it, and how it becomes a request of the engine.

Owns the tokens of simulated prompts. Only lengths and shared prefixes matter to a scheduler, so a
prompt is named by numbers: each shared part and each request's own rest begin with their number,
written in tokens, and go on with filler. Equal numbers give equal tokens and different numbers
different ones, so a prefix cache hits exactly where the trace says. Nothing is kept: a prompt is
built when its request arrives and dropped when that ends, because a million would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.core.types import Request, Token

# The first token of a part says whose number follows.
_SHARED, _OWN, _FILLER = 0, 1, 2
_FIRST_DIGIT = 3
MIN_VOCAB = 5


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives at `time_ns` after the start.

    new_tokens: length of its answer. prefix: ids of shared parts of `prefix_tokens` tokens each
    that the prompt begins with; equal ids are equal tokens, and the last part may be cut short by
    the prompt's end. tenant, priority, ttft_ns, itl_ns, expected_tokens: as in core's `Request`.
    cancel_after_ns: the caller gives up so long after the arrival; 0 means never.
    """

    time_ns: int
    prompt_tokens: int
    new_tokens: int
    prefix: tuple[int, ...] = ()
    prefix_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    ttft_ns: int = 0
    itl_ns: int = 0
    cancel_after_ns: int = 0
    expected_tokens: int = 0


def build_request(arrival: Arrival, index: int, vocab_size: int) -> Request:
    """The request that is arrival number `index`; its id is that number.

    vocab_size: at least MIN_VOCAB. Its answer ends by length.
    """
    return Request(
        id=str(index),
        prompt=build_prompt(arrival, index, vocab_size),
        max_new_tokens=arrival.new_tokens,
        priority=arrival.priority,
        tenant=arrival.tenant,
        ttft_ns=arrival.ttft_ns,
        itl_ns=arrival.itl_ns,
        expected_tokens=arrival.expected_tokens,
    )


def build_prompt(arrival: Arrival, index: int, vocab_size: int) -> tuple[Token, ...]:
    """The prompt of arrival number `index`: its shared parts, then tokens nobody else has."""
    assert vocab_size >= MIN_VOCAB, f"a vocabulary of {vocab_size} tokens cannot write numbers"
    tokens: list[Token] = []
    for part in arrival.prefix:
        tokens += _write_number(_SHARED, part, vocab_size)[: arrival.prefix_tokens]
        missing = arrival.prefix_tokens - len(tokens) % arrival.prefix_tokens
        if missing < arrival.prefix_tokens:
            tokens += [_FILLER] * missing
    if len(tokens) < arrival.prompt_tokens:
        tokens += _write_number(_OWN, index, vocab_size)
    # Most is filler, and two tuples are joined faster than a list is filled and copied.
    rest = (_FILLER,) * (arrival.prompt_tokens - len(tokens))
    return tuple(tokens[: arrival.prompt_tokens]) + rest


def _write_number(kind: Token, number: int, vocab_size: int) -> list[Token]:
    """A part's kind and number in tokens, least digit first; the filler behind ends the number."""
    base, tokens = vocab_size - _FIRST_DIGIT, [kind]
    while True:
        number, digit = divmod(number, base)
        tokens.append(digit + _FIRST_DIGIT)
        if number == 0:
            return [*tokens, _FILLER]
