"""The columns a simulation leaves: exact sums, close percentiles, and no order dependence."""

from __future__ import annotations

import random

import numpy as np
import pytest

from twostroke.sim.arrivals import Arrival
from twostroke.sim.records import FATES, GapHistogram, Life, Records, Sample, StepSamples


def test_percentiles_of_gaps_are_within_half_a_percent() -> None:
    draw = random.Random(3)
    gaps = sorted(int(10 ** draw.uniform(0, 12)) for _ in range(5_000))
    histogram = GapHistogram()
    for gap in gaps:
        histogram.add(gap)
    for percent in (0.1, 1, 50, 90, 99, 99.9, 100):
        exact = gaps[max(1, int(np.ceil(percent / 100 * len(gaps)))) - 1]
        assert histogram.get_percentile_ns(percent) == pytest.approx(exact, rel=0.005, abs=0.5)


def test_many_gaps_count_as_each_of_them() -> None:
    draw = random.Random(4)
    one, many, merged = GapHistogram(), GapHistogram(), GapHistogram()
    for _ in range(200):
        base = draw.randrange(1, 10**9)
        gaps = [base + draw.randrange(draw.choice([2, 10**8])) for _ in range(draw.randrange(9))]
        weight = draw.randrange(1, 5)
        many.add_many(gaps, weight)
        for gap in gaps:
            one.add(gap, weight)
    merged.merge(one)
    merged.merge(many)
    assert one.get_counts() == many.get_counts()
    assert merged.total == 2 * one.total


def test_an_empty_histogram_has_percentile_zero() -> None:
    assert GapHistogram().get_percentile_ns(99) == 0.0


def test_samples_stay_bounded_and_do_not_depend_on_order() -> None:
    draw = random.Random(5)
    samples = [Sample(10 * at, who, 1, 2, 3, 4, at) for at in range(400) for who in range(3)]
    shown = []
    for _ in range(3):
        kept = StepSamples(most=100, period_ns=10)
        for sample in samples:
            kept.add(sample)
        assert len(kept) <= 100
        columns = kept.get_columns()
        shown.append((kept.period_ns, {name: rows.tolist() for name, rows in columns.items()}))
        draw.shuffle(samples)
    assert shown[0] == shown[1] == shown[2]
    times = shown[0][1]["time_ns"]
    assert times == sorted(times)
    assert all(time % shown[0][0] == 0 for time in times)


@pytest.mark.parametrize("seed", range(6))
def test_samples_merged_are_those_of_all_that_was_offered(seed: int) -> None:
    """However uneven the shares, of which each has a period of its own by then."""
    draw = random.Random(seed)
    shares, count = [StepSamples(most=50, period_ns=10) for _ in range(3)], draw.randrange(1, 900)
    whole = StepSamples(most=50, period_ns=10)
    for at in range(count):
        sample = Sample(10 * at, at % 7, 1, 2, 3, 4, at)
        whole.add(sample)
        draw.choices(shares, [1, seed, 40])[0].add(sample)
    draw.shuffle(shares)
    for other in shares[1:]:
        shares[0].merge(other)
    assert shares[0].period_ns == whole.period_ns
    merged, columns = shares[0].get_columns(), whole.get_columns()
    assert all(np.array_equal(merged[name], columns[name]) for name in columns)


def test_a_row_is_live_until_it_ends() -> None:
    records = Records(replicas=2)
    for index in range(5_000):
        records.add(Arrival(index, 10, 3, tenant=f"t{index % 2}"), index)
    life = Life(4_999, Arrival(4_999, 10, 3), 1, 5, 6, 26, 15, 2, 3, 1)
    records.end(life, 30, FATES.index("finished"))
    columns = records.get_columns()
    assert len(records) == len(columns["fate"]) == 5_000
    assert records.count_fates() == {
        "live": 4_999,
        "finished": 1,
        "rejected": 0,
        "cancelled": 0,
        "failed": 0,
    }
    last = {name: int(column[-1]) for name, column in columns.items()}
    assert last["arrival_ns"] == 4_999
    assert (last["planned_ns"], last["first_token_ns"], last["last_token_ns"]) == (5, 6, 26)
    assert (last["replica"], last["preemptions"], last["cached_tokens"]) == (1, 1, 2)
    assert [records.tenants[code] for code in columns["tenant"][:3]] == ["t0", "t1", "t0"]
    assert records.get_tpots_ns().tolist() == [10.0]


def test_a_sample_off_the_grid_is_not_kept() -> None:
    kept, sample = StepSamples(period_ns=10), Sample(20, 0, 1, 1, 1, 1, 1)
    kept.add(sample)
    kept.add(sample._replace(time_ns=25))
    assert kept.get_columns()["time_ns"].tolist() == [20]
