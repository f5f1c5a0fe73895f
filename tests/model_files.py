"""Small model files of every family, written by the libraries that own the formats.

A recipe is the list of what goes into a file; a test changes one thing in it and writes it. The
weights are random bytes of the right size, but no two runs differ.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from twostroke.spec.quant import Format

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 32, 2, 40
U32, F32, STR = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
BOOL, ARRAY, I32 = (
    gguf.GGUFValueType.BOOL,
    gguf.GGUFValueType.ARRAY,
    gguf.GGUFValueType.INT32,
)


@dataclass
class GGUFRecipe:
    """Metadata as key -> (type, value[, element type]); tensors as name -> (shape, format)."""

    architecture: str
    keys: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], Format]] = field(default_factory=dict)

    def set(self, name: str, kind: Any, value: Any) -> None:
        """Set a key under the architecture's own prefix."""
        self.keys[f"{self.architecture}.{name}"] = (kind, value)

    def write(self, path: Path) -> Path:
        """Write the file with the gguf package."""
        rng = np.random.default_rng(7)
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, (kind, value, *element) in self.keys.items():
            writer.add_key_value(key, value, kind, sub_type=element[0] if element else None)
        for name, (shape, fmt) in self.tensors.items():
            row_bytes = fmt.get_bytes(shape[-1])
            data = rng.integers(0, 60, (*shape[:-1], row_bytes), dtype=np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[fmt.value])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def make_gguf(architecture: str, matrices: Format = Format.F32, **sizes: int) -> GGUFRecipe:
    """The recipe of a sound file; `sizes` may set width, ffn, head_dim."""
    width = sizes.get("width", WIDTH)
    ffn, head_dim = sizes.get("ffn", FFN), sizes.get("head_dim", HEAD_DIM)
    recipe = GGUFRecipe(architecture)
    recipe.keys["general.name"] = (STR, f"tiny {architecture}")
    for name, value in {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }.items():
        recipe.set(name, U32, value)
    recipe.set("attention.layer_norm_rms_epsilon", F32, 1e-5)
    recipe.set("rope.freq_base", F32, 500000.0)
    if architecture == "gemma3":
        recipe.set("attention.sliding_window", U32, 16)
        add_sentencepiece(recipe)
    else:
        add_byte_bpe(recipe)
    matrix, vector = matrices, Format.F32
    recipe.tensors["token_embd.weight"] = ((VOCAB, width), matrix)
    for layer in range(LAYERS):
        for name, shape in _get_layer(architecture, width, ffn, head_dim).items():
            fmt = matrix if len(shape) == 2 else vector
            recipe.tensors[f"blk.{layer}.{name}"] = (shape, fmt)
    recipe.tensors["output_norm.weight"] = ((width,), vector)
    return recipe


def _get_layer(
    architecture: str, width: int, ffn: int, head_dim: int
) -> dict[str, tuple[int, ...]]:
    query, kv = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (width,),
        "attn_q.weight": (query, width),
        "attn_k.weight": (kv, width),
        "attn_v.weight": (kv, width),
        "attn_output.weight": (width, query),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (ffn, width),
        "ffn_up.weight": (ffn, width),
        "ffn_down.weight": (width, ffn),
    }
    if architecture == "qwen2":
        shapes |= {"attn_q.bias": (query,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if architecture in ("qwen3", "gemma3"):
        shapes |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture == "gemma3":
        shapes |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    return shapes


def add_byte_bpe(recipe: GGUFRecipe) -> None:
    """A byte-level vocabulary whose last two tokens are control tokens."""
    prefix = "tokenizer.ggml."
    tokens = [f"t{index}" for index in range(VOCAB - 2)] + ["<|im_start|>", "<|im_end|>"]
    recipe.keys[prefix + "model"] = (STR, "gpt2")
    recipe.keys[prefix + "pre"] = (STR, "qwen2")
    recipe.keys[prefix + "tokens"] = (ARRAY, tokens, STR)
    recipe.keys[prefix + "token_type"] = (ARRAY, [1] * (VOCAB - 2) + [3, 3], I32)
    recipe.keys[prefix + "merges"] = (ARRAY, ["t 0", "t 1"], STR)
    recipe.keys[prefix + "bos_token_id"] = (U32, VOCAB - 2)
    recipe.keys[prefix + "eos_token_id"] = (U32, 0)
    recipe.keys[prefix + "add_bos_token"] = (BOOL, False)


def add_sentencepiece(recipe: GGUFRecipe) -> None:
    """A SentencePiece-style vocabulary that says nothing but what it must."""
    prefix = "tokenizer.ggml."
    tokens = ["<unk>", "<s>", "</s>"] + [f"▁t{index}" for index in range(VOCAB - 3)]
    recipe.keys[prefix + "model"] = (STR, "llama")
    recipe.keys[prefix + "tokens"] = (ARRAY, tokens, STR)
    recipe.keys[prefix + "token_type"] = (ARRAY, [2, 3, 3] + [1] * (VOCAB - 3), I32)
    scores = [-float(index) for index in range(VOCAB)]
    recipe.keys[prefix + "scores"] = (ARRAY, scores, F32)


# ---- Hugging Face folders -----------------------------------------------------------------------


@dataclass
class FolderRecipe:
    """config.json, tensors as name -> array, and any further JSON files by name."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, shards: int = 1) -> Path:
        """Write the folder with the safetensors package."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors")
            return folder
        names = list(self.tensors)
        where = {}
        for index in range(shards):
            part = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            mine = names[index::shards]
            save_file({name: self.tensors[name] for name in mine}, folder / part)
            where |= dict.fromkeys(mine, part)
        index_text = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index_text)
        return folder


