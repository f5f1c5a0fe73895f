"""Tables for people: rates, served loads, bars, memory and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from twostroke.bench.bars import Verdict, judge
from twostroke.bench.lineup import ENGINES, OURS
from twostroke.bench.results import Agreement, Measurement, ModelResult

if TYPE_CHECKING:
    from rich.table import Table

_SERVED = (
    ("output_tokens_per_s", "out tok/s"),
    ("ttft_s_p50", "TTFT p50, s"),
    ("ttft_s_p99", "p99"),
    ("tpot_ms_p50", "TPOT p50, ms"),
    ("tpot_ms_p99", "p99"),
    ("itl_ms_p50", "ITL p50, ms"),
    ("itl_ms_p99", "p99"),
)


def get_measured_peers(measurements: Sequence[Measurement]) -> list[str]:
    """Peers that were measured with some workload, in their usual order."""
    seen = {name for one in measurements for name in one.samples if name != OURS}
    return [name for name in ENGINES if name in seen]


def build_tables(result: ModelResult) -> list[Table]:
    """Every table that has something in it."""
    tables = []
    if result.measurements:
        tables.append(build_rates(result.measurements, get_measured_peers(result.measurements)))
    tables += [build_load(result, load) for load in result.load_floors]
    if result.peak_bytes:
        tables.append(build_memory(result))
    verdicts = judge(result)
    if verdicts:
        tables.append(build_bars(verdicts))
    return tables


def build_rates(measurements: Sequence[Measurement], peers: Sequence[str]) -> Table:
    """Tokens per second: median, range and share of ours; median, share and our ratio of peers."""
    engines = [name for name in (OURS, *peers) if name != OURS or _is_measured(measurements, OURS)]
    table = _make_table("tokens/s: median (range) | share of the limit | our rate over theirs")
    table.add_column("workload")
    for name in engines:
        table.add_column(name, justify="right")
    for one in measurements:
        table.add_row(one.name, *(_format_cell(one, name) for name in engines))
    return table


def _is_measured(measurements: Sequence[Measurement], engine: str) -> bool:
    return any(engine in one.samples for one in measurements)


def _format_cell(one: Measurement, engine: str) -> str:
    if engine not in one.samples:
        return "–"
    median, lowest, highest = one.get_rate(engine)
    cell = f"{median:,.0f} ({lowest:,.0f}–{highest:,.0f}) {one.get_share(engine):.0%}"
    if engine != OURS and OURS in one.samples:
        cell = f"{median:,.0f} {one.get_share(engine):.0%} {one.get_ratio(engine):.2f}×"
    return cell


def build_load(result: ModelResult, load: str) -> Table:
    """A served load: medians over rounds of what its requests saw, and the limit's own figures."""
    table = _make_table(f"served, {load}")
    table.add_column("engine")
    for _, heading in _SERVED:
        table.add_column(heading, justify="right")
    table.add_column("failed", justify="right")
    for engine in ENGINES:
        if result.get_served(engine, load, "requests"):
            values = [result.get_served(engine, load, name) for name, _ in _SERVED]
            failed = sum(result.get_served(engine, load, "failed"))
            table.add_row(engine, *map(_format_median, values), f"{failed:.0f}")
    limit = result.load_floors[load]
    cells = [_format_median([limit[name]] if name in limit else []) for name, _ in _SERVED]
    table.add_row("limit, alone or ideal", *cells, "")
    return table


def _format_median(values: Sequence[float]) -> str:
    if not values:
        return "–"
    median = statistics.median(values)
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def build_memory(result: ModelResult) -> Table:
    """Peak resident memory of each worker beside the model's file."""
    table = _make_table("peak resident memory of the workers")
    table.add_column("engine")
    table.add_column("MiB", justify="right")
    table.add_column("over file and KV pool", justify="right")
    for engine, peak in result.peak_bytes.items():
        share = result.get_memory_share() if engine == OURS else None
        table.add_row(engine, f"{peak / 2**20:,.0f}", f"{share:.2f}×" if share else "")
    return table


def build_bars(verdicts: Sequence[Verdict]) -> Table:
    """Each bar: what was asked, what was measured, and whether that is enough."""
    table = _make_table("bars")
    for heading in ("bar", "wanted", "ours", "best peer", "measured", "limit allows", "result"):
        left = heading in ("bar", "wanted", "result")
        table.add_column(heading, justify="left" if left else "right")
    for one in verdicts:
        bar = one.bar
        sign = "≤" if bar.is_ceiling else "≥"
        wanted = (
            f"{sign} {bar.bound:g}{bar.unit}" if bar.against else f"{sign} {bar.bound:g} {bar.unit}"
        )
        if bar.against:
            wanted += f" {' or '.join(bar.against)}" if len(bar.against) < 3 else " every peer"
        table.add_row(
            bar.what,
            wanted,
            "–"
            if one.ours is None
            else f"{one.ours:,.3g}"
            if one.ours < 100
            else f"{one.ours:,.0f}",
            f"{one.peer} {_format_median([one.theirs])}" if one.theirs is not None else "",
            "–" if one.value is None else f"{one.value:.2f}",
            "" if one.possible is None else f"{one.possible:.2f}",
            one.word,
        )
    return table


def _make_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")


def list_agreement(result: ModelResult) -> list[str]:
    """A line for each peer: how its greedy tokens compare with ours."""
    lines = []
    for name in get_measured_peers(result.measurements):
        pairs = [one.agreed[name] for one in result.measurements if name in one.agreed]
        both = sum(pairs, Agreement(0, 0, 0, 0))
        if both.rows:
            lines.append(
                f"{name}: first greedy token equal to ours in {both.first_equal} of {both.rows} "
                f"rows, {both.leading_equal:,} of {both.tokens:,} leading tokens equal"
            )
    return lines


def list_missing(result: ModelResult) -> list[str]:
    """A line for everything that was not measured, with its reason."""
    lines = [f"{name}: {why}" for name, why in result.refused.items()]
    for one in result.measurements:
        lines += [f"{one.name}, {name}: {why}" for name, why in one.missing.items()]
    return [f"not measured: {' '.join(line.split())}" for line in lines]
