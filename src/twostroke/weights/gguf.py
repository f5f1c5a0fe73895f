"""GGUF files, version 2 and 3, read over a memory mapping.

It owns the container: header, typed metadata, tensor table, alignment. It knows nothing of
architectures. Every count and length is compared with the bytes that remain before anything is
allocated, and the whole table is checked before anything is handed out: no partial load. Large
arrays are only stepped over; their items are read when asked for.

    "GGUF" | u32 version | u64 tensors | u64 pairs | pairs … | tensor infos … | pad | data …

    pair:         string key | u32 type | value          string: u64 length | UTF-8 bytes
    array value:  u32 element type | u64 count | elements
    tensor info:  string name | u32 dims | u64 extents, fastest first … | u32 type | u64 offset
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.quant import Format
from twostroke.spec.vocabulary import Texts
from twostroke.weights.mapping import FileIdentity, map_file
from twostroke.weights.string_array import find_not_utf8, find_run


class ValueType(enum.IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """An array still in the file: bytes start … end - 1 hold `count` elements.

    string_starts (count,): where each string's bytes begin, for an array of strings.
    """

    element: ValueType
    count: int
    start: int
    end: int
    string_starts: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata value; `offset` is where the value begins in the file."""

    type: ValueType
    value: int | float | bool | str | ArrayValue
    offset: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file: shape slowest extent first, absolute byte offset of its data."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """A parsed file. Entries and tensors keep the file's order; the mapping backs all arrays."""

    path: Path
    version: int
    alignment: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, TensorInfo]
    mapping: mmap
    identity: FileIdentity

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.mapping)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def get_data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor: (bytes,) uint8, a read-only view."""
        info = self.tensors[name]
        return np.frombuffer(self.mapping, np.uint8, info.bytes, info.offset)

    def get_strings(self, array: ArrayValue, key: str) -> Texts:
        """The strings of an array; CorruptModel names `key` where one is not UTF-8."""
        starts = array.string_starts
        assert starts is not None, key
        ends = np.append(starts[1:] - 8, array.end) if array.count else starts
        wrong = find_not_utf8(self.mapping, starts, ends)
        if wrong is not None:
            try:
                self.mapping[starts[wrong] : ends[wrong]].decode()
            except UnicodeDecodeError as error:
                where = f"item {wrong} of key '{key}' at byte {starts[wrong]}"
                raise CorruptModel(f"{self.path}: {where} is not UTF-8: {error.reason}") from error
        return Texts(self.mapping, starts.data, ends.data)

    def get_numbers(self, array: ArrayValue) -> NDArray[np.generic]:
        """Parse an array of numbers or bools: (count,), a read-only view."""
        return np.frombuffer(self.mapping, _NUMPY[array.element], array.count, array.start)


def read_gguf(path: Path) -> GGUFFile:
    """Map and check a GGUF file; nothing of its tensor data is touched.

    Raises: CorruptModel for a truncated or lying file, UnsupportedModel for a version, value or
    tensor type we do not read, UnknownModel if it cannot be opened.
    """
    mapping, identity = map_file(path, least_bytes=_HEADER.size)
    cursor = _Cursor(path, mapping)
    version, num_tensors, num_pairs = _read_header(cursor)
    cursor.check_count(num_pairs, _LEAST_PAIR_BYTES, "metadata pairs")
    entries: dict[str, Entry] = {}
    for _ in range(num_pairs):
        start = cursor.position
        key = cursor.take_name("key")
        if key in entries:
            cursor.fail(f"key '{key}' appears twice", start)
        entries[key] = _read_entry(cursor, key)
    alignment = _get_alignment(cursor, entries)
    cursor.check_count(num_tensors, _LEAST_TENSOR_BYTES, "tensors")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        start = cursor.position
        info = _read_tensor(cursor, alignment)
        if info.name in tensors:
            cursor.fail(f"tensor '{info.name}' appears twice", start)
        tensors[info.name] = info
    tensors = _place_tensors(cursor, tensors, alignment)
    proxy = MappingProxyType
    return GGUFFile(path, version, alignment, proxy(entries), proxy(tensors), mapping, identity)


class _Cursor:
    """A position in the file; every take is checked against the bytes that remain."""

    def __init__(self, path: Path, mapping: mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.end = len(mapping)
        self.position = 0

    def fail(self, problem: str, offset: int) -> NoReturn:
        """Raise CorruptModel for `problem` at byte `offset`."""
        raise CorruptModel(f"{self.path}: {problem} (byte {offset})")

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count whose items could not fit into what remains of the file."""
        remaining = self.end - self.position
        if count * least_bytes > remaining:
            self.fail(f"{count} {what} cannot fit into {remaining} bytes", self.position)

    def take(self, layout: struct.Struct, what: str) -> int | float:
        """Read one number."""
        if self.position + layout.size > self.end:
            self.fail(f"the file ends inside {what}", self.position)
        number: int | float = layout.unpack_from(self.mapping, self.position)[0]
        self.position += layout.size
        return number

    def take_int(self, layout: struct.Struct, what: str) -> int:
        """Read one whole number."""
        number = self.take(layout, what)
        assert isinstance(number, int)
        return number

    def take_string(self, what: str) -> str:
        """Read a length and that many bytes of UTF-8."""
        start = self.position
        length = self.take_int(_U64, f"the length of {what}")
        remaining = self.end - self.position
        if length > remaining:
            self.fail(f"{what} of {length} bytes, but {remaining} remain", start)
        raw = self.mapping[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", start)

    def take_name(self, what: str) -> str:
        """Read the name of a key or tensor: a string of sane length."""
        start = self.position
        if self.end - start >= 8 and _U64.unpack_from(self.mapping, start)[0] > _MOST_NAME_BYTES:
            self.fail(f"a {what} longer than {_MOST_NAME_BYTES} bytes", start)
        name = self.take_string(f"a {what}")
        if not name:
            self.fail(f"an empty {what}", start)
        return name

    def skip_strings(self, count: int, what: str) -> NDArray[np.int64]:
        """Step over `count` strings, reading lengths only; returns where their bytes begin."""
        mapping, read, last = self.mapping, _U64.unpack_from, self.end - 8
        starts = np.empty(count, np.int64)
        position, index, steps = self.position, 0, _STEPS
        while index < count:
            run = find_run(mapping, position, count - index)
            if run.size:
                starts[index : index + run.size] = run + 8
                index += run.size
                position = int(run[-1]) + 8 + mapping[int(run[-1])]
            # Where long strings are many, fewer and fewer attempts to go faster are made.
            steps = _STEPS if run.size > steps else 2 * steps
            for _ in range(min(steps, count - index)):
                if position > last:
                    self.fail(f"the file ends inside item {index} of {what}", self.position)
                starts[index] = position + 8
                position += 8 + read(mapping, position)[0]
                index += 1
        if position > self.end:
            self.fail(f"the file ends inside the last item of {what}", self.position)
        self.position = position
        return starts


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Read and check magic and version; returns version, tensor count, pair count."""
    magic, version, num_tensors, num_pairs = _HEADER.unpack_from(cursor.mapping)
    if magic != b"GGUF":
        cursor.fail(f"not a GGUF file: it begins with {magic!r}", 0)
    if version and not version & 0xFFFF:
        hint = "convert it with gguf_convert_endian.py"
        raise UnsupportedModel(f"{cursor.path}: a big-endian GGUF file; {hint}")
    if version not in (2, 3):
        hint = "versions 2 and 3 are read; convert the model anew"
        raise UnsupportedModel(f"{cursor.path}: GGUF version {version}; {hint}")
    cursor.position = _HEADER.size
    return version, num_tensors, num_pairs


def _read_entry(cursor: _Cursor, key: str) -> Entry:
    """Read the type and value that follow a key."""
    kind = _take_type(cursor, key)
    offset = cursor.position
    if kind is ValueType.ARRAY:
        return Entry(kind, _read_array(cursor, key), offset)
    if kind is ValueType.STRING:
        return Entry(kind, cursor.take_string(f"key '{key}'"), offset)
    number = cursor.take(_LAYOUTS[kind], f"key '{key}'")
    if kind is not ValueType.BOOL:
        return Entry(kind, number, offset)
    if number not in (0, 1):
        cursor.fail(f"key '{key}' is a bool of value {number}", offset)
    return Entry(kind, bool(number), offset)


def _read_array(cursor: _Cursor, key: str) -> ArrayValue:
    """Read an array's head and step over its elements."""
    element = _take_type(cursor, key)
    if element is ValueType.ARRAY:
        hint = "no supported architecture uses one"
        raise UnsupportedModel(f"{cursor.path}: key '{key}' is an array of arrays; {hint}")
    count = cursor.take_int(_U64, f"key '{key}'")
    what, start = f"key '{key}'", cursor.position
    if element is ValueType.STRING:
        cursor.check_count(count, 8, f"strings of {what}")
        starts = cursor.skip_strings(count, what)
        return ArrayValue(element, count, start, cursor.position, starts)
    cursor.check_count(count, _LAYOUTS[element].size, f"items of {what}")
    cursor.position += count * _LAYOUTS[element].size
    return ArrayValue(element, count, start, cursor.position)


def _take_type(cursor: _Cursor, key: str) -> ValueType:
    """Read a value type."""
    number = cursor.take_int(_U32, f"the type of key '{key}'")
    try:
        return ValueType(number)
    except ValueError:
        problem = f"{cursor.path}: key '{key}' has unknown value type {number}"
        raise UnsupportedModel(problem) from None


def _get_alignment(cursor: _Cursor, entries: Mapping[str, Entry]) -> int:
    """Alignment of tensor data in bytes: 32 unless the file says otherwise."""
    entry = entries.get("general.alignment")
    if entry is None:
        return 32
    value = entry.value
    if entry.type is not ValueType.UINT32 or not isinstance(value, int):
        cursor.fail("key 'general.alignment' is not a uint32", entry.offset)
    if value <= 0 or value & (value - 1):
        cursor.fail(f"key 'general.alignment' is {value}, not a power of two", entry.offset)
    return value


def _read_tensor(cursor: _Cursor, alignment: int) -> TensorInfo:
    """Read one tensor info; its offset is still relative to the data section."""
    start = cursor.position
    name = cursor.take_name("tensor name")
    what = f"the info of tensor '{name}'"
    dims = cursor.take_int(_U32, what)
    if not 1 <= dims <= 4:
        cursor.fail(f"tensor '{name}' has {dims} dimensions", start)
    shape = tuple(cursor.take_int(_U64, what) for _ in range(dims))[::-1]
    number = cursor.take_int(_U32, what)
    offset = cursor.take_int(_U64, what)
    fmt = _FORMATS.get(number)
    if fmt is None:
        known = ", ".join(each.value for each in Format)
        kind = _OTHER_TYPES.get(number, f"number {number}")
        raise UnsupportedModel(
            f"{cursor.path}: tensor '{name}' has type {kind}; requantise it to one of {known}"
        )
    if min(shape) == 0:
        cursor.fail(f"tensor '{name}' has a zero extent in {shape}", start)
    if shape[-1] % fmt.block.weights:
        block = fmt.block.weights
        cursor.fail(f"tensor '{name}': rows of {shape[-1]} do not fill blocks of {block}", start)
    if offset % alignment:
        cursor.fail(f"tensor '{name}': offset {offset} is not a multiple of {alignment}", start)
    weights = 1
    for extent in shape:
        weights *= extent
    return TensorInfo(name, shape, fmt, offset, fmt.get_bytes(weights))


def _place_tensors(
    cursor: _Cursor, tensors: Mapping[str, TensorInfo], alignment: int
) -> dict[str, TensorInfo]:
    """Turn offsets absolute; check that tensors fill the data section with only padding between."""
    base = _align(cursor.position, alignment)
    end = base
    for info in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        start = base + info.offset
        if start + info.bytes > cursor.end:
            problem = f"tensor '{info.name}' ends at byte {start + info.bytes}"
            cursor.fail(f"{problem}, beyond the file's {cursor.end} bytes", start)
        if start < end:
            cursor.fail(f"tensor '{info.name}' overlaps the one before it", start)
        if start > _align(end, alignment):
            cursor.fail(f"{start - end} bytes before tensor '{info.name}' belong to none", end)
        end = start + info.bytes
    if tensors and cursor.end > _align(end, alignment):
        cursor.fail(f"{cursor.end - end} bytes after the last tensor belong to none", end)
    return {
        name: TensorInfo(name, info.shape, info.format, base + info.offset, info.bytes)
        for name, info in tensors.items()
    }


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


_HEADER = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MOST_NAME_BYTES = 65535
_STEPS = 64
_LEAST_PAIR_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_LAYOUTS = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: _U32,
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: _U64,
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_NUMPY = {kind: np.dtype("<" + layout.format[1:]) for kind, layout in _LAYOUTS.items()}

_FORMATS = {
    0: Format.F32,
    1: Format.F16,
    2: Format.Q4_0,
    3: Format.Q4_1,
    6: Format.Q5_0,
    7: Format.Q5_1,
    8: Format.Q8_0,
    12: Format.Q4_K,
    13: Format.Q5_K,
    14: Format.Q6_K,
    30: Format.BF16,
}
# Names of types we do not read, for the message.
_OTHER_TYPES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
