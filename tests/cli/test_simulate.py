"""Laws of `twostroke simulate`: what it prints is what happened, and mistakes say what is valid."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from places import SHARED
from twostroke.cli import simulate as simulate_module
from twostroke.cli.fault_options import parse_faults
from twostroke.cli.options import SchedulingOptions
from twostroke.cli.question_options import LoadOptions, SimulatedMachineOptions, SimulationOutput
from twostroke.cli.settings import check_name
from twostroke.cli.simulate import build_simulation, run_simulate
from twostroke.cli.simulated import resolve_hardware
from twostroke.errors import InvalidParameter, TwostrokeError
from twostroke.sim.sources import Fitted

CONV = str(SHARED / "traces" / "azure2023_conv.csv")
ONE = SimulatedMachineOptions(model="llama-2-7b", device="a100-80gb")
POISSON = LoadOptions(workload="poisson", rate="2", requests="40", new_tokens="20")


def simulate(
    capsys: pytest.CaptureFixture[str],
    machine: SimulatedMachineOptions = ONE,
    load: LoadOptions = POISSON,
    scheduling: SchedulingOptions | None = None,
    output: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """The results as JSON, which is the last line printed."""
    asked = SimulationOutput(output=[str(path) for path in output], json=True)
    run_simulate(machine, load, scheduling or SchedulingOptions(), asked)
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_every_request_ends_and_every_number_is_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = simulate(capsys)
    assert found["requests"] == 40
    assert found["fates"] == {
        "live": 0, "finished": 40, "rejected": 0, "cancelled": 0, "failed": 0,
    }  # fmt: skip
    assert found["new_tokens"] == 800
    assert found["itl"]["count"] == 760


def test_what_is_printed_names_every_choice_and_result(capsys: pytest.CaptureFixture[str]) -> None:
    run_simulate(ONE, POISSON, SchedulingOptions(itl_target_ms=100.0), SimulationOutput())
    text = capsys.readouterr().out
    for words in ("llama-2-7b", "less 10% for activations", "a target between tokens is given",
                  "poisson", "TTFT", "TPOT", "ITL", "end to end", "goodput", "throughput",
                  "KV pool", "preemptions", "prefix cache", "replicas", "steps",
                  "simulated seconds in a second"):  # fmt: skip
        assert words in text, words
    assert "{" not in text


def test_a_simulation_repeats_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for _ in range(2):
        found = simulate(capsys, load=LoadOptions(workload="gamma", rate="3", requests="30"))
        del found["real_seconds"], found["simulated_s_per_s"]
        runs.append(found)
    assert runs[0] == runs[1]


def test_round_robin_on_two_cores_prints_what_one_core_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SimulatedMachineOptions(
        model="llama-2-7b", device="a100-80gb", replicas=3, router="round-robin"
    )
    load = LoadOptions(
        workload="poisson:tenants=3,prefix=0.2", rate="40", requests="2000", new_tokens="8",
        prompt_tokens="lognormal:900:2", faults="cancels=0.1,patience=0.1",
    )  # fmt: skip
    runs, counts = [], []
    run = simulate_module.run_parts
    monkeypatch.setattr(
        simulate_module, "run_parts", lambda *given: [counts.append(given[-1]), run(*given)][1]
    )
    for cores in (1, 2):
        monkeypatch.setattr(simulate_module, "count_processors", lambda cores=cores: cores)
        found = simulate(capsys, machine, load)
        del found["real_seconds"], found["simulated_s_per_s"]
        runs.append(found)
    assert counts == [1, 2]
    assert runs[0] == runs[1]
    assert runs[0]["fates"]["cancelled"]
    assert runs[0]["clipped"]["requests"] == 2_000
    assert runs[0]["clipped"]["clipped"]


@pytest.mark.parametrize("router", ["round-robin", "least-tokens"])
@pytest.mark.parametrize("faults", [None, "deaths=1", "jumps=0.1", "cancels=0.5"])
def test_only_independent_replicas_are_split_over_cores(
    monkeypatch: pytest.MonkeyPatch, router: str, faults: str | None
) -> None:
    counts = list[int]()
    monkeypatch.setattr(simulate_module, "count_processors", lambda: 2)
    monkeypatch.setattr(
        simulate_module, "run_parts", lambda make, arrive, count: counts.append(count)
    )
    machine = SimulatedMachineOptions(
        model="llama-2-7b", device="a100-80gb", replicas=2, router=router
    )
    load = LoadOptions(workload="poisson", rate="9", requests="5000", faults=faults)
    simulate_module.simulate(build_simulation(machine, load, SchedulingOptions()), Fitted())
    is_split = router == "round-robin" and faults in (None, "cancels=0.5")
    assert counts == [2 if is_split else 1]


def test_another_seed_is_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    loads = (LoadOptions(workload="poisson", rate="3", requests="30", seed=n) for n in (1, 2))
    first, second = (simulate(capsys, load=load)["ttft"] for load in loads)
    assert first != second


def test_files_hold_every_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"run{ending}" for ending in (".csv", ".parquet", ".png", ".svg"))
    simulate(capsys, output=paths)
    with paths[0].open() as file:
        assert len(list(csv.DictReader(file))) == 40
    assert parquet.read_table(paths[1]).num_rows == 40
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_trace_is_cut_to_the_context_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    machine = SimulatedMachineOptions(model="llama-2-7b", device="a100-80gb", replicas=4)
    run_simulate(
        machine, LoadOptions(trace=CONV, requests="200"), SchedulingOptions(), SimulationOutput()
    )
    assert "of 200 requests" in capsys.readouterr().out


def test_prompts_that_share_a_beginning_hit_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    load = LoadOptions(workload="poisson:prefix=0.5", rate="2", requests="40", new_tokens="20")
    found = simulate(capsys, load=load)
    # Each but the first few, which come before the first is computed, finds half of its prompt.
    assert 35 * 256 <= found["cached_tokens"] <= 39 * 256
    assert simulate(capsys)["cached_tokens"] == 0


def test_faults_happen_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    load = LoadOptions(
        workload="poisson", rate="4", requests="100", faults="deaths=2,cancels=0.3,patience=0.1"
    )
    found = simulate(capsys, load=load)
    fates = found["fates"]
    # Two deaths may hit one request's steps in a row, which is then taken for their cause.
    ended = fates["finished"] + fates["cancelled"] + fates["failed"]
    assert ended == 100
    assert fates["failed"] <= 1
    assert fates["cancelled"] > 10
    assert found["use"]["lost_executors"] == 2


@pytest.mark.parametrize("router", ["round-robin", "least-requests", "prefix-aware"])
@pytest.mark.parametrize("policy", ["fair", "shortest", "deadline"])
def test_routers_and_policies_go_together(
    capsys: pytest.CaptureFixture[str], router: str, policy: str
) -> None:
    machine = SimulatedMachineOptions(
        model="llama-2-7b", device="a100-80gb", replicas=2, router=router
    )
    load = LoadOptions(workload="poisson:tenants=2,prefix=0.3", rate="8", requests="30")
    found = simulate(capsys, machine, load, SchedulingOptions(policy=policy, ttft_target_ms=900.0))
    assert found["fates"]["finished"] == 30


def test_the_least_devices_that_a_model_fits_are_named_and_do_fit() -> None:
    with pytest.raises(InvalidParameter, match=r"--tp 2 is the least that fits; or .*:q8_0"):
        resolve_hardware(SimulatedMachineOptions(model="llama-2-70b", device="a100-80gb"))
    two = SimulatedMachineOptions(model="llama-2-70b", device="a100-80gb", tp=2)
    assert resolve_hardware(two).num_blocks > 0


def test_the_pool_is_what_weights_leave() -> None:
    hardware = resolve_hardware(ONE)
    left = 0.9 * 80e9 - hardware.spec.weight_bytes
    assert hardware.num_blocks * hardware.block_bytes == pytest.approx(left, rel=1e-3)


def test_more_devices_than_heads_of_keys_hold_heads_twice() -> None:
    """Of 8 heads on 16 devices each is held twice, so half of the memory holds copies."""
    machine = SimulatedMachineOptions(model="llama-2-70b", device="a100-80gb", tp=16)
    hardware = resolve_hardware(machine)
    left = 16 * 0.9 * 80e9 - hardware.spec.weight_bytes
    assert hardware.num_blocks * hardware.block_bytes == pytest.approx(left / 2, rel=1e-2)


def test_a_smaller_format_leaves_more_for_keys_and_values() -> None:
    small = SimulatedMachineOptions(model="llama-2-7b:q4_0", device="a100-80gb")
    assert resolve_hardware(small).num_blocks > resolve_hardware(ONE).num_blocks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": None}, "model: give one with --model: smollm2-135m"),
        ({"model": "llama-2-7"}, "model: there is no 'llama-2-7'; did you mean llama-2-7b"),
        ({"model": "llama-2-7b:q3"}, "q8_0"),
        ({"device": None}, "device: give one with --device: a100-40gb"),
        ({"device": "h100"}, "device: there is no 'h100'; did you mean h100"),
        ({"device": "h100-sxm:fast"}, "device: there is no 'fast'.* eager, captured, twostroke"),
        ({"device": "none.toml"}, "none.toml: cannot be read"),
        ({"tp": 3}, "tp: .* it can be 1, 2, 4"),
        ({"model": "llama-3.1-405b"}, "tp: .*--tp 16 is the least that fits"),
        ({"router": "least"}, "router: there is no 'least'; did you mean least-"),
        ({"kv_memory": "99TiB"}, "kv_memory: must be at most"),
        ({"kv_memory": "7"}, "kv_memory: must hold one block"),
        ({"kv_memory": "lots"}, "kv_memory: must be a size such as"),
        ({"step_tokens": 0}, "step_tokens: must be from 1"),
        ({"max_rows": 4096}, "max_rows: must be at most the 2,048 step_tokens"),
        ({"replicas": 0}, "replicas: must be from 1"),
    ],
)
def test_hardware_that_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    asked: dict[str, Any] = {"model": "llama-2-7b", "device": "a100-80gb", **changes}
    with pytest.raises(TwostrokeError, match=expected):
        build_simulation(
            SimulatedMachineOptions(**asked),
            POISSON,
            SchedulingOptions(),
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"policy": "fairly"}, "policy: there is no 'fairly'; did you mean fair"),
        ({"pace": "slow"}, "pace: there is no 'slow'.* fixed, load, target, static"),
        ({"itl_target_ms": 1.0}, "itl_target_ms: 1 ms cannot be kept: one decode alone is"),
        ({"itl_target_ms": 0.0}, "itl_target_ms: must be above 0"),
        ({"ttft_target_ms": -5.0}, "ttft_target_ms: must be above 0"),
        ({"ttft_target_ms": float("nan")}, "ttft_target_ms: must be above 0"),
        ({"ttft_target_ms": 2.0}, "ttft_target_ms: .* the shortest prompt, 512 tokens alone,"),
    ],
)
def test_targets_and_policies_that_cannot_be_are_refused(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidParameter, match=f"^{expected}"):
        build_simulation(ONE, POISSON, SchedulingOptions(**changes))


def test_the_smallest_possible_target_is_accepted() -> None:
    with pytest.raises(InvalidParameter) as caught:
        build_simulation(ONE, POISSON, SchedulingOptions(itl_target_ms=1.0))
    least_ms = float(str(caught.value).split()[-2])
    build_simulation(ONE, POISSON, SchedulingOptions(itl_target_ms=least_ms))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "'' must be one of: deaths="),
        ("death=1", "'death=1' must be one of: deaths="),
        ("deaths", "'deaths' must be one of"),
        ("deaths=-1", "deaths must be a number from 0"),
        ("cancels=2", "cancels must be a number from 0 to 1"),
        ("restart=nan", "restart must be a number"),
    ],
)
def test_faults_that_cannot_be_are_refused(text: str, expected: str) -> None:
    with pytest.raises(InvalidParameter, match="faults: ") as caught:
        parse_faults(text)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", "must end in one of .csv, .parquet, .png, .svg"),
        ("none/a.csv", "there is no folder"),
        ("folder.csv", "cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    # The load cannot be either, but files are looked at first.
    with pytest.raises(InvalidParameter, match=f"output: .*{expected}"):
        run_simulate(
            ONE, LoadOptions(), SchedulingOptions(), SimulationOutput(output=[str(tmp_path / name)])
        )


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(InvalidParameter, match="there is no 'xyz'; choose from one, two"):
        check_name("thing", "xyz", ("one", "two"))


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['twostroke', 'simulate', '--model', 'llama-2-7b', '--device', 'h200',\n"
        "            '--workload', 'poisson', '--rate', '1', '--requests', '3']\n"
        "from twostroke.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = 'torch twostroke._native tokenizers typer matplotlib pyarrow fastapi jinja2'\n"
        "found = [name for name in heavy.split() if name in sys.modules]\n"
        "assert not found, found\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
