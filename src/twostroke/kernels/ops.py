"""The op table: every operation of the forward pass, by name, with shapes.

A backend is one `OpTable` value: `reference/` (NumPy, reads like the paper), `cpu/` (native C++).
Arrays named here are backend arrays: NumPy arrays for the reference, buffer handles where a
backend captures the pass once and replays it. Only `StepArrays` and `SamplingArrays` are always
NumPy. T is the number of tokens in the step, R of rows (sequences), L of positions with logits.

Laws every backend keeps: a token's results depend only on its own sequence's tokens, never on the
other rows, on how the sequence was cut into steps, on physical block numbers or on thread count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.kv import KvElement

Array = Any  # a backend's array of float32 activations
Weight = Any  # a backend's prepared weight

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step's inputs, rows laid end to end.

    tokens (T,): ids. positions (T,): place in the sequence. row_offsets (R+1,): row r owns tokens
    row_offsets[r] … row_offsets[r+1]-1, at consecutive positions. block_tables (R, max_blocks):
    physical block of each logical block, -1 beyond the end. logit_rows (L,): ascending indices
    into the T tokens whose logits are wanted.
    """

    tokens: I32
    positions: I32
    row_offsets: I32
    block_tables: I32
    logit_rows: I32


@dataclass(frozen=True, slots=True)
class KVShape:
    """The KV pool: `num_blocks` blocks of `block_tokens` tokens for every layer.

    A block holds K and V of all KV heads of one layer; how a backend
    lays them out inside is its own affair.
    """

    num_layers: int
    num_blocks: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    element: KvElement = KvElement.F16

    @property
    def bytes(self) -> int:
        """Bytes of the whole pool."""
        per_token = 2 * self.num_kv_heads * self.element.get_head_bytes(self.head_dim)
        return self.num_layers * self.num_blocks * self.block_tokens * per_token


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """How each of L logit rows is sampled (see core.types.SamplingSpec); all arrays length L.

    temperature, top_p, min_p, repetition, presence, frequency: float32. top_k: int32, 0 is off.
    seed: uint64; counter (L, 2): uint64 pairs (position of the new token, sequence index).
    bias_offsets (L+1,) into bias_tokens and bias_values; history_offsets (L+1,) into
    history_tokens, of which the first history_prompt (L,) are prompt. mask_offsets (L+1,) into
    mask_bytes, uint8: which tokens may be drawn (see spec.step.Row.mask), all where a row has no
    bytes. top (L,): how many alternatives to report, -1 for no log-probabilities at all.
    """

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    repetition: F32
    presence: F32
    frequency: F32
    seed: U64
    counter: U64
    bias_offsets: I32
    bias_tokens: I32
    bias_values: F32
    history_offsets: I32
    history_tokens: I32
    history_prompt: I32
    mask_offsets: I32
    mask_bytes: U8
    top: I32


@dataclass(frozen=True, slots=True)
class Drawn:
    """What sampling or scoring gives for L rows.

    tokens (L,) int32. logprobs (L,) float32 of the tokens under the model's own distribution
    (before penalties, bias, temperature); NaN where top < 0. top_tokens, top_logprobs (L, M):
    the most likely tokens best first, ties by smaller id; -1 / NaN beyond a row's `top`.
    """

    tokens: I32
    logprobs: F32
    top_tokens: I32
    top_logprobs: F32


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin, each (max_positions, head_dim/2) float32, and which values pair up.

    layout is "half" (i with i + head_dim/2) or "interleaved" (2i with 2i + 1).
    """

    cos: F32
    sin: F32
    layout: str


@dataclass(frozen=True, slots=True)
class OpTable:
    """One backend's implementations.

    embed(step, table, scale) -> (T, width): rows of `table` for step.tokens, times scale.
    rms_norm(x, weight, eps): x / rms(x) * weight over groups of weight's length along the last
      axis (Zhang & Sennrich 2019), so one call norms all heads of q or k.
    linear(x, weight, bias) -> (T, out): x @ weight.T + bias (bias may be None).
    rope(step, x, table) -> like x: rotates each head of x (T, heads*head_dim) by its position.
    write_kv(step, layer, k, v): stores (T, kv_heads*head_dim) at the tokens' slots.
    attention(step, layer, q, scale, window) -> (T, heads*head_dim): causal softmax attention over
      the sequence's blocks, its own tokens included; window None or tokens seen, self included.
    gated(gate, up, activation) -> activation(gate) * up; "silu" or "gelu_tanh".
    add(x, y): elementwise sum.
    take_rows(step, x) -> (L, width): rows of x at step.logit_rows.
    logits(x, weight) -> (L, vocab): the output head.
    all_reduce(x): sum over tensor-parallel ranks; the identity on one rank.
    """

    name: str
    embed: Callable[..., Array]
    rms_norm: Callable[..., Array]
    linear: Callable[..., Array]
    rope: Callable[..., Array]
    write_kv: Callable[..., None]
    attention: Callable[..., Array]
    gated: Callable[..., Array]
    add: Callable[..., Array]
    take_rows: Callable[..., Array]
    logits: Callable[..., Array]
    all_reduce: Callable[..., Array]
