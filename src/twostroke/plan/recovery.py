"""Recovery: checkpoints of KV against replaying the token log, at a given rate of failures.

Owns the arithmetic of both. A checkpoint costs time at every interval and saves all work before it;
a token log costs nothing a step that is worth counting (four bytes a token) and pays after a
failure, when the prompts and answers of all live requests are prefilled again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Checkpoints every `interval_s`. overhead: share of all time that they and what follows
    failures take; rework_s: computed again after a failure, in the mean; young_s: Young's
    interval, which forgets that a checkpoint itself takes time."""

    interval_s: float
    young_s: float
    overhead: float
    rework_s: float


@dataclass(frozen=True, slots=True)
class Replay:
    """Replay of the token log: rework_s after a failure, and its share of all time."""

    rework_s: float
    overhead: float


def plan_checkpoints(checkpoint_s: float, failure_s: float, restart_s: float) -> Checkpoints:
    """The best interval where a checkpoint takes C = `checkpoint_s` and failures come every
    M = `failure_s`, both above 0.

    τ = √(2 C M) (Young 1974, eq. 2); with higher orders τ = √(2 C M) (1 + ⅓ √(C / 2M) + C / 18M)
    - C for C < 2M, else M (Daly 2006, eq. 37). The overhead is C/τ while nothing fails, and
    (τ/2 + restart) / M in failures.
    """
    assert checkpoint_s > 0
    assert failure_s > 0
    young_s = math.sqrt(2 * checkpoint_s * failure_s)
    ratio = checkpoint_s / (2 * failure_s)
    interval_s = failure_s
    if ratio < 1:
        interval_s = young_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s
    rework_s = interval_s / 2
    overhead = checkpoint_s / interval_s + (rework_s + restart_s) / failure_s
    return Checkpoints(interval_s, young_s, overhead, rework_s)


def plan_replay(prefill_s: float, rows: float, failure_s: float, restart_s: float) -> Replay:
    """Replay where each of `rows` live requests takes `prefill_s` to prefill again."""
    rework_s = rows * prefill_s
    return Replay(rework_s, (rework_s + restart_s) / failure_s)
