"""ModelSpec: a frozen, complete description of a decoder-only transformer.

It owns every fact about a model's shape that loader, kernels, planner and simulator need, under
one name each. It never holds weights. Whatever reads a model file must either fill this in fully
or refuse the file (`UnsupportedModel`): a model half understood is a wrong answer at full speed.

Canonical tensor names (`i` is the layer):

    embed                                    (vocab, width)
    layers.i.attn_norm                       (width,)
    layers.i.{q,k,v}      [.bias]            (heads*head_dim | kv_heads*head_dim, width)
    layers.i.{q,k}_norm                      (head_dim,)           with qk_norm
    layers.i.o            [.bias]            (width, heads*head_dim)
    layers.i.post_attn_norm                  (width,)              with post_norms
    layers.i.ffn_norm                        (width,)
    layers.i.{gate,up}    [.bias]            (ffn_width, width)
    layers.i.down         [.bias]            (width, ffn_width)
    layers.i.post_ffn_norm                   (width,)              with post_norms
    layers.i.router                          (num_experts, width)  with experts, which have in place
    layers.i.experts.e.{gate,up,down}        of a layer's one FFN   each its own, e from 0
    final_norm                               (width,)
    head                                     (vocab, width)        unless tied_embeddings
    rope_factors                             (head_dim/2,)         where the file stores them
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format


class RopeLayout(enum.Enum):
    """Which pairs of a head's values rotate together.

    HALF rotates (i, i + dim/2), INTERLEAVED rotates (2i, 2i + 1). GGUF stores llama-family q and k
    already permuted for INTERLEAVED; every other source uses HALF.
    """

    HALF = "half"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Frequency-dependent rope scaling of Llama 3.1 (Grattafiori et al. 2024, §3.4.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """Each frequency divided by its entry of the `rope_factors` tensor stored in the file."""


RopeScaling = Llama3Scaling | LinearScaling | StoredFactors | None


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021): base frequency and scaling."""

    base: float
    scaling: RopeScaling = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ between layers: attention window and rope.

    window: number of most recent positions a query sees, itself included; None sees all.
    """

    rope: RopeSpec
    window: int | None = None


class ShardAxis(enum.Enum):
    """How tensor parallelism divides a tensor."""

    COLUMN = 0  # rows of the stored (out, in) matrix are divided: outputs are divided
    ROW = 1  # columns are divided: partial sums are added up
    NONE = -1  # every rank holds it whole


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight: canonical name, logical shape (out, in) or (n,), format and shard axis."""

    name: str
    shape: tuple[int, ...]
    format: Format
    shard: ShardAxis

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def bytes(self) -> int:
        """Bytes in this format."""
        return self.format.get_bytes(self.num_weights)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: see the module text for tensor names. All sizes are counts, not bytes.

    norm_offset: added to every stored norm weight before use (1.0 for Gemma's safetensors).
    activation: of the gated FFN, "silu" or "gelu_tanh".
    num_experts, experts_per_token: 0 for one FFN a layer; else each layer has so many FFNs of
    ffn_width, of which a router picks experts_per_token for every token (Shazeer et al. 2017).
    attention_scale: multiplies q·k; embed_scale: multiplies embeddings.
    formats: format of each canonical tensor, as stored; absent names default to BF16.
    """

    family: str
    name: str
    width: int
    ffn_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    attention_scale: float
    rope_layout: RopeLayout
    layers: tuple[LayerSpec, ...]
    activation: str = "silu"
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tied_embeddings: bool = True
    stored_rope_factors: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    formats: tuple[tuple[str, Format], ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.experts_per_token <= self.num_experts
        assert (self.num_experts == 0) == (self.experts_per_token == 0)

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.layers)

    @property
    def num_weights(self) -> int:
        """All weights, embeddings counted once."""
        return sum(tensor.num_weights for tensor in self.tensors())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in their stored formats."""
        return sum(tensor.bytes for tensor in self.tensors())

    def get_kv_bytes_per_token(self, element: KvElement = KvElement.F16) -> int:
        """Bytes of K and V that one token leaves behind over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * element.get_head_bytes(self.head_dim)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every weight of the model, in forward order."""
        formats = dict(self.formats)
        yield self._tensor(formats, "embed", (self.vocab_size, self.width), ShardAxis.COLUMN)
        if self.stored_rope_factors:
            yield self._tensor(formats, "rope_factors", (self.head_dim // 2,), ShardAxis.NONE)
        for index in range(self.num_layers):
            yield from self._layer_tensors(formats, f"layers.{index}.")
        yield self._tensor(formats, "final_norm", (self.width,), ShardAxis.NONE)
        if not self.tied_embeddings:
            yield self._tensor(formats, "head", (self.vocab_size, self.width), ShardAxis.COLUMN)

    def _layer_tensors(self, formats: Mapping[str, Format], prefix: str) -> Iterator[TensorSpec]:
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        column, row, whole = ShardAxis.COLUMN, ShardAxis.ROW, ShardAxis.NONE
        matrices = [
            ("q", query, self.width, column, self.qkv_bias),
            ("k", kv, self.width, column, self.qkv_bias),
            ("v", kv, self.width, column, self.qkv_bias),
            ("o", self.width, query, row, self.output_bias),
        ]
        if self.num_experts:
            matrices.append(("router", self.num_experts, self.width, whole, False))
        each = [f"experts.{expert}." for expert in range(self.num_experts)]
        for ffn in each or [""]:
            matrices += [
                (ffn + "gate", self.ffn_width, self.width, column, self.ffn_bias),
                (ffn + "up", self.ffn_width, self.width, column, self.ffn_bias),
                (ffn + "down", self.width, self.ffn_width, row, self.ffn_bias),
            ]
        norms = [("attn_norm", self.width), ("ffn_norm", self.width)]
        if self.qk_norm:
            norms += [("q_norm", self.head_dim), ("k_norm", self.head_dim)]
        if self.post_norms:
            norms += [("post_attn_norm", self.width), ("post_ffn_norm", self.width)]
        for name, extent in norms:
            yield self._tensor(formats, prefix + name, (extent,), whole)
        for name, rows, columns, shard, has_bias in matrices:
            yield self._tensor(formats, prefix + name, (rows, columns), shard)
            if has_bias:
                bias_shard = column if shard is column else whole
                yield self._tensor(formats, prefix + name + ".bias", (rows,), bias_shard)

    @staticmethod
    def _tensor(
        formats: Mapping[str, Format], name: str, shape: tuple[int, ...], shard: ShardAxis
    ) -> TensorSpec:
        return TensorSpec(name, shape, formats.get(name, Format.BF16), shard)
