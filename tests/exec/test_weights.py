"""Kept weights: the same bytes and the same answers as weights packed in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels_support import RowCase, make_step
from tiny_models import TINY_SPECS, make_tensors
from twostroke._native import ThreadPool
from twostroke.exec import weights
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import RunnerSizes
from twostroke.exec.weights import load_weights
from twostroke.kernels.cpu.weights import PackedMatrix, Vector
from twostroke.kernels.ops import F32
from twostroke.spec.quant import Format
from twostroke.weights.mapping import map_file
from twostroke.weights.packed import PackedFiles

SIZES = RunnerSizes(threads=2, num_blocks=64, block_tokens=16, max_step_tokens=512)
SPEC = TINY_SPECS["qwen2"]


@pytest.fixture
def files(tmp_path: Path) -> PackedFiles:
    """A folder that keeps the weights of tiny models too."""
    (tmp_path / "model").write_bytes(b"stands for the file")
    identity = map_file(tmp_path / "model", 1)[1]
    return PackedFiles(tmp_path / "packed", (identity,), least_bytes=1, settled_ns=0)


def read_all(loaded: dict[str, PackedMatrix | Vector]) -> dict[str, F32]:
    """Every weight as float32."""
    return {
        name: np.array([weight.native.read_row(row) for row in range(weight.outputs)], np.float32)
        if isinstance(weight, PackedMatrix)
        else weight.values
        for name, weight in loaded.items()
    }


def refuse(*arguments: object) -> None:
    """Stands where nothing may be packed any more."""
    pytest.fail("the weights were packed again")


@pytest.mark.parametrize("format", [Format.Q4_1, Format.Q8_0, Format.F16, Format.F32])
def test_a_mapped_matrix_holds_what_a_packed_one_holds(
    format: Format, files: PackedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, tensors = ThreadPool(2), make_tensors(SPEC, format)
    plain = read_all(load_weights(pool, SPEC, tensors))
    first = read_all(load_weights(pool, SPEC, tensors, files))
    monkeypatch.setattr(weights, "pack_into", refuse)
    again = read_all(load_weights(pool, SPEC, tensors, files))
    assert plain.keys() == first.keys() == again.keys()
    for name, values in plain.items():
        assert np.array_equal(values, first[name]), name
        assert np.array_equal(values, again[name]), name


def test_a_runner_over_kept_weights_answers_bit_for_bit_the_same(files: PackedFiles) -> None:
    tensors = make_tensors(SPEC, Format.Q4_0)
    step = make_step([RowCase(0, 40)], np.random.default_rng(1), 20)
    rows = np.arange(40, dtype=np.int32)
    answers = []
    for where in (None, files, files):
        runner = CpuRunner(SPEC, tensors, SIZES, files=where)
        runner.run_layers(step)
        answers.append(np.array(runner.get_logits(rows)))
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


def test_a_build_that_packs_otherwise_packs_anew(
    files: PackedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make_tensors(SPEC, Format.Q4_0)
    load_weights(ThreadPool(1), SPEC, tensors, files)
    monkeypatch.setattr(weights, "get_layout_fingerprint", lambda: 1)
    load_weights(ThreadPool(1), SPEC, tensors, files)
    assert len(list(files.folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_only_costs_time(files: PackedFiles) -> None:
    files.folder.write_text("a file where a folder should be")
    tensors = make_tensors(SPEC, Format.Q4_0)
    plain = read_all(load_weights(ThreadPool(1), SPEC, tensors))
    packed = read_all(load_weights(ThreadPool(1), SPEC, tensors, files))
    assert all(np.array_equal(values, packed[name]) for name, values in plain.items())
