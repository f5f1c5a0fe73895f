"""Ties what a file stores to what a ModelSpec asks for.

The readers of each file format translate names; this module checks, once for all of them, that
every tensor the model needs is there, that nothing is left over, and that shapes agree. It is
what makes "summed tensors equal the file's bytes" true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.model import ModelSpec, TensorSpec
from twostroke.spec.quant import Format
from twostroke.weights.tensor import HostTensor


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as a file has it: its name there, shape, format, bytes (uint8), byte offset."""

    source: str
    shape: tuple[int, ...]
    format: Format
    data: NDArray[np.uint8]
    offset: int


def bind_tensors(
    path: Path,
    spec: ModelSpec,
    stored: Mapping[str, StoredTensor],
    get_source: Callable[[str], str],
) -> tuple[ModelSpec, dict[str, HostTensor]]:
    """Match stored tensors, by canonical name, with those the model is made of.

    Args: spec, whose formats are still unknown; stored, by canonical name; get_source, which
    gives the name a canonical tensor has in this kind of file.
    Returns: the spec with its formats, and the tensors in forward order.
    Raises: CorruptModel for a missing tensor or a wrong shape, UnsupportedModel for one too many.
    """
    formats = tuple((name, tensor.format) for name, tensor in stored.items())
    wanted = {tensor.name: tensor for tensor in replace(spec, formats=()).tensors()}
    for name, tensor in stored.items():
        if name not in wanted:
            problem = f"tensor '{tensor.source}' has no place in a {spec.family} model like this"
            raise UnsupportedModel(f"{path}: {problem}")
        _check_shape(path, wanted[name], tensor)
    for name in wanted:
        if name not in stored:
            raise CorruptModel(f"{path}: tensor '{get_source(name)}' is missing")
    bound = replace(spec, formats=formats)
    tensors = {each.name: HostTensor(each, stored[each.name].data) for each in bound.tensors()}
    return bound, tensors


def _check_shape(path: Path, wanted: TensorSpec, stored: StoredTensor) -> None:
    if wanted.shape != stored.shape:
        raise CorruptModel(
            f"{path}: tensor '{stored.source}' is {stored.shape}, but the model's sizes make it "
            f"{wanted.shape} (byte {stored.offset})"
        )
