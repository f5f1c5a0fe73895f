"""Unit: an idea, an experiment that shows it, a picture, and exercises.

Owns the shape that all units have, and how a picture reaches a file or a notebook. An experiment
returns what it found; it prints nothing and writes nothing by itself.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twostroke.errors import InvalidParameter
from twostroke.lab.question import Question

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("o", "s", "^", "D", "v")
INKS = ("0.0", "0.35", "0.6", "0.75", "0.85")
PICTURES = (".png", ".svg")
_FEW_LABELS = 1000  # of a logarithmic axis: below this ratio powers of ten are too few


@dataclass(frozen=True, slots=True)
class Setup:
    """What experiments on the real engine run on: a pulled model, and threads that compute."""

    model: str = "smollm2-135m"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment found. lines: in words; numbers: by name; draw: writes a picture."""

    lines: Sequence[str]
    numbers: Mapping[str, float]
    draw: Callable[[Path], None]

    def _repr_png_(self) -> bytes:
        """The picture, for a notebook that shows this value."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "unit.png"
            self.draw(path)
            return path.read_bytes()


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit. runs_on: "numbers", "simulator" or "engine"; questions: each draws one afresh."""

    number: int
    title: str
    idea: str
    runs_on: str
    run: Callable[[Setup], Findings]
    questions: tuple[Callable[[random.Random], Question], ...]

    def ask(self, seed: int) -> Question:
        """An exercise drawn from `seed`."""
        rng = random.Random(seed)
        return rng.choice(self.questions)(rng)


def check_picture(path: Path) -> None:
    """Raise InvalidParameter for a file name that is no picture's."""
    if path.suffix.lower() not in PICTURES:
        raise InvalidParameter("output", f"must end in .png or .svg, not {path.name!r}")


def save_figure(
    fill: Callable[[Figure], None], path: Path, size: tuple[float, float] = (8, 4.6)
) -> None:
    """Write a PNG or SVG of what `fill` draws. Raises InvalidParameter where it cannot be."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_picture(path)
    with rc_context({"font.size": 9, "svg.hashsalt": "twostroke", "axes.titlelocation": "left",
                     "axes.spines.top": False, "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        try:
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise InvalidParameter("output", f"{path} cannot be written: {error}") from None


@dataclass(frozen=True, slots=True)
class Curves:
    """A picture of curves over one axis: name to (x, y). scales: of x and y; ticks: of x, where the
    powers of ten are too few."""

    title: str
    axes: tuple[str, str]
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    scales: tuple[str, str] = ("log", "log")
    ticks: Sequence[float] = ()

    def draw(self, path: Path) -> None:
        """Write it; marks tell the curves apart where colours cannot."""
        save_figure(self._fill, path)

    def _fill(self, figure: Figure) -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.subplots()
        axes.set_xscale(self.scales[0])
        axes.set_yscale(self.scales[1])
        for at, (name, (x, y)) in enumerate(self.lines.items()):
            ink, mark = INKS[at % len(INKS)], MARKS[at % len(MARKS)]
            every = max(1, len(x) // 20)
            axes.plot(x, y, label=name, color=ink, marker=mark, markersize=5, linewidth=1.3,
                      markevery=every)  # fmt: skip
        axes.set_xlabel(self.axes[0])
        axes.set_ylabel(self.axes[1])
        axes.set_title(self.title)
        axes.grid(color="0.92", linewidth=0.6)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(lambda value, _: f"{value:,g}")
                axis.set_minor_formatter(lambda value, _: "")
        low, high = axes.get_ylim()
        if self.scales[1] == "log" and high < _FEW_LABELS * low:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}")
        if self.ticks:
            axes.set_xticks(self.ticks)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
