"""`twostroke ablate`: what each technique buys on this machine, as a table and a picture.

The measuring is bench/ablation.py's; here it is asked for, shown and drawn. A technique that
promised the same tokens and gave others ends the command with an error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostroke.bench.ablation import Ablation, Ablations
from twostroke.cli.insight_options import AblateOptions
from twostroke.cli.machine import read_machine
from twostroke.errors import EngineError, InvalidParameter
from twostroke.lab.unit import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_TABLE_WIDTH = 110


def run_ablate(options: AblateOptions) -> None:
    """Measure, print, draw. Raises TwostrokeError."""
    threads = options.threads or read_machine().cores
    ablations = Ablations(options.model, threads)
    names = choose_techniques(options.only, tuple(ablations.known))
    pictures = [Path(path) for path in options.output or ()]
    for path in pictures:
        check_picture(path)
    begin = time.monotonic()
    done: list[Ablation] = []
    with ablations.open() as bench:
        for name in names:
            print(f"{name} …", file=sys.stderr, flush=True)
            done.append(ablations.known[name](bench))
    seconds = time.monotonic() - begin
    if options.json:
        print(json.dumps(describe(options.model, threads, seconds, done)))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(build_table(f"{options.model}, {threads} threads, {seconds:.0f} s", done))
    for path in pictures:
        draw(done, f"{options.model}, {threads} threads", path)
    broken = [one.technique for one in done if one.promised and one.same_tokens < 1]
    if broken:
        raise EngineError(f"other tokens than promised with: {', '.join(broken)}")


def choose_techniques(wanted: str | None, known: tuple[str, ...]) -> list[str]:
    """The techniques of a comma-separated list, in their known order; all where none is given.

    Raises InvalidParameter naming what is unknown.
    """
    if wanted is None:
        return list(known)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InvalidParameter("only", f"there is no {name!r}; known are {', '.join(known)}")
    return [name for name in known if name in names]


def build_table(title: str, ablations: Sequence[Ablation]) -> Table:
    """A line for each number; gains above 1 are for the technique."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("technique", "instead of", "number"):
        table.add_column(heading)
    for heading in ("without", "with", "gain", "same tokens"):
        table.add_column(heading, justify="right")
    for ablation in ablations:
        for at, number in enumerate(ablation.numbers):
            names = (ablation.technique, ablation.instead_of) if at == 0 else ("", "")
            unit = f" {number.unit}" if number.unit else ""
            same = f"{ablation.same_tokens:.0%}" if at == 0 else ""
            table.add_row(
                *names,
                number.name,
                f"{number.without:,.4g}{unit}",
                f"{number.with_it:,.4g}{unit}",
                f"{number.gain:.2f}x",
                same,
            )
    return table


def _format(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe(
    model: str, threads: int, seconds: float, ablations: Sequence[Ablation]
) -> dict[str, Any]:
    """The ablations as plain values, for JSON."""
    return {
        "schema": 1,
        "model": model,
        "threads": threads,
        "seconds": seconds,
        "ablations": [
            {
                "technique": one.technique,
                "instead_of": one.instead_of,
                "same_tokens": one.same_tokens,
                "promised": one.promised,
                "numbers": [
                    {
                        "name": number.name,
                        "unit": number.unit,
                        "without": number.without,
                        "with": number.with_it,
                        "gain": number.gain,
                    }
                    for number in one.numbers
                ],
            }
            for one in ablations
        ],
    }


def draw(ablations: Sequence[Ablation], title: str, path: Path) -> None:
    """Write a picture of all gains, .png or .svg, on a scale of ratios; readable in grey.

    Raises InvalidParameter where it cannot be.
    """
    height = 1.4 + 0.36 * sum(len(ablation.numbers) for ablation in ablations)
    save_figure(partial(_fill, ablations, title), path, (10, height))


def _fill(ablations: Sequence[Ablation], title: str, figure: Figure) -> None:
    labels, gains, texts = [], [], []
    for ablation in ablations:
        for number in ablation.numbers:
            unit = f" {number.unit}" if number.unit else ""
            labels.append(f"{ablation.technique}: {number.name}")
            gains.append(number.gain)
            values = f"{_format(number.without)} → {_format(number.with_it)}{unit}"
            texts.append(f"{_format(number.gain)}x  ({values})")
    spots = list(range(len(labels)))[::-1]
    axes = figure.subplots()
    colours = ["0.35" if gain >= 1 else "0.8" for gain in gains]
    axes.barh(spots, [gain - 1 for gain in gains], left=1, color=colours, edgecolor="black")
    for spot, gain, text in zip(spots, gains, texts, strict=True):
        axes.text(max(gain, 1) * 1.03, spot, text, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(0.5, 0.8 * min(gains, default=1)), 12 * max([2, *gains]))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(spots, labels, fontsize=8)
    axes.set_xlabel("times better with the technique (light bars: worse)")
    axes.set_title(title, fontsize=10)
