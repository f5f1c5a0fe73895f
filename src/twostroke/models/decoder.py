"""The decoder's forward pass: one function for every family, against the op table.

Everything that differs between models is a fact of ModelSpec (norm placement, QK-norm, windows,
rope, activation, biases), so there is one pass and no model classes. It holds no weights and no
state; a backend may record the calls once and replay them.
"""

from __future__ import annotations

from collections.abc import Mapping

from twostroke.kernels.ops import Array, OpTable, RopeTable, StepArrays, Weight
from twostroke.spec.model import LayerSpec, ModelSpec, RopeSpec

RopeTables = Mapping[RopeSpec, RopeTable]


def run_layers(
    spec: ModelSpec,
    ops: OpTable,
    weights: Mapping[str, Weight],
    ropes: RopeTables,
    step: StepArrays,
) -> Array:
    """All layers over T tokens, writing their KV; returns (T, width), not yet normed."""
    x = ops.embed(step, weights["embed"], spec.embed_scale)
    return run_stage(spec, ops, weights, ropes, step, x)


def run_stage(
    spec: ModelSpec,
    ops: OpTable,
    weights: Mapping[str, Weight],
    ropes: RopeTables,
    step: StepArrays,
    x: Array,
) -> Array:
    """The layers of `spec`, all or a stage's, over x (T, width); returns as much, not normed."""
    for index, layer in enumerate(spec.layers):
        own = _Layer(weights, f"layers.{index}.")
        x = _add_attention(spec, ops, own, (index, layer, ropes[layer.rope]), step, x)
        x = _add_ffn(spec, ops, own, x)
    return x


def run_head(
    spec: ModelSpec, ops: OpTable, weights: Mapping[str, Weight], step: StepArrays, x: Array
) -> Array:
    """Logits (L, vocab) at step.logit_rows of the layers' output x (T, width)."""
    x = ops.take_rows(step, x)
    x = ops.rms_norm(x, weights["final_norm"], spec.norm_eps)
    return ops.logits(x, weights["embed" if spec.tied_embeddings else "head"])


class _Layer:
    """One layer's weights by short name; a weight the model does not have is None."""

    def __init__(self, weights: Mapping[str, Weight], prefix: str) -> None:
        self._weights = weights
        self._prefix = prefix

    def __getitem__(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    def get_bias(self, name: str) -> Weight | None:
        return self._weights.get(f"{self._prefix}{name}.bias")


def _add_attention(
    spec: ModelSpec,
    ops: OpTable,
    own: _Layer,
    place: tuple[int, LayerSpec, RopeTable],
    step: StepArrays,
    x: Array,
) -> Array:
    """x plus the attention block's output."""
    index, layer, rope = place
    h = ops.rms_norm(x, own["attn_norm"], spec.norm_eps)
    q, k, v = (ops.linear(h, own[name], own.get_bias(name)) for name in "qkv")
    if spec.qk_norm:
        q = ops.rms_norm(q, own["q_norm"], spec.norm_eps)
        k = ops.rms_norm(k, own["k_norm"], spec.norm_eps)
    q = ops.rope(step, q, rope)
    k = ops.rope(step, k, rope)
    ops.write_kv(step, index, k, v)
    h = ops.attention(step, index, q, spec.attention_scale, layer.window)
    h = ops.all_reduce(ops.linear(h, own["o"], own.get_bias("o")))
    if spec.post_norms:
        h = ops.rms_norm(h, own["post_attn_norm"], spec.norm_eps)
    return ops.add(x, h)


def _add_ffn(spec: ModelSpec, ops: OpTable, own: _Layer, x: Array) -> Array:
    """x plus the gated FFN's output (Shazeer 2020, GLU variants)."""
    h = ops.rms_norm(x, own["ffn_norm"], spec.norm_eps)
    gate = ops.linear(h, own["gate"], own.get_bias("gate"))
    up = ops.linear(h, own["up"], own.get_bias("up"))
    h = ops.gated(gate, up, spec.activation)
    h = ops.all_reduce(ops.linear(h, own["down"], own.get_bias("down")))
    if spec.post_norms:
        h = ops.rms_norm(h, own["post_ffn_norm"], spec.norm_eps)
    return ops.add(x, h)
