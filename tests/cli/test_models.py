"""Laws of fetching and listing models on the command line; nothing is fetched here."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from twostroke.cli.app import build_app
from twostroke.cli.models import PullProgress, build_models_table
from twostroke.weights.catalog import ListedModel, ModelCost, NotPulled, Unreadable

COST = ModelCost("Q4_1 100%", 10**9, 2**30, 2**30, 1024, 4096)
STATES = [COST, NotPulled(2**20), Unreadable("truncated at byte 7")]


def test_every_known_model_has_its_row() -> None:
    listed = [ListedModel(f"m{index}", Path(), "", state) for index, state in enumerate(STATES)]
    table = build_models_table(listed)
    assert list(table.columns[0].cells) == ["m0", "m1", "m2"]
    assert list(table.columns[2].cells) == ["1 GiB", "", ""]


def test_an_empty_cache_lists_what_could_be_pulled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path))
    result = CliRunner().invoke(build_app(), ["models"])
    assert result.exit_code == 0
    assert "smollm2-135m" in result.stdout
    assert "to fetch" in result.stdout


def test_an_unknown_model_is_refused_with_what_comes_near(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path))
    result = CliRunner().invoke(build_app(), ["pull", "smollm2-136m"])
    assert result.exit_code == 2
    assert "did you mean smollm2-135m" in result.stderr


def test_pulling_a_path_fetches_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), ["pull", str(tmp_path)])
    assert result.exit_code == 0
    assert "where it lies" in result.stderr


def test_without_a_terminal_each_stage_is_one_line() -> None:
    output = io.StringIO()
    with PullProgress(Console(file=output, width=80)) as progress:
        for done in range(0, 100, 10):
            progress.report("downloading", done, 100)
        progress.report("checking", 0, 0)
    assert output.getvalue() == "downloading\nchecking\n"


def test_with_a_terminal_each_stage_is_a_bar() -> None:
    output = io.StringIO()
    with PullProgress(Console(file=output, force_terminal=True, width=80)) as progress:
        progress.report("downloading", 50, 100)
    assert "downloading" in output.getvalue()
    assert "50/100" in output.getvalue()
