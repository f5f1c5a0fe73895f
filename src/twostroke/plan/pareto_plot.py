"""Plans as a picture: cost against time between tokens, and which of them no other beats in both.

Shapes tell one pool from two and fillings the front from the rest, so that it can be read in grey.
Draws and computes nothing. matplotlib is imported to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twostroke.plan.capacity import Demand
from twostroke.plan.search import Candidate, find_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {1: ("o", "one pool"), 2: ("^", "prefill and decode pools")}
_MOST_NAMED = 8


def draw_front(
    candidates: Sequence[Candidate], demand: Demand, shown: Sequence[Candidate], path: Path
) -> None:
    """Write a PNG or SVG, as the ending of `path` says. Raises OSError."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_svg = path.suffix.lower() == ".svg"
    metadata = {"Date": None} if is_svg else {"Software": None}
    with rc_context({"font.size": 9, "svg.hashsalt": "twostroke", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure.subplots(), candidates, demand, shown)
        figure.savefig(path, dpi=130, metadata=metadata)


def _fill(
    axes: Axes, candidates: Sequence[Candidate], demand: Demand, shown: Sequence[Candidate]
) -> None:
    from matplotlib.ticker import FuncFormatter

    has_price = all(each.hourly_cost for each in candidates)
    costs = [each.get_token_cost(demand) if has_price else each.devices for each in candidates]
    points = [(1e3 * each.tpot_s, cost) for each, cost in zip(candidates, costs, strict=True)]
    front = find_front(points)
    for pools, (mark, label) in _MARKS.items():
        chosen = [point for point, each in zip(points, candidates, strict=True)
                  if len(each.pools) == pools]  # fmt: skip
        if chosen:
            x, y = zip(*chosen, strict=True)
            axes.plot(x, y, mark, color="0.55", markerfacecolor="1.0", markersize=5, label=label)
    axes.plot(
        [points[at][0] for at in front], [points[at][1] for at in front],
        color="0.0", linewidth=1.2, drawstyle="steps-post", label="no other is better in both",
    )  # fmt: skip
    for place, at in enumerate(front):
        candidate = candidates[at]
        axes.plot(*points[at], _MARKS[len(candidate.pools)][0], color="0.0", markersize=6)
        if place % max(1, -(-len(front) // _MOST_NAMED)) == 0:
            is_right = points[at][0] > (min(points)[0] + max(points)[0]) / 2
            axes.annotate(
                _name(candidate), points[at], textcoords="offset points",
                xytext=(-8, -12) if is_right else (6, 5), fontsize=7,
                horizontalalignment="right" if is_right else "left",
            )  # fmt: skip
    best = shown[0]
    cost = best.get_token_cost(demand) if has_price else best.devices
    axes.plot([1e3 * best.tpot_s], [cost], "o", color="0.0", markersize=13, markerfacecolor="none",
              label="the plan that is named best")  # fmt: skip
    if demand.tpot_s:
        axes.axvline(1e3 * demand.tpot_s, color="0.4", linestyle=(0, (5, 2)), linewidth=0.9,
                     label=f"target, {1e3 * demand.tpot_s:g} ms")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("mean time between tokens, ms")
    what = "dollars for a million new tokens" if has_price else "devices"
    axes.set_ylabel(f"{what} (logarithmic)")
    axes.set_title(
        f"Plans for {demand.rate:.4g} requests/s of {demand.prompt_tokens:,} + "
        f"{demand.new_tokens:,} tokens that keep the targets"
    )
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6, which="both")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5)


def _name(candidate: Candidate) -> str:
    option = candidate.pools[-1].option
    return f"{candidate.devices} × {option.device}, {option.weights}/{option.kv}, tp {option.tp}"
