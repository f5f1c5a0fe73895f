"""What the GPU's kernels share: a step's tensors, the KV pool, matrices as the device holds them.

Owns shapes and nothing that computes. Every tensor here lies on one device: a GPU, or the CPU where
the kernels run in Triton's interpreter. T is the number of tokens of the step, R of rows, L of
positions with logits; all index tensors are int32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor as Tensor

# Tokens of a KV block: one tile of keys, so that a tile is one contiguous piece of memory.
BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """One step's inputs on the device, rows laid end to end.

    tokens (T,): ids. positions (T,): place in the sequence. token_rows (T,): the row of each token,
    -1 for padding, whose KV is not written. row_offsets (R + 1,): row r owns tokens row_offsets[r]
    … row_offsets[r + 1] - 1, at consecutive positions. contexts (R,): keys that a row's last token
    sees without a window, itself included; 0 for padding. block_tables (R, W): physical block of
    each logical block, anything beyond the end. logit_rows (L,): indices into the T tokens.
    decode_rows (D,): the rows of exactly one token. tiles (N, 2): (row, index within the row of the
    tile's first token) of each tile of `tile_tokens` tokens of the other rows.
    longest: no row of this step, nor of any step the same launches are replayed for, has a larger
    context; an upper bound that launches may be sized by.
    """

    tokens: Tensor
    positions: Tensor
    token_rows: Tensor
    row_offsets: Tensor
    contexts: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    decode_rows: Tensor
    tiles: Tensor
    tile_tokens: int
    longest: int


@dataclass(frozen=True, slots=True, eq=False)
class KvLayer:
    """One layer's keys and values in the pool: strided views of it, the last two axes contiguous.

    keys, values (blocks, kv_heads, BLOCK_TOKENS, head_dim): float16, bfloat16, float32, int8 or
    float8_e4m3fn. key_scales, value_scales (blocks, kv_heads, BLOCK_TOKENS) float32 of the 8-bit
    ones, which stand for element times scale, and whose keys are rotated (see
    kernels/reference/ops.py: rotate); None of the others.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DenseMatrix:
    """A weight matrix: values (outputs, inputs), contiguous, in the dtype of the activations."""

    values: Tensor

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return int(self.values.shape[0])

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return int(self.values.shape[1])

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True, slots=True, eq=False)
class QuantMatrix:
    """A weight matrix (outputs, inputs) of small integers q in groups along the inputs.

    A weight is (q - zero) * scale of its group, or q * scale + minimum where there are `minimums`.
    bits 4: q in 0 … 15, zero 8; bits 8: q in -128 … 127, zero 0. packed: the integers, in the
    layout of kernels/cuda/quantised.py. scales, minimums (outputs, inputs / group), or as that
    layout wants them, in the dtype of the activations.
    """

    packed: Tensor
    scales: Tensor
    minimums: Tensor | None
    bits: int
    group: int
    outputs: int
    inputs: int

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        tensors = [self.packed, self.scales]
        if self.minimums is not None:
            tensors.append(self.minimums)
        return sum(each.numel() * each.element_size() for each in tensors)


Matrix = DenseMatrix | QuantMatrix


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """What a product of few rows does besides multiplying, in the same launch.

    norm (inputs,): x is first normed by its root mean square and multiplied by this, with `eps`;
    dense products only.
    bias (outputs,): added. gate: "silu" or "gelu_tanh": the matrix is the gate's rows on top of
    up's, and the result activation(gate) * up, half as wide. residual (T, width of the result):
    added last; it may be the output itself.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    bias: Tensor | None = None
    gate: str = ""
    residual: Tensor | None = None


PLAIN = Fused()


@dataclass(frozen=True, slots=True, eq=False)
class MatrixPart:
    """Outputs first … last - 1 of a matrix: what one weight of the model is of a merged one.

    q, k and v lie one on top of the other in one matrix, gate and up in another, so that each pair
    or triple can be one product. bias (outputs of the whole matrix,) in the dtype of the
    activations, where one of the parts has one; None where none has.
    """

    matrix: Matrix
    first: int
    last: int
    bias: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """True when it is all of the matrix."""
        return self.first == 0 and self.last == self.matrix.outputs


# A model's weights by canonical name (see spec/model.py): matrices as parts, norms as float32.
Weights = dict[str, MatrixPart | Tensor]
