"""The load of `twostroke bench`: what was asked for, made to fit this machine and the time given.

Owns the automatic choices, each with its reason: how far recorded lengths are shortened, how fast
requests come, how many there are. All follow from one prediction, the requests a second that the
simulator says this machine completes when they all come at once; nothing here looks at what is
measured later. What the user asked for is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from twostroke.cli.question_options import LoadOptions
from twostroke.cli.settings import Choice
from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.sources import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_PROMPT_TOKENS,
    Fitted,
    SourceChoice,
    Targets,
    build_source,
)

# Of the predicted most, which full batches reach: busy about two thirds of the time. At half of it
# steps that take a tenth longer make a client wait four tenths longer, and nothing can be compared.
SHARE = 0.35
# So many are wanted, because the p99 of fewer is one unlucky request.
LEAST_REQUESTS = 200
MOST_REQUESTS = 5000
# Lengths are shortened no further than to these shares, tried in turn.
_FACTORS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625, 0.045, 0.03)
_SAMPLED = 200  # requests that the predicted most is found with

# Requests → seconds until the last has ended.
Predict = Callable[[Sequence[Arrival]], float]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the order they come, and the choices made about them."""

    arrivals: tuple[Arrival, ...]
    fitted: Fitted
    choices: tuple[Choice, ...]


def settle_load(load: LoadOptions, targets: Targets, seconds: float, predict: Predict) -> Load:
    """The requests to send. Raises InvalidParameter for a load that cannot be."""
    if load.faults is not None:
        raise InvalidParameter("faults", "only simulated executors fail on purpose; leave it out")
    most = 0.0
    settled = SourceChoice(
        trace=load.trace,
        workload=load.workload,
        rate=load.rate,
        prompt_tokens=load.prompt_tokens,
        new_tokens=load.new_tokens,
        requests=load.requests,
        seed=load.seed,
    )
    chosen: dict[str, str] = {}
    if load.rate is None or load.requests is None:
        settled, most = _fit_lengths(settled, targets, seconds, predict, chosen)
        settled = _fit_rate(settled, targets, seconds, SHARE * most, chosen)
    fitted = Fitted()
    source = build_source(settled)
    arrivals = tuple(islice(source.arrive(targets, fitted), MOST_REQUESTS))
    if not arrivals:
        raise InvalidParameter("requests", "the load has none")
    choices = [Choice(name, value, chosen.get(name, why)) for name, value, why in source.notes]
    if "rate" in chosen:
        # A part of a trace may be slower or faster than the whole, whose mean the source names.
        rate = Choice("rate", f"{SHARE * most:.3g} requests/s", chosen["rate"])
        choices = [rate if each.name == "rate" else each for each in choices]
    return Load(arrivals, fitted, tuple(choices))


def _fit_lengths(
    asked: SourceChoice,
    targets: Targets,
    seconds: float,
    predict: Predict,
    chosen: dict[str, str],
) -> tuple[SourceChoice, float]:
    """Lengths with which enough requests fit the time, and the most requests a second then.

    Lengths that were asked for stay as they are.
    """
    are_free = asked.prompt_tokens is None and asked.new_tokens is None
    choice, most = asked, 0.0
    for factor in _FACTORS if are_free else (1.0,):
        if factor < 1:
            choice = _scale(asked, factor)
        arrivals = _sample(choice, targets, _SAMPLED)
        most = len(arrivals) / predict([replace(one, time_ns=0) for one in arrivals])
        if SHARE * most * seconds >= LEAST_REQUESTS:
            break
    if choice is not asked:
        reason = f"shortened for {LEAST_REQUESTS} requests or more in {seconds:g} s"
        chosen["prompt lengths"] = chosen["new lengths"] = reason
    return choice, most


def _fit_rate(
    choice: SourceChoice, targets: Targets, seconds: float, rate: float, chosen: dict[str, str]
) -> SourceChoice:
    """How fast requests come, and how many, where that was not asked for."""
    for_time = f"what comes in {seconds:g} s"
    for_share = f"{SHARE:.0%} of the {rate / SHARE:.3g} a second predicted when all are there"
    if choice.rate is not None:
        chosen["requests"] = for_time
        return replace(choice, requests=f"{seconds:g}s")
    if choice.workload is not None:
        if choice.requests is None:
            chosen["requests"] = for_time
            choice = replace(choice, requests=f"{seconds:g}s")
        chosen["rate"] = for_share
        return replace(choice, rate=f"{rate:.4g}")
    if choice.requests is None:
        chosen["requests"] = for_time
        choice = replace(choice, requests=str(min(MOST_REQUESTS, max(1, round(rate * seconds)))))
    # A part of a trace is slower or faster than the whole, so its own pace counts.
    times_ns = [one.time_ns for one in build_source(choice).arrive(targets, Fitted())]
    if len(times_ns) > 1 and times_ns[-1] > times_ns[0]:
        own_rate = (len(times_ns) - 1) * 1e9 / (times_ns[-1] - times_ns[0])
        chosen["rate"] = for_share
        choice = replace(choice, rate=f"{rate / own_rate:.4g}x")
    return choice


def _sample(choice: SourceChoice, targets: Targets, count: int) -> list[Arrival]:
    """The first requests of a load, at whatever rate."""
    if choice.workload is not None:
        choice = replace(choice, rate=choice.rate or "1", requests=str(count))
    else:
        choice = replace(choice, requests=str(count))
    return list(build_source(choice).arrive(targets, Fitted()))


def _scale(asked: SourceChoice, factor: float) -> SourceChoice:
    """The load with lengths times a factor."""
    if asked.trace is not None:
        return replace(asked, prompt_tokens=f"{factor:g}x", new_tokens=f"{factor:g}x")
    prompt, new = (
        str(max(1, round(int(text) * factor)))
        for text in (DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS)
    )
    return replace(asked, prompt_tokens=prompt, new_tokens=new)
