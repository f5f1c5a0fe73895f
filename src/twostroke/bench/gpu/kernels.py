"""One attention call over a paged pool of its own, as the engine makes them, ready to launch.

The only file of the benchmark that knows how a kernel is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twostroke.bench.gpu.timing import Launch
from twostroke.bench.gpu.workloads import SEED
from twostroke.kernels.cuda import attention
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors, Tensor


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Heads of queries and of keys, and values of a head."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Rows that end at one context, in the pool's layout and in PyTorch's.

    q (batch, heads, tokens, head_dim), k, v (batch, kv_heads, context, head_dim), float16: the same
    numbers as in `kv`, whose blocks are scattered.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv: KvLayer
    step: StepTensors
    scratch: attention.AttentionScratch

    def prepare(self) -> Launch:
        """Our attention of the case; returns its output (batch * tokens, heads * head_dim)."""
        batch, heads, tokens, head_dim = self.q.shape
        q = self.q.transpose(1, 2).contiguous().view(batch * tokens, heads, head_dim)
        out = torch.full((batch * tokens, heads * head_dim), torch.nan, dtype=q.dtype).to(q.device)
        look = attention.Look(head_dim**-0.5)

        def launch() -> Tensor:
            attention.attend(out, q, self.kv, self.step, look, self.scratch)
            return out

        return launch


def make_case(
    batch: int, tokens: int, context: int, sizes: HeadSizes, device: torch.device
) -> AttentionCase:
    """A case of random numbers; contexts are filled up to whole blocks behind the end."""
    generator = torch.Generator(device).manual_seed(SEED)
    table_blocks = -(-context // BLOCK_TOKENS)
    shape = (batch * table_blocks, 2, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim)
    pool = torch.empty(shape, dtype=torch.float16, device=device).normal_(generator=generator)
    kv = KvLayer(pool[:, 0], pool[:, 1])
    order = torch.randperm(shape[0], generator=generator, device=device)
    tables = order.view(batch, table_blocks).to(torch.int32)
    q = torch.empty(
        batch, sizes.heads, tokens, sizes.head_dim, dtype=torch.float16, device=device
    ).normal_(generator=generator)
    k, v = (_gather(part, tables, context) for part in (kv.keys, kv.values))
    group = sizes.heads // sizes.kv_heads
    tile = attention.get_tile_tokens(group, sizes.head_dim, False)
    scratch = attention.AttentionScratch.allocate(
        device, batch, sizes.heads, sizes.head_dim, context
    )
    return AttentionCase(q, k, v, kv, _make_step(tables, tokens, context, tile), scratch)


def _gather(part: Tensor, tables: Tensor, context: int) -> Tensor:
    """(batch, kv_heads, context, head_dim), contiguous, of a pool's keys or values."""
    rows = part[tables.long()].transpose(1, 2).flatten(2, 3)
    return rows[:, :, :context].contiguous()


def _make_step(tables: Tensor, tokens: int, context: int, tile: int) -> StepTensors:
    """Every row has `tokens` new tokens that end at `context`."""
    batch, device = tables.shape[0], tables.device

    def make(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows = range(batch)
    tiles = [(row, first) for row in rows for first in range(0, tokens, tile) if tokens > 1]
    return StepTensors(
        tokens=make([0] * (batch * tokens)),
        positions=make(list(range(context - tokens, context)) * batch),
        token_rows=make([row for row in rows for _ in range(tokens)]),
        row_offsets=make([row * tokens for row in range(batch + 1)]),
        contexts=make([context] * batch),
        block_tables=tables,
        logit_rows=make([(row + 1) * tokens - 1 for row in rows]),
        decode_rows=make([row for row in rows if tokens == 1]),
        tiles=make([number for pair in tiles for number in pair]).view(len(tiles), 2),
        tile_tokens=tile,
        longest=context,
    )
