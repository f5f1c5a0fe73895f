"""Workloads drawn from distributions: when requests come, from whom, and how long they are.

Owns the arrival processes by name and how a user writes one ("gamma:cv=4,tenants=10"). Everything
is drawn from numpy's PCG64, seeded with the workload's seed and the number of the purpose, so that
changing the lengths leaves the arrivals as they were. Requests are drawn a few thousand at a time,
when they are asked for; nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from twostroke.errors import InvalidParameter
from twostroke.sim.lengths import MAX_CV, Fixed, Lognormal, Uniform
from twostroke.sim.traces import Drawn

if TYPE_CHECKING:
    from numpy.random import Generator

MAX_RATE = 1e6
MAX_TENANTS = 10_000
_MAX_WEIGHT = 1_000_000
_MAX_SECONDS = 1e8
_AT_ONCE = 4096

# Purposes of draws. A purpose keeps its number for good.
_GAPS, _PROMPTS, _ANSWERS, _TENANTS = range(4)


def _draw_constant(generator: Generator, count: int, cv: float) -> list[float]:
    return [1.0] * count


def _draw_exponential(generator: Generator, count: int, cv: float) -> list[float]:
    gaps: list[float] = generator.standard_exponential(count).tolist()
    return gaps


def _draw_gamma(generator: Generator, count: int, cv: float) -> list[float]:
    """Gamma of mean 1: shape 1/cv², scale cv²; above 1 requests come in bursts."""
    shape = cv**-2
    gaps: list[float] = (generator.standard_gamma(shape, count) / shape).tolist()
    return gaps


# Processes by name: each draws gaps of mean 1.
PROCESSES: Mapping[str, Callable[[Generator, int, float], list[float]]] = {
    "poisson": _draw_exponential,
    "gamma": _draw_gamma,
    "constant": _draw_constant,
}
_MEANINGS = 'poisson, gamma (bursty: "gamma:cv=4") or constant'
_GAMMA_CV = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that come at random.

    process: one of PROCESSES. cv: coefficient of variation of the gaps between arrivals, for gamma.
    tenants: weights, one for each tenant. shared: the share of each prompt that its tenant's
    prompts have in common.
    """

    process: str
    cv: float = 1.0
    tenants: tuple[int, ...] = (1,)
    shared: float = 0.0

    def describe(self) -> str:
        """In words."""
        words = [self.process]
        if self.process == "gamma":
            words.append(f"gaps vary by {self.cv:g} of their mean")
        if len(self.tenants) > 1:
            even = len(set(self.tenants)) == 1
            weights = "alike" if even else "as " + ":".join(map(str, self.tenants))
            words.append(f"{len(self.tenants):,} tenants {weights}")
        if self.shared:
            words.append(f"{self.shared:.0%} of a prompt is its tenant's")
        return ", ".join(words)


class PairSource(Protocol):
    """Draws lengths of prompts and of answers, which may belong together.

    least_prompt_tokens: no prompt is shorter.
    """

    @property
    def least_prompt_tokens(self) -> int: ...

    def draw(self, prompts: Generator, answers: Generator, count: int) -> list[tuple[int, int]]: ...


@dataclass(frozen=True, slots=True)
class IndependentPairs:
    """Prompts and answers of one distribution each."""

    prompt: Fixed | Uniform | Lognormal
    new: Fixed | Uniform | Lognormal

    @property
    def least_prompt_tokens(self) -> int:
        """No prompt is shorter."""
        return self.prompt.least

    def draw(self, prompts: Generator, answers: Generator, count: int) -> list[tuple[int, int]]:
        """`count` pairs (prompt tokens, new tokens)."""
        drawn = zip(self.prompt.draw(prompts, count), self.new.draw(answers, count), strict=True)
        return list(drawn)


@dataclass(frozen=True, slots=True)
class RecordedPairs:
    """Pairs drawn from a trace's, each as likely, with replacement."""

    pairs: tuple[tuple[int, int], ...]

    @property
    def least_prompt_tokens(self) -> int:
        """No prompt is shorter."""
        return min(prompt for prompt, _ in self.pairs)

    def draw(self, prompts: Generator, answers: Generator, count: int) -> list[tuple[int, int]]:
        """`count` pairs (prompt tokens, new tokens)."""
        return [self.pairs[index] for index in prompts.integers(0, len(self.pairs), count).tolist()]


