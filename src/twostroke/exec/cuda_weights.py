"""A model's weights as the GPU's kernels read them, taken from the mapped file one by one.

Owns what happens to a weight on its way: which rows and columns a rank takes, what is laid one
below the other, and in which order. A weight goes to the device as it is stored, some rows at a
time, and is taken apart there, so host memory never holds one and its pages are let go of at once.

- q, k and v become one matrix, gate and up another; a bias is as long as the matrix, zeros where a
  part has none. Parts of different formats become the widest, whose values are the same ones.
- Rows of q and k, and what goes with them, are put in the order of HALF rope pairs.
- Norms are float32 with the model's offset in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from twostroke.errors import DeviceError, UnsupportedModel
from twostroke.exec.cuda_formats import (
    MERGED,
    QUANTISED_WEIGHTS,
    choose_activations,
    choose_quantising,
)
from twostroke.kernels.cuda.repack import (
    dequantise_rows,
    permute_rows,
    quantise_groups,
    repack,
    shard_columns,
    stack,
)
from twostroke.kernels.cuda.types import (
    DenseMatrix,
    Matrix,
    MatrixPart,
    QuantMatrix,
    Tensor,
    Weights,
)
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec, RopeLayout
from twostroke.spec.shard import Shard, shard_spec
from twostroke.weights.mapping import release_pages
from twostroke.weights.tensor import HostTensor

OnLoaded = Callable[[int, int], None]
_DTYPES = {KvElement.F16: torch.float16, KvElement.BF16: torch.bfloat16}
_BY_COLUMNS = ("o", "down")


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Where weights go, and which of them.

    device: as PyTorch names it. dtype: of activations, float16 or bfloat16. rank, world: of the
    ranks that share every matrix. layers: of a pipeline stage, None for all; the first stage has
    the embedding, the last one the final norm and the head. quantise: "int4" or "int8" for matrices
    that are stored as floats; "" leaves them.
    """

    device: str
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    layers: range | None = None
    quantise: str = ""


def choose_dtype(spec: ModelSpec) -> torch.dtype:
    """The type of activations for this model (see cuda_formats.choose_activations)."""
    return _DTYPES[choose_activations(spec)[0]]


def load_weights(
    spec: ModelSpec,
    tensors: Mapping[str, HostTensor],
    target: LoadTarget,
    progress: OnLoaded = lambda done, total: None,
) -> Weights:
    """The weights of a rank by canonical name, layers counted from its stage's first.

    spec: of the whole model. tensors: of the file, by canonical name. progress: called after each
    tensor with the bytes done and those there are.
    Raises: DeviceError where the model cannot be shared so, UnsupportedModel for experts.
    """
    if spec.num_experts:
        raise UnsupportedModel(f"{spec.name}: mixtures of experts do not run on a GPU here")
    loader = _Loader(spec, tensors, target, progress)
    return loader.load()


def count_weight_bytes(weights: Weights) -> int:
    """Bytes of all weights, each matrix and bias once."""
    parts = [each for each in weights.values() if isinstance(each, MatrixPart)]
    matrices = {id(each.matrix): each.matrix.bytes for each in parts}
    vectors = {id(each): each for each in weights.values() if isinstance(each, Tensor)}
    vectors |= {id(each.bias): each.bias for each in parts if each.bias is not None}
    counted = sum(each.numel() * each.element_size() for each in vectors.values())
    return sum(matrices.values()) + counted


