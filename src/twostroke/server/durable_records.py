"""What the durable log says of API requests: records as JSON, and output deltas as their items.

Four records make a request's life: it was accepted (with all it takes to run it again), output was
given to its client, it went on after a restart, it ended. Floats are written so that they read back
to the last bit. Nothing here touches a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twostroke.core.types import Finished, TokenLogprob
from twostroke.engine.outputs import OutputDelta
from twostroke.server.logprobs import GetBytes

ACCEPTED, OUTPUT, RESUMED, ENDED = "accepted", "output", "resumed", "ended"

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request as it is kept.

    kind: which API wrote its events. head: what its reply begins with, its id included. body: the
    client's own. prompts, seeds: token ids of each prompt, and what its draws begin from.
    is_kept: its output is kept; otherwise only that it was there. fingerprint: of the server whose
    exact output this is.
    """

    kind: str
    head: Mapping[str, Any]
    body: Mapping[str, Any]
    prompts: Sequence[Sequence[int]] = ()
    seeds: Sequence[int] = ()
    tenant: str = ""
    cache_scope: str = ""
    is_kept: bool = True
    fingerprint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id its client knows."""
        return str(self.head["id"])


def write_record(kind: str, request_id: str, value: object) -> bytes:
    """One record of the log."""
    return _encode([kind, request_id, value]).encode()


def write_output(request_id: str, items: Iterable[str]) -> bytes:
    """The record of what a client was given; items: from `write_item`."""
    return f"[{_encode(OUTPUT)},{_encode(request_id)},[{','.join(items)}]]".encode()


def write_accepted(accepted: Accepted) -> bytes:
    """The record that a request begins with."""
    value = {name: getattr(accepted, name) for name in Accepted.__slots__}
    value["facts"] = dict(accepted.facts)
    return write_record(ACCEPTED, accepted.id, value)


def read_record(payload: bytes) -> tuple[str, str, Any]:
    """Kind, request id and value. Raises ValueError for what no version of ours has written."""
    kind, request_id, value = json.loads(payload)
    if not isinstance(kind, str) or not isinstance(request_id, str):
        raise ValueError("a record begins with two strings")
    return kind, request_id, value


def write_item(choice: int, delta: OutputDelta, cached: tuple[int, int] | None = None) -> str:
    """A delta as JSON text. cached: which prompt, and how many of its tokens needed no computing.

    Put together by hand, for one is written with every token: the library takes as long as sending.
    """
    extra: dict[str, Any] = {}
    rest = delta.text
    if len(delta.token_texts) == len(delta.tokens):
        rest = delta.text[sum(map(len, delta.token_texts)) :]
    if rest:
        extra["rest"] = rest
    if delta.ending is not None:
        extra["ending"] = getattr(delta.ending, "reason", "")
    if delta.logprobs:
        extra["logprobs"] = [_to_list(each) for each in delta.logprobs]
    if delta.prompt_logprobs:
        extra["prompt_logprobs"] = [_to_list(each) for each in delta.prompt_logprobs]
    if cached is not None:
        extra["cached"] = cached
    tokens, texts = ",".join(map(str, delta.tokens)), ",".join(map(_encode, delta.token_texts))
    return f"[{choice},[{tokens}],[{texts}]{',' + _encode(extra) if extra else ''}]"


def read_cached(item: Sequence[Any]) -> tuple[int, int] | None:
    """What `write_item` was given beside the delta."""
    cached = item[3].get("cached") if len(item) > 3 else None
    return None if cached is None else (cached[0], cached[1])


def read_item(item: Sequence[Any], get_bytes: GetBytes) -> tuple[int, OutputDelta]:
    """The choice and the delta of an item. get_bytes: the bytes a token id stands for."""
    choice, tokens, texts = item[:3]
    extra = item[3] if len(item) > 3 else {}
    delta = OutputDelta(
        index=choice,
        text="".join(texts) + extra.get("rest", ""),
        tokens=tuple(tokens),
        token_bytes=tuple(get_bytes(token) for token in tokens),
        logprobs=_read_logprobs(extra.get("logprobs", ())),
        prompt_logprobs=_read_logprobs(extra.get("prompt_logprobs", ())),
        ending=Finished(extra["ending"]) if "ending" in extra else None,
        token_texts=tuple(texts),
    )
    return choice, delta


def _to_list(one: TokenLogprob) -> list[Any]:
    return [one.token, one.logprob, one.top]


def _read_logprobs(values: Iterable[Sequence[Any]]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token, logprob, tuple((other, value) for other, value in top))
        for token, logprob, top in values
    )
