"""Bars, tables, pictures and the plain values behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench_support import make_measurement, make_result
from places import get_model_path
from twostroke.bench.bars import BARS, PEERS, Bar, Verdict, judge
from twostroke.bench.main import parse_arguments
from twostroke.bench.plot import draw
from twostroke.bench.report import build_tables, list_agreement, list_missing
from twostroke.bench.results import ModelResult
from twostroke.errors import InvalidParameter


def find_verdicts(what: str) -> list[Verdict]:
    return [one for one in judge(make_result()) if one.bar.what == what]


def test_a_rate_is_compared_with_the_best_peer_and_the_limit() -> None:
    ratio, share = find_verdicts("decode-0")
    assert (ratio.ours, ratio.peer, ratio.theirs, ratio.value) == (50.0, "llama.cpp", 12.5, 4.0)
    assert ratio.possible == 8.0
    assert ratio.word == "pass"
    assert (share.value, share.word) == (0.5, "miss")


def test_a_bar_that_the_limit_itself_misses_says_so() -> None:
    [burst] = find_verdicts("burst.output_tokens_per_s")
    assert (burst.peer, burst.value) == ("openvino", pytest.approx(2.0))
    assert burst.possible == pytest.approx(4.0)
    assert burst.word == "miss"
    assert replace(burst, possible=2.2).word == "miss (the limit forbids it)"


def test_a_ceiling_is_met_from_below() -> None:
    bar = Bar("start", (), 0.6, "s", is_ceiling=True)
    assert Verdict(bar, value=0.6).word == "pass"
    assert Verdict(bar, value=0.61).word == "miss"
    assert Verdict(replace(bar, is_ceiling=False), value=0.61).word == "pass"


def test_memory_is_compared_with_file_and_pool() -> None:
    [memory] = find_verdicts("memory")
    assert memory.value == 1.0
    assert memory.word == "pass"


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    for verdict in judge(ModelResult("smollm2-135m", "f", 1)):
        assert verdict.word == "not measured"
    assert judge(ModelResult("another", "f", 1)) == []


def test_every_bar_is_about_something_that_is_measured() -> None:
    workloads = parse_arguments([]).workloads
    for bar in (bar for bars in BARS.values() for bar in bars):
        assert bar.what.partition(".")[0] in [*workloads, "start", "memory"]
        assert set(bar.against) <= set(PEERS)


def test_tables_name_every_engine_what_it_reached_and_what_is_missing() -> None:
    result = make_result()
    alone = make_measurement("decode-1024")
    del alone.samples["llama.cpp"], alone.agreed["llama.cpp"]
    result.measurements.append(alone)
    console = Console(width=200)
    with console.capture() as capture:
        for table in build_tables(result):
            console.print(table)
    text = capture.get()
    for words in ("50 (25–100) 50%", "12 12% 4.00×", "–", "openvino", "1.00×", "pass", "miss"):
        assert words in text
    assert list_missing(result) == ["not measured: vllm: no such library"]
    [line] = list_agreement(result)
    assert "1 of 1 rows, 3 of 5" in line


def test_plain_values_hold_all_that_was_measured() -> None:
    plain = json.loads(json.dumps(make_result().describe()))
    [row] = plain["workloads"]
    assert row["llama.cpp"]["ratio"] == 4.0
    assert row["llama.cpp"]["agreement"]["leading_equal"] == 3
    assert row["twostroke"]["rounds"] == 3
    assert plain["served"]["openvino"][0]["burst"]["output_tokens_per_s"] == 1.5
    assert plain["peak_over_file_and_kv"] == 1.0
    assert plain["not_measured"] == {"vllm": "no\nsuch library"}


def test_a_picture_is_drawn_of_whatever_there_is(tmp_path: Path) -> None:
    result = make_result()
    result.measurements.append(make_measurement("batch-2"))
    draw(result, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    draw(ModelResult("nothing", "f", 1), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_arguments_choose_engines_and_workloads() -> None:
    options = parse_arguments(["--engines", "vllm,twostroke", "--workloads", "burst,prefill-512"])
    assert options.engines == ["twostroke", "vllm"]
    assert options.workloads == ["prefill-512", "burst"]
    assert parse_arguments(["--workloads", "none"]).workloads == []
    with pytest.raises(InvalidParameter, match="no 'nobody'; known are twostroke"):
        parse_arguments(["--engines", "nobody"])


@pytest.mark.real_model
def test_the_last_line_of_a_benchmark_is_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twostroke.bench", "--engines", "twostroke", "--rounds", "1"]
    command += ["--workloads", "prefill-128,batch-2,burst", "--burst", "3", "--peers", "."]
    command += ["--models", str(get_model_path("smollm2-135m")), "--plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    [model] = report["models"]
    assert [row["workload"] for row in model["workloads"]] == ["prefill-128", "batch-2"]
    assert all(row["twostroke"]["tokens_per_s"] > 0 for row in model["workloads"])
    assert model["served"]["twostroke"][0]["burst"]["failed"] == 0
    assert model["start"]["twostroke, start to first token"]["median"] > 0
    assert report["limits"]["bytes_per_s"] > 0
    assert len(list(tmp_path.glob("*.png"))) == 1
