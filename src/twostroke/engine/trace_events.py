"""A run as trace events, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Turns a report of accounts (account_report.py) into the JSON object format of the Trace Event
documentation: complete events ("X") with `ts` and `dur` in microseconds, and metadata events ("M")
that name processes and threads. Process 1 is the engine: its thread's parts, and the executor's
parts of each step. Process 2 holds the requests, each on a thread of its own with a span for
its whole life, within it queued, prefill and decode. Events of a thread are sorted, nest or follow
one another, and none has a negative duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from twostroke.spec.step import STEP_PARTS

Event = dict[str, Any]

ENGINE, REQUESTS = 1, 2
_STEPS, _EXECUTOR, _THREAD = 1, 2, 3
# The engine's thread in the order of a step: what came before it, then around it.
_ENGINE_PARTS = ("idle", "commit", "plan", "deliver", "inbox")


def build_trace(report: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a report, as a value for `json.dump`; times count from its first event."""
    steps: Sequence[Mapping[str, Any]] = report["steps"]
    requests: Sequence[Mapping[str, Any]] = report["requests"]
    times = [step["begin_ns"] for step in steps] + [one["submitted_ns"] for one in requests]
    zero_ns = min(times, default=0)
    events = [*_name_engine(), *_name_requests(requests)]
    for step in steps:
        events.extend(_trace_step(step, zero_ns))
    for thread, request in enumerate(requests, start=1):
        events.extend(_trace_request(request, thread, zero_ns))
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"], -event.get("dur", 0.0)))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _trace_step(step: Mapping[str, Any], zero_ns: int) -> Iterator[Event]:
    """The step with its rows, its executor's parts, and the parts of the engine's thread."""
    prompts = sum(row["prompt"] > 0 for row in step["rows"])
    decodes = len(step["rows"]) - prompts
    kinds = [f"{count} {name}" for count, name in ((prompts, "prefill"), (decodes, "decode"))]
    name = " + ".join(kind for kind in kinds if not kind.startswith("0"))
    parts: Mapping[str, int] = step["parts"]
    busy_ns = step["begin_ns"] + parts["idle"]
    args = {key: step[key] for key in ("step", "tokens", "flops", "bytes", "floor_ns", "bound_by")}
    args["rows"] = [
        f"{row['request']}[{row['index']}] {row['start']}+{row['tokens']}" for row in step["rows"]
    ]
    yield _span(name, (busy_ns, step["ended_ns"]), (ENGINE, _STEPS), zero_ns, args)
    # The executor's parts end with the step; where they were measured in turns, as ops of layers
    # are, each is shown as one span of its whole length.
    at_ns = step["ended_ns"] - sum(parts[part] for part in (*STEP_PARTS, "executor"))
    first_ns = at_ns
    for part in (*STEP_PARTS, "executor"):
        if parts[part]:
            yield _span(part, (at_ns, at_ns + parts[part]), (ENGINE, _EXECUTOR), zero_ns)
            at_ns += parts[part]
    at_ns = step["begin_ns"]
    for part in _ENGINE_PARTS:
        end_ns = min(at_ns + parts[part], first_ns)
        if end_ns > at_ns:
            yield _span(part, (at_ns, end_ns), (ENGINE, _THREAD), zero_ns)
        at_ns = max(at_ns, end_ns)


def _trace_request(request: Mapping[str, Any], thread: int, zero_ns: int) -> Iterator[Event]:
    begin, end = request["submitted_ns"], request["ended_ns"]
    planned = request["first_planned_ns"] or end
    first = request["first_token_ns"] or end
    args = {key: value for key, value in request.items() if not key.endswith("_ns")}
    place = (REQUESTS, thread)
    yield _span(request["request"], (begin, end), place, zero_ns, args)
    spans = (("queued", begin, planned), ("prefill", planned, first), ("decode", first, end))
    for name, start_ns, end_ns in spans:
        if end_ns > start_ns:
            yield _span(name, (start_ns, end_ns), place, zero_ns)


def _span(
    name: str,
    times_ns: tuple[int, int],
    place: tuple[int, int],
    zero_ns: int,
    args: Mapping[str, Any] | None = None,
) -> Event:
    """A complete event from one time to the other on this process and thread."""
    begin_ns, end_ns = times_ns
    event: Event = {
        "ph": "X",
        "name": name,
        "cat": "request" if place[0] == REQUESTS else "engine",
        "pid": place[0],
        "tid": place[1],
        "ts": (begin_ns - zero_ns) / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
    }
    return event if args is None else {**event, "args": dict(args)}


def _name_engine() -> Iterator[Event]:
    yield _name("process_name", (ENGINE, 0), "engine")
    for thread, name in ((_STEPS, "steps"), (_EXECUTOR, "executor"), (_THREAD, "engine thread")):
        yield _name("thread_name", (ENGINE, thread), name)


def _name_requests(requests: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    yield _name("process_name", (REQUESTS, 0), "requests")
    for thread, request in enumerate(requests, start=1):
        yield _name("thread_name", (REQUESTS, thread), request["request"])


def _name(what: str, place: tuple[int, int], name: str) -> Event:
    return {
        "ph": "M",
        "name": what,
        "pid": place[0],
        "tid": place[1],
        "ts": 0,
        "args": {"name": name},
    }
