"""The GGUF container: what the gguf package writes is read, and no lie is believed."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from model_files import ARRAY, F32, STR, U32, make_gguf
from twostroke.errors import CorruptModel, ModelError, UnknownModel, UnsupportedModel
from twostroke.spec.quant import Format
from twostroke.weights.gguf import ArrayValue, ValueType, read_gguf
from twostroke.weights.load import open_model

MOST_BYTES = 64 << 20


def write_header(path: Path, version: int, tensors: int, pairs: int, rest: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + rest)
    return path


def pack_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pack_tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return pack_string(name) + dims + struct.pack("<IQ", kind, offset)


def write_tensors(path: Path, infos: list[bytes], data_bytes: int) -> Path:
    """A file with these tensor infos and that many bytes of data after the padding."""
    write_header(path, 3, len(infos), 0, b"".join(infos))
    head = path.read_bytes()
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data_bytes))
    return path


def test_every_type_of_value_is_read_as_the_gguf_package_wrote_it(tmp_path: Path) -> None:
    numbers = {
        gguf.GGUFValueType.UINT8: 200,
        gguf.GGUFValueType.INT8: -7,
        gguf.GGUFValueType.UINT16: 60000,
        gguf.GGUFValueType.INT16: -30000,
        gguf.GGUFValueType.UINT32: 2**31 + 5,
        gguf.GGUFValueType.INT32: -(2**31),
        gguf.GGUFValueType.UINT64: 2**63 + 1,
        gguf.GGUFValueType.INT64: -(2**63),
        gguf.GGUFValueType.FLOAT32: 0.5,
        gguf.GGUFValueType.FLOAT64: 1e300,
        gguf.GGUFValueType.BOOL: True,
        gguf.GGUFValueType.STRING: "größer",
    }
    recipe = make_gguf("llama")
    for kind, value in numbers.items():
        recipe.keys[f"x.{kind.name}"] = (kind, value)
        recipe.keys[f"x.list.{kind.name}"] = (ARRAY, [value, value], kind)
    file = read_gguf(recipe.write(tmp_path / "m.gguf"))
    for kind, value in numbers.items():
        assert file.entries[f"x.{kind.name}"].value == value
        array = file.entries[f"x.list.{kind.name}"].value
        assert isinstance(array, ArrayValue)
        is_text = array.element is ValueType.STRING
        items = file.get_strings(array, "x") if is_text else file.get_numbers(array).tolist()
        assert items == [value, value]


def test_tensors_lie_where_the_gguf_package_finds_them(tmp_path: Path) -> None:
    path = make_gguf("gemma3", Format.Q8_0).write(tmp_path / "m.gguf")
    ours = read_gguf(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(ours.tensors) == set(theirs)
    for name, info in ours.tensors.items():
        assert info.shape == tuple(reversed(theirs[name].shape.tolist()))
        assert (info.offset, info.bytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        np.testing.assert_array_equal(
            ours.get_data(name), np.ascontiguousarray(theirs[name].data).view(np.uint8).reshape(-1)
        )


def test_version_2_reads_as_version_3_does(tmp_path: Path) -> None:
    path = make_gguf("llama").write(tmp_path / "m.gguf")
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    assert read_gguf(path).version == 2


def test_an_alignment_of_the_files_own_is_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.alignment == 256
    assert file.get_data("b").view(np.float32).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("version", "said"), [(1, "version 1"), (4, "version 4")])
def test_other_versions_are_refused(version: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        read_gguf(write_header(tmp_path / "m.gguf", version, 0, 0))


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="big-endian"):
        read_gguf(write_header(tmp_path / "m.gguf", 3 << 24, 0, 0))


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"not a model, though long enough to be one"])
def test_what_is_no_gguf_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(CorruptModel, match=r"m\.gguf"):
        read_gguf(path)


def test_a_file_that_is_not_there_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"nothing\.gguf"):
        read_gguf(tmp_path / "nothing.gguf")


HUGE = 2**63
LIES = {
    "pairs": (0, HUGE, b"", "metadata pairs cannot fit"),
    "tensors": (HUGE, 0, b"", "tensors cannot fit"),
    "key length": (0, 1, struct.pack("<Q", HUGE) + bytes(32), "a key longer than"),
    "empty key": (0, 1, bytes(32), "an empty key"),
    "key not UTF-8": (0, 1, pack_string(b"\xff\xfe") + bytes(32), "a key is not UTF-8"),
    "string length": (
        0,
        1,
        pack_string(b"k") + struct.pack("<IQ", 8, HUGE) + bytes(9),
        "key 'k' of",
    ),
    "string not UTF-8": (
        0,
        1,
        pack_string(b"k") + struct.pack("<I", 8) + pack_string(b"\xc3("),
        "key 'k' is not UTF-8",
    ),
    "array of numbers": (
        0,
        1,
        pack_string(b"k") + struct.pack("<IIQ", 9, 4, HUGE),
        "items of key 'k' cannot fit",
    ),
    "array of strings": (
        0,
        1,
        pack_string(b"k") + struct.pack("<IIQ", 9, 8, HUGE),
        "strings of key 'k' cannot fit",
    ),
    "string in an array": (
        0,
        1,
        pack_string(b"k") + struct.pack("<IIQQQ", 9, 8, 2, HUGE, 0),
        "inside item 1 of key 'k'",
    ),
    "bool of two": (0, 1, pack_string(b"k") + struct.pack("<IB", 7, 2), "bool of value 2"),
    "same key twice": (
        0,
        2,
        2 * (pack_string(b"k") + struct.pack("<IB", 7, 1)),
        "key 'k' appears twice",
    ),
    "alignment": (
        0,
        1,
        pack_string(b"general.alignment") + struct.pack("<II", 4, 48),
        "not a power of two",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_header_is_named_with_its_offset(lie: str, tmp_path: Path) -> None:
    tensors, pairs, rest, said = LIES[lie]
    path = write_header(tmp_path / "m.gguf", 3, tensors, pairs, rest)
    with pytest.raises(CorruptModel, match=f"{said}.*\\(byte \\d+\\)"):
        read_gguf(path)


@pytest.mark.parametrize(("kind", "said"), [(99, "unknown value type 99"), (9, "array of arrays")])
def test_an_unknown_or_nested_value_is_unsupported(kind: int, said: str, tmp_path: Path) -> None:
    rest = pack_string(b"k") + struct.pack("<IIQ", 9, kind, 1) + bytes(16)
    with pytest.raises(UnsupportedModel, match=said):
        read_gguf(write_header(tmp_path / "m.gguf", 3, 0, 1, rest))


BAD_TENSORS = {
    "no dimension": ([pack_tensor(b"t", (), 0, 0)], 32, "has 0 dimensions"),
    "many dimensions": ([pack_tensor(b"t", (1,) * 5, 0, 0)], 32, "has 5 dimensions"),
    "zero extent": ([pack_tensor(b"t", (0, 4), 0, 0)], 32, "zero extent"),
    "huge extents": ([pack_tensor(b"t", (2**63, 2**63), 0, 0)], 32, "beyond the file's"),
    "beyond the end": ([pack_tensor(b"t", (64,), 0, 0)], 32, "beyond the file's"),
    "far offset": ([pack_tensor(b"t", (4,), 0, 2**62)], 32, "beyond the file's"),
    "odd offset": ([pack_tensor(b"t", (4,), 0, 4)], 32, "not a multiple of 32"),
    "split block": ([pack_tensor(b"t", (33,), 8, 0)], 64, "do not fill blocks of 32"),
    "empty name": ([pack_tensor(b"", (4,), 0, 0)], 32, "an empty tensor name"),
    "same name": ([pack_tensor(b"t", (8,), 0, 0)] * 2, 32, "'t' appears twice"),
    "overlap": (
        [pack_tensor(b"t", (16,), 0, 0), pack_tensor(b"u", (8,), 0, 32)],
        64,
        "'u' overlaps",
    ),
    "gap": (
        [pack_tensor(b"t", (8,), 0, 0), pack_tensor(b"u", (8,), 0, 64)],
        96,
        "before tensor 'u' belong to none",
    ),
    "left over": ([pack_tensor(b"t", (8,), 0, 0)], 4096, "after the last tensor belong to none"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_an_impossible_tensor_is_named_with_its_offset(case: str, tmp_path: Path) -> None:
    infos, data_bytes, said = BAD_TENSORS[case]
    path = write_tensors(tmp_path / "m.gguf", infos, data_bytes)
    with pytest.raises(CorruptModel, match=f"{said}.*\\(byte \\d+\\)"):
        read_gguf(path)


@pytest.mark.parametrize(("kind", "name"), [(23, "IQ4_XS"), (10, "Q2_K"), (77, "number 77")])
def test_a_tensor_type_we_do_not_read_is_named(kind: int, name: str, tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.gguf", [pack_tensor(b"t", (256,), kind, 0)], 256)
    with pytest.raises(UnsupportedModel, match=f"'t' has type {name}"):
        read_gguf(path)


# ---- fuzz ---------------------------------------------------------------------------------------


def open_all(path: Path) -> None:
    """Open a damaged file as far as it goes; any exception but a ModelError is a failure."""
    with contextlib.suppress(ModelError), open_model(path) as model:
        spec = model.spec
        assert sum(tensor.data.size for tensor in model.tensors.values()) == spec.weight_bytes
        assert spec.weight_bytes <= path.stat().st_size
        assert len(model.vocabulary.tokens) == spec.vocab_size


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_file_cut_anywhere_is_refused(architecture: str, tmp_path: Path) -> None:
    raw = make_gguf(architecture, Format.Q8_0, ffn=64).write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(raw) - 32, 97):
        path.write_bytes(raw[:length])
        with pytest.raises((CorruptModel, UnsupportedModel)):
            open_model(path)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_flipped_bytes_are_refused_or_harmless(architecture: str, tmp_path: Path) -> None:
    whole = make_gguf(architecture, Format.Q8_0, ffn=64).write(tmp_path / "m.gguf")
    header_bytes = min(each.offset for each in read_gguf(whole).tensors.values())
    raw = whole.read_bytes()
    path = tmp_path / "flipped.gguf"
    tracemalloc.start()
    try:
        for seed in range(250):
            print(f"seed {seed}")
            rng, damaged = random.Random(seed), bytearray(raw)
            for _ in range(rng.choice((1, 1, 2, 5))):
                damaged[rng.randrange(header_bytes)] = rng.randrange(256)
            path.write_bytes(damaged)
            open_all(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("word", [2**64 - 1, 2**63, 2**32 - 1, 2**31, 1 << 40, 0])
def test_no_count_or_length_can_make_the_reader_allocate(word: int, tmp_path: Path) -> None:
    whole = make_gguf("llama", Format.Q8_0, ffn=64).write(tmp_path / "m.gguf")
    header_bytes = min(each.offset for each in read_gguf(whole).tensors.values())
    raw = whole.read_bytes()
    path = tmp_path / "lying.gguf"
    tracemalloc.start()
    try:
        for offset in range(8, header_bytes - 8, 29):
            damaged = bytearray(raw)
            damaged[offset : offset + 8] = struct.pack("<Q", word)
            path.write_bytes(damaged)
            open_all(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_keys_of_no_concern_do_not_matter(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.keys["quantize.imatrix.file"] = (STR, "somewhere")
    recipe.keys["general.tags"] = (ARRAY, ["a", "b"], STR)
    recipe.keys["general.quantization_version"] = (U32, 2)
    recipe.keys["general.sampling.temp"] = (F32, 0.5)
    with open_model(recipe.write(tmp_path / "m.gguf")) as model:
        assert model.spec.family == "llama"
