"""Hypothesis strategies for what a small simulated cluster is given."""

from __future__ import annotations

import hypothesis.strategies as st

from twostroke.policies.names import ORDERS, PACES, PolicyChoice
from twostroke.sim.arrivals import Arrival


@st.composite
def draw_arrivals(draw: st.DrawFn) -> tuple[Arrival, ...]:
    """Up to twelve requests; times collide with each other and with ends of steps now and then."""
    time_ns, arrivals = 0, []
    for _ in range(draw(st.integers(1, 12))):
        time_ns += draw(st.sampled_from([0, 0, 1, 1_100, 1_250, 7_777, 40_000]))
        arrivals.append(
            Arrival(
                time_ns,
                prompt_tokens=draw(st.integers(1, 40)),
                new_tokens=draw(st.integers(1, 60)),
                prefix=tuple(draw(st.lists(st.integers(0, 2), max_size=3))),
                prefix_tokens=8,
                tenant=draw(st.sampled_from(["a", "b"])),
                priority=draw(st.integers(0, 1)),
                ttft_ns=draw(st.sampled_from([0, 5_000])),
                itl_ns=draw(st.sampled_from([0, 0, 1_500])),
                cancel_after_ns=draw(st.sampled_from([0, 0, 0, 1, 1_100, 9_001, 30_000])),
            )
        )
    return tuple(arrivals)


@st.composite
def draw_choices(draw: st.DrawFn) -> PolicyChoice:
    """Any order with any pace, at times on the scale of a step."""
    pace = draw(st.sampled_from(PACES))
    return PolicyChoice(
        order=draw(st.sampled_from(ORDERS)),
        pace=pace,
        age_ns=draw(st.sampled_from([1, 4_000])),
        horizon_ns=50_000,
        fixed_tokens=draw(st.sampled_from([0, 6])),
        chunk_tokens=6,
        itl_ns=draw(st.sampled_from([1_400, 2_500])) if pace == "target" else 0,
        batch_size=3,
        batch_timeout_ns=draw(st.sampled_from([0, 7_000, 25_000])),
        drafts=draw(st.sampled_from([False, False, True])),
    )
