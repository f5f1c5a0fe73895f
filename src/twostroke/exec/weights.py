"""The weights of a model as the native kernels read them: from a kept file, or packed here.

All matrices lie in one block of memory, one after another, at places that follow from their names,
formats and shapes alone. So the block can be kept as a file and mapped by the next process, and a
replaced executor maps it again. Vectors are small and made anew at every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twostroke.exec.floats import to_float
from twostroke.kernels.cpu.weights import (
    ALIGNMENT,
    PackedMatrix,
    Vector,
    allocate,
    get_layout_fingerprint,
    get_packed_bytes,
    pack_into,
    view_matrix,
)
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format
from twostroke.weights.mapping import release_pages
from twostroke.weights.packed import Bytes, PackedFiles
from twostroke.weights.tensor import HostTensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one matrix (outputs, inputs) lies in the block, in bytes."""

    start: int
    bytes: int
    format: Format
    shape: tuple[int, int]

    def view(self, block: Bytes) -> Bytes:
        return block[self.start : self.start + self.bytes]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The block of all matrices: their places by name, and its bytes."""

    places: dict[str, _Place]
    bytes: int

    def describe(self) -> str:
        """All that the block's bytes depend on, beside the file's weights."""
        places = ";".join(
            f"{name} {place.start} {place.format.value} {place.shape}"
            for name, place in self.places.items()
        )
        return f"{get_layout_fingerprint():x};{places}"


def load_weights(
    pool: Any, spec: ModelSpec, tensors: Mapping[str, HostTensor], files: PackedFiles | None = None
) -> dict[str, PackedMatrix | Vector]:
    """Every weight by its canonical name.

    pool: the `_native.ThreadPool` that packs. files: where packed weights are kept, if anywhere.
    """
    layout = _place_matrices(tensors)
    block = None if files is None else files.try_map(layout.describe(), layout.bytes)
    if block is None:
        block = _pack(pool, tensors, layout, files)
    return {
        name: view_matrix(
            place.view(block), tensor.spec.format, place.shape, name.rpartition(".")[2]
        )
        if (place := layout.places.get(name))
        else Vector(to_float(spec, tensor))
        for name, tensor in tensors.items()
    }


def _place_matrices(tensors: Mapping[str, HostTensor]) -> _Layout:
    places: dict[str, _Place] = {}
    end = 0
    for name, tensor in tensors.items():
        if len(tensor.spec.shape) == 2:
            shape = (tensor.spec.shape[0], tensor.spec.shape[1])
            size = get_packed_bytes(tensor.spec.format, shape)
            places[name] = _Place(end, size, tensor.spec.format, shape)
            end += -(-size // ALIGNMENT) * ALIGNMENT
    return _Layout(places, end)


def _pack(
    pool: Any, tensors: Mapping[str, HostTensor], layout: _Layout, files: PackedFiles | None
) -> Bytes:
    """Pack every matrix, into a file where one can be kept, else into memory."""
    draft = None if files is None else files.try_begin(layout.describe(), layout.bytes)
    if files is None or draft is None:
        block = allocate(layout.bytes)
        _pack_into(block, pool, tensors, layout)
        return block
    with draft:
        _pack_into(draft.memory, pool, tensors, layout)
        draft.keep()
    # Mapped anew, so that nothing can write to it any more.
    mapped = files.try_map(layout.describe(), layout.bytes)
    return draft.memory if mapped is None else mapped


def _pack_into(block: Bytes, pool: Any, tensors: Mapping[str, HostTensor], layout: _Layout) -> None:
    for name, place in layout.places.items():
        data = tensors[name].data
        pack_into(place.view(block), pool, place.format, data, place.shape)
        release_pages(data)  # the model's own file is not read again
