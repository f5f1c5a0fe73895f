"""Rounds of measurements: who is asked, how often, and what is checked."""

from __future__ import annotations

from typing import Any

import pytest

from bench_support import FakeEngine, answer_plainly, die, make_bench, make_measurement
from twostroke.bench import measure
from twostroke.bench.results import Agreement, compare_tokens
from twostroke.bench.workloads import Workload
from twostroke.errors import TwostrokeError

PREFILL = Workload("prefill-8", "prefill", 8)
DECODE = Workload("decode-0", "decode", 8, 2)
BATCH = Workload("batch-2", "batch", 8, 2, 2)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)


def test_the_first_round_does_not_count() -> None:
    ours, peer = FakeEngine("twostroke", answer_plainly), FakeEngine("llama.cpp", answer_plainly)
    result = make_bench([ours, peer], rounds=3).measure(DECODE)
    assert ours.asked == peer.asked == 4
    assert len(result.samples["twostroke"]) == len(result.samples["llama.cpp"]) == 3
    assert result.agreed["llama.cpp"] == Agreement(1, 1, 3, 3)


def test_an_engine_that_spent_its_seconds_is_measured_once_and_not_asked_again() -> None:
    ours = FakeEngine("twostroke", answer_plainly)
    slow = FakeEngine("transformers", answer_plainly, pause_s=0.03)
    result = make_bench([ours, slow], rounds=3, budget_s=0.02).measure(DECODE)
    assert (ours.asked, slow.asked) == (4, 1)
    assert len(result.samples["transformers"]) == 1


def test_what_would_take_too_long_is_not_begun() -> None:
    peer = FakeEngine("transformers", answer_plainly)
    bench = make_bench([FakeEngine("twostroke", answer_plainly), peer], longest_s=2.0)
    bench.measure(PREFILL)  # eight tokens a second
    asked = peer.asked
    result = bench.measure(Workload("prefill-24", "prefill", 24))
    assert peer.asked == asked
    assert "2 s" in result.missing["transformers"]


def test_a_peer_that_dies_is_reported_and_the_others_go_on() -> None:
    ours, peer = FakeEngine("twostroke", answer_plainly), FakeEngine("vllm", die)
    bench = make_bench([ours, peer])
    result = bench.measure(DECODE)
    assert result.missing == bench.ended == {"vllm": "out of memory"}
    assert peer.is_closed
    assert len(result.samples["twostroke"]) == 2
    assert "vllm" not in bench.measure(DECODE).samples


def test_what_an_engine_cannot_do_is_reported() -> None:
    peer = FakeEngine("vllm", lambda turn, request: {"refused": "no batches"})
    result = make_bench([FakeEngine("twostroke", answer_plainly), peer]).measure(BATCH)
    assert result.missing == {"vllm": "no batches"}
    assert peer.asked == 1


def test_a_workload_longer_than_the_context_is_reported() -> None:
    ours = FakeEngine("twostroke", answer_plainly)
    result = make_bench([ours]).measure(Workload("prefill-8000", "prefill", 8000))
    assert ours.asked == 0
    assert "640 tokens" in result.missing["twostroke"]


def test_our_tokens_must_be_the_same_in_every_round() -> None:
    def change(turn: int, request: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": 1.0, "tokens": [turn]}

    with pytest.raises(TwostrokeError, match="changed between rounds"):
        make_bench([FakeEngine("twostroke", change)]).measure(DECODE)


def test_our_rows_must_be_the_same_in_every_batch() -> None:
    def mix(turn: int, request: dict[str, Any]) -> dict[str, Any]:
        rows = len(request["prompts"])
        return {"seconds": 1.0, "tokens": [[row, rows] for row in range(rows)]}

    bench = make_bench([FakeEngine("twostroke", mix)])
    bench.measure(BATCH)
    with pytest.raises(TwostrokeError, match="row 0 differs"):
        bench.measure(Workload("batch-4", "batch", 8, 2, 4))


def test_rates_shares_and_ratios_are_medians() -> None:
    one = make_measurement()
    assert one.get_rate("twostroke") == (50.0, 25.0, 100.0)
    assert one.get_share("twostroke") == 0.5
    assert one.get_share("llama.cpp") == 0.125
    assert one.get_ratio("llama.cpp") == 4.0


def test_agreement_counts_leading_tokens_of_every_row() -> None:
    assert compare_tokens([1, 2, 3], [1, 2, 4]) == Agreement(1, 1, 2, 3)
    assert compare_tokens([1], [2]) == Agreement(0, 1, 0, 1)
    rows = compare_tokens([[1, 2], [3, 4]], [[1, 2], [5, 4]])
    assert rows == Agreement(1, 2, 2, 4)
