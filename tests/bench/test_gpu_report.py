"""Bars, tables and pictures of GPU runs, and runs put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_runs import CARD, describe_cell, make_predicted_run, make_run, make_step
from twostroke.bench.gpu.bars import Verdict, judge
from twostroke.bench.gpu.main import parse_arguments, run
from twostroke.bench.gpu.plot import draw
from twostroke.bench.gpu.report import list_steps, write_report
from twostroke.bench.gpu.results import Run, list_missing, list_rows, load, save
from twostroke.bench.gpu.workloads import MODELS, Cell, get_cell_work, get_model
from twostroke.errors import TwostrokeError
from twostroke.plan.roofline_cost import CAPTURED

DECODE = Cell("decode", 1, 1, 2048)


def find(verdicts: list[Verdict], words: str) -> Verdict:
    [found] = [one for one in verdicts if words in one.what]
    return found


def test_without_measurements_no_bar_is_met_or_missed() -> None:
    assert {one.word for one in judge([make_run()], None)} == {"not measured"}


def test_a_share_of_bandwidth_counts_weights_and_keys_over_the_copy_rate() -> None:
    one = make_run()
    moved = get_cell_work(get_model("llama-2-7b"), DECODE).bytes
    one.add("steps", [make_step("llama-2-7b", DECODE, moved / (0.9 * CARD.copy_bandwidth))])
    found = find(judge([one], None), "batch 1, context 2,048: of bandwidth")
    assert found.value == pytest.approx(0.9)
    assert found.word == "pass"


def test_exact_steps_do_not_count_for_the_bars() -> None:
    one = make_run()
    one.add("steps", [make_step("llama-2-7b", DECODE, 1e-9, exact=True)])
    assert find(judge([one], None), "batch 1, context 2,048: of bandwidth").value is None


def test_ratios_are_of_the_same_step() -> None:
    one = make_run()
    one.add("steps", [make_step("llama-3.1-8b", DECODE, 0.006)])
    one.add("steps", [make_step("llama-3.1-8b-int4", DECODE, 0.002)])
    assert find(judge([one], None), "INT4").value == pytest.approx(3.0)


def test_serving_is_judged_by_throughput_and_by_tpot() -> None:
    one = make_run()
    for engine, rate, tpot in (("twostroke", 4000.0, 0.02), ("transformers", 1000.0, 0.1)):
        row = {"output_tokens_per_s": rate, "tpot_s_mean": tpot}
        one.add("served", [{"model": "llama-3.1-8b", "engine": engine, **row}])
    verdicts = judge([one], None)
    assert find(verdicts, "tokens/s").value == pytest.approx(4.0)
    assert find(verdicts, "TPOT").value == pytest.approx(0.2)
    assert {find(verdicts, "tokens/s").word, find(verdicts, "TPOT").word} == {"pass"}


def test_an_idle_device_is_the_share_of_a_step_that_it_does_not_work() -> None:
    one = make_run()
    row = {**describe_cell("llama-3.1-8b", Cell("decode", 32, 1, 2048)), "device_s": 0.0096}
    one.add("gap", [{**row, "wall_s": 0.01, "wall_mean_s": 0.01, "steps": 60}])
    found = find(judge([one], None), "gap")
    assert found.value == pytest.approx(0.04)
    assert found.word == "miss"


def test_of_two_runs_the_later_counts() -> None:
    runs = [make_run(), make_run()]
    for one, seconds in zip(runs, (0.1, 0.2), strict=True):
        one.add("steps", [make_step("llama-2-7b", DECODE, seconds)])
    [(found, row)] = list_rows(runs, "steps")
    assert (found, row["seconds"]) == (runs[1], 0.2)


def test_what_another_run_measured_is_not_missing() -> None:
    first, second = make_run(), make_run()
    first.missing = {"llama-2-7b decode-1x2048": "time", "llama-2-7b prefill-8192": "context"}
    second.add("steps", [make_step("llama-2-7b", DECODE, 0.1)])
    assert list_missing([first, second]) == {"llama-2-7b prefill-8192": "context"}


def test_results_are_read_back_as_they_were_saved(tmp_path: Path) -> None:
    one = make_predicted_run(CAPTURED)
    save([one], tmp_path / "results.json")
    assert load(tmp_path / "results.json") == [one]
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"runs": [{"about": 1}]}')
    with pytest.raises(TwostrokeError, match=r"other\.json"):
        load(path)


def make_full_run() -> Run:
    """A run with something in every section."""
    one = make_predicted_run(CAPTURED, MODELS[:1])
    one.add("steps", [make_step("llama-2-7b", DECODE, 0.01, exact=True)])
    for engine in ("twostroke", "pytorch", "transformers"):
        spread = {"seconds": 0.01, "lowest": 0.01, "highest": 0.01, "repeats": 5}
        row = {**describe_cell("llama-2-7b", DECODE), "engine": engine, **spread}
        one.add("peers", [row])
        summary = {"requests": 8, "finished": 8, "output_tokens_per_s": 100.0, "trace": "a few"}
        one.add("served", [{"model": "llama-3.1-8b", "engine": engine, **summary}])
    times = {"ours_s": 0.001, "sdpa_s": 0.001, "flash_s": 0.0012, "error": 1e-4}
    for name, tokens in (("prefill-8192", 8192), ("decode-32x2048", 1)):
        sizes = {"tokens": tokens, "flops": 10**12, "kv_bytes": 10**9}
        one.add("attention", [{"name": name, **sizes, **times}])
    walls = {"device_s": 0.01, "wall_s": 0.0101, "wall_mean_s": 0.0102, "steps": 60}
    one.add("gap", [{**describe_cell("llama-3.1-8b", DECODE), **walls}])
    one.missing["gpt-3-stand-in-int4"] = "does not fit"
    return one


def test_the_report_has_a_table_for_every_section() -> None:
    one = make_full_run()
    text = write_report([one], judge([one], None), None)
    for title in ("ceilings", "Bars", "Steps", "Peers", "Attention", "exactness", "gap", "Served"):
        assert title in text
    assert "gpt-3-stand-in-int4: does not fit" in text
    assert text.count("| llama-2-7b | decode-1x2048 |") == 3


def test_shares_in_the_report_are_of_the_floor() -> None:
    one = make_run()
    one.add("steps", [make_step("llama-2-7b", DECODE, 0.01)])
    [line] = list_steps([one], None)
    moved = get_cell_work(get_model("llama-2-7b"), DECODE).bytes
    assert line.bound_by == "memory"
    assert line.floor_s == pytest.approx(moved / CARD.copy_bandwidth, rel=1e-3)
    assert line.share == pytest.approx(line.floor_s / 0.01)


def test_a_picture_is_drawn_of_steps_and_not_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "steps.png"
    assert not draw([], path, "card")
    assert not path.exists()
    assert draw(list_steps([make_full_run()], None), path, "card")
    assert path.stat().st_size > 10_000


def test_merged_runs_are_reported_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_run(), make_run()
    first.add("steps", [make_step("llama-2-7b", DECODE, 0.01)])
    save([first], tmp_path / "first.json")
    save([second], tmp_path / "second.json")
    merge = [str(tmp_path / name) for name in ("first.json", "second.json")]
    run(parse_arguments(["--merge", *merge, "--out", str(tmp_path / "out")]))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(summary["ceilings"]) == 2
    assert {"what", "value", "result"} <= set(summary["bars"][0])
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "results.png"}
