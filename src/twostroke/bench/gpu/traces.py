"""Requests of the served trace, and what their lives add up to.

Lengths come from a trace file that the user names, or from a lognormal with the mean and
coefficient of variation of Azure's conversation trace of 2023 (Patel et al. 2024, CC-BY 4.0), which
is not kept in this repository. Arrivals are a Poisson process, prompts are random tokens: no two
share a prefix.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twostroke.bench.gpu.workloads import SEED
from twostroke.sim.lengths import Lognormal
from twostroke.sim.traces import read_trace

# Of the trace's 19,366 requests.
CONVERSATION_PROMPT = Lognormal(1155.0, 0.96)
CONVERSATION_ANSWER = Lognormal(211.0, 0.77)


@dataclass(frozen=True, slots=True)
class TraceShape:
    """How many requests, how often they come, and where their lengths are cut."""

    requests: int = 192
    rate: float = 32.0
    most_prompt: int = 4096
    most_new: int = 512
    vocab_size: int = 32_000


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it is due, its prompt's token ids, and how many tokens it wants."""

    at_s: float
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(slots=True)
class Lifetime:
    """When a request was due and when each of its tokens came, in seconds since the start."""

    at_s: float
    wanted: int
    token_times_s: list[float] = field(default_factory=list)


def make_requests(shape: TraceShape, trace: Path | None) -> list[TraceRequest]:
    """The same requests every time. Raises InvalidParameter for a trace that cannot be read."""
    draw = random.Random(SEED)
    at_s, requests = 0.0, []
    for prompt, new in _find_lengths(shape.requests, trace):
        ids = tuple(draw.randrange(shape.vocab_size) for _ in range(min(prompt, shape.most_prompt)))
        requests.append(TraceRequest(at_s, ids, min(new, shape.most_new)))
        at_s += draw.expovariate(shape.rate)
    return requests


def describe_trace(shape: TraceShape, trace: Path | None, requests: Sequence[TraceRequest]) -> str:
    """The requests in words."""
    whence = "lognormal lengths like Azure's conversations of 2023"
    if trace is not None:
        whence = f"the first lengths of {trace.name}"
    prompt = statistics.mean(len(one.prompt) for one in requests)
    new = statistics.mean(one.new_tokens for one in requests)
    return (
        f"{len(requests)} requests, {whence}, cut at {shape.most_prompt} and {shape.most_new} "
        f"tokens: {prompt:.0f} in and {new:.0f} out in the mean; Poisson, {shape.rate:g} a second"
    )


def summarise_lives(lives: Sequence[Lifetime]) -> dict[str, float | int]:
    """Throughput and latencies: tokens over the time from the first arrival to the last token.

    TPOT is a request's mean time between its tokens; percentiles are over requests. Requests that
    were cut off count with the tokens they got.
    """
    begun = [life for life in lives if life.token_times_s]
    tokens = sum(len(life.token_times_s) for life in begun)
    seconds = max((life.token_times_s[-1] for life in begun), default=0.0)
    ttfts = [life.token_times_s[0] - life.at_s for life in begun]
    tpots = [
        (life.token_times_s[-1] - life.token_times_s[0]) / (len(life.token_times_s) - 1)
        for life in begun
        if len(life.token_times_s) > 1
    ]
    gaps = [
        later - earlier
        for life in begun
        for earlier, later in itertools.pairwise(life.token_times_s)
    ]
    return {
        "requests": len(lives),
        "finished": sum(len(life.token_times_s) >= life.wanted for life in lives),
        "output_tokens": tokens,
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds if seconds else 0.0,
        **_name_percentiles("ttft_s", ttfts),
        **_name_percentiles("tpot_s", tpots),
        **_name_percentiles("itl_s", gaps),
    }


def _find_lengths(count: int, trace: Path | None) -> list[tuple[int, int]]:
    if trace is not None:
        first = itertools.islice(read_trace(trace), count)
        return [(one.prompt_tokens, one.new_tokens) for one in first]
    generator = np.random.default_rng(SEED)
    prompts = CONVERSATION_PROMPT.draw(generator, count)
    return list(zip(prompts, CONVERSATION_ANSWER.draw(generator, count), strict=True))


def _name_percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    points = {f"{name}_p{percent}": float(np.percentile(values, percent)) for percent in (50, 99)}
    return {f"{name}_mean": statistics.mean(values), **points}
