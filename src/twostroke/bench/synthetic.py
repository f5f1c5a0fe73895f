"""Models that need no download: the shape of a known one, random weights in real formats.

A synthetic model answers nonsense, but it takes as long as a real one of its shape, in every engine
that reads GGUF. It is written once, with the `gguf` package, and kept in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.quant import Format
from twostroke.weights.catalog import get_cache_dir

SEED = 20
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """A llama model: its sizes, and the formats of its matrices and of its embedding."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab: int
    context: int
    rope_base: float
    matrices: Format = Format.Q4_K
    embedding: Format = Format.Q6_K


SYNTHETIC = {
    "llama-1b-synthetic": Shape(16, 2048, 32, 8, 64, 8192, 128_256, 131_072, 500_000.0),
}


def make_synthetic(name: str) -> Path:
    """The file of a synthetic model, written unless it is there."""
    path = get_cache_dir() / "bench" / f"{name}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        write_synthetic(SYNTHETIC[name], name, partial)
        partial.rename(path)
    return path


def write_synthetic(shape: Shape, name: str, path: Path) -> None:
    """Write a whole file; the same bytes every time."""
    import gguf

    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    # Keys that our reader and llama.cpp do without, and OpenVINO's does not.
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, shape.vocab)
    for tensor, extents, fmt in list_tensors(shape):
        if fmt is Format.F32:
            writer.add_tensor(tensor, np.ones(extents, np.float32))
        else:
            data = make_weights(rng, fmt, extents)
            writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[fmt.value])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def list_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """Names, extents and formats, in the order of the file; the head is the embedding."""
    width, ffn = shape.width, shape.ffn_width
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab, width), shape.embedding
    for layer in range(shape.layers):
        matrices = {
            "attn_q": (query, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, query),
            "ffn_gate": (ffn, width),
            "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }
        for name, extents in matrices.items():
            yield f"blk.{layer}.{name}.weight", extents, shape.matrices
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (width,), Format.F32
    yield "output_norm.weight", (width,), Format.F32


def make_weights(rng: np.random.Generator, fmt: Format, extents: tuple[int, ...]) -> U8:
    """Random blocks, (rows, bytes of a row), with a mean near 0 and a variance of 1 / inputs."""
    rows, inputs = extents
    blocks = rows * inputs // fmt.block.weights
    deviation = inputs**-0.5
    made = _make_q4_k(rng, blocks, deviation) if fmt is Format.Q4_K else None
    if fmt is Format.Q6_K:
        made = _make_q6_k(rng, blocks, deviation)
    if made is None:
        raise ValueError(f"synthetic weights are Q4_K or Q6_K, not {fmt.value}")
    return made.reshape(rows, fmt.get_bytes(inputs))


def _make_q4_k(rng: np.random.Generator, blocks: int, deviation: float) -> U8:
    """d·s·q - m·s·7.5: scale and minimum of a sub-block share the six bits s, q has four."""
    scales = rng.integers(16, 64, (blocks, 8), dtype=np.uint8)
    low, high = scales[:, :4], scales[:, 4:]
    data = np.empty((blocks, Format.Q4_K.block.bytes), np.uint8)
    step = deviation / (40 * 4.6)  # over a usual scale and the deviation of q
    data[:, :4] = np.array([step, 7.5 * step], np.float16).view(np.uint8)
    data[:, 4:8] = data[:, 8:12] = low | (high >> 4 << 6)
    data[:, 12:16] = (high & 15) | (high << 4)
    data[:, 16:] = np.frombuffer(rng.bytes(blocks * 128), np.uint8).reshape(blocks, 128)
    return data


def _make_q6_k(rng: np.random.Generator, blocks: int, deviation: float) -> U8:
    """d·s·(q - 32): q has six bits, the scale of each sixteen weights is a signed byte."""
    data = np.empty((blocks, Format.Q6_K.block.bytes), np.uint8)
    data[:, :192] = np.frombuffer(rng.bytes(blocks * 192), np.uint8).reshape(blocks, 192)
    data[:, 192:208] = rng.integers(32, 97, (blocks, 16), dtype=np.uint8)
    data[:, 208:] = np.array([deviation / (64 * 18.5)], np.float16).view(np.uint8)
    return data


def _add_vocabulary(writer: object, size: int) -> None:
    """Byte-level BPE: every byte, one merge, two control tokens, and fillers nobody can write."""
    import gguf
    from gguf.constants import TokenType

    assert isinstance(writer, gguf.GGUFWriter)
    control = ["<|begin_of_text|>", "<|end_of_text|>"]
    plain = [*get_byte_letters(), "he"]
    filler = [f"<filler {index}>" for index in range(size - len(control) - len(plain))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*control, *plain, *filler])
    kinds = [TokenType.CONTROL] * len(control) + [TokenType.NORMAL] * (len(plain) + len(filler))
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)


def get_byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]
