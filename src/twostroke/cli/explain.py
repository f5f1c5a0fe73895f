"""`twostroke explain`: where the time of one request went, beside the least it could have taken.

Reads a report of accounts, from a running server or from a request that it runs here, and shows it:
the parts of the request's life, the parts of its steps with their floors, and a timeline. It
measures nothing itself but this machine's limits, and divides nothing that the engine has not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostroke.cli.insight_options import ExplainOptions
from twostroke.cli.options import MachineOptions
from twostroke.engine.account_report import build_report
from twostroke.engine.accounts import FLOOR_PARTS
from twostroke.engine.trace_events import build_trace
from twostroke.errors import InvalidParameter

if TYPE_CHECKING:
    from rich.table import Table

_TABLE_WIDTH = 100
_LINE_CELLS = 72
_LIFE = (
    ("queued", "queued_ns", None),
    ("prefill", "prefill_ns", "prefill_floor_ns"),
    ("decode", "decode_ns", "decode_floor_ns"),
    ("others' prompts", "others_ns", None),
    ("Python around steps", "python_ns", None),
    ("no row in a step", "waited_ns", None),
)
_MARKS = {"queued": ".", "prefill": "#", "decode": "=", "mixed": "%", "elsewhere": " "}
_LEGEND = "  ".join(f"{mark!r} {name}" for name, mark in _MARKS.items())


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: nanoseconds, and the least they could be; None where there is no floor."""

    name: str
    ns: float
    floor_ns: float | None = None


def run_explain(options: ExplainOptions, on: MachineOptions) -> None:
    """Explain a request of a server, or run one and explain it. Raises TwostrokeError."""
    if (options.url is None) == (options.model is None):
        raise InvalidParameter("url", "give a MODEL to run a prompt, or --url of a server")
    report = fetch_report(options) if options.url is not None else run_request(options, on)
    request = choose_request(report, options.request)
    if options.trace_output is not None:
        write_trace(Path(options.trace_output), report)
    if options.json:
        print(json.dumps({**report, "requests": [request]}))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(build_life_table(request))
    for name, steps in split_strokes(request["request"], report["steps"]).items():
        if steps:
            console.print(build_stroke_table(name, steps))
    console.print(draw_timeline(request, report["steps"]), soft_wrap=True, markup=False)


def run_request(options: ExplainOptions, on: MachineOptions) -> dict[str, Any]:
    """Run the prompt on an engine of its own, once to warm it and once to account for it."""
    from twostroke.cli.compose import build_engine
    from twostroke.cli.limits import measure_limits
    from twostroke.cli.settings import EngineSettings, get_machine_settings, keep_on_cpu
    from twostroke.engine.llm import OfflineLLM
    from twostroke.engine.params import SamplingParams

    assert options.model is not None
    if not options.prompt:
        raise InvalidParameter("prompt", "must be given to run a request: --prompt TEXT")
    wanted = EngineSettings(
        model=options.model, **get_machine_settings(keep_on_cpu(on)), has_chat=False
    )
    built = build_engine(wanted)
    try:
        limits = measure_limits(built.settings)
        with OfflineLLM(built.parts) as llm:
            params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)
            # Other tokens, so that nothing of the prompt is in the cache.
            llm.generate([[1] * 64], SamplingParams(max_tokens=4, temperature=0.0))
            llm.attribution.set_limits(limits)
            llm.generate(options.prompt, params)
            return build_report(llm.attribution)
    finally:
        built.model.close()


def fetch_report(options: ExplainOptions) -> dict[str, Any]:
    """The accounts of a running server. Raises InvalidParameter where there are none."""
    from twostroke.cli.fetch import fetch_json

    assert options.url is not None
    query = {"request": options.request or "", "last": "0"}
    return fetch_json(options.url, "/v1/steps", query, options.api_key)


