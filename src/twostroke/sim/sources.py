"""From what a user names to arrivals: a trace, a workload, or a workload with a trace's lengths.

Owns how those options go together, the defaults among them with their reasons, and the fitting of
lengths to the model's context. A trace is read whole before anything is simulated, so that a bad
line is an error at once; what is changed about its requests is counted and said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.lengths import AS_RECORDED, Lengths, Scaled, parse_lengths
from twostroke.sim.replay import Replay, replay_trace
from twostroke.sim.traces import Drawn, TraceSummary, read_trace, summarise_trace
from twostroke.sim.workloads import (
    IndependentPairs,
    PairSource,
    RecordedPairs,
    Workload,
    check_rate,
    draw_requests,
    parse_workload,
)

DEFAULT_REQUESTS = 1000
DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS = "512", "128"
MAX_REQUESTS = 100_000_000
_AMOUNT = re.compile(r"([0-9.eE+-]{1,24})(s|x|)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """What a user asked for, as it was written; None leaves the choice to us.

    rate: requests a second, or "2x" for a trace twice as fast. prompt_tokens, new_tokens: see
    `lengths.parse_lengths`. requests: "1000", "600s" for those of the first 600 seconds, "3x" for
    a trace three times over.
    """

    trace: str | None = None
    workload: str | None = None
    rate: str | None = None
    prompt_tokens: str | None = None
    new_tokens: str | None = None
    requests: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What every request is asked to keep, and the longest it may be; 0 ns is no target."""

    context_tokens: int
    ttft_ns: int = 0
    itl_ns: int = 0


