"""`twostroke ablate`: gains point the right way, both ways agree, pictures exist."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tiny_models import TINY_SPECS
from twostroke.bench.ablation import Ablation, Number
from twostroke.bench.attention_ablation import measure_attention
from twostroke.bench.variants import Arrival, Variant, VariantBench
from twostroke.cli.ablate import build_table, choose_techniques, describe, draw
from twostroke.errors import InvalidParameter, InvalidRequest
from twostroke.exec.local import RunnerSizes
from twostroke.policies.names import PolicyChoice

SOME = [
    Ablation(
        "paged KV",
        "reserved",
        (Number("output", "tokens/s", 50.0, 150.0, True), Number("memory", "MB", 4.0, 8.0)),
        1.0,
        True,
    )
]


def test_gains_are_above_one_where_the_technique_is_better() -> None:
    assert Number("time", "ms", 10.0, 5.0).gain == 2
    assert Number("rate", "tokens/s", 10.0, 5.0, True).gain == 0.5


def test_techniques_are_chosen_by_name_and_a_wrong_one_is_named() -> None:
    assert choose_techniques(None, ("a", "b")) == ["a", "b"]
    assert choose_techniques("b, a", ("a", "b")) == ["a", "b"]
    with pytest.raises(InvalidParameter, match="'c'"):
        choose_techniques("a,c", ("a", "b"))


def test_the_table_the_json_and_the_picture_hold_every_number(tmp_path: Path) -> None:
    assert build_table("t", SOME).row_count == 2
    assert json.loads(json.dumps(describe("m", 2, 1.0, SOME)))["ablations"][0]["promised"] is True
    for name in ("a.png", "a.svg"):
        draw(SOME, "t", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(InvalidParameter, match="output"):
        draw(SOME, "t", tmp_path / "a.txt")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_with_scores_is_the_tiled_one_but_for_rounding(family: str) -> None:
    times = measure_attention(TINY_SPECS[family], 100, 2, rounds=1)
    assert times.largest_error < 1e-5
    assert times.materialised_bytes == TINY_SPECS[family].num_heads * 100 * 100 * 4
    assert np.isfinite([times.tiled_s, times.materialised_s]).all()


@pytest.mark.real_model
def test_variants_change_times_and_no_token() -> None:
    draw_token = random.Random(1)
    shared = tuple(draw_token.randrange(300, 40_000) for _ in range(64))
    load = [Arrival(0.0, (*shared, 300 + row), 24) for row in range(4)]
    variants = (
        Variant(name="plain"),
        Variant(name="chunked", step_tokens=16),
        Variant(name="static", policies=PolicyChoice(pace="static", batch_size=2)),
        Variant(name="reserved", reserve_tokens=128, num_blocks=20),
        Variant(name="cached", has_prefix_cache=True, max_rows=1),
        Variant(name="drafts", policies=PolicyChoice(drafts=True)),
    )
    with VariantBench("smollm2-135m", RunnerSizes(2, 64, 16, 512)) as bench:
        runs = {one.name: bench.run(one, load) for one in variants}
        with pytest.raises(InvalidRequest):
            bench.run(Variant(name="small", num_blocks=2), load)
    assert all(run.answers == runs["plain"].answers for run in runs.values())
    assert max(step.tokens for step in runs["chunked"].steps) <= 16
    assert max(step.rows for step in runs["static"].steps) == 2
    assert runs["cached"].requests[-1].timings.cached_tokens >= 48
    assert runs["reserved"].filled_share < runs["plain"].filled_share
