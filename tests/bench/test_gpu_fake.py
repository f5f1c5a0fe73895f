"""The GPU benchmark on the fake device: tiny models, our kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twostroke.bench.gpu.ceilings import measure_ceilings
from twostroke.bench.gpu.engine import make_plan
from twostroke.bench.gpu.results import Run, load
from twostroke.bench.gpu.sections import compare
from twostroke.bench.gpu.session import Session, check_bytes
from twostroke.bench.gpu.synthetic import make_source
from twostroke.bench.gpu.timing import QUICK, Pace, time_interleaved, time_launch
from twostroke.bench.gpu.torch_llama import TorchLlama
from twostroke.bench.gpu.workloads import BLOCK_TOKENS, FAKE_CELLS, TINY, Cell, get_model
from twostroke.kernels.cuda.types import MatrixPart

CPU = torch.device("cpu")


def make_session(model: str) -> Session:
    """A fake model's weights and an empty run."""
    ceilings = measure_ceilings(CPU)
    return Session(get_model(model), CPU, ceilings, Run({}, ceilings), lambda line: None)


def test_blocks_of_a_step_are_scattered_and_nobody_shares_one() -> None:
    rows = Cell("decode", 3, 1, 3 * BLOCK_TOKENS).rows
    plan = make_plan(rows, 16, TINY.vocab_size)
    blocks = [block for row in plan.rows for block in row.blocks]
    assert len(set(blocks)) == len(blocks) == 9
    assert blocks != sorted(blocks)
    assert plan == make_plan(rows, 16, TINY.vocab_size)


def test_parts_of_a_joined_matrix_are_views_of_it() -> None:
    source = make_source(TINY, torch.float16, CPU, int4=False)
    joined = source.get_joined("layers.0.q")
    parts = torch.cat([source.get_values(f"layers.0.{name}") for name in "qkv"])
    assert torch.equal(joined, parts)
    query = source.get_values("layers.0.q")
    assert query.data_ptr() == joined.data_ptr()


def test_every_weight_of_the_spec_is_made_in_its_shape() -> None:
    for int4 in (False, True):
        source = make_source(TINY, torch.float16, CPU, int4)
        for tensor in TINY.tensors():
            weight = source.weights[tensor.name]
            if isinstance(weight, MatrixPart):
                shape = weight.last - weight.first, weight.matrix.inputs
                assert shape == tensor.shape
            else:
                assert tuple(weight.shape) == tensor.shape


@pytest.mark.parametrize("model", ["tiny", "tiny-int4"])
def test_weights_take_the_bytes_that_floors_count(model: str) -> None:
    check_bytes(make_session(model))


def test_our_prompt_has_the_logits_of_plain_pytorch() -> None:
    session, cell = make_session("tiny"), FAKE_CELLS[0]
    sizes = session.get_sizes([cell])
    with session.open_engine(sizes) as engine:
        plan = session.make_plan(cell, sizes.num_blocks)
        ids = torch.tensor([row.tokens for row in plan.rows])
        llama = TorchLlama(session.spec, session.source, compiled=False)
        launches = {
            "twostroke": engine.prepare(plan),
            "pytorch": llama.prepare(engine.kv_memory, ids, cell.context),
        }
        assert compare(launches)["pytorch"] < 0.01


def test_unlike_logits_are_no_measurement() -> None:
    launches = {
        "twostroke": lambda: torch.ones(4),
        "pytorch": lambda: torch.tensor([1.0, -1, 1, 1]),
    }
    with pytest.raises(AssertionError, match="pytorch"):
        compare(launches)
    launches["twostroke"] = lambda: torch.full((4,), torch.nan)
    with pytest.raises(AssertionError, match="nan"):
        compare(launches)


def test_every_engine_is_launched_in_every_round() -> None:
    called: list[str] = []
    launches = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    pace = Pace(least=4, most=4, budget_s=0.0, warm=0)
    times = time_interleaved(launches, CPU, pace, rounds=4)
    assert called[2:] == ["a", "b", "b", "a"] * 2
    assert {timed.repeats for timed in times.values()} == {4}


def test_a_quick_pace_launches_once() -> None:
    called: list[int] = []
    assert time_launch(lambda: called.append(1), CPU, QUICK).repeats == 1
    assert time_interleaved({"a": lambda: called.append(1)}, CPU, QUICK)["a"].repeats == 1
    assert len(called) == 2


@pytest.mark.slow
def test_a_fake_run_measures_every_section(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twostroke.bench.gpu", "--fake", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    summary = json.loads(done.stdout.splitlines()[-1])
    # Transformers may be absent; nothing else may be missing.
    assert [what for what in summary["missing"] if "transformers" not in what] == []
    [run] = load(tmp_path / "results.json")
    assert set(run.sections) == {"attention", "steps", "peers", "gap", "served"}
    assert {row["exact"] for row in run.sections["steps"]} == {False, True}
    assert {row["model"] for row in run.sections["steps"]} == {"tiny", "tiny-int4"}
