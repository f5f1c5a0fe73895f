"""Load for a server, and how it felt to those who sent it.

Two mixes, the same for every engine: a burst of requests at once, and requests that arrive one by
one as a Poisson process. Prompts have 128 to 512 tokens, answers 64 to 128, all drawn from one
seed. A request is a streamed OpenAI completion; its times are those of the client.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twostroke.bench.workloads import SEED, add_floors, cut_prompts, make_prompt
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import RowShape, StepShape

PROMPT_TOKENS = 128, 512
NEW_TOKENS = 64, 128
_POISSON_ROW = 100_000  # no prompt of one load begins as one of the other: a server may remember


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: due `at` seconds after the start."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an arrival. times: of each event that brought text, seconds from the start."""

    times: tuple[float, ...]
    tokens: int


def make_burst(spec: ModelSpec, count: int) -> list[Arrival]:
    """`count` requests at once."""
    return _make_arrivals(spec, [0.0] * count)


def make_poisson(spec: ModelSpec, rate: float, duration_s: float) -> list[Arrival]:
    """Requests at `rate` a second on average for `duration_s`; the first comes at once."""
    draw = random.Random(SEED)
    times = [0.0]
    while (following := times[-1] + draw.expovariate(rate)) < duration_s:
        times.append(following)
    return _make_arrivals(spec, times, _POISSON_ROW)


def _make_arrivals(spec: ModelSpec, times: Sequence[float], first_row: int = 0) -> list[Arrival]:
    draw = random.Random(SEED)
    return [
        Arrival(
            time,
            tuple(make_prompt(spec, draw.randint(*PROMPT_TOKENS), row)),
            draw.randint(*NEW_TOKENS),
        )
        for row, time in enumerate(times, first_row)
    ]


def summarise_answers(
    arrivals: Sequence[Arrival], answers: Sequence[Answer]
) -> dict[str, float | int]:
    """Rates over the whole load, and percentiles over requests (ITL: over gaps).

    ttft: from being due to the first text; tpot: mean time of a token after the first; itl: between
    two events. Milliseconds but for ttft. A request that wrote fewer tokens than it should counts
    as failed, and its times do not count.
    """
    done = [
        (arrival, answer)
        for arrival, answer in zip(arrivals, answers, strict=True)
        if answer.tokens == arrival.new_tokens and answer.times
    ]
    summary: dict[str, float | int] = {
        "requests": len(arrivals),
        "failed": len(arrivals) - len(done),
    }
    if not done:
        return summary
    end = max(answer.times[-1] for _, answer in done)
    tokens = sum(answer.tokens for _, answer in done)
    summary |= {"seconds": end, "output_tokens": tokens, "output_tokens_per_s": tokens / end}
    firsts = [answer.times[0] - arrival.at for arrival, answer in done]
    means = [
        (answer.times[-1] - answer.times[0]) / (answer.tokens - 1)
        for _, answer in done
        if answer.tokens > 1
    ]
    gaps = np.concatenate([np.diff(answer.times) for _, answer in done])
    for name, values, unit in (
        ("ttft_s", firsts, 1),
        ("tpot_ms", means, 1e3),
        ("itl_ms", gaps, 1e3),
    ):
        if len(values):
            p50, p99 = np.percentile(np.asarray(values) * unit, [50, 99])
            summary |= {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
    return summary


def get_load_floor(
    spec: ModelSpec, arrivals: Sequence[Arrival], device: DeviceSpec
) -> Mapping[str, float]:
    """The least a load can take, from spec/work.py, were all of it there at once.

    output_tokens_per_s: prompts read in full steps, then every answer written with all that remain
    in each step. ttft_s_p50, tpot_ms_p50 and itl_ms_p50: of a request of median size, alone.
    """
    reading = add_floors(spec, cut_prompts([len(one.prompt) for one in arrivals]), device)
    longest = max(one.new_tokens for one in arrivals)
    writing = add_floors(
        spec,
        (
            StepShape(
                tuple(
                    RowShape(1, len(one.prompt) + step, 1)
                    for one in arrivals
                    if one.new_tokens > step + 1
                )
            )
            for step in range(longest - 1)
        ),
        device,
    )
    prompt = int(np.median([len(one.prompt) for one in arrivals]))
    alone = StepShape((RowShape(1, prompt, 1),))
    token_ms = 1e3 * add_floors(spec, iter([alone]), device)
    return {
        "output_tokens_per_s": sum(one.new_tokens for one in arrivals) / (reading + writing),
        "ttft_s_p50": add_floors(spec, cut_prompts([prompt]), device),
        "tpot_ms_p50": token_ms,
        "itl_ms_p50": token_ms,
    }
