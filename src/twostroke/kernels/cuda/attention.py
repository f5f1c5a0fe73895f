"""Paged attention on the GPU: who is computed how.

A step's rows of one token are decoded with split keys (attention_decode.py), all others are cut
into tiles of tokens (attention_prefill.py); where a token's bits must not depend on its company,
both go through one kernel (attention_exact.py). Owns the choice of tiles and of runs. Nothing is
allocated here and nothing waits, so that calls may be captured.
"""

from __future__ import annotations

from twostroke.kernels.cuda.attention_decode import DecodeConfig, decode
from twostroke.kernels.cuda.attention_exact import attend_exact
from twostroke.kernels.cuda.attention_prefill import PrefillConfig, prefill
from twostroke.kernels.cuda.attention_work import (
    AttentionScratch,
    Look,
    Work,
    count_scratch_bytes,
)
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors, Tensor

__all__ = [
    "AttentionScratch",
    "Look",
    "attend",
    "choose_decode",
    "choose_prefill",
    "count_scratch_bytes",
    "get_tile_tokens",
]

# Programs a processor that a decode is cut into at most, if its rows and heads are fewer.
DECODE_PROGRAMS = 2
# Most runs of a row, whose parts one program puts together; fewest blocks worth a run of their own.
MAX_RUNS = 16
LEAST_BLOCKS = 2
# Blocks a run has at most while there are runs to be had, and at least where rows are cut for it: a
# row far longer than the others must not keep the rest of the device waiting.
LONG_BLOCKS = 64
LONG_LEAST_BLOCKS = 8


def attend(
    out: Tensor,
    q: Tensor,
    kv: KvLayer,
    step: StepTensors,
    look: Look,
    scratch: AttentionScratch,
) -> None:
    """Causal attention of every token over its row's keys in the pool, its own included.

    Args: out (T, heads * head_dim) float16 or bfloat16, written; q (T, heads, head_dim), strided
    over tokens; kv, the layer's pool, which already holds the step's own tokens; look, scale and
    window; scratch, for as many decode rows as the step has. Of 8-bit pools both q and the keys are
    rotated, and look.scale is divided by the rotation's n (see kernels/reference/ops.py: rotate).
    Rows with a context of 0 get zeros.
    """
    work = Work(out, q, kv, step, look)
    work.check()
    if look.exact:
        attend_exact(work, scratch)
        return
    if step.decode_rows.shape[0]:
        decode(work, scratch, choose_decode(work, scratch))
    if step.tiles.shape[0]:
        prefill(work, choose_prefill(work))


def get_tile_tokens(group: int, head_dim: int, exact: bool) -> int:
    """Tokens of the tiles that a step is to be cut into for a model with these heads.

    group: query heads a KV head. Programs take shares of a tile, so it need not fit one.
    """
    del group, head_dim, exact
    return 128


def choose_decode(work: Work, scratch: AttentionScratch) -> DecodeConfig:
    """How a decode is cut: into programs enough for the device, out of what a capture may know."""
    rows = work.step.decode_rows.shape[0]
    longest = -(-work.step.longest // BLOCK_TOKENS)
    most = max(1, min(scratch.places // rows, longest))
    runs = DECODE_PROGRAMS * scratch.processors // (rows * work.kv_heads)
    runs = max(1, min(runs, MAX_RUNS, -(-longest // LEAST_BLOCKS), most))
    for_long = min(-(-longest // LONG_BLOCKS), most)
    if for_long > runs:
        runs, least = for_long, LONG_LEAST_BLOCKS
    else:
        least = LEAST_BLOCKS
    warps, stages = (2, 4) if work.head_dim <= 128 else (4, 2)
    return DecodeConfig(runs, least, warps, stages)


def choose_prefill(work: Work) -> PrefillConfig:
    """How a prefill is cut: two programs of 64 queries a processor beat one of 128 on an H100."""
    can_box = work.kv.keys.dtype == work.q.dtype
    return PrefillConfig(64, 64, warps=4, stages=3 if work.head_dim <= 128 else 2, boxes=can_box)