@dataclass(slots=True)
class Fitted:
    """How many requests came out so far, and how many were cut to the context."""

    requests: int = 0
    clipped: int = 0
    clipped_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from. notes: (name, value, reason) of every choice made about it.

    seconds: about how long they take to arrive; expected: about how many there are.
    least_prompt_tokens: no prompt is shorter. has_prefixes: whether some begin alike.
    """

    notes: tuple[tuple[str, str, str], ...]
    draw: Callable[[], Iterator[Drawn]]
    expected: int
    seconds: float
    least_prompt_tokens: int
    has_prefixes: bool

    def arrive(self, targets: Targets, fitted: Fitted) -> Iterator[Arrival]:
        """The arrivals, cut to the context where they exceed it; `fitted` counts along.

        The prompt is cut first, down to half the context, then the answer.
        """
        context = targets.context_tokens
        for at_ns, prompt, new, prefix, prefix_tokens, tenant in self.draw():
            fitted.requests += 1
            if prompt + new > context:
                whole = prompt + new
                new = min(new, max(context // 2, context - prompt))
                prompt = min(prompt, context - new)
                fitted.clipped += 1
                fitted.clipped_tokens += whole - prompt - new
            yield Arrival(
                time_ns=at_ns,
                prompt_tokens=prompt,
                new_tokens=new,
                prefix=prefix,
                prefix_tokens=prefix_tokens,
                tenant=tenant,
                ttft_ns=targets.ttft_ns,
                itl_ns=targets.itl_ns,
            )


@dataclass(frozen=True, slots=True)
class _Amount:
    """A parsed `requests`: at most one of the three is set."""

    requests: int | None = None
    seconds: float | None = None
    passes: int | None = None


def build_source(choice: SourceChoice) -> Source:
    """The requests that `choice` asks for; a trace is read whole. Raises InvalidParameter."""
    amount = _parse_amount(choice.requests)
    workload = None if choice.workload is None else parse_workload(choice.workload)
    if choice.trace is None and workload is None:
        raise InvalidParameter(
            "workload", "give a --trace FILE, or --workload poisson, gamma or constant"
        )
    summary = None if choice.trace is None else summarise_trace(Path(choice.trace))
    if workload is None:
        assert choice.trace is not None
        assert summary is not None
        return _build_replay(choice, Path(choice.trace), summary, amount)
    return _build_workload(choice, workload, summary, amount)


def _build_replay(
    choice: SourceChoice, path: Path, summary: TraceSummary, amount: _Amount
) -> Source:
    speed, rate_reason = _find_speed(choice.rate, summary)
    prompt, new = (_get_scaled(*each) for each in _list_lengths(choice))
    passes = amount.passes or 1
    how = Replay(
        prompt=prompt,
        new=new,
        speed=speed,
        requests=amount.requests,
        seconds=amount.seconds,
        passes=passes,
    )
    seconds = passes * summary.duration_ns / 1e9 / speed
    whole = expected = passes * summary.requests
    if amount.requests is not None:
        expected = min(whole, amount.requests)
    elif amount.seconds is not None and seconds > amount.seconds:
        expected = math.ceil(whole * amount.seconds / seconds)
    reason = "the whole trace" if choice.requests is None else "as asked"
    count = f"{expected:,} of {summary.requests:,}" if expected < whole else f"{expected:,}"
    if amount.seconds is not None:
        count = f"those of the first {amount.seconds:g} s"
    notes = (
        ("trace", path.name, "as asked"),
        ("requests", count, reason),
        ("rate", f"{summary.rate * speed:.3g} requests/s", rate_reason),
        *_note_lengths(prompt, new, "the trace's"),
    )
    return Source(
        notes=notes,
        draw=lambda: replay_trace(path, summary, how),
        expected=expected,
        seconds=seconds * expected / whole,
        least_prompt_tokens=prompt.scale(summary.least_prompt_tokens),
        has_prefixes=summary.most_prefix_id >= 0,
    )


def _build_workload(
    choice: SourceChoice, workload: Workload, summary: TraceSummary | None, amount: _Amount
) -> Source:
    if amount.passes is not None:
        raise InvalidParameter("requests", "a factor such as 3x repeats a trace, not a workload")
    rate, rate_reason = _find_rate(choice.rate, summary)
    requests, reason = amount.requests, "as asked"
    if requests is None and amount.seconds is None:
        requests, reason = DEFAULT_REQUESTS, "default"
    pairs, length_notes = _find_pairs(choice, summary)
    check_rate(rate, requests)
    if amount.seconds is not None and rate * amount.seconds > MAX_REQUESTS:
        raise InvalidParameter("requests", f"{rate:g} a second are over {MAX_REQUESTS:,} by then")

    def draw() -> Iterator[Drawn]:
        drawn = draw_requests(workload, pairs, rate, requests, choice.seed)
        if amount.seconds is None:
            return drawn
        end_ns = round(amount.seconds * 1e9)
        return takewhile(lambda one: one.at_ns < end_ns, drawn)

    count = f"{requests:,}" if requests else f"those of the first {amount.seconds:g} s"
    notes = (
        ("workload", workload.describe(), f"as asked, seed {choice.seed}"),
        ("requests", count, reason),
        ("rate", f"{rate:.4g} requests/s", rate_reason),
        *length_notes,
    )
    expected = requests or math.ceil(rate * (amount.seconds or 0.0))
    return Source(
        notes=notes,
        draw=draw,
        expected=expected,
        seconds=expected / rate,
        least_prompt_tokens=pairs.least_prompt_tokens,
        has_prefixes=workload.shared > 0,
    )


def _find_pairs(
    choice: SourceChoice, summary: TraceSummary | None
) -> tuple[PairSource, tuple[tuple[str, str, str], ...]]:
    """Lengths of a workload: drawn from the trace when there is one."""
    if summary is not None:
        assert choice.trace is not None
        path = Path(choice.trace)
        prompt, new = (_get_scaled(*each) for each in _list_lengths(choice))
        pairs = tuple(
            (prompt.scale(one.prompt_tokens), new.scale(one.new_tokens)) for one in read_trace(path)
        )
        return RecordedPairs(pairs), _note_lengths(prompt, new, f"drawn from {path.name}")
    found: list[Lengths] = []
    notes = []
    defaults = (DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS)
    for (name, text), default in zip(_list_lengths(choice), defaults, strict=True):
        lengths = parse_lengths(name, text or default)
        found.append(lengths)
        reason = "default" if text is None else "as asked"
        notes.append((name.replace("_tokens", " lengths"), lengths.describe(), reason))
    prompt_lengths, new_lengths = found
    if isinstance(prompt_lengths, Scaled) or isinstance(new_lengths, Scaled):
        name = "prompt_tokens" if isinstance(prompt_lengths, Scaled) else "new_tokens"
        raise InvalidParameter(name, "a factor needs recorded lengths: give a --trace too")
    return IndependentPairs(prompt_lengths, new_lengths), tuple(notes)


def _list_lengths(choice: SourceChoice) -> tuple[tuple[str, str | None], ...]:
    return ("prompt_tokens", choice.prompt_tokens), ("new_tokens", choice.new_tokens)


def _get_scaled(name: str, text: str | None) -> Scaled:
    """The factor of recorded lengths. Raises InvalidParameter for anything but a factor."""
    lengths = AS_RECORDED if text is None else parse_lengths(name, text)
    if not isinstance(lengths, Scaled):
        raise InvalidParameter(
            name, f"a trace has lengths of its own; give a factor such as 0.5x, not {text!r}"
        )
    return lengths


def _note_lengths(prompt: Scaled, new: Scaled, whose: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (name, lengths.describe(), whose if lengths is AS_RECORDED else "as asked")
        for name, lengths in (("prompt lengths", prompt), ("new lengths", new))
    )


def _find_speed(text: str | None, summary: TraceSummary) -> tuple[float, str]:
    """How much faster than recorded a trace is played, and why."""
    if text is None:
        return 1.0, "as recorded"
    rate, unit = _parse_number("rate", text)
    if not summary.rate:
        raise InvalidParameter("rate", "all requests of the trace come at once: it has none")
    speed = rate if unit == "x" else rate / summary.rate
    check_rate(summary.rate * speed, None)
    return speed, f"as asked, {speed:.3g} times as fast as recorded"


def _find_rate(text: str | None, summary: TraceSummary | None) -> tuple[float, str]:
    """Requests a second of a workload, and why."""
    if text is None:
        if summary is None or not summary.rate:
            raise InvalidParameter("rate", "give requests a second, such as --rate 2")
        return summary.rate, "the trace's mean"
    rate, unit = _parse_number("rate", text)
    if unit == "x":
        if summary is None:
            raise InvalidParameter("rate", f"{text} speeds up a trace; give requests a second")
        return rate * summary.rate, f"as asked, {rate:g} times the trace's mean"
    return rate, "as asked"


def _parse_amount(text: str | None) -> _Amount:
    if text is None:
        return _Amount()
    number, unit = _parse_number("requests", text)
    if number > MAX_REQUESTS:
        raise InvalidParameter("requests", f"must be at most {MAX_REQUESTS:,}, not {text}")
    if unit == "s":
        return _Amount(seconds=number)
    if number != int(number):
        raise InvalidParameter("requests", f"must be a whole number, not {text!r}")
    return _Amount(passes=int(number)) if unit == "x" else _Amount(requests=int(number))


def _parse_number(parameter: str, text: str) -> tuple[float, str]:
    """A positive number and its unit: "s", "x" or none."""
    match = _AMOUNT.fullmatch(text)
    ways = {"rate": 'requests a second such as 2.5, or "2x"', "requests": '1000, "600s" or "3x"'}
    number, unit = math.nan, ""
    if match is not None and not (parameter == "rate" and match[2] == "s"):
        unit = match[2]
        try:
            number = float(match[1])
        except ValueError:
            number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InvalidParameter(parameter, f"must be above 0: {ways[parameter]}; not {text!r}")
    return number, unit
