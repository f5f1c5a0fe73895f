"""Admission: what can never be served is refused at once, with the reason.

Pure functions of a request and the scheduler's sizes. What passes here can be served when it is
alone in the pool. Being busy is never a reason: a request that fits waits. How tokens are drawn
does not concern the scheduler: the ranges of `SamplingSpec` are checked in the engine.
"""

from __future__ import annotations

from dataclasses import MISSING, fields

from twostroke.core.types import Rejected, Request, SchedulerConfig
from twostroke.errors import InvalidParameter


def check_config(config: SchedulerConfig) -> None:
    """Raise InvalidParameter for a size with which nothing would ever be planned."""
    for size in fields(config):
        least = 1 if size.default is MISSING else 0
        if size.name != "cache_seed" and getattr(config, size.name) < least:
            raise InvalidParameter(size.name, f"must be at least {least}, not {config}")
    if config.reserve_tokens > config.num_blocks * config.block_tokens:
        raise InvalidParameter("reserve_tokens", f"must fit in the pool, unlike {config}")
    if config.reserve_tokens and config.cache_seed:
        raise InvalidParameter("cache_seed", "must be empty where KV is pre-allocated, not shared")


def get_longest_prompt(config: SchedulerConfig) -> int:
    """Tokens of the longest prompt that the context and the whole pool hold with a new token."""
    return min(config.context_tokens, config.num_blocks * config.block_tokens) - 1


def find_rejection(request: Request, config: SchedulerConfig) -> Rejected | None:
    """Why `request` can never be served under `config`, or None when it can."""
    fault = request.find_fault(config.vocab_size)
    if fault:
        return Rejected(fault)
    if config.reserve_tokens and request.n > 1:
        return Rejected("n: must be 1 where KV is pre-allocated, since it cannot be shared")
    limit, known = get_longest_prompt(config), len(request.prompt)
    known += max((len(tokens or ()) for tokens in request.resumed), default=0)
    if known <= limit:
        return None
    where = "context" if known >= config.context_tokens else "KV pool"
    size = config.context_tokens if where == "context" else limit + 1
    reason = f"prompt: {known} tokens and one new token exceed the {where} of {size} tokens"
    return Rejected(reason, limit)