def parse_workload(text: str) -> Workload:
    """A workload as a user writes it: NAME, or NAME:KEY=VALUE,KEY=VALUE.

    Keys: cv (of gamma), tenants (how many, or weights such as 10:1), prefix (a share from 0 to 1).
    Raises InvalidParameter.
    """
    name, _, rest = text.partition(":")
    if name not in PROCESSES:
        raise InvalidParameter("workload", f"must be {_MEANINGS}, not {name!r}")
    fields: dict[str, float | tuple[int, ...]] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if key not in _READERS or not equals:
            raise InvalidParameter(
                "workload", f"{part!r} must be one of cv=, tenants= and prefix= with a value"
            )
        if key in fields:
            raise InvalidParameter("workload", f"{key} is given twice")
        fields[key] = _READERS[key](value)
    cv = fields.get("cv", _GAMMA_CV if name == "gamma" else 1.0)
    if "cv" in fields and name != "gamma":
        raise InvalidParameter("workload", f"cv belongs to gamma, not to {name}")
    tenants, shared = fields.get("tenants", (1,)), fields.get("prefix", 0.0)
    assert isinstance(cv, float)
    assert isinstance(tenants, tuple)
    assert isinstance(shared, float)
    return Workload(process=name, cv=cv, tenants=tenants, shared=shared)


def check_rate(rate: float, requests: int | None) -> None:
    """Raise InvalidParameter for a rate that is no positive number, or would take years."""
    if not (math.isfinite(rate) and 0 < rate <= MAX_RATE):
        raise InvalidParameter(
            "rate", f"must be above 0 and at most {MAX_RATE:,.0f} requests a second, not {rate:g}"
        )
    if (requests or 1) / rate > _MAX_SECONDS:
        least = (requests or 1) / _MAX_SECONDS
        raise InvalidParameter(
            "rate",
            f"{rate:g} a second would take over {_MAX_SECONDS / 86_400:,.0f} days; "
            f"the least is {least:.3g}",
        )


def draw_requests(
    workload: Workload, lengths: PairSource, rate: float, requests: int | None, seed: int
) -> Iterator[Drawn]:
    """Requests of a workload at `rate` a second, without end when `requests` is None.

    Prompts of one tenant begin with the same tokens, those of others with different ones.
    Raises InvalidParameter for a rate that cannot be.
    """
    check_rate(rate, requests)
    draw_gaps = PROCESSES[workload.process]
    gaps, prompts, answers, tenants = (_make_generator(seed, purpose) for purpose in range(4))
    mean_gap_ns = 1e9 / rate
    at_ns, left = 0, math.inf if requests is None else requests
    while left > 0:
        count = int(min(left, _AT_ONCE))
        left -= count
        # Always as many at once, so that the first thousand do not depend on how many follow.
        drawn = zip(
            draw_gaps(gaps, _AT_ONCE, workload.cv),
            lengths.draw(prompts, answers, _AT_ONCE),
            _draw_tenants(tenants, workload.tenants),
            strict=True,
        )
        for _, (gap, (prompt, new), tenant) in zip(range(count), drawn, strict=False):
            at_ns += round(gap * mean_gap_ns)
            name = f"t{tenant}" if len(workload.tenants) > 1 else ""
            if shared := round(workload.shared * prompt):
                yield Drawn(at_ns, prompt, new, (tenant,), shared, name)
            else:
                yield Drawn(at_ns, prompt, new, (), 0, name)


def _make_generator(seed: int, purpose: int) -> Generator:
    from numpy.random import PCG64, Generator, SeedSequence

    return Generator(PCG64(SeedSequence([seed, purpose])))


def _draw_tenants(generator: Generator, weights: tuple[int, ...]) -> list[int]:
    if len(weights) == 1:
        return [0] * _AT_ONCE
    from itertools import accumulate

    import numpy as np

    ends = list(accumulate(weights))
    places = generator.integers(0, ends[-1], _AT_ONCE)
    tenants: list[int] = np.searchsorted(ends, places, side="right").tolist()
    return tenants


def _read_cv(text: str) -> float:
    return _read_number("cv", text, 0.01, MAX_CV)


def _read_share(text: str) -> float:
    return _read_number("prefix", text, 0.0, 1.0)


def _read_number(key: str, text: str, least: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise InvalidParameter(
            "workload", f"{key} must be a number from {least:g} to {most:g}, not {text!r}"
        )
    return number


def _read_tenants(text: str) -> tuple[int, ...]:
    words = text.split(":")
    if all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        weights = [int(word) for word in words]
        if len(weights) > 1 and all(1 <= each <= _MAX_WEIGHT for each in weights):
            return tuple(weights)
        if len(weights) == 1 and 1 <= weights[0] <= MAX_TENANTS:
            return (1,) * weights[0]
    raise InvalidParameter(
        "workload",
        f"tenants must be a number from 1 to {MAX_TENANTS:,}, or weights such as 10:1, "
        f"not {text!r}",
    )


_READERS: Mapping[str, Callable[[str], float | tuple[int, ...]]] = {
    "cv": _read_cv,
    "tenants": _read_tenants,
    "prefix": _read_share,
}
