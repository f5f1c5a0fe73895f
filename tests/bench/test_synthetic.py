"""Synthetic models: sound files of the right shape, the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twostroke.bench.synthetic import (
    SYNTHETIC,
    Shape,
    list_tensors,
    make_synthetic,
    make_weights,
    write_synthetic,
)
from twostroke.cli.compose import LLM
from twostroke.engine.params import SamplingParams
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.quant import Format
from twostroke.weights.load import open_model

TINY = Shape(2, 256, 4, 2, 64, 512, 400, 128, 500_000.0)


def test_a_synthetic_model_opens_with_its_shape_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(TINY, "tiny", path)
    with open_model(path) as model:
        spec = model.spec
    assert (spec.width, spec.ffn_width, len(spec.layers)) == (256, 512, 2)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 64)
    assert (spec.vocab_size, spec.context_tokens, spec.tied_embeddings) == (400, 128, True)
    assert spec.layers[0].rope.base == 500_000.0
    with LLM(path, threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        [output] = llm.generate(["he said: ä"], params)
    assert len(output.completions[0].tokens) == 4


def test_a_synthetic_model_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_synthetic(TINY, "tiny", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("fmt", [Format.Q4_K, Format.Q6_K])
def test_weights_have_no_bias_and_keep_a_signals_size(fmt: Format) -> None:
    rows, inputs = 64, 1024
    data = make_weights(np.random.default_rng(0), fmt, (rows, inputs))
    weights = dequantise(fmt, data.reshape(-1), (rows, inputs))
    deviation = inputs**-0.5
    assert np.abs(weights.mean()) < 0.1 * deviation
    assert weights.std() == pytest.approx(deviation, rel=0.15)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="not Q8_0"):
        make_weights(np.random.default_rng(0), Format.Q8_0, (1, 256))


def test_the_large_one_has_the_weights_of_llama_3_2_1b() -> None:
    shape = SYNTHETIC["llama-1b-synthetic"]
    weights = sum(int(np.prod(extents)) for _, extents, _ in list_tensors(shape))
    assert weights == 1_235_814_400


def test_it_is_written_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path))
    monkeypatch.setattr("twostroke.bench.synthetic.SYNTHETIC", {"tiny": replace(TINY, layers=1)})
    path = make_synthetic("tiny")
    path.write_bytes(b"kept")
    assert make_synthetic("tiny").read_bytes() == b"kept"
    assert [one.name for one in (tmp_path / "bench").iterdir()] == ["tiny.gguf"]
