"""The roofline as a picture: roofs over intensity, and where a model's steps lie under them.

Owns the layout. Shapes and fillings tell the strokes apart, not colours, so that the picture can be
read in grey. Computes nothing but operations over seconds. matplotlib is imported to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostroke.plan.roofline import Point
from twostroke.spec.device import DeviceSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)))
_MARKS = ("s", "^", "D", "v")
_INK = ("0.25", "0.5", "0.65", "0.8")


@dataclass(frozen=True, slots=True)
class RooflinePicture:
    """What is drawn. device: as `get_working_device` has it; roofs: the arithmetic of each roof."""

    title: str
    device: DeviceSpec
    roofs: Sequence[str]
    points: Sequence[Point]


def draw_roofline(picture: RooflinePicture, path: Path) -> None:
    """Write a PNG or SVG, as the ending of `path` says. Raises OSError."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same points give the same bytes: no date, no drawn names.
    is_svg = path.suffix.lower() == ".svg"
    metadata = {"Date": None} if is_svg else {"Software": None}
    with rc_context({"font.size": 9, "svg.hashsalt": "twostroke", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9.5, 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure.subplots(), picture)
        figure.savefig(path, dpi=130, metadata=metadata)


def _fill(axes: Axes, picture: RooflinePicture) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    points, device = picture.points, picture.device
    ridges = [device.get_ridge(kind) for kind in picture.roofs]
    left = min(0.5, *(point.intensity for point in points)) / 1.5
    right = max(*ridges, *(point.intensity for point in points)) * 3
    for kind, dash, ridge in zip(picture.roofs, _DASHES, ridges, strict=False):
        peak = device.get_rate(kind)
        label = f"{kind}: {_format_rate(peak)}, ridge at {ridge:,.0f} FLOP/byte"
        axes.plot([ridge, right], [peak, peak], color="0.0", linestyle=dash, linewidth=1.6,
                  label=label)  # fmt: skip
        axes.axvline(ridge, color="0.75", linewidth=0.8, linestyle=":")
    top = max(ridges)
    axes.plot([left, top], [left * device.memory_bandwidth, top * device.memory_bandwidth],
              color="0.0", linewidth=1.6,
              label=f"memory: {device.memory_bandwidth / 1e9:,.0f} GB/s")  # fmt: skip
    _draw_points(axes, [each for each in points if each.stroke == "prefill"], ("o", "0.0"))
    contexts = sorted({each.context for each in points if each.stroke == "decode"})
    for context, mark, ink in zip(contexts, _MARKS, _INK, strict=False):
        chosen = [each for each in points if each.stroke == "decode" and each.context == context]
        _draw_points(axes, chosen, (mark, ink))
    axes.set_xlim(left, right)
    axes.set_xlabel("intensity, FLOP per byte of memory traffic (logarithmic)")
    axes.set_ylabel("FLOP/s (logarithmic)")
    axes.set_title(picture.title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8, framealpha=0.95, edgecolor="1.0")


def _draw_points(axes: Axes, points: Sequence[Point], style: tuple[str, str]) -> None:
    """Hollow where the floor allows a step, filled where it is predicted to be."""
    if not points:
        return
    mark, ink = style
    x = [point.intensity for point in points]
    least = [point.flops / point.floor_s for point in points]
    told = [point.flops / point.predicted_s for point in points]
    what = "prefill, by prompt tokens"
    if points[0].stroke == "decode":
        what = f"decode at context {points[0].context:,}, by rows"
    axes.vlines(x, told, least, color="0.6", linewidth=0.7)
    axes.plot(x, least, mark, color=ink, markerfacecolor="1.0", markersize=5.5, zorder=3)
    axes.plot(x, told, mark, color=ink, markersize=5.5, zorder=3,
              label=f"{what}: predicted (hollow: at its floor)")  # fmt: skip
    for at, (point, height) in enumerate(zip(points, told, strict=True)):
        if at in (0, len(points) - 1) or at % 2 == 0:
            count = point.new_tokens if point.stroke == "prefill" else point.rows
            axes.annotate(f"{count:,}", (point.intensity, height), textcoords="offset points",
                          xytext=(5, -9), fontsize=7, color="0.25")  # fmt: skip


def _format_rate(rate: float) -> str:
    if rate >= 1e12:
        return f"{rate / 1e12:,.4g} TFLOP/s"
    return f"{rate / 1e9:,.4g} GFLOP/s"
