"""One safetensors file, read over a memory mapping.

    u64 header length | JSON header, padded with spaces | tensor data, without gaps

Every extent and offset of the header is checked against the file before a tensor is handed out.
Floating formats only: weights quantised by other tools mean nothing without their own code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.quant import Format
from twostroke.weights.binding import StoredTensor
from twostroke.weights.json_file import parse_json
from twostroke.weights.mapping import FileIdentity, map_file

_LENGTH = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_MOST_DIMENSIONS = 8
_FORMATS = {"F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsFile:
    """A checked file: its tensors under their own names, and which file it is."""

    path: Path
    tensors: dict[str, StoredTensor]
    identity: FileIdentity


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map and check a safetensors file; no tensor data is touched.

    Raises: CorruptModel for a truncated or lying file, UnsupportedModel for an element type that
    is not F32, F16 or BF16, UnknownModel if it cannot be opened.
    """
    mapping, identity = map_file(path, least_bytes=_LENGTH.size + 2)
    length = _LENGTH.unpack_from(mapping)[0]
    base = _LENGTH.size + length
    if length > _MOST_HEADER_BYTES or base > len(mapping):
        _fail(path, f"a header of {length} bytes in a file of {len(mapping)}", 0)
    header = parse_json(mapping[_LENGTH.size : base], f"{path}: header at byte {_LENGTH.size}")
    header.pop("__metadata__", None)
    tensors = {name: _read_tensor(path, mapping, base, name, header[name]) for name in header}
    _check_cover(path, tensors, base, len(mapping))
    return SafetensorsFile(path, tensors, identity)


def _read_tensor(path: Path, mapping: mmap, base: int, name: str, info: Any) -> StoredTensor:
    """Check one entry of the header; `base` is where the data begins."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor '{name}' needs dtype, shape and data_offsets", _LENGTH.size)
    shape, offsets, dtype = info["shape"], info["data_offsets"], info["dtype"]
    if not _are_sizes(shape) or not shape or len(shape) > _MOST_DIMENSIONS or min(shape) == 0:
        _fail(path, f"tensor '{name}' has the impossible shape {shape}", _LENGTH.size)
    if not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path, f"tensor '{name}' has the impossible data_offsets {offsets}", _LENGTH.size)
    fmt = _FORMATS.get(dtype) if isinstance(dtype, str) else None
    if fmt is None:
        known = ", ".join(_FORMATS)
        raise UnsupportedModel(f"{path}: tensor '{name}' has dtype {dtype}; supported are {known}")
    weights = 1
    for extent in shape:
        weights *= extent
    start, end = base + offsets[0], base + offsets[1]
    if end > len(mapping):
        _fail(path, f"tensor '{name}' ends at byte {end} of {len(mapping)}", start)
    size = fmt.get_bytes(weights)
    if end - start != size:
        _fail(path, f"tensor '{name}' takes {end - start} bytes, its shape {size}", start)
    data = np.frombuffer(mapping, np.uint8, size, start)
    return StoredTensor(name, tuple(shape), fmt, data, start)


def _are_sizes(values: Any) -> bool:
    """True for a list of whole numbers from 0 up."""
    return isinstance(values, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values
    )


def _check_cover(path: Path, tensors: dict[str, StoredTensor], base: int, file_bytes: int) -> None:
    """The tensors must fill the data section: no gap, no overlap, nothing after the last."""
    end = base
    for tensor in sorted(tensors.values(), key=lambda each: each.offset):
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "follows a gap"
            _fail(path, f"tensor '{tensor.source}' {problem}", tensor.offset)
        end += tensor.data.size
    if end != file_bytes:
        _fail(path, f"{file_bytes - end} bytes after the last tensor belong to none", end)


def _fail(path: Path, problem: str, offset: int) -> NoReturn:
    raise CorruptModel(f"{path}: {problem} (byte {offset})")
