"""`twostroke advise`: which change would help a running server most, from its `/metrics`.

Reads the page, picks the counters by name, and asks plan/advice.py, and plan/beside.py where it is
given a plan; it judges nothing itself. The counters are those since the server started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from twostroke.cli.fetch import fetch_text
from twostroke.cli.insight_options import AdviseOptions
from twostroke.errors import InvalidParameter
from twostroke.plan.advice import LEAST_GAIN, LEAST_STEPS, Advice, Snapshot, advise
from twostroke.plan.beside import Comparison, Expected, compare, conclude, read_expected

_PREFIX = "twostroke_"

Samples = Mapping[tuple[str, str], float]


def run_advise(options: AdviseOptions) -> None:
    """Read, judge, print. Raises InvalidParameter where no such server answers."""
    snapshot = read_snapshot(fetch_text(options.url, "/metrics", options.api_key))
    found = advise(snapshot)
    expected = None if options.plan is None else read_plan(Path(options.plan))
    beside = [] if expected is None else compare(snapshot, expected)
    concluded = [] if expected is None else list(conclude(beside, expected))
    if options.json:
        told = {"snapshot": asdict(snapshot), "advice": [asdict(one) for one in found]}
        plan = {"compared": [asdict(one) for one in beside], "concluded": concluded}
        print(json.dumps(told if expected is None else {**told, "plan": plan}))
        return
    print(format_advice(snapshot, found))
    if expected is not None:
        print(format_beside(beside, concluded))


def read_plan(path: Path) -> Expected:
    """What a file with the output of `twostroke plan --json` expects. Raises InvalidParameter."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return read_expected(json.loads(lines[-1]))
    except OSError as error:
        raise InvalidParameter("plan", f"cannot read {path}: {error.strerror}") from None
    except (IndexError, UnicodeDecodeError, json.JSONDecodeError):
        raise InvalidParameter("plan", f"{path} does not end with a JSON object") from None


def read_snapshot(text: str) -> Snapshot:
    """The snapshot that a `/metrics` page holds. Raises InvalidParameter for another's page."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[tuple[str, str], float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                label = next(iter(sample.labels.values()), "")
                samples[sample.name.removeprefix(_PREFIX), label] = sample.value
    except ValueError as error:
        raise InvalidParameter("url", f"answers /metrics with no metrics: {error}") from None
    if ("step_wall_seconds_total", "") not in samples:
        raise InvalidParameter("url", "answers /metrics, but is no twostroke server")
    return _build_snapshot(samples)


def _build_snapshot(samples: Samples) -> Snapshot:
    def get(name: str) -> float:
        return samples.get((name, ""), 0.0)

    causes = {
        label: value
        for (name, label), value in samples.items()
        if name == "step_cause_seconds_total"
    }
    return Snapshot(
        steps=round(get("steps_total")),
        wall_seconds=get("step_wall_seconds_total"),
        floor_seconds=get("step_floor_seconds_total"),
        cause_seconds=causes,
        requests=round(get("e2e_request_latency_seconds_count")),
        queue_seconds=get("request_queue_time_seconds_sum"),
        prefill_seconds=get("request_prefill_time_seconds_sum"),
        decode_seconds=get("request_decode_time_seconds_sum"),
        prompt_tokens=round(get("prompt_tokens_total")),
        generation_tokens=round(get("generation_tokens_total")),
        waiting=round(get("requests_waiting")),
        running=round(get("requests_running")),
        kv_usage=get("kv_cache_usage_ratio"),
        preemptions=round(get("preemptions_total")),
        prefix_queries=round(get("prefix_cache_queries_total")),
        prefix_hits=round(get("prefix_cache_hits_total")),
        drafted=round(get("spec_decode_num_draft_tokens_total")),
        accepted=round(get("spec_decode_num_accepted_tokens_total")),
    )


def format_advice(snapshot: Snapshot, found: Sequence[Advice]) -> str:
    """The state in two lines, then each piece of advice with its evidence."""
    busy = snapshot.busy_seconds
    lines = [
        f"{snapshot.steps:,} steps, {snapshot.requests:,} requests ended, {busy:.1f} s busy; "
        f"{snapshot.running} run, {snapshot.waiting} wait, {snapshot.kv_usage:.0%} of KV in use"
    ]
    if busy and snapshot.cause_seconds:
        shares = sorted(snapshot.cause_seconds.items(), key=lambda item: -item[1])
        spent = ", ".join(f"{name} {s / busy:.0%}" for name, s in shares if name != "idle" and s)
        lines.append(f"at {snapshot.limit_share:.0%} of this machine's limit; spent on {spent}")
    if snapshot.steps < LEAST_STEPS:
        lines.append(f"Too few steps to advise on: at least {LEAST_STEPS} are needed.")
    elif not found:
        least = f"{LEAST_GAIN:.0%}"
        lines.append(f"No change would help by {least} or more: nothing stands out here.")
    for place, one in enumerate(found, start=1):
        lines.append(f"{place}. {one.change}")
        lines.append(f"   at most {one.gain:.0%} of the {one.target}: {one.evidence}")
    return "\n".join(lines)


def format_beside(found: Sequence[Comparison], concluded: Sequence[str]) -> str:
    """Planned and seen in lines, then what follows."""
    if not found:
        return "Beside its plan: no request has ended yet."
    lines = ["beside its plan, in the mean since it started:"]
    for one in found:
        pair = f"planned {one.planned:.4g}{one.unit}, seen {one.seen:.4g}{one.unit}"
        lines.append(f"   {one.what}: {pair} ({one.excess:+.0%})")
    return "\n".join([*lines, *(concluded or ["as planned, or better"])])
