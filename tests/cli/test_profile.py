"""`twostroke profile`: its parts sum to the wall time, and are what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_files import make_gguf
from tiny_models import TINY_SPECS
from twostroke.cli.options import MachineOptions, ProfileOptions
from twostroke.cli.profile import (
    CALL_REST,
    LOOP_REST,
    RESTS,
    Profile,
    Sample,
    build_profiles,
    build_table,
    run_profile,
)
from twostroke.errors import InvalidParameter
from twostroke.exec.local import StepTimes
from twostroke.spec.device import DeviceSpec

DEVICE = DeviceSpec("cpu", 1e10, (("int8", 1e12), ("fp32", 1e11)), 2, 2**33)
OPTIONS = ProfileOptions(prompt_tokens=32, new_tokens=4)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    recipe = make_gguf("llama")
    kind, tokens, element = recipe.keys["tokenizer.ggml.tokens"]
    merged = ["t", "0", "1", "t0", "t1"]
    recipe.keys["tokenizer.ggml.tokens"] = (kind, merged + tokens[len(merged) :], element)
    return recipe.write(tmp_path / "tiny.gguf")


def make_run() -> list[Sample]:
    """A prefill of two steps, then six decode steps, each with something left over everywhere."""
    samples, at = [], 1000
    each = {"arrays": 15, "compute": 900, "results": 10, "commit": 20, "plan": 22, "deliver": 8}
    for index, tokens in enumerate((16, 16, 1, 1, 1, 1, 1, 1)):
        ops = {"q": 300 + index, "attention": 200, "merge": 5, "gate+up": 400, "head": 90}
        run_ns = sum(ops.values()) + 60
        engine = {name: index * part_ns for name, part_ns in each.items()}
        times = StepTimes(at, run_ns, run_ns - 25, tokens, 1)
        samples.append(Sample(times, ops, watch_ns=40, engine=engine))
        at += run_ns + 70 + 40
    return samples


def build() -> tuple[Profile, Profile]:
    return build_profiles([make_run()] * 3, TINY_SPECS["llama"], OPTIONS, DEVICE)


def test_parts_sum_to_the_wall_time() -> None:
    for profile in build():
        assert sum(part.seconds for part in profile.parts) == pytest.approx(profile.wall_s)


def test_what_is_left_over_is_told_apart() -> None:
    prefill, decode = build()
    rests = {part.name: part.seconds * 1e9 for part in decode.parts}
    assert rests[CALL_REST] == pytest.approx(35)
    python = {name: rests[f"Python: {name}"] for name in ("arrays", "results", "commit", "plan")}
    assert python == pytest.approx({"arrays": 15, "results": 10, "commit": 20, "plan": 22})
    assert rests["Python: deliver"] == pytest.approx(8)
    assert rests[LOOP_REST] == pytest.approx(20)
    assert decode.python_share * decode.wall_s * 1e9 == pytest.approx(95)
    assert prefill.steps == 2


def test_watching_is_not_part_of_a_step() -> None:
    _, decode = build()
    first = make_run()[3]
    assert decode.wall_s * 1e9 == pytest.approx(first.times.run_ns + 70, rel=0.01)


def test_joined_products_have_the_floors_of_both() -> None:
    prefill, _ = build()
    floors = {part.name: part.floor for part in prefill.parts}
    assert floors["merge"] is None
    assert floors["gate+up"] is not None
    assert floors["q"] is not None
    assert floors["gate+up"].seconds > floors["q"].seconds


def test_a_real_model_is_taken_apart(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ProfileOptions(prompt_tokens=20, new_tokens=4, requests=2, json=True)
    run_profile(str(model_file), options, MachineOptions(threads=1))
    report = json.loads(capsys.readouterr().out)
    for stroke in ("prefill", "decode"):
        parts = report[stroke]["parts"]
        total = sum(part["seconds"] for part in parts)
        assert total == pytest.approx(report[stroke]["wall_s"], rel=0.02)
        assert {"q", "attention", "head", "draw", *RESTS} <= {part["name"] for part in parts}


def test_the_table_names_every_part() -> None:
    _, decode = build()
    table = build_table(decode)
    names = list(table.columns[0].cells)
    assert names[-8:] == [*RESTS, "all"]
    assert names[0] == "gate+up"


@pytest.mark.parametrize(
    ("options", "machine", "name"),
    [
        (ProfileOptions(prompt_tokens=10**6), MachineOptions(), "prompt_tokens"),
        (ProfileOptions(prompt_tokens=4), MachineOptions(backend="reference"), "backend"),
    ],
)
def test_what_cannot_be_profiled_is_named(
    model_file: Path, options: ProfileOptions, machine: MachineOptions, name: str
) -> None:
    with pytest.raises(InvalidParameter, match=name):
        run_profile(str(model_file), options, machine)