class _Loader:
    """One loading; see load_weights."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, HostTensor],
        target: LoadTarget,
        progress: OnLoaded,
    ) -> None:
        self._spec, self._tensors, self._target = spec, tensors, target
        self._device = torch.device(target.device)
        self._shard: Shard = shard_spec(spec, target.rank, target.world)
        self._layers = range(spec.num_layers) if target.layers is None else target.layers
        self._progress = progress
        self._done = 0
        self._total = sum(each.data.nbytes for each in tensors.values())
        self._weights: Weights = {}

    def load(self) -> Weights:
        spec, weights = self._spec, self._weights
        is_first, is_last = self._layers.start == 0, self._layers.stop == spec.num_layers
        has_own_head = not self._shard.spec.tied_embeddings
        if is_first or (is_last and not has_own_head):
            weights["embed"] = _whole(self._load_matrix("embed"))
        if spec.stored_rope_factors:
            weights["rope_factors"] = self._load_vector("rope_factors")
        for index, layer in enumerate(self._layers):
            self._load_layer(f"layers.{layer}.", f"layers.{index}.")
        if is_last:
            weights["final_norm"] = self._load_vector("final_norm")
            if has_own_head:
                weights["head"] = _whole(self._load_head())
        if self._done < self._total:  # the rest belongs to others
            self._progress(self._total, self._total)
        return weights

    def _load_layer(self, stored: str, named: str) -> None:
        for norm in ("attn_norm", "ffn_norm", "post_attn_norm", "post_ffn_norm"):
            if stored + norm in self._tensors:
                self._weights[named + norm] = self._load_vector(stored + norm)
        for norm in ("q_norm", "k_norm"):
            if stored + norm in self._tensors:
                values = self._load_vector(stored + norm)
                self._weights[named + norm] = values[self._order_rows(1)].contiguous()
        for parts in MERGED.values():
            self._load_merged(stored, named, parts)
        for name in _BY_COLUMNS:
            bias = None
            if stored + name + ".bias" in self._tensors and self._shard.has_bias:
                bias = self._load_vector(f"{stored}{name}.bias").to(self._target.dtype)
                self._weights[f"{named}{name}.bias"] = bias
            self._weights[named + name] = _whole(self._load_matrix(stored + name), bias)

    def _load_merged(self, stored: str, named: str, parts: tuple[str, ...]) -> None:
        """The parts' matrices as one, and a bias for all where one of them has one."""
        matrices = [self._load_rows(stored + part, part) for part in parts]
        bias = self._load_biases(stored, parts, matrices)
        merged = _stack(matrices, self._target.dtype)
        first = 0
        for part, matrix in zip(parts, matrices, strict=True):
            last = first + matrix.outputs
            self._weights[named + part] = MatrixPart(merged, first, last, bias)
            if bias is not None:
                self._weights[f"{named}{part}.bias"] = bias[first:last]
            first = last

    def _load_rows(self, name: str, part: str) -> Matrix:
        """The rank's outputs of a weight, in the order of HALF rope pairs."""
        matrix = self._load_matrix(name, self._shard.get_rows(part))
        if part in ("q", "k") and self._spec.rope_layout is RopeLayout.INTERLEAVED:
            heads = matrix.outputs // self._spec.head_dim
            matrix = permute_rows(matrix, self._order_rows(heads))
        return matrix

    def _load_biases(
        self, stored: str, parts: tuple[str, ...], matrices: list[Matrix]
    ) -> Tensor | None:
        if not any(f"{stored}{part}.bias" in self._tensors for part in parts):
            return None
        biases = []
        for part, matrix in zip(parts, matrices, strict=True):
            name, rows = f"{stored}{part}.bias", self._shard.get_rows(part)
            if name not in self._tensors:
                biases.append(torch.zeros(matrix.outputs, device=self._device))
                continue
            values = self._load_vector(name)[rows.start : rows.stop]
            heads = matrix.outputs // self._spec.head_dim
            is_roped = part in ("q", "k")
            biases.append(values[self._order_rows(heads)] if is_roped else values)
        return torch.cat(biases).to(self._target.dtype)

    def _order_rows(self, heads: int) -> Tensor:
        """(heads * head_dim,) int64: which row each of HALF pairs' rows is in the file.

        A pair (2i, 2i + 1) of the INTERLEAVED layout becomes (i, i + head_dim / 2).
        """
        size = self._spec.head_dim
        order = torch.arange(heads * size, device=self._device).view(heads, size)
        if self._spec.rope_layout is RopeLayout.INTERLEAVED:
            order = torch.cat([order[:, 0::2], order[:, 1::2]], dim=1)
        return order.reshape(-1)

    def _load_head(self) -> Matrix:
        """The rank's rows of the head, filled up with zeros to what every rank has."""
        name = "embed" if self._spec.tied_embeddings else "head"
        rows = self._shard.vocab
        return self._load_matrix(name, rows, self._shard.head_rows - len(rows))

    def _load_matrix(self, name: str, rows: range | None = None, padding: int = 0) -> Matrix:
        """A stored matrix, some rows of it, or a rank's columns; as floats or as integers.

        padding: rows of zeros behind it.
        """
        tensor = self._tensors[name]
        outputs, inputs = tensor.spec.shape
        rows = range(outputs) if rows is None else rows
        data = tensor.data.reshape(outputs, -1)[rows.start : rows.stop].reshape(-1)
        if padding:
            row = tensor.spec.bytes // outputs
            data = np.concatenate([data, np.zeros(padding * row, np.uint8)])
        matrix = self._repack(tensor, data, (len(rows) + padding, inputs))
        self._finish(tensor, data.nbytes)
        short = name.rpartition(".")[2]
        if short in _BY_COLUMNS and self._target.world > 1:
            matrix = self._shard_columns(name, matrix, self._shard.get_columns(short))
        quantise = choose_quantising(self._spec, name, self._target.quantise)
        if quantise and isinstance(matrix, DenseMatrix):
            wanted = QUANTISED_WEIGHTS[quantise]
            return quantise_groups(matrix.values, wanted.bits, wanted.group)
        return matrix

    def _repack(
        self, tensor: HostTensor, data: NDArray[np.uint8], shape: tuple[int, int]
    ) -> Matrix:
        return repack(tensor.spec.format, data, shape, self._device, self._target.dtype)

    def _shard_columns(self, name: str, matrix: Matrix, columns: range) -> Matrix:
        try:
            return shard_columns(matrix, columns.start, columns.stop)
        except ValueError as error:
            raise DeviceError(
                f"{name} cannot be divided over {self._target.world} devices: {error}"
            ) from error

    def _load_vector(self, name: str) -> Tensor:
        """A norm, a bias or the rope factors as float32, norms with the model's offset."""
        tensor = self._tensors[name]
        values = dequantise(tensor.spec.format, tensor.data, tensor.spec.shape)
        if self._spec.norm_offset and name.endswith("norm"):
            values = values + np.float32(self._spec.norm_offset)
        self._finish(tensor, tensor.data.nbytes)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device)

    def _finish(self, tensor: HostTensor, count: int) -> None:
        release_pages(tensor.data)
        self._done += count
        self._progress(self._done, self._total)


def _whole(matrix: Matrix, bias: Tensor | None = None) -> MatrixPart:
    return MatrixPart(matrix, 0, matrix.outputs, bias)


def _stack(matrices: list[Matrix], dtype: torch.dtype) -> Matrix:
    """One below the other; where one is of floats all are, rounded to `dtype`."""
    if any(isinstance(each, DenseMatrix) for each in matrices):
        matrices = [
            DenseMatrix(dequantise_rows(each, 0, each.outputs).to(dtype))
            if isinstance(each, QuantMatrix)
            else each
            for each in matrices
        ]
    return stack(matrices)
