"""The two strokes of one request, side by side, each beside the least time this machine allows.

It owns the arithmetic from timings and limits to rates and shares, and the table that shows them.
It counts no work and measures nothing: work comes from `spec/work.py`, limits from the native
probes, times from the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke.engine.outputs import RequestTimings

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine was measured to do, with the engine's threads."""

    read_bytes_per_s: float
    int8_ops_per_s: float
    fp32_flops_per_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What one step needs: bytes read from memory, 8-bit integer operations, 32-bit FLOPs."""

    bytes: float
    int8_ops: float
    fp32_flops: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time some steps can take, and what bounds most of it: "memory" or "arithmetic"."""

    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class Stroke:
    """One stroke of one request.

    tokens: computed as prompt (prefill) or emitted after the first (decode). seconds: its duration.
    latency_s: time to first token, or mean time per token after it. floor is None where this
    machine's limits are unknown.
    """

    name: str
    tokens: int
    seconds: float
    latency_s: float
    floor: Floor | None

    @property
    def tokens_per_s(self) -> float:
        """Measured rate; 0 where nothing was computed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def limit_tokens_per_s(self) -> float | None:
        """The rate at this machine's limit."""
        if self.floor is None or self.floor.seconds <= 0:
            return None
        return self.tokens / self.floor.seconds

    @property
    def share(self) -> float | None:
        """Measured rate as a share of the limit."""
        if self.floor is None or self.seconds <= 0:
            return None
        return self.floor.seconds / self.seconds


def get_floor(demands: Iterable[Demand], limits: Limits) -> Floor:
    """The least time for steps run one after the other (the roofline of Williams et al. 2009).

    Within a step memory and arithmetic overlap perfectly; the two kinds of arithmetic share the
    cores and add up. Leaves out thread start-up, caches and everything outside the matrix products
    that the demands do not count.
    """
    memory_s = arithmetic_s = total_s = 0.0
    for demand in demands:
        reading = demand.bytes / limits.read_bytes_per_s
        computing = (
            demand.int8_ops / limits.int8_ops_per_s + demand.fp32_flops / limits.fp32_flops_per_s
        )
        total_s += max(reading, computing)
        if reading >= computing:
            memory_s += reading
        else:
            arithmetic_s += computing
    return Floor(total_s, "memory" if memory_s >= arithmetic_s else "arithmetic")


def get_strokes(
    timings: RequestTimings, prefill_floor: Floor | None, decode_floor: Floor | None
) -> tuple[Stroke, Stroke]:
    """Prefill and decode of a request that ran alone.

    Prefill lasts from the first step to the first token, which it yields; decode from there to the
    end, and computes one token less than were emitted. decode_floor is of all decode steps.
    """
    decoded = max(0, timings.decode_tokens - 1)
    decode_s = max(0, timings.ended_ns - timings.first_token_ns) / 1e9 if decoded else 0.0
    prefill = Stroke(
        "prefill",
        timings.prefill_tokens,
        max(0, timings.first_token_ns - timings.first_planned_ns) / 1e9,
        max(0, timings.first_token_ns - timings.submitted_ns) / 1e9,
        prefill_floor,
    )
    tpot_s = decode_s / decoded if decoded else 0.0
    return prefill, Stroke("decode", decoded, decode_s, tpot_s, decode_floor)


def build_table(prefill: Stroke, decode: Stroke) -> Table:
    """The two strokes as a table of two columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("prefill", justify="right")
    table.add_column("decode", justify="right")
    table.add_row("tokens", f"{prefill.tokens:,}", f"{decode.tokens:,}")
    table.add_row("time to first token", format_seconds(prefill.latency_s), "")
    table.add_row("time per token", "", format_seconds(decode.latency_s) if decode.tokens else "–")
    rows = (
        ("tokens/s", [_format_rate(stroke.tokens_per_s) for stroke in (prefill, decode)]),
        ("limit, tokens/s", [_format_rate(s.limit_tokens_per_s) for s in (prefill, decode)]),
        ("share of the limit", [_format_share(stroke.share) for stroke in (prefill, decode)]),
        ("bound by", [stroke.floor.bound if stroke.floor else "–" for stroke in (prefill, decode)]),
    )
    known = prefill.floor is not None or decode.floor is not None
    for name, cells in rows if known else rows[:1]:
        table.add_row(name, *cells)
    return table


def describe(stroke: Stroke) -> dict[str, object]:
    """A stroke as plain values, for JSON."""
    latency = "ttft_s" if stroke.name == "prefill" else "tpot_s"
    return {
        "tokens": stroke.tokens,
        "seconds": stroke.seconds,
        latency: stroke.latency_s,
        "tokens_per_s": stroke.tokens_per_s,
        "limit_tokens_per_s": stroke.limit_tokens_per_s,
        "share_of_limit": stroke.share,
        "bound_by": stroke.floor.bound if stroke.floor else None,
    }


def format_seconds(seconds: float) -> str:
    """A time for people, in ms or s."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _format_rate(rate: float | None) -> str:
    if not rate:
        return "–"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _format_share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
