"""A picture of the steps: each one's share of its floor, and plan's prediction beside the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twostroke.bench.gpu.report import StepLine
from twostroke.bench.gpu.workloads import PREFILL


def draw(steps: Sequence[StepLine], path: Path, card: str) -> bool:
    """Write a PNG of the steps that were not exact; False, and nothing written, without any."""
    chosen = [line for line in steps if not line.exact]
    if not chosen:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    height = max(5.0, 0.19 * len(chosen))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, height), width_ratios=(3, 2), layout="constrained"
    )
    _draw_shares(left, chosen)
    _draw_predictions(right, chosen)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Steps on {card}: floors from its own copy bandwidth and BF16 matrix rate")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw_shares(axes: Any, steps: Sequence[StepLine]) -> None:
    places = range(len(steps))
    shades = ["0.3" if line.kind == PREFILL else "0.7" for line in steps]
    bars = axes.barh(places, [100 * line.share for line in steps], color=shades, height=0.75)
    axes.bar_label(bars, [f"{line.seconds * 1e3:.2f} ms" for line in steps], fontsize=6, padding=2)
    axes.set_yticks(places, [f"{line.model} {line.cell}" for line in steps], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("floor over measured time, % (dark: prefill; light: decode)")


def _draw_predictions(axes: Any, steps: Sequence[StepLine]) -> None:
    for is_prefill, marker in ((True, "s"), (False, "o")):
        own = [line for line in steps if (line.kind == PREFILL) == is_prefill]
        for values, shade, name in (
            ([line.predicted_s for line in own], "0.75", "plan"),
            ([line.fitted_s for line in own], "0.1", "plan, fitted"),
        ):
            pairs = [
                (line.seconds * 1e3, value * 1e3)
                for line, value in zip(own, values, strict=True)
                if value is not None
            ]
            if pairs:
                label = f"{name}, {'prefill' if is_prefill else 'decode'}"
                axes.loglog(*zip(*pairs, strict=True), marker, color=shade, label=label, ms=4)
    times = [line.seconds * 1e3 for line in steps]
    ends = [min(times) / 1.5, max(times) * 1.5]
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted, ms")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
