"""Transformers as a peer: its Llama over the same weights, step by step and continuously batched.

Single steps use its static cache and SDPA, eagerly: compiling its whole model takes longer than
this benchmark may. Continuous batching uses its own scheduler and paged attention; without the
packages `flash-attn` or `kernels` that is "paged|sdpa". Nothing is downloaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from twostroke.bench.gpu.synthetic import SyntheticWeights
from twostroke.bench.gpu.timing import Launch
from twostroke.bench.gpu.traces import Lifetime, TraceRequest
from twostroke.errors import TwostrokeError
from twostroke.spec.model import Llama3Scaling, ModelSpec

_POLL_S = 0.02


class TransformersAbsent(TwostrokeError):
    """Transformers is not installed, or cannot run here; says which."""


def build_model(spec: ModelSpec, source: SyntheticWeights) -> Any:
    """LlamaForCausalLM whose parameters are the source's memory. Raises TransformersAbsent."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
        from transformers.utils import logging as its_logging
    except ImportError as error:
        raise TransformersAbsent(f"transformers cannot be imported: {error}") from error
    its_logging.set_verbosity_error()
    embed = source.get_values("embed")
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        intermediate_size=spec.ffn_width,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_parameters=_describe_rope(spec),
        tie_word_embeddings=spec.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        dtype=embed.dtype,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(_collect_weights(spec, source), assign=True, strict=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(embed.device)
    return model.eval().requires_grad_(False)


def prepare_step(model: Any, memory: torch.Tensor, ids: torch.Tensor, context: int) -> Launch:
    """One step of the model with a static cache over flat `memory`, ready to launch.

    ids (batch, tokens): of the new tokens. Sequences end at `context`, which is the cache's length.
    It gives logits (batch, vocab).
    """
    from transformers import StaticCache

    config, (batch, tokens) = model.config, ids.shape
    cache = StaticCache(config=config, max_cache_len=context)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    count = batch * config.num_key_value_heads * context * config.head_dim
    flat, at = memory.view(-1), 0
    for layer in cache.layers:
        # Initialised over memory that is there, in place of what it would allocate.
        layer.dtype, layer.device = memory.dtype, memory.device
        layer.batch_size, layer.num_heads = batch, config.num_key_value_heads
        layer.k_head_dim = layer.v_head_dim = config.head_dim
        layer.keys = flat[at : at + count].view(shape)
        layer.values = flat[at + count : at + 2 * count].view(shape)
        layer.cumulative_length = layer.cumulative_length.to(memory.device)
        layer.is_initialized = True
        at += 2 * count

    @torch.no_grad()
    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context - tokens)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits.argmax(-1)
        return logits

    return step


def run_trace(
    model: Any,
    warming: Sequence[TraceRequest],
    requests: Sequence[TraceRequest],
    limit_s: float,
) -> list[Lifetime]:
    """Serves the requests as they arrive with continuous batching, greedily, until `limit_s`.

    warming: requests served before, which are not counted. What is not done in time is stopped and
    keeps the tokens it has. Raises TransformersAbsent when continuous batching does not run here.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError as error:
        raise TransformersAbsent(f"no continuous batching: {error}") from error
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    most_new = max(request.new_tokens for request in requests)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=most_new, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False),
    )
    manager.warmup()
    manager.start()
    try:
        _serve(manager, warming, limit_s)
        return _serve(manager, requests, limit_s)
    finally:
        manager.stop(block=True, timeout=10, hard_stop=True)
        manager.destroy()


def _serve(manager: Any, requests: Sequence[TraceRequest], limit_s: float) -> list[Lifetime]:
    lives = [Lifetime(request.at_s, request.new_tokens) for request in requests]
    begin = time.perf_counter()
    sent = done = 0
    while done < len(requests) and time.perf_counter() - begin < limit_s:
        while sent < len(requests) and requests[sent].at_s <= time.perf_counter() - begin:
            one = requests[sent]
            manager.add_request(list(one.prompt), str(sent), one.new_tokens, record_timestamps=True)
            sent += 1
        done += _take_result(manager, lives, begin)
        if not manager.is_running():
            raise TransformersAbsent("its generation thread ended; its log says why")
    if done < len(requests):
        # Stopped, its unfinished requests come back as failed with the tokens they have.
        manager.stop(block=True, timeout=10, hard_stop=True, keep_for_next_session=True)
        while not manager.output_router.output_queue.empty():
            _take_result(manager, lives, begin)
    return lives


def _take_result(manager: Any, lives: list[Lifetime], begin: float) -> int:
    """Note one answer if there is one within moments; returns how many finished."""
    result = manager.get_result(timeout=_POLL_S)
    if result is None:
        return 0
    life = lives[int(result.request_id)]
    life.token_times_s = [when - begin for when in result.timestamps or ()]
    return int(result.is_finished())


def _describe_rope(spec: ModelSpec) -> dict[str, Any]:
    rope = spec.layers[0].rope
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if isinstance(rope.scaling, Llama3Scaling):
        values |= {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_context_tokens,
        }
    return values


def _collect_weights(spec: ModelSpec, source: SyntheticWeights) -> dict[str, torch.Tensor]:
    """Its names → views of the source's memory."""
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm"}
    if not spec.tied_embeddings:
        names["head"] = "lm_head"
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{each: f"self_attn.{each}_proj" for each in "qkvo"},
        **{each: f"mlp.{each}_proj" for each in ("gate", "up", "down")},
    }
    for index in range(spec.num_layers):
        for ours, theirs in parts.items():
            names[f"layers.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
    values = {f"{theirs}.weight": source.get_values(ours) for ours, theirs in names.items()}
    if spec.tied_embeddings:
        values["lm_head.weight"] = source.get_values("embed")
    return values
