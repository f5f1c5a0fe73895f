"""A running server beside the plan it was set up by: what came and what it took, planned and seen.

Pure: counters and a plan in, comparisons and their consequence out. A plan is of all replicas
together; a server is one of them. It never blames the server for a load that was not planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.errors import InvalidParameter
from twostroke.plan.advice import Snapshot

# A mean load this much off the planned one is another load.
OTHER_LOAD = 0.25
# Less than this off a plan says nothing: calibrations are of a machine that changes by as much.
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Expected:
    """What a plan expects of one server: requests a second and the most it keeps, mean lengths in
    tokens, seconds a token in the mean, sequences decoding at once, and what breaks first."""

    rate: float
    most_rate: float
    prompt_tokens: float
    new_tokens: float
    tpot_s: float
    rows: float
    breaks_first: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity, planned and seen, in `unit`."""

    what: str
    planned: float
    seen: float
    unit: str = ""

    @property
    def excess(self) -> float:
        """How much more was seen than planned, as a share of it."""
        return self.seen / self.planned - 1 if self.planned else 0.0


def read_expected(plan: Mapping[str, Any]) -> Expected:
    """What the best plan of `twostroke plan --json` expects of each server that decodes.

    Raises InvalidParameter for anything else.
    """
    try:
        demand, best = plan["demand"], plan["plans"][0]
        pool = best["pools"][-1]  # of two pools the second decodes
        replicas = int(pool["replicas"])
        rate = float(demand["rate"]) / replicas
        return Expected(
            rate=rate,
            most_rate=rate * float(best["growth"]),
            prompt_tokens=float(demand["prompt_tokens"]),
            new_tokens=float(demand["new_tokens"]),
            tpot_s=float(best["tpot_mean_s"]),
            rows=float(pool["rows"]),
            breaks_first=str(best["breaks_first"]),
        )
    except IndexError:
        raise InvalidParameter("plan", "holds no plan: none kept its targets") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise InvalidParameter("plan", "is not what `twostroke plan --json` prints") from None


def compare(snapshot: Snapshot, expected: Expected) -> list[Comparison]:
    """Load and speed, planned and seen; empty before a request has ended."""
    ended, later = snapshot.requests, snapshot.generation_tokens - snapshot.requests
    if not ended or not snapshot.wall_seconds:
        return []
    found = [
        Comparison("requests a second", expected.rate, ended / snapshot.wall_seconds),
        Comparison("prompt tokens", expected.prompt_tokens, snapshot.prompt_tokens / ended),
        Comparison("new tokens", expected.new_tokens, snapshot.generation_tokens / ended),
        Comparison("sequences a step", expected.rows, snapshot.decode_rows),
    ]
    if later > 0:
        seen_ms = snapshot.decode_seconds / later * 1e3
        found.append(Comparison("time a token", expected.tpot_s * 1e3, seen_ms, " ms"))
    return found


def conclude(found: Sequence[Comparison], expected: Expected) -> Iterator[str]:
    """What follows, in sentences."""
    by_name = {one.what: one for one in found}
    if not by_name:
        return
    other = [
        one
        for one in (by_name["prompt tokens"], by_name["new tokens"])
        if abs(one.excess) > OTHER_LOAD
    ]
    if other:
        names = " and ".join(f"{one.seen:,.0f} {one.what}" for one in other)
        yield f"requests are not those planned for ({names} in the mean): plan again for these"
    rate, rows = by_name["requests a second"], by_name["sequences a step"]
    if rate.seen > expected.most_rate * (1 + TOLERANCE):
        yield (
            f"{rate.seen:.3g} requests a second are more than the {expected.most_rate:.3g} a "
            f"replica keeps ({expected.breaks_first}): add replicas"
        )
    token = by_name.get("time a token")
    if token is None or token.excess <= TOLERANCE:
        return
    if rows.excess > TOLERANCE:
        yield (
            f"a token takes {token.excess:.0%} longer than planned, for {rows.seen:.3g} sequences "
            "share a step: the load is heavier than planned, not the server slower"
        )
    elif not other:
        yield (
            f"a token takes {token.excess:.0%} longer than planned at no heavier load: something "
            "else takes the machine, or its calibration is of another day (`twostroke calibrate`)"
        )
