"""`twostroke advise` reads what `/metrics` says, and says where there is nothing to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from twostroke.cli.advise import format_advice, format_beside, read_plan, read_snapshot
from twostroke.cli.fetch import fetch_text
from twostroke.errors import InvalidParameter
from twostroke.plan.advice import Snapshot, advise
from twostroke.plan.beside import Comparison

PAGE = """# TYPE twostroke_steps counter
twostroke_steps_total 200.0
# TYPE twostroke_step_wall_seconds counter
twostroke_step_wall_seconds_total 10.0
# TYPE twostroke_step_floor_seconds counter
twostroke_step_floor_seconds_total 4.0
# TYPE twostroke_step_cause_seconds counter
twostroke_step_cause_seconds_total{cause="bandwidth"} 7.0
twostroke_step_cause_seconds_total{cause="idle"} 2.0
# TYPE twostroke_generation_tokens counter
twostroke_generation_tokens_total 220.0
# TYPE twostroke_kv_cache_usage_ratio gauge
twostroke_kv_cache_usage_ratio 0.25
"""


def test_a_page_becomes_the_snapshot_it_says() -> None:
    snapshot = read_snapshot(PAGE)
    assert snapshot.steps == 200
    assert snapshot.cause_seconds == {"bandwidth": 7.0, "idle": 2.0}
    assert snapshot.busy_seconds == 8.0
    assert snapshot.limit_share == 0.5
    assert snapshot.kv_usage == 0.25


def test_what_is_printed_names_the_gain_and_the_evidence() -> None:
    snapshot = read_snapshot(PAGE)
    text = format_advice(snapshot, advise(snapshot))
    assert "at 50% of this machine's limit" in text
    assert "1. send more requests at once" in text
    assert "at most 44%" in text


def test_it_says_so_when_nothing_helps_and_when_it_cannot_tell() -> None:
    assert "Too few steps" in format_advice(Snapshot(steps=3), [])
    assert "No change would help" in format_advice(Snapshot(steps=300), [])


@pytest.mark.parametrize("page", ["<html>", "# TYPE other counter\nother_total 1.0\n", ""])
def test_another_servers_page_is_refused(page: str) -> None:
    with pytest.raises(InvalidParameter):
        read_snapshot(page)


def test_an_address_that_is_none_is_refused_by_name() -> None:
    for url in ("ftp://x", "127.0.0.1:1", "http://127.0.0.1:1"):
        with pytest.raises(InvalidParameter, match="url"):
            fetch_text(url, "/metrics")


def test_a_plan_is_the_last_line_of_what_was_printed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("", "no plan\n", '{"demand": {}}\n', "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidParameter, match="plan"):
            read_plan(path)
    with pytest.raises(InvalidParameter, match="cannot read"):
        read_plan(tmp_path / "none")
    pool = '{"replicas": 1, "rows": 2}'
    best = f'{{"pools": [{pool}], "tpot_mean_s": 0.1, "growth": 2, "breaks_first": "rows"}}'
    demand = '{"rate": 1, "prompt_tokens": 2, "new_tokens": 3}'
    path.write_text(f'a table\n{{"demand": {demand}, "plans": [{best}]}}\n', encoding="utf-8")
    assert read_plan(path).most_rate == 2.0


def test_beside_a_plan_it_says_what_was_seen_or_that_nothing_was() -> None:
    assert "no request has ended" in format_beside([], [])
    found = [Comparison("time a token", 20.0, 30.0, " ms")]
    assert "planned 20 ms, seen 30 ms (+50%)" in format_beside(found, [])
    assert format_beside(found, ["slow"]).endswith("slow")
