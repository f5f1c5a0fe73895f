"""A Llama in plain PyTorch, as a careful user writes one: the peer that our engine is held against.

Joined projections, PyTorch's fused attention (SDPA), a static KV cache, one layer compiled by
`torch.compile` and used for all, and the whole decode step captured as a CUDA graph. It is given
what favours it: a batch is rectangular, its cache exactly as long as the context (so attention
needs no mask), pages do not exist, and the next token is an argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from twostroke.bench.gpu.synthetic import SyntheticWeights
from twostroke.bench.gpu.timing import Launch, capture
from twostroke.kernels.cuda.types import Tensor
from twostroke.models.rope import get_frequencies
from twostroke.spec.model import ModelSpec

# Without its own CUDA graphs: a graph of the whole step is captured instead, which is faster than
# one for each layer. Prefill multiplies in cuBLAS either way, so there nothing is searched for.
DECODE_MODE = "max-autotune-no-cudagraphs"
PREFILL_MODE = "default"


class LayerWeights(NamedTuple):
    """One layer: norms (width,), qkv, o, gate_up, down as (outputs, inputs).

    A tuple and not a dataclass, because the compiler takes tuples of tensors as inputs.
    """

    attn_norm: Tensor
    qkv: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class TorchLlama:
    """The model over shared weights; KV lies in memory that it is lent."""

    def __init__(self, spec: ModelSpec, source: SyntheticWeights, compiled: bool = True) -> None:
        """compiled: False runs everything eagerly, which needs no compiler."""
        if compiled:
            torch.compiler.reset()  # what another model was compiled for is of no use to this one
        self._spec = spec
        self._compiled = compiled
        self._embed = source.get_values("embed")
        self._final_norm = source.get_values("final_norm")
        self._head = source.get_values("embed" if spec.tied_embeddings else "head")
        self._layers = [_collect(source, f"layers.{index}.") for index in range(spec.num_layers)]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._embed.device

    def view_cache(self, memory: Tensor, batch: int, context: int) -> Tensor:
        """KV (layers, 2, batch, kv_heads, context, head_dim) over the start of flat `memory`."""
        spec = self._spec
        shape = (spec.num_layers, 2, batch, spec.num_kv_heads, context, spec.head_dim)
        count = 1
        for extent in shape:
            count *= extent
        return memory.view(-1)[:count].view(shape)

    def prepare(self, memory: Tensor, ids: Tensor, context: int) -> Launch:
        """One step of rows that end at `context`, ready to launch; gives logits (batch, vocab).

        ids (batch, tokens): of the new tokens. memory: flat, of the weights' type, large enough for
        the cache; holds finite numbers.
        """
        batch, tokens = ids.shape
        cache = self.view_cache(memory, batch, context)
        cos, sin = self._make_rope(tokens, context)
        places = torch.arange(context - tokens, context, device=self.device)
        layer = self._get_layer(tokens, context)

        @torch.no_grad()
        def step() -> Tensor:
            x = functional.embedding(ids, self._embed)
            for weights, (keys, values) in zip(self._layers, cache, strict=True):
                x = layer(x, weights, (keys, values, places), (cos, sin))
            last = _norm(x[:, -1], self._final_norm, self._spec.norm_eps)
            logits = functional.linear(last, self._head)
            logits.argmax(-1)
            return logits

        if self.device.type != "cuda" or tokens > 1:
            return step
        return capture(step, self.device)

    def _get_layer(self, tokens: int, context: int) -> Callable[..., Tensor]:
        spec = self._spec
        heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
        eps, scale = spec.norm_eps, spec.attention_scale
        assert tokens in (1, context), "prompts are read whole"

        def layer(
            x: Tensor, own: LayerWeights, kv: tuple[Tensor, ...], rope: tuple[Tensor, Tensor]
        ) -> Tensor:
            batch, (keys, values, places) = x.shape[0], kv
            h = functional.linear(_norm(x, own.attn_norm, eps), own.qkv)
            h = h.view(batch, tokens, heads + 2 * kv_heads, width).transpose(1, 2)
            q, k, v = h.split((heads, kv_heads, kv_heads), dim=1)
            # By index and not by slice: the compiler keeps that in place.
            keys[:, :, places] = _rotate(k, *rope)
            values[:, :, places] = v
            h = functional.scaled_dot_product_attention(
                _rotate(q, *rope),
                keys,
                values,
                is_causal=tokens > 1,
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
            h = h.transpose(1, 2).reshape(batch, tokens, heads * width)
            x = x + functional.linear(h, own.o)
            h = functional.linear(_norm(x, own.ffn_norm, eps), own.gate_up)
            gate, up = h.chunk(2, dim=-1)
            return x + functional.linear(functional.silu(gate) * up, own.down)

        if not self._compiled:
            return layer
        mode = DECODE_MODE if tokens == 1 else PREFILL_MODE
        compiled: Callable[..., Tensor] = torch.compile(layer, mode=mode, dynamic=False)
        return compiled

    def _make_rope(self, tokens: int, context: int) -> tuple[Tensor, Tensor]:
        """cos and sin (tokens, head_dim / 2)."""
        frequencies = get_frequencies(self._spec.layers[0].rope, self._spec.head_dim, None)
        places = torch.arange(context - tokens, context, device=self.device, dtype=torch.float64)
        angles = places[:, None] * torch.from_numpy(frequencies).to(self.device)
        return angles.cos().to(self._embed.dtype), angles.sin().to(self._embed.dtype)


def _collect(source: SyntheticWeights, prefix: str) -> LayerWeights:
    return LayerWeights(
        source.get_values(prefix + "attn_norm"),
        source.get_joined(prefix + "q"),
        source.get_joined(prefix + "o"),
        source.get_values(prefix + "ffn_norm"),
        source.get_joined(prefix + "gate"),
        source.get_joined(prefix + "down"),
    )


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, tokens, head_dim) with its halves rotated by each token's position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
