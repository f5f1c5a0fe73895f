"""Random weights of a ModelSpec, made on the device they are used on; no file is read.

A weight is drawn from a normal of 1 / sqrt(inputs), so that activations keep their size through
any number of layers and attention's logits are of order one. q, k and v are made as one matrix, and
gate and up as another, as the engine joins them; each is a part of it. Our engine and its peers
compute with the same memory: two copies of a 26 GB model would not leave room for keys and values.
"""

from __future__ import annotations

import math

import torch

from twostroke.bench.gpu.workloads import SEED
from twostroke.kernels.cuda.repack import make_random
from twostroke.kernels.cuda.types import DenseMatrix, Matrix, MatrixPart, Weights
from twostroke.spec.model import ModelSpec

INT4_GROUP = 32

# Weights that lie in one matrix, one below the other.
JOINED = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class SyntheticWeights:
    """All weights of a model, as the engine wants them (see kernels/cuda/types.py: Weights).

    spec: without biases, QK-norms and experts. Matrices are in `dtype`, or with `int4` 4-bit in
    groups of INT4_GROUP; norms are float32, the embedding is in `dtype`.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, int4: bool
    ) -> None:
        self._dtype, self._device, self._int4 = dtype, device, int4
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(SEED)
        self.weights: Weights = {}
        shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}
        self._add("embed", DenseMatrix(self._draw(shapes.pop("embed"), 1.0)))
        for index in range(spec.num_layers):
            prefix = f"layers.{index}."
            for parts in JOINED:
                names = [prefix + part for part in parts]
                self._join(names, [shapes.pop(name) for name in names])
        for name, shape in shapes.items():
            if len(shape) == 1:
                self.weights[name] = self._draw_norm(shape)
            else:
                self._join([name], [shape])

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self._device

    def get_matrix(self, name: str) -> Matrix:
        """The whole matrix that a weight is part of."""
        part = self.weights[name]
        assert isinstance(part, MatrixPart)
        return part.matrix

    def get_joined(self, name: str) -> torch.Tensor:
        """Values (outputs, inputs) of the whole dense matrix that a weight is part of."""
        matrix = self.get_matrix(name)
        assert isinstance(matrix, DenseMatrix), f"{name} is not dense"
        return matrix.values

    def get_values(self, name: str) -> torch.Tensor:
        """A dense weight alone (outputs, inputs), a view; or a norm (n,) in the dtype."""
        part = self.weights[name]
        if isinstance(part, MatrixPart):
            return self.get_joined(name)[part.first : part.last]
        return part.to(self._dtype)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of all matrices but the embedding, each once."""
        whole = {
            id(part.matrix): part.matrix
            for name, part in self.weights.items()
            if isinstance(part, MatrixPart) and name != "embed"
        }
        return sum(matrix.bytes for matrix in whole.values())

    def close(self) -> None:
        """Let go of everything."""
        self.weights.clear()

    def _join(self, names: list[str], shapes: list[tuple[int, ...]]) -> None:
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        if self._int4:
            seed = SEED + len(self.weights)
            matrix: Matrix = make_random((outputs, inputs), 4, INT4_GROUP, self._device, seed)
        else:
            matrix = DenseMatrix(self._draw((outputs, inputs), 1 / math.sqrt(inputs)))
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            self.weights[name] = MatrixPart(matrix, first, first + shape[0])
            first += shape[0]

    def _add(self, name: str, matrix: Matrix) -> None:
        self.weights[name] = MatrixPart(matrix, 0, matrix.outputs)

    def _draw(self, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        return values.normal_(0.0, deviation, generator=self._generator)

    def _draw_norm(self, shape: tuple[int, ...]) -> torch.Tensor:
        # Near one, as trained norms are, and not one: a norm left out would show.
        values = torch.empty(shape, dtype=torch.float32, device=self._device)
        return values.uniform_(0.9, 1.1, generator=self._generator)


def make_source(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, int4: bool
) -> SyntheticWeights:
    """Random weights of `spec`, all of them, on the device."""
    return SyntheticWeights(spec, dtype, device, int4)
