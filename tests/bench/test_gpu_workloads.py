"""What is measured on a GPU, what a card cannot hold, and how the seconds are divided."""

from __future__ import annotations

import pytest

from twostroke.bench.gpu.main import parse_arguments
from twostroke.bench.gpu.schedule import ALL, Choice, describe_plan, plan_visits
from twostroke.bench.gpu.workloads import (
    GPT3_STAND_IN,
    MODELS,
    Cell,
    find_obstacle,
    get_cell_work,
    get_model,
    list_cells,
    split_cells,
)
from twostroke.errors import InvalidParameter

H100_BYTES = 80_000_000_000
EVERYTHING = Choice(ALL, [model.name for model in MODELS], 470.0)


def test_a_step_beyond_the_context_is_refused_by_its_context() -> None:
    spec = get_model("llama-2-7b").get_spec()
    assert "4,096" in find_obstacle(spec, Cell("prefill", 1, 8192, 8192), 10**12)


def test_a_step_that_does_not_fit_names_every_part() -> None:
    spec = get_model("llama-2-7b").get_spec()
    why = find_obstacle(spec, Cell("decode", 128, 1, 2048), H100_BYTES)
    for part in ("weights 13.5 GB", "KV 137.4 GB", "working space", "80.0 GB"):
        assert part in why


def test_the_bars_steps_fit_an_h100() -> None:
    for model, wanted in (
        ("llama-2-7b", ("decode-1x2048", "decode-32x2048", "prefill-2048")),
        ("llama-3.1-8b", ("decode-1x2048", "decode-128x2048", "prefill-8192")),
        ("llama-3.1-8b-int4", ("decode-1x2048",)),
        ("llama-2-70b-int4", ("decode-32x2048",)),
    ):
        fitting, _ = split_cells(get_model(model).get_spec(), list_cells(), H100_BYTES)
        assert {cell.name for cell in fitting} >= set(wanted)


def test_every_step_either_fits_or_has_a_reason() -> None:
    for model in MODELS:
        fitting, refused = split_cells(model.get_spec(), list_cells(), H100_BYTES)
        assert len(fitting) + len(refused) == len(list_cells())


def test_the_stand_in_has_the_weights_of_gpt_3_and_no_card_of_80_gb_holds_them() -> None:
    assert GPT3_STAND_IN.num_weights == pytest.approx(175e9, rel=0.01)
    spec = get_model("gpt-3-stand-in-int4").get_spec()
    assert find_obstacle(spec, Cell("decode", 1, 1, 128), H100_BYTES)
    assert not find_obstacle(spec, Cell("decode", 1, 1, 128), 141_000_000_000)


def test_a_decode_sees_its_context_with_its_own_token() -> None:
    seven = get_model("llama-2-7b")
    work = get_cell_work(seven, Cell("decode", 2, 1, 128))
    token = seven.get_spec().get_kv_bytes_per_token()
    assert work.kv_bytes_read == 2 * 127 * token
    assert work.kv_bytes_written == 2 * token


def test_all_sections_together_take_less_than_eight_minutes() -> None:
    assert sum(visit.seconds for visit in plan_visits(EVERYTHING)) < 480


def test_a_model_is_visited_once_and_after_the_card() -> None:
    models = [visit.model for visit in plan_visits(EVERYTHING)]
    assert models == sorted(models, key=models.index)
    assert models[:2] == ["", ""]


def test_the_plan_of_seconds_names_every_visit() -> None:
    visits = plan_visits(EVERYTHING)
    lines = list(describe_plan(visits, 470.0))
    assert len(lines) == 1 + len(visits)
    assert f"{sum(visit.seconds for visit in visits):.0f} s" in lines[0]


def test_an_unknown_section_or_model_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="stepz"):
        parse_arguments(["--only", "stepz"])
    with pytest.raises(InvalidParameter, match="tiny"):
        parse_arguments(["--models", "tiny"])
    assert parse_arguments(["--fake", "--models", "tiny"]).models == ["tiny"]
