"""One picture of a simulation: how long requests took, what was good of it, and how it went.

Owns the layout and the styles, which differ by dash and width and not by colour alone, so that the
picture can be read in grey. Draws what the records say and computes no result of its own but sums
over replicas. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.sim.records import Records
from twostroke.sim.results import FINISHED, get_times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 300
_POINTS = 2000
_BLACK, _GREY, _LIGHT = "0.0", "0.45", "0.82"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_INK = ("0.0", "0.25", "0.45", "0.6")
_RATIOS = (0.5, 1.0, 2.0)
_LAYOUT = """
AB
CC
DD
EE
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """What a figure says beside the records. num_blocks: of each replica's KV pool."""

    title: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """The cluster over time, in at most _BINS equal bins: means over each bin, and the fullest
    replica's share of KV blocks. seconds: the bins' middles. Rows and tokens are those of the steps
    that ran: prefill and decode tokens are of one step of one replica, in the mean."""

    seconds: NDArray[np.float64]
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]
    kv_mean: NDArray[np.float64]
    kv_most: NDArray[np.float64]
    prefill_tokens: NDArray[np.float64]
    decode_tokens: NDArray[np.float64]


def check_plot() -> None:
    """Raise InvalidParameter, with the command that helps, when matplotlib is missing."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidParameter("output", "a picture needs matplotlib: pip install matplotlib")


def draw(records: Records, picture: Picture, path: Path) -> None:
    """Write a PNG or SVG, as the ending of `path` says. Raises OSError, and InvalidParameter
    without matplotlib."""
    check_plot()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same records give the same bytes: no date, no drawn names.
    is_svg = path.suffix.lower() == ".svg"
    metadata = {"Date": None} if is_svg else {"Software": None}
    with rc_context({"font.size": 9, "svg.hashsalt": "twostroke", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(11, 12.5), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, records, picture)
        figure.savefig(path, dpi=130, metadata=metadata)


def build_timeline(records: Records, num_blocks: int) -> Timeline:
    """The samples of all replicas as bins over time."""
    samples = records.samples.get_columns()
    replicas, period_ns = len(records.totals), records.samples.period_ns
    instants = max(1, -(-(records.end_ns + 1) // period_ns))
    width = -(-instants // _BINS)
    count = -(-instants // width)
    bins = np.minimum(samples["time_ns"] // (period_ns * width), count - 1)
    # The last bin may hold fewer instants than the others.
    sizes = np.full(count, width, dtype=float)
    sizes[-1] = instants - width * (count - 1)

    def add_up(name: str) -> NDArray[np.float64]:
        return np.bincount(bins, weights=samples[name], minlength=count).astype(np.float64)

    steps = np.maximum(np.bincount(bins, minlength=count), 1)
    most = np.zeros(count)
    np.maximum.at(most, bins, samples["kv_blocks"] / num_blocks)
    prefill = add_up("prefill_tokens")
    return Timeline(
        seconds=(np.arange(count) * width + sizes / 2) * period_ns / 1e9,
        running=add_up("running") / sizes,
        waiting=add_up("waiting") / sizes,
        kv_mean=add_up("kv_blocks") / (sizes * replicas * num_blocks),
        kv_most=most,
        prefill_tokens=prefill / steps,
        decode_tokens=(add_up("step_tokens") - prefill) / steps,
    )


def _fill(figure: Figure, records: Records, picture: Picture) -> None:
    panels = figure.subplot_mosaic(_LAYOUT, height_ratios=(1.35, 1, 1, 1))
    timeline = build_timeline(records, picture.num_blocks)
    _draw_latencies(panels["A"], records)
    _draw_goodput(panels["B"], records)
    _draw_kv(panels["C"], timeline)
    _draw_rows(panels["D"], timeline)
    _draw_tokens(panels["E"], timeline)
    for name in "CDE":
        panels[name].set_xlim(0, max(records.end_ns / 1e9, 1e-9))
        panels[name].set_ylim(bottom=0)
        panels[name].set_xlabel("simulated time, s")
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(picture.title, x=0.01, horizontalalignment="left", fontsize=11)


def _draw_latencies(axes: Axes, records: Records) -> None:
    """Cumulative shares: of requests for TTFT and TPOT, of gaps for ITL."""
    times = get_times(records.get_columns())
    curves = [
        (f"TTFT, p99 {{}} ({_count(times['ttft_s']):,} requests)", times["ttft_s"]),
        (f"TPOT, p99 {{}} ({_count(times['tpot_s']):,} requests)", times["tpot_s"]),
    ]
    drawn = 0
    for (label, seconds), dash, ink in zip(curves, _DASHES, _INK, strict=False):
        known = np.sort(seconds[~np.isnan(seconds)])
        if not len(known):
            continue
        shares = np.arange(1, len(known) + 1) / len(known)
        drawn += 1
        _draw_curve(axes, (known, shares), (label, dash, ink))
    counts = records.gaps.get_counts()
    if counts:
        gaps = np.array([gap for gap, _ in counts]) / 1e9
        weights = np.cumsum([weight for _, weight in counts])
        label = f"ITL, p99 {{}} ({weights[-1]:,} gaps)"
        drawn += 1
        _draw_curve(axes, (gaps, weights / weights[-1]), (label, _DASHES[2], _INK[2]))
    axes.set_title("How long it took")
    axes.set_xlabel("time, s (logarithmic)")
    axes.set_ylabel("share at most that long, %")
    axes.set_ylim(0, 101)
    if drawn:
        _scale_time(axes)
    else:
        _say_empty(axes, "no request had a token")


def _draw_curve(
    axes: Axes, curve: tuple[NDArray[np.float64], NDArray[np.float64]], style: tuple[str, Any, str]
) -> None:
    """A cumulative share in at most _POINTS points; the label tells the 99th percentile."""
    (seconds, shares), (label, dash, ink) = curve, style
    p99 = seconds[np.searchsorted(shares, 0.99)]
    places = np.unique(np.linspace(0, len(seconds) - 1, _POINTS).astype(int))
    # From 0 % at the shortest, so that equal values rise in one line.
    x = np.concatenate((seconds[:1], seconds[places]))
    y = np.concatenate(([0.0], 100 * shares[places]))
    axes.plot(np.maximum(x, 1e-9), y, linestyle=dash, color=ink, linewidth=1.6,
              drawstyle="steps-post", label=label.format(_format_time(p99)))  # fmt: skip


def _draw_goodput(axes: Axes, records: Records) -> None:
    """Share of requests within a TTFT target, against that target, for some TPOT targets."""
    columns = records.get_columns()
    times = get_times(columns)
    axes.set_title("Goodput: what finished within both targets")
    axes.set_xlabel("TTFT target, s (logarithmic)")
    axes.set_ylabel("share of all requests, %")
    axes.set_ylim(0, 101)
    finished = columns["fate"] == FINISHED
    if not finished.any():
        _say_empty(axes, "no request finished")
        return
    ttft_target, tpot_target = (
        int(columns[name].max()) / 1e9 for name in ("ttft_target_ns", "itl_target_ns")
    )
    tpot = np.nan_to_num(times["tpot_s"])
    middle = tpot_target or _round_up(float(np.percentile(tpot[finished], 90)))
    limits = [np.inf, *(middle * ratio for ratio in reversed(_RATIOS))]
    for limit, dash, ink in zip(limits, _DASHES, _INK, strict=True):
        is_asked = bool(tpot_target) and limit == tpot_target
        good = np.sort(times["ttft_s"][finished & (tpot <= limit)])
        label = "any TPOT" if limit == np.inf else f"TPOT ≤ {_format_time(limit)}"
        if is_asked:
            label += " (the target)"
        places = np.unique(np.linspace(0, max(len(good) - 1, 0), _POINTS).astype(int))
        shares = 100 * np.arange(1, len(good) + 1) / len(columns["fate"])
        width = 2.4 if is_asked else 1.4
        axes.plot(good[places] if len(good) else [], shares[places] if len(good) else [],
                  linestyle=dash, color=ink, linewidth=width, label=label)  # fmt: skip
    if ttft_target:
        axes.axvline(
            ttft_target,
            color="0.3",
            linewidth=0.9,
            label=f"TTFT target, {_format_time(ttft_target)}",
        )
    _scale_time(axes)


def _draw_kv(axes: Axes, timeline: Timeline) -> None:
    axes.fill_between(timeline.seconds, 100 * timeline.kv_most, color=_LIGHT, linewidth=0,
                      label="fullest replica, most in the interval")  # fmt: skip
    axes.plot(timeline.seconds, 100 * timeline.kv_mean, color=_BLACK, linewidth=1.3,
              label="all replicas, mean")  # fmt: skip
    axes.set_title("KV pool")
    axes.set_ylabel("blocks held, %")
    _place_legend(axes)


def _draw_rows(axes: Axes, timeline: Timeline) -> None:
    axes.plot(timeline.seconds, timeline.running, color=_BLACK, linewidth=1.3, label="running")
    axes.plot(timeline.seconds, timeline.waiting, color=_GREY, linewidth=1.3, linestyle=_DASHES[1],
              label="waiting")  # fmt: skip
    axes.set_title("Sequences, over all replicas")
    axes.set_ylabel("sequences")
    _place_legend(axes)


def _draw_tokens(axes: Axes, timeline: Timeline) -> None:
    axes.stackplot(timeline.seconds, timeline.decode_tokens, timeline.prefill_tokens,
                   colors=(_GREY, _LIGHT), labels=("decode", "prefill"))  # fmt: skip
    axes.set_title("One step of one replica, in the mean")
    axes.set_ylabel("tokens a step")
    _place_legend(axes)


def _scale_time(axes: Axes) -> None:
    """A logarithmic time axis with plain numbers, and the legend where it hides least."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Within few decades, 2 and 5 are named too.
    subs = (1.0, 2.0, 5.0) if high / low < 10**3.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="1.0")


def _place_legend(axes: Axes) -> None:
    """Above the panel, where no line runs."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=3, fontsize=8)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, horizontalalignment="center", color=_GREY)


def _count(seconds: NDArray[np.float64]) -> int:
    return int((~np.isnan(seconds)).sum())


def _format_time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms"


def _round_up(seconds: float) -> float:
    """The next of 1, 2, 5, 10, 20 … ms."""
    value = 1e-3
    while value < seconds:
        value *= 2.5 if round(value / 10 ** np.floor(np.log10(value) + 1e-9)) == 2 else 2
    return value
