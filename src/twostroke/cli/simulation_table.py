"""Results of a simulation for people, as tables, and for programs, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from twostroke.cli.settings import Choice
from twostroke.sim.results import Spread, Summary
from twostroke.sim.sources import Fitted

if TYPE_CHECKING:
    from rich.table import Table

_MOST_TENANTS = 20
_TABLE_WIDTH = 100


def print_choices(choices: Sequence[Choice]) -> None:
    """One line for each setting: name, value, reason."""
    names = max(len(choice.name) for choice in choices)
    values = min(max(len(choice.value) for choice in choices), 44)
    for choice in choices:
        print(f"  {choice.name:<{names}}  {choice.value:<{values}}  {choice.reason}")


def print_summary(summary: Summary, fitted: Fitted) -> None:
    """Times as one table, everything else as lines of name and value."""
    from rich.console import Console

    console = Console(highlight=False, width=_TABLE_WIDTH)
    console.print()
    console.print(build_times(summary))
    lines = list(list_lines(summary, fitted))
    names = max(len(name) for name, _ in lines)
    for name, value in lines:
        console.print(f"  {name:<{names}}  {value}", soft_wrap=True)
    if summary.tenants:
        console.print()
        console.print(build_tenants(summary))
    console.print(
        f"simulated {summary.seconds:,.1f} s in {summary.real_seconds:,.2f} s: "
        f"{summary.speed:,.0f} simulated seconds in a second",
        soft_wrap=True,
    )


def build_times(summary: Summary) -> Table:
    """What requests waited for, as percentiles."""
    table = _start_table("", "p50", "p90", "p99", "of")
    for name, spread, whose in (
        ("TTFT", summary.ttft, "requests"),
        ("TPOT", summary.tpot, "requests"),
        ("ITL", summary.itl, "gaps"),
        ("end to end", summary.end_to_end, "requests"),
        ("queued", summary.queued, "requests"),
    ):
        table.add_row(name, *_format_spread(spread), f"{spread.count:,} {whose}")
    return table


def build_tenants(summary: Summary) -> Table:
    """The tenants beside each other, the first _MOST_TENANTS of them."""
    table = _start_table("tenant", "requests", "finished", "new tokens", "TTFT p50", "TTFT p99")
    for one in summary.tenants[:_MOST_TENANTS]:
        p50, _, p99 = _format_spread(one.ttft)
        counts = (f"{count:,}" for count in (one.requests, one.finished, one.new_tokens))
        table.add_row(one.tenant, *counts, p50, p99)
    if len(summary.tenants) > _MOST_TENANTS:
        table.caption = f"and {len(summary.tenants) - _MOST_TENANTS:,} more"
    return table


def list_lines(summary: Summary, fitted: Fitted) -> Iterator[tuple[str, str]]:
    """(name, value) of all results but times."""
    fates = ", ".join(f"{count:,} {fate}" for fate, count in summary.fates.items() if count)
    yield "requests", f"{summary.requests:,}: {fates or 'none'}"
    if fitted.clipped:
        yield (
            "cut to context",
            f"{fitted.clipped:,} of {fitted.requests:,} requests, "
            f"{fitted.clipped_tokens:,} tokens in all",
        )
    rates, use, good = summary.rates, summary.use, summary.goodput
    yield (
        "throughput",
        f"{rates.requests_per_s:.3g} requests/s, {rates.prompt_tokens_per_s:,.0f} prompt and "
        f"{rates.new_tokens_per_s:,.0f} new tokens/s",
    )
    if good.ttft_target_s or good.itl_target_s:
        targets = [
            f"{name} ≤ {_format_time(target)}"
            for name, target in (("TTFT", good.ttft_target_s), ("TPOT", good.itl_target_s))
            if target
        ]
        yield (
            "goodput",
            f"{good.share:.1%} of requests with {' and '.join(targets)}: "
            f"{good.requests_per_s:.3g} requests/s, {good.tokens_per_s:,.0f} new tokens/s",
        )
        if good.itl_target_s:
            yield (
                "",
                f"{_share(good.smooth, summary.requests)} with every gap within the target too",
            )
    yield "KV pool", f"{use.kv_mean:.1%} held while working, at most {use.kv_most:.1%}"
    yield "preemptions", f"{summary.preemptions:,}, {use.swapped_blocks:,} blocks swapped"
    yield (
        "prefix cache",
        f"{summary.cached_tokens:,} of {summary.prompt_tokens:,} prompt tokens "
        f"({_share(summary.cached_tokens, summary.prompt_tokens)})",
    )
    yield (
        "replicas",
        f"{use.replicas:,}, busy {use.busy_mean:.1%} of the time "
        f"({use.busy_least:.1%} to {use.busy_most:.1%}), {use.lost_executors:,} executors lost",
    )
    yield (
        "steps",
        f"{use.steps:,} of {use.rows_per_step:.1f} rows and {use.tokens_per_step:.1f} tokens, "
        f"{use.prefill_share:.0%} of them prefill",
    )


def describe_simulation(
    summary: Summary, fitted: Fitted, choices: Sequence[Choice]
) -> dict[str, object]:
    """Everything as plain values, for JSON."""
    return {
        "settings": {choice.name: choice.value for choice in choices},
        **dataclasses.asdict(summary),
        "clipped": dataclasses.asdict(fitted),
        "simulated_s_per_s": summary.speed,
    }


def _start_table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _format_spread(spread: Spread) -> tuple[str, str, str]:
    if not spread.count:
        return ("–", "–", "–")
    return (_format_time(spread.p50_s), _format_time(spread.p90_s), _format_time(spread.p99_s))


def _format_time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
