"""The two strokes of one request, side by side, each beside the least time this machine allows.

It owns the arithmetic from timings and limits to rates and shares, and the table that shows them.
It counts no work and measures nothing: work comes from `spec/work.py`, limits from the native
probes, times from the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from twostroke.engine.metrics import EngineStats
    from twostroke.spec.work import Floor


@dataclass(frozen=True, slots=True)
class StrokeFloor:
    """The least time all steps of a stroke can take, and what sets most of it."""

    seconds: float
    bound_by: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One request's counts and times: prefill_s is first step to first token, decode_s the rest."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    prefill_s: float
    decode_s: float


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
    floor: StrokeFloor | None

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


def add_floors(floors: Iterable[Floor]) -> StrokeFloor:
    """The floor of steps that run one after the other."""
    seconds = {"memory": 0.0, "compute": 0.0}
    for floor in floors:
        for part in floor.parts:
            seconds[part.bound_by] += part.seconds
    bound_by = "memory" if seconds["memory"] >= seconds["compute"] else "compute"
    return StrokeFloor(sum(seconds.values()), bound_by)


def measure(before: EngineStats, after: EngineStats) -> Measured:
    """What one request took that ran, alone, between two snapshots of an engine's statistics."""
    return Measured(
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        new_tokens=after.generation_tokens - before.generation_tokens,
        ttft_s=after.ttft_seconds.sum - before.ttft_seconds.sum,
        prefill_s=after.prefill_seconds.sum - before.prefill_seconds.sum,
        decode_s=after.decode_seconds.sum - before.decode_seconds.sum,
    )


def get_strokes(
    measured: Measured, prefill_floor: StrokeFloor | None, decode_floor: StrokeFloor | None
) -> tuple[Stroke, Stroke]:
    """Prefill and decode of a request that ran alone, beside their floors.

    The first new token is the prefill's, so decode computes one token less than were emitted;
    decode_floor is of all its steps.
    """
    prefill = Stroke(
        "prefill", measured.prompt_tokens, measured.prefill_s, measured.ttft_s, prefill_floor
    )
    decoded = max(0, measured.new_tokens - 1)
    if not decoded:
        return prefill, Stroke("decode", 0, 0.0, 0.0, None)
    tpot_s = measured.decode_s / decoded
    return prefill, Stroke("decode", decoded, measured.decode_s, tpot_s, decode_floor)


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
        (
            "bound by",
            [stroke.floor.bound_by if stroke.floor else "–" for stroke in (prefill, decode)],
        ),
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
        "bound_by": stroke.floor.bound_by if stroke.floor else None,
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
