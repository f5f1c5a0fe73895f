"""Admission: what can never be served is refused at once, with the reason.

Pure functions of a request and the scheduler's sizes. What passes here can be served when it is
alone in the pool. Being busy is never a reason: a request that fits waits. Reasons read
"parameter: message" with the parameter's name in `Request`. How tokens are drawn does not concern
the scheduler: the ranges of `SamplingSpec` are checked where users give them, in the engine.
"""

from __future__ import annotations

from dataclasses import MISSING, fields

from twostroke.core.types import Rejected, Request, SchedulerConfig
from twostroke.errors import InvalidParameter

MAX_CONTINUATIONS = 1024


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


def find_rejection(request: Request, config: SchedulerConfig) -> Rejected | None:
    """Why `request` can never be served under `config`, or None when it can."""
    fault = _find_prompt_fault(request, config) or _find_number_fault(request, config)
    if fault:
        return Rejected(fault)
    pool_tokens = config.num_blocks * config.block_tokens
    limit, known = min(config.context_tokens, pool_tokens) - 1, len(request.prompt)
    if known <= limit:
        return None
    where = "context" if known >= config.context_tokens else "KV pool"
    size = config.context_tokens if where == "context" else pool_tokens
    reason = f"prompt: {known} tokens and one new token exceed the {where} of {size} tokens"
    return Rejected(reason, limit)


def _find_prompt_fault(request: Request, config: SchedulerConfig) -> str:
    """What is wrong with the id or the prompt, whatever its length; an empty string if nothing."""
    prompt = request.prompt
    if type(request.id) is not str or not request.id:
        return "id: must be a string that is not empty"
    if type(prompt) is not tuple or not prompt:
        return "prompt: must be a tuple of at least one token id"
    if set(map(type, prompt)) != {int}:
        return "prompt: token ids must be integers"
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        return f"prompt: token id {wrong} is not in 0 … {config.vocab_size - 1}"
    return ""


def _find_number_fault(request: Request, config: SchedulerConfig) -> str:
    """Which number is no integer or out of range; an empty string if none."""
    top = 0 if request.prompt_logprobs is None else request.prompt_logprobs
    for name, value, least, most in (
        ("max_new_tokens", request.max_new_tokens, 1, None),
        ("min_new_tokens", request.min_new_tokens, 0, request.max_new_tokens),
        # Continuations share blocks, and blocks set aside for one sequence cannot be shared.
        ("n", request.n, 1, 1 if config.reserve_tokens else MAX_CONTINUATIONS),
        ("prompt_logprobs", top, 0, config.vocab_size),
        ("priority", request.priority, None, None),
    ):
        if type(value) is not int:
            return f"{name}: must be an integer, not {type(value).__name__}"
        if least is not None and value < least:
            return f"{name}: must be at least {least}, not {value}"
        if most is not None and value > most:
            return f"{name}: must be at most {most}, not {value}"
    return ""
