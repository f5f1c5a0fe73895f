"""The safetensors container: no offset, shape or length in its header is taken on trust."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from model_files import make_folder, write_safetensors_header
from twostroke.errors import CorruptModel, ModelError, UnsupportedModel
from twostroke.spec.quant import Format
from twostroke.weights.load import open_model
from twostroke.weights.safetensors_file import read_safetensors


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: dict[str, Any], data_bytes: int) -> Path:
    return write_safetensors_header(path, json.dumps(header).encode(), bytes(data_bytes))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tensors_are_those_the_safetensors_package_reads(dtype: Any, tmp_path: Path) -> None:
    folder = make_folder("llama", dtype).write(tmp_path / "m")
    file = read_safetensors(folder / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert set(file.tensors) == set(theirs)
    for name, tensor in file.tensors.items():
        assert tensor.shape == theirs[name].shape
        np.testing.assert_array_equal(tensor.data.view(dtype), theirs[name].reshape(-1))


def test_bfloat16_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"t": entry("BF16", [2, 3], [0, 12])}, 12)
    tensor = read_safetensors(path).tensors["t"]
    assert (tensor.format, tensor.shape, tensor.data.size) == (Format.BF16, (2, 3), 12)


BAD = {
    "beyond the end": ({"t": entry("F32", [4], [0, 16])}, 8, "ends at byte"),
    "wrong size": ({"t": entry("F32", [4], [0, 8])}, 8, "takes 8 bytes, its shape 16"),
    "backwards": ({"t": entry("F32", [4], [8, 0])}, 8, "takes -8 bytes"),
    "huge extents": ({"t": entry("F32", [2**40, 2**40], [0, 8])}, 8, "takes 8 bytes"),
    "negative extent": ({"t": entry("F32", [-4], [0, 16])}, 16, "impossible shape"),
    "zero extent": ({"t": entry("F32", [0], [0, 0])}, 0, "impossible shape"),
    "bool extent": ({"t": entry("F32", [True], [0, 4])}, 4, "impossible shape"),
    "scalar": ({"t": entry("F32", [], [0, 4])}, 4, "impossible shape"),
    "three offsets": ({"t": entry("F32", [1], [0, 4, 8])}, 4, "impossible data_offsets"),
    "no dtype": ({"t": {"shape": [1], "data_offsets": [0, 4]}}, 4, "needs dtype"),
    "no object": ({"t": 3}, 4, "needs dtype"),
    "overlap": (
        {"t": entry("F32", [2], [0, 8]), "u": entry("F32", [2], [4, 12])},
        12,
        "'u' overlaps",
    ),
    "gap": (
        {"t": entry("F32", [1], [0, 4]), "u": entry("F32", [1], [8, 12])},
        12,
        "'u' follows a gap",
    ),
    "left over": ({"t": entry("F32", [1], [0, 4])}, 9, "5 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_impossible_tensor_is_named_with_its_offset(case: str, tmp_path: Path) -> None:
    header, data_bytes, said = BAD[case]
    path = write(tmp_path / "m.safetensors", header, data_bytes)
    with pytest.raises(CorruptModel, match=f"{said}.*\\(byte \\d+\\)"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "F64", 7])
def test_an_element_type_we_do_not_read_is_named(dtype: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"t": entry(dtype, [1], [0, 8])}, 8)
    with pytest.raises(UnsupportedModel, match=f"'t' has dtype {dtype}"):
        read_safetensors(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 200_000_000, 11])
def test_a_header_longer_than_the_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}        ")
    with pytest.raises(CorruptModel, match=f"a header of {length} bytes"):
        read_safetensors(path)


@pytest.mark.parametrize("header", [b"[]", b"{ ", b"\xff\xff", b'{"a": 1, "a": 2}', b"[" * 50000])
def test_a_header_that_is_no_sound_json_is_refused(header: bytes, tmp_path: Path) -> None:
    path = write_safetensors_header(tmp_path / "m.safetensors", header)
    with pytest.raises(CorruptModel, match=r"header at byte 8"):
        read_safetensors(path)


def test_a_damaged_folder_gives_a_typed_error_or_a_consistent_model(tmp_path: Path) -> None:
    folder = make_folder("qwen3").write(tmp_path / "m")
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    header_bytes = 8 + struct.unpack_from("<Q", raw)[0]
    tracemalloc.start()
    try:
        for seed in range(300):
            print(f"seed {seed}")
            rng, damaged = random.Random(seed), bytearray(raw)
            for _ in range(rng.choice((1, 2, 4))):
                damaged[rng.randrange(header_bytes)] = rng.randrange(256)
            if rng.random() < 0.2:
                del damaged[rng.randrange(len(damaged)) :]
            weights.write_bytes(damaged)
            with contextlib.suppress(ModelError), open_model(folder) as model:
                assert model.spec.weight_bytes + model.unused_bytes <= len(damaged)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
