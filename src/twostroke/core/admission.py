"""Admission: what can never be served is refused at once, with the reason.

Pure functions of a request and the scheduler's sizes. What passes here can be served when it is
alone in the pool, and holds no value an executor could choke on, so no later stage has to check
again. Reasons read "parameter: message" with the parameter's name in `Request` or `SamplingSpec`.
Being busy is never a reason: a request that fits waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from twostroke.core.types import Rejected, Request, SchedulerConfig

MAX_CONTINUATIONS = 1024
_MAX_COUNT = 2**63 - 1
_MAX_SEED = 2**64 - 1
_MAX_TOP_K = 2**31 - 1
_MAX_FLOAT = 1e30  # executors compute in float32, and this leaves it room
_MIN_POSITIVE = 1e-30

Bound = tuple[str, object, type, float, float]  # parameter, value, type, least and most allowed


def find_rejection(request: Request, config: SchedulerConfig) -> Rejected | None:
    """Why `request` can never be served under `config`, or None when it can."""
    complaint = _find_fault(request, config)
    if complaint:
        return Rejected(complaint)
    pool_tokens = config.num_blocks * config.block_tokens
    limit, known = min(config.context_tokens, pool_tokens) - 1, len(request.prompt)
    if known <= limit:
        return None
    where = "context" if known >= config.context_tokens else "KV pool"
    size = config.context_tokens if where == "context" else pool_tokens
    complaint = f"prompt: {known} tokens and one new token exceed the {where} of {size} tokens"
    return Rejected(complaint, limit)


def _find_fault(request: Request, config: SchedulerConfig) -> str:
    """What is wrong whatever the prompt's length, or an empty string."""
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
    for name, value, kind, least, most in _list_bounds(request, config):
        if type(value) is not kind and (kind is int or type(value) is not int):
            return f"{name}: must be of type {kind.__name__}, not {type(value).__name__}"
        assert isinstance(value, int | float)
        if not least <= value <= most:  # refuses NaN and the infinities, too
            return f"{name}: {value} is not in {least} … {most}"
    biased = [token for token, _ in request.sampling.logit_bias]
    if any(later <= earlier for earlier, later in pairwise(biased)):
        return "logit_bias: tokens must ascend without repeats"
    return ""


def _list_bounds(request: Request, config: SchedulerConfig) -> Iterator[Bound]:
    sampling, vocab = request.sampling, config.vocab_size
    yield "max_new_tokens", request.max_new_tokens, int, 1, _MAX_COUNT
    yield "min_new_tokens", request.min_new_tokens, int, 0, request.max_new_tokens
    yield "n", request.n, int, 1, MAX_CONTINUATIONS
    yield "priority", request.priority, int, -_MAX_COUNT, _MAX_COUNT
    if request.prompt_logprobs is not None:
        yield "prompt_logprobs", request.prompt_logprobs, int, 0, vocab
    if sampling.logprobs is not None:
        yield "logprobs", sampling.logprobs, int, 0, vocab
    yield "temperature", sampling.temperature, float, 0.0, _MAX_FLOAT
    yield "top_k", sampling.top_k, int, 0, _MAX_TOP_K
    yield "top_p", sampling.top_p, float, _MIN_POSITIVE, 1.0
    yield "min_p", sampling.min_p, float, 0.0, 1.0
    yield "repetition_penalty", sampling.repetition_penalty, float, _MIN_POSITIVE, _MAX_FLOAT
    yield "presence_penalty", sampling.presence_penalty, float, -_MAX_FLOAT, _MAX_FLOAT
    yield "frequency_penalty", sampling.frequency_penalty, float, -_MAX_FLOAT, _MAX_FLOAT
    yield "seed", sampling.seed, int, 0, _MAX_SEED
    for token, addend in sampling.logit_bias:
        yield "logit_bias", token, int, 0, vocab - 1
        yield "logit_bias", addend, float, -_MAX_FLOAT, _MAX_FLOAT
