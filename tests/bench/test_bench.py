"""Benchmarks: their arithmetic, their reports, and peers that will not start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from places import get_model_path
from tiny_models import TINY_SPECS
from twostroke.bench.engines import EngineCommand, start_engines
from twostroke.bench.report import Measurement, build_table, count_agreeing, describe, draw
from twostroke.bench.workloads import STANDARD, Workload, get_floor, make_prompt
from twostroke.spec.device import DeviceSpec

ECHO = """
import json, sys
print(json.dumps({"ready": "echo"}), flush=True)
for line in sys.stdin:
    print(json.dumps({"asked": json.loads(line)}), flush=True)
"""


def make_measurement() -> Measurement:
    """Three rounds: we take 1, 2 and 4 s for 100 tokens, the peer four times as long."""
    return Measurement(
        "decode",
        100,
        {"twostroke": [1.0, 2.0, 4.0], "peer": [4.0, 8.0, 16.0]},
        [0.5, 1.0, 2.0],
        {"peer": (3, 5)},
    )


def test_rates_shares_and_ratios_are_medians() -> None:
    one = make_measurement()
    assert one.get_rate("twostroke") == (50.0, 25.0, 100.0)
    assert one.get_share("twostroke") == 0.5
    assert one.get_share("peer") == 0.125
    assert one.get_ratio("peer") == 4.0


def test_a_report_names_every_engine_and_what_it_lacks(tmp_path: Path) -> None:
    alone = Measurement("prefill", 8, {"twostroke": [1.0]}, [0.25])
    [first, second] = describe([make_measurement(), alone], ["peer"])
    assert first["peer"]["ratio"] == 4.0
    assert first["peer"]["leading_tokens_equal"] == (3, 5)
    assert "peer" not in second
    table = build_table([make_measurement(), alone], ["peer"])
    assert list(table.columns[-1].cells) == ["4.00×", "–"]
    draw([make_measurement(), alone], ["peer"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_counts_leading_tokens() -> None:
    assert count_agreeing([1, 2, 3], [1, 2, 4]) == (2, 3)
    assert count_agreeing([1, 2], [1, 2]) == (2, 2)
    assert count_agreeing([1], [2]) == (0, 1)


def test_floors_grow_with_work_and_shrink_with_rates() -> None:
    spec = TINY_SPECS["llama"]
    slow = DeviceSpec("slow", 1e9, (("int8", 1e10), ("fp32", 1e9)), 1, 2**30)
    fast = DeviceSpec("fast", 2e9, (("int8", 2e10), ("fp32", 2e9)), 1, 2**30)
    for workload in STANDARD:
        more = Workload(workload.name, 2 * workload.prompt, 2 * workload.steps)
        floor = get_floor(spec, workload, slow)
        assert 0 < floor < get_floor(spec, more, slow)
        assert get_floor(spec, workload, fast) == pytest.approx(floor / 2)


def test_every_engine_gets_the_same_ordinary_tokens() -> None:
    spec = TINY_SPECS["llama"]
    prompt = make_prompt(spec, 300)
    assert prompt == make_prompt(spec, 300)
    assert all(0 <= token < spec.vocab_size for token in prompt)


def test_a_peer_that_does_not_start_is_reported_with_its_last_words() -> None:
    commands = [
        EngineCommand("echo", (sys.executable, "-c", ECHO)),
        EngineCommand("broken", (sys.executable, "-c", "raise SystemExit('no such library')")),
        EngineCommand("absent", ("/nonexistent/python", "x")),
    ]
    engines, refused = start_engines(commands)
    try:
        assert [engine.name for engine in engines] == ["echo"]
        assert engines[0].ask(op="prefill", tokens=[1]) == {
            "asked": {"op": "prefill", "tokens": [1]}
        }
    finally:
        for engine in engines:
            engine.close()
    assert "no such library" in refused["broken"]
    assert "absent" in refused


@pytest.mark.real_model
def test_the_last_line_of_a_benchmark_is_its_report() -> None:
    command = [
        sys.executable,
        "-m",
        "twostroke.bench",
        "--rounds",
        "1",
        "--workloads",
        "prefill-128",
    ]
    command += ["--model", str(get_model_path("smollm2-135m"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    [row] = report["workloads"]
    assert row["workload"] == "prefill-128"
    assert row["twostroke"]["tokens_per_s"] > 0
    assert report["limits"]["bytes_per_s"] > 0
    assert report["start"]["twostroke, start to first token"]["median"] > 0
