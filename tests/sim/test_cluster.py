"""A cluster: every request ends, once, with its times; whatever fails is replaced or said."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest

from simulations import Scene, get_column, make_replica_spec, run_one
from twostroke.core.types import Request
from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.faults import (
    ClockJumps,
    ExecutorDies,
    ExecutorHangs,
    ExecutorSlows,
    Fault,
    FaultRates,
    StepDies,
    draw_cancels,
    draw_faults,
)
from twostroke.sim.records import FATES
from twostroke.sim.routers import ROUTERS, make_router

# By the linear cost a prompt of four tokens takes 1,000 + 400 + 1 + 2 + 3 + 4, a decode of one row
# 1,100 and one for each key.
PREFILL_NS = 1_410


def test_the_times_of_one_request_are_those_of_its_steps() -> None:
    records = run_one([Arrival(500, 4, 3)])
    row = {name: int(column[0]) for name, column in records.get_columns().items()}
    assert row["arrival_ns"] == row["planned_ns"] == 500
    assert row["first_token_ns"] == 500 + PREFILL_NS
    assert row["last_token_ns"] == row["ended_ns"] == row["first_token_ns"] + 1_105 + 1_106
    assert row["worst_gap_ns"] == 1_106
    assert (row["new_tokens"], row["fate"]) == (3, FATES.index("finished"))
    assert [count for _, count in records.gaps.get_counts()] == [2]  # both in one bucket
    totals = records.totals[0]
    assert totals.busy_ns == row["ended_ns"] - 500 == records.end_ns - 500
    assert (totals.steps, totals.step_rows, totals.step_tokens) == (3, 3, 6)
    assert totals.prefill_tokens == 4


def test_requests_that_arrive_together_share_the_first_step() -> None:
    records = run_one([Arrival(0, 2, 1), Arrival(0, 2, 1)])
    assert records.totals[0].steps == 1


def test_an_arrival_in_the_middle_of_a_stride_waits_for_one_step_only() -> None:
    cluster = Scene(make_replica_spec(), (Arrival(0, 4, 100), Arrival(50_000, 4, 1))).run(1_000)
    planned_ns = get_column(cluster.records, "planned_ns")
    assert 50_000 <= planned_ns[1] < 50_000 + 1_200


def test_a_request_that_can_never_fit_is_rejected_and_leaves_the_router() -> None:
    spec = make_replica_spec(num_blocks=4)
    scene = Scene(spec, (Arrival(0, 100, 5), Arrival(1, 4, 5)), router="least-requests")
    records = scene.run(1).records
    assert records.count_fates()["rejected"] == records.count_fates()["finished"] == 1


def test_a_cancelled_request_keeps_the_tokens_it_had() -> None:
    records = run_one([Arrival(0, 4, 100, cancel_after_ns=5_000)])
    assert records.count_fates()["cancelled"] == 1
    assert get_column(records, "ended_ns") == [5_000]
    assert 1 < get_column(records, "new_tokens")[0] < 5


def test_a_cancel_after_the_end_changes_nothing() -> None:
    plain, late = run_one([Arrival(0, 4, 2)]), run_one([Arrival(0, 4, 2, cancel_after_ns=90_000)])
    assert get_column(plain, "ended_ns") == get_column(late, "ended_ns")
    assert late.count_fates()["finished"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        ExecutorDies(3_000, 0),
        ExecutorHangs(3_000, 0),
        ExecutorSlows(3_000, 0, 20_000, 300),
        ClockJumps(3_000, 40_000),
        StepDies(4, 0),
    ],
)
def test_a_fault_costs_time_and_no_token(fault: Fault) -> None:
    spec = replace(make_replica_spec(), restart_ns=10_000, step_deadline_ns=20_000)
    arrivals = (Arrival(0, 4, 30), Arrival(100, 9, 30))
    whole, broken = Scene(spec, arrivals).run(1_000), Scene(spec, arrivals, faults=(fault,))
    records = broken.run(1_000).records
    assert records.count_fates()["finished"] == 2
    assert get_column(records, "new_tokens") == [30, 30]
    assert records.end_ns > whole.records.end_ns
    is_lost = not isinstance(fault, ExecutorSlows | ClockJumps)
    assert records.totals[0].lost_executors == is_lost


def test_a_replaced_executor_begins_after_its_restart() -> None:
    spec = replace(make_replica_spec(), restart_ns=10_000)
    cluster = Scene(spec, (Arrival(0, 4, 1),), faults=(ExecutorDies(700, 0),)).run(1)
    assert get_column(cluster.records, "first_token_ns") == [700 + 10_000 + PREFILL_NS]


def test_a_replica_that_is_not_replaced_fails_what_it_has_and_gets_no_more() -> None:
    spec = replace(make_replica_spec(), restart_ns=None)
    arrivals = tuple(Arrival(time_ns, 4, 5) for time_ns in (0, 1, 2_000, 3_000))
    for router in ROUTERS:
        scene = Scene(spec, arrivals, 2, router, (ExecutorDies(500, 0),))
        records = scene.run(1).records
        assert records.count_fates() == {
            "live": 0,
            "finished": 3,
            "rejected": 0,
            "cancelled": 0,
            "failed": 1,
        }
        assert get_column(records, "replica") == [0, 1, 1, 1]


def test_with_no_replica_left_requests_are_rejected() -> None:
    spec = replace(make_replica_spec(), restart_ns=None)
    scene = Scene(spec, (Arrival(0, 4, 5), Arrival(900, 4, 5)), faults=(ExecutorDies(500, 0),))
    records = scene.run(1).records
    assert get_column(records, "fate") == [FATES.index("failed"), FATES.index("rejected")]
    assert get_column(records, "replica") == [0, -1]


def test_a_shared_prefix_is_cached_where_it_was_computed() -> None:
    spec = make_replica_spec(cache_seed="model")
    arrivals = (Arrival(0, 24, 2, (1, 2), 8), Arrival(50_000, 24, 2, (1, 3), 8))
    records = Scene(spec, arrivals).run(1).records
    assert get_column(records, "cached_tokens") == [0, 8]


def test_arrivals_are_pulled_when_their_time_has_come() -> None:
    pulled = list[int]()

    def arrive() -> Iterator[Arrival]:
        for index in range(100):
            pulled.append(index)
            ended = cluster.records.count_fates()["finished"]
            assert index - ended < 8
            yield Arrival(index * 20_000, 4, 5)

    cluster = Cluster(make_replica_spec(), 2, make_router("round-robin", 2))
    cluster.run(arrive())
    assert len(pulled) == 100


def test_nothing_of_a_request_stays_but_its_row() -> None:
    before = count_requests()
    cluster = Scene(make_replica_spec(), tuple(Arrival(at, 4, 5) for at in range(50)), 2).run(9)
    assert count_requests() == before
    assert len(cluster.records) == 50


def count_requests() -> int:
    """Requests in this process that something refers to."""
    gc.collect()
    # By type, which asks nothing of the object: some of other packages warn when they are asked.
    return sum(type(one) is Request for one in gc.get_objects())


def test_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="one at 4 ns comes behind one at 5 ns"):
        run_one([Arrival(5, 4, 1), Arrival(4, 4, 1)])


def test_faults_that_cannot_be_are_refused() -> None:
    scene = Scene(make_replica_spec(), ())
    for fault in (ExecutorDies(5, 1), StepDies(5, -1)):
        with pytest.raises(InvalidParameter, match="is of none of 1"):
            replace(scene, faults=(fault,)).run(1)
    with pytest.raises(InvalidParameter, match="step_deadline_ns"):
        replace(scene, faults=(ExecutorHangs(5, 0),)).run(1)


def test_faults_and_cancels_of_a_seed_are_always_the_same() -> None:
    rates = FaultRates(deaths=1.5, hangs=0.5, slowdowns=2.0, jumps=1.0)
    assert draw_faults(3, 4, 10**9, rates) == draw_faults(3, 4, 10**9, rates)
    assert draw_faults(3, 4, 10**9, rates) != draw_faults(4, 4, 10**9, rates)
    arrivals = [Arrival(time_ns, 4, 5) for time_ns in range(1_000)]
    cancelled = list(draw_cancels(arrivals, 1, 0.25, 500))
    assert cancelled == list(draw_cancels(arrivals, 1, 0.25, 500))
    assert 200 < sum(one.cancel_after_ns > 0 for one in cancelled) < 300
