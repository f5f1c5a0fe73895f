"""From measured seconds to a table, a JSON object and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

OURS = "twostroke"


@dataclass(slots=True)
class Measurement:
    """One workload's seconds by engine, round by round, and each round's floor.

    agreed: by peer, how many leading greedy tokens equal ours, of how many.
    """

    name: str
    timed_tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    floors: list[float] = field(default_factory=list)
    agreed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def get_rate(self, engine: str) -> tuple[float, float, float]:
        """Tokens per second: median, lowest, highest."""
        rates = sorted(self.timed_tokens / seconds for seconds in self.seconds[engine])
        return statistics.median(rates), rates[0], rates[-1]

    def get_share(self, engine: str) -> float:
        """Median share of the limit measured in the same round."""
        pairs = zip(self.floors, self.seconds[engine], strict=True)
        return statistics.median(floor / seconds for floor, seconds in pairs)

    def get_ratio(self, peer: str) -> float:
        """Our rate over a peer's: the ratio of medians."""
        return self.get_rate(OURS)[0] / self.get_rate(peer)[0]


def build_table(measurements: Sequence[Measurement], peers: Sequence[str]) -> Table:
    """Tokens per second (median, lowest–highest), share of the limit, ratio to each peer."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("workload")
    table.add_column("twostroke, tok/s", justify="right")
    table.add_column("of the limit", justify="right")
    for peer in peers:
        table.add_column(f"{peer}, tok/s", justify="right")
        table.add_column("ratio", justify="right")
    for one in measurements:
        cells = [one.name, _format_rates(one.get_rate(OURS)), f"{one.get_share(OURS):.0%}"]
        for peer in peers:
            if peer in one.seconds:
                cells += [_format_rates(one.get_rate(peer)), f"{one.get_ratio(peer):.2f}×"]
            else:
                cells += ["–", "–"]
        table.add_row(*cells)
    return table


def _format_rates(rates: tuple[float, float, float]) -> str:
    median, lowest, highest = rates
    return f"{median:,.0f} ({lowest:,.0f}–{highest:,.0f})"


def describe(measurements: Sequence[Measurement], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The same as plain values."""
    rows = []
    for one in measurements:
        row: dict[str, Any] = {"workload": one.name, "timed_tokens": one.timed_tokens}
        for engine in (OURS, *peers):
            if engine not in one.seconds:
                continue
            median, lowest, highest = one.get_rate(engine)
            row[engine] = {
                "tokens_per_s": median,
                "lowest": lowest,
                "highest": highest,
                "share_of_limit": one.get_share(engine),
            }
            if engine != OURS:
                row[engine]["ratio"] = one.get_ratio(engine)
                row[engine]["leading_tokens_equal"] = one.agreed.get(engine)
        rows.append(row)
    return rows


def draw(measurements: Sequence[Measurement], peers: Sequence[str], path: Path) -> None:
    """A bar chart of the shares of the limit, one group a workload, readable in grey."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    engines = [OURS, *peers]
    hatches = ["", "///", "...", "xx"]
    greys = ["0.25", "0.65", "0.8", "0.9"]
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.4 * len(measurements), 4.2))
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        places = [spot + index * width for spot, one in enumerate(measurements)]
        shares = [
            100 * one.get_share(engine) if engine in one.seconds else 0.0 for one in measurements
        ]
        bars = axes.bar(
            places, shares, width, label=engine, color=greys[index], hatch=hatches[index],
            edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        labels = [
            f"{one.get_rate(engine)[0]:,.0f}" if engine in one.seconds else ""
            for one in measurements
        ]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
    middle = width * (len(engines) - 1) / 2
    axes.set_xticks([spot + middle for spot in range(len(measurements))])
    axes.set_xticklabels([one.name for one in measurements])
    axes.set_ylabel("share of this machine's limit, %")
    axes.set_title("Median share of the limit; figures above the bars are tokens per second")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def count_agreeing(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int]:
    """How many leading tokens are equal, of how many."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            break
        equal += 1
    return equal, len(ours)


def summarise(values: Sequence[float]) -> Mapping[str, float]:
    """Median and range of repeated seconds."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
