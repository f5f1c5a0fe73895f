"""What `twostroke bench` found, for people as a table and for programs as plain values.

Owns the errors: predicted over measured, less one. A percentile of nothing has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke.cli.bench_steps import StepPace
from twostroke.cli.settings import Choice
from twostroke.engine.parts import OVERHEAD
from twostroke.plan.step_time import Pace
from twostroke.sim.recorded import Replayed
from twostroke.sim.results import Summary
from twostroke.sim.sources import Fitted

if TYPE_CHECKING:
    from rich.table import Table

_TABLE_WIDTH = 100
_PERCENTILES = ("p50", "p90", "p99")
_TIMES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("end to end", "end_to_end"))
_MUCH = 0.05


@dataclass(frozen=True, slots=True)
class Compared:
    """One load: replayed, measured and predicted.

    probed: the machine's pace before the run and after it; predicted is for the mean. paces: the
    measured steps against their calibrated times. at_pace: predicted for a machine of the pace that
    the measured run has told; only explains errors.
    late_ns: how late each request was sent, rising. part_seconds: of the engine's thread.
    others_share: of the cores, what others took during the measured run; spare_share: what the
    engine left them.
    """

    replayed: Replayed
    measured: Summary
    predicted: Summary
    at_pace: Summary
    paces: Sequence[StepPace]
    probed: tuple[Pace, Pace]
    late_ns: Sequence[int]
    part_seconds: Mapping[str, float]
    others_share: float | None
    spare_share: float


def print_bench(compared: Compared, fitted: Fitted) -> None:
    """The table, then lines."""
    from rich.console import Console

    console = Console(highlight=False, width=_TABLE_WIDTH)
    console.print()
    console.print(build_table(compared))
    for line in list_lines(compared, fitted):
        console.print(line, soft_wrap=True)


def build_table(compared: Compared) -> Table:
    """Predicted beside measured, with the error."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("", "predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    for name, field in _TIMES:
        for percentile in _PERCENTILES:
            predicted, measured = (
                getattr(getattr(each, field), f"{percentile}_s")
                for each in (compared.predicted, compared.measured)
            )
            shown = (f"{predicted * 1e3:,.2f} ms", f"{measured * 1e3:,.2f} ms")
            first = name if percentile == _PERCENTILES[0] else ""
            table.add_row(first, percentile, *shown, _format_error(predicted, measured))
    for name, unit, predicted, measured in list_counts(compared):
        digits = 0 if unit == "" else 2
        shown = (f"{predicted:,.{digits}f}{unit}", f"{measured:,.{digits}f}{unit}")
        table.add_row(name, "", *shown, _format_error(predicted, measured))
    return table


def list_counts(compared: Compared) -> Iterator[tuple[str, str, float, float]]:
    """(name, unit, predicted, measured) of all that is no percentile."""
    one, two = compared.predicted, compared.measured
    yield "requests", " /s", one.rates.requests_per_s, two.rates.requests_per_s
    yield "new tokens", " /s", one.rates.new_tokens_per_s, two.rates.new_tokens_per_s
    yield "steps", "", one.use.steps, two.use.steps
    yield "rows in a step", " ", one.use.rows_per_step, two.use.rows_per_step
    yield "busy", " s", one.use.busy_mean * one.seconds, two.use.busy_mean * two.seconds
    yield "preemptions", "", one.preemptions, two.preemptions


