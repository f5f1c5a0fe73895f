"""Strides leave the records that stepping one by one leaves, whatever happens in between.

The proof that a simulation may take the steps between two events in one go. Everything recorded is
compared: every time of every request, token counts, preemptions, gaps, busy times and samples.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sim_strategies import draw_arrivals, draw_choices
from simulations import Scene, draw_by_last, make_replica_spec, show
from twostroke.exec.simulated import Draw, draw_zero
from twostroke.sim.arrivals import Arrival
from twostroke.sim.faults import (
    ClockJumps,
    ExecutorDies,
    ExecutorHangs,
    ExecutorSlows,
    Fault,
    StepDies,
)
from twostroke.sim.routers import ROUTERS

END_NS = 400_000


@st.composite
def draw_faults(draw: st.DrawFn, replicas: int) -> tuple[Fault, ...]:
    """Up to four faults of any kind."""
    faults = list[Fault]()
    for _ in range(draw(st.integers(0, 4))):
        time_ns, replica = draw(st.integers(0, END_NS)), draw(st.integers(0, replicas - 1))
        longer_ns = draw(st.integers(1, 60_000))
        faults.append(
            draw(
                st.sampled_from(
                    [
                        ExecutorDies(time_ns, replica),
                        ExecutorHangs(time_ns, replica),
                        ExecutorSlows(time_ns, replica, longer_ns, 100 + longer_ns % 900),
                        ClockJumps(time_ns, longer_ns),
                        StepDies(longer_ns % 80 + 1, replica),
                    ]
                )
            )
        )
    return tuple(faults)


@st.composite
def draw_scenes(draw: st.DrawFn) -> Scene:
    """A cluster of up to three replicas, often short of blocks, and all that happens to it."""
    replicas = draw(st.sampled_from([1, 1, 2, 3]))
    spec = make_replica_spec(
        num_blocks=draw(st.sampled_from([12, 20, 32, 64])),
        step_tokens=draw(st.sampled_from([16, 64])),
        max_rows=draw(st.sampled_from([2, 4, 8])),
        host_blocks=draw(st.sampled_from([0, 0, 10])),
        watermark_blocks=draw(st.sampled_from([0, 2])),
        cache_seed=draw(st.sampled_from(["", "model"])),
    )
    return Scene(
        replace(
            spec,
            restart_ns=draw(st.sampled_from([0, 5_000, None])),
            step_deadline_ns=draw(st.sampled_from([3_000, 20_000])),
        ),
        draw(draw_arrivals()),
        replicas,
        draw(st.sampled_from(ROUTERS)),
        draw(draw_faults(replicas)),
        draw(draw_choices()),
    )


@settings(max_examples=150, deadline=None)
@given(draw_scenes(), st.sampled_from([2, 7, 1_000]), st.sampled_from([draw_zero, draw_by_last]))
def test_strides_leave_the_records_of_single_steps(
    scene: Scene, max_iterations: int, draw: Draw
) -> None:
    single = scene.run(1, draw=draw)
    strides = scene.run(max_iterations, draw=draw)
    assert show(strides.records) == show(single.records)


@pytest.mark.parametrize("offset_ns", range(-3, 4))
def test_an_arrival_at_the_end_of_a_step_is_in_the_next(offset_ns: int) -> None:
    # A decode of one row takes 1,000 + 100 + one a key: the third step ends at a known time.
    first = Arrival(0, 4, 50)
    ends_ns = Scene(make_replica_spec(), (replace(first, new_tokens=3),)).run(1)
    third_ns = int(ends_ns.records.get_columns()["ended_ns"][0])
    scene = Scene(make_replica_spec(), (first, Arrival(third_ns + offset_ns, 4, 50)))
    assert show(scene.run(1_000).records) == show(scene.run(1).records)


def test_strides_are_taken_at_all() -> None:
    scene = Scene(make_replica_spec(), (Arrival(0, 8, 100),))
    plans = [scene.run(most).replicas[0].scheduler.counts for most in (1, 1_000)]
    assert plans[0] == plans[1]
    cluster = scene.run(1_000)
    assert cluster.records.totals[0].steps == 100
    assert cluster.clock.num_run < 10
