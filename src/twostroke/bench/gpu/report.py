"""The report in Markdown: bars, then every table behind them, then what is missing and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twostroke.bench.gpu.bars import (
    Verdict,
    get_bandwidth_share,
    get_cell,
    get_fastest_s,
    get_rate_share,
)
from twostroke.bench.gpu.fit import OVERHEADS, Fit, Predictor, find_device, list_points
from twostroke.bench.gpu.results import Row, Run, list_missing, list_rows
from twostroke.bench.gpu.workloads import DECODE, FAKE_MODELS, MODELS, get_cell_work, get_model
from twostroke.spec.work import get_floor_seconds


@dataclass(frozen=True, slots=True)
class StepLine:
    """One measured step beside its floor on the same card and beside plan's prediction.

    predicted_s, fitted_s: by plan's overheads as they are, and by those fitted to half of these
    steps; None where plan does not know the card or nothing was fitted. is_judge: not fitted.
    """

    model: str
    cell: str
    kind: str
    exact: bool
    seconds: float
    floor_s: float
    bound_by: str
    bandwidth_share: float
    rate_share: float
    predicted_s: float | None = None
    fitted_s: float | None = None
    is_judge: bool = False

    @property
    def share(self) -> float:
        """Floor over time."""
        return self.floor_s / self.seconds


def list_steps(runs: Sequence[Run], fitted: Fit | None) -> list[StepLine]:
    """Every measured step of our engine, model by model, prefills first, short ones first."""
    points = {(point.model, point.cell): point for point in list_points(runs)}
    lines = []
    for run, row in sorted(list_rows(runs, "steps"), key=_get_place):
        work = get_cell_work(get_model(row["model"]), get_cell(row))
        floor = get_floor_seconds(work, run.ceilings.make_device())
        device = find_device(run.ceilings.card)
        predicted = ours = None
        point = points.get((row["model"], row["cell"]))
        if device is not None and point is not None:
            predictor = Predictor(device)
            predicted = predictor.predict_ns(point, OVERHEADS[point.weights]) / 1e9
            if fitted is not None and point.weights in fitted.overheads:
                ours = predictor.predict_ns(point, fitted.overheads[point.weights]) / 1e9
        lines.append(
            StepLine(
                row["model"],
                row["cell"],
                row["kind"],
                row["exact"],
                row["seconds"],
                floor.seconds,
                floor.bound_by,
                get_bandwidth_share(run, row),
                get_rate_share(run, row),
                predicted,
                ours,
                fitted is not None and (row["model"], row["cell"]) in fitted.judged,
            )
        )
    return lines


def _get_place(found: tuple[Run, Row]) -> tuple[int, bool, int, int]:
    """Where a step stands in the report."""
    row = found[1]
    models = [model.name for model in (*MODELS, *FAKE_MODELS)]
    return models.index(row["model"]), row["kind"] == DECODE, row["context"], row["batch"]


def write_report(runs: Sequence[Run], verdicts: Sequence[Verdict], fitted: Fit | None) -> str:
    """The whole report as Markdown text."""
    steps = list_steps(runs, fitted)
    parts = [
        "# Measured on a GPU\n",
        "Written by `make bench-gpu`; README.md says how to read it.\n",
        _write_cards(runs),
        _write_bars(verdicts),
        _write_steps([line for line in steps if not line.exact]),
        _write_fit(fitted),
        _write_peers(runs),
        _write_attention(runs),
        _write_exact(steps),
        _write_gaps(runs),
        _write_served(runs),
        _write_missing(runs),
    ]
    return "\n".join(part for part in parts if part)


def write_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first flush right."""
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def format_ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits or more."""
    if seconds is None:
        return "–"
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:,.1f}"


def _write_cards(runs: Sequence[Run]) -> str:
    headings = ("card", "memory, GB", "copy, TB/s", "read, TB/s", "BF16 8192³, TFLOP/s", "commit")
    rows = []
    for run in runs:
        card = run.ceilings
        numbers = (card.memory_bytes / 1e9, card.copy_bandwidth / 1e12, card.read_bandwidth / 1e12)
        cells = [f"{number:.2f}" for number in numbers]
        rate = f"{card.matrix_rate / 1e12:.0f}"
        rows.append((card.card, *cells, rate, str(run.about.get("commit", ""))))
    return "## The cards' own ceilings, by run\n\n" + write_table(headings, rows)


def _write_bars(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (
            one.what,
            ("≤ " if one.is_ceiling else "≥ ") + one.format(one.bound),
            one.format(one.value),
            one.word,
        )
        for one in verdicts
    ]
    return "## Bars\n\n" + write_table(("workload", "bar", "measured", "result"), rows)


def _write_steps(steps: Sequence[StepLine]) -> str:
    if not steps:
        return ""
    headings = (
        "model",
        "step",
        "measured, ms",
        "floor, ms",
        "of the floor",
        "bound by",
        "of bandwidth",
        "of matrix rate",
        "plan, ms",
        "fitted plan, ms",
        "its error",
    )
    rows = []
    for line in steps:
        error = "–"
        if line.fitted_s is not None:
            error = f"{line.fitted_s / line.seconds - 1:+.0%}" + ("" if line.is_judge else " *")
        rows.append(
            (
                line.model,
                line.cell,
                format_ms(line.seconds),
                format_ms(line.floor_s),
                f"{line.share:.1%}",
                line.bound_by,
                f"{line.bandwidth_share:.1%}",
                f"{line.rate_share:.1%}",
                format_ms(line.predicted_s),
                format_ms(line.fitted_s),
                error,
            )
        )
    note = "\nErrors with * are of steps that the overheads were fitted to.\n"
    return "## Steps of our engine\n\n" + write_table(headings, rows) + note


def _write_fit(fitted: Fit | None) -> str:
    if fitted is None:
        return ""
    values = fitted.describe()
    overheads = values["overheads"]
    names = list(next(iter(overheads.values())))
    rows = [(name, *(f"{each[name]:,.3f}" for each in overheads.values())) for name in names]
    told = ", ".join(f"{kind} {error:.1%}" for kind, error in values["median_error"].items())
    table = write_table(("fitted", *overheads), rows)
    return f"## Plan's overheads, fitted\n\n{table}\nMedian error of what was not fitted: {told}.\n"


def _write_peers(runs: Sequence[Run]) -> str:
    table: dict[tuple[str, str], dict[str, tuple[Run, Row]]] = {}
    for run, row in list_rows(runs, "peers"):
        table.setdefault((row["model"], row["cell"]), {})[row["engine"]] = run, row
    if not table:
        return ""
    rows = []
    for (model, cell), engines in table.items():
        run, ours = engines["twostroke"]
        share = (get_bandwidth_share if ours["kind"] == DECODE else get_rate_share)(run, ours)
        cells = [format_ms(ours["seconds"]), f"{share:.1%}"]
        for name in ("pytorch", "transformers"):
            if name in engines:
                theirs = engines[name][1]["seconds"]
                cells += [format_ms(theirs), f"{theirs / ours['seconds']:.2f}×"]
                different = engines[name][1].get("difference")
                cells.append("–" if different is None else f"{different:.1e}")
            else:
                cells += ["–", "–", "–"]
        rows.append((model, cell, *cells))
    headings = (
        "model",
        "step",
        "ours, ms",
        "share",
        "PyTorch, ms",
        "its time over ours",
        "logits apart",
        "Transformers, ms",
        "its time over ours",
        "logits apart",
    )
    return "## Peers on the same card, in turns\n\n" + write_table(headings, rows)


def _write_attention(runs: Sequence[Run]) -> str:
    rows = []
    for run, row in list_rows(runs, "attention"):
        if row["tokens"] > 1:
            share = row["flops"] / row["ours_s"] / run.ceilings.matrix_rate
        else:
            share = row["kv_bytes"] / row["ours_s"] / run.ceilings.copy_bandwidth
        times = [format_ms(row.get(f"{name}_s")) for name in ("sdpa", "flash", "cudnn")]
        ratios = (row["sdpa_s"] / row["ours_s"], get_fastest_s(row) / row["ours_s"])
        rows.append(
            (
                row["name"],
                format_ms(row["ours_s"]),
                f"{share:.1%}",
                *times,
                *(f"{ratio:.2f}×" for ratio in ratios),
                f"{row['error']:.1e}",
            )
        )
    if not rows:
        return ""
    headings = (
        "attention",
        "ours, ms",
        "share",
        "SDPA, ms",
        "its flash, ms",
        "its cuDNN, ms",
        "speed over SDPA",
        "over its fastest",
        "difference",
    )
    title = "## Attention alone (prefill: of the matrix rate; decode: of bandwidth)\n\n"
    return title + write_table(headings, rows)


def _write_exact(steps: Sequence[StepLine]) -> str:
    fast = {(line.model, line.cell): line.seconds for line in steps if not line.exact}
    rows = []
    for line in steps:
        base = fast.get((line.model, line.cell))
        if line.exact and base is not None:
            cost = f"{line.seconds / base:.2f}×"
            rows.append((line.model, line.cell, format_ms(base), format_ms(line.seconds), cost))
    if not rows:
        return ""
    headings = ("model", "step", "fast, ms", "exact, ms", "cost")
    return "## What exactness costs\n\n" + write_table(headings, rows)


def _write_gaps(runs: Sequence[Run]) -> str:
    rows = [
        (
            row["model"],
            row["cell"],
            format_ms(row["device_s"]),
            format_ms(row["wall_s"]),
            format_ms(row["wall_mean_s"]),
            f"{max(0.0, 1 - row['device_s'] / row['wall_s']):.1%}",
        )
        for _, row in list_rows(runs, "gap")
    ]
    if not rows:
        return ""
    headings = ("model", "step", "device, ms", "step to step, ms", "mean, ms", "idle")
    return "## The host's gap between decode steps\n\n" + write_table(headings, rows)


def _write_served(runs: Sequence[Run]) -> str:
    found = [row for _, row in list_rows(runs, "served")]
    if not found:
        return ""
    names = ("ttft_s_p50", "ttft_s_p99", "tpot_s_mean", "tpot_s_p50", "tpot_s_p99", "itl_s_p99")
    rows = []
    for row in found:
        times = [format_ms(row.get(name)) for name in names]
        done = f"{row['finished']} of {row['requests']}"
        rows.append((row["engine"], f"{row['output_tokens_per_s']:,.0f}", *times, done))
    headings = ("engine", "out tok/s", "TTFT p50, ms", "p99", "TPOT mean, ms", "p50", "p99")
    table = write_table((*headings, "ITL p99, ms", "finished"), rows)
    return f"## Served: {found[0]['model']}\n\n{found[0]['trace']}.\n\n{table}"


def _write_missing(runs: Sequence[Run]) -> str:
    lines = [f"- {what}: {why}" for what, why in list_missing(runs).items()]
    return "## Not measured\n\n" + "\n".join(lines) + "\n" if lines else ""
