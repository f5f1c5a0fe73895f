"""The lab's units: each shows what it says, draws a picture, and runs as a notebook too."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from places import REPO, get_model_path
from twostroke.cli.lab import run_lab
from twostroke.cli.question_options import LabOptions
from twostroke.errors import InvalidParameter
from twostroke.lab.notebooks import build_notebook, get_file_name
from twostroke.lab.unit import Findings, Setup, Unit
from twostroke.lab.units import find_unit, list_units

FOLDER = REPO / "docs" / "lab"
WITHOUT_MODEL = [unit.number for unit in list_units() if unit.runs_on != "engine"]


def run_notebook(number: int) -> dict[str, object]:
    """The names that a notebook's code cells leave, run in their order."""
    path = FOLDER / get_file_name(find_unit(number))
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), path.name, "exec"), names)
    return names


def test_there_are_eleven_units_in_order() -> None:
    assert [unit.number for unit in list_units()] == list(range(1, 12))


def test_a_wrong_number_names_those_there_are() -> None:
    with pytest.raises(InvalidParameter, match="1 to 11"):
        find_unit(12)


@pytest.mark.parametrize("unit", list_units(), ids=lambda unit: str(unit.number))
def test_notebooks_are_current(unit: Unit) -> None:
    path = FOLDER / get_file_name(unit)
    assert path.read_text(encoding="utf-8") == build_notebook(unit), "run `make docs`"


@pytest.mark.slow
@pytest.mark.parametrize("number", WITHOUT_MODEL)
def test_a_notebook_runs_and_has_its_picture(number: int) -> None:
    findings = run_notebook(number)["findings"]
    assert isinstance(findings, Findings)
    assert findings.lines
    assert findings._repr_png_().startswith(b"\x89PNG")


@pytest.mark.real_model
def test_the_notebook_of_batching_runs_on_the_real_engine() -> None:
    get_model_path("smollm2-135m")
    findings = run_notebook(4)["findings"]
    assert isinstance(findings, Findings)
    assert findings.numbers["same"] == 1
    assert findings.numbers["continuous"] < findings.numbers["static batches"]


@pytest.mark.real_model
def test_guessing_takes_fewer_steps_to_the_same_tokens() -> None:
    get_model_path("smollm2-135m")
    numbers = find_unit(11).run(Setup()).numbers
    assert numbers["same"] == 1
    assert numbers["steps"] < numbers["plain_steps"]


def test_the_wrong_rescaling_fails_at_the_second_block_and_not_before() -> None:
    numbers = find_unit(6).run(Setup()).numbers
    assert numbers["first_wrong"] < 1e-12
    assert numbers["second_wrong"] > 0.1
    assert numbers["most_right"] < 1e-12


def test_a_shorter_budget_shortens_pauses_and_lengthens_the_prompt() -> None:
    numbers = find_unit(7).run(Setup()).numbers
    assert numbers["pause_512_ms"] < numbers["pause_whole_ms"] / 5
    assert numbers["ttft_512_ms"] < 2 * numbers["pause_whole_ms"]


def test_a_dead_executor_costs_a_pause_and_no_request() -> None:
    numbers = find_unit(9).run(Setup()).numbers
    assert numbers["finished"] == 32
    assert 2 <= numbers["late_s"] < 2.5


def test_quantised_weights_shorten_decode_and_not_prefill() -> None:
    numbers = find_unit(10).run(Setup()).numbers
    assert numbers["q4_0: decode"] < numbers["bf16: decode"] / 2
    assert numbers["q4_0: prefill"] == pytest.approx(numbers["bf16: prefill"], rel=0.05)


def test_the_command_lists_runs_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_lab(LabOptions())
    assert "Speculation" in capsys.readouterr().out
    path = tmp_path / "flash.svg"
    run_lab(LabOptions(what="6", output=[str(path)]))
    assert "second block" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8").startswith("<?xml")


def test_an_exercise_is_graded_with_its_derivation(capsys: pytest.CaptureFixture[str]) -> None:
    run_lab(LabOptions(what="exercise", unit="3", seed=5, answer="18 requests"))
    out = capsys.readouterr().out
    assert "Right." in out
    assert "Derivation:" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (LabOptions(what="0"), "1 to 11"),
        (LabOptions(what="six"), "1 to 11"),
        (LabOptions(what="exercise"), "1 to 11"),
        (LabOptions(what="6", unit="7"), "second number"),
        (LabOptions(what="6", output=["x.pdf"]), ".png or .svg"),
        (LabOptions(what="exercise", unit="3", answer="3"), "seed"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: LabOptions, told: str) -> None:
    with pytest.raises(InvalidParameter, match=told):
        run_lab(options)
