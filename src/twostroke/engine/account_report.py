"""Accounts as plain values, for JSON: what `/v1/steps` answers and `explain` and traces read.

Owns the names of the fields. Times are whole nanoseconds on the engine's clock. Nothing is counted
here; a value that nobody knows is null.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twostroke.engine.accounts import FLOOR_PARTS, WALL_PARTS, StepAccount
from twostroke.engine.attribution import Attribution, EndedRequest
from twostroke.spec.device import DeviceSpec

SCHEMA = 1


def build_report(attribution: Attribution, request: str = "", last: int = 0) -> dict[str, Any]:
    """Steps and ended requests as far as they are kept.

    request: only this one, or all that an API request of this id was made of, and the steps that
    had rows of it. last: at most so many steps, the last; 0 for all.
    """
    steps = attribution.get_steps()
    ended = attribution.get_ended()
    if request:
        ended = tuple(one for one in ended if _is_of(one.request, request))
        steps = tuple(
            step
            for step in steps
            if any(_is_of(row.sequence.request, request) for row in step.rows)
        )
    if last:
        steps = steps[-last:]
    return {
        "schema": SCHEMA,
        "limits": _describe_limits(attribution.device),
        "requests": [describe_request(one) for one in ended],
        "steps": [describe_step(step) for step in steps],
    }


def describe_step(step: StepAccount) -> dict[str, Any]:
    """One step's account."""
    floor = step.floor
    has_floor = bool(floor.part_ns)
    return {
        "step": step.step,
        "begin_ns": step.begin_ns,
        "started_ns": step.started_ns,
        "ended_ns": step.ended_ns,
        "executor_ns": step.executor_ns,
        "tokens": step.totals.tokens,
        "sampled": step.totals.sampled,
        "flops": floor.flops,
        "bytes": floor.bytes,
        "floor_ns": round(floor.ns) if has_floor else None,
        "bound_by": floor.bound_by or None,
        "floors": _name(FLOOR_PARTS, map(round, floor.part_ns)) if has_floor else None,
        "parts": _name(WALL_PARTS, step.part_ns),
        "causes": {name: round(ns) for name, ns in step.causes.items()} if has_floor else None,
        "rows": [
            {
                "request": row.sequence.request,
                "index": row.sequence.index,
                "start": row.start,
                "tokens": row.tokens,
                "prompt": row.prompt,
                "drawn": row.drawn,
            }
            for row in step.rows
        ],
    }


def describe_request(ended: EndedRequest) -> dict[str, Any]:
    """One ended request's timings and account."""
    timings, account = ended.timings, ended.timings.account
    assert account is not None, "an ended request has an account"
    return {
        "request": ended.request,
        "submitted_ns": timings.submitted_ns,
        "first_planned_ns": timings.first_planned_ns or None,
        "first_token_ns": timings.first_token_ns or None,
        "ended_ns": timings.ended_ns,
        "prefill_tokens": timings.prefill_tokens,
        "decode_tokens": timings.decode_tokens,
        "cached_tokens": timings.cached_tokens,
        "preemptions": timings.preemptions,
        "account": {
            "queued_ns": account.queued_ns,
            "prefill_ns": account.prefill_ns,
            "decode_ns": account.decode_ns,
            "others_ns": account.others_ns,
            "python_ns": account.python_ns,
            "waited_ns": account.waited_ns,
            "prefill_floor_ns": account.prefill_floor_ns or None,
            "decode_floor_ns": account.decode_floor_ns or None,
        },
        "limit_share": account.limit_share,
    }


def _is_of(request: str, wanted: str) -> bool:
    """Whether an engine's request is the wanted one, or one prompt of it."""
    return request == wanted or request.startswith(wanted + "-")


def _describe_limits(device: DeviceSpec | None) -> dict[str, Any] | None:
    if device is None:
        return None
    rates = {f"{kind}_ops_per_s": rate for kind, rate in device.rates}
    return {"threads": device.threads, "bytes_per_s": device.memory_bandwidth, **rates}


def _name(names: tuple[str, ...], values: Iterable[int]) -> dict[str, int]:
    return dict(zip(names, values, strict=True))
