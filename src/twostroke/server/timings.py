"""`"timings": true`: where the time of one API request went, as an extension of its reply.

Owns the names of the fields. A request of several prompts says the longest time and the sum of the
counts. The engine measured all of it; nothing is timed here.
"""

from __future__ import annotations

from typing import Any

from twostroke.engine.outputs import RequestAccount, RequestTimings
from twostroke.server.generation import Generation
from twostroke.server.schemas import CommonFields


def build_last_fields(common: CommonFields, generation: Generation) -> dict[str, Any]:
    """What the last event of a stream holds beside no choice; empty where nothing was asked for."""
    fields: dict[str, Any] = {}
    if common.include_usage:
        fields["usage"] = generation.get_usage()
    if common.timings:
        fields["timings"] = build_timings(generation)
    return fields


def build_timings(generation: Generation) -> dict[str, Any]:
    """Seconds waited, in prefill and in decode, with the tokens of each; after the end."""
    each = generation.get_timings()
    spans = [_split(timings) for timings in each]
    return {
        "queued_s": max(queued for queued, _, _ in spans),
        "prefill_s": max(prefill for _, prefill, _ in spans),
        "decode_s": max(decode for _, _, decode in spans),
        "prefill_tokens": sum(timings.prefill_tokens for timings in each),
        "decode_tokens": sum(timings.decode_tokens for timings in each),
        "cached_tokens": sum(timings.cached_tokens for timings in each),
        "preemptions": sum(timings.preemptions for timings in each),
        "limit_share": _find_least([timings.account for timings in each]),
    }


def _find_least(accounts: list[RequestAccount | None]) -> float | None:
    """The smallest share of this machine's limit; None where nobody knows it."""
    shares = [account.limit_share for account in accounts if account is not None]
    return min((share for share in shares if share is not None), default=None)


def _split(timings: RequestTimings) -> tuple[float, float, float]:
    """Seconds until first planned, from there to the first token, and from there to the end."""
    planned = timings.first_planned_ns or timings.ended_ns
    first = timings.first_token_ns or timings.ended_ns
    return (
        max(0, planned - timings.submitted_ns) / 1e9,
        max(0, first - planned) / 1e9,
        max(0, timings.ended_ns - first) / 1e9,
    )
