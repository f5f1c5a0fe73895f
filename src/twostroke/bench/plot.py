"""A picture of one model's results: shares of the limit, and the served loads; readable in grey."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twostroke.bench.lineup import ENGINES, OURS
from twostroke.bench.report import get_measured_peers
from twostroke.bench.results import Measurement, ModelResult

_STYLES = {
    name: {"color": grey, "hatch": hatch}
    for name, grey, hatch in zip(
        ENGINES,
        ("0.15", "0.75", "0.55", "0.9", "0.4", "1.0"),
        ("", "///", "", "...", "\\\\\\", "xx"),
        strict=True,
    )
}
_LATENCIES = (("ttft_s_p50", "TTFT p50"), ("ttft_s_p99", "TTFT p99"))


def draw(result: ModelResult, path: Path) -> None:
    """Write a PNG: one panel for single requests, one for batches, one for served loads."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    batches = [one for one in result.measurements if one.name.startswith("batch")]
    single = [one for one in result.measurements if one not in batches]
    panels: list[Callable[[Any], None]] = [
        lambda axes, group=group: _draw_shares(axes, group)  # type: ignore[misc]
        for group in (single, batches)
        if any(one.samples for one in group)
    ]
    if any(
        result.get_served(name, load, "seconds") for name in ENGINES for load in result.load_floors
    ):
        panels.append(lambda axes: _draw_served(axes, result))
    if not panels:
        return
    figure, rows = pyplot.subplots(
        len(panels), figsize=(13, 3.9 * len(panels)), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result.file)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_shares(axes: Any, measurements: Sequence[Measurement]) -> None:
    engines = [OURS, *get_measured_peers(measurements)]
    for index, engine in enumerate(engines):
        shares, labels = [], []
        for one in measurements:
            has = engine in one.samples
            shares.append(100 * one.get_share(engine) if has else 0.0)
            labels.append(f"{one.get_rate(engine)[0]:,.0f}" if has else "")
        _draw_bars(axes, (index, len(engines)), engine, shares, labels)
    _name_groups(axes, [one.name for one in measurements])
    axes.set_title("Share of this machine's limit; tokens per second above the bars", fontsize=10)
    axes.set_ylabel("share of the limit, %")
    axes.set_ylim(0, 100)


def _draw_served(axes: Any, result: ModelResult) -> None:
    """Output tokens per second of the burst, and first-token times of the arrivals, as ratios."""
    groups = [("burst", "output_tokens_per_s", "burst: output tokens/s")]
    groups += [("poisson", value, f"arrivals: {name}, s") for value, name in _LATENCIES]
    groups += [("poisson", f"itl_ms_{p}", f"arrivals: ITL {p}, ms") for p in ("p50", "p99")]
    engines = [
        name for name in ENGINES if any(result.get_served(name, *group[:2]) for group in groups)
    ]
    most = [
        max((max(result.get_served(name, load, value), default=0.0) for name in engines), default=0)
        for load, value, _ in groups
    ]
    for index, engine in enumerate(engines):
        heights, labels = [], []
        for (load, value, _), top in zip(groups, most, strict=True):
            values = result.get_served(engine, load, value)
            middle = statistics.median(values) if values else 0.0
            heights.append(100 * middle / top if top else 0.0)
            labels.append(f"{middle:,.3g}" if middle < 100 else f"{middle:,.0f}" if values else "")
        _draw_bars(axes, (index, len(engines)), engine, heights, labels)
    _name_groups(axes, [name for _, _, name in groups])
    axes.set_title("Served: the first group is better high, the others low", fontsize=10)
    axes.set_ylabel("of the largest in each group, %")
    axes.set_ylim(0, 115)


def _draw_bars(
    axes: Any, place: tuple[int, int], engine: str, heights: Sequence[float], labels: Sequence[str]
) -> None:
    index, count = place
    width = 0.84 / count
    spots = [group + (index - (count - 1) / 2) * width for group in range(len(heights))]
    bars = axes.bar(
        spots, heights, width, label=engine, edgecolor="black", linewidth=0.6, **_STYLES[engine]
    )
    axes.bar_label(bars, labels, fontsize=7, padding=2, rotation=90 if count > 3 else 0)


def _name_groups(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False, fontsize=8, ncols=3)
