"""`twostroke calibrate`: a grid of plans that fit, and a fit that is found again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_files import make_gguf
from tiny_models import TINY_SPECS
from twostroke.cli.calibrate import (
    Calibration,
    Measured,
    build_table,
    calibrate,
    describe,
    list_cells,
)
from twostroke.cli.compose import build_engine
from twostroke.cli.machine import Machine
from twostroke.cli.settings import EngineSettings, ResolvedSettings, resolve_settings
from twostroke.cli.step_cost import find_step_cost, get_calibration_path, store_fit
from twostroke.cli.timed_steps import Cell, build_plan, get_order
from twostroke.exec.local import LocalExecutor
from twostroke.plan.roofline_cost import RooflineCost
from twostroke.plan.step_time import MeasuredCost
from twostroke.spec.catalog import get_known_model
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import StepTotals
from twostroke.weights.gguf import ValueType

SPEC = get_known_model("smollm2-135m", "q4_1")
MACHINE = Machine(2, "for a test", 2**33, "for a test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path))


def settle(spec: ModelSpec = SPEC, **wanted: Any) -> ResolvedSettings:
    return resolve_settings(EngineSettings(model="any", **wanted), spec, MACHINE)


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Calibration, ModelSpec, ResolvedSettings]]:
    """A tiny model, calibrated in as little time as it takes."""
    recipe = make_gguf("llama")
    kind, tokens, element = recipe.keys["tokenizer.ggml.tokens"]
    merged = ["t", "0", "1", "t0", "t1"]
    recipe.keys["tokenizer.ggml.tokens"] = (kind, merged + tokens[len(merged) :], element)
    recipe.set("context_length", ValueType.UINT32, 1024)
    path = recipe.write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOSTROKE_CACHE", str(tmp_path_factory.mktemp("cache")))
        built = build_engine(EngineSettings(model=str(path), backend="reference", threads=1))
    executor, spec = built.parts.executor, built.parts.spec
    assert isinstance(executor, LocalExecutor)
    yield calibrate(built.parts, built.settings, 0.0), spec, built.settings
    built.model.close()


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (SPEC, {}),
        (SPEC, {"max_rows": 4, "step_tokens": 100}),
        (SPEC, {"kv_memory": 2**25}),
        (TINY_SPECS["llama"], {}),
    ],
)
def test_every_step_of_the_grid_can_be_run(spec: ModelSpec, wanted: dict[str, Any]) -> None:
    settings = settle(spec, **wanted)
    cells = list(list_cells(spec, settings))
    assert {cell.kind for cell in cells} == {"decode", "prefill", "mixed"}
    for step, cell in enumerate(cells):
        plan = build_plan(cell, step, spec.vocab_size, settings.block_tokens)
        blocks = [block for row in plan.rows for block in row.blocks]
        assert len(set(blocks)) == len(blocks)
        assert max(blocks) < settings.num_blocks
        assert plan.num_tokens <= settings.step_tokens
        assert len(plan.rows) <= settings.max_rows
        for row in plan.rows:
            end = row.start + len(row.tokens)
            assert end <= spec.context_tokens
            assert end <= len(row.blocks) * settings.block_tokens
            assert all(0 <= token < spec.vocab_size for token in row.tokens)


def test_every_round_runs_every_step_in_an_order_of_its_own() -> None:
    orders = [get_order(63, turn) for turn in range(24)]
    assert all(sorted(order) == list(range(63)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_disturbed_rounds_count_only_where_nothing_else_was_seen() -> None:
    step = Measured(
        Cell("decode", ((1, 0, 1),)),
        StepTotals(),
        [[9, 9], [2], [1], [8], [3]],
        [False, False, True, False, True],
    )
    assert step.get_times_ns(0, 1) == [1, 3]
    assert step.get_times_ns(0, 2) == [1, 3]
    assert step.get_times_ns(1, 2) == [2, 8]


def test_a_calibration_measures_fits_and_tells(
    found: tuple[Calibration, ModelSpec, ResolvedSettings],
) -> None:
    calibration, _, _ = found
    assert {len(each.rounds_ns) for each in calibration.measured} == {3}
    assert all(min(each.get_times_ns(0, 1)) > 0 for each in calibration.measured)
    assert calibration.cost.fit.copy_byte_ns > 0
    assert build_table(calibration, calibration.cost).row_count == len(calibration.measured)
    assert any(line.startswith("decode") for line in describe(calibration))


def test_a_stored_calibration_is_found_again(
    found: tuple[Calibration, ModelSpec, ResolvedSettings],
) -> None:
    calibration, spec, settings = found
    store_fit(get_calibration_path(spec, settings), calibration.cost.fit)
    cost = find_step_cost(spec, settings)
    assert isinstance(cost, MeasuredCost)
    assert cost.fit == calibration.cost.fit
    totals = cost.get_row_totals(1, 30, 1)
    assert cost.predict_ns(totals) == calibration.cost.predict_ns(totals)
    assert [each.name for each in get_calibration_path(spec, settings).parent.iterdir()] == [
        get_calibration_path(spec, settings).name
    ]


def test_a_calibration_is_for_one_model_backend_kv_format_and_number_of_threads() -> None:
    settings = settle()
    others = [
        (replace(SPEC, formats=()), settings),
        (SPEC, settle(threads=1)),
        (SPEC, settle(backend="reference")),
        (SPEC, settle(kv="int8")),
    ]
    paths = {get_calibration_path(*each) for each in [(SPEC, settings), *others]}
    assert len(paths) == 5


def test_without_a_calibration_the_machines_limits_speak() -> None:
    cost = find_step_cost(SPEC, settle())
    assert isinstance(cost, RooflineCost)
    assert cost.predict_ns(cost.get_row_totals(1, 0, 1)) > 0


def test_a_damaged_calibration_is_named_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    settings = settle()
    path = get_calibration_path(SPEC, settings)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert isinstance(find_step_cost(SPEC, settings), RooflineCost)
    assert str(path) in caplog.text
    assert "`twostroke calibrate` writes it anew" in caplog.text
