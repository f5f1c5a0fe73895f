"""Unit 9: recovery from failures, by checkpoints and by replaying the tokens."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from twostroke.lab.machines import build_replica, open_station, simulate
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.plan.recovery import plan_checkpoints, plan_replay
from twostroke.sim.arrivals import Arrival
from twostroke.sim.faults import ExecutorDies

IDEA = """A dead worker takes its keys and values with it. Checkpoints save them every so often:
the best interval is √(2·C·M) for a checkpoint of C seconds and a failure every M (Young 1974), so
there is none without a rate of failures. An engine can also keep only the tokens, four bytes
each, and compute the rest again: that costs nothing until something fails."""
_CHECKPOINT_S, _RESTART_S, _ROWS, _TOKENS = 0.05, 2.0, 32, 1024
_FAILURES = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0, "month": 2_628_000.0}


def run(setup: Setup) -> Findings:
    """Overhead of both by how often something fails."""
    prefill_s = open_station("llama-2-7b", "a100-80gb").predict_s(1, _TOKENS, 0)
    saved, replayed, lines = [], [], []
    for name, failure_s in _FAILURES.items():
        best = plan_checkpoints(_CHECKPOINT_S, failure_s, _RESTART_S)
        replay = plan_replay(prefill_s, _ROWS, failure_s, _RESTART_S)
        saved.append(100 * best.overhead)
        replayed.append(100 * replay.overhead)
        lines.append(
            f"a failure every {name}: checkpoint every {best.interval_s:.0f} s, overhead "
            f"{best.overhead:.3%}; replay {replay.rework_s:.1f} s of work, overhead "
            f"{replay.overhead:.4%}"
        )
    late_s, finished = _simulate_death()
    lines.append(
        f"Simulated with the scheduler that serves: the executor dies while {_ROWS} requests are "
        f"answered, and {_RESTART_S:g} s later there is another; {finished} of {_ROWS} finish, "
        f"{late_s:.2f} s later than undisturbed."
    )
    hours = [seconds / 3600 for seconds in _FAILURES.values()]
    picture = Curves(
        f"{_ROWS} requests of {_TOKENS:,} tokens, llama-2-7b on an A100-80GB; checkpoints of 50 ms",
        ("hours between failures (logarithmic)", "overhead, % of all time (logarithmic)"),
        {"checkpoints, best interval": (hours, saved), "replay of the tokens": (hours, replayed)},
    )
    numbers = {"checkpoints": saved[1], "replay": replayed[1], "late_s": late_s,
               "finished": float(finished)}  # fmt: skip
    return Findings(lines, numbers, picture.draw)


def _simulate_death() -> tuple[float, int]:
    """How much later the last request ends when an executor dies on the way, and how many finish.

    Keys and values outlive the executor here, as they do in this engine's own memory; only the step
    that was lost is computed again.
    """
    replica = build_replica(open_station("llama-2-7b", "a100-80gb"))
    replica = replace(replica, restart_ns=round(_RESTART_S * 1e9))
    arrivals = [Arrival(0, _TOKENS, 200) for _ in range(_ROWS)]
    death = ExecutorDies(3_000_000_000, 0)
    plain, died = (simulate(replica, arrivals, 1, faults) for faults in ((), (death,)))
    ends_s = [int(each.get_columns()["ended_ns"].max()) / 1e9 for each in (plain, died)]
    return ends_s[1] - ends_s[0], died.count_fates()["finished"]


def ask_interval(checkpoint_ms: int, failure_hours: int) -> Question:
    """Young's interval."""
    checkpoint_s, failure_s = checkpoint_ms / 1e3, failure_hours * 3600.0
    young_s = plan_checkpoints(checkpoint_s, failure_s, 0.0).young_s
    assert math.isfinite(young_s)
    return Question(
        f"A checkpoint takes {checkpoint_ms} ms and something fails every {failure_hours} hours "
        "in the mean. What is the best interval, to first order?",
        young_s,
        "s",
        f"τ = √(2·C·M) = √(2 · {checkpoint_s:g} s · {failure_s:,.0f} s) = {young_s:.1f} s (Young "
        "1974).",
    )


def draw_interval(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_interval(rng.choice((20, 50, 80, 200, 500)), rng.choice((2, 6, 12, 24, 100)))


def ask_overhead(checkpoint_ms: int, token_ms: int, tokens: int) -> Question:
    """What checkpoints cost while nothing fails."""
    share = 100 * checkpoint_ms / (token_ms * tokens)
    return Question(
        f"A checkpoint takes {checkpoint_ms} ms and is made every {tokens} tokens of {token_ms} "
        "ms. How large is the overhead, in per cent of the time between two of them?",
        share,
        "%",
        f"{checkpoint_ms} ms / ({tokens} · {token_ms} ms) = {share:.2f} %.",
    )


def draw_overhead(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_overhead(rng.choice((20, 50, 80)), rng.choice((10, 20, 25)), rng.randint(2, 40) * 10)
