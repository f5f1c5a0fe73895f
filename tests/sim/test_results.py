"""Laws of results: every number is what its definition says of the records, in tables and files."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from sim_records import Run, add_sample, make_records
from twostroke.errors import InvalidParameter
from twostroke.sim.export import COLUMNS, check_parquet, write_csv, write_parquet
from twostroke.sim.records import Records
from twostroke.sim.results import get_spread, summarise

RUNS = (
    Run(arrival=0, first=100, gaps=(10, 30), ttft_target=100, itl_target=20, tenant="a"),
    Run(arrival=50, first=250, gaps=(10,), ttft_target=100, itl_target=20, tenant="b", cached=64),
    Run(arrival=60, first=160, ttft_target=100, itl_target=20, tenant="a", preemptions=2),
    Run(arrival=70, first=90, gaps=(50, 50), ttft_target=100, itl_target=20, tenant="b"),
    Run(arrival=80, fate="rejected", ttft_target=100, itl_target=20, tenant="b", replica=-1),
    Run(arrival=90, first=95, gaps=(1,), fate="cancelled", tenant="a", replica=1),
)


def test_a_percentile_is_a_value_that_so_many_percent_do_not_exceed() -> None:
    spread = get_spread(np.array([5.0, np.nan, 1, 2, 3, 4, 6, 7, 8, 9, 10]))
    assert (spread.p50_s, spread.p90_s, spread.p99_s, spread.count) == (5, 9, 10, 10)
    assert get_spread(np.array([np.nan])).count == 0


def test_times_follow_their_definitions() -> None:
    found = summarise(make_records(*RUNS, replicas=2), 10, 2.0)
    assert found.fates == {"live": 0, "finished": 4, "rejected": 1, "cancelled": 1, "failed": 0}
    assert (found.ttft.count, found.ttft.p50_s, found.ttft.p99_s) == (5, 0.1, 0.2)
    assert (found.tpot.count, found.tpot.p50_s) == (4, 0.01)
    assert found.itl.count == 6
    assert found.itl.p50_s == pytest.approx(0.01, rel=0.003)
    assert found.end_to_end.count == 4
    assert found.end_to_end.p99_s == 0.21
    assert found.queued.count == 5
    assert found.seconds == 0.26
    assert found.speed == 0.13


def test_counts_and_rates_are_of_all_that_was_sent() -> None:
    found = summarise(make_records(*RUNS, replicas=2), 10, 2.0)
    assert (found.requests, found.prompt_tokens, found.new_tokens) == (6, 600, 11)
    assert (found.cached_tokens, found.preemptions) == (64, 2)
    assert found.rates.requests_per_s == pytest.approx(4 / 0.26)
    assert found.rates.new_tokens_per_s == pytest.approx(11 / 0.26)


def test_goodput_counts_requests_that_finished_within_both_targets() -> None:
    goodput = summarise(make_records(*RUNS, replicas=2), 10, 2.0).goodput
    # The first keeps its TTFT and, in the mean, its ITL; the third has one token and no gap.
    assert (goodput.met, goodput.smooth) == (2, 1)
    assert goodput.share == pytest.approx(2 / 6)
    assert goodput.tokens_per_s == pytest.approx(4 / 0.26)
    assert (goodput.ttft_target_s, goodput.itl_target_s) == (0.1, 0.02)


def test_without_targets_whatever_finishes_is_good() -> None:
    runs = (Run(first=5, gaps=(900,)), Run(fate="failed"))
    assert summarise(make_records(*runs), 10, 1.0).goodput.share == 0.5


def test_a_request_that_is_planned_at_time_zero_was_planned() -> None:
    found = summarise(make_records(Run(arrival=0, first=1)), 10, 1.0)
    assert (found.queued.count, found.queued.p50_s) == (1, 0.0)


def test_use_is_measured_over_replicas_and_samples() -> None:
    records = make_records(*RUNS, replicas=2)
    for time_ms, blocks in ((0, 2), (10, 4), (20, 9)):
        add_sample(records, time_ms, blocks)
    records.totals[0].busy_ns = records.end_ns
    records.totals[0].steps, records.totals[0].step_rows = 4, 6
    records.totals[0].step_tokens, records.totals[0].prefill_tokens = 100, 75
    use = summarise(records, 10, 1.0).use
    assert (use.busy_mean, use.busy_least, use.busy_most) == (0.5, 0.0, 1.0)
    assert (use.kv_mean, use.kv_most) == (0.5, 0.9)
    assert (use.rows_per_step, use.tokens_per_step, use.prefill_share) == (1.5, 25, 0.75)


def test_tenants_are_shown_beside_each_other() -> None:
    first, second = summarise(make_records(*RUNS, replicas=2), 10, 1.0).tenants
    assert (first.tenant, first.requests, first.finished, first.new_tokens) == ("a", 3, 2, 6)
    assert (second.tenant, second.requests, second.finished) == ("b", 3, 2)
    assert summarise(make_records(Run(first=1)), 10, 1.0).tenants == ()


def test_an_empty_simulation_has_results() -> None:
    found = summarise(Records(1), 10, 0.0)
    assert (found.requests, found.seconds, found.speed, found.goodput.share) == (0, 0, 0, 0)


def test_a_csv_has_a_line_for_each_request_and_no_value_where_there_was_none(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.csv"
    write_csv(make_records(*RUNS, replicas=2), path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == len(RUNS)
    assert [row["ttft_s"] for row in rows[3:5]] == ["0.020000000", ""]
    assert [row["replica"] for row in rows[3:6]] == ["0", "", "1"]
    assert [row["met_targets"] for row in rows] == ["1", "0", "1", "0", "0", "0"]
    assert rows[5]["fate"] == "cancelled"
    assert rows[1]["tenant"] == "b"


def test_parquet_holds_what_the_csv_holds(tmp_path: Path) -> None:
    records = make_records(*RUNS, replicas=2)
    write_csv(records, tmp_path / "rows.csv")
    write_parquet(records, tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in COLUMNS:
        for row, value in zip(rows, table[name], strict=True):
            if value is None:
                assert row[name] == "", name
            else:
                assert type(value)(row[name]) == pytest.approx(value), name


def test_without_pyarrow_the_command_that_helps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidParameter, match=r'pip install "twostroke\[parquet\]"'):
        check_parquet()
