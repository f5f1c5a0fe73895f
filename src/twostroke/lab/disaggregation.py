"""Unit 8: prefill and decode in pools of their own, and what moving the keys and values costs."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from twostroke.lab.machines import build_replica, draw_arrivals, open_station, simulate
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.sim.handoff import LinkSpec
from twostroke.sim.pools import PoolSpec, simulate_pools
from twostroke.sim.results import get_times
from twostroke.spec.catalog import get_known_model

IDEA = """In one pool prompts and answers share steps, and each disturbs the other. In two,
decodes are never held up by a prompt; but every prompt's keys and values must move to where they
are decoded, over a link that may be the bottleneck, and neither pool can lend its idle time to
the other. The true cost is the transfer and the loss of sharing, not only the hardware."""
_GBITS = (10, 25, 50, 100, 200, 400)
_RATE = 6.0


def run(setup: Setup) -> Findings:
    """Two replicas as one pool, and as one of each kind with links of several speeds."""
    station = open_station("llama-2-7b", "a100-80gb")
    replica = build_replica(station)
    arrivals = draw_arrivals(200, _RATE, (800, 120), 8)
    one = get_times(simulate(replica, arrivals, 2).get_columns())
    shared = _get_p90_ms(one["tpot_s"])
    token_bytes = station.spec.get_kv_bytes_per_token()
    moved, tpots, busy = [], [], []
    for gbits in _GBITS:
        pool, link = PoolSpec(replica, 1), LinkSpec(gbits * 1e9 / 8)
        times = simulate_pools(pool, pool, link, token_bytes, arrivals)
        moved.append(_get_p90_ms(times.moved_s))
        tpots.append(_get_p90_ms(times.tpot_s))
        busy.append(times.link_busy)
    lines = [f"one pool of two: time between tokens {shared:.1f} ms (p90)"]
    lines += [
        f"{gbits:>3} Gbit/s: KV has moved after {one_moved:8.1f} ms, time between tokens "
        f"{tpot:6.1f} ms (p90), link busy {share:.0%}"
        for gbits, one_moved, tpot, share in zip(_GBITS, moved, tpots, busy, strict=True)
    ]
    picture = Curves(
        f"llama-2-7b, two A100-80GB, {_RATE:g} requests/s of 800 + 120 tokens, simulated",
        ("link, Gbit/s (logarithmic)", "ms, 90th percentile (logarithmic)"),
        {
            "first token until KV has moved": (_GBITS, moved),
            "between tokens, two pools": (_GBITS, tpots),
            "between tokens, one pool": (_GBITS, [shared] * len(_GBITS)),
        },
        ticks=_GBITS,
    )
    numbers = {"one_pool_ms": shared, "slow_ms": tpots[0], "fast_ms": tpots[-1]}
    return Findings(lines, numbers, picture.draw)


def _get_p90_ms(seconds: NDArray[np.float64]) -> float:
    return float(np.nanpercentile(seconds, 90)) * 1e3


def ask_transfer(model: str, tokens: int, gbits: int) -> Question:
    """Time of moving a prompt's keys and values."""
    each = get_known_model(model).get_kv_bytes_per_token()
    seconds = tokens * each / (gbits * 1e9 / 8)
    return Question(
        f"{model} leaves {each:,} bytes of keys and values a token. How long does a prompt of "
        f"{tokens:,} tokens take over a link of {gbits} Gbit/s?",
        seconds,
        "s",
        f"{tokens:,} · {each:,} bytes / ({gbits}e9 / 8 bytes/s) = {seconds * 1e3:.2f} ms.",
    )


def draw_transfer(rng: random.Random) -> Question:
    """The same with other numbers."""
    model = rng.choice(("llama-2-7b", "llama-2-13b", "llama-3.1-8b", "llama-3.1-70b"))
    return ask_transfer(model, rng.randint(3, 80) * 100, rng.choice((10, 25, 100, 200, 400)))
