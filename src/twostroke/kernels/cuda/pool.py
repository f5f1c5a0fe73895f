"""The KV pool on the device: one piece of memory, a block of it after another.

A block holds its 64 tokens of all layers in one piece, so that moving a block is one copy:

    block b | layer 0: keys, values | layer 1: keys, values | … | scales of all layers, if any |

keys and values are (kv_heads, BLOCK_TOKENS, head_dim), scales (kv_heads, BLOCK_TOKENS) float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twostroke.errors import DeviceError
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, Tensor
from twostroke.spec.kv import KvElement

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def get_kv_dtype(element: KvElement) -> torch.dtype:
    """The dtype of an element of the pool. Raises DeviceError where PyTorch has none."""
    if element.value == "fp8":
        return torch.float8_e4m3fn
    if element.value not in _DTYPES:
        raise DeviceError(f"keys and values cannot be kept as {element.value} on this device")
    return _DTYPES[element.value]


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Extents of a pool: of one rank, where ranks share the model."""

    layers: int
    kv_heads: int
    head_dim: int
    element: KvElement

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        token = self.kv_heads * self.element.get_head_bytes(self.head_dim)
        return 2 * self.layers * BLOCK_TOKENS * token


class KvPool:
    """`num_blocks` blocks and the layers' views of them. memory (num_blocks, block_bytes) uint8."""

    def __init__(self, shape: PoolShape, num_blocks: int, device: str) -> None:
        self.shape = shape
        self.memory = torch.zeros((num_blocks, shape.block_bytes), dtype=torch.uint8, device=device)
        dtype = get_kv_dtype(shape.element)
        self.layers = tuple(self._view_layer(layer, dtype) for layer in range(shape.layers))

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return int(self.memory.shape[0])

    @property
    def bytes(self) -> int:
        """Bytes of the pool."""
        return self.memory.numel()

    def _view_layer(self, layer: int, dtype: torch.dtype) -> KvLayer:
        shape, item = self.shape, dtype.itemsize
        has_scales = item == 1
        tile = (shape.kv_heads, BLOCK_TOKENS)
        values = tile[0] * tile[1] * shape.head_dim
        typed = self.memory.view(-1).view(dtype)
        extents = (self.num_blocks, *tile, shape.head_dim)
        strides = (shape.block_bytes // item, tile[1] * shape.head_dim, shape.head_dim, 1)
        keys, vals = (
            typed.as_strided(extents, strides, (2 * layer + which) * values) for which in (0, 1)
        )
        if not has_scales:
            return KvLayer(keys, vals)
        scales = self.memory.view(-1).view(torch.float32)
        start = 2 * shape.layers * values // 4
        steps = (shape.block_bytes // 4, BLOCK_TOKENS, 1)
        key_scales, value_scales = (
            scales.as_strided(extents[:-1], steps, start + (2 * layer + which) * tile[0] * tile[1])
            for which in (0, 1)
        )
        return KvLayer(keys, vals, key_scales, value_scales)

    def read(self, blocks: Tensor) -> Tensor:
        """The bytes (blocks, block_bytes) of these blocks."""
        return self.memory[blocks]

    def write(self, blocks: Tensor, data: Tensor) -> None:
        """Puts such bytes into these blocks."""
        self.memory[blocks] = data