def list_lines(compared: Compared, fitted: Fitted) -> Iterator[str]:
    """What else there is to know of the runs."""
    yield from list_replayed(compared.replayed)
    fates = ", ".join(f"{n:,} {fate}" for fate, n in compared.measured.fates.items() if n)
    yield f"requests: {fates}"
    if fitted.clipped:
        yield f"{fitted.clipped:,} requests cut to the context, {fitted.clipped_tokens:,} tokens"
    around_s = sum(compared.part_seconds.get(part, 0.0) for part in OVERHEAD)
    yield from list_pace_lines(compared)
    steps = max(1, compared.measured.use.steps)
    yield f"the engine took {around_s * 1e3 / steps:.3f} ms a step beside the arithmetic"
    if compared.late_ns:
        late_ms = compared.late_ns[-1] / 1e6
        yield f"requests were sent at most {late_ms:.2f} ms later than meant"
    if compared.others_share is not None:
        line = f"other processes and other guests took {compared.others_share:.1%} of the cores"
        much = compared.others_share > compared.spare_share + _MUCH
        yield line + (": the measured times are theirs too; run again when it is quiet" * much)


def list_pace_lines(compared: Compared) -> Iterator[str]:
    """By how much steps took longer than calibrated, and what the simulator makes of that."""
    before, after = compared.probed
    yield (
        f"timed before the run, decodes took {before.decode:.2f} times as long as calibrated and "
        f"prompts {before.prefill:.2f}; after it {after.decode:.2f} and {after.prefill:.2f}: "
        "predicted with the means"
    )
    for pace in compared.paces:
        yield (
            f"steps {pace.kind}: {pace.steps:,}, took {pace.ratio:.2f} times as long as calibrated"
            f" ({pace.fastest:.2f} to {pace.slowest:.2f} in tenths of the run)"
        )
    errors = []
    for name, field in _TIMES[:2]:
        one, two = getattr(compared.at_pace, field), getattr(compared.measured, field)
        for percentile in ("p50", "p99"):
            seconds = f"{percentile}_s"
            error = _format_error(getattr(one, seconds), getattr(two, seconds))
            errors.append(f"{name} {percentile} {error}")
    yield f"simulated with steps so much longer: {', '.join(errors)}"


def list_replayed(replayed: Replayed) -> Iterator[str]:
    """How a replay went."""
    found = replayed.difference
    if found is None:
        yield f"replayed: {replayed.plans:,} plans, byte for byte the same"
        return
    yield f"replayed: {replayed.plans:,} plans the same, then input {found.number:,} differs"
    yield f"  recorded: {found.recorded}"
    yield f"  replayed: {found.replayed}"


def describe_replayed(replayed: Replayed) -> dict[str, object]:
    """As plain values."""
    return dataclasses.asdict(replayed)


def describe_bench(
    compared: Compared, fitted: Fitted, choices: Sequence[Choice]
) -> dict[str, object]:
    """Everything as plain values, for JSON."""
    errors: dict[str, object] = {}
    for _, field in _TIMES:
        errors[field] = {
            percentile: get_error(
                getattr(getattr(compared.predicted, field), f"{percentile}_s"),
                getattr(getattr(compared.measured, field), f"{percentile}_s"),
            )
            for percentile in _PERCENTILES
        }
    for name, _, predicted, measured in list_counts(compared):
        errors[name] = get_error(predicted, measured)
    return {
        "settings": {choice.name: choice.value for choice in choices},
        "predicted": dataclasses.asdict(compared.predicted),
        "measured": dataclasses.asdict(compared.measured),
        "errors": errors,
        "at_pace": dataclasses.asdict(compared.at_pace),
        "probed": [dataclasses.asdict(pace) for pace in compared.probed],
        "paces": [dataclasses.asdict(pace) for pace in compared.paces],
        "replayed": describe_replayed(compared.replayed),
        "clipped": dataclasses.asdict(fitted),
        "sent_late_ms": compared.late_ns[-1] / 1e6 if compared.late_ns else 0.0,
        "part_seconds": dict(compared.part_seconds),
        "others_share": compared.others_share,
    }


def get_error(predicted: float, measured: float) -> float | None:
    """predicted / measured - 1; None where that says nothing."""
    if not measured:
        return 0.0 if not predicted else None
    return predicted / measured - 1


def _format_error(predicted: float, measured: float) -> str:
    error = get_error(predicted, measured)
    return "–" if error is None else f"{error:+.1%}"