def make_folder(model_type: str, dtype: Any = np.float16) -> FolderRecipe:
    """The recipe of a sound folder with untied embeddings (tied for gemma3)."""
    gemma = model_type.startswith("gemma3")
    config: dict[str, Any] = {
        "architectures": ["AnyForCausalLM"],
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": gemma,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    if gemma:
        config |= {"query_pre_attn_scalar": 64, "sliding_window": 16}
    tensors = {"model.embed_tokens.weight": _make((VOCAB, WIDTH), dtype)}
    for layer in range(LAYERS):
        for name, shape in _get_folder_layer(model_type).items():
            tensors[f"model.layers.{layer}.{name}"] = _make(shape, dtype)
    tensors["model.norm.weight"] = _make((WIDTH,), dtype)
    if not gemma:
        tensors["lm_head.weight"] = _make((VOCAB, WIDTH), dtype)
    return FolderRecipe(config, tensors, {"tokenizer.json": make_tokenizer_json()})


def _make(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def _get_folder_layer(model_type: str) -> dict[str, tuple[int, ...]]:
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (WIDTH,),
        "self_attn.q_proj.weight": (query, WIDTH),
        "self_attn.k_proj.weight": (kv, WIDTH),
        "self_attn.v_proj.weight": (kv, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, query),
        "post_attention_layernorm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (FFN, WIDTH),
        "mlp.up_proj.weight": (FFN, WIDTH),
        "mlp.down_proj.weight": (WIDTH, FFN),
    }
    if model_type == "qwen2":
        shapes |= {f"self_attn.{part}_proj.bias": (kv,) for part in "kv"}
        shapes["self_attn.q_proj.bias"] = (query,)
    if model_type == "qwen3" or model_type.startswith("gemma3"):
        shapes |= {f"self_attn.{part}_norm.weight": (HEAD_DIM,) for part in "qk"}
    if model_type.startswith("gemma3"):
        shapes |= {f"{part}_feedforward_layernorm.weight": (WIDTH,) for part in ("pre", "post")}
    return shapes


def make_tokenizer_json() -> dict[str, Any]:
    """A `tokenizers` file: three special tokens and letters."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3}
    vocab |= {chr(ord("a") + index): index + 4 for index in range(VOCAB - 4)}
    added = [
        {"id": token, "content": text, "special": True} for text, token in list(vocab.items())[:4]
    ]
    return {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def write_safetensors_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    """A safetensors file whose header is exactly these bytes."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def make_tiny_llama(**sizes: int) -> GGUFRecipe:
    """A llama of two layers that knows forty tokens and 128 positions."""
    recipe = make_gguf("llama", **sizes)
    kind, tokens, element = recipe.keys["tokenizer.ggml.tokens"]
    merged = ["t", "0", "1", "t0", "t1"]
    recipe.keys["tokenizer.ggml.tokens"] = (kind, merged + tokens[len(merged) :], element)
    return recipe