def choose_request(report: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    """The request that is asked for, or the last that ended. Raises InvalidParameter."""
    requests: Sequence[dict[str, Any]] = report["requests"]
    found = [one for one in requests if wanted is None or one["request"].startswith(wanted)]
    if not found:
        about = "no request has ended yet" if wanted is None else f"no request {wanted!r} is kept"
        raise InvalidParameter("request", f"{about}; the last that ended are kept, no others")
    return found[-1]


def write_trace(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as trace events. Raises InvalidParameter where that cannot be."""
    try:
        path.write_text(json.dumps(build_trace(report)), encoding="utf-8")
    except OSError as error:
        raise InvalidParameter("trace_output", f"{path} cannot be written: {error}") from None


def split_strokes(request: str, steps: Sequence[Any]) -> dict[str, list[Any]]:
    """The steps that had rows of the request: with its prompt, and with its decodes alone."""
    strokes: dict[str, list[Any]] = {"prefill steps": [], "decode steps": []}
    for step in steps:
        own = [row for row in step["rows"] if row["request"] == request]
        if own:
            has_prompt = any(row["prompt"] for row in own)
            strokes["prefill steps" if has_prompt else "decode steps"].append(step)
    return strokes


def list_stroke(steps: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The parts of these steps together, with their floors; they sum to the steps' time."""
    parts: Counter[str] = Counter()
    floors: Counter[str] = Counter()
    for step in steps:
        parts.update({name: ns for name, ns in step["parts"].items() if name != "idle"})
        floors.update(step["floors"] or {})
    has_floor = all(step["floors"] for step in steps)
    lines = []
    for name, ns in sorted(parts.items(), key=lambda item: -item[1]):
        if ns or floors[name]:
            own = floors[name] if has_floor and name in FLOOR_PARTS else None
            lines.append(Line(name, ns, own))
    return lines


def build_life_table(request: Mapping[str, Any]) -> Table:
    """Where each millisecond of the request went."""
    account = request["account"]
    lines = [
        Line(name, account[ns], account[floor] if floor else None) for name, ns, floor in _LIFE
    ]
    cached = request["cached_tokens"]
    title = (
        f"{request['request']}: {request['prefill_tokens']} prompt tokens computed"
        f"{f', {cached} cached' if cached else ''}, {request['decode_tokens']} new"
    )
    return _build_table(title, lines)


def build_stroke_table(name: str, steps: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of the request's steps, everybody's work in them included."""
    bounds = Counter(step["bound_by"] for step in steps if step["bound_by"])
    rows = sum(len(step["rows"]) for step in steps) / len(steps)
    counted = name.removesuffix("s") if len(steps) == 1 else name
    title = f"{len(steps)} {counted} of {rows:.3g} {'row' if rows == 1 else 'rows on average'}"
    if bounds:
        title += f", bound by {bounds.most_common(1)[0][0]}"
    return _build_table(title, list_stroke(steps))


def _build_table(title: str, lines: Sequence[Line]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for heading in ("ms", "share", "floor, ms", "of its limit"):
        table.add_column(heading, justify="right")
    whole = sum(line.ns for line in lines) or 1.0
    for line in lines:
        table.add_row(line.name, *_format(line, whole))
    floors = [line.floor_ns for line in lines if line.floor_ns is not None]
    total = Line("all", whole, sum(floors) if floors else None)
    table.add_row("all", *_format(total, whole), style="bold")
    return table


def _format(line: Line, whole: float) -> tuple[str, str, str, str]:
    measured = (f"{line.ns / 1e6:,.3f}", f"{line.ns / whole:.1%}")
    if line.floor_ns is None:
        return (*measured, "–", "–")
    share = f"{line.floor_ns / line.ns:.0%}" if line.ns else "–"
    return (*measured, f"{line.floor_ns / 1e6:,.3f}", share)


def draw_timeline(request: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """One line from submission to end, a mark for what most of each cell's time was."""
    begin, end = request["submitted_ns"], request["ended_ns"]
    cell_ns = max(1.0, (end - begin) / _LINE_CELLS)
    cells: list[Counter[str]] = [Counter() for _ in range(_LINE_CELLS)]
    for name, start, stop in _list_spans(request, steps):
        for at in range(_LINE_CELLS):
            left, right = begin + at * cell_ns, begin + (at + 1) * cell_ns
            shared = min(stop, right) - max(start, left)
            if shared > 0:
                cells[at][name] += round(shared)
    marks = [_MARKS[max(cell, key=lambda name: cell[name])] if cell else " " for cell in cells]
    width = f"{(end - begin) / 1e6:,.1f} ms"
    return f"|{''.join(marks)}|\n0{width:>{_LINE_CELLS + 1}}\n{_LEGEND}"


def _list_spans(
    request: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, int, int]]:
    planned = request["first_planned_ns"] or request["ended_ns"]
    yield "queued", request["submitted_ns"], planned
    for step in steps:
        own = [row for row in step["rows"] if row["request"] == request["request"]]
        start, stop = max(step["begin_ns"], planned), step["ended_ns"]
        if stop <= planned or start >= request["ended_ns"]:
            continue
        if not own:
            yield "elsewhere", start, stop
        elif any(row["prompt"] for row in own):
            yield "prefill", start, stop
        else:
            is_mixed = any(row["prompt"] for row in step["rows"])
            yield "mixed" if is_mixed else "decode", start, stop
